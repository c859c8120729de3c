import numpy as np
import pytest
from scipy import stats
from scipy.stats.contingency import association

from jflow import metrics
from jflow.metrics import _tables


def test_a_shift_of_a_uniform_column_is_its_kolmogorov_smirnov_distance():
    x = np.arange(1000.0)[:, None]
    for shift in (0, 1, 250, 999, 2000):
        expected = min(shift, 1000) / 1000
        assert metrics.column_distances(x, x + shift, [False])[0] == pytest.approx(expected)


def test_total_variation_is_half_of_what_the_shares_differ_by():
    x = np.repeat([0.0, 1.0, 2.0], [50, 30, 20])[:, None]
    y = np.repeat([0.0, 1.0, 3.0], [10, 15, 25])[:, None]
    assert metrics.column_distances(x, y, [True])[0] == pytest.approx(0.5 * (0.3 + 0.0 + 0.2 + 0.5))
    assert metrics.column_distances(x, x + 7, [True])[0] == 1


def test_missing_values_are_left_out_of_distances():
    x = np.array([[0.0, 0.0], [1.0, np.nan], [np.nan, np.nan]])
    y = np.array([[0.0, np.nan], [1.0, np.nan]])
    found = metrics.column_distances(x, y, [False, True])
    assert found[0] == 0 and np.isnan(found[1])


def test_associations_are_those_of_scipy_pair_by_pair():
    """Two numbers, two categories, a constant of each, with values missing."""
    rng, n = np.random.default_rng(0), 400
    z = rng.normal(size=n)
    x = np.stack([z, z + rng.normal(size=n), (z > 0) + rng.integers(0, 3, n), 0 * z + 2], 1)
    x = np.concatenate([x, rng.integers(0, 4, (n, 1)) * (z > -1)[:, None], np.ones((n, 1))], 1)
    kinds = np.array([False, False, True, False, True, True])
    x[::7, 1] = x[::5, 4] = x[1::9, 2] = np.nan
    found = metrics.associations(x, kinds)

    def both(i, j):
        return x[~np.isnan(x[:, [i, j]]).any(1)][:, [i, j]].T

    def correlation_ratio(labels, values):
        groups = [values[labels == label] for label in np.unique(labels)]
        between = sum(len(g) * (g.mean() - values.mean()) ** 2 for g in groups)
        return np.sqrt(between / ((values - values.mean()) ** 2).sum())

    a, b = both(2, 4)
    table = [[((a == i) & (b == j)).sum() for j in np.unique(b)] for i in np.unique(a)]
    np.testing.assert_allclose(found[0, 1], stats.pearsonr(*both(0, 1)).statistic, rtol=1e-9)
    np.testing.assert_allclose(found[2, 4], association(np.array(table)), rtol=1e-9)
    for i, j in ((2, 0), (2, 1), (4, 1)):
        np.testing.assert_allclose(found[i, j], correlation_ratio(*both(i, j)), rtol=1e-9)
    np.testing.assert_array_equal(found, found.T)
    constant = [3, 5]
    np.testing.assert_array_equal(found[constant], np.eye(6)[constant])


def test_associations_do_not_depend_on_a_number_s_unit():
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(size=(200, 2)), rng.integers(0, 2, (200, 1))], 1)
    x[:, 1] += x[:, 0] + x[:, 2]
    kinds = [False, False, True]
    for scale, offset in ((1e-200, 0.0), (1e200, 0.0), (1.0, 1e6)):
        y = x * np.array([scale, 1, 1]) + np.array([offset, 0, 0])
        np.testing.assert_allclose(
            metrics.associations(y, kinds), metrics.associations(x, kinds), atol=1e-8
        )


