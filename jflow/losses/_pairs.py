"""What the regressions on a path share: a batch read, paired, with conditions dropped, and times drawn."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import expand_to, filled, float_dtype
from jflow._core.batch import read_as_given
from jflow._core.checks import like_rows, need_key
from jflow.types import Array, Cond, Key, PyTree


class Pairs(NamedTuple):
    """x0 and x1 [b, *event] as the coupling pairs them, with x1's cond and weight, times [b] (of a `TimePair`: (t, r)), and
    keys for what follows."""

    x0: Array
    x1: Array
    cond: Cond
    weight: Array | None
    t: Array | tuple[Array, Array]
    path_key: Key
    dropout_key: Key


def check_drop(name: str, drop: float, null: PyTree) -> None:
    """Raise for a drop outside [0, 1] or without null."""
    if not 0 <= drop <= 1:
        raise ValueError(f"{name}: expected drop in [0, 1], got {drop}")
    if drop > 0 and null is None:
        raise ValueError(f"{name}: drop={drop} needs null, the row that replaces a dropped cond, got None")


def draw_pairs(name: str, key, batch, time, coupling, drop: float, null: PyTree) -> Pairs:
    """The source is standard normal where the batch has no 'x0'."""
    need_key(name, key)
    x1, x0, cond, weight = read_as_given(name, batch, ("x", "x0", "cond", "weight"))
    if drop > 0 and cond is None:
        raise ValueError(f"{name}: drop={drop} needs 'cond' in batch, got the keys {sorted(batch)}")
    time_key, noise_key, pair_key, path_key, drop_key, dropout_key = jax.random.split(key, 6)
    n = x1.shape[0]
    x0 = jax.random.normal(noise_key, x1.shape, x1.dtype) if x0 is None else x0
    x0, x1, cond = _finite(weight, x0, x1, cond)
    i, j = coupling(pair_key, x0, x1, cond)
    x0, (x1, cond, weight) = pick(x0, i), pick((x1, cond, weight), j)
    x0, x1, cond = filled(None if weight is None else weight != 0, (x0, x1, cond))
    if drop > 0:
        dropped = jax.random.bernoulli(drop_key, drop, (n,))
        nulls = like_rows(name, null, cond)
        cond = jax.tree.map(lambda c, z: jnp.where(expand_to(dropped, c), z, c), cond, nulls)
    t = jax.tree.map(lambda t: t.astype(float_dtype(x1)), time(time_key, n))
    return Pairs(x0, x1, cond, weight, t, path_key, dropout_key)


def _finite(weight, x0, x1, cond):
    """What a coupling sees: the rows as they are, but for those of weight 0 that hold infinity or NaN."""
    if weight is None:
        return x0, x1, cond
    finite = [jnp.all(jnp.isfinite(a), axis=tuple(range(1, a.ndim))) for a in (x0, x1)]
    return filled((weight != 0) | (finite[0] & finite[1]), (x0, x1, cond))


def pick(tree, index):
    """Rows of every leaf; the identity, when it is known while tracing, moves nothing."""
    if isinstance(index, np.ndarray) and np.array_equal(index, np.arange(len(index))):
        return tree
    return jax.tree.map(lambda a: a[index], tree)
