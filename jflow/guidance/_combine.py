"""What guidance makes of two velocities: functions (v, other, x, t) -> v.

They are for `guided`, `negative` and `autoguidance`. v is the velocity to go along, `other` the one
to keep away from (of no condition, of another condition, or of a weaker model): arrays [b, *event]
or pytrees of them, like x; t is [b]. Norms and inner products of a row are over its whole event,
all leaves together, in float32 or better.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, flat_rows, float_dtype, sum_event
from jflow._core.numbers import number_at
from jflow.paths import LINEAR, Schedule, velocity_to_data
from jflow.types import Array, NumberOrFunction, PyTree

__all__ = ["Combine", "interval", "projected", "rescaled", "scaled", "zero_star"]

Combine = Callable[[PyTree, PyTree, PyTree, Array], PyTree]


def scaled(scale: NumberOrFunction) -> Combine:
    """The plain combination of two velocities, which `cfg` uses.

        other + scale (v - other)      scale 1 is v, 0 is other

    Args:
        scale: a number, or t [b] -> [b].

    Returns:
        Combine: (v, other, x, t) -> v.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance
        >>> v, other, x, t = jnp.array([[3.0]]), jnp.array([[1.0]]), jnp.zeros((1, 1)), jnp.zeros(1)
        >>> guidance.scaled(2.0)(v, other, x, t).tolist()
        [[5.0]]
    """

    def combine(v, other, x, t):
        w = number_at("scaled", "scale(t)", scale, t, like=t)
        return _towards(other, w, _minus(v, other))

    return combine


def interval(combine: Combine, low: float, high: float) -> Combine:
    """Guidance in an interval of time alone: plain v elsewhere.

    The interval of the paper is in sigma, noise over signal, which falls as t grows: sigma =
    sigma(t) / alpha(t), on the linear path (1 - t) / t, so that (sigma_lo, sigma_hi] is t in [1 /
    (1 + sigma_hi), 1 / (1 + sigma_lo)); sigma = 1 is t = 1/2. Outside, the second evaluation is
    still made: a batch may hold different times.

    Args:
        combine: the guidance inside, (v, other, x, t) -> v.
        low: the lower end of the interval of t.
        high: the upper end; both ends belong to it.

    Returns:
        Combine: (v, other, x, t) -> v.

    Raises:
        ValueError: unless 0 <= low < high <= 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance
        >>> combine = guidance.interval(guidance.scaled(2.0), 0.2, 0.8)
        >>> v, other, x = jnp.full((2, 1), 3.0), jnp.ones((2, 1)), jnp.zeros((2, 1))
        >>> combine(v, other, x, jnp.array([0.1, 0.5])).tolist()
        [[3.0], [5.0]]

    References:
        Kynkaanniemi, Aittala, Karras, Laine, Aila, Lehtinen, *Applying Guidance in a Limited
            Interval Improves Sample and Distribution Quality in Diffusion Models*, 2024,
            arXiv:2404.07724.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"interval: expected 0 <= low < high <= 1, got {low} and {high}")

    def inside(v, other, x, t):
        active = (low <= t) & (t <= high)
        return jax.tree.map(
            lambda g, v: jnp.where(expand_to(active, v), g, v), combine(v, other, x, t), v
        )

    return inside


def rescaled(combine: Combine, mix: float = 0.7) -> Combine:
    """Guidance with the standard deviation of the conditional velocity given back.

        mix (g std(v) / std(g)) + (1 - mix) g      g = combine(v, other, x, t)

    std is that of a row, over its event (each leaf by itself).

    Args:
        combine: the guidance g, (v, other, x, t) -> v.
        mix: in [0, 1]; 0 is `combine` (phi of the paper, there 0.7).

    Returns:
        Combine: (v, other, x, t) -> v.

    Raises:
        ValueError: mix is outside [0, 1].

    References:
        Lin, Liu, Li, Yang, *Common Diffusion Noise Schedules and Sample Steps Are Flawed*, 2023,
            arXiv:2305.08891.
    """
    if not 0 <= mix <= 1:
        raise ValueError(f"rescaled: expected mix in [0, 1], got {mix}")

    def rescale(g, v):
        ratio = _row_std(v) / jnp.maximum(_row_std(g), jnp.finfo(float_dtype(g)).tiny)
        return (expand_to(mix * ratio + (1 - mix), g) * g).astype(g.dtype)

    def combined(v, other, x, t):
        return jax.tree.map(rescale, combine(v, other, x, t), v)

    return combined


