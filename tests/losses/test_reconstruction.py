import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import losses

SIGMA = 0.5
W = np.array([[1.0], [2.0], [-1.0]])  # x = W z + sigma noise


class Exact(nn.Module):
    """The exact posterior of probabilistic principal components, and their decoder."""

    width: int = 3

    def encode(self, x):
        precision = W.T @ W + SIGMA**2
        mean = x @ jnp.asarray(W / precision, x.dtype)
        return mean, jnp.full_like(mean, np.log(SIGMA**2 / precision.item()))

    def decode(self, z):
        return z @ jnp.asarray(W[: self.width].T, z.dtype)


def test_it_is_the_bound_of_a_linear_model_which_is_its_density():
    """For the exact posterior the mean over the noise is the negative log-density, up to a constant
    and a factor. 5 standard errors of the mean."""
    x, n = np.array([1.0, -2.0, 0.5], np.float32), 20_000
    covariance = W @ W.T + SIGMA**2 * np.eye(3)
    log_density = -0.5 * (
        x @ np.linalg.solve(covariance, x) + np.log(np.linalg.det(2 * np.pi * covariance))
    )
    expected = 2 * SIGMA**2 / 3 * (-log_density - 1.5 * np.log(2 * np.pi * SIGMA**2))
    loss = losses.reconstruction(Exact(), sigma=SIGMA)
    batch = {"x": x[None], "cond": np.zeros(1, np.int32)}
    found, seen = jax.jit(jax.vmap(lambda key: loss({}, key, batch)))(
        jax.random.split(jax.random.key(0), n)
    )
    np.testing.assert_allclose(found.mean(), expected, atol=5 * found.std() / np.sqrt(n))
    np.testing.assert_allclose(found, seen["error"] + 2 * SIGMA**2 / 3 * seen["kl"], rtol=1e-5)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="sigma > 0, got 0"):
        losses.reconstruction(Exact(), sigma=0.0)
    with pytest.raises(TypeError, match="net to be an instance"):
        losses.reconstruction(lambda x: x)
    with pytest.raises(ValueError, match=r"decode\(z\) of shape \[2, 3\], got \[2, 2\]"):
        losses.reconstruction(Exact(2))({}, jax.random.key(0), {"x": np.zeros((2, 3))})
