"""Tables of positions."""

import numpy as np


def centered_positions(rows: int, columns: int, grid: int, step: float, width: int) -> np.ndarray:
    """Sines and cosines of the column in the first half, of the row in the second.

    The patches lie at the center of a square of `grid` patches, neighbors `step` apart. The result
    is [rows columns, width], in float32.
    """
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))

    def axis(count):
        index = np.float32(np.arange(count) + (grid - count) // 2)
        angles = np.outer(index / np.float32(1 / step), frequencies)  # rounded as published
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1, dtype=np.float32)

    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.concatenate([axis(columns)[column], axis(rows)[row]], axis=1)
