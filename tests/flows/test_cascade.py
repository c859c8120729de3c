"""A chain of laws over Haar bands: Gaussian images, whose bands and conditionals are known."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jflow import bijectors, distributions, flows, solvers
from jflow.types import Condition, Distribution, Velocity

SIDE = 4
RNG = np.random.default_rng(0)
ROOT = np.eye(SIDE**2) + 0.2 * RNG.normal(size=(SIDE**2, SIDE**2))
COV = ROOT @ ROOT.T  # of the pixels of an image, row by row


def gaussian(event, cov, gain=None):
    """N(gain low, cov) of events, with low the aligned part of cond, or N(0, cov)."""
    root = np.linalg.cholesky(cov)

    def mean(cond, n):
        if gain is None:
            return jnp.zeros((n, len(cov)))
        return cond.aligned.reshape(n, -1) @ gain.T

    def log_prob(params, x, cond=None, *, key=None):
        away = x.reshape(x.shape[0], -1) - mean(cond, x.shape[0])
        z = jax.scipy.linalg.solve_triangular(jnp.asarray(root, x.dtype), away.T, lower=True).T
        normal = -0.5 * jnp.sum(z**2, axis=1) - 0.5 * len(cov) * np.log(2 * np.pi)
        return normal - np.sum(np.log(np.diag(root)))

    def sample(params, key, n, cond=None):
        z = jax.random.normal(key, (n, len(cov)))
        return (mean(cond, n) + z @ jnp.asarray(root.T, z.dtype)).reshape(n, *event)

    return Distribution(lambda key, x, cond=None: {}, log_prob, sample)


def split(cov, side):
    """(cov of low, gain and cov of the details given low) of images with that covariance."""
    unit = np.eye(side**2, dtype=np.float32).reshape(-1, side, side, 1)
    bands = np.asarray(bijectors.haar().forward({}, unit)[0], np.float64)
    low, details = bands[..., :1].reshape(side**2, -1), bands[..., 1:].reshape(side**2, -1)
    c_low, c_details, cross = low.T @ cov @ low, details.T @ cov @ details, details.T @ cov @ low
    gain = cross @ np.linalg.inv(c_low)
    return c_low, gain, c_details - gain @ cross.T


def cascade():
    """Three scales: 1 x 1, 2 x 2, 4 x 4."""
    c_2, gain_4, c_4 = split(COV, 4)
    c_1, gain_2, c_2 = split(c_2, 2)
    inner = flows.haar_cascade(gaussian((1, 1, 1), c_1), gaussian((1, 1, 3), c_2, gain_2))
    return flows.haar_cascade(inner, gaussian((2, 2, 3), c_4, gain_4))


EULER = solvers.fixed(1, diffrax.Euler())
PARAMS = {"coarse": {"coarse": {}, "fine": {}}, "fine": {}}


def test_likelihoods_of_the_bands_add_to_that_of_the_image(x64):
    law, x = cascade(), RNG.normal(size=(7, SIDE, SIDE, 1))
    assert law.init(jax.random.key(0), x) == PARAMS
    found = jax.device_get(jax.jit(law.log_prob)(PARAMS, x))
    expected = scipy.stats.multivariate_normal(np.zeros(SIDE**2), COV).logpdf(x.reshape(7, -1))
    np.testing.assert_allclose(found, expected, atol=1e-5)  # the wavelets' numbers are float32


def test_samples_have_the_covariance_of_the_image():
    """20,000 draws: the standard error of an entry is at most 0.015 times the largest variance."""
    x = jax.device_get(
        jax.jit(cascade().sample, static_argnums=2)(PARAMS, jax.random.key(0), 20_000)
    )
    np.testing.assert_allclose(np.cov(x.reshape(-1, SIDE**2).T), COV, atol=0.015 * COV.max() * 4)


def test_conditions_reach_both_parts_and_the_details_see_the_coarse_half():
    seen = []

    def spy(event):
        inner = distributions.normal(event)

        def log_prob(params, x, cond=None, *, key=None):
            seen.append(cond)
            return inner.log_prob({}, x)

        return inner._replace(log_prob=log_prob)

    law = flows.haar_cascade(spy((1, 1, 1)), spy((1, 1, 3)))
    x, labels = np.ones((2, 2, 2, 1), np.float32), np.array([3, 4])
    law.log_prob({"coarse": {}, "fine": {}}, x, labels)
    coarse, fine = seen
    assert coarse is labels and fine.label.tolist() == [3, 4]
    np.testing.assert_array_equal(fine.aligned, np.full((2, 1, 1, 1), 2.0))


def test_flows_make_a_cascade_and_gradients_reach_both():
    """The details by a flow whose velocity is a number times the coarse half."""

    def towards(params, x, t, cond=None, *, key=None):
        return params["slope"] * jnp.tile(cond.aligned, (1, 1, 1, 3))

    velocity = Velocity(lambda *_: {"slope": jnp.ones(())}, towards)
    fine = flows.cnf(velocity, distributions.normal((2, 2, 3)), method=EULER)
    law = flows.haar_cascade(distributions.diagonal_normal((2, 2, 1)), fine)
    x = RNG.normal(size=(2, 4, 4, 1)).astype(np.float32)
    params = law.init(jax.random.key(0), x)
    slopes = jax.jit(jax.grad(lambda p: law.log_prob(p, x).sum()))(params)
    assert len(jax.tree.leaves(slopes)) == 3
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(slopes))


def test_bad_input_says_so():
    law = flows.haar_cascade(distributions.normal((1, 1, 1)), distributions.normal((1, 1, 3)))
    params = {"coarse": {}, "fine": {}}
    with pytest.raises(ValueError, match=r"divisible by 2.*\[1, 3, 2, 1\]"):
        law.log_prob(params, np.ones((1, 3, 2, 1)))
    with pytest.raises(ValueError, match="no cond.aligned"):
        cond = Condition(aligned=np.ones((1, 2, 2, 1)))
        law.log_prob(params, np.ones((1, 2, 2, 1)), cond)
    with pytest.raises(TypeError, match="haar_cascade: expected a Distribution"):
        flows.haar_cascade(bijectors.haar(), distributions.normal((1, 1, 3)))
    with pytest.raises(ValueError, match="'coarse', 'fine'"):
        law.sample({"coarse": {}}, jax.random.key(0), 2)
