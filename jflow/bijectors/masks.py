"""Boolean numpy masks for `masked_coupling`: true passes, false is transformed."""

import numpy as np

from jflow._core.checks import check_whole

__all__ = ["alternating", "channels", "checkerboard", "random"]


def checkerboard(height: int, width: int) -> np.ndarray:
    """[height, width, 1], true where row + column is even. Dinh, Sohl-Dickstein, Bengio, *Real NVP* (2016)."""
    _check("checkerboard", height=height, width=width)
    return (np.indices((height, width)).sum(0) % 2 == 0)[..., None]


def channels(count: int) -> np.ndarray:
    """[count], true for the first half of the channels (the smaller one)."""
    _check("channels", count=count)
    return np.arange(count) < count // 2


def random(event_shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """[*event_shape], true at half of the entries (rounded down), drawn without replacement from a fixed seed: masks are no
    part of a checkpoint, so the seed is what a stored flow is tied to."""
    event_shape = tuple(event_shape)
    _check("random", **{f"event_shape[{i}]": size for i, size in enumerate(event_shape)})
    half = np.arange(np.prod(event_shape, dtype=int)) < np.prod(event_shape, dtype=int) // 2
    return np.random.default_rng(seed).permutation(half).reshape(event_shape)


def alternating(mask: np.ndarray, depth: int) -> np.ndarray:
    """[depth, *mask.shape]: mask, its complement, mask ...: the `xs` of a scan in which two layers transform everything."""
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"masks.alternating: expected a boolean mask, got {mask.dtype}")
    _check("alternating", depth=depth)
    return np.stack([mask if i % 2 == 0 else ~mask for i in range(depth)])


def _check(function: str, **sizes: int) -> None:
    check_whole(f"masks.{function}", **sizes)
