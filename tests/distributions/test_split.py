"""Laws of parts of an event, and guidance of a law by two conditions."""

import jax
import numpy as np
import pytest
import scipy.stats
from keys import KEYS, keys_consumed_twice

from jflow import distributions, flows

X = np.asarray(np.random.default_rng(0).normal(size=(6, 3)), np.float32)
H = np.asarray(np.random.default_rng(1).normal(size=(6, 4)), np.float32)


def test_the_log_density_is_the_sum_and_samples_have_both_laws():
    """A Gaussian head with mean cond, and the standard normal beside it, of 20,000 draws."""
    head = distributions.conditional_mixture((1,), min_std=1e-9)
    law = distributions.split(head, distributions.normal((2,)), 1)
    params = law.init(jax.random.key(0), X, H[:, :1])
    assert set(params) == {"first", "rest"} and params["rest"] == {}
    params["first"] = {
        "means": np.zeros((1, 1), np.float32),
        "log_stds": np.full((1, 1), np.log(0.5), np.float32),
        "kernel": np.array([[1.0, 0.0]], np.float32),
    }
    found = law.log_prob(params, X, H[:, :1])
    expected = scipy.stats.norm(H[:, 0], 0.5).logpdf(X[:, 0])
    expected += scipy.stats.norm().logpdf(X[:, 1:]).sum(1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)

    n = 20_000
    x = law.sample(params, jax.random.key(1), n, np.full((n, 1), 3.0, np.float32))
    for column, normal in zip(np.asarray(x, np.float64).T, [(3, 0.5), (0, 1), (0, 1)], strict=True):
        assert scipy.stats.kstest(column, scipy.stats.norm(*normal).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(np.asarray(x).T)[1, 2]) < 4 / np.sqrt(n)
    assert not keys_consumed_twice(lambda key: law.sample(params, key, 2, H[:2, :1]), KEYS[0])


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_contrasted_gaussian_is_the_tilted_one(scale):
    """N(m, s^2) against N(n, s^2): N(m + (scale - 1) (m - n), s^2), by resampling of 512 draws; the
    mean and the deviation within 4 standard errors and 1%."""
    token = distributions.conditional_mixture((1,), min_std=1e-9)
    law = distributions.contrasted(token, scale, draws=512)
    params = {
        "means": np.zeros((1, 1), np.float32),
        "log_stds": np.zeros((1, 1), np.float32),
        "kernel": np.array([[1.0, 0.0]], np.float32),
    }
    n, towards, away = 4000, 0.5, -0.1
    cond = np.tile(np.array([[towards, away]], np.float32), (n, 1))
    x = np.asarray(jax.jit(law.sample, static_argnums=2)(params, jax.random.key(0), n, cond))
    mean = towards + (scale - 1) * (towards - away)
    assert abs(x.mean() - mean) < 4 / np.sqrt(n) + 0.01
    assert abs(x.std() - 1) < 4 / np.sqrt(2 * n) + 0.01
    assert not keys_consumed_twice(lambda key: law.sample(params, key, 2, cond[:2]), KEYS[0])


BAD = {
    r"more than 3 numbers along the last axis of x, got \[6, 3\]": lambda: distributions.split(
        distributions.normal((3,)), distributions.normal((1,)), 3
    ).init(jax.random.key(0), X),
    "split: expected size": lambda: distributions.split(
        distributions.normal((1,)), distributions.normal((2,)), 0
    ),
    "split: .*Distribution": lambda: distributions.split(len, distributions.normal((2,)), 1),
    "contrasted: .*Distribution": lambda: distributions.contrasted(len, 2.0),
    "scale >= 1, got 0.5": lambda: distributions.contrasted(distributions.normal((1,)), 0.5),
    r"cond \[b, 2 k\], got \[6, 3\]": lambda: distributions.contrasted(
        distributions.normal((3,)), 2.0
    ).init(jax.random.key(0), X, X),
    "samples alone": lambda: distributions.contrasted(distributions.normal((3,)), 2.0).log_prob(
        {}, X, H
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD[message]()


def test_a_flow_may_be_either_part():
    law = distributions.split(
        flows.real_nvp((2,), depth=1, hidden=(4,)), distributions.normal((1,)), 2
    )
    params = law.init(jax.random.key(0), X)
    assert np.all(np.isfinite(law.log_prob(params, X)))
    assert law.sample(params, jax.random.key(1), 2).shape == (2, 3)
