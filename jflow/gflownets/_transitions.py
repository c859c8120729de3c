"""Transitions between points of a line, a space or a torus, as densities that can be drawn from."""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jflow._core.arrays import float_dtype, sum_event
from jflow._core.checks import check_noun, check_whole, need_key
from jflow._core.linen import apply_linen, check_linen, init_linen
from jflow.types import Array, Distribution, Manifold, Params

__all__ = ["Transition", "bridge_transition", "transition", "uniform_transition"]

_LOG_2PI = math.log(2 * math.pi)


class Transition(NamedTuple):
    """The law of a point given another and its number: one move of a continuous GFlowNet.

    A forward transition is given the point after `step` moves and speaks of the next one; a
    backward transition, given the same, speaks of the one before. `transition` makes one of a
    network. One of your own needs these three functions alone.

    Also known as: a transition kernel, a Markov kernel, the policy on a continuous space. It has a
    density, which the `energy.Kernel` of a chain need not have.

    Attributes:
        init: (key, x [b, d], step [b]) -> params.
        log_prob: (params, other [b, d], x [b, d], step [b]) -> [b], the log-density of the other
            point in the volume of the space, nats.
        sample: (params, key, x [b, d], step [b]) -> the other point [b, d].
    """

    init: Callable[[Array, Array, Array], Params]
    log_prob: Callable[[Params, Array, Array, Array], Float[Array, " b"]]
    sample: Callable[[Params, Array, Array, Array], Float[Array, "b d"]]


def transition(law: Distribution, net: nn.Module, manifold: Manifold, *, steps: int) -> Transition:
    """A transition made of a network, which reads the law of the move off the point and its number.

        other = exp_x(v),    v ~ law given net(embed(x), one-hot of step)

    The space is flat, so that the density of the other point is that of the displacement v: a
    mixture of normals on the line (`distributions.conditional_mixture`), of von Mises laws on the
    torus (`distributions.von_mises_mixture`). On the line a bounded activation, such as tanh, keeps
    points that are far out from moving ever farther.

    Args:
        law: the law of a displacement [b, d] given features [b, k].
        net: a Linen module, features [b, j] -> [b, k], such as `nets.MLP((64, 64))`.
        manifold: `manifolds.euclidean(d)` or `manifolds.torus(d)`.
        steps: N, the largest number of moves.

    Returns:
        Transition: the transition, params {'net', 'law'}; the law starts as it does at draws of
            `manifold.random`.

    Raises:
        TypeError: law is no `Distribution`, net no Linen module, or manifold no `Manifold`.
        ValueError: the manifold is not flat, or steps is below 1.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, gflownets, manifolds, nets
        >>> move = gflownets.transition(
        ...     distributions.von_mises_mixture((2,), 3),
        ...     nets.MLP((16,)),
        ...     manifolds.torus(2),
        ...     steps=4,
        ... )
        >>> x, step = jnp.zeros((5, 2)), jnp.zeros(5, int)
        >>> params = move.init(jax.random.key(0), x, step)
        >>> move.sample(params, jax.random.key(1), x, step).shape
        (5, 2)
    """
    check_noun("transition", law, Distribution)
    check_linen("transition", "net", net)
    flat_space("transition", manifold)
    check_whole("transition", steps=steps)

    def init(key, x, step):
        net_key, draw_key, law_key = jax.random.split(key, 3)
        seen = features(manifold, steps, x, step)
        params = init_linen(net, net_key, seen)
        h = apply_linen(net, params, seen)
        draws = manifold.random(draw_key, x.shape[0]).astype(x.dtype)
        return {"net": params, "law": law.init(law_key, draws, h)}

    def cond(params, x, step):
        return apply_linen(net, params["net"], features(manifold, steps, x, step))

    def log_prob(params, other, x, step):
        return law.log_prob(params["law"], manifold.log(x, other), cond(params, x, step))

    def sample(params, key, x, step):
        need_key("transition", key)
        v = law.sample(params["law"], key, x.shape[0], cond(params, x, step))
        return manifold.exp(x, v.astype(x.dtype))

    return Transition(init, log_prob, sample)


def bridge_transition(std: float, start: Float[np.ndarray, " d"] | tuple[float, ...]) -> Transition:
    """The backward transition of a Brownian motion from a point: a Brownian bridge, without params.

        x_(k-1) | x_k ~ N(start + (k - 1) / k (x_k - start), std^2 (k - 1) / k)

    for k moves of standard deviation std each. A fixed backward transition leaves one solution for
    the forward one.

    Args:
        std: the standard deviation of one move.
        start: the point where all trajectories begin, [d].

    Returns:
        Transition: the backward transition, params {}.

    Raises:
        ValueError: std is not positive.
    """
    if not 0 < std < math.inf:
        raise ValueError(f"bridge_transition: expected a finite std > 0, got {std}")
    begin = np.asarray(start, np.float64)

    def moments(x, step):
        k = jnp.maximum(step, 2).astype(x.dtype)[:, None]  # k = 1 goes to the start for sure
        shrink, at = (k - 1) / k, jnp.asarray(begin, x.dtype)[None]
        return at + shrink * (x - at), std * jnp.sqrt(shrink)

    def log_prob(params, other, x, step):
        mean, deviation = moments(x, step)
        z = (other - mean) / deviation
        return sum_event(-0.5 * (jnp.square(z) + _LOG_2PI) - jnp.log(deviation))

    def sample(params, key, x, step):
        mean, deviation = moments(x, step)
        return mean + deviation * jax.random.normal(key, x.shape, x.dtype)

    return Transition(lambda key, x, step: {}, log_prob, sample)


def uniform_transition(manifold: Manifold) -> Transition:
    """The transition that forgets where it was: the uniform law, without params.

    Args:
        manifold: a space of finite volume, such as `manifolds.torus(d)`.

    Returns:
        Transition: the transition, params {}.

    Raises:
        TypeError: for what is no manifold.
        ValueError: the volume is infinite.
    """
    check_noun("uniform_transition", manifold, Manifold)
    if not math.isfinite(manifold.log_volume):
        raise ValueError(
            "uniform_transition: expected a manifold of finite volume, got one whose volume is"
            " infinite"
        )
    return Transition(
        lambda key, x, step: {},
        lambda params, other, x, step: jnp.full_like(
            x, -manifold.log_volume, shape=x.shape[:1], dtype=float_dtype(x)
        ),
        lambda params, key, x, step: manifold.random(key, x.shape[0]).astype(x.dtype),
    )


def flat_space(name: str, manifold: Manifold) -> None:
    """Raise unless the manifold is flat, with points [d] in coordinates of unit length."""
    check_noun(name, manifold, Manifold)
    at = jnp.full(manifold.shape, 0.1)
    basis = np.asarray(manifold.tangent_basis(at))
    if manifold.shape != (manifold.dim,) or np.any(basis != np.eye(manifold.dim)):
        raise ValueError(
            f"{name}: expected manifolds.euclidean(d) or manifolds.torus(d), got a manifold that is"
            f" not flat, of points {list(manifold.shape)}"
        )


def features(
    manifold: Manifold, steps: int, x: Float[Array, "b d"], step: Int[Array, " b"]
) -> Float[Array, "b j"]:
    """What networks see of a point and its number."""
    number = jax.nn.one_hot(step, steps + 1, dtype=x.dtype)
    return jnp.concatenate([manifold.embed(x), number], axis=-1)
