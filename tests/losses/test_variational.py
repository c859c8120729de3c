"""Variational inference: the evidence lower bound where it is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import flows, losses

LOG_Z = 1.7  # of the unnormalized targets below


def fit(flow, loss, batch, steps=300, rate=0.03):
    params = flow.init(
        jax.random.key(0), jnp.zeros((4, 2)), jax.tree.map(lambda c: c[:4], batch.get("cond"))
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def run(params):
        def step(carry, key):
            params, state = carry
            (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, key, batch)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), metrics["elbo"]

        return jax.lax.scan(
            step, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), steps)
        )

    (params, _), elbos = run(params)
    return params, elbos


def gaussian(mean, std):
    """log of e^LOG_Z N(x; mean, diag std^2)."""
    return lambda x: (
        LOG_Z
        + jnp.sum(
            -0.5 * jnp.square((x - mean) / std) - jnp.log(std) - 0.5 * jnp.log(2 * jnp.pi), axis=-1
        )
    )


def test_the_bound_of_the_target_itself_is_log_z_for_every_draw(x64):
    """q = p: log q - log p~ is -log Z without any noise."""
    mean, std = jnp.array([[1.0, -2.0]]), jnp.array([[0.5, 3.0]])
    flow = flows.planar((2,), depth=0, standardize=False)
    params = flow.init(jax.random.key(0), jnp.zeros((2, 2)))
    params["bijector"]["bias"]["0"] = {"shift": mean[0], "log_scale": jnp.log(std[0])}
    for draws in (1, 7):
        value, metrics = losses.reverse_kl(flow, gaussian(mean, std), draws=draws)(
            params, jax.random.key(draws), {}
        )
        np.testing.assert_allclose(value, -LOG_Z, atol=1e-12)
        np.testing.assert_allclose(metrics["elbo"], LOG_Z, atol=1e-12)


def test_the_bound_is_log_z_minus_the_divergence():
    """KL(N(0, I), N(m, s^2)) in closed form; 1e5 draws, 4 standard errors of a deviation below
    3."""
    mean, std = np.array([[1.0, -0.5]]), np.array([[1.5, 2.0]])
    flow = flows.planar((2,), depth=0)
    params = flow.init(jax.random.key(0), jnp.zeros((2, 2)))
    loss = losses.reverse_kl(
        flow, gaussian(jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)), draws=100_000
    )
    kl = np.sum(np.log(std) + (1 + mean**2) / (2 * std**2) - 0.5)
    assert (
        abs(jax.jit(loss)(params, jax.random.key(0), {})[0] - (kl - LOG_Z)) < 4 * 3 / 100_000**0.5
    )


def banana(x):
    """Unnormalized, log Z = LOG_Z: x0 ~ N(0, 2^2), x1 given x0 ~ N(x0^2 / 4 - 1, 0.5^2)."""
    first = -0.5 * jnp.square(x[:, 0] / 2) - jnp.log(2)
    second = -0.5 * jnp.square((x[:, 1] - jnp.square(x[:, 0]) / 4 + 1) / 0.5) - jnp.log(0.5)
    return LOG_Z + first + second - jnp.log(2 * jnp.pi)


def test_a_planar_posterior_beats_mean_field_on_a_banana():
    """Both stay below log Z; the last 50 of 300 steps of 128 draws, whose mean has a standard error
    below 0.02."""
    bounds = {}
    for depth in (0, 8):
        flow = flows.planar((2,), depth=depth)
        _, elbos = fit(flow, losses.reverse_kl(flow, banana, draws=128), {})
        bounds[depth] = np.mean(elbos[-50:])
    assert bounds[0] < bounds[8] - 0.3 and bounds[8] < LOG_Z + 0.02


def test_an_amortised_posterior_follows_its_condition():
    """p(x | c) = N(A c, s^2), so that the mean is linear in c; the bound of log Z is nearly
    reached."""
    a, std = jnp.array([[1.0, 0.5], [-1.0, 2.0]]), jnp.array([[0.5, 0.8]])
    cond = jnp.asarray(np.random.default_rng(0).normal(size=(64, 2)), jnp.float32)
    flow = flows.planar((2,), depth=1, hidden=(16,))
    loss = losses.reverse_kl(flow, lambda x, c: gaussian(c @ a, std)(x), draws=2)
    params, elbos = fit(flow, loss, {"cond": cond})
    assert LOG_Z - 0.15 < np.mean(elbos[-50:]) < LOG_Z + 0.02
    at = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
    means = [
        np.mean(flow.sample(params, jax.random.key(0), 2000, jnp.repeat(c[None], 2000, 0)), 0)
        for c in at
    ]
    np.testing.assert_allclose(means, a, atol=0.3)


def test_bad_input_is_an_error():
    flow = flows.planar((2,), depth=1)
    params = flow.init(jax.random.key(0), jnp.zeros((2, 2)))
    loss = losses.reverse_kl(flow, banana)
    with pytest.raises(ValueError, match="draws to be a whole number of at least 1, got 0"):
        losses.reverse_kl(flow, banana, draws=0)
    with pytest.raises(ValueError, match="needs a key"):
        loss(params, None, {})
    with pytest.raises(ValueError, match=r"unknown keys in batch: \['x'\]"):
        loss(params, jax.random.key(0), {"x": jnp.zeros((2, 2))})
    with pytest.raises(
        ValueError, match=r"log_density of shape \[256\], got \[\]: a number for each row"
    ):
        losses.reverse_kl(flow, lambda x: jnp.sum(banana(x)))(params, jax.random.key(0), {})
