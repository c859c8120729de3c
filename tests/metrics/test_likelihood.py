import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from jflow import metrics


def test_bits_per_dim_of_a_uniform_model_on_bytes():
    log_prob = np.full(5, -12 * np.log(256))
    assert metrics.bits_per_dim(log_prob, 12) == pytest.approx(8.0, abs=1e-12)
    with pytest.raises(ValueError, match="dims"):
        metrics.bits_per_dim(log_prob, 0)


def test_log_mean_exp():
    x = np.array([[-1000.0, 3.0, -np.inf], [-1001.0, 800.0, -np.inf]])
    np.testing.assert_allclose(metrics.log_mean_exp(x), logsumexp(x, 0) - np.log(2))
    np.testing.assert_allclose(metrics.log_mean_exp(x.T, axis=1)[0], logsumexp(x[:, 0]) - np.log(2))


def test_gaussian_log_prob():
    rng = np.random.default_rng(0)
    train = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 3)) * [1, 100, 0.01] + [0, 5, 1e4]
    rows = train[:20] + 0.001
    expected = stats.multivariate_normal(train.mean(0), np.cov(train.T, bias=True)).logpdf(rows)
    np.testing.assert_allclose(metrics.gaussian_log_prob(train, rows), expected, rtol=1e-6)


def test_gaussian_log_prob_of_a_singular_covariance_is_finite():
    x = np.random.default_rng(1).normal(size=(50, 2))
    rows = np.stack([x[:, 0], x[:, 1], x[:, 0] + x[:, 1]], 1)
    assert np.isfinite(metrics.gaussian_log_prob(rows, rows)).all()


def test_gaussian_log_prob_errors():
    with pytest.raises(ValueError, match="column 1 is constant"):
        metrics.gaussian_log_prob([[0.0, 1.0], [1.0, 1.0]], [[0.0, 1.0]])
    tenths = np.stack([np.arange(7), np.full(7, 0.1)], 1)
    assert tenths.std(0)[1] > 0  # by rounding
    with pytest.raises(ValueError, match="column 1 is constant"):
        metrics.gaussian_log_prob(tenths, tenths)
    with pytest.raises(ValueError, match=r"\[3, 2\] and \[3, 1\]"):
        metrics.gaussian_log_prob(np.zeros((3, 2)), np.zeros((3, 1)))
