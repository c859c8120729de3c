"""Bits per dimension of levels under densities of reals, by every dequantization."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from jflow import bijectors as bj
from jflow import distributions, flows, metrics, nets, oracles, solvers, types

STILL = types.Velocity(
    lambda key, x, t, cond=None: {}, lambda params, x, t, cond=None, *, key=None: jnp.zeros_like(x)
)
CENTRED = types.Distribution(  # uniform on [-1, 1] in each of 12 dimensions
    lambda key, x, cond=None: {},
    lambda params, x, cond=None, *, key=None: jnp.where(
        jnp.all(jnp.abs(x) <= 1, axis=(1, 2, 3)), -12 * jnp.log(2), -jnp.inf
    ),
    lambda params, key, n, cond=None: jax.random.uniform(key, (n, 2, 2, 3), minval=-1, maxval=1),
)


def test_uniform_data_under_the_identity_has_exactly_8_bits():
    """A continuous flow that stands still over the uniform density, exact and by probes."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 256, size=(16, 2, 2, 3)), jnp.float32)
    for divergence in (solvers.exact_divergence(), solvers.hutchinson(1)):
        still = flows.cnf(STILL, CENTRED, method=1, divergence=divergence)
        flow = flows.with_dequantization(still, bj.uniform_dequantization(256))
        params = flow.init(jax.random.key(0), x)
        assert set(params["base"]) == {"velocity", "base"}
        elbo = flow.elbo(params, x, key=jax.random.key(1))
        assert metrics.bits_per_dim(elbo, 12) == pytest.approx(8, abs=1e-6)
        sample = flow.sample(params, jax.random.key(2), 4)
        assert (
            np.all(sample == np.floor(sample)) and sample.min() >= 0 and 100 < sample.max() <= 255
        )


def test_truncated_normal_noise():
    """Its density integrates to 1 over a level; its draws have the mean square of scipy's truncated
    normal."""
    levels, n = 256, 20_000
    for std in (0.05, 0.2, 1.0, 30.0):
        layer = bj.truncated_normal_dequantization(std, levels)
        x = jnp.full((n, 1), 7.0)
        z, contribution = layer.inverse({}, x, key=jax.random.key(0))
        u = np.asarray(levels * z - x, np.float64)
        expected = scipy.stats.truncnorm(-0.5 / std, 0.5 / std, loc=0.5, scale=std)
        # 4 standard errors of a mean of squares, at most those of a normal; the rounding of z is
        # 1e-5 of a level
        np.testing.assert_allclose(np.mean((u - 0.5) ** 2), expected.var(), rtol=4 * np.sqrt(2 / n))
        log_q = -np.asarray(contribution) - np.log(levels)
        np.testing.assert_allclose(log_q, expected.logpdf(u)[:, 0], atol=0.02)
        center = jnp.asarray([[(7 + 0.5) / levels]])
        # forward is at the pair (z, x) minus the inverse's contribution
        back, there = layer.forward({}, center)
        assert back[0, 0] == 7
        np.testing.assert_allclose(
            there[0] - np.log(levels), expected.logpdf(0.5), atol=1e-6
        )  # float32 of 5.5
    with pytest.raises(ValueError, match="std > 0, got 0"):
        bj.truncated_normal_dequantization(0)


def test_bounds_reach_the_mass_of_levels(x64):
    """Gaussian data in 2 dimensions, its exact velocity on the linear path, 6 levels: every
    dequantization's importance-weighted bound is log P(level), a product of differences of normal
    distribution functions; truncated normal at t1 = 0.9, where the mass is that of data with noise,
    in cells of width 2 alpha / L."""
    levels, std = 6, np.asarray([0.5, 0.35])
    velocity = oracles.as_velocity(oracles.gaussian(np.zeros(2), std**2))
    x = jnp.asarray([[0.0, 3.0], [2.0, 2.0], [5.0, 4.0]])
    draws = 1500

    def mass(alpha, sigma):
        spread = np.sqrt(alpha**2 * std**2 + sigma**2)
        edges = alpha * (2 * np.arange(levels + 1) / levels - 1)
        cdf = scipy.special.ndtr(edges[:, None] / spread[None])
        cells = np.diff(cdf, axis=0)
        return sum(np.log(cells[np.asarray(x[:, d], int), d]) for d in range(2))

    net = nets.MLP((4,), nn.tanh)
    noise = flows.flow(
        bj.chain(bj.coupling(bj.univariate.affine(), net, split=1), bj.sigmoid()),
        distributions.student_t((2,)),
    )
    for dequantize, t1 in (
        (bj.uniform_dequantization(levels), 1.0),
        (bj.variational_dequantization(noise, levels), 1.0),
        (bj.truncated_normal_dequantization(levels * 0.1 / (2 * 0.9), levels), 0.9),
    ):
        # 12 steps of order 5, to about 1e-5
        flow = flows.cnf(velocity, distributions.normal((2,)), method=12, t1=t1)
        flow = flows.with_dequantization(flow, dequantize, scale=t1)
        params = flow.init(jax.random.key(0), x)
        many = jnp.repeat(x, draws, axis=0)
        elbo = np.asarray(jax.jit(flow.elbo)(params, many, key=jax.random.key(1))).reshape(3, draws)
        exact = mass(t1, 1 - t1)
        ratio = np.exp(elbo - exact[:, None])
        error = ratio.std(axis=1) / np.sqrt(draws)
        assert np.all(error > 1e-3) and np.all(np.abs(ratio.mean(axis=1) - 1) < 4 * error)
        assert np.all(elbo.mean(axis=1) < exact)
    with pytest.raises(ValueError, match="scale > 0, got -1"):
        flows.with_dequantization(flow, dequantize, scale=-1)
