"""Rows (dicts of numpy arrays that lead with one length) and their splits."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jflow._core.checks import described
from jflow.types import Condition

Rows = Mapping[str, np.ndarray]


class Splits(NamedTuple):
    """Rows to train on, to choose by and to report on, in data units.

    Attributes:
        train: Rows to train on.
        valid: Rows to choose by, or None.
        test: Rows to report on, or None.
    """

    train: Rows
    valid: Rows | None = None
    test: Rows | None = None


def as_array(name: str, value: Any) -> np.ndarray:
    """`value` as an array whose index counts positions: what `x[i]` is read from, everywhere that
    rows are taken.

    A pandas Series has an index of its own, and `series[i]` is the row that is *labeled* i:
    whatever is not an array of numpy or jax (Series, frames, tensors, lists) goes through
    np.asarray, which keeps the order of the rows. An object that is read from disk where it is
    indexed, by position, says so with an attribute `by_position = True`, and stays. Raises
    TypeError for what has no rows, and ValueError for rows of different lengths and for masked
    values, by `name`.
    """
    if isinstance(value, jax.Array) or getattr(value, "by_position", False):
        return value
    if isinstance(value, Condition):
        raise TypeError(
            f"rows {name!r}: expected an array [n, ...], got a Condition: keep its parts as arrays"
            " of their own names, and make it of them by a function in losses.chain"
        )
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ValueError(
            f"rows {name!r}: {int(np.ma.count_masked(value))} values are masked: fill them or leave"
            " them out"
        )
    try:
        array = np.asarray(value)
    except ValueError as error:  # numpy's word for nested lists that are not a box
        raise ValueError(
            f"rows {name!r}: the rows differ in length; expected an array [n, ...] ({error})"
        ) from None
    if array.ndim == 0:
        raise TypeError(f"rows {name!r}: expected an array [n, ...], got {type(value).__name__}")
    if array.dtype == object and any(
        np.ndim(row) for row in array.flat if not isinstance(row, str | bytes)
    ):
        raise ValueError(
            f"rows {name!r}: the rows are arrays of their own, of different lengths; expected one"
            " [n, ...]"
        )
    return array


def as_arrays(rows: Rows) -> dict[str, np.ndarray]:
    """Every value of `rows` through `as_array`. Raises TypeError for what is not a dict."""
    if not isinstance(rows, Mapping):
        raise TypeError(
            f"expected rows to be a dict such as {{'x': array [n, ...]}}, got {described(rows)}"
        )
    return {key: as_array(key, value) for key, value in rows.items()}


def count(rows: Rows) -> int:
    """The number of rows.

    Args:
        rows: Arrays that lead with one length.

    Returns:
        That length.

    Raises:
        ValueError: For lengths that disagree, naming their keys.
    """
    lengths = {key: len(value) for key, value in as_arrays(rows).items()}
    if not lengths:
        raise ValueError("rows hold no arrays: expected a dict such as {'x': array [n, ...]}")
    if len(set(lengths.values())) > 1:
        raise ValueError(
            "arrays of rows differ in length:"
            f" {', '.join(f'{k!r} {v}' for k, v in lengths.items())}"
        )
    return next(iter(lengths.values()))


def take(rows: Rows, index: Any) -> dict[str, np.ndarray]:
    """Some of the rows, by position.

    Args:
        rows: Arrays that lead with one length; a pandas Series is taken by position, not by its
            index.
        index: Integers, a mask or a slice.

    Returns:
        The rows at index.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> data.take({"x": np.array([5, 6, 7])}, [2, 0])["x"].tolist()
        [7, 5]
    """
    if not isinstance(index, slice | jax.Array):
        index = np.asarray(index)
        index = index if index.size else index.astype(int)  # [] has no type of its own
    return {key: value[index] for key, value in as_arrays(rows).items()}


def split(rows: Rows, *, valid: float = 0.0, test: float = 0.1, seed: int = 0) -> Splits:
    """Rows shuffled once and cut into train, valid and test.

    Args:
        rows: Arrays that lead with one length.
        valid: The fraction of rows to choose by, rounded to whole rows; 0 gives None.
        test: The fraction of rows to report on; 0 gives None.
        seed: Of the shuffle.

    Returns:
        The three parts.

    Raises:
        ValueError: For fractions that leave nothing to train on.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> splits = data.split({"x": np.arange(10.0)}, valid=0.2, test=0.3)
        >>> [len(part["x"]) for part in splits]
        [5, 2, 3]
    """
    rows = as_arrays(rows)
    n = count(rows)
    sizes = [round(n * valid), round(n * test)]
    if min(valid, test) < 0 or sum(sizes) >= n or (valid > 0) > sizes[0] or (test > 0) > sizes[1]:
        raise ValueError(
            f"cannot split {n} rows into valid={valid} and test={test}: every part needs a row"
        )
    order = np.random.default_rng(seed).permutation(n)
    a, b = sizes[1], sizes[1] + sizes[0]

    def part(index):
        return take(rows, np.sort(index)) if len(index) else None

    return Splits(take(rows, np.sort(order[b:])), part(order[a:b]), part(order[:a]))


def stratified_split(rows: Rows, *, test: int, seed: int = 0, by: str = "cond") -> Splits:
    """Rows cut into train and test so that each class keeps its share.

    Args:
        rows: Arrays that lead with one length.
        test: How many rows to cut off (by largest remainders).
        seed: Of the choice.
        by: The key of the labels, [n].

    Returns:
        The parts train and test.

    Raises:
        ValueError: For a test that leaves nothing to train on, and for labels that are not [n].
    """
    rows = as_arrays(rows)
    n = count(rows)
    if not 0 < test < n:
        raise ValueError(f"expected 0 < test < {n} rows, got test={test}")
    labels = np.asarray(rows[by])
    classes, sizes = np.unique(labels, return_counts=True)
    share = sizes * test / n
    quota = np.floor(share).astype(int)
    quota[np.argsort(quota - share, kind="stable")[: test - quota.sum()]] += 1
    rng = np.random.default_rng(seed)
    chosen = np.zeros(n, bool)
    for c, q in zip(classes, quota, strict=True):
        chosen[rng.permutation(np.flatnonzero(labels == c))[:q]] = True
    return Splits(take(rows, ~chosen), None, take(rows, chosen))
