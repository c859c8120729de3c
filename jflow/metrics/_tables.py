"""How far one table is from another: its columns, their dependence, and its rows.

Tables are encoded, [n, columns]: numbers as they are, categories as their codes; NaN where a value
is missing. In numpy and float64: an evaluation, not a loss.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from jflow._core.checks import check_whole
from jflow._core.seeds import generator

CHUNK = 2**22  # distances held at once: 16 MiB
LEVELS = 255  # the categories of a column that scikit-learn's boosted trees tell apart


def _tables(
    name: str, categorical: ArrayLike, *arrays: ArrayLike
) -> tuple[np.ndarray, list[np.ndarray]]:
    """categorical as bool [d] and the arrays as float64 [n, d]."""
    given = [np.asarray(a, np.float64) for a in arrays]
    kinds = np.asarray(categorical)
    if kinds.ndim != 1 or (kinds.dtype != bool and kinds.size):
        raise ValueError(
            f"{name}: expected categorical as one bool for each column, got"
            f" {kinds.dtype} {list(kinds.shape)}"
        )
    for a in given:
        if a.ndim != 2 or a.shape[1] != len(kinds) or a.size == 0:
            raise ValueError(
                f"{name}: expected tables [n, {len(kinds)}], one column for each entry of"
                f" categorical, got {list(a.shape)}"
            )
        if np.isinf(a).any():
            column = int(np.isinf(a).any(0).argmax())
            raise ValueError(
                f"{name}: column {column} holds an infinity; leave its rows out, or make it NaN,"
                " which is a missing value"
            )
    return kinds.astype(bool), given


def column_distances(x: ArrayLike, y: ArrayLike, categorical: ArrayLike) -> np.ndarray:
    """How far each column of a table is from the same column of another one.

    Also known as: Kolmogorov-Smirnov statistic, KS, total variation distance, TVD.

    For numbers the Kolmogorov-Smirnov statistic, max_v |F_x(v) - F_y(v)|; for categories the total
    variation, 1/2 sum_v |p_x(v) - p_y(v)|. Both are from 0, equal distributions, to 1, no value in
    common, and both are the largest difference of probabilities: over all half-lines, and over all
    sets of categories. Missing values are left out.

    Args:
        x: [n, d].
        y: [m, d].
        categorical: bool [d], the columns that are codes of categories.

    Returns:
        float64 [d]; NaN for a column without a value in x or in y.

    Raises:
        ValueError: For tables of other shapes, without rows or with infinities.

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> x = np.array([[0.0, 0], [1.0, 0], [2.0, 1], [3.0, 1]])  # a number and a category
        >>> y = x + np.array([2.0, 0])
        >>> metrics.column_distances(x, y, [False, True])
        array([0.5, 0. ])
    """
    kinds, (x, y) = _tables("column_distances", categorical, x, y)
    distances = np.full(len(kinds), np.nan)
    for j, category in enumerate(kinds):
        a, b = (column[~np.isnan(column)] for column in (x[:, j], y[:, j]))
        if len(a) and len(b) and category:
            values, codes = np.unique(np.concatenate([a, b]), return_inverse=True)
            shares = [
                np.bincount(part, minlength=len(values)) / len(part)
                for part in (codes[: len(a)], codes[len(a) :])
            ]
            distances[j] = 0.5 * np.abs(shares[0] - shares[1]).sum()
        elif len(a) and len(b):
            values = np.concatenate([a, b])
            below = [np.searchsorted(np.sort(of), values, "right") / len(of) for of in (a, b)]
            distances[j] = np.abs(below[0] - below[1]).max()
    return distances


def associations(x: ArrayLike, categorical: ArrayLike) -> np.ndarray:
    """How strongly each two columns of a table depend on each other.

    Also known as: correlation matrix, Cramer's V, correlation ratio, eta.

    Of two numbers the Pearson correlation, in [-1, 1]. Of two categories Cramer's V,

        V = sqrt(chi2 / n / (min(rows, columns) - 1))

    of their table of counts, in [0, 1]. Of a category and a number the correlation ratio, in
    [0, 1]: the square root of the share of the number's variance that lies between the categories.
    Each pair of columns uses the rows in which neither is missing. On columns of ranks the Pearson
    correlation is Spearman's.

    Cramer's V and the correlation ratio of independent columns are above 0 in a sample: compare
    tables of equally many rows.

    Args:
        x: [n, d].
        categorical: bool [d], the columns that are codes of categories.

    Returns:
        float64 [d, d], symmetric, 1 on the diagonal; 0 where one of the columns is constant.

    Raises:
        ValueError: For a table of another shape, without rows or with infinities.

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> x = np.array([[0, 1.0, -1.0], [0, 1.0, -1.0], [1, 2.0, -2.0], [1, 2.0, -3.0]])
        >>> metrics.associations(x, [True, False, False]).round(2)
        array([[ 1. ,  1. ,  0.9],
               [ 1. ,  1. , -0.9],
               [ 0.9, -0.9,  1. ]])
    """
    kinds, (x,) = _tables("associations", categorical, x)
    result, numbers, codes = np.eye(len(kinds)), np.flatnonzero(~kinds), np.flatnonzero(kinds)

    # Numbers. Every sum is over the rows in which the other column is there too: product by mask.
    mask = ~np.isnan(x[:, numbers])
    count = np.maximum(mask.sum(0), 1)
    v = np.where(mask, x[:, numbers], 0)
    scale = np.abs(v).max(0, initial=0)
    v = v / np.where(scale > 0, scale, 1)
    v = np.where(mask, v - v.sum(0) / count, 0)  # about the mean: sums of squares lose no digits
    std = np.sqrt((v**2).sum(0) / count)
    v = v / np.where(std > 1e-14, std, np.inf)
    mask = mask.astype(np.float64)
    n, total, squares = mask.T @ mask, v.T @ mask, (v**2).T @ mask
    n = np.maximum(n, 1)
    variance = squares / n - (total / n) ** 2
    covariance = v.T @ v / n - total * total.T / n**2
    result[np.ix_(numbers, numbers)] = _ratio(covariance, variance, variance.T)

    # Categories: one column of 0 and 1 for each, so that products of these are tables of counts.
    hot, first = _one_hot(x[:, codes])
    counts = (hot.T @ hot).toarray()
    in_category = [np.asarray(hot.T @ of) for of in (mask, v, v**2)]
    for a, i in enumerate(codes):
        part = slice(first[a], first[a + 1])
        n, total, squares = (of[part] for of in in_category)
        every = np.maximum(n.sum(0), 1)
        about = total.sum(0) ** 2 / every
        between = (total**2 / np.maximum(n, 1)).sum(0) - about
        within = np.maximum(squares.sum(0) - about, 0)
        eta = np.sqrt(np.maximum(_ratio(between, within, within), 0))
        result[i, numbers] = result[numbers, i] = eta
        for b, j in enumerate(codes[:a]):
            result[i, j] = result[j, i] = _cramer(counts[part, first[b] : first[b + 1]])
    np.fill_diagonal(result, 1.0)
    return result


def _ratio(above: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """above / sqrt(left right) in [-1, 1]; 0 where nothing varies."""
    varies = (left > 1e-12) & (right > 1e-12)
    below = np.sqrt(np.where(varies, left * right, 1))
    return np.clip(np.where(varies, above / below, 0), -1, 1)


def _one_hot(x: np.ndarray) -> tuple[sparse.csr_array, np.ndarray]:
    """Codes [n, d] as a sparse [n, values of all columns], a missing one as zeros, and the first of
    the values of each column, with their number at the end."""
    n, parts, first = len(x), [], [0]
    for column in x.T:
        seen = np.flatnonzero(~np.isnan(column))
        values, where = np.unique(column[seen], return_inverse=True)
        parts.append(np.stack([seen, where + first[-1]]))
        first.append(first[-1] + len(values))
    rows, columns = np.concatenate(parts, 1) if parts else np.zeros((2, 0), int)
    hot = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(n, first[-1]))
    return hot, np.array(first)


def _cramer(counts: np.ndarray) -> float:
    counts = counts[counts.sum(1) > 0][:, counts.sum(0) > 0]
    if min(counts.shape) < 2:
        return 0.0
    expected = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
    chi2 = ((counts - expected) ** 2 / expected).sum()
    return float(np.sqrt(min(chi2 / counts.sum() / (min(counts.shape) - 1), 1)))


def nearest_gower_distances(
    x: ArrayLike, reference: ArrayLike, categorical: ArrayLike
) -> np.ndarray:
    """Distance of each row of a table to the nearest row of a reference, over mixed columns.

    Also known as: distance to closest record, DCR.

    The mean over the columns of a difference from 0 to 1: for numbers the share of the reference's
    values that lie between the two (ranks, so that a long tail does not shrink the rest of its
    column, as the range of Gower's own coefficient would), for categories whether they differ, and
    1 where one of the two is missing. Synthetic rows that lie nearer to the training rows than
    rows held out do have been memorized.

    Args:
        x: [n, d].
        reference: [m, d].
        categorical: bool [d], the columns that are codes of categories.

    Returns:
        float64 [n], to float32 rounding; 0 for a row that no column tells from one of the
        reference.

    Raises:
        ValueError: For tables of other shapes, without rows or with infinities.

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> reference = np.array([[10.0, 0], [20.0, 0], [30.0, 1], [40.0, 1]])
        >>> x = np.array([[20.0, 0], [30.0, 0]])  # a copy; a quarter from (20, 0) in one column
        >>> metrics.nearest_gower_distances(x, reference, [False, True])
        array([0.   , 0.125])

    References:
        Gower, *A General Coefficient of Similarity and Some of Its Properties*, 1971.
    """
    kinds, (x, y) = _tables("nearest_gower_distances", categorical, x, reference)
    missing = bool(np.isnan(x).any() or np.isnan(y).any())
    x, y = (_ranked(a, y, kinds).T.copy() for a in (x, y))
    nearest = np.empty(x.shape[1])
    size = max(1, CHUNK // y.shape[1])
    for start in range(0, x.shape[1], size):
        part = x[:, start : start + size]
        total = np.zeros((part.shape[1], y.shape[1]), np.float32)
        difference = np.empty_like(total)
        for j, category in enumerate(kinds):
            if category:
                total += part[j][:, None] != y[j]
                continue
            np.subtract(part[j][:, None], y[j], out=difference)
            np.abs(difference, out=difference)
            total += np.minimum(difference, 1, out=difference) if missing else difference
        nearest[start : start + size] = total.min(1)
    return nearest / len(kinds)


def _ranked(x: np.ndarray, reference: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Numbers as their place among the reference's, from 0 to 1, ties in their middle; a missing
    one as 2, at 1 or more from all others."""
    ranked = x.copy()
    for j in np.flatnonzero(~kinds):
        among = np.sort(reference[:, j][~np.isnan(reference[:, j])])
        sides = [np.searchsorted(among, x[:, j], side) for side in ("left", "right")]
        ranked[:, j] = (sides[0] + sides[1]) / (2 * max(len(among), 1))
    return np.where(np.isnan(x), np.where(kinds, -1, 2), ranked).astype(np.float32)


class ClassifierTest(NamedTuple):
    """How well a classifier tells two tables apart.

    Attributes:
        auc: The area under the curve of hits against false alarms on rows that the classifier was
            not trained on: the probability that it takes a row of the second table for one of the
            second rather than a row of the first. 0.5 is a guess, 1 certainty.
        standard_error: Of auc, sqrt(2) times Hanley and McNeil's. Theirs is of rows that are
            independent; here a chance likeness of two folds counts twice, as each judges what was
            learned from the other. In repeated draws of two equal tables the standard deviation of
            auc was 1.4 times theirs with 300 rows, and 1.3 times with 1000.
        importances: [columns], by how much auc falls when a column of the rows that are judged is
            shuffled.
    """

    auc: float
    standard_error: float
    importances: np.ndarray


def classifier_test(
    x: ArrayLike, y: ArrayLike, categorical: ArrayLike, *, folds: int = 3, seed: int = 0
) -> ClassifierTest:
    """How well gradient-boosted trees tell two tables apart: a two-sample test by a classifier.

    Also known as: detection AUC, detection score.

    Each fold of the rows is judged by trees trained on the others, and auc is the mean over the
    folds, so that it is 0.5 on average where both tables come from one distribution. The accuracy
    of a network, by which the literature judges draws of a posterior, is `c2st`. It needs
    scikit-learn. Of a column of more than 255 categories those with the largest codes are taken as
    one.

    Args:
        x: [n, d].
        y: [m, d], about as many rows.
        categorical: bool [d], the columns that are codes of categories: 0, 1, 2, ...
        folds: How many parts the rows are divided into, at least 2.
        seed: Of the folds and the shuffles.

    Returns:
        A `ClassifierTest`.

    Raises:
        ValueError: For tables of other shapes, with fewer rows than folds, or with infinities.
        ImportError: Without scikit-learn.

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.normal(size=(2, 300, 2))
        >>> found = metrics.classifier_test(x, y + np.array([0, 5.0]), [False, False])
        >>> found.auc > 0.99, int(found.importances.argmax())
        (True, 1)

    References:
        Lopez-Paz, Oquab, *Revisiting Classifier Two-Sample Tests*, 2017, arXiv:1610.06545.
        Hanley, McNeil, *The Meaning and Use of the Area under a Receiver Operating Characteristic
            (ROC) Curve*, 1982.
    """
    kinds, (x, y) = _tables("classifier_test", categorical, x, y)
    check_whole("classifier_test", 2, folds=folds)
    if min(len(x), len(y)) < folds:
        raise ValueError(
            f"classifier_test: expected at least {folds} rows in each table, one for each fold, got"
            f" {len(x)} and {len(y)}"
        )
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
        from sklearn.metrics import roc_auc_score
        from sklearn.model_selection import StratifiedKFold
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            'classifier_test needs scikit-learn: pip install "jflow-models[tables]"'
        ) from error
    rows, label = np.concatenate([x, y]), np.repeat([0, 1], [len(x), len(y)])
    rows[:, kinds] = np.minimum(rows[:, kinds], LEVELS - 1)
    rng = generator("classifier test", seed)
    split = StratifiedKFold(folds, shuffle=True, random_state=int(rng.integers(2**31)))
    aucs, importances = [], np.zeros(len(kinds))
    # Trees of this size gain nothing from threads, and lose where others use the cores too.
    with threadpool_limits(1):
        for train, test in split.split(rows, label):
            trees = HistGradientBoostingClassifier(
                max_leaf_nodes=15, early_stopping=False, categorical_features=kinds, random_state=0
            ).fit(rows[train], label[train])

            def auc(judged, trees=trees, truth=label[test]):
                return float(roc_auc_score(truth, trees.decision_function(judged)))

            aucs.append(auc(rows[test]))
            for j in range(len(kinds)):
                shuffled = rows[test]
                shuffled[:, j] = rng.permutation(shuffled[:, j])
                importances[j] += (aucs[-1] - auc(shuffled)) / folds
    mean = float(np.mean(aucs))
    return ClassifierTest(mean, _auc_error(mean, len(x), len(y)), importances)


def _auc_error(auc: float, n: int, m: int) -> float:
    """See `ClassifierTest`; of n and m rows."""
    one, two = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (n - 1) * (two - auc**2) + (m - 1) * (one - auc**2)
    return float(np.sqrt(2 * max(variance, 0) / (n * m)))
