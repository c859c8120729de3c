"""What the regressions on a path share: a batch read, its source drawn where it has none, and times drawn."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jflow._core.arrays import filled, float_dtype
from jflow._core.batch import read_as_given
from jflow._core.checks import need_key
from jflow.types import Array, Cond, Key


class Pairs(NamedTuple):
    """x0 and x1 [b, *event], a pair a row, with cond and weight, times [b] (of a `TimePair`: (t, r)), and keys for what
    follows."""

    x0: Array
    x1: Array
    cond: Cond
    weight: Array | None
    t: Array | tuple[Array, Array]
    path_key: Key
    dropout_key: Key


def draw_pairs(name: str, key, batch, time) -> Pairs:
    """The source is standard normal where the batch has no 'x0'. What rows of weight 0 hold is replaced, see `filled`."""
    need_key(name, key)
    x1, x0, cond, weight = read_as_given(name, batch, ("x", "x0", "cond", "weight"))
    time_key, noise_key, path_key, dropout_key = jax.random.split(key, 4)
    x0 = jax.random.normal(noise_key, x1.shape, x1.dtype) if x0 is None else x0
    x0, x1, cond = filled(None if weight is None else weight != 0, (x0, x1, cond))
    t = jax.tree.map(lambda t: t.astype(float_dtype(x1)), time(time_key, x1.shape[0]))
    return Pairs(x0, x1, cond, weight, t, path_key, dropout_key)


def dropped_rows(batch, n: int) -> Array:
    """Which of the n rows `losses.drop_cond` has told null, [n] bool: none where it did not come before."""
    return jnp.zeros(n, bool) if batch.get("dropped") is None else jnp.asarray(batch["dropped"])
