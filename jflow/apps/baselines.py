"""Two plain models of a table, which a flow has to beat: a Gaussian, and a Gaussian copula.

Rows are encoded, [n, columns]: numbers as they are, categories as their codes; NaN where a value is
missing. A numeric column with missing values gets a second one, 1 where it is missing, as a part of
the model.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

from jflow._core.checks import check_whole
from jflow._core.seeds import generator
from jflow.data import Column

__all__ = [
    "Copula",
    "Gaussian",
    "baseline_rows",
    "fit_copula",
    "fit_gaussian",
    "sample_copula",
    "sample_gaussian",
]


class Gaussian(NamedTuple):
    """A Gaussian with a full covariance over the columns of a table.

    Attributes:
        mean: [k], of the d columns, and then of whether each column in `missing` is missing.
        factor: [k, k], whose product with its transpose is the covariance.
        step: [k], the width of a column's cells, 0 where it is continuous; the Gaussian is of rows
            spread over their cells.
        origin: [k], a point of a column's lattice.
        low: [k], the least number in the table.
        high: [k], the largest one.
        missing: The columns, of the d, in which values are missing.
    """

    mean: np.ndarray
    factor: np.ndarray
    step: np.ndarray
    origin: np.ndarray
    low: np.ndarray
    high: np.ndarray
    missing: tuple[int, ...]


class Copula(NamedTuple):
    """A Gaussian copula over the columns of a table.

    Normal numbers that depend on each other, each turned into a value of its column.

    Attributes:
        factor: [k, k], whose product with its transpose is the correlation, of the d columns and
            then of whether each column in `missing` is missing.
        values: k sorted arrays, what a column holds.
        smooth: k bools, whether to interpolate between the values.
        missing: The columns, of the d, in which values are missing.
    """

    factor: np.ndarray
    values: tuple[np.ndarray, ...]
    smooth: tuple[bool, ...]
    missing: tuple[int, ...]


def _widened(
    name: str, schema: tuple[Column, ...], train: ArrayLike
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Rows with a column of 0 and 1 behind them for each in which values are missing, and these."""
    x = np.asarray(train, np.float64)
    if x.ndim != 2 or x.shape[1] != len(schema) or len(x) < 2:
        raise ValueError(
            f"{name}: expected at least 2 rows of the {len(schema)} columns of the schema, got"
            f" {list(x.shape)}"
        )
    gone = np.isnan(x)
    for j, column in enumerate(schema):
        if np.isinf(x[:, j]).any() or gone[:, j].all():
            what = "only missing values" if gone[:, j].all() else "an infinity"
            raise ValueError(f"{name}: column {column.name!r} holds {what}; leave it out")
    missing = np.flatnonzero(gone.any(0))
    return np.concatenate([x, gone[:, missing]], 1), tuple(missing.tolist())


def _narrowed(x: np.ndarray, missing: tuple[int, ...]) -> np.ndarray:
    """Back from `_widened`: NaN where the column of 0 and 1 says so."""
    d = x.shape[1] - len(missing)
    rows = x[:, :d].copy()
    for place, j in enumerate(missing):
        rows[x[:, d + place] > 0.5, j] = np.nan
    return rows


def _covariance(x: np.ndarray) -> np.ndarray:
    """[k, k] of columns about 0, each entry of the rows in which neither is missing."""
    seen = (~np.isnan(x)).astype(np.float64)
    x = np.nan_to_num(x)
    return x.T @ x / np.maximum(seen.T @ seen, 1)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """A square root of the covariance without its negative part, with the same diagonal.

    The entries come from different rows or are corrected, so that it may have one."""
    values, vectors = np.linalg.eigh(covariance)
    factor = vectors * np.sqrt(np.maximum(values, 0))
    norm = np.sqrt((factor**2).sum(1, keepdims=True))
    return factor / np.where(norm > 0, norm, 1) * np.sqrt(np.diag(covariance))[:, None]


