"""An hourly series in patches: what is read, cut, and brought to the scale of each window."""

import gzip
import io

import numpy as np

HOURS = 30 * 24  # of a month, as the usual split has it: 12, 4 and 4 months
# What the meters resolve: the numbers of a column lie on a lattice of about this step.
STEPS = (0.067, 0.067, 0.0355, 0.0355, 0.0305, 0.0305, 0.0703)


def read(path, seed: int) -> np.ndarray:
    """[hours, columns] of ETTh1, with noise of one step of the lattice, in standard deviations of
    the first twelve months."""
    raw = gzip.decompress(open(path, "rb").read()).decode()
    x = np.genfromtxt(io.StringIO(raw), delimiter=",", skip_header=1)[: 20 * HOURS, 1:]
    return scaled(x + np.random.default_rng(seed).uniform(-0.5, 0.5, x.shape) * np.array(STEPS))


def invented(seed: int) -> np.ndarray:
    """Seven noisy daily rhythms, for a short run without the data."""
    draw = np.random.default_rng(seed)
    hours = np.arange(20 * HOURS)[:, None]
    daily = np.sin(2 * np.pi * (hours / 24 + draw.random(7)))
    return scaled(daily + 0.3 * draw.normal(size=(len(hours), 7)))


def scaled(x: np.ndarray) -> np.ndarray:
    train = x[: 12 * HOURS]
    return ((x - train.mean(0)) / train.std(0)).astype(np.float32)


def starts(part: str, step: int, context: int, horizon: int) -> np.ndarray:
    """The first hours of windows whose *forecast* lies in a part; the context may lie before it."""
    first, last = {"train": (0, 12), "validation": (12, 16), "test": (16, 20)}[part]
    begin = first * HOURS - (context if first else 0)
    return np.arange(begin, last * HOURS - context - horizon + 1, step)


def windows(x, first, column, length: int):
    """[rows, length]: the hours from `first` [rows] of a `column` [rows]."""
    return x[first[:, None] + np.arange(length)[None], column[:, None]]


def mean_and_scale(window, context: int, floor: float = 0.1):
    """Of the context of each row, [rows, 1]: what is subtracted and divided by. The floor, in
    standard deviations of the column, keeps calm hours from being blown up."""
    past = window[:, :context]
    mean = past.mean(1, keepdims=True)
    return mean, (past.var(1, keepdims=True) + floor**2) ** 0.5


def seasonal(window, context: int, period: int = 24):
    """The last day before the forecast, repeated."""
    horizon = window.shape[1] - context
    return np.tile(window[:, context - period : context], (1, -(-horizon // period)))[:, :horizon]


def blocked(x: np.ndarray, size: int) -> tuple[float, float]:
    """Mean of x [windows in time] and its standard error from means of blocks of neighbors."""
    count = len(x) // size
    means = x[: count * size].reshape(count, size).mean(1)
    return float(x.mean()), float(means.std(ddof=1) / count**0.5)
