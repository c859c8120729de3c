"""Tables of positions, and sines and cosines of times."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num

from jflow._core.arrays import float_dtype
from jflow.types import Array


def time_features(
    t: Num[Array, "*shape"], dim: int, *, scale: float, max_period: float = 10_000.0
) -> Float[Array, "*shape {dim}"]:
    """Cosines and sines of times at geometric frequencies, in float32 or better.

    The angular frequencies run from `scale` down to `scale / max_period`, in radians per unit of t.
    Time lies in [0, 1], so `scale` decides what the features can distinguish: at 1 (raw t) nearly
    all of them are flat, at 1000 (the habit of networks with 1000 integer steps) they resolve
    everything, and d/dt, which JVP losses take, is up to 1000 times the signal.

    Args:
        t: the times, of any shape.
        dim: how many features: dim / 2 frequencies.
        scale: the largest angular frequency.
        max_period: the ratio that the frequencies fall by.

    Returns:
        The features [..., dim], the cosines first.

    Raises:
        ValueError: dim is odd or below 2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> nets.time_features(jnp.array([0.0, 0.5]), 4, scale=100.0)[0]
        Array([1., 1., 0., 0.], dtype=float32)

    References:
        Vaswani et al., *Attention Is All You Need*, 2017, arXiv:1706.03762.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"time_features: expected an even dim of at least 2, got {dim}")
    dtype = float_dtype(t)
    frequencies = scale * max_period ** (-np.arange(dim // 2) / (dim // 2))
    angles = t.astype(dtype)[..., None] * jnp.asarray(frequencies, dtype).reshape(
        (1,) * t.ndim + (-1,)
    )
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


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