def fit_gaussian(schema: tuple[Column, ...], train: ArrayLike, *, seed: int = 0) -> Gaussian:
    """The Gaussian with a full covariance that fits the rows of a table.

    The rows are spread over the cells of their columns first. Each covariance is of the rows in
    which neither column is missing.

    Args:
        schema: One `data.Column` for each of the d columns.
        train: Encoded rows, [n >= 2, d].
        seed: Of the noise that spreads them.

    Returns:
        A `Gaussian`, for `sample_gaussian`.

    Raises:
        ValueError: For rows of another shape, or a column that holds an infinity or nothing.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> from jflow.apps import baselines
        >>> schema = (data.Column("a", "continuous"), data.Column("b", "continuous"))
        >>> x = np.array([[0.0, 1.0], [2.0, 5.0]])
        >>> gaussian = baselines.fit_gaussian(schema, x)
        >>> (gaussian.factor @ gaussian.factor.T).round(6)
        array([[1., 2.],
               [2., 4.]])
    """
    x, missing = _widened("fit_gaussian", schema, train)
    rest = [0.0] * len(missing)
    step = np.array([column.step for column in schema] + rest)
    origin = np.array([column.origin for column in schema] + rest)
    noisy = x + step * generator("gaussian baseline", seed).random(x.shape)
    mean = np.nanmean(noisy, 0)
    factor = _factor(_covariance(noisy - mean))
    return Gaussian(mean, factor, step, origin, np.nanmin(x, 0), np.nanmax(x, 0), missing)


def sample_gaussian(gaussian: Gaussian, n: int, *, seed: int = 0) -> np.ndarray:
    """Rows of a Gaussian, written as its table writes them.

    Args:
        gaussian: From `fit_gaussian`.
        n: How many rows.
        seed: Of the draw.

    Returns:
        Encoded rows, [n, d], floored to the lattices and clipped to the range of the table, with
        NaN for missing values.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> from jflow.apps import baselines
        >>> schema = (data.Column("count", "lattice", step=1.0, decimals=0),)
        >>> gaussian = baselines.fit_gaussian(schema, np.array([[1.0], [2.0], [4.0]]))
        >>> x = baselines.sample_gaussian(gaussian, 100)
        >>> np.unique(x)
        array([1., 2., 3., 4.])
    """
    check_whole("sample_gaussian", n=n)
    g, rng = gaussian, generator("gaussian baseline rows", seed)
    x = g.mean + rng.normal(size=(n, len(g.mean))) @ g.factor.T
    cell = np.where(g.step > 0, g.step, 1)
    rows = np.where(g.step > 0, g.origin + cell * np.floor((x - g.origin) / cell + 1e-6), x)
    rows, d = np.clip(rows, g.low, g.high), len(g.mean) - len(g.missing)
    # Of a column of 0 and 1 the mean is the share of 1: as many are above the threshold.
    share, std = g.mean[d:], np.sqrt((g.factor[d:] ** 2).sum(1))
    rows[:, d:] = x[:, d:] > share + std * ndtri(1 - share)
    return _narrowed(rows, g.missing)


def _normal_scores(x: np.ndarray) -> np.ndarray:
    """The mean of the normal number behind each value [n]: of those in its share of the order.

    A value v stands for the normal numbers z from a to b, where Phi(a) is the share of smaller
    values and Phi(b) that of values up to v; E[z | a < z < b] = (phi(a) - phi(b)) / (Phi(b) -
    Phi(a)).
    """
    values, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    edges = np.concatenate([[0], np.cumsum(counts)]) / len(x)
    density = np.exp(-0.5 * ndtri(edges) ** 2) / np.sqrt(2 * np.pi)
    return ((density[:-1] - density[1:]) / np.diff(edges))[where]


