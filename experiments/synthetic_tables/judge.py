"""How good synthetic rows, conditional draws and imputations are: the numbers of `run.py`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from tables import is_category


def utility(train: pd.DataFrame, test: pd.DataFrame, target: str, seed: int) -> float:
    """The AUC (of a text target) or R^2 on `test` of gradient boosting that `train` trained.

    Args:
        train: Real or synthetic rows.
        test: Real rows.
        target: The column to predict.
        seed: Of the boosting.

    Returns:
        The score. The AUC is the mean over the classes, each against the rest (of two classes both
        are equal); it is 0.5 for a class that `train` does not hold.
    """
    train = train[train[target].notna()]
    inputs, labels = test.drop(columns=target), test[target]
    x, categorical = features(train.drop(columns=target), inputs)
    x_test, _ = features(inputs, inputs)
    options: dict[str, Any] = {"categorical_features": categorical, "random_state": seed}
    if not is_category(labels):
        model = HistGradientBoostingRegressor(**options).fit(x, train[target])
        return float(r2_score(labels, model.predict(x_test)))
    if train[target].nunique() < 2:
        return 0.5
    model = HistGradientBoostingClassifier(**options).fit(x, train[target].astype(str))
    scores, classes = model.predict_proba(x_test), list(model.classes_)
    aucs = [
        roc_auc_score(labels == name, scores[:, classes.index(name)]) if name in classes else 0.5
        for name in labels.unique()
    ]
    return float(np.mean(aucs))


def detection(test: pd.DataFrame, made: pd.DataFrame, seed: int) -> float:
    """The AUC of gradient boosting that tells real test rows from as many synthetic ones.

    It is cross-fitted in five folds, so that no row is judged by a model that it trained. 0.5 is
    perfect.

    Args:
        test: Real rows that no generative model saw.
        made: Synthetic rows.
        seed: Of the choice of rows, the folds and the boosting.

    Returns:
        The AUC.
    """
    n = min(len(test), len(made))
    rng = np.random.default_rng(seed)
    both = pd.concat([rows.iloc[rng.permutation(len(rows))[:n]] for rows in (test, made)])
    is_made = np.repeat([0, 1], n)
    x, categorical = features(both, both)
    model = HistGradientBoostingClassifier(categorical_features=categorical, random_state=seed)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    scores = cross_val_predict(model, x, is_made, cv=folds, method="predict_proba")[:, 1]
    return float(roc_auc_score(is_made, scores))


def features(rows: pd.DataFrame, like: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """(float64 [n, d], bool [d]): numbers, codes of the categories of `like`; which are codes."""
    categorical = np.array([is_category(like[name]) for name in like])
    parts = [
        _codes(rows[name], like[name]) if is_code else rows[name].to_numpy(float, na_value=np.nan)
        for name, is_code in zip(like, categorical, strict=True)
    ]
    return np.stack(parts, 1), categorical


def _codes(values: pd.Series, like: pd.Series) -> np.ndarray:
    known = sorted(like.dropna().unique())
    codes = pd.Categorical(values, categories=known).codes
    return np.where(codes < 0, np.nan, codes)


def meets(rows: pd.DataFrame, given: Mapping[str, Any]) -> pd.Series:
    """Which rows meet a condition: {column: a value, or the ends (low, high) of a range}."""
    kept = pd.Series(True, rows.index)
    for name, value in given.items():
        kept &= rows[name].between(*value) if isinstance(value, tuple) else rows[name] == value
    return kept


class Deviation(NamedTuple):
    """The category whose share differs most: by how much, and the standard error of that."""

    points: float  # percentage points
    error: float
    category: str


def deviation(real: pd.DataFrame, made: pd.DataFrame, given: Mapping[str, Any]) -> Deviation:
    """The largest difference between shares of categories in real and in synthetic rows.

    Args:
        real: Real rows that meet the condition.
        made: Synthetic ones.
        given: The condition; its own columns are left out.

    Returns:
        The deviation. A missing value is a category. The error is of both samples together, as if
        this category had been chosen beforehand.
    """
    found = []
    for name in real:
        if name in given or not is_category(real[name]):
            continue
        columns = (rows[name].fillna("(missing)") for rows in (real, made))
        p, q = (column.value_counts(normalize=True) for column in columns)
        for category in p.index.union(q.index):
            a, b = p.get(category, 0.0), q.get(category, 0.0)
            error = np.sqrt(a * (1 - a) / len(real) + b * (1 - b) / len(made))
            found.append(Deviation(100 * abs(a - b), 100 * float(error), f"{name}={category}"))
    return max(found)


def imputation_scores(
    truth: pd.DataFrame, hidden: np.ndarray, draws: Sequence[pd.DataFrame], scale: pd.Series
) -> dict[str, dict[str, float]]:
    r"""Proper scores of imputations, by column, over the hidden cells; smaller is better.

    Numbers: the CRPS, $E|X - y| - E|X - X'|/2$, over the column's standard deviation. Categories:
    the Brier score, $\sum_k (p_k - 1[y = k])^2$. Both are estimated without bias from m draws, so
    that they do not depend on m; one draw is taken as certain.

    Args:
        truth: Rows before cells were hidden.
        hidden: [n, d] bool.
        draws: m fillings of the same rows.
        scale: The standard deviation of each column of numbers.

    Returns:
        {'crps': {column: score}, 'brier': {column: score}}.
    """
    scores: dict[str, dict[str, float]] = {"crps": {}, "brier": {}}
    m = len(draws)
    for j, name in enumerate(truth):
        y = truth[name].to_numpy()[hidden[:, j]]
        x = np.stack([draw[name].to_numpy()[hidden[:, j]] for draw in draws])
        if is_category(truth[name]):
            p = np.stack([(x == k).mean(0) for k in sorted({*y, *x.ravel()})], 1)
            p_true = (x == y).mean(0)
            brier = (p**2).sum(1) - 2 * p_true + 1
            bias = (p * (1 - p)).sum(1) / max(m - 1, 1)
            scores["brier"][name] = float(np.mean(brier - bias))
        else:
            x, y = np.sort(x.astype(float), 0), y.astype(float)
            weight = 2 * np.arange(m)[:, None] + 1 - m  # sum_ij |x_i - x_j| / 2 of sorted draws
            spread = (weight * x).sum(0) / max(m * (m - 1), 1)
            scores["crps"][name] = float(np.mean(np.abs(x - y).mean(0) - spread) / scale[name])
    return scores
