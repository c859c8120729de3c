"""Exponential moving averages of parameters, in float32 at least.

In bfloat16 a step of 1e-4 of the difference would be rounded away and the average stand still.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow._core.numbers import check_number
from jflow.types import Array, NumberOrFunction, PyTree

__all__ = ["as_decay", "start", "update", "warmup"]


def warmup(decay: float) -> Callable[[Array], Array]:
    """A decay that grows: min(decay, (1 + step) / (10 + step)).

    Short memory at first, so that the start is soon forgotten.

    Args:
        decay: In (0, 1), what it grows to.

    Returns:
        step -> decay, where step counts the updates already made, 0 at the first.

    Raises:
        ValueError: For another decay.

    Examples:
        >>> from jflow import train
        >>> float(train.ema.warmup(0.999)(0))
        0.10000000149011612
    """
    if not _is_decay(decay):
        raise ValueError(f"ema.warmup: expected a decay in (0, 1), got {decay!r}")
    return lambda step: jnp.minimum(decay, (1 + step) / (10 + step))


def as_decay(ema: NumberOrFunction | None) -> Callable[[Array], Any] | None:
    """What `make_step` takes as `ema`, as a function of the step, or None.

    Args:
        ema: A decay in (0, 1), a callable step -> decay, or None.

    Returns:
        step -> decay, or None.

    Raises:
        ValueError: For another decay.
    """
    if ema is None or callable(ema):
        return ema
    check_number("ema", "a decay", ema, "in (0, 1)", _is_decay, of="the step")
    return lambda step: ema


def start(params: PyTree) -> PyTree:
    """The average before the first update: the params, in float32 or better.

    Args:
        params: What is averaged.

    Returns:
        The average.
    """

    def widened(p):
        return p.astype(float_dtype(p)) if jnp.issubdtype(p.dtype, jnp.floating) else p

    return jax.tree.map(widened, jax.tree.map(jnp.asarray, params))


def update(average: PyTree, params: PyTree, decay: Array | float) -> PyTree:
    """One step of an exponential moving average of params.

    Also known as: EMA, exponential moving average, averaged params, Polyak averaging.

        decay * average + (1 - decay) * params, leaf by leaf

    `make_step(loss, optimizer, ema=0.999)` does this after every update, and `state.ema` is the
    average.

    Args:
        average: From `start`, or the step before.
        params: The params after an update.
        decay: In (0, 1).

    Returns:
        The average, in its own types.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import train
        >>> train.ema.update({"w": jnp.zeros(1)}, {"w": jnp.ones(1)}, 0.75)["w"].tolist()
        [0.25]
    """
    return jax.tree.map(
        lambda a, p: a + jnp.asarray(1 - decay, a.dtype) * (jnp.asarray(p, a.dtype) - a),
        average,
        params,
    )


def _is_decay(number) -> bool:
    return isinstance(number, float) and 0 < number < 1
