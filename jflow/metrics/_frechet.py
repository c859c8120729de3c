"""The Frechet distance between the Gaussians that fit two sets of features. Numpy in float64: an evaluation, not a loss.

On features of Inception-v3 (`nets.InceptionFID`, `convert.inception`) it is the FID; on those of any other network it is
not, and should not be called so.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Moments(NamedTuple):
    """Of `n` rows of features: their mean [d], and scatter [d, d], the sum of (row - mean)(row - mean)^T."""

    n: int
    mean: np.ndarray
    scatter: np.ndarray


def moments(features: ArrayLike, before: Moments | None = None) -> Moments:
    """Moments of the rows of features [n, d], joined to those of the rows seen `before`.

    A loop `found = moments(chunk, found)` from None over chunks holds d^2 numbers however many rows there are, and gives
    what the rows in one array give, to rounding. Raises ValueError, naming the row, for NaN or infinities, and for chunks
    that disagree in d.
    Source: Tony Chan, Gene Golub, Randall LeVeque, Algorithms for computing the sample variance, 1983 (pairwise update).
    """
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or x.size == 0:
        raise ValueError(
            f"moments: expected features of shape [n, d], n and d of at least 1, got {list(x.shape)}"
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
            f"moments: expected features of shape [n, {len(before.mean)}] as before, got {list(x.shape)}"
        )
    total, apart = before.n + n, mean - before.mean
    between = np.outer(apart, apart) * (before.n * n / total)
    return Moments(total, before.mean + apart * (n / total), before.scatter + scatter + between)


def frechet_between(x: Moments, y: Moments) -> float:
    """|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x^1/2 C_y C_x^1/2)^1/2), the squared 2-Wasserstein distance of two Gaussians.

    m the means, C the covariances scatter / (n - 1), singular ones included (fewer rows than features). In the units of
    the features, squared; 0 for equal moments.
    It is biased: of two sets from one distribution it is positive, and falls roughly as 1 / n. Compare only distances of
    equal numbers of rows, and beside the distance of that many real rows.
    Raises ValueError for fewer than 2 rows and for different d.
    Sources: D. C. Dowson, B. V. Landau, The Frechet distance between multivariate normal distributions, 1982; Heusel et
    al., GANs trained by a two time-scale update rule converge to a local Nash equilibrium, 2017 (FID).
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
    # The trace of the root is the sum of the singular values of C_x^1/2 C_y^1/2. As eigenvalues of C_x^1/2 C_y C_x^1/2
    # they would be roots of rounded zeros: half the digits where a covariance is singular.
    singular = np.linalg.svd(_half(cx).T @ _half(cy), compute_uv=False)
    distance = ((x.mean - y.mean) ** 2).sum() + np.trace(cx) + np.trace(cy) - 2 * singular.sum()
    return float(max(distance, 0.0))


def frechet_distance(features_x: ArrayLike, features_y: ArrayLike) -> float:
    """`frechet_between` the moments of the rows of features_x [n, d] and features_y [m, d]; see there."""
    return frechet_between(moments(features_x), moments(features_y))


def _half(c: np.ndarray) -> np.ndarray:
    """A matrix h with h h^T = c, c [d, d] positive semi-definite to rounding."""
    values, vectors = np.linalg.eigh(c)
    return vectors * np.sqrt(np.maximum(values, 0))[None]
