"""Boolean numpy masks for `masked_coupling`: true passes, false is transformed."""

import numpy as np
from jaxtyping import Bool

from jflow._core.checks import check_whole

__all__ = ["alternating", "channels", "checkerboard", "random"]


def checkerboard(height: int, width: int) -> Bool[np.ndarray, "height width 1"]:
    """A checkerboard: true where row + column is even.

    Args:
        height: the number of rows.
        width: the number of columns.

    Returns:
        The mask [height, width, 1].

    Raises:
        ValueError: a size is below 1.

    Examples:
        >>> from jflow import bijectors
        >>> bijectors.masks.checkerboard(2, 2)[..., 0].astype(int).tolist()
        [[1, 0], [0, 1]]

    References:
        Dinh, Sohl-Dickstein, Bengio, *Density Estimation Using Real NVP*, 2016, arXiv:1605.08803.
    """
    _check("checkerboard", height=height, width=width)
    return (np.indices((height, width)).sum(0) % 2 == 0)[..., None]


def channels(count: int) -> Bool[np.ndarray, " count"]:
    """The first half of the channels, the smaller one: true there, false in the rest.

    Args:
        count: the number of channels.

    Returns:
        The mask [count].

    Raises:
        ValueError: count is below 1.

    Examples:
        >>> from jflow import bijectors
        >>> bijectors.masks.channels(5).astype(int).tolist()
        [1, 1, 0, 0, 0]
    """
    _check("channels", count=count)
    return np.arange(count) < count // 2


def random(event_shape: tuple[int, ...], seed: int = 0) -> Bool[np.ndarray, "*event"]:
    """Half of the entries (rounded down), drawn without replacement from a fixed seed.

    Masks are no part of a checkpoint, so the seed is what a stored flow is tied to.

    Args:
        event_shape: the shape of one x.
        seed: of numpy's generator.

    Returns:
        The mask [*event_shape].

    Raises:
        ValueError: a size of event_shape is below 1.

    Examples:
        >>> from jflow import bijectors
        >>> mask = bijectors.masks.random((2, 3))
        >>> mask.shape, int(mask.sum())
        ((2, 3), 3)
    """
    event_shape = tuple(event_shape)
    _check("random", **{f"event_shape[{i}]": size for i, size in enumerate(event_shape)})
    half = np.arange(np.prod(event_shape, dtype=int)) < np.prod(event_shape, dtype=int) // 2
    return np.random.default_rng(seed).permutation(half).reshape(event_shape)


def alternating(mask: np.ndarray, depth: int) -> Bool[np.ndarray, "depth *event"]:
    """A mask, its complement, the mask again and so on, for the `xs` of a scan.

    Two layers then transform everything.

    Args:
        mask: a boolean mask, [*event].
        depth: the number of layers.

    Returns:
        The masks [depth, *event].

    Raises:
        TypeError: the mask is not boolean.
        ValueError: depth is below 1.

    Examples:
        >>> from jflow import bijectors
        >>> masks = bijectors.masks
        >>> masks.alternating(masks.channels(2), 3).astype(int).tolist()
        [[1, 0], [0, 1], [1, 0]]
    """
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"masks.alternating: expected a boolean mask, got {mask.dtype}")
    _check("alternating", depth=depth)
    return np.stack([mask if i % 2 == 0 else ~mask for i in range(depth)])


def _check(function: str, **sizes: int) -> None:
    check_whole(f"masks.{function}", **sizes)
