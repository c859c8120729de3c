"""Latents at a quantile of their density, and whether the density of samples follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import distributions, flows, guidance, oracles


def test_to_quantile_is_a_quantile(x64):
    """Of 20,000 draws, a fraction q is sparser: within four standard errors, false alarm below
    1e-4."""
    n, q = 20_000, 0.8
    z = jax.random.normal(jax.random.key(0), (n, 3, 2))
    moved = guidance.to_quantile(z[:1], q)
    log_p = lambda z: -0.5 * jnp.sum(z.reshape(z.shape[0], -1) ** 2, axis=1)  # noqa: E731
    share = float(jnp.mean(log_p(z) < log_p(moved)))
    assert abs(share - q) < 4 * (q * (1 - q) / n) ** 0.5
    cosine = (
        jnp.sum(moved * z[:1]) / jnp.linalg.norm(moved.ravel()) / jnp.linalg.norm(z[:1].ravel())
    )
    np.testing.assert_allclose(cosine, 1.0)
    # two dimensions have a closed form: P(|Z|^2 > r) = exp(-r / 2)
    two = guidance.to_quantile(z[:5, :2, 0], q)
    np.testing.assert_allclose(jnp.sum(two**2, axis=1), -2 * np.log(q))


def test_to_quantile_of_latents_of_any_length():
    """In float32 the squares of 1e30 overflow and those of 1e-30 vanish."""
    z = jax.random.normal(jax.random.key(0), (5, 3))
    for length in (1e30, 1e-30):
        np.testing.assert_allclose(
            guidance.to_quantile(length * z, 0.8), guidance.to_quantile(z, 0.8), rtol=1e-5
        )


def test_samples_of_a_gaussian_follow_their_latents(x64):
    """x1 = m + C^(1/2) z: log p1(x1) = -|z|^2 / 2 + const, in the order of q whatever the
    covariance."""
    oracle = oracles.gaussian([1.0, -1.0], [[2.0, 0.5], [0.5, 0.3]])
    z = jax.random.normal(jax.random.key(1), (6, 2))
    for q in (0.2, 0.9):
        x1 = oracle.flow_map(guidance.to_quantile(z, q), 0.0, 1.0)
        expected = np.log(q) - np.log(2 * np.pi) - 0.5 * np.log(2.0 * 0.3 - 0.25)
        np.testing.assert_allclose(oracle.log_density(x1, 1.0), expected, atol=1e-10)


def test_score_alignment(x64):
    """|z|^2 for a Gaussian; for a mixture the derivative of the sample's exact log-density by the
    latent's scale."""
    z = jax.random.normal(jax.random.key(2), (6, 2))
    params = {"velocity": {}, "base": {}}
    options = {"method": 40}  # of order 5: far below the tolerances
    aligned = lambda flow: jax.jit(lambda z: guidance.score_alignment(flow.forward, params, z))(z)  # noqa: E731
    linear = flows.cnf(
        oracles.as_velocity(oracles.gaussian([1.0, 0.0], [2.0, 0.3])),
        distributions.normal((2,)),
        **options,
    )
    np.testing.assert_allclose(aligned(linear), jnp.sum(z**2, axis=1), atol=1e-6)

    oracle = oracles.mixture([0.6, 0.4], [[2.0, 0.0], [-1.0, 1.5]], 0.3)
    flow = flows.cnf(oracles.as_velocity(oracle), distributions.normal((2,)), **options)
    h = 1e-4
    shrunk_and_grown = jnp.concatenate([(1 - h) * z, (1 + h) * z])
    log_p = oracle.log_density(oracles.mixture_flow_map(oracle, shrunk_and_grown, 0.0, 1.0), 1.0)
    slope = (log_p[:6] - log_p[6:]) / (2 * h)  # the difference's own error is of order h^2
    got = aligned(flow)
    np.testing.assert_allclose(got, slope, atol=1e-5)
    assert float(jnp.max(jnp.abs(got - jnp.sum(z**2, axis=1)))) > 0.05


def test_errors():
    with pytest.raises(ValueError, match="q in .*got 0"):
        guidance.to_quantile(jnp.ones((1, 2)), 0.0)
