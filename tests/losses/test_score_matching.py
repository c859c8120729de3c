"""Score matching of flows: the least loss of a Gaussian, and what is not computed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from jflow import bijectors, distributions, flows, losses

D, N = 3, 40
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(N, D)) @ RNG.normal(size=(D, D)) + 1.0
# A dense linear layer in the direction of the density: z = matrix x + shift.
GAUSSIAN = flows.flow(bijectors.invert(bijectors.linear(D)), distributions.normal((D,)))


def params_of(mean, covariance):
    """The params of N(mean, covariance), whose precision is matrix^T matrix."""
    matrix = np.linalg.inv(np.linalg.cholesky(covariance))
    return {"bijector": {"matrix": matrix, "shift": -matrix @ mean}, "base": {}}


def test_the_trace_has_its_least_value_at_the_maximum_likelihood_gaussian(x64):
    """There the loss is -tr(C^-1) / 2 with C of the rows, its gradient is 0 to rounding, and the
    Gaussian of half the covariance, where it is not, has a larger loss."""
    loss = losses.score_matching(GAUSSIAN, probes=None)
    mean, covariance = ROWS.mean(0), np.cov(ROWS.T, bias=True)
    run = jax.jit(jax.value_and_grad(lambda params: loss(params, None, {"x": ROWS})[0]))
    value, slope = run(params_of(mean, covariance))
    np.testing.assert_allclose(value, -np.trace(np.linalg.inv(covariance)) / 2, rtol=1e-12)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(slope)) < 1e-12
    other, slope = run(params_of(mean, covariance / 2))
    assert other > value and np.abs(slope["bijector"]["matrix"]).max() > 0.1


def test_denoising_has_no_mean_gradient_at_the_gaussian_of_the_noisy_data(x64):
    """N(m, C + std^2 I): the mean over 2000 keys within 4.5 of its standard errors (12 numbers:
    false alarm 1e-4 under another seed). At N(m, C) some number is 20 of them away."""
    std, keys = 0.7, jax.random.split(jax.random.key(0), 2000)
    loss = losses.denoising_score_matching(GAUSSIAN, std)
    mean, covariance = ROWS.mean(0), np.cov(ROWS.T, bias=True)

    @jax.jit
    def slopes(params):
        slope = jax.grad(lambda params, key: loss(params, key, {"x": ROWS})[0])
        return jax.vmap(slope, (None, 0))(params, keys)["bijector"]

    def errors(covariance):
        found = jax.device_get(slopes(params_of(mean, covariance)))
        numbers = np.concatenate([found["matrix"].reshape(2000, -1), found["shift"]], axis=1)
        return np.abs(numbers.mean(0)) / (numbers.std(0) / np.sqrt(2000))

    assert errors(covariance + std**2 * np.eye(D)).max() < 4.5
    assert errors(covariance).max() > 20


def test_probes_are_unbiased(x64):
    """The mean of 400 draws within 4 standard errors of the trace itself, which here is that of
    the Hessian of log_prob."""
    flow = flows.real_nvp((2,), depth=1, hidden=(3,), activation=nn.tanh)
    rng = np.random.default_rng(1)
    x, keys = rng.normal(size=(5, 2)), jax.random.split(jax.random.key(1), 400)
    shapes = jax.eval_shape(flow.init, jax.random.key(0), x)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape), shapes)

    @jax.jit
    def run(params):
        one = lambda row: flow.log_prob(params, row[None])[0]  # noqa: E731
        score, hessian = jax.vmap(jax.grad(one))(x), jax.vmap(jax.hessian(one))(x)
        expected = jnp.sum(score**2, 1) / 2 + jnp.trace(hessian, axis1=1, axis2=2)
        exact = losses.score_matching(flow, probes=None)(params, None, {"x": x})[0]
        sliced = losses.score_matching(flow, probes=2)
        return expected, exact, jax.vmap(lambda key: sliced(params, key, {"x": x})[0])(keys)

    expected, exact, draws = jax.device_get(run(params))
    np.testing.assert_allclose(exact, expected.mean(), rtol=1e-10)
    assert np.std(draws) > 1e-3
    assert abs(np.mean(draws) - exact) < 4 * np.std(draws) / 20


def test_no_determinant_of_a_linear_layer_is_computed():
    """The LU decompositions that the gradient depends on: one for the likelihood, none
    here. The flow has plain splines, whose forward mode is their own."""
    spline = flows.neural_spline((D,), depth=1, hidden=(3,), bins=2, implementation="plain")
    layer = bijectors.invert(bijectors.linear(D))
    flow = flows.flow(layer, spline)
    x = np.ones((3, D), np.float32)
    params = flow.init(jax.random.key(0), x)

    def decompositions(loss):
        slope = jax.grad(lambda p: loss(p, jax.random.key(1), {"x": x})[0])
        jaxpr = jax.make_jaxpr(slope)(params).jaxpr
        return str(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]).count("= lu ")

    assert decompositions(losses.nll(flow)) == 1
    assert decompositions(losses.score_matching(flow)) == 0
    assert decompositions(losses.denoising_score_matching(flow, 1.0)) == 0
    with pytest.raises(ValueError, match="'plain', got 'slow'"):
        flows.neural_spline((D,), implementation="slow")


def test_options_are_checked_at_construction():
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match="score_matching: expected"):
            losses.score_matching(GAUSSIAN, probes=wrong)
    with pytest.raises(ValueError, match="expected std > 0, got 0"):
        losses.denoising_score_matching(GAUSSIAN, 0)
    for make in (losses.score_matching, lambda f: losses.denoising_score_matching(f, 1.0)):
        with pytest.raises(TypeError, match="expected"):
            make(lambda x: x)
    with pytest.raises(ValueError, match="needs a key"):
        losses.score_matching(GAUSSIAN)({}, None, {"x": jnp.ones((2, D))})
