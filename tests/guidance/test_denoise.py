"""Tweedie's formula against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors, distributions, flows, guidance


def test_the_posterior_mean_of_a_gaussian_flow(x64):
    """x ~ N(m, S), y = x + s eps: E[x | y] = m + S (S + s^2)^-1 (y - m)."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(3, 3))
    cov, mean, s = root @ root.T, rng.normal(size=3), 0.7
    factor = np.linalg.cholesky(cov + s**2 * np.eye(3))
    params = {
        "bijector": {
            "lower": jnp.asarray(np.tril(factor / np.diag(factor), -1)),
            "upper": jnp.zeros((3, 3)),
            "log_diagonal": jnp.asarray(np.log(np.diag(factor))),
            "shift": jnp.asarray(mean),
        },
        "base": {},
    }
    flow = flows.flow(bijectors.lu(3), distributions.normal((3,)))
    y = jnp.asarray(rng.normal(size=(5, 3)))
    expected = mean + (np.asarray(y) - mean) @ np.linalg.solve(cov + s**2 * np.eye(3), cov)
    got = jax.jit(lambda y: guidance.denoise(flow, params, y, s))(y)
    np.testing.assert_allclose(got, expected, atol=1e-9)
    np.testing.assert_array_equal(guidance.denoise(flow, params, y, 0.0), y)


def test_rows_do_not_mix_and_cond_is_used():
    base = distributions.normal((2,))
    flow = base._replace(log_prob=lambda p, x, cond=None, *, key=None: base.log_prob(p, x - cond))
    y, cond = jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), jnp.asarray([[1.0, 1.0], [2.0, 2.0]])
    np.testing.assert_allclose(
        guidance.denoise(flow, {}, y, 0.5, cond), y - 0.25 * (y - cond), atol=1e-6
    )


def test_bad_input():
    with pytest.raises(ValueError, match="std >= 0, got -0.1"):
        guidance.denoise(distributions.normal((1,)), {}, jnp.zeros((2, 1)), -0.1)
