"""A text as symbols: pieces of it, and n-grams to compare with."""

import gzip
import string
from pathlib import Path

import numpy as np

SYMBOLS = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase  # all of the text's


def read(path, symbols: str) -> np.ndarray:
    """The symbols of a file, plain or gzipped, as their indices; others are left out."""
    content = Path(path).read_bytes()
    content = gzip.decompress(content) if str(path).endswith(".gz") else content
    index = {c: i for i, c in enumerate(symbols)}
    return np.array([index[c] for c in content.decode() if c in index], np.int32)


def pieces(x: np.ndarray, length: int, step: int) -> np.ndarray:
    """[n, length], a piece from every step-th symbol on, without the last that is not whole."""
    return np.lib.stride_tricks.sliding_window_view(x, length)[::step].copy()


def counted(rows: np.ndarray, step: int) -> np.ndarray:
    """The text that pieces with a step are of."""
    return np.concatenate([rows[0], rows[1:, -step:].reshape(-1)])


def tail_mask(shape: tuple[int, int]) -> np.ndarray:
    """Which symbols of pieces that overlap by half are judged: all of the first piece, then the
    later halves."""
    used = np.broadcast_to(np.arange(shape[1]) >= shape[1] // 2, shape).copy()
    used[0] = True
    return used


def grams(train: np.ndarray, test: np.ndarray, size: int, order: int, strength: float = 5.0):
    """Bits per symbol of an interpolated n-gram: each order's counts, with those of the order below
    as `strength` more observations."""
    p = np.full((1, size), 1 / size)
    codes, at = np.zeros(len(train), np.int64), np.zeros(len(test), np.int64)
    for k in range(order):  # the last k symbols are known
        rows = size**k
        counts = np.bincount(codes[k:] * size + train[k:], minlength=rows * size)
        counts = counts.reshape(rows, size)
        below = p[np.arange(rows) % len(p)]  # of the k - 1 nearest symbols
        p = (counts + strength * below) / (counts.sum(1, keepdims=True) + strength)
        if k < order - 1:  # context: older symbols are higher digits
            codes = _longer(codes, train, k, size)
            at = _longer(at, test, k, size)
    judged = slice(order - 1, None)
    return float(-np.log2(p[at[judged], test[judged]]).mean())


def _longer(codes: np.ndarray, x: np.ndarray, k: int, size: int) -> np.ndarray:
    """Codes of the last k + 1 symbols from those of the last k: the symbol k + 1 ago in front."""
    older = np.zeros(len(x), np.int64)
    older[k + 1 :] = x[: -k - 1]
    return codes + older * size**k
