"""What all few-step models share: a network u(x, t, r) of the way from time t to time r.

u is the average velocity: the flow map is f(x, t, r) = x + (r - t) u(x, t, r), and u(x, t, t) =
v(x, t) is the velocity. A consistency model is the map with r = 1 alone: any `Velocity`, read by
`consistency_map`. Losses that learn u say in their docstring which r they train; `sample_flow_map`
may ask for no others.

    net = nets.ResidualMLP(width=128)
    model = jflow.flow_map(net)  # u(x, t, r): the network gets r - t
    loss = losses.mean_flow(model)  # or any other loss of a flow map
    ... make_step, fit ...
    x1, info = solvers.sample_flow_map(model, params, x0, steps=2)
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import check_cond, check_flow_map, like_state, need_key, rows
from jflow._core.keys import same_draws
from jflow._core.times import Times
from jflow.solvers._integrate import SolveInfo
from jflow.solvers._parts import sampler_result, sampling_times
from jflow.types import Array, Cond, FlowMap, Key, Params, Velocity

__all__ = [
    "instantaneous_velocity",
    "apply_flow_map",
    "finite_difference",
    "sample_flow_map",
    "consistency_map",
    "total_derivative",
]

JVP = Callable[[Callable, Sequence, Sequence], tuple[Any, Any]]
"""(f, primals, tangents) -> (f(primals), its derivative along the tangents), as `jax.jvp` does."""


def apply_flow_map(
    flow_map: FlowMap,
    params: Params,
    x: Array,
    t: ArrayLike,
    r: ArrayLike,
    cond: Cond = None,
    *,
    key: Key | None = None,
) -> Float[Array, "b *event"]:
    """Carry states from one time to another by an average velocity.

        f(x, t, r) = x + (r - t) u(x, t, r)

    Args:
        flow_map: the average velocity u.
        params: its params.
        x: the states at time t, [b, *event], of a floating type.
        t: the times of x, [b] or a scalar.
        r: the times to go to, [b] or a scalar.
        cond: the condition, [b, ...].
        key: switches dropout on; None is deterministic.

    Returns:
        The states at time r, [b, *event], in the type of x.

    Raises:
        ValueError: x is not a floating array [b, *event], or u is not shaped like x.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import solvers
        >>> from jflow.types import FlowMap
        >>> u = FlowMap(lambda *_: {}, lambda params, x, t, r, cond=None, *, key=None: 0 * x + 4)
        >>> solvers.apply_flow_map(u, {}, jnp.array([[1.0]]), 0.25, 0.75).tolist()
        [[3.0]]
    """
    x = _floating("apply_flow_map", x)
    t, r = (rows(time, x.shape[0]).astype(float_dtype(x)) for time in (t, r))
    u = like_state("apply_flow_map", flow_map.apply(params, x, t, r, cond, key=key), x)
    return (x + expand_to(r - t, x) * u).astype(x.dtype)


def instantaneous_velocity(flow_map: FlowMap) -> Velocity:
    """The velocity that an average velocity contains, v(x, t) = u(x, t, t).

    Args:
        flow_map: the average velocity u.

    Returns:
        Velocity: v, with the params of `flow_map`.
    """

    def init(key, x, t, cond=None):
        return flow_map.init(key, x, t, t, cond)

    def apply(params, x, t, cond=None, *, key=None):
        t = rows(t, x.shape[0])
        return flow_map.apply(params, x, t, t, cond, key=key)

    return Velocity(init, apply)


def consistency_map(velocity: Velocity) -> FlowMap:
    """A consistency model as a flow map.

    The network F(x, t), whose f(x, t) = x + (1 - t) F(x, t) is data, becomes an average velocity: r
    is ignored and means 1. f(x, 1) = x holds whatever F is. `sample_flow_map` asks it for r = 1
    alone where it takes one step, or renoise=1.

    Args:
        velocity: the network F.

    Returns:
        FlowMap: F, with the params of `velocity`.
    """

    def init(key, x, t, r, cond=None):
        return velocity.init(key, x, t, cond)

    def apply(params, x, t, r, cond=None, *, key=None):
        return velocity.apply(params, x, t, cond, key=key)

    return FlowMap(init, apply)


def total_derivative(
    flow_map: FlowMap,
    params: Params,
    x: Float[Array, "b *event"],
    t: ArrayLike,
    r: ArrayLike,
    v: Float[Array, "b *event"],
    cond: Cond = None,
    *,
    key: Key | None = None,
    jvp: JVP = jax.jvp,
) -> tuple[Float[Array, "b *event"], Float[Array, "b *event"]]:
    """An average velocity and its derivative along a trajectory.

        du/dt = (d_x u) v + d_t u      with r fixed

    The trajectory has velocity v at x, t. It is one forward-mode pass with tangents (v, 1, 0).

    Args:
        flow_map: the average velocity u.
        params: its params.
        x: the states, [b, *event].
        t: their times, [b] or a scalar.
        r: the times to go to, [b] or a scalar.
        v: the velocity of the trajectory, [b, *event].
        cond: the condition, [b, ...].
        key: switches dropout on; None is deterministic.
        jvp: `jax.jvp`, or `finite_difference(h)` for networks with an operation that has no
            forward-mode derivative (a custom_vjp kernel).

    Returns:
        u: the average velocity, [b, *event].
        du_dt: its derivative, [b, *event].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import solvers
        >>> from jflow.types import FlowMap
        >>> def apply(params, x, t, r, cond=None, *, key=None):
        ...     return t[:, None] * x
        >>> u = FlowMap(lambda *_: {}, apply)
        >>> x, v = jnp.array([[3.0]]), jnp.array([[5.0]])
        >>> value, slope = solvers.total_derivative(u, {}, x, jnp.array([0.5]), jnp.array([1.0]), v)
        >>> value.tolist(), slope.tolist()  # t v + x
        ([[1.5]], [[5.5]])
    """
    t, r = rows(t, x.shape[0]), rows(r, x.shape[0])
    return jvp(
        lambda x, t, r: flow_map.apply(params, x, t, r, cond, key=same_draws(key)),
        (x, t, r),
        (v.astype(x.dtype), jnp.ones_like(t), jnp.zeros_like(r)),
    )


def finite_difference(h: float = 1e-3) -> JVP:
    """A stand-in for `jax.jvp` by central differences, for operations without a forward derivative.

        (f(p + h d) - f(p - h d)) / (2 h), and f(p) itself

    Its error is O(h^2); it takes three evaluations. In float32 rounding adds about 1e-7 / h of f;
    times may leave [0, 1] by h.

    Args:
        h: the step, in (0, 0.1].

    Returns:
        JVP: (f, primals, tangents) -> (f(primals), its derivative along the tangents).

    Raises:
        ValueError: h is outside (0, 0.1].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import solvers
        >>> x, tangent = jnp.array(3.0), jnp.array(1.0)
        >>> value, slope = solvers.finite_difference(0.1)(jnp.square, (x,), (tangent,))
        >>> round(float(value), 3), round(float(slope), 3)
        (9.0, 6.0)
    """
    if not 0 < h <= 0.1:
        raise ValueError(f"finite_difference: expected 0 < h <= 0.1, got {h}")

    def jvp(f, primals, tangents):
        def at(s):
            return f(
                *jax.tree.map(
                    lambda p, d: (p + s * d).astype(p.dtype), tuple(primals), tuple(tangents)
                )
            )

        return f(*primals), jax.tree.map(lambda a, b: (a - b) / (2 * h), at(h), at(-h))

    return jvp


def sample_flow_map(
    flow_map: FlowMap,
    params: Params,
    x0: Array,
    cond: Cond = None,
    *,
    steps: int | None = None,
    grid: Times | ArrayLike | None = None,
    renoise: float = 0.0,
    key: Key | None = None,
) -> tuple[Float[Array, "b *event"], SolveInfo]:
    """Sample a few-step model from t=0 to t=1, with one evaluation a step.

    Also known as: few-step sampling, one-step sampling.

        x <- f(x, t, t_next)

    With renoise = g a step goes beyond t_next, to r = t_next + g (1 - t_next), and back to t_next
    by fresh noise z:

        x <- (t_next / r) x_r + sqrt((1 - t_next)^2 - (t_next / r)^2 (1 - r)^2) z

    on the linear path from standard normal noise. 0 is deterministic; 1 goes to data every time,
    the multistep sampler of consistency models (and the only one for maps that know r = 1 alone).
    The last step adds none.

    Args:
        flow_map: the average velocity u.
        params: its params.
        x0: the source, [b, *event], of a floating type.
        cond: the condition, [b, ...].
        steps: the number of equal steps; 1 where neither steps nor grid is given.
        grid: rising times [n + 1] in [0, 1] instead.
        renoise: g, in [0, 1].
        key: a key, for renoise above 0 and more than one step.

    Returns:
        x1: the samples, [b, *event], in the type of x0; rows that are not finite are NaN.
        info: evaluations [b], the number of steps, and status [b] (`solvers.Status`).

    Raises:
        ValueError: steps is below 1, grid does not rise within [0, 1], both are given, renoise is
            outside [0, 1], without a key or with a grid that ends before 1, or x0 is not a floating
            array [b, *event].
        TypeError: flow_map is a `Velocity`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import solvers
        >>> from jflow.types import FlowMap
        >>> u = FlowMap(lambda *_: {}, lambda params, x, t, r, cond=None, *, key=None: 0 * x + 4)
        >>> x1, info = solvers.sample_flow_map(u, {}, jnp.array([[1.0]]), steps=2)
        >>> x1.tolist(), info.evaluations.tolist()
        ([[5.0]], [2])

    References:
        Boffi, Albergo, Vanden-Eijnden, *Flow Map Matching*, 2024, arXiv:2406.07507.
        Song, Dhariwal, Chen, Sutskever, *Consistency Models*, 2023, arXiv:2303.01469 (renoise=1).
        Sabour, Fidler, Kreis, *Align Your Flow: Scaling Continuous-Time Flow Map Distillation*,
            2025, arXiv:2506.14603 (between).
    """
    if not 0 <= renoise <= 1:
        raise ValueError(f"solvers.sample_flow_map: expected renoise in [0, 1], got {renoise}")
    check_flow_map("sample_flow_map", flow_map)
    x0 = _floating("sample_flow_map", x0)
    times = sampling_times("sample_flow_map", steps, grid)
    if renoise > 0 and not isinstance(times, jax.core.Tracer) and np.asarray(times)[-1] != 1:
        raise ValueError(
            "solvers.sample_flow_map: renoise goes by way of data: expected a grid that "
            f"ends at 1, got {times}"
        )
    n = x0.shape[0]
    cond = check_cond("sample_flow_map", cond, n)
    count = np.shape(times)[0] - 1
    if renoise > 0 and count > 1:
        need_key("solvers.sample_flow_map with renoise", key)
    times = jnp.asarray(times, float_dtype(x0))

    def step(x, now):
        t, t_next, key = now
        r = t_next + renoise * (1 - t_next)
        x = apply_flow_map(flow_map, params, x, t, r, cond)
        if key is not None:
            keep = t_next / r
            std = jnp.sqrt(jnp.maximum((1 - t_next) ** 2 - (keep * (1 - r)) ** 2, 0))
            x = keep * x + std * jax.random.normal(key, x.shape, x.dtype)
        return x, None

    keys = jax.random.split(key, count) if renoise > 0 and key is not None else None
    x, _ = jax.lax.scan(step, jnp.asarray(x0, float_dtype(x0)), (times[:-1], times[1:], keys))
    return sampler_result(x, count, x0)


def _floating(name: str, x: Array) -> Array:
    """x as an array; ValueError unless it is [b, *event] of a floating type."""
    x = jnp.asarray(x)
    if x.ndim == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name}: expected rows [b, *event] of a floating type, got {x.dtype}{list(x.shape)}"
        )
    return x


def expanded_time(velocity: Velocity) -> FlowMap:
    """A velocity network as a flow map of two kinds of questions, which its time tells apart.

    It is F(x, t) where r > t, read as r = 1, and F(x, 2 - t) where r = t. At t = 1 both are one.

    Args:
        velocity: the network F, which must take times up to 2.

    Returns:
        FlowMap: the average velocity, with the params of `velocity`.
    """

    def asked(x, t, r):
        t, r = rows(t, x.shape[0]), rows(r, x.shape[0])
        return jnp.where(r > t, t, 2 - t)

    def init(key, x, t, r, cond=None):
        return velocity.init(key, x, asked(x, t, r), cond)

    def apply(params, x, t, r, cond=None, *, key=None):
        return velocity.apply(params, x, asked(x, t, r), cond, key=key)

    return FlowMap(init, apply)
