"""Distributions of data given a latent."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jflow.distributions import decoders

z = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)), jnp.float32)


def test_bernoulli_is_scipys():
    decoder = decoders.bernoulli(nn.Dense(3))
    x = jnp.asarray(np.random.default_rng(1).integers(0, 2, (5, 3)), jnp.float32)
    params = decoder.init(jax.random.key(0), x, z)
    p = jax.nn.sigmoid(nn.Dense(3).apply({"params": params}, z))
    np.testing.assert_allclose(
        decoder.log_prob(params, x, z), scipy.stats.bernoulli.logpmf(x, p).sum(1), atol=1e-5
    )
    far = jax.tree.map(lambda p: 1e4 * p, params)
    assert np.all(np.isfinite(decoder.log_prob(far, x, z)))
    many = decoder.sample(params, jax.random.key(0), 40_000, jnp.repeat(z[:1], 40_000, 0))
    np.testing.assert_allclose(many.mean(0), p[0], atol=4 * 0.5 / 200)  # 4 standard errors
    assert set(np.unique(many)) == {0.0, 1.0}


def test_normal_is_scipys():
    decoder = decoders.normal(nn.Dense(3))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)), jnp.float32)
    params = decoder.init(jax.random.key(0), x, z)
    assert set(params) == {"net", "log_std"} and np.all(params["log_std"] == 0)
    params["log_std"] = jnp.array([0.5, -1.0, 0.0])
    mean = nn.Dense(3).apply({"params": params["net"]}, z)
    expected = scipy.stats.norm.logpdf(x, mean, np.exp(params["log_std"])).sum(1)
    np.testing.assert_allclose(decoder.log_prob(params, x, z), expected, atol=1e-5)
    many = decoder.sample(params, jax.random.key(0), 40_000, jnp.repeat(z[:1], 40_000, 0))
    std = np.exp(np.asarray(params["log_std"]))
    assert np.all(np.abs(many.mean(0) - mean[0]) < 4 * std / 200)
    assert np.all(np.abs(many.std(0) - std) < 4 * std / 200)


@pytest.mark.parametrize("make", [decoders.bernoulli, decoders.normal])
def test_a_wrong_event_is_an_error(make):
    decoder = make(nn.Dense(3))
    with pytest.raises(ValueError, match=r"expected x of shape \[b, 3\], got \[5, 4\]"):
        decoder.init(jax.random.key(0), jnp.ones((5, 4)), z)
    params = decoder.init(jax.random.key(0), jnp.ones((5, 3)), z)
    with pytest.raises(ValueError, match=r"expected x of shape \[b, 3\], got \[5, 4\]"):
        decoder.log_prob(params, jnp.ones((5, 4)), z)
