"""Likelihood contributions against exact masses and densities."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jflow import bijectors as bj
from jflow import distributions, flows, losses, metrics, nets
from jflow.types import Distribution


def gaussian(mean, std):
    """e given x [b, 1] is normal with mean(x) and a fixed deviation."""

    def log_prob(params, e, cond=None, *, key=None):
        return jax.scipy.stats.norm.logpdf(e, mean(cond), std)[:, 0]

    def sample(params, key, n, cond=None):
        return mean(cond) + std * jax.random.normal(key, (n, 1), cond.dtype)

    return Distribution(lambda key, x, cond=None: {}, log_prob, sample)


def test_uniform_data_under_a_uniform_model_has_exactly_8_bits():
    flow = flows.elbo_flow(bj.uniform_dequantization(256), distributions.uniform((4, 4, 3)))
    x = jnp.asarray(np.random.default_rng(0).integers(0, 256, size=(64, 4, 4, 3)), jnp.float32)
    params = flow.init(jax.random.key(0), x)
    elbo = flow.elbo(params, x, key=jax.random.key(1))
    assert metrics.bits_per_dim(elbo, 48) == pytest.approx(8, abs=1e-6)
    loss, _ = losses.negative_elbo(flow)(params, jax.random.key(1), {"x": x})
    assert loss == pytest.approx(48 * np.log(256), rel=1e-6)


@pytest.mark.parametrize("levels", [2, 256, 65536])
def test_every_level_comes_back_from_its_cell(levels):
    """Whatever the draw, in float32: noise stays off the ends of the cell."""
    x = jnp.repeat(
        jnp.asarray([0, 1, levels // 2, levels - 2, levels - 1], jnp.float32)[None], 20_000, 0
    )
    layer = bj.uniform_dequantization(levels)
    z, _ = layer.inverse({}, x, key=jax.random.key(0))
    assert np.all((z >= 0) & (z < 1))
    np.testing.assert_array_equal(layer.forward({}, z)[0], x)


def test_levels_at_the_ends_catch_what_lies_outside():
    x, _ = bj.uniform_dequantization(4).forward({}, jnp.asarray([[-3.0, 0.2, 0.26, 1.0, 9.0]]))
    np.testing.assert_array_equal(x, [[0, 0, 1, 3, 3]])


def test_dequantization_bounds_the_mass_and_many_draws_reach_it(x64):
    """A logistic density on (0, 1) through a sigmoid: P(x) is a difference of its distribution
    function."""
    levels, shift, scale = 6, -0.4, 0.6
    model = flows.flow(bj.chain(bj.affine((1,)), bj.sigmoid()), distributions.normal((1,)))
    model_params = {
        "bijector": {
            "0": {"log_scale": jnp.log(jnp.array([scale])), "shift": jnp.array([shift])},
            "1": {},
        }
    }
    model_params["base"] = {}
    x = jnp.arange(levels, dtype=jnp.float64)[:, None]
    edges = np.arange(levels + 1) / levels
    with np.errstate(divide="ignore"):
        cdf = scipy.stats.norm.cdf((np.log(edges) - np.log1p(-edges) - shift) / scale)
    exact = np.log(np.diff(cdf))
    draws = 4000

    def estimates(transport, params):
        flow = flows.elbo_flow(transport, model)
        params = {"bijector": params, "base": model_params}
        keys = jax.random.split(jax.random.key(0), draws)
        elbo = jax.jit(jax.vmap(lambda key: flow.elbo(params, x, key=key)))(keys)
        tight = jax.jit(
            lambda key: flows.importance_weighted(flow, draws).elbo(params, x, key=key)
        )(keys[0])
        ratios = np.exp(np.asarray(elbo) - exact)
        # exp(bound) is unbiased for the mass: within 4 standard errors; so is the
        # importance-weighted estimate
        error = 4 * ratios.std(0) / np.sqrt(draws)
        np.testing.assert_allclose(ratios.mean(0), 1, atol=error.max())
        np.testing.assert_allclose(np.exp(tight - exact), 1, atol=error.max())
        bound = np.mean(elbo, axis=0)
        assert np.all(bound < exact + 4 * np.std(elbo, axis=0) / np.sqrt(draws))
        return np.mean(exact - bound)

    net = nets.MLP((8,), nn.tanh)
    # heavy tails: the weights p / q of a logit-normal q have no variance
    noise = flows.flow(
        bj.chain(bj.coupling(bj.univariate.affine(), net, split=0), bj.sigmoid()),
        distributions.student_t((1,)),
    )
    learned = bj.variational_dequantization(noise, levels)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + 0.3 * rng.normal(size=p.shape), learned.init(jax.random.key(0), x)
    )
    assert estimates(bj.uniform_dequantization(levels), {}) > 0.01
    assert estimates(learned, params) > 0.01


def test_variational_dequantization_by_the_posterior_is_exact(x64):
    """Over z = (x + u) / L of density prod 2 z, the posterior of u is proportional to x + u."""
    levels = 5

    def level(cond):
        return jnp.round(((cond + 1) * levels - 1) / 2)

    def log_prob(params, u, cond=None, *, key=None):
        return jnp.sum(jnp.log(level(cond) + u) - jnp.log(level(cond) + 0.5), axis=1)

    def sample(params, key, n, cond=None):
        x, uniform = level(cond), jax.random.uniform(key, (n, 3), cond.dtype)
        return (
            jnp.sqrt(x**2 + uniform * (2 * x + 1)) - x
        )  # the inverse of its distribution function

    posterior = Distribution(lambda key, x, cond=None: {}, log_prob, sample)
    wedge = Distribution(
        lambda key, x, cond=None: {},
        lambda params, z, cond=None, *, key=None: jnp.sum(jnp.log(2 * z), axis=1),
        lambda params, key, n, cond=None: jnp.sqrt(jax.random.uniform(key, (n, 3))),
    )
    flow = flows.elbo_flow(bj.variational_dequantization(posterior, levels), wedge)
    x = jnp.asarray(np.random.default_rng(0).integers(0, levels, size=(50, 3)), jnp.float64)
    exact = jnp.sum(jnp.log((2 * x + 1) / levels**2), axis=1)
    # the noise keeps 8 levels' roundings off the ends of its cell, about 1e-14
    np.testing.assert_allclose(
        flow.elbo({"bijector": {}, "base": {}}, x, key=jax.random.key(0)), exact, atol=1e-9
    )


def test_augment_bounds_a_gaussian_marginal_and_the_posterior_makes_it_exact(x64):
    """(x, e) jointly normal with covariance A A^T: the marginal of x and the posterior of e are
    known."""
    a = np.array([[1.0, 0.6], [-0.3, 0.8]])
    covariance = a @ a.T
    slope = covariance[0, 1] / covariance[0, 0]
    std = np.sqrt(covariance[1, 1] - slope * covariance[0, 1])
    base = distributions.multivariate_normal(2)
    factor = np.linalg.cholesky(covariance)
    base_params = {
        "mean": jnp.zeros(2),
        "lower": jnp.asarray(np.tril(factor, -1)),
        "log_diagonal": jnp.log(jnp.diag(factor)),
    }
    params = {"bijector": {}, "base": base_params}
    x = jnp.linspace(-3, 3, 7)[:, None]
    exact = scipy.stats.norm.logpdf(np.asarray(x[:, 0]), scale=np.sqrt(covariance[0, 0]))

    def bound(q_slope, q_std):
        flow = flows.elbo_flow(bj.augment(gaussian(lambda x: q_slope * x, q_std), 1), base)
        keys = jax.random.split(jax.random.key(0), 2000)
        return np.asarray(jax.jit(jax.vmap(lambda key: flow.elbo(params, x, key=key)))(keys))

    np.testing.assert_allclose(bound(slope, std), np.broadcast_to(exact, (2000, 7)), atol=1e-10)
    loose = bound(slope + 0.3, 1.5 * std)
    # the gap is the divergence KL(q || posterior) of two normals
    gap = np.log(1 / 1.5) + (1.5**2 + (0.3 * np.asarray(x[:, 0]) / std) ** 2 - 1) / 2
    np.testing.assert_allclose(
        exact - loose.mean(0), gap, atol=(4 * loose.std(0) / np.sqrt(2000)).max()
    )


def test_drop_is_the_chain_rule(x64):
    """log p(x) = log p(z) + log p(e given z), with nothing drawn."""
    flow = flows.elbo_flow(
        bj.drop(gaussian(lambda z: 2 * z + 1, 0.5), 1), distributions.normal((1,))
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)))
    params = flow.init(jax.random.key(0), x)
    expected = scipy.stats.norm.logpdf(x[:, 0]) + scipy.stats.norm.logpdf(
        x[:, 1], 2 * x[:, 0] + 1, 0.5
    )
    np.testing.assert_allclose(flow.elbo(params, x), expected, atol=1e-12)
    sample = np.asarray(flow.sample(params, jax.random.key(0), 20_000))
    # of 20,000 draws, within 4 standard errors of the residual's mean and deviation
    residual = sample[:, 1] - 2 * sample[:, 0] - 1
    assert abs(residual.mean()) < 4 * 0.5 / np.sqrt(20_000)
    assert residual.std() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(40_000))


def test_bfloat16_levels_are_dequantized_in_float32():
    x = jnp.arange(256, dtype=jnp.bfloat16)[:, None]
    z, contribution = bj.uniform_dequantization(256).inverse({}, x, key=jax.random.key(0))
    assert z.dtype == contribution.dtype == jnp.float32
    np.testing.assert_array_equal(
        bj.uniform_dequantization(256).forward({}, z)[0], x.astype(jnp.float32)
    )
