"""Exponential moving averages of parameters, in float32 at least: in bfloat16 a step of 1e-4 of the difference would be
rounded away and the average stand still."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow.types import Array, PyTree

Decay = Callable[[Array], Array | float]


def warmup(decay: float) -> Decay:
    """step -> min(decay, (1 + step) / (10 + step)): short memory at first, so that the start is soon forgotten.

    step counts the updates already made, 0 at the first.
    """
    _check(decay)
    return lambda step: jnp.minimum(decay, (1 + step) / (10 + step))


def as_decay(ema: float | Decay | None) -> Decay | None:
    """What `make_step` takes as `ema` (a float in (0, 1), a callable or None) as a function of the step, or None."""
    if ema is None or callable(ema):
        return ema
    _check(ema)
    return lambda step: ema


def start(params: PyTree) -> PyTree:
    """The average before the first update: the params, floats of fewer bits than float32 as float32."""

    def widened(p):
        return p.astype(float_dtype(p)) if jnp.issubdtype(p.dtype, jnp.floating) else p

    return jax.tree.map(widened, jax.tree.map(jnp.asarray, params))


def update(average: PyTree, params: PyTree, decay: Array | float) -> PyTree:
    """decay * average + (1 - decay) * params, leaf by leaf, each in the type of the average (`start` says which)."""
    return jax.tree.map(
        lambda a, p: a + jnp.asarray(1 - decay, a.dtype) * (jnp.asarray(p, a.dtype) - a),
        average,
        params,
    )


def _check(decay) -> None:
    if isinstance(decay, bool) or not isinstance(decay, float) or not 0 < decay < 1:
        raise ValueError(
            f"expected ema to be a decay in (0, 1), a callable step -> decay or None, got {decay!r}"
        )
