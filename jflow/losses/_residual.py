"""The identity of the average velocity as one residual, and what losses make of it.

A flow map `f(x, t, r) = x + (r - t) u(x, t, r)` is exact where it does not change while its
starting point moves along the trajectory: `u = v + (r - t) du/dt`, du/dt with r fixed. `mean_flow`,
`improved_mean_flow`, `eulerian_map_distillation`, `velocity_matching` and the shortcut of
`anchored_consistency` regress u on the right side, without a gradient through it. They differ in v,
in the velocity along which du/dt is taken, in what they do to du/dt and to the residual, in the
times and in the weights of the rows.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jflow._core.arrays import expand_to, float_dtype, mean_event
from jflow._core.checks import check_same_shape, like_state
from jflow.solvers import JVP, total_derivative
from jflow.types import Cond, FlowMap, Key, Params

__all__ = ["adaptive_weight", "clipped_tangent", "flow_map_residual", "normalized_tangent"]


def unchanged(tangent: Array) -> Array:
    """The tangent itself."""
    return tangent


def flow_map_residual(
    name: str,
    flow_map: FlowMap,
    params: Params,
    x: Float[Array, "b *event"],
    t: Float[Array, " b"],
    r: Float[Array, " b"],
    v: Float[Array, "b *event"],
    cond: Cond = None,
    *,
    direction: Float[Array, "b *event"] | None = None,
    derivative: Callable[[Array], Array] = unchanged,
    tangent: Callable[[Array], Array] = unchanged,
    key: Key | None = None,
    jvp: JVP = jax.jvp,
) -> tuple[Float[Array, "b *event"], Float[Array, "b *event"]]:
    """The error of a flow map in `u = v + (r - t) du/dt`, with the gradient that trains it.

    The residual of the identity at u = u(x, t, r), with du/dt = (d_x u) v + d_t u and r fixed, is

        residual = u - v - (r - t) du/dt,

    which is zero everywhere where u is the average velocity of the field v, and u - v where r = t.
    What is returned for training is

        g = tangent(u - sg(v + (r - t) derivative(du/dt))),     d g = d u,

    with no gradient through the right side (sg stops it), and the gradient of u whatever the
    function `tangent` is: a loss of the mean of g^2 moves u by -tangent(...). The cost is one
    forward-mode pass beside the evaluation of the network. Presets, all at x_t = (1 - t) x0 + t x1:

        mean_flow                    v = x1 - x0, or the teacher's; g^2 times `adaptive_weight`
        improved_mean_flow           direction = the velocity that the network itself predicts
        eulerian_map_distillation    derivative = w du/dt; tangent = normalized_tangent()
        velocity_matching            r = 1; derivative = normalized_tangent() where it is wanted
        anchored_consistency         r = 1; tangent = (1 - t^relax) clip(.); weights; and an anchor

    Args:
        name: The name of the loss, with which messages of errors begin.
        flow_map: The average velocity u that is trained.
        params: The params of `flow_map`.
        x: States [b, *event] at the times t.
        t: Times [b] in [0, 1], from the source (0) to data (1).
        r: Times [b] at which the map ends, t <= r <= 1.
        v: The velocity at (x, t), [b, *event]: a teacher's, or x1 - x0 of a pair, whose mean it is.
        cond: The condition of each row, None or a pytree of [b, ...].
        direction: The velocity [b, *event] along which du/dt is taken; None takes v.
        derivative: What is made of du/dt [b, *event] before it enters g, such as
            `lambda d: 0.9 * d` or `normalized_tangent()`. The residual that is returned has du/dt
            itself.
        tangent: What is made of g [b, *event], such as `normalized_tangent()` or
            `clipped_tangent()`. Where v is x1 - x0 of a pair, only a linear function keeps the
            exact map a stationary point, for only then the noise in v averages out.
        key: The key of the network's dropout; None evaluates it deterministically.
        jvp: `jax.jvp`, or `solvers.finite_difference(h)` for a network that has an operation
            without a forward-mode derivative.

    Returns:
        The pair (g, residual), [b, *event] in float32 or better. g is to be squared, averaged over
        the event and weighed; the residual has no gradient, and its mean square says how exact the
        map is.

    Raises:
        ValueError: At trace time for an output of the map that is not shaped like x, and for a
            derivative or a tangent of another shape.

    Examples:
        The exact average velocity of v = x, a flow that grows like exp(t), has no residual.

        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> from jflow.types import FlowMap
        >>> def apply(params, x, t, r, cond=None, *, key=None):
        ...     return x * ((jnp.exp(r - t) - 1) / (r - t))[:, None]
        >>> exact = FlowMap(lambda *args: {}, apply)
        >>> x, t, r = jnp.ones((2, 3)), jnp.array([0.0, 0.5]), jnp.array([0.5, 1.0])
        >>> g, residual = losses.flow_map_residual("own", exact, {}, x, t, r, v=x)
        >>> bool(jnp.allclose(g, 0.0, atol=1e-5))
        True

    References:
        Geng, Deng, Bai, Kolter, He, *Mean Flows for One-step Generative Modeling*, 2025,
            arXiv:2505.13447.
        Sabour, Fidler, Kreis, *Align Your Flow: Scaling Continuous-Time Flow Map Distillation*,
            2025, arXiv:2506.14603.
        That the losses above are one residual is written here in our notation; their times run as
            ours.
    """
    along = v if direction is None else direction
    u, slope = total_derivative(flow_map, params, x, t, r, along, cond, key=key, jvp=jvp)
    return residual_of(name, like_state(name, u, x), slope, v, r - t, derivative, tangent)


def residual_of(name, u, slope, v, gap, derivative, tangent) -> tuple[Array, Array]:
    """(g, residual) of u = v + gap slope, gap [b]; with gap = t - r and slope = du/dr, v where the
    arc ends, it is the Lagrangian identity."""
    dtype = float_dtype(u)
    u, slope, v = (a.astype(dtype) for a in (u, *jax.lax.stop_gradient((slope, v))))
    still, gap = jax.lax.stop_gradient(u), expand_to(gap, u)
    trusted = check_same_shape(name, "a derivative", derivative(slope), u).astype(dtype)
    pull = check_same_shape(name, "a tangent", tangent(still - (v + gap * trusted)), u)
    return u - still + jax.lax.stop_gradient(pull), still - (v + gap * slope)


def adaptive_weight(error: Float[Array, " b"], power: float, c: float = 1e-3) -> Float[Array, " b"]:
    """The weight of a row by its own error, `(error + c)^-power` without a gradient.

    A loss of `adaptive_weight(e, power, c) * e` has the gradient of a power of the error: power = 0
    is e itself, 0.5 like its root, 1 like its logarithm. It bounds what a single row contributes,
    and moves the minimum where the errors of rows differ much.

    Args:
        error: The error of each row [b], not negative, such as a mean of squares over the event.
        power: The exponent p, not negative.
        c: What is added to the error, above 0, in the units of the error: for a mean over the
            event. Published code has sums over the event, whose c is ours times the size of the
            event.

    Returns:
        The weight of each row [b], without a gradient.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> losses.adaptive_weight(jnp.array([0.0, 0.75]), 1.0, 0.25).tolist()
        [4.0, 1.0]

    References:
        Geng, Deng, Bai, Kolter, He, *Mean Flows for One-step Generative Modeling*, 2025,
            arXiv:2505.13447.
    """
    return jax.lax.stop_gradient((error + c) ** -power)


def normalized_tangent(c: float = 0.1) -> Callable[[Array], Array]:
    """A function that divides a tangent by its size, row by row: g / (|g| + c).

    |g| is the root mean square over the event.

    The paper of sCM writes the 2-norm, sqrt(d) times larger for an event of d numbers. With the
    root mean square, as in SANA-Sprint, c means the same at every size, and the tangent has size
    one in every number.

    Args:
        c: What is added to the size, above 0.

    Returns:
        The function g [b, *event] -> [b, *event].

    Raises:
        ValueError: Unless c is finite and above 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> losses.normalized_tangent(1.0)(jnp.array([[3.0, 3.0], [0.0, 0.0]])).tolist()
        [[0.75, 0.75], [0.0, 0.0]]

    References:
        Lu, Song, *Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models*, 2024,
            arXiv:2410.11081.
        Chen et al., *SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency
            Distillation*, 2025, arXiv:2503.09641.
    """
    if not 0 < c < math.inf:
        raise ValueError(f"normalized_tangent: expected a finite c > 0, got {c}")

    def normalize(g):
        return g / (expand_to(jnp.sqrt(mean_event(jnp.square(g))), g) + c)

    return normalize


def clipped_tangent(bound: float = 1.0) -> Callable[[Array], Array]:
    """A function that clips a tangent to [-bound, bound], number by number.

    It is the other form of sCM.

    Args:
        bound: The largest absolute value, above 0; infinity leaves the tangent alone.

    Returns:
        The function g [b, *event] -> [b, *event].

    Raises:
        ValueError: Unless bound is above 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> losses.clipped_tangent(0.5)(jnp.array([[-2.0, 0.25]])).tolist()
        [[-0.5, 0.25]]

    References:
        Lu, Song, *Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models*, 2024,
            arXiv:2410.11081.
    """
    if not bound > 0:
        raise ValueError(f"clipped_tangent: expected bound > 0, got {bound}")
    return lambda g: jnp.clip(g, -bound, bound)
