"""Likelihoods in other units."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jflow._core.arrays import numpy_mean_and_std
from jflow._core.checks import check_whole


def bits_per_dim(log_prob: ArrayLike, dims: int) -> float:
    """Mean bits per dimension of log-probabilities in nats.

    Also known as: BPD, bits/dim.

        -mean(log_prob) / (dims ln 2)

    The log-probabilities must be of the data's own levels (for 8-bit images: of 0 .. 255, so that a
    uniform model has exactly 8), that is, with the log_det of the preprocessing added.

    Args:
        log_prob: [b], in nats.
        dims: How many numbers an event has.

    Returns:
        Bits per dimension.

    Raises:
        ValueError: For no log-probabilities, and for dims that is not a whole number of at least 1.

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> round(metrics.bits_per_dim(np.full(10, -3 * np.log(256)), dims=3), 6)  # 256 levels
        8.0
    """
    check_whole("bits_per_dim", dims=dims)
    log_prob = np.asarray(log_prob, np.float64)
    if log_prob.size == 0:
        raise ValueError("bits_per_dim: there is no mean of no log-probabilities")
    return float(-np.mean(log_prob) / (dims * np.log(2)))


def log_mean_exp(x: ArrayLike, axis: int = 0) -> Any:
    """log of the mean of exp(x), without overflow: averages log-probabilities in probability.

    Args:
        x: Any shape.
        axis: The axis to average over.

    Returns:
        x without the axis; -inf where all of x is -inf.

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> float(metrics.log_mean_exp(np.log([1.0, 3.0]) + 1000).round(4))  # log 2 + 1000
        1000.6931
    """
    x = np.asarray(x, np.float64)
    top = np.max(x, axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.squeeze(top, axis) + np.log(np.mean(np.exp(x - top), axis=axis))


def gaussian_log_prob(train: ArrayLike, rows: ArrayLike) -> np.ndarray:
    """Log-density of rows under the Gaussian that fits the training rows best.

    The yardstick for density models of tables. In float64; a covariance that is singular to
    rounding gets the smallest ridge of 1e-12, 1e-11, ... times the columns' variances that makes it
    factorize.

    Args:
        train: [m, d], at least two rows; the Gaussian of greatest likelihood has their mean and
            covariance.
        rows: [n, d].

    Returns:
        [n], in nats.

    Raises:
        ValueError: For other shapes, for a column that is constant in train, and for NaN or
            infinities.

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> train = np.array([[-1.0], [1.0]])  # mean 0, variance 1
        >>> metrics.gaussian_log_prob(train, np.array([[0.0]])).round(4)
        array([-0.9189])
    """
    train, rows = np.asarray(train, np.float64), np.asarray(rows, np.float64)
    if train.ndim != 2 or rows.ndim != 2 or train.shape[1] != rows.shape[1] or len(train) < 2:
        raise ValueError(
            "gaussian_log_prob: expected train [m >= 2, d] and rows [n, d], "
            f"got {list(train.shape)} and {list(rows.shape)}"
        )
    if not (np.isfinite(train).all() and np.abs(train).max() <= 2.0**1022):
        raise ValueError("gaussian_log_prob: train holds NaN, infinities or numbers beyond 2^1022")
    mean, std = (moment[0] for moment in numpy_mean_and_std(train, 0))
    flat = np.ptp(train, 0) == 0  # the std of a constant is off 0 by the rounding of its mean
    if flat.any():
        raise ValueError(f"gaussian_log_prob: column {int(np.argmax(flat))} is constant in train")
    z = (train - mean) / std
    correlation = z.T @ z / len(z)
    d, ridge = len(mean), 0.0
    while True:
        try:
            lower = np.linalg.cholesky(correlation + ridge * np.eye(d))
            break
        except np.linalg.LinAlgError:
            ridge = max(10 * ridge, 1e-12)
    white = np.linalg.solve(lower, ((rows - mean) / std).T)
    log_det = np.log(np.diag(lower)).sum() + np.log(std).sum()
    return -0.5 * (white**2).sum(0) - log_det - 0.5 * d * np.log(2 * np.pi)
