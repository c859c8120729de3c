import numpy as np
import pytest
from scipy import stats

from jflow import metrics
from jflow.apps import baselines
from jflow.data import Column

NUMBER = Column("number", "continuous")
COUNT = Column("count", "lattice", step=1.0, decimals=0)
COLOR = Column("color", "categorical", step=1.0, high=2.0, categories=("red", "blue", "green"))


def normal(n, rho, seed=0):
    return np.random.default_rng(seed).multivariate_normal([0, 0], [[1, rho], [rho, 1]], n)


def test_a_copula_has_the_columns_of_the_table():
    """Kolmogorov-Smirnov and total variation at a false-alarm rate of 1 in 1000 each."""
    rng, n = np.random.default_rng(0), 2000
    x = np.stack([rng.exponential(size=n), rng.poisson(3, n), rng.integers(0, 3, n)], 1)
    schema = (NUMBER, COUNT, COLOR)
    y = baselines.sample_copula(baselines.fit_copula(schema, x), n)
    assert set(y[:, 1]) <= set(x[:, 1]) and set(y[:, 2]) <= set(x[:, 2])
    assert not set(y[:, 0]) & set(x[:, 0])  # interpolated
    distances = metrics.column_distances(x, y, [False, False, True])
    # Only y is drawn: P(KS > c / sqrt(n)) = 2 exp(-2 c^2) at most.
    assert max(distances) < np.sqrt(np.log(2 / 0.001) / 2 / n)


@pytest.mark.parametrize("rho", [-0.7, 0.3, 0.9])
def test_a_copula_finds_the_correlation_behind_ties(rho):
    """Of a normal pair, one of it seen as a lognormal, the other through three levels: as well as
    from the pair itself, within 4 standard errors, which ties make at most 2 times as large."""
    n = 20_000
    z = normal(n, rho)
    x = np.stack([np.exp(z[:, 0]), np.digitize(z[:, 1], [-0.5, 1.0])], 1)
    factor = baselines.fit_copula((NUMBER, COUNT), x).factor
    assert (factor @ factor.T)[0, 1] == pytest.approx(rho, abs=4 * 2 / np.sqrt(n))


def test_a_gaussian_has_the_moments_of_the_table():
    z = normal(500, 0.6)
    x = z * np.array([2.0, 1.0]) + np.array([5.0, -1.0])
    gaussian = baselines.fit_gaussian((NUMBER, NUMBER), x)
    np.testing.assert_allclose(gaussian.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        gaussian.factor @ gaussian.factor.T, np.cov(x.T, bias=True), rtol=1e-9
    )
    y = baselines.sample_gaussian(gaussian, 20_000)
    assert (y >= x.min(0)).all() and (y <= x.max(0)).all()
    assert np.corrcoef(y.T)[0, 1] == pytest.approx(np.corrcoef(x.T)[0, 1], abs=0.03)


def test_values_go_missing_as_often_as_in_the_table_and_where_they_do():
    """The count is missing where the number is large: in 3 of 10 rows."""
    rng, n = np.random.default_rng(1), 4000
    x = np.stack([rng.normal(size=n), rng.poisson(4, n)], 1)
    x[x[:, 0] > stats.norm.ppf(0.7), 1] = np.nan
    for name, y in baselines.baseline_rows((NUMBER, COUNT), x, n).items():
        gone = np.isnan(y)
        assert not gone[:, 0].any()
        assert gone[:, 1].mean() == pytest.approx(0.3, abs=0.03), name
        assert y[gone[:, 1], 0].mean() > y[~gone[:, 1], 0].mean() + 0.8, name
        assert (y[~gone[:, 1], 1] % 1 == 0).all()


def test_constant_columns_and_two_rows_are_modelled():
    x = np.array([[1.0, 3.0, 0.0], [1.0, np.nan, 0.0]])
    for y in baselines.baseline_rows((NUMBER, COUNT, COLOR), x, 6).values():
        assert (y[:, [0, 2]] == [1, 0]).all() and set(y[~np.isnan(y[:, 1]), 1]) <= {3.0}


def test_a_seed_is_a_draw():
    x = normal(50, 0.5)
    one, same, other = (
        baselines.baseline_rows((NUMBER, NUMBER), x, 5, seed=seed) for seed in (0, 0, 1)
    )
    for name in one:
        np.testing.assert_array_equal(one[name], same[name])
        assert (one[name] != other[name]).all()


def test_what_has_no_model_is_refused():
    with pytest.raises(ValueError, match=r"at least 2 rows of the 1 columns.*got \[1, 1\]"):
        baselines.fit_copula((NUMBER,), np.zeros((1, 1)))
    with pytest.raises(ValueError, match="'number' holds only missing values"):
        baselines.fit_gaussian((NUMBER,), np.full((5, 1), np.nan))
    with pytest.raises(ValueError, match="'number' holds an infinity"):
        baselines.fit_copula((NUMBER,), np.full((5, 1), np.inf))
