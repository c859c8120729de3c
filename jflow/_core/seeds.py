"""One seed for many purposes."""

import zlib

import numpy as np


def generator(purpose: str, *seed: int) -> np.random.Generator:
    """numpy's generator of a seed for one purpose, independent of those of the same seed for
    others.

    By itself the seed would give one stream to all (and numpy pads seeds with zeros: (5,) and (5,
    0) are one)."""
    return np.random.default_rng((*seed, zlib.crc32(purpose.encode())))
