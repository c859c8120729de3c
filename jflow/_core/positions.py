"""Tables of positions."""

from collections.abc import Iterator

import numpy as np


def centered_positions(rows: int, columns: int, grid: int, step: float, width: int) -> np.ndarray:
    """Sines and cosines of the column in the first half, of the row in the second.

    The patches lie at the center of a square of `grid` patches, neighbors `step` apart. The result
    is [rows columns, width], in float32.
    """
    of_rows, of_columns = (centered_axis(count, grid, step, width) for count in (rows, columns))
    return np.concatenate(list(table_rows(of_rows, of_columns)))


def centered_axis(count: int, grid: int, step: float, width: int) -> np.ndarray:
    """The sines and cosines of one axis, [count, width / 2]; see `centered_positions`."""
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    index = np.float32(np.arange(count) + (grid - count) // 2)
    angles = np.outer(index / np.float32(1 / step), frequencies)  # rounded as published
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1, dtype=np.float32)


def table_rows(of_rows: np.ndarray, of_columns: np.ndarray) -> Iterator[np.ndarray]:
    """The table of rows [r, k] and columns [c, k], a row of patches [c, 2 k] at a time, of which
    the column is the first half."""
    for row in of_rows:
        yield np.concatenate([of_columns, np.broadcast_to(row, of_columns.shape)], axis=1)
