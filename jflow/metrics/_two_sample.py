"""How far one set of rows is from another, in numpy and float64: an evaluation, not a loss."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

from jflow._core.checks import check_whole
from jflow._core.seeds import generator

CHUNK = 2**22  # distances held at once: 32 MiB


def check_sets(name: str, *arrays: ArrayLike) -> list[np.ndarray]:
    """Arrays [n, *event] as float64 [n, d], about a common origin; events must agree in shape, and
    be finite."""
    given = [np.asarray(a, np.float64) for a in arrays]
    shapes = [list(a.shape) for a in given]
    if any(a.ndim < 2 or a.size == 0 for a in given) or any(s[1:] != shapes[0][1:] for s in shapes):
        raise ValueError(
            f"{name}: expected arrays [n, *event] and [m, *event], got"
            f" {' and '.join(map(str, shapes))}"
        )
    if not all(np.isfinite(a).all() for a in given):
        raise ValueError(f"{name}: the rows hold NaN or infinities")
    flat = [a.reshape(len(a), -1) for a in given]
    # Distances come from products, |x|^2 + |y|^2 - 2 xy: near the origin these lose the fewest
    # digits.
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
    """Energy distance between two sets of rows.

        2 E|X - Y| - E|X - X'| - E|Y - Y'|

    over all pairs of rows, the zero diagonals included (the V-statistic), which makes it a distance
    between the two empirical distributions: at least 0, and 0 for equal sets. It is the squared
    metric, in the units of x (not its square root, which some libraries return); in one dimension 2
    int (F - G)^2. In float64.

    Args:
        x: [n, *event].
        y: [m, *event].

    Returns:
        The distance.

    Raises:
        ValueError: For events of different shapes, no rows, NaN or infinities.

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> metrics.energy_distance(np.zeros((3, 1)), np.ones((5, 1)))  # two points, 1 apart
        2.0

    References:
        Szekely, Rizzo, *Energy Statistics: A Class of Statistics Based on Distances*, 2013.
    """
    x, y = check_sets("energy_distance", x, y)
    return float(2 * _mean_distance(x, y) - _mean_distance(x, x) - _mean_distance(y, y))


def nearest_distance(x: ArrayLike, reference: ArrayLike) -> float:
    """Mean distance of rows to their nearest row of a reference.

    Samples that lie nearer to the training rows than held-out rows do have been memorized.

    Args:
        x: [n, *event].
        reference: [m, *event].

    Returns:
        The mean over rows of x of the euclidean distance; exactly 0 where all are copies.

    Raises:
        ValueError: For events of different shapes, no rows, NaN or infinities.

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> metrics.nearest_distance(np.array([[0.0], [5.0]]), np.array([[1.0], [5.0]]))
        0.5
    """
    x, y = check_sets("nearest_distance", x, reference)
    total = 0.0
    for part in _chunks(x, len(y)):
        nearest = y[_squared(part, y).argmin(1)]
        total += np.sqrt(
            ((part - nearest) ** 2).sum(1)
        ).sum()  # by differences: a copy is at exactly 0
    return float(total / len(x))


def wasserstein(x: ArrayLike, y: ArrayLike) -> float:
    """2-Wasserstein distance between two sets of equally many rows.

    Also known as: W2, earth mover's distance.

        sqrt(min over permutations s of mean_k |x[k] - y[s(k)]|^2)

    exact, in float64. n = 2000 takes seconds, and the time grows as n^3. Two sets of one
    distribution are not at 0: their distance is the floor to report beside a number.

    Args:
        x: [n, *event].
        y: [n, *event].

    Returns:
        The distance, in the units of x; exactly 0 for equal sets.

    Raises:
        ValueError: For sets of unequal size, events of different shapes, NaN or infinities.

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> metrics.wasserstein(np.array([[0.0], [3.0]]), np.array([[4.0], [1.0]]))
        1.0
    """
    x, y = check_sets("wasserstein", x, y)
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
    """Test of whether two sets of rows come from one distribution.

    p = (1 + the permuted statistics that reach the found one) / (1 + permutations): if they do come
    from one distribution, P(p <= a) <= a exactly. The least p is 1 / (1 + permutations).

    Args:
        x: [n, *event].
        y: [m, *event].
        statistic: (x, y) -> number, large where the sets differ.
        permutations: How many times rows are shuffled between the sets.
        seed: Of the shuffles.

    Returns:
        (statistic(x, y), p).

    Raises:
        ValueError: For permutations that is not a whole number of at least 1, and what the
            statistic raises.

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> x = np.random.default_rng(0).normal(size=(50, 1))
        >>> found, p = metrics.permutation_test(x, x + 1, permutations=99)
        >>> p
        0.01
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
