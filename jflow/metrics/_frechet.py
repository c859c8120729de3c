"""Frechet distances of features.

The distance between the Gaussians that fit two sets of features, in numpy and float64: an
evaluation, not a loss. On features of Inception-v3 (`nets.InceptionFID`, `convert.inception`) it is
the FID; on those of any other network it is not, and should not be called so.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Moments(NamedTuple):
    """Mean and scatter of some rows of features, from `moments`, for `frechet_between`.

    Attributes:
        n: The number of rows.
        mean: Their mean, [d].
        scatter: The sum of (row - mean) (row - mean)^T over rows, [d, d].
    """

    n: int
    mean: np.ndarray
    scatter: np.ndarray


def moments(features: ArrayLike, before: Moments | None = None) -> Moments:
    """Moments of rows of features, joined to those of the rows seen before.

    A loop `found = moments(chunk, found)` from None over chunks holds d^2 numbers however many rows
    there are, and gives what the rows in one array give, to rounding.

    Args:
        features: [n, d].
        before: The moments of the rows seen before, if there were any.

    Returns:
        The moments of all rows.

    Raises:
        ValueError: For NaN or infinities, with the row's number, and for chunks that disagree in d.

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> found = metrics.moments(np.array([[0.0], [2.0]]), metrics.moments(np.array([[4.0]])))
        >>> found.n, float(found.mean[0]), float(found.scatter[0, 0])
        (3, 2.0, 8.0)

    References:
        Chan, Golub, LeVeque, *Algorithms for Computing the Sample Variance*, 1983.
    """
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or x.size == 0:
        raise ValueError(
            "moments: expected features of shape [n, d], n and d of at least 1, got"
            f" {list(x.shape)}"
        )
    if not np.isfinite(x).all():
        raise ValueError(
            f"moments: row {int(np.argwhere(~np.isfinite(x))[0][0])} holds NaN or infinities"
        )
    n, mean = len(x), x.mean(0)
    scatter = (x - mean).T @ (x - mean)
    if before is None:
        return Moments(n, mean, scatter)
    if before.mean.shape != mean.shape:
        raise ValueError(
            f"moments: expected features of shape [n, {len(before.mean)}] as before, got"
            f" {list(x.shape)}"
        )
    total, apart = before.n + n, mean - before.mean
    between = np.outer(apart, apart) * (before.n * n / total)
    return Moments(total, before.mean + apart * (n / total), before.scatter + scatter + between)


def frechet_between(x: Moments, y: Moments) -> float:
    """Frechet distance between the Gaussians of two moments.

    Also known as: squared 2-Wasserstein distance of Gaussians.

        |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x^1/2 C_y C_x^1/2)^1/2)

    with m the means and C the covariances scatter / (n - 1), singular ones included (fewer rows
    than features). It is in the units of the features, squared, and 0 for equal moments. It is
    biased: of two sets from one distribution it is positive, and falls roughly as 1 / n. Compare
    only distances of equal numbers of rows, and beside the distance of that many real rows.

    Args:
        x: Moments of one set, from `moments`.
        y: Moments of the other.

    Returns:
        The distance, at least 0.

    Raises:
        ValueError: For fewer than 2 rows, and for different numbers of features.

    References:
        Dowson, Landau, *The Frechet Distance between Multivariate Normal Distributions*, 1982.
    """
    if x.mean.shape != y.mean.shape:
        raise ValueError(
            f"frechet distance: the features have {len(x.mean)} and {len(y.mean)} dimensions"
        )
    if min(x.n, y.n) < 2:
        raise ValueError(
            f"frechet distance: a covariance needs at least 2 rows, got {x.n} and {y.n}"
        )
    cx, cy = x.scatter / (x.n - 1), y.scatter / (y.n - 1)
    # The trace of the root is the sum of the singular values of C_x^1/2 C_y^1/2. As eigenvalues of
    # C_x^1/2 C_y C_x^1/2 they would be roots of rounded zeros: half the digits where a covariance
    # is singular.
    singular = np.linalg.svd(_half(cx).T @ _half(cy), compute_uv=False)
    distance = ((x.mean - y.mean) ** 2).sum() + np.trace(cx) + np.trace(cy) - 2 * singular.sum()
    return float(max(distance, 0.0))


def frechet_distance(features_x: ArrayLike, features_y: ArrayLike) -> float:
    """Frechet distance between two sets of features, which on Inception's features is the FID.

    Also known as: FID, Frechet inception distance, Inception distance.

    It is `frechet_between` the moments of both sets, which says what it computes and how it is
    biased. `nets.InceptionFID` with `convert.inception` makes the features that are the published
    FID's.

    Args:
        features_x: [n, d].
        features_y: [m, d].

    Returns:
        The distance, at least 0, in the units of the features, squared.

    Raises:
        ValueError: For NaN or infinities, for fewer than 2 rows, and for different d.

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> x = np.random.default_rng(0).normal(size=(1000, 4))
        >>> round(metrics.frechet_distance(x, x + 2.0), 6)  # a shift by 2 in each of four numbers
        16.0

    References:
        Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, *GANs Trained by a Two Time-Scale Update
        Rule Converge to a Local Nash Equilibrium*, 2017, arXiv:1706.08500.
    """
    return frechet_between(moments(features_x), moments(features_y))


def _half(c: np.ndarray) -> np.ndarray:
    """A matrix h with h h^T = c, c [d, d] positive semi-definite to rounding."""
    values, vectors = np.linalg.eigh(c)
    return vectors * np.sqrt(np.maximum(values, 0))[None]
