"""How far one set of rows is from another. Numpy in float64 throughout: an evaluation, not a loss."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

from jflow._core.checks import check_whole
from jflow._core.seeds import generator

CHUNK = 2**22  # distances held at once: 32 MiB


def _rows(name: str, *arrays: ArrayLike) -> list[np.ndarray]:
    """Arrays [n, *event] as float64 [n, d], about a common origin; events must agree in shape, and be finite."""
    given = [np.asarray(a, np.float64) for a in arrays]
    shapes = [list(a.shape) for a in given]
    if any(a.ndim < 2 or a.size == 0 for a in given) or any(s[1:] != shapes[0][1:] for s in shapes):
        raise ValueError(
            f"{name}: expected arrays [n, *event] and [m, *event], got {' and '.join(map(str, shapes))}"
        )
    if not all(np.isfinite(a).all() for a in given):
        raise ValueError(f"{name}: the rows hold NaN or infinities")
    flat = [a.reshape(len(a), -1) for a in given]
    # Distances come from products, |x|^2 + |y|^2 - 2 xy: near the origin these lose the fewest digits.
    center = flat[-1].mean(0)
    return [a - center for a in flat]


def _squared(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared euclidean distances [n, m] of rows x [n, d], y [m, d]."""
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T, 0)


def _chunks(x: np.ndarray, m: int):
    size = max(1, CHUNK // m)
    return (x[i : i + size] for i in range(0, len(x), size))


def _mean_distance(x: np.ndarray, y: np.ndarray) -> float:
    return sum(np.sqrt(_squared(part, y)).sum() for part in _chunks(x, len(y))) / (len(x) * len(y))


def energy_distance(x: ArrayLike, y: ArrayLike) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| over all pairs of rows of x [n, *event] and y [m, *event].

    The V-statistic: the means of |X - X'| and |Y - Y'| run over all n^2 and m^2 pairs, the zero diagonal included,
    which makes it a distance between the two empirical distributions: >= 0, and 0 for equal sets. It is the squared
    metric, in the units of x (not its square root, which some libraries return); in one dimension 2 int (F - G)^2.
    Source: Gabor Szekely, Maria Rizzo, Energy statistics: a class of statistics based on distances, 2013.
    """
    x, y = _rows("energy_distance", x, y)
    return float(2 * _mean_distance(x, y) - _mean_distance(x, x) - _mean_distance(y, y))


def nearest_distance(x: ArrayLike, reference: ArrayLike) -> float:
    """The mean over rows of x [n, *event] of the euclidean distance to the nearest row of reference [m, *event].

    Samples that lie nearer to the training rows than held-out rows do have been memorised.
    """
    x, y = _rows("nearest_distance", x, reference)
    total = 0.0
    for part in _chunks(x, len(y)):
        nearest = y[_squared(part, y).argmin(1)]
        total += np.sqrt(
            ((part - nearest) ** 2).sum(1)
        ).sum()  # by differences: a copy is at exactly 0
    return float(total / len(x))


def wasserstein(x: ArrayLike, y: ArrayLike) -> float:
    """W2 of the empirical distributions of x [n, *event] and y [n, *event], equally many rows, in the units of x:

        sqrt(min over permutations s of mean_k |x[k] - y[s(k)]|^2),

    exact, in float64; n = 2000 takes seconds, the time grows as n^3. Two sets of one distribution are not at 0: their
    distance is the floor to report beside a number. ValueError for sets of unequal size (and as `energy_distance`).
    """
    x, y = _rows("wasserstein", x, y)
    if len(x) != len(y):
        raise ValueError(
            f"wasserstein: expected sets of equal size, got {len(x)} and {len(y)} rows"
        )
    i, j = linear_sum_assignment(_squared(x, y))
    return float(
        np.sqrt(((x[i] - y[j]) ** 2).sum(1).mean())
    )  # by differences: equal sets are at exactly 0


def permutation_test(
    x: ArrayLike,
    y: ArrayLike,
    *,
    statistic: Callable[[ArrayLike, ArrayLike], float] = energy_distance,
    permutations: int = 199,
    seed: int = 0,
) -> tuple[float, float]:
    """(statistic(x, y), p): do x [n, *event] and y [m, *event] come from one distribution?

    p = (1 + the permuted statistics that reach it) / (1 + permutations): if they do, P(p <= a) <= a exactly. The least
    p is 1 / (1 + permutations).
    """
    x, y = np.asarray(x), np.asarray(y)
    check_whole("permutation_test", permutations=permutations)
    found = statistic(x, y)
    both, rng = np.concatenate([x, y]), generator("permutation test", seed)
    reached = 0
    for _ in range(permutations):
        order = rng.permutation(len(both))
        reached += statistic(both[order[: len(x)]], both[order[len(x) :]]) >= found
    return float(found), (1 + reached) / (1 + permutations)
