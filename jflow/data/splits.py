"""Rows (dicts of numpy arrays that lead with one length) and their splits."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jflow._util import described

Rows = Mapping[str, np.ndarray]


class Splits(NamedTuple):
    """Rows to train on, to choose by and to report on, in data units; `valid` and `test` may be None."""

    train: Rows
    valid: Rows | None = None
    test: Rows | None = None


def count(rows: Rows) -> int:
    """The number of rows; an error names the keys whose lengths disagree."""
    if not isinstance(rows, Mapping):
        raise TypeError(f"expected rows to be a dict such as {{'x': array [n, ...]}}, got {described(rows)}")
    lengths = {key: len(value) for key, value in rows.items()}
    if not lengths:
        raise ValueError("rows hold no arrays: expected a dict such as {'x': array [n, ...]}")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"arrays of rows differ in length: {', '.join(f'{k!r} {v}' for k, v in lengths.items())}")
    return next(iter(lengths.values()))


def take(rows: Rows, index) -> dict[str, np.ndarray]:
    """The rows at `index` (integers, a mask or a slice) of every array."""
    return {key: value[index] for key, value in rows.items()}


def split(rows: Rows, *, valid: float = 0.0, test: float = 0.1, seed: int = 0) -> Splits:
    """Shuffle once by `seed` and cut: `valid` and `test` are fractions of the rows, rounded; 0 gives None."""
    n = count(rows)
    sizes = [round(n * valid), round(n * test)]
    if min(valid, test) < 0 or sum(sizes) >= n or (valid > 0) > sizes[0] or (test > 0) > sizes[1]:
        raise ValueError(f"cannot split {n} rows into valid={valid} and test={test}: every part needs a row")
    order = np.random.default_rng(seed).permutation(n)
    a, b = sizes[1], sizes[1] + sizes[0]
    parts = [order[b:], order[a:b], order[:a]]
    return Splits(*(take(rows, np.sort(part)) if len(part) else None for part in parts))


def stratified_split(rows: Rows, *, test: int, seed: int = 0, by: str = "cond") -> Splits:
    """Cut off `test` rows so that each class of the labels rows[by] [n] keeps its share (largest remainders)."""
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
