"""An endless iterator of batches that knows where it stands."""

from collections.abc import Callable, Iterator

import numpy as np

from jflow._core.seeds import generator
from jflow.data._splits import Rows, as_arrays, count, take

Transform = Callable[[Rows, np.random.Generator], Rows]


class Batches:
    """What `batches` returns: an endless iterator of batches that knows where it stands.

    `position` is the number of batches given so far; `seek(position)` goes anywhere at once.
    """

    def __init__(
        self, rows: Rows, batch: int, seed: int, transform: Transform | None, share: tuple[int, int]
    ):
        self._rows, self._batch, self._seed, self._transform, self._share = (
            rows,
            batch,
            seed,
            transform,
            share,
        )
        self._n = count(rows)
        self._epoch, self._order = -1, np.arange(0)  # before the first
        self.position = 0

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        epoch, i = divmod(self.position, self._n // self._batch)
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                generator("batches", self._seed, epoch).permutation(self._n),
            )
        part, parts = self._share
        size = self._batch // parts
        start = i * self._batch + part * size
        rows: Rows = take(self._rows, self._order[start : start + size])
        if self._transform is not None:
            rows = self._transform(rows, generator("transform", self._seed, self.position, part))
        self.position += 1
        return rows

    def seek(self, position: int) -> None:
        """Go to where `position` batches have been given."""
        if position < 0:
            raise ValueError(f"expected a position >= 0, got {position}")
        self.position = position


def batches(
    rows: Rows,
    batch: int,
    *,
    seed: int = 0,
    transform: Transform | None = None,
    share: tuple[int, int] = (0, 1),
) -> Batches:
    """Shuffled batches without end, whose p-th is a pure function of (rows, seed, p).

    Every epoch is a fresh permutation; the rows that do not fill a last batch are left out of that
    epoch. A checkpoint needs one integer: `.position` is the number of batches given so far, and
    `.seek(position)` goes anywhere at once.

    Args:
        rows: Arrays that lead with one length, {'x': [n, *event], ...}.
        batch: How many rows a batch has, at most n.
        seed: Of the order of the rows.
        transform: (rows, rng) -> rows, run on each batch with a generator of its own
            (dequantization noise, augmentation).
        share: (i, n) gives the i-th of n equal parts of every batch, and reads no other rows: one
            for each of n processes (`data.share`). Together the parts are the batch, so that a run
            may go on with another n; only what a transform draws differs, since each part has a
            generator of its own.

    Returns:
        An iterator of dicts of numpy arrays, with `position` and `seek`.

    Raises:
        ValueError: For a batch that the rows cannot fill or the shares do not divide, and for
            arrays of unequal length.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> batches = data.batches({"x": np.arange(10.0)}, 4, seed=0)
        >>> first = next(batches)
        >>> first["x"].shape, batches.position
        ((4,), 1)
        >>> batches.seek(0)
        >>> bool((next(batches)["x"] == first["x"]).all())
        True
    """
    rows = as_arrays(rows)
    n = count(rows)
    if batch < 1:
        raise ValueError(f"expected a batch of at least 1 row, got batch={batch}")
    if n == 0:
        raise ValueError("there are no rows to make batches of")
    if batch > n:
        raise ValueError(f"a batch of {batch} is larger than the data: {n} rows")
    if seed < 0:
        raise ValueError(f"expected a seed >= 0, got {seed}")
    part, parts = share
    if not 0 <= part < parts or batch % parts:
        raise ValueError(
            f"expected a share (i, n) with 0 <= i < n and n dividing batch={batch}, got {share}"
        )
    return Batches(rows, batch, seed, transform, share)
