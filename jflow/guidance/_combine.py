"""What guidance makes of two velocities: functions (v, other, x, t) -> v, for `guided`, `negative` and `autoguidance`.

v is the one to go along, `other` the one to keep away from (told less, told otherwise, or weaker): arrays [b, *event] or
pytrees of them, like x; t is [b]. A row's norms and inner products are over its whole event, all leaves together, in
float32 or better.
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
    """other + scale (v - other): 1 is v, 0 is other. scale: a number, or t [b] -> [b]. What `cfg` does."""

    def combine(v, other, x, t):
        w = number_at("scaled", "scale(t)", scale, t, like=t)
        return _towards(other, w, _minus(v, other))

    return combine


def interval(combine: Combine, low: float, high: float) -> Combine:
    """`combine` where low <= t <= high, plain v elsewhere.

    The paper's interval is in sigma, noise over signal, which falls as t grows: sigma = sigma(t) / alpha(t), on the linear
    path (1 - t) / t, so that (sigma_lo, sigma_hi] is t in [1 / (1 + sigma_hi), 1 / (1 + sigma_lo)); sigma = 1 is t = 1/2.
    Outside, the second evaluation is still made: a batch may hold different times.
    Errors: ValueError unless 0 <= low < high <= 1.
    Source: Kynkaanniemi, Aittala, Karras, Laine, Aila, Lehtinen, "Applying Guidance in a Limited Interval Improves
        Sample and Distribution Quality in Diffusion Models", 2024.
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
    """`combine`'s g with the standard deviation of v given back: mix (g std(v) / std(g)) + (1 - mix) g.

    std is a row's own, over its event (each leaf by itself). mix in [0, 1]; 0 is `combine`.
    Source: Lin, Liu, Li, Yang, "Common Diffusion Noise Schedules and Sample Steps Are Flawed", 2023 (phi, there 0.7).
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
    """s other + scale (v - s other) with s = <v, other> / |other|^2 in each row: other, scaled to come nearest to v.

    The optimized scale of CFG-Zero*; its zeroed first steps are `guidance.zero_init`. scale 1 is v; where other is 0, s
    is 0.
    Source: Fan, Zheng, Yeh, Liu, "CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models", 2025.
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
    """v + (scale - 1) d', where d' is d = v - other with its part along the predicted data x1 multiplied by `parallel`.

    x1 = E[x1 | x_t] by v, on the path of `schedule`. limit: d is first shortened, so that the two predictions of x1 are
    no further apart than this (in units of the data). parallel 1 without limit is `scaled`. Adaptive projected guidance
    less its momentum, which would need a state that a velocity does not have; their eta is `parallel`, their r `limit`.
    Errors: ValueError for a limit that is not positive.
    Source: Sadat, Hilliges, Weber, "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion
        Models", 2024.
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
    """[b]: the largest |number| of a row in all leaves, 1 where that is 0. Squares of what is divided by it do not
    overflow, and the results do not depend on it, so that it has no gradient."""
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
