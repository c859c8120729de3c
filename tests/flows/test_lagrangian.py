"""The velocity of a time-conditioned flow, and the continuity equation that it satisfies."""

import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors, distributions, flows, losses, solvers

SMALL = {"hidden": (8,), "activation": nn.tanh, "standardize": False}


def test_density_and_velocity_satisfy_the_continuity_equation(x64):
    """d log p / dt + v . grad log p + div v = 0 in float64, to 1e-9, under another condition beside
    the time. The velocity, integrated, carries points from t=0 to t=1 with the change of log p, to
    the 1e-7 of 24 steps of Tsit5."""
    flow, rng = flows.real_nvp((2,), depth=3, **SMALL), np.random.default_rng(0)
    velocity = flows.lagrangian_velocity(flow)
    t, cond = rng.uniform(size=6), rng.normal(size=(6, 1))
    x = rng.normal(size=(6, 2))
    shapes = jax.eval_shape(velocity.init, jax.random.key(0), x, t, cond)
    params = jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape), shapes)

    def log_prob(x, t, c):
        told = {"t": t[None, None], "cond": c[None]}
        return flow.log_prob(params, x[None], told)[0]

    def v(x, t, c):
        return velocity.apply(params, x[None], t[None], c[None])[0]

    def terms(x, t, c):
        slope, rate = jax.grad(log_prob, (0, 1))(x, t, c)
        jacobian = jax.jacfwd(v)(x, t, c)
        return rate, v(x, t, c) @ slope, jnp.trace(jacobian)

    @jax.jit
    def run(x, t, cond):
        found = jax.vmap(terms)(x, t, cond)
        method = solvers.fixed(24, diffrax.Tsit5())
        end, log_det, _ = solvers.sample_with_log_det(velocity, params, x, cond, method=method)
        ends = [
            flow.log_prob(params, at, {"t": jnp.full((6, 1), when), "cond": cond})
            for at, when in ((x, 0.0), (end, 1.0))
        ]
        return found, (ends[1] - ends[0], -log_det)

    found, moved = jax.device_get(run(x, t, cond))
    assert all(np.max(np.abs(term)) > 0.1 for term in found)  # nothing is zero by itself
    np.testing.assert_allclose(sum(found), 0, atol=1e-9)
    np.testing.assert_allclose(*moved, atol=1e-7)


def test_the_velocity_through_the_kernel_of_a_spline_is_that_of_differences(x64):
    """The central difference of x = F(z, t) in t, of error h^2."""
    flow, rng, h = (
        flows.neural_spline((2,), depth=1, bins=2, **SMALL),
        np.random.default_rng(0),
        1e-4,
    )
    z, t = rng.normal(size=(4, 2)), rng.uniform(size=4)
    shapes = jax.eval_shape(flow.init, jax.random.key(0), z, t[:, None])
    params = jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape), shapes)

    @jax.jit
    def run(z, t):
        before, x, after = jax.lax.map(
            lambda step: flow.forward(params, z, (t + step)[:, None])[0], jnp.array([-h, 0, h])
        )
        return (after - before) / (2 * h), flows.lagrangian_velocity(flow).apply(params, x, t)

    expected, v = jax.device_get(run(z, t))
    assert np.max(np.abs(v)) > 0.1
    np.testing.assert_allclose(v, expected, atol=1e-6)


def test_the_kinetic_energy_of_a_growing_ball():
    """x = e^(a t) z has v = a x, and E|v|^2 = 2 a^2 e^(2 a t) in two dimensions, with a standard
    deviation of as much: at t = 1/2, 4096 draws, within 4.5 standard errors."""
    moving = bijectors.amortized(bijectors.affine((2,)))
    flow, a = flows.flow(moving, distributions.normal((2,))), 0.8
    zero = {"log_scale": np.zeros(2, np.float32), "shift": np.zeros(2, np.float32)}
    kernel = {"log_scale": np.full((1, 2), a, np.float32), "shift": np.zeros((1, 2), np.float32)}
    params = {"bijector": {"net": {}, "kernel": kernel, "bias": zero}, "base": {}}
    half = lambda key, n: jnp.full(n, 0.5)  # noqa: E731
    loss = losses.kinetic_energy(flow, 0.1, draws=4096, time=half)
    batch = {"x": np.zeros((1, 2), np.float32)}
    value, metrics = jax.device_get(jax.jit(loss)(params, jax.random.key(0), batch))
    expected = 2 * a**2 * np.exp(a)
    assert abs(metrics["energy"] - expected) < 4.5 * expected / 64
    np.testing.assert_allclose(value, 0.1 * metrics["energy"], rtol=1e-6)


def test_bad_arguments():
    flow = flows.real_nvp((2,), depth=1, hidden=(2,))
    with pytest.raises(TypeError, match="lagrangian_velocity: expected a Flow"):
        flows.lagrangian_velocity(distributions.normal((2,)))
    with pytest.raises(ValueError, match="one time a row of x"):
        velocity = flows.lagrangian_velocity(flow)
        velocity.init(jax.random.key(0), jnp.zeros((2, 2)), jnp.zeros(3))
    with pytest.raises(ValueError, match="kinetic_energy: expected a finite scale >= 0"):
        losses.kinetic_energy(flow, -1.0)
    with pytest.raises(ValueError, match="kinetic_energy: expected draws"):
        losses.kinetic_energy(flow, draws=0)
