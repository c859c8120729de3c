"""Exponential moving averages of parameters, in float32 at least: in bfloat16 a step of 1e-4 of the difference would be
rounded away and the average stand still."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow._core.numbers import check_number
from jflow.types import Array, NumberOrFunction, PyTree


def warmup(decay: float) -> Callable[[Array], Array]:
    """step -> min(decay, (1 + step) / (10 + step)): short memory at first, so that the start is soon forgotten.

    step counts the updates already made, 0 at the first.
    """
    if not _is_decay(decay):
        raise ValueError(f"ema.warmup: expected a decay in (0, 1), got {decay!r}")
    return lambda step: jnp.minimum(decay, (1 + step) / (10 + step))


def as_decay(ema: NumberOrFunction | None) -> Callable[[Array], Any] | None:
    """What `make_step` takes as `ema` (a float in (0, 1), a callable or None) as a function of the step, or None."""
    if ema is None or callable(ema):
        return ema
    check_number("ema", "a decay", ema, "in (0, 1)", _is_decay, of="the step")
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


def _is_decay(number) -> bool:
    return isinstance(number, float) and 0 < number < 1