def fit_copula(schema: tuple[Column, ...], train: ArrayLike) -> Copula:
    """The Gaussian copula that fits the rows of a table.

    It has the columns as they are, and the correlation of the normal numbers behind them. A
    column's value is q(Phi(z)) with q its empirical quantile function, and z normal. With m_i the
    mean of z_i given the value, which ties make less varied than z_i, the correlation is estimated
    as

        R_ij = mean(m_i m_j) / (mean(m_i^2) mean(m_j^2)),

    exact where one of the two columns has no ties, and to first order in R otherwise. Categories
    are taken in the order of their codes, as if it meant something: a copula has one number for
    each pair of columns. Each R_ij is of the rows in which neither column is missing.

    Args:
        schema: One `data.Column` for each of the d columns.
        train: Encoded rows, [n >= 2, d].

    Returns:
        A `Copula`, for `sample_copula`.

    Raises:
        ValueError: For rows of another shape, or a column that holds an infinity or nothing.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> from jflow.apps import baselines
        >>> schema = (data.Column("a", "continuous"), data.Column("b", "continuous"))
        >>> x = np.array([[0.0, 0.0], [1.0, 10.0], [2.0, 20.0]])
        >>> copula = baselines.fit_copula(schema, x)
        >>> (copula.factor @ copula.factor.T).round(2)
        array([[1., 1.],
               [1., 1.]])

    References:
        Sklar, *Fonctions de repartition a n dimensions et leurs marges*, 1959. The correction for
        ties is ours.
    """
    x, missing = _widened("fit_copula", schema, train)
    scores, values = np.full_like(x, np.nan), []
    for j, column in enumerate(x.T):
        seen = ~np.isnan(column)
        scores[seen, j] = _normal_scores(column[seen])
        values.append(np.sort(column[seen]))
    covariance = _covariance(scores)
    kept = np.diag(covariance)
    kept = np.where(kept > 1e-9, kept, np.inf)  # a constant column goes with nothing
    correlation = np.clip(covariance / np.outer(kept, kept), -1, 1)
    np.fill_diagonal(correlation, 1)
    smooth = [column.step == 0 for column in schema] + [False] * len(missing)
    return Copula(_factor(correlation), tuple(values), tuple(smooth), missing)


def sample_copula(copula: Copula, n: int, *, seed: int = 0) -> np.ndarray:
    """Rows of a Gaussian copula.

    Args:
        copula: From `fit_copula`.
        n: How many rows.
        seed: Of the draw.

    Returns:
        Encoded rows, [n, d]: values of the table, interpolated in continuous columns, NaN where
        they are missing.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> from jflow.apps import baselines
        >>> schema = (data.Column("color", "categorical", step=1.0, categories=("red", "blue")),)
        >>> copula = baselines.fit_copula(schema, np.array([[0.0], [0.0], [1.0]]))
        >>> np.unique(baselines.sample_copula(copula, 100))
        array([0., 1.])
    """
    check_whole("sample_copula", n=n)
    rng, k = generator("copula rows", seed), len(copula.values)
    u = ndtr(rng.normal(size=(n, k)) @ copula.factor.T)
    x = np.empty((n, k))
    for j, (values, smooth) in enumerate(zip(copula.values, copula.smooth, strict=True)):
        if smooth:
            x[:, j] = np.interp(u[:, j] * (len(values) - 1), np.arange(len(values)), values)
        else:
            x[:, j] = values[np.minimum((u[:, j] * len(values)).astype(int), len(values) - 1)]
    return _narrowed(x, copula.missing)


def baseline_rows(
    schema: tuple[Column, ...], train: ArrayLike, n: int, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Synthetic rows of the two baselines, to be reported beside those of a flow.

    Args:
        schema: One `data.Column` for each of the d columns.
        train: Encoded rows, [m >= 2, d].
        n: How many rows of each.
        seed: Of the draws.

    Returns:
        {'gaussian': [n, d], 'copula': [n, d]}.

    Raises:
        ValueError: For rows of another shape, or a column that holds an infinity or nothing.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> from jflow.apps import baselines
        >>> schema = (data.Column("a", "continuous"),)
        >>> rows = baselines.baseline_rows(schema, np.arange(10.0)[:, None], 5)
        >>> {name: x.shape for name, x in rows.items()}
        {'gaussian': (5, 1), 'copula': (5, 1)}
    """
    return {
        "gaussian": sample_gaussian(fit_gaussian(schema, train, seed=seed), n, seed=seed),
        "copula": sample_copula(fit_copula(schema, train), n, seed=seed),
    }