def test_distances_to_the_nearest_row_are_those_of_their_definition(monkeypatch):
    monkeypatch.setattr(_tables, "CHUNK", 100)  # two rows at a time
    rng, n, m = np.random.default_rng(2), 9, 40
    reference = np.stack([rng.normal(size=m), rng.integers(0, 5, m), rng.integers(0, 3, m)], 1)
    x = np.stack([rng.normal(size=n), rng.integers(-1, 6, n), rng.integers(0, 4, n)], 1)
    reference[::6, 0] = x[::4, 0] = x[1::4, 2] = np.nan

    def share(values, v):
        values = values[~np.isnan(values)]
        return ((values < v).mean() + (values <= v).mean()) / 2

    def difference(j, v, w):
        if np.isnan(v) or np.isnan(w):
            return float(np.isnan(v) != np.isnan(w))
        if j == 2:
            return float(v != w)
        return abs(share(reference[:, j], v) - share(reference[:, j], w))

    expected = [
        min(np.mean([difference(j, *vw) for j, vw in enumerate(zip(a, b))]) for b in reference)  # noqa: B905
        for a in x
    ]
    kinds = [False, False, True]
    found = metrics.nearest_gower_distances(x, reference, kinds)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    copies = metrics.nearest_gower_distances(reference[:5], reference, kinds)
    np.testing.assert_array_equal(copies, np.zeros(5))


@pytest.fixture
def tables():
    """Of a number with missing values, a category of 300 codes and a number; and one more such."""
    rng, n = np.random.default_rng(3), 400

    def table():
        z = rng.normal(size=n)
        gone = np.where(rng.random(n) < 0.2, np.nan, z)
        return np.stack([gone, rng.integers(0, 300, n), z + rng.normal(size=n)], 1)

    return table(), table()


def test_a_classifier_does_not_tell_tables_of_one_distribution_apart(tables):
    """Within 3.3 standard errors: a false alarm in 1000 tables."""
    pytest.importorskip("sklearn")
    x, y = tables
    found = metrics.classifier_test(x, y, [False, True, False])
    assert found.standard_error == pytest.approx(np.sqrt(2 * 801 / (12 * 400 * 400)), rel=0.01)
    assert abs(found.auc - 0.5) < 3.3 * found.standard_error


def test_a_classifier_finds_the_column_that_gives_a_table_away(tables):
    pytest.importorskip("sklearn")
    x, y = tables
    rng = np.random.default_rng(4)
    for column, changed in ((0, y[:, 0] + 2), (1, y[:, 1] % 20), (2, rng.permutation(y[:, 2]))):
        y_changed = y.copy()
        y_changed[:, column] = changed
        found = metrics.classifier_test(x, y_changed, [False, True, False])
        assert found.auc > 0.5 + 3.3 * found.standard_error
        if column < 2:  # of a broken dependence either column is a witness
            assert found.importances.argmax() == column


@pytest.mark.parametrize(
    ("x", "kinds", "said"),
    [
        (np.zeros((3, 2)), [True], r"expected tables \[n, 1\].*got \[3, 2\]"),
        (np.zeros((0, 1)), [True], r"got \[0, 1\]"),
        (np.zeros(3), [True], r"got \[3\]"),
        (np.full((3, 1), np.inf), [False], "column 0 holds an infinity"),
        (np.zeros((3, 1)), [0], "one bool for each column"),
    ],
)
def test_other_tables_are_refused(x, kinds, said):
    for function in (
        metrics.column_distances,
        metrics.nearest_gower_distances,
        metrics.classifier_test,
        lambda x, _, kinds: metrics.associations(x, kinds),
    ):
        with pytest.raises(ValueError, match=said):
            function(x, x, kinds)


def test_a_classifier_needs_a_row_for_each_fold():
    with pytest.raises(ValueError, match="at least 3 rows in each table.*got 2 and 5"):
        metrics.classifier_test(np.zeros((2, 1)), np.zeros((5, 1)), [False])
    with pytest.raises(ValueError, match="folds"):
        metrics.classifier_test(np.zeros((2, 1)), np.zeros((5, 1)), [False], folds=1)
