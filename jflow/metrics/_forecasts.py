"""How good forecasts by draws are, in numpy and float64."""

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike


def crps(truth: ArrayLike, draws: ArrayLike) -> Float[np.ndarray, "n *event"]:
    """Continuous ranked probability score of forecasts by draws, in the units of the truth.

    Also known as: CRPS, continuous ranked probability score, energy score in one dimension.

        crps = mean_k |x_k - y| - sum_{k, l} |x_k - x_l| / (2 L^2)
             = integral of (F(u) - 1{y <= u})^2 du

    for the L draws x_k of a forecast, with distribution function F, and the truth y. It is smallest
    on average for draws from the law of y, and the absolute error for a single draw. L draws from a
    law score E|X - X'| / (2 L) above the law itself on average, 1 / (sqrt(pi) L) for a standard
    normal: compare forecasts by equally many draws, or by many.

    Args:
        truth: y [n, *event], of which each number has a score of its own.
        draws: [n, L, *event], L of them for each.

    Returns:
        The score of each number, at least 0; lower is better.

    Raises:
        ValueError: For shapes that do not fit each other, NaN or infinities.

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> metrics.crps(np.array([1.0]), np.array([[0.0, 4.0]])).tolist()  # (1 + 3) / 2 - 8 / 8
        [1.0]

    References:
        Gneiting, Raftery, *Strictly Proper Scoring Rules, Prediction, and Estimation*, Journal of
            the American Statistical Association 102, 2007.
    """
    y, x = np.asarray(truth, np.float64), np.asarray(draws, np.float64)
    if y.ndim < 1 or x.ndim != y.ndim + 1 or x.size == 0 or x[:, 0].shape != y.shape:
        raise ValueError(
            f"crps: expected truth [n, *event] and draws [n, L, *event], got {list(y.shape)} and"
            f" {list(x.shape)}"
        )
    if not (np.isfinite(y).all() and np.isfinite(x).all()):
        raise ValueError("crps: expected finite numbers, got NaN or infinities")
    error = np.abs(x - y[:, None]).mean(1)
    count = x.shape[1]
    # the sum of |x_k - x_l| over all pairs is that of 2 (2 k + 1 - L) x_(k) over the sorted draws
    factor = (2 * np.arange(count) + 1 - count) / count**2
    return error - np.tensordot(np.moveaxis(np.sort(x, axis=1), 1, -1), factor, axes=1)
