"""Densities of times: unbiased whatever they are, and of less variance where they follow the
integrand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from jflow import losses
from jflow.paths._affine import LINEAR, Schedule, velocity_to_noise

TRIG = Schedule(alpha=lambda t: jnp.sin(jnp.pi / 2 * t), sigma=lambda t: jnp.cos(jnp.pi / 2 * t))


def uniform(t0, t1):
    return losses.Importance(jnp.asarray([t0, t1], float), jnp.ones(1, float))


def estimates(importance, f, n=20_000):
    t, weight = losses.draw_times(importance, jax.random.uniform(jax.random.key(0), (n,), float))
    return np.asarray(f(t) * weight, np.float64)


@pytest.mark.parametrize("schedule", [LINEAR, TRIG], ids=["linear", "trigonometric"])
def test_weight_is_half_the_rate_of_log_snr_on_the_noise(schedule, x64):
    """w |v - u|^2 dt = |x0 - x0_v|^2 d log-SNR / 2, x0 by the path's own conversion."""
    t = jnp.linspace(0.05, 0.95, 7)
    x, u, v = (jnp.asarray(np.random.default_rng(i).normal(size=(7, 3))) for i in range(3))
    noise_error = velocity_to_noise(u, x, t, schedule) - velocity_to_noise(v, x, t, schedule)
    rate = jax.vmap(jax.grad(lambda t: 2 * jnp.log(schedule.alpha(t) / schedule.sigma(t))))(t)
    expected = 0.5 * rate * jnp.sum(noise_error**2, axis=1)
    found = losses.likelihood_weight(schedule, t) * jnp.sum((v - u) ** 2, axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("schedule", [LINEAR, TRIG], ids=["linear", "trigonometric"])
def test_unbiased_and_of_less_variance(schedule, x64):
    """int w(t) (1 + t) dt over [0, 0.99], within 4 standard errors; the designed density has a
    small part of the variance (measured: 307 and 0.43, 52 and 0.12)."""

    def integrand(t):
        return losses.likelihood_weight(schedule, t) * (1 + t)

    exact = scipy.integrate.quad(
        lambda t: float(integrand(jnp.asarray([t]))[0]), 0, 0.99, epsrel=1e-6
    )[0]
    spread = []
    for importance in (uniform(0, 0.99), losses.likelihood_importance(schedule, 0, 0.99)):
        values = estimates(importance, integrand)
        assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(len(values))
        spread.append(values.var())
    assert spread[1] < spread[0] / 20


def test_shares_of_the_linear_path(x64):
    """At the edges of the cells, the share of times before t is (-log(1 - t) - t) over its value at
    t1."""
    u = jnp.linspace(0, 1, 65)
    t, _ = losses.draw_times(losses.likelihood_importance(t1=0.999, cells=64), u)
    share = -np.log1p(-np.asarray(t)) - np.asarray(t)
    np.testing.assert_allclose(share / (-np.log(0.001) - 0.999), u, atol=1e-4)  # 4096 trapezoids
    assert t[0] == 0 and t[-1] == pytest.approx(0.999) and np.all(np.diff(t) > 0)


def test_the_density_is_that_of_the_weights(x64):
    """A histogram of 100,000 times against width / weight in each cell, within 4 standard
    errors."""
    rng = np.random.default_rng(0)
    edges = np.concatenate([[0.1], 0.1 + np.cumsum(rng.uniform(0.02, 0.2, size=6))])
    importance = losses.Importance(jnp.asarray(edges), jnp.asarray(rng.uniform(0.1, 2, size=6)))
    t, weight = losses.draw_times(
        importance, jax.random.uniform(jax.random.key(0), (100_000,), float)
    )
    counts = np.histogram(t, edges)[0] / 1e5
    assert counts.sum() == pytest.approx(1, abs=1e-12)  # no time lies outside
    mass = np.asarray(importance.size) * np.diff(edges)
    mass /= mass.sum()
    np.testing.assert_allclose(counts, mass, atol=4 * np.sqrt(0.25 / 1e5))
    cell = np.searchsorted(edges, t, side="right") - 1
    np.testing.assert_allclose(weight, (np.diff(edges) / mass)[cell], rtol=1e-12)


def test_a_learned_density_reaches_the_least_variance(x64):
    """For f = 1 / sqrt(t) on [0.01, 1], from the uniform density: sizes become the cells' root mean
    squares."""

    def f(t):
        return (
            1 / jnp.sqrt(t) * jnp.where(jnp.arange(t.shape[0]) % 2 == 0, 1.5, 0.5)
        )  # rows differ at one time

    edges = jnp.linspace(0.01, 1, 17)
    start = losses.Importance(edges, jnp.ones(16))

    @jax.jit
    def learn(importance, key):
        t, _ = losses.draw_times(importance, jax.random.uniform(key, (512,)))
        return losses.learn_importance(importance, t, 1e3 * f(t), decay=0.9)

    importance = start
    for key in jax.random.split(jax.random.key(0), 60):
        importance = learn(importance, key)
    # E f^2 = 1.25 / t: the root of its mean over each cell, up to one factor
    ideal = np.sqrt(np.log(np.asarray(edges[1:] / edges[:-1])) / np.diff(edges))
    ratio = np.asarray(importance.size) / ideal
    np.testing.assert_allclose(
        ratio / ratio.mean(), 1, atol=0.1
    )  # an average over about 10 batches of 512
    assert 0.2 < importance.size.mean() < 5  # on the scale it started from
    assert estimates(importance, f).var() < 0.9 * estimates(start, f).var()
    # nothing seen, nothing changed; what is 0 keeps the floor
    same = losses.learn_importance(importance, jnp.zeros(0), jnp.zeros(0))
    np.testing.assert_array_equal(same.size, importance.size)
    late = jnp.where(jnp.arange(64) < 32, 0.0, 1.0)
    low = losses.learn_importance(start, jnp.linspace(0.02, 0.99, 64), late, decay=0.0)
    # half of the time at 0 and half at sqrt(2), of which the floor is a tenth of the mean
    np.testing.assert_allclose(low.size[:7], 0.1 * np.sqrt(2) / 2, rtol=0.05)


def test_errors():
    for how in ({"t0": 0.5, "t1": 0.5}, {"t1": 1.5}, {"cells": 0}):
        with pytest.raises(ValueError, match="0 <= t0 < t1 <= 1 and cells"):
            losses.likelihood_importance(**how)
    with pytest.raises(ValueError, match="diverges where sigma = 0: end before"):
        losses.likelihood_importance(t1=1.0)
