"""An endless iterator of batches that knows where it stands."""

from collections.abc import Callable, Iterator

import numpy as np

from jflow.data.splits import Rows, count, take

Transform = Callable[[Rows, np.random.Generator], Rows]


class Batches:
    """What `batches` returns: an iterator with `position` (batches given so far) and `seek(position)`."""

    def __init__(self, rows: Rows, batch: int, seed: int, transform: Transform | None):
        self._rows, self._batch, self._seed, self._transform = rows, batch, seed, transform
        self._n = count(rows)
        self._epoch = self._order = None
        self.position = 0

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        epoch, i = divmod(self.position, self._n // self._batch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self._seed, epoch)).permutation(self._n)
        rows = take(self._rows, self._order[i * self._batch : (i + 1) * self._batch])
        if self._transform is not None:
            # The trailing 1 keeps this stream apart from the permutations: numpy pads (seed, epoch) with zeros.
            rows = self._transform(rows, np.random.default_rng((self._seed, self.position, 1)))
        self.position += 1
        return rows

    def seek(self, position: int) -> None:
        """Go to where `position` batches have been given."""
        if position < 0:
            raise ValueError(f"expected a position >= 0, got {position}")
        self.position = position


def batches(rows: Rows, batch: int, *, seed: int = 0, transform: Transform | None = None) -> Batches:
    """Shuffled batches without end: dicts of `batch` rows each, whose p-th is a pure function of (rows, seed, p).

    Every epoch is a fresh permutation; the rows that do not fill a last batch are left out of that epoch.
    transform(rows, rng) -> rows runs on each batch with a generator of its own (dequantization noise, augmentation).
    `.position` is the number of batches given so far; `.seek(position)` goes anywhere at once, so a checkpoint needs
    one integer. Raises ValueError for a batch that the rows cannot fill and for arrays of unequal length.
    """
    n = count(rows)
    if batch < 1:
        raise ValueError(f"expected a batch of at least 1 row, got batch={batch}")
    if n == 0:
        raise ValueError("there are no rows to make batches of")
    if batch > n:
        raise ValueError(f"a batch of {batch} is larger than the data: {n} rows")
    if seed < 0:
        raise ValueError(f"expected a seed >= 0, got {seed}")
    return Batches(rows, batch, seed, transform)
