"""Continuously-indexed layers and chains of steps against closed forms; the update of a density."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors, distributions, flows, losses, nets

A, STEPS = 0.7, 3


def normal_log_prob(x, mean, variance):
    return -0.5 * ((x - mean) ** 2 / variance + np.log(2 * np.pi * variance))


def random_walk():
    """y_k = y_{k-1} + A u from y_0 ~ N(0, 1), with the true posteriors of the steps u given y_k, of
    mean A y_k / v_k and variance v_{k-1} / v_k for v_k = 1 + k A^2; as indexed layers."""
    moved = bijectors.amortized(bijectors.affine((1,)))
    posterior = flows.flow(bijectors.amortized(bijectors.affine((1,))), distributions.normal((1,)))
    layer = bijectors.indexed(moved, distributions.normal((1,)), posterior, (1,))
    v = 1 + A**2 * np.arange(STEPS + 1)

    def affine(slope, log_scale):
        """x = e^log_scale z + slope cond, at each step."""
        zeros, slope = np.zeros((STEPS, 1)), np.broadcast_to(slope, STEPS)
        return {
            "net": {},
            "kernel": {"log_scale": zeros[..., None], "shift": slope[:, None, None]},
            "bias": {"log_scale": zeros + np.reshape(log_scale, (-1, 1)), "shift": zeros},
        }

    own = affine(A / v[1:], np.log(v[:-1] / v[1:]) / 2)
    parts = {
        "bijector": affine(A, 0.0),
        "prior": {},
        "posterior": {"bijector": own, "base": {}},
    }
    return layer, {"steps": parts, "base": {}}, v


def test_with_the_true_posterior_every_draw_has_the_density_and_an_update_is_unbiased(x64):
    """In float64: log_prob of each step is that of N(0, v_k), whatever the key. After y_1 is seen
    to be N(m, s^2), step 3 is N(m, s^2 + 2 A^2): the posteriors are not those of the new law, so
    that exp(updated) is right on average, here over 20,000 draws within 4.5 standard errors at
    three points."""
    layer, params, v = random_walk()
    chain = flows.step_chain(layer, STEPS, distributions.normal((1,)))
    rng, (m, s), n = np.random.default_rng(0), (0.4, 0.6), 20_000
    x, points = rng.normal(size=(5, STEPS, 1)), np.array([-0.5, 0.3, 1.5])

    @jax.jit
    def run(params, x, points):
        key_prob, key_trace, key_draw = jax.random.split(jax.random.key(0), 3)
        kept = chain.trace(params, points, STEPS, key=key_trace)
        law = lambda y: distributions.normal((1,)).log_prob({}, (y - m) / s) - jnp.log(s)  # noqa: E731
        return (
            chain.log_prob(params, x, key=key_prob),
            flows.updated_log_prob(kept, 1, law),
            chain.sample(params, key_draw, n),
        )

    found, updated, walks = jax.device_get(run(params, x, np.repeat(points, n)[:, None]))
    np.testing.assert_allclose(found, normal_log_prob(x[..., 0], 0, v[1:]), atol=1e-12)
    weights = np.exp(updated).reshape(3, n)
    errors = weights.std(1) / np.sqrt(n)
    expected = np.exp(normal_log_prob(points, m, s**2 + 2 * A**2))
    assert np.all(np.abs(weights.mean(1) - expected) < 4.5 * errors)
    assert np.all(errors < 0.02 * expected)
    # the walks: variances v_k, of relative error sqrt(2 / n), and independent increments
    assert np.all(np.abs(walks[..., 0].var(0) / v[1:] - 1) < 4.5 * np.sqrt(2 / n))


def spline_chain():
    net = nets.MLP((8,), nn.tanh)
    spline = bijectors.univariate.rational_quadratic(4, 4.0)
    layer = bijectors.coupling(spline, net, split=0)
    return flows.step_chain(layer, STEPS, distributions.around_previous(1, 0.5)), layer


def drawn(shapes, scale, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: scale * rng.normal(size=leaf.shape), shapes)


def test_each_step_integrates_to_one_and_an_updated_density_is_the_recomputed_one(x64):
    """Of maps that draw nothing, given the past: the trapezoid rule with 4001 points on [-12, 12],
    to 1e-5, for every step; the update after step 1 against a fresh chain of the last two maps over
    the new base, to rounding, and at no more than a twentieth of the operations."""
    chain, layer = spline_chain()
    cond = np.array([[0.3, -1.0]])  # where it is, and how it came there
    x = np.linspace(-12, 12, 4001)
    grid = np.repeat(x[:, None, None], STEPS, axis=1)
    shapes = jax.eval_shape(chain.init, jax.random.key(0), grid, cond)
    params = drawn(shapes, 1.0)
    seen = distributions.around_previous(1, 0.1)  # the new base
    later = flows.step_chain(layer, STEPS - 1, seen)

    def fresh(params, points):
        rest = {"steps": jax.tree.map(lambda p: p[1:], params["steps"]), "base": {}}
        return later.log_prob(rest, jnp.stack([points] * 2, 1), cond)[:, 1]

    def update(kept):
        return flows.updated_log_prob(kept, 1, lambda y: seen.log_prob({}, y, cond))

    @jax.jit
    def run(params, grid):
        kept = chain.trace(params, grid[:, 0], STEPS, cond)
        return chain.log_prob(params, grid, cond), update(kept), fresh(params, grid[:, 0]), kept

    log_prob, updated, expected, kept = jax.device_get(run(params, grid))
    np.testing.assert_allclose(np.trapezoid(np.exp(log_prob), x, axis=0), 1, atol=1e-5)
    assert np.ptp(log_prob, axis=1).max() > 0.5  # the steps differ
    np.testing.assert_allclose(updated, expected, atol=1e-9)
    np.testing.assert_allclose(kept.points[-1], grid[:, 0])
    flops = [
        jax.jit(call).lower(*args).compile().cost_analysis()["flops"]
        for call, args in ((update, (kept,)), (fresh, (params, grid[:, 0])))
    ]
    assert 20 * flops[0] < flops[1], flops


def test_an_indexed_flow_is_normalized_whatever_its_posterior():
    """In one dimension with random networks: exp(elbo) over draws of u is an unbiased estimate of
    the density, so that its integral is 1 on average. 64 independent integrals of 201 points, each
    with 32 draws a point: their mean is 1 within 4.5 of its standard errors, which are below 0.02.
    The second moment of what is sampled is that of the integrals."""
    net = nets.MLP((8,), nn.tanh)
    affine = bijectors.univariate.affine()
    moved = bijectors.coupling(affine, net, split=0)
    own = flows.flow(bijectors.coupling(affine, net, split=0), distributions.normal((1,)))
    layer = bijectors.indexed(moved, own, own, (1,))
    model = flows.importance_weighted(flows.elbo_flow(layer, distributions.normal((1,))), 32)
    x, repeats, n = np.linspace(-12, 12, 201), 64, 20_000
    rows = np.repeat(x[:, None], repeats, axis=0).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), rows[:2])
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), drawn(shapes, 0.6))

    @jax.jit
    def run(params, rows):
        key_elbo, key_draw = jax.random.split(jax.random.key(0))
        return model.elbo(params, rows, key=key_elbo), model.sample(params, key_draw, n)

    elbo, sample = jax.device_get(run(params, rows))
    density = np.exp(elbo.astype(np.float64)).reshape(len(x), repeats)
    total, second = (np.trapezoid(density * f[:, None], x, axis=0) for f in (x**0, x**2))
    assert total.std() / np.sqrt(repeats) < 0.02
    assert abs(total.mean() - 1) < 4.5 * total.std() / np.sqrt(repeats)
    squares = np.square(sample[:, 0])
    error = np.hypot(squares.std() / np.sqrt(n), second.std() / np.sqrt(repeats))
    assert abs(squares.mean() - second.mean()) < 4.5 * error


def test_bad_steps():
    chain = flows.step_chain(bijectors.affine((1,)), 2, distributions.normal((1,)))
    x = jnp.zeros((3, 2, 1))
    params = chain.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"expected x of shape \[b, 2, \*event\], got \[3, 4, 1\]"):
        chain.log_prob(params, jnp.zeros((3, 4, 1)))
    with pytest.raises(ValueError, match="expected a step of 1 to 2, got 3"):
        chain.trace(params, x[:, 0], 3)
    kept = chain.trace(params, x[:, 0], 2)
    with pytest.raises(ValueError, match="expected a step of 0 to 2, got 3"):
        flows.updated_log_prob(kept, 3, lambda y: y[:, 0])
    with pytest.raises(ValueError, match=r"expected log_density of shape \[3\], got \[3, 1\]"):
        flows.updated_log_prob(kept, 1, lambda y: y)
    with pytest.raises(TypeError, match="step_nll: expected a StepChain"):
        losses.step_nll(flows.real_nvp((1,), depth=1, hidden=(2,)))
