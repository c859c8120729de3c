"""Tokens of a vocabulary, checked where their values are seen."""

import numpy as np
from numpy.typing import ArrayLike

from jflow._core.checks import check_whole


def check_tokens(x: ArrayLike, vocabulary: int, mask: int | None = None) -> np.ndarray:
    """Tokens, or an error that names the first that is none, or that is the mask.

    Losses and networks see no values while they are traced: there a token outside the vocabulary
    makes NaN.

    Args:
        x: integers [b, *event], such as the data that a loader is made of.
        vocabulary: V, the number of symbols, the mask among them.
        mask: the symbol that masks, which no data may hold; None: there is none.

    Returns:
        x as an array of integers.

    Raises:
        TypeError: x does not hold integers.
        ValueError: a token is outside 0 ... V - 1, or the mask; the message has its place.

    Examples:
        >>> from jflow import data
        >>> data.check_tokens([[0, 1], [2, 0]], vocabulary=3).shape
        (2, 2)
        >>> data.check_tokens([[0, 1], [2, 0]], vocabulary=3, mask=2)
        Traceback (most recent call last):
        ValueError: check_tokens: expected tokens without the mask, 2, got it at [1, 0]
    """
    check_whole("check_tokens", vocabulary=vocabulary)
    found = np.asarray(x)
    if not np.issubdtype(found.dtype, np.integer):
        raise TypeError(f"check_tokens: expected integers, got {found.dtype}")
    outside = (found < 0) | (found >= vocabulary)
    if outside.any():
        at = np.argwhere(outside)[0]
        raise ValueError(
            f"check_tokens: expected tokens in 0 ... {vocabulary - 1}, got {found[tuple(at)]} at"
            f" {at.tolist()} ({int(outside.sum())} of {found.size} are outside)"
        )
    if mask is not None and (found == mask).any():
        at = np.argwhere(found == mask)[0].tolist()
        raise ValueError(f"check_tokens: expected tokens without the mask, {mask}, got it at {at}")
    return found