def zero_star(scale: NumberOrFunction) -> Combine:
    """Guidance from the unconditional velocity scaled to come nearest to the conditional one.

    Also known as: CFG-Zero*.

        s other + scale (v - s other),      s = <v, other> / |other|^2 in each row

    It is the optimized scale of CFG-Zero*; its zeroed first steps are `zero_init`. scale 1 is v;
    where other is 0, s is 0.

    Args:
        scale: a number, or t [b] -> [b].

    Returns:
        Combine: (v, other, x, t) -> v.

    References:
        Fan, Zheng, Yeh, Liu, *CFG-Zero⋆: Improved Classifier-Free Guidance for Flow Matching
            Models*, 2025, arXiv:2503.18886.
    """

    def combine(v, other, x, t):
        return scaled(scale)(v, _times(_along(v, other), other), x, t)

    return combine


def projected(
    scale: NumberOrFunction,
    *,
    parallel: float = 0.0,
    limit: float = float("inf"),
    schedule: Schedule = LINEAR,
) -> Combine:
    """Adaptive projected guidance, without its momentum: less oversaturation at high scales.

    Also known as: APG, adaptive projected guidance.

        v + (scale - 1) d'

    where d' is d = v - other with its part along the predicted data x1 multiplied by `parallel`,
    and x1 = E[x1 | x_t] by v. Momentum would need a state that a velocity does not have. parallel 1
    without limit is `scaled`.

    Args:
        scale: a number, or t [b] -> [b].
        parallel: the factor of the part along x1 (eta of the paper).
        limit: d is first shortened, so that the two predictions of x1 are no further apart than
            this, in the units of the data (r of the paper).
        schedule: the path of the velocity; the default is the linear one.

    Returns:
        Combine: (v, other, x, t) -> v.

    Raises:
        ValueError: limit is not above 0.

    References:
        Sadat, Hilliges, Weber, *Eliminating Oversaturation and Artifacts of High Guidance Scales in
            Diffusion Models*, 2024, arXiv:2410.02416.
    """
    if not limit > 0:
        raise ValueError(f"projected: expected limit > 0, got {limit}")

    def combine(v, other, x, t):
        data = lambda v: jax.tree.map(lambda v, x: velocity_to_data(v, x, t, schedule), v, x)  # noqa: E731
        x1, step = data(v), _minus(v, other)
        if limit != float("inf"):
            apart = _norm(_minus(x1, data(other)))
            step = _times(limit / jnp.maximum(apart, limit), step)
        step = _towards(step, jnp.full_like(t, parallel - 1), _times(_along(step, x1), x1))
        w = number_at("projected", "scale(t)", scale, t, like=t)
        return _towards(v, w - 1, step)

    return combine


def _minus(a, b):
    return jax.tree.map(jnp.subtract, a, b)


def _towards(a, w, b):
    """a + w b, w [b]; in the types of a."""
    return jax.tree.map(lambda a, b: a + (expand_to(w, a) * b).astype(a.dtype), a, b)


def _times(w, a):
    """w a, w [b]; in the types of a."""
    return jax.tree.map(lambda a: expand_to(w, a).astype(a.dtype) * a, a)


def _inner(a, b):
    """<a, b> [b] over the event, all leaves."""
    return sum(
        jax.tree.leaves(jax.tree.map(lambda a, b: sum_event(a.astype(float_dtype(a)) * b), a, b))
    )


def _along(a, b):
    """<a, b> / |b|^2 [b], 0 where b is 0."""
    largest = _largest(b)
    a, b = _times(1 / largest, a), _times(1 / largest, b)
    square = _inner(b, b)
    return jnp.where(square > 0, _inner(a, b) / jnp.where(square > 0, square, 1.0), 0.0)


def _norm(a):
    """|a| [b], with a gradient of 0 at 0."""
    largest = _largest(a)
    a = _times(1 / largest, a)
    square = _inner(a, a)
    return largest * jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _largest(a):
    """[b]: the largest |number| of a row in all leaves, 1 where that is 0. Squares of what is
    divided by it do not overflow, and the results do not depend on it, so that it has no
    gradient.
    """
    leaves = [
        jnp.max(jnp.abs(flat_rows(leaf.astype(float_dtype(leaf)))), axis=1)
        for leaf in jax.tree.leaves(a)
    ]
    largest = functools.reduce(jnp.maximum, leaves)
    return jax.lax.stop_gradient(jnp.where(largest > 0, largest, 1.0))


def _row_std(v):
    """[b]"""
    largest = _largest(v)
    return largest * jnp.std(flat_rows(v.astype(float_dtype(v))) / largest[:, None], axis=1)
