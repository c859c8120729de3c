"""A classifier as a measure of how far one set of rows is from another."""

import warnings

import numpy as np
from numpy.typing import ArrayLike

from jflow._core.checks import check_whole
from jflow.metrics._two_sample import check_sets


def c2st(
    x: ArrayLike, y: ArrayLike, *, folds: int = 5, max_iter: int = 1000, seed: int = 1
) -> float:
    """Accuracy of a classifier that tells two sets of rows apart: the classifier two-sample test.

    Also known as: C2ST, classifier two-sample test, detection accuracy.

    0.5 is what sets of one distribution give, 1 what sets that can be told apart without error do.
    The accuracy is the mean over folds that were left out of training. The classifier is
    scikit-learn's perceptron with two hidden layers of 10 d numbers, as in the benchmark of
    simulation-based inference, whose numbers it can be compared with at equal n. Ours: rows are
    standardized by both sets together, where the benchmark takes the mean and deviation of x. For
    tables with categories, sets of unequal size and a standard error, see `classifier_test`.

    Args:
        x: [n, *event], the reference.
        y: [m, *event]; m = n, or the accuracy of a constant guess is not 0.5.
        folds: Of the cross-validation.
        max_iter: Passes over the rows at most; training stops earlier where the loss does not fall.
        seed: Of the folds and the networks.

    Returns:
        The accuracy.

    Raises:
        ValueError: For sets of unequal size, events of different shapes, fewer rows than folds, NaN
            or infinities.
        ImportError: Where scikit-learn is not installed.

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> x = np.random.default_rng(0).normal(size=(100, 1))
        >>> metrics.c2st(x, x + 100.0)
        1.0

    References:
        Lopez-Paz, Oquab, *Revisiting Classifier Two-Sample Tests*, 2017, arXiv:1610.06545.
        Lueckmann, Boelts, Greenberg, Goncalves, Macke, *Benchmarking Simulation-Based Inference*,
            2021.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.model_selection import KFold, cross_val_score
        from sklearn.neural_network import MLPClassifier
    except ImportError as error:
        raise ImportError("c2st needs scikit-learn: pip install scikit-learn") from error
    check_whole("c2st", folds=folds, max_iter=max_iter)
    x, y = check_sets("c2st", x, y)
    if len(x) != len(y) or not 2 <= folds <= len(x):
        raise ValueError(
            f"c2st: expected two sets of equally many rows and 2 to that many folds, got"
            f" {len(x)} and {len(y)} rows and {folds} folds"
        )
    rows = np.concatenate([x, y])
    spread = rows.std(0)
    rows = (rows - rows.mean(0)) / np.where(spread > 0, spread, 1.0)
    label = np.repeat([0, 1], len(x))
    classifier = MLPClassifier((10 * x.shape[1],) * 2, max_iter=max_iter, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        cut = KFold(folds, shuffle=True, random_state=seed)
        return float(cross_val_score(classifier, rows, label, cv=cut).mean())
