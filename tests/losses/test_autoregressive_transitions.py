"""ARTM, FHTM and CaLMFlow over causal laws, with the exact conditionals of tokens on Gaussians."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import distributions, losses, nets, solvers
from jflow.types import Distribution

RHO, N = 0.9, 40_000
COV = np.array([[1.0, RHO], [RHO, 1.0]])
PARAMS = {"net": {}, "token": {}}


def data():
    """[N, 2, 1], two unit Gaussians of correlation 0.9."""
    z = np.random.default_rng(0).normal(size=(N, 2))
    return (z @ np.linalg.cholesky(COV).T)[..., None].astype(np.float32)


def gaussian_token():
    """The law N(h_1, h_2^2) of a number, given h."""

    def log_prob(params, x, cond=None, *, key=None):
        return jax.scipy.stats.norm.logpdf(x[:, 0], cond[:, 0], cond[:, 1])

    def sample(params, key, n, cond=None):
        return cond[:, :1] + cond[:, 1:] * jax.random.normal(key, (n, 1), cond.dtype)

    return Distribution(lambda key, x, cond=None: {}, log_prob, sample)


def conditionals(x, mean, root):
    """h [b, n, 2] of N(mean, root root^T): the means and deviations of each x_i given x_<i."""
    z = jax.scipy.linalg.solve_triangular(root, (x[..., 0] - mean)[..., None], lower=True)[..., 0]
    std = jnp.diagonal(root, axis1=1, axis2=2)
    before = jnp.einsum("bij,bj->bi", root, z) - std * z
    return jnp.stack([mean + before, std], axis=-1)


def kernel(t, t_next):
    """The state at t_next given that at t, with noise of their own: (gain, root)."""
    cross = t * t_next * COV
    gain = cross @ np.linalg.inv(t**2 * COV + (1 - t) ** 2 * np.eye(2))
    cov = t_next**2 * COV + (1 - t_next) ** 2 * np.eye(2) - gain @ cross.T
    return gain, np.linalg.cholesky(cov)


class Kernel(nn.Module):
    """The exact conditionals of the next state's tokens, given cond = (the last state, its
    time)."""

    steps: int

    def __call__(self, x, cond):
        last, t = cond
        both = [kernel(k / self.steps, (k + 1) / self.steps) for k in range(self.steps)]
        k = jnp.round(t * self.steps).astype(int)
        gain, root = (jnp.asarray(np.stack(part), x.dtype)[k] for part in zip(*both, strict=True))
        return conditionals(x, jnp.einsum("bij,bj->bi", gain, last[..., 0]), root)


class History(nn.Module):
    """The exact conditionals of a Gaussian sequence."""

    cov: tuple

    def __call__(self, x, cond=None):
        root = jnp.asarray(np.linalg.cholesky(np.array(self.cov)), x.dtype)
        mean = jnp.zeros_like(x, shape=x.shape[:2])
        return conditionals(x, mean, jnp.broadcast_to(root[None], (x.shape[0], *root.shape)))


def entropy(root):
    return np.sum(np.log(np.diag(root))) + len(root) * 0.5 * np.log(2 * np.pi * np.e)


def last_and_time(x, t, cond=None):
    return x, t


@pytest.mark.parametrize("steps", [1, 3])
def test_artm_of_exact_token_conditionals_is_exact_at_any_number_of_steps(steps):
    """Where DTM of token-wise kernels ends with correlation 0 and about 0.73, the covariance is
    that of the data; the standard error of an entry is at most 0.007. The loss is the entropy of
    the kernels, and network that forgets the tokens before pays for it."""
    law = distributions.causal(Kernel(steps), gaussian_token(), (2, 1))
    x0 = np.random.default_rng(1).normal(size=(N, 2, 1)).astype(np.float32)

    @jax.jit
    def run(key, x, x0):
        sample_key, loss_key = jax.random.split(key)
        drawn = solvers.sample_kernels(
            law, PARAMS, x0, sample_key, grid=steps, condition=last_and_time
        )
        pairs = losses.transition_pairs(steps, condition=last_and_time)
        loss = losses.chain(pairs, losses.nll(law))
        return drawn, loss(PARAMS, loss_key, {"x": x})[0]

    drawn, loss = jax.device_get(run(jax.random.key(0), data(), x0))
    np.testing.assert_allclose(np.cov(drawn[..., 0].T), COV, atol=0.025)
    roots = [kernel(k / steps, (k + 1) / steps)[1] for k in range(steps)]
    np.testing.assert_allclose(loss, np.mean([entropy(root) for root in roots]), atol=0.02)


def test_fhtm_of_exact_conditionals_ends_with_the_data():
    """T = 3: a causal law of 6 tokens, of which the last two are a sample; the loss is the entropy
    of the history."""
    t = np.arange(1, 4) / 3
    cov = np.kron(np.outer(t, t), COV) + np.kron(np.diag((1 - t) ** 2), np.eye(2))
    law = distributions.causal(History(tuple(map(tuple, cov))), gaussian_token(), (6, 1))

    @jax.jit
    def run(key, x):
        sample_key, loss_key = jax.random.split(key)
        loss = losses.chain(losses.full_history(3), losses.nll(law))
        return law.sample(PARAMS, sample_key, N), loss(PARAMS, loss_key, {"x": x})[0]

    drawn, loss = jax.device_get(run(jax.random.key(0), data()))
    np.testing.assert_allclose(np.cov(drawn[:, -2:, 0].T), COV, atol=0.025)
    np.testing.assert_allclose(loss, entropy(np.linalg.cholesky(cov)), atol=0.03)


def test_a_causal_law_of_the_states_of_a_path_ends_with_the_data():
    """CaLMFlow on one number with noise of deviation 0.3 in each state: T = 2, three tokens, of
    which the last has the variance of the noisy data."""
    t = np.array([0.0, 0.5, 1.0])
    cov = 4 * np.outer(t, t) + np.outer(1 - t, 1 - t) + 0.09 * np.eye(3)
    law = distributions.causal(History(tuple(map(tuple, cov))), gaussian_token(), (3, 1))

    @jax.jit
    def run(key, x):
        sample_key, loss_key = jax.random.split(key)
        states = losses.path_states(2), losses.noised(0.3)
        loss = losses.chain(*states, losses.nll(law))
        return law.sample(PARAMS, sample_key, N), loss(PARAMS, loss_key, {"x": x})[0]

    x = 2 * np.random.default_rng(3).normal(size=(N, 1)).astype(np.float32)
    drawn, loss = jax.device_get(run(jax.random.key(0), x))
    np.testing.assert_allclose(drawn[:, -1].var(), 4.09, atol=0.12)
    np.testing.assert_allclose(loss, entropy(np.linalg.cholesky(cov)), atol=0.03)


def test_a_transformer_takes_the_condition_of_a_kernel():
    """It is causal by the check of `init`, all of its parts reach the loss, and it samples."""
    net = nets.CausalTransformer(features=4, width=8, num_layers=1, num_heads=2, num_classes=3)
    law = distributions.causal(net, distributions.conditional_mixture((2,), 2), (3, 2))
    x = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32)
    labels = np.arange(4) % 3
    cond = solvers.transition_condition(x, np.zeros(4, np.float32), labels)
    params = law.init(jax.random.key(0), x, cond)
    loss = losses.chain(losses.transition_pairs(2), losses.nll(law))

    @jax.jit
    def run(moved, key):
        loss_key, sample_key = jax.random.split(key)
        slopes = jax.grad(lambda p: loss(p, loss_key, {"x": x, "cond": labels})[0])(moved)
        return slopes, solvers.sample_kernels(law, moved, x, sample_key, labels, grid=2)

    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32), params)
    slopes, drawn = jax.device_get(run(moved, jax.random.key(1)))
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(slopes))
    assert drawn.shape == x.shape and np.all(np.isfinite(drawn))
