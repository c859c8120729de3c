"""What the losses share: reading a batch, and the weighted mean over its rows."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, filled, flat_rows, float_dtype, mean_event
from jflow._core.checks import (
    check_batch,
    check_cond,
    check_parts,
    check_x,
    count_rows,
    need_x,
)
from jflow.types import Array, PyTree


def read_batch(
    name: str, batch: Mapping[str, PyTree], allowed: tuple[str, ...], kind: Any = jnp.floating
) -> tuple:
    """The entries of a batch that a loss takes, checked, in the order of their names.

    Keys, types and numbers of rows are checked, a single row of cond is repeated for all, and what
    the rows of weight 0 hold (padding, infinity) is replaced by a row that counts, so that it
    enters neither the loss nor its gradient. 'dropped', which `losses.drop_cond` writes, is always
    accepted. A loss that regresses on pairs of source and data calls `losses.draw_pairs`, which
    reads the batch itself.

    Args:
        name: The name of the loss, with which messages of errors begin.
        batch: A dict with the data 'x' [b, *event], of a floating type.
        allowed: The keys that the loss takes, among them 'x'; the others are optional: 'x0' [b,
            *event] like 'x', 'cond' a pytree of [b, ...], 'weight' [b], or a key of your own.
        kind: The numbers that 'x' may hold, a kind of numpy's: jnp.floating, jnp.integer, or
            jnp.number, which has both.

    Returns:
        A tuple of the values of `allowed` as JAX arrays, None where the batch has none.

    Raises:
        TypeError: For a batch that is not a dict.
        ValueError: For a batch without 'x' or with unknown keys, for an 'x' that is not floating,
            and for shapes that do not fit.

    Examples:
        >>> import numpy as np
        >>> from jflow import losses
        >>> batch = {"x": np.zeros((2, 3)), "cond": np.zeros((1, 4))}
        >>> x, cond, weight = losses.read_batch("own", batch, ("x", "cond", "weight"))
        >>> x.shape, cond.shape, weight is None
        ((2, 3), (2, 4), True)
    """
    values = dict(zip(allowed, read_as_given(name, batch, allowed, kind), strict=True))
    weight = values.get("weight")
    used = None if weight is None else weight != 0
    return tuple(value if key == "weight" else filled(used, value) for key, value in values.items())


def read_tokens(
    name: str, batch: Mapping[str, PyTree], allowed: tuple[str, ...], kind: Any = jnp.number
) -> tuple:
    """`read_batch` for a loss that counts single tokens: 'weight' is [b], or of the shape of x.

    A token of weight 0 in a row that counts is left for the network to see, but for one that is
    infinite or NaN, which becomes 0.
    """
    made = dict(zip(allowed, _read(name, batch, allowed, kind, None), strict=True))
    weight = made["weight"]
    filling = [key for key in allowed if key != "weight"]
    made |= filled(used_rows(weight), {key: made[key] for key in filling})
    made |= {key: without_gaps(made[key], weight) for key in filling if key in ("x", "x0")}
    return tuple(made.values())


def used_rows(weight: Any) -> Any:
    """[b] bool, the rows with a weight [b] or [b, ...] other than 0; None, all of them, of None."""
    return None if weight is None else jnp.any(flat_rows(weight != 0), axis=1)


def without_gaps(x: Array | None, weight: Array | None) -> Array | None:
    """x with 0 for the numbers of rows or tokens of weight 0 that are not finite."""
    if x is None or weight is None:
        return x
    return jnp.where(expand_to(weight != 0, x) | jnp.isfinite(x), x, jnp.zeros_like(x))


def read_as_given(
    name: str, batch: Mapping[str, PyTree], allowed: tuple[str, ...], kind: Any = jnp.floating
) -> tuple:
    """`read_batch` without a replacement."""
    return _read(name, batch, allowed, kind, 1)


def _read(name, batch, allowed, kind, finest):
    check_keys(name, batch, allowed)
    check_x(name, batch)
    x, x0, weight = batch["x"], batch.get("x0"), batch.get("weight")
    _check_entries(name, "", x, x0, weight, finest, kind)
    check_dropped(name, batch)
    batch = {**batch, "cond": check_cond(name, batch.get("cond"), jnp.shape(x)[0])}
    return tuple(jax.tree.map(jnp.asarray, batch.get(key)) for key in allowed)


def read_parts(name: str, batch: Mapping[str, PyTree]) -> tuple:
    """(x, x0, cond, weight) of a batch for a loss that takes parts and weights of tokens.

    x is an array, or a dict of parts, and x0 is like it, or None. weight is None or [b], or [b, n]
    along the first site axis of x; of parts it is a dict of such, None where nothing is said.
    """
    check_keys(name, batch, ("x", "x0", "cond", "weight"))
    need_x(name, batch)
    x, x0, weight = batch["x"], batch.get("x0"), batch.get("weight")
    if isinstance(x, Mapping):
        n = count_rows(name, x)
        if x0 is not None:
            if not isinstance(x0, Mapping):
                raise ValueError(f"{name}: expected 'x0' with the parts of x, got an array")
            check_parts(name, "'x0'", x0, x)
        if not isinstance(weight, Mapping):
            weight = dict.fromkeys(x, weight)
        if unknown := sorted(set(weight) - set(x)):
            raise ValueError(
                f"{name}: expected 'weight' of the parts of x, {sorted(x)}, got {unknown}"
            )
        weight = {part: weight.get(part) for part in x}
        for part in x:
            start = None if x0 is None else x0[part]
            _check_entries(name, f"[{part!r}]", x[part], start, weight[part], 2)
    else:
        check_x(name, batch)
        n = jnp.shape(x)[0]
        _check_entries(name, "", x, x0, weight, 2)
    check_dropped(name, batch)
    made = x, x0, check_cond(name, batch.get("cond"), n), weight
    return tuple(jax.tree.map(jnp.asarray, value) for value in made)


def check_keys(name: str, batch: Mapping[str, PyTree], allowed: tuple[str, ...]) -> None:
    """Raise for a batch that is not a dict, or with other keys than these and 'dropped'."""
    check_batch(name, batch)
    unknown = sorted(set(batch) - {*allowed, "dropped"})
    if unknown:
        raise ValueError(f"{name}: unknown keys in batch: {unknown}; allowed are {list(allowed)}")


def _check_entries(name, part, x, x0, weight, finest, kind: Any = jnp.floating) -> None:
    """Raise for a type or a shape that does not fit; `part` stands behind the keys in messages. A
    weight is [b], or along the first `finest` axes of x, all of them for None."""
    if not jnp.issubdtype(jnp.result_type(x), kind):
        raise ValueError(
            f"{name}: expected 'x'{part} to hold tokens, integers, got {jnp.result_type(x)}"
            if kind is jnp.integer
            else f"{name}: expected 'x'{part} of a floating type, got {jnp.result_type(x)}: "
            "dequantize or scale it first"
        )
    shape = list(jnp.shape(x))
    if x0 is not None and list(jnp.shape(x0)) != shape:
        raise ValueError(
            f"{name}: expected 'x0'{part} of the shape of 'x'{part}, {shape}, "
            f"got {list(jnp.shape(x0))}"
        )
    allowed = [shape[:1]] if len(shape[:finest]) == 1 else [shape[:1], shape[:finest]]
    if weight is not None and list(jnp.shape(weight)) not in allowed:
        raise ValueError(
            f"{name}: expected 'weight'{part} of shape {' or '.join(map(str, allowed))}, "
            f"got {list(jnp.shape(weight))}"
        )


def check_dropped(name: str, batch: Mapping[str, PyTree]) -> None:
    """Raise for a 'dropped' that is not a truth value for each row of 'x'."""
    dropped, n = batch.get("dropped"), jnp.shape(jax.tree.leaves(batch["x"])[0])[0]
    if dropped is not None and (
        jnp.shape(dropped) != (n,) or jnp.result_type(dropped) != jnp.dtype("bool")
    ):
        raise ValueError(
            f"{name}: expected 'dropped' of shape [{n}] and type bool, "
            f"got {list(jnp.shape(dropped))} and {jnp.result_type(dropped)}"
        )


def mean_of_rows(loss: Array, weight: Array | None) -> Array:
    """The weighted mean of a loss over the rows of a batch, `sum(w loss) / sum(w)`.

    Rows of weight 0 count nothing, whatever their loss, and the mean of no rows, or of rows that
    all have weight 0, is 0.

    Args:
        loss: The loss of each row [b, ...].
        weight: The weight of each row [b], or None for equal weights.

    Returns:
        The mean [...], in float32 or better.

    Raises:
        ValueError: Where the loss does not lead with a number for each row.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> float(losses.mean_of_rows(jnp.array([1.0, 4.0, jnp.nan]), jnp.array([2.0, 1.0, 0.0])))
        2.0
    """
    if loss.ndim == 0 or (weight is not None and weight.shape != loss.shape[:1]):
        raise ValueError(
            f"expected a loss of shape [b], a number for each row, got {list(loss.shape)}"
        )
    loss = loss.astype(float_dtype(loss))
    if weight is None:
        return jnp.sum(loss, axis=0) / max(loss.shape[0], 1)
    weight = weight.astype(loss.dtype)
    used = weight != 0
    total = jnp.where(jnp.any(used), jnp.sum(weight), 1)
    return (
        jnp.sum(expand_to(weight, loss) * jnp.where(expand_to(used, loss), loss, 0), axis=0) / total
    )


def mean_of_tokens(loss: Array, weight: Array | None) -> Array:
    """The weighted mean over the tokens of all rows, sum(w loss) / sum(w), of a loss [b, *event].

    A weight [b] is that of all tokens of a row. Tokens of weight 0 count nothing, whatever their
    loss.
    """
    if weight is None or weight.ndim == 1:
        return mean_of_rows(mean_event(loss), weight)
    return mean_of_rows(loss.reshape(-1), weight.reshape(-1))
