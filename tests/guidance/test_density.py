"""Density guidance against the exact log-densities of a Gaussian and a mixture."""

from statistics import NormalDist

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import guidance, oracles, paths, solvers

MEANS = [[2.0, 0.0], [-1.0, 1.5], [0.5, -2.0]]
COSINE = paths.Schedule(lambda t: jnp.sin(jnp.pi * t / 2), lambda t: jnp.cos(jnp.pi * t / 2))


def mixture(schedule=paths.LINEAR):
    return oracles.mixture([0.5, 0.3, 0.2], MEANS, [0.25, 0.1, 0.4], schedule)


def along(oracle, velocity, x, t):
    """d/dt log p_t(x_t) on a path that moves with the velocity: one forward derivative of the exact
    log-density."""
    rate = lambda x, t: jax.jvp(  # noqa: E731
        oracle.log_density, (x, t), (velocity.apply({}, x, t), jnp.ones_like(t))
    )[1]
    return jax.jit(rate)(x, t)


def draw(n=32):
    keys = jax.random.split(jax.random.key(0))
    return 2 * jax.random.normal(keys[0], (n, 2)), jax.random.uniform(
        keys[1], (n,), minval=0.05, maxval=0.95
    )


@pytest.mark.parametrize("schedule", [paths.LINEAR, COSINE])
def test_the_rate_is_the_prescribed_one_everywhere(x64, schedule):
    oracle = mixture(schedule)
    velocity = oracles.as_velocity(oracle)
    x, t = draw()
    rate = lambda x, t: 3 * t - x[:, 0]  # noqa: E731
    guided = guidance.density(velocity, guidance.constant_rate(rate), schedule=schedule)
    np.testing.assert_allclose(along(oracle, guided, x, t), rate(x, t), atol=1e-8)
    plain = along(oracle, velocity, x, t)
    dense = along(
        oracle,
        guidance.density(velocity, guidance.quantile(0.9, schedule=schedule), schedule=schedule),
        x,
        t,
    )
    log_ratio = lambda t: jnp.log(schedule.alpha(t) / schedule.sigma(t))  # noqa: E731
    slope = jax.jvp(log_ratio, (t,), (jnp.ones_like(t),))[1]
    np.testing.assert_allclose(
        dense - plain, 2 * NormalDist().inv_cdf(0.9) * slope, atol=1e-8
    )  # sqrt(2 d) = 2


def test_quantile_multiplies_the_score(x64):
    """The form of the paper: f x + c eta score, eta = 1 + sqrt(2 d) Phi^-1(q) / |sigma score|^2."""
    oracle = mixture()
    x, t = draw()
    score = oracle.score(x, t)
    eta = 1 + 2 * NormalDist().inv_cdf(0.3) / jnp.sum(((1 - t)[:, None] * score) ** 2, axis=1)
    expected = paths.score_to_velocity(eta[:, None] * score, x, t)
    got = guidance.density(oracles.as_velocity(oracle), guidance.quantile(0.3)).apply({}, x, t)
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    half = guidance.density(oracles.as_velocity(oracle), guidance.quantile(0.5)).apply({}, x, t)
    np.testing.assert_array_equal(half, oracle.velocity(x, t))


@pytest.mark.parametrize("rate", [-2.0, 1.0])
def test_the_log_density_of_solved_samples(x64, rate):
    """Of a Gaussian, from t = 0.1 to 0.9: log p moves by 0.8 rate, to the tolerance of the
    solve."""
    oracle = oracles.gaussian([1.0, -1.0, 0.5], [0.5, 1.0, 2.0])
    x = 2 + oracle.flow_map(
        jax.random.normal(jax.random.key(1), (8, 3)), 0.0, 0.1
    )  # away from the mode
    guided = guidance.density(oracles.as_velocity(oracle), guidance.constant_rate(rate))
    x1, info = solvers.sample(
        guided,
        {},
        x,
        method=solvers.adaptive(diffrax.Dopri5(), rtol=1e-9, atol=1e-9),
        t0=0.1,
        t1=0.9,
    )
    assert not np.any(info.status)
    np.testing.assert_allclose(
        oracle.log_density(x1, 0.9) - oracle.log_density(x, 0.1), 0.8 * rate, atol=1e-7
    )


def test_every_stochastic_path_has_the_prescribed_log_density(x64):
    """The error after a fixed time falls as 1 / n, on the paths and not in the mean; the paths
    differ."""
    oracle, rate = mixture(), -1.0
    x = jnp.tile(oracle.sample(jax.random.key(2), 16) + 1.0, (2, 1))  # every row twice
    start = oracle.log_density(x, 0.2)
    step = guidance.density_step(
        oracles.as_velocity(oracle), guidance.constant_rate(rate), lambda t: 0.1 * (1 - t)
    )
    errors = []
    for n in (64, 256, 1024):
        grid = np.linspace(0.2, 0.7, n + 1)
        end, _ = jax.jit(
            lambda x, grid=grid: solvers.sample_sde(step, {}, x, jax.random.key(3), grid)
        )(x)
        error = oracle.log_density(end, 0.7) - start - 0.5 * rate
        errors.append(float(jnp.sqrt(jnp.mean(error**2))))
    orders = np.log(np.asarray(errors[:-1]) / errors[1:]) / np.log(4)
    assert np.all(orders > 0.8) and errors[-1] < 5e-3, (orders, errors)
    apart = jnp.linalg.norm(end[:16] - end[16:], axis=1)
    assert float(jnp.median(apart)) > 0.1


def test_a_step_is_the_ode_s_and_noise_along_the_level_sets(x64):
    oracle = mixture()
    velocity, excess = oracles.as_velocity(oracle), guidance.quantile(0.7)
    x, t = draw()
    h = 1e-2
    still, _, std = guidance.density_step(velocity, excess, 0.0)({}, x, t, t + h, jax.random.key(0))
    np.testing.assert_allclose(
        still, x + h * guidance.density(velocity, excess).apply({}, x, t), atol=1e-10
    )
    np.testing.assert_array_equal(std, 0)
    x_next, mean, std = guidance.density_step(velocity, excess, 2.0)(
        {}, x, t, t + h, jax.random.key(0)
    )
    np.testing.assert_allclose(std, np.full(32, 0.2))
    noise, score = (x_next - mean) / std[:, None], oracle.score(x, t)
    np.testing.assert_allclose(
        jnp.sum(noise * score, axis=1) / jnp.linalg.norm(score, axis=1), 0, atol=1e-9
    )
    assert float(jnp.mean(noise**2)) > 0.2  # one of two directions is left
