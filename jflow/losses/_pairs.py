"""What the regressions on a path share: a batch is read, and its source and times are drawn."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jflow._core.arrays import filled, float_dtype
from jflow._core.batch import read_as_given, read_parts, used_rows, without_gaps
from jflow._core.checks import check_parts, count_rows, need_key
from jflow.types import Cond, Key, PartTimes, PyTree, Time, TimePair

__all__ = ["Pairs", "draw_pairs"]


class Pairs(NamedTuple):
    """Rows of a batch with a source and a time each, and the keys for what follows.

    Attributes:
        x0: The source [b, *event].
        x1: The data [b, *event], a pair with the row of x0.
        cond: The condition of each row, None or a pytree of [b, ...].
        weight: The weight of each row [b], None for equal weights.
        t: The times [b], of a `TimePair` a tuple (t, r) of them, in float32 or better.
        path_key: A key for what is random on the path, or for another draw of the loss.
        dropout_key: A key for the network.
    """

    x0: Float[Array, "b *event"]
    x1: Float[Array, "b *event"]
    cond: Cond
    weight: Array | None
    t: Array | tuple[Array, Array]
    path_key: Key
    dropout_key: Key


def draw_pairs(name: str, key: Key, batch: Mapping[str, PyTree], time: Time | TimePair) -> Pairs:
    """Reads a batch as pairs of source and data, and draws their times.

    So a regression on a path begins.

    The source is the batch's 'x0', else standard normal noise. What rows of weight 0 hold is
    replaced by a row that counts, so that it enters neither the loss nor its gradient.

    Args:
        name: The name of the loss, with which messages of errors begin.
        key: The key of the loss. All of it is consumed; what follows takes the two keys in the
            result.
        batch: {'x' [b, *event], optionally 'x0' [b, *event], 'cond', 'weight' [b]}; 'dropped' is
            accepted.
        time: A law of times (key, n) -> t [n], or of pairs of them, (key, n) -> (t, r).

    Returns:
        The pairs, a `Pairs`.

    Raises:
        TypeError: For a batch that is not a dict, and for a key that is not one.
        ValueError: For a key that is None, a batch without 'x' or with unknown keys, an 'x' that is
            not floating, and for shapes that do not fit.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses, times
        >>> batch = {"x": jnp.ones((4, 2))}
        >>> pairs = losses.draw_pairs("own", jax.random.key(0), batch, times.uniform())
        >>> pairs.x0.shape, pairs.t.shape, pairs.weight is None
        ((4, 2), (4,), True)
    """
    need_key(name, key)
    x1, x0, cond, weight = read_as_given(name, batch, ("x", "x0", "cond", "weight"))
    time_key, noise_key, path_key, dropout_key = jax.random.split(key, 4)
    x0 = jax.random.normal(noise_key, x1.shape, x1.dtype) if x0 is None else x0
    x0, x1, cond = filled(None if weight is None else weight != 0, (x0, x1, cond))
    t = jax.tree.map(lambda t: t.astype(float_dtype(x1)), time(time_key, x1.shape[0]))
    return Pairs(x0, x1, cond, weight, t, path_key, dropout_key)


def draw_parts(name: str, key: Key, batch: Mapping[str, PyTree], time: Time | PartTimes) -> Pairs:
    """`draw_pairs` for a loss that takes parts, times of tokens, and weights of tokens.

    x0 and x1 are arrays, or dicts of parts, t is [b] or [b, n], or a dict of such by part. weight
    is as in the batch, or a dict by part. Tokens of weight 0 that hold infinity or NaN hold 0 here.
    """
    need_key(name, key)
    x1, x0, cond, weight = read_parts(name, batch)
    time_key, noise_key, path_key, dropout_key = jax.random.split(key, 4)
    if x0 is None:
        keys = split_by_part(noise_key, x1)
        x0 = whole(
            {
                part: jax.random.normal(own, x.shape, x.dtype)
                for own, (part, x) in zip(keys, by_part(x1).items(), strict=True)
            }
        )
    weights = by_part(weight) if isinstance(x1, Mapping) else {None: weight}
    used = [used_rows(w) for w in weights.values() if w is not None]
    some = jnp.any(jnp.stack(used), axis=0) if len(used) == len(weights) else None
    x0, x1, cond = filled(some, (x0, x1, cond))
    x0, x1 = (
        whole({part: without_gaps(a, weights[part]) for part, a in by_part(x).items()})
        for x in (x0, x1)
    )
    t = jax.tree.map(
        lambda t: t.astype(float_dtype(*jax.tree.leaves(x1))), time(time_key, count_rows(name, x1))
    )
    if isinstance(t, Mapping):
        check_parts(name, "the times drawn", t, x1)
    for part, x in by_part(x1).items():
        drawn = t[part] if isinstance(t, Mapping) else t
        allowed = [list(x.shape[:1]), list(x.shape[:2])]
        if list(drawn.shape) not in allowed:
            of = "" if part is None else f" of the part {part!r}"
            raise ValueError(
                f"{name}: expected times{of} of shape {allowed[0]}, or {allowed[1]}, a time for"
                f" each token, got {list(drawn.shape)}"
            )
    return Pairs(x0, x1, cond, weight, t, path_key, dropout_key)


def by_part(x: PyTree) -> dict[Any, Any]:
    """A dict of parts in the order of their names; of an array, one part without a name."""
    return {part: x[part] for part in sorted(x)} if isinstance(x, Mapping) else {None: x}


def whole(parts: dict[Any, Any]) -> PyTree:
    """What `by_part` took apart."""
    return parts[None] if None in parts else parts


def split_by_part(key: Key, x: PyTree) -> list[Key]:
    """A key for each part; the key itself for an array."""
    return list(jax.random.split(key, len(x))) if isinstance(x, Mapping) else [key]


def dropped_rows(batch: Mapping[str, PyTree], n: int) -> Bool[Array, " n"]:
    """Which of the n rows have null in place of their cond, as `losses.drop_cond` says."""
    return jnp.zeros(n, bool) if batch.get("dropped") is None else jnp.asarray(batch["dropped"])
