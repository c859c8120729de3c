"""Particles between two temperatures: symmetries, and free energies in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflow
from jflow import distributions, energy, flows, losses, nets
from jflow._core.linen import apply_linen, init_linen
from jflow.types import Velocity

N, D, T1, T2 = 4, 2, 1.0, 0.5
NET = nets.PairVelocity((8,), reach=4.0, radial_features=6)
LOG_RATIO = (N - 1) * D / 2 * np.log(T2 / T1)  # of the constants, by the (N - 1) D free directions


def springs(temperature):
    """Every pair by a spring of stiffness 1; sqrt(N) times the centroid is standard normal."""

    def log_density(x):
        center = jnp.mean(x, axis=1, keepdims=True)
        pairs = N * jnp.sum(jnp.square(x - center), axis=(1, 2))  # the sum over pairs
        return -0.5 * pairs / temperature - 0.5 * N * jnp.sum(jnp.square(center), axis=(1, 2))

    return log_density


def exact_draws(key, n):
    """Of the springs at T1."""
    x = jax.random.normal(key, (n, N, D))
    center = jnp.mean(x, axis=1, keepdims=True)
    return center + (x - center) * np.sqrt(T1 / N)


def shrink(params, x, t, cond=None, *, key=None):
    """The exact flow: a pair velocity of a constant phi."""
    rate = jnp.log(T2 / T1) / 2 + params
    return rate * (x - jnp.mean(x, axis=1, keepdims=True))


def random_params(scale=0.3):
    shapes = jax.eval_shape(
        lambda: init_linen(NET, jax.random.key(0), jnp.zeros((1, N, D)), jnp.zeros(1))
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(scale * rng.normal(size=s.shape), s.dtype), shapes)


BASE = distributions.normal((N, D))
FLOW = flows.cnf(jflow.velocity(NET), BASE, method=4)


def test_symmetries_of_the_velocity_and_of_the_density():
    """A permutation, a rotation with a reflection and a translation of x: the velocity follows,
    and the log-density changes by that of the centroid alone. float32: 1e-5 and 1e-4."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(3, N, D)) * 1.5, jnp.float32)
    order, angle = np.array([2, 0, 3, 1]), 0.7
    turn = jnp.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), -np.cos(angle)]], jnp.float32)
    move = jnp.array([0.5, -2.0], jnp.float32)
    params, t = random_params(), jnp.array([0.1, 0.5, 0.9])

    @jax.jit
    def run(x):
        v = apply_linen(NET, params, x, t)
        return v, FLOW.log_prob({"velocity": params, "base": {}}, x)

    v, log_prob = run(x)
    assert np.std(v) > 0.1
    np.testing.assert_allclose(np.sum(v, axis=1), 0, atol=1e-5)  # the centroid stays
    for of_x, of_v in (
        (x[:, order], v[:, order]),
        (x @ turn, v @ turn),
        (x + move[None, None], v),
    ):
        moved, log_moved = run(of_x)
        np.testing.assert_allclose(moved, of_v, atol=1e-5)
        centroid = lambda x: -0.5 * N * np.sum(np.mean(np.asarray(x), axis=1) ** 2, axis=-1)  # noqa: E731
        np.testing.assert_allclose(log_moved - centroid(of_x), log_prob - centroid(x), atol=2e-4)


def test_the_exact_map_has_the_free_energy_on_every_row(x64):
    """And no gradient; from T1 to T2, with the centroid's law the same at both."""
    velocity = Velocity(lambda *_: 0.0, shrink)
    flow = flows.cnf(velocity, BASE, method=16)
    x = exact_draws(jax.random.key(0), 32)
    loss = losses.transfer(flow, springs(T1), springs(T2))

    @jax.jit
    def run(off):
        params = {"velocity": off, "base": {}}
        _, log_w = energy.transfer_weights(flow, params, x, springs(T1), springs(T2))
        value, slope = jax.value_and_grad(
            lambda p: loss({"velocity": p, "base": {}}, None, {"x": x})[0]
        )(off)
        return log_w, value, slope

    log_w, value, slope = run(0.0)
    np.testing.assert_allclose(log_w, LOG_RATIO, atol=1e-8)
    np.testing.assert_allclose(value, -LOG_RATIO, atol=1e-8)
    log_w, value, slope = run(0.3)
    assert np.std(log_w) > 0.1 and slope > 0 and value > -LOG_RATIO


def test_any_map_has_the_free_energy_in_the_mean():
    """E[w] = Z2 / Z1 for a random network, within 4 standard errors, which are below 5%."""
    params = {"velocity": random_params(0.1), "base": {}}

    @jax.jit
    def run(key):
        x = exact_draws(key, 2000)
        return energy.transfer_weights(FLOW, params, x, springs(T1), springs(T2))[1]

    w = np.exp(np.asarray(jax.device_get(run(jax.random.key(0))), np.float64) - LOG_RATIO)
    error = np.std(w) / np.sqrt(len(w))
    assert 1e-4 < error < 0.05 and abs(np.mean(w) - 1) < 4 * error


def test_particles_at_one_place_and_bad_input():
    """Two particles at one place have a finite gradient, and no force."""
    x = jnp.zeros((1, N, D))
    slope = jax.grad(
        lambda x: jnp.sum(jnp.square(apply_linen(NET, random_params(), x, jnp.zeros(1)) + 1))
    )(x)
    assert np.all(np.isfinite(slope))
    with pytest.raises(ValueError, match="expected reach > 0, got 0"):
        nets.PairVelocity(reach=0)
    with pytest.raises(ValueError, match="at least one hidden width"):
        nets.PairVelocity(())
    with pytest.raises(ValueError, match="radial_features to be a whole number of at least 2"):
        nets.PairVelocity(radial_features=1)
    with pytest.raises(ValueError, match=r"x of shape \[b, n, d\], got \[1, 4\]"):
        apply_linen(NET, random_params(), jnp.zeros((1, 4)), jnp.zeros(1))
    with pytest.raises(TypeError, match="transfer: expected a Bijector or a Flow"):
        losses.transfer(BASE, springs(T1), springs(T2))
    with pytest.raises(ValueError, match=r"onto of shape \[2\], got \[\]"):
        losses.transfer(FLOW, springs(T1), jnp.sum)(
            {"velocity": random_params(), "base": {}}, None, {"x": jnp.ones((2, N, D))}
        )
