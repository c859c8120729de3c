"""Searches at inference against laws that are known: order statistics, tilted Gaussians."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from keys import KEYS, keys_consumed_twice

from jflow import oracles, paths, solvers, steering
from jflow.paths import schedules
from jflow.types import Velocity

MEAN, VARIANCE = 0.5, 0.49
V = oracles.as_velocity(oracles.gaussian([MEAN], VARIANCE))
VP = schedules.cosine()
V_VP = paths.reschedule(V, paths.LINEAR, VP)
GRID = solvers.grids.uniform(12)
ALARM = 1e-4  # the false-alarm rate of each law, were the seed not fixed


def discrete_law(step, grid):
    """Mean and variance of what a step ends with: on a Gaussian its mean is affine in x."""
    mean, variance = 0.0, 1.0
    step = jax.jit(step)
    for ends in zip(grid[:-1], grid[1:], strict=True):
        _, image, std = step({}, jnp.array([[0.0], [1.0]]), *ends, None)
        start, slope = float(image[0, 0]), float(image[1, 0] - image[0, 0])
        mean, variance = start + slope * mean, slope**2 * variance + float(std[0]) ** 2
    return mean, variance


def noise(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 1)).astype(np.float32)


def is_normal(x, mean, variance):
    return scipy.stats.kstest(np.ravel(x), scipy.stats.norm(mean, variance**0.5).cdf).pvalue > ALARM


def test_best_of_n_has_the_law_of_the_largest():
    n = 8
    x0 = noise(4000 * n)
    x, info = jax.device_get(
        jax.jit(lambda x0: steering.best_of_n(V, {}, x0, lambda x: x[:, 0], n=n, method=20))(x0)
    )
    assert x.shape == (4000, 1) and np.all(info.evaluations == 40 * n)
    np.testing.assert_array_equal(info.reward, x[:, 0])
    law = scipy.stats.norm(MEAN, VARIANCE**0.5)
    assert scipy.stats.kstest(x[:, 0], lambda z: law.cdf(z) ** n).pvalue > ALARM
    whole, _ = solvers.sample(V, {}, x0, method=20)
    np.testing.assert_allclose(x[:, 0], np.asarray(whole).reshape(4000, n).max(1), atol=1e-6)


@pytest.mark.parametrize(
    "velocity, step, schedule",
    [
        (V, solvers.ancestral, paths.LINEAR),
        (V_VP, partial(solvers.ancestral, schedule=VP), VP),
        (V, lambda v: solvers.euler_maruyama(v, solvers.noises.of_sigma()), paths.LINEAR),
    ],
    ids=["ancestral", "variance preserving", "euler_maruyama"],
)
def test_searches_keep_the_marginals_and_particles_tilt_them(velocity, step, schedule):
    """A constant reward, and a quota of 1, leave the law of the plain sampler, whose mean m and
    variance s^2 on this grid are known exactly. A linear reward a x with temperature T tilts it to
    N(m + s^2 a / T, s^2): the mean of 8192 particles is that within 5 of its standard errors, which
    is twice that of as many independent draws at the most for these weights."""
    options = {"step": step, "schedule": schedule}
    x0, key = noise(8192), jax.random.key(1)

    @jax.jit
    def run(x0, key):
        keys = jax.random.split(key, 3)
        constant = lambda x: jnp.zeros(len(x))  # noqa: E731
        linear = lambda x: 2 * x[:, 0]  # noqa: E731
        return (
            steering.particle_search(
                velocity, {}, x0, keys[0], GRID, constant, particles=64, **options
            ),
            steering.rollover_search(velocity, {}, x0, keys[1], GRID, linear, quota=1, **options),
            steering.particle_search(
                velocity, {}, x0, keys[2], GRID, linear, particles=8192, temperature=2.0, **options
            ),
        )

    (plain, plain_info), (alone, alone_info), (tilted, info) = jax.device_get(run(x0, key))
    mean, variance = discrete_law(step(velocity), GRID)
    assert is_normal(plain, mean, variance) and is_normal(alone, mean, variance)
    assert np.all(plain_info.evaluations == 12) and np.all(alone_info.evaluations == 12)
    assert info.rewards.shape == (13, 8192)
    error = 2 * (variance / 8192) ** 0.5
    np.testing.assert_allclose(tilted.mean(), mean + variance, atol=5 * error)
    np.testing.assert_allclose(tilted.var(), variance, rtol=0.1)  # 5 sqrt(2 / 8192), 1.3 for ties
    np.testing.assert_allclose(np.sort(info.reward), np.sort(2 * tilted[:, 0]), rtol=1e-6)
    fine = discrete_law(step(velocity), solvers.grids.uniform(400))
    np.testing.assert_allclose(fine, [MEAN, VARIANCE], atol=0.02)  # of order 1 / 400


def test_rollover_spends_what_it_says_and_finds_more():
    """It counts its evaluations as they are made, never more than the quotas, fewer where it finds
    sooner, and its rewards exceed those of a quota of 1."""
    x0 = noise(256)
    reward = lambda x: -jnp.abs(x[:, 0] - 2.0)  # noqa: E731
    calls = []

    def counted(params, x, t, cond=None, *, key=None):
        jax.debug.callback(lambda: calls.append(1))
        return V.apply(params, x, t)

    run = jax.jit(
        lambda x0, key, quota: steering.rollover_search(
            Velocity(V.init, counted), {}, x0, key, GRID, reward, quota=quota
        ),
        static_argnums=2,
    )
    _, plain = jax.device_get(run(x0, jax.random.key(2), 1))
    calls.clear()
    _, found = jax.device_get(run(x0, jax.random.key(2), 6))
    jax.effects_barrier()
    most = 1 + 11 * 6
    assert found.evaluations.max() <= most and 12 <= found.evaluations.min()
    assert found.evaluations.mean() < 0.98 * most
    assert found.evaluations.max() <= len(calls) <= most + 11 * 11 * 6
    assert found.reward.mean() > plain.reward.mean() + 0.3  # an interquartile range is 0.9
    assert found.rewards.shape == (13, 256)


def test_rewards_of_minus_infinity_rule_particles_out():
    """Where all first predictions are ruled out, too: as by a very low reward, and in any units of
    reward and temperature, to the bit."""
    x0, key = noise(1000, seed=3), jax.random.key(4)

    @jax.jit
    def run(x0, key):
        def search(out, scale):
            reward = lambda x: jnp.where(x[:, 0] > 0.9, scale * x[:, 0], out)  # noqa: E731
            options = {"particles": 1000, "temperature": scale}
            return steering.particle_search(
                V, {}, x0, jax.random.clone(key), GRID, reward, **options
            )

        return search(-jnp.inf, 1.0), search(-jnp.inf, 0.125), search(-1000.0, 1.0)

    (x, info), (eighth, _), (low, _) = jax.device_get(run(x0, key))
    assert np.isneginf(info.rewards[0]).all() and np.all(x > 0.9)
    np.testing.assert_array_equal(x, eighth)
    np.testing.assert_array_equal(x, low)


def test_what_is_wrong_with_a_reward():
    x0, key = noise(6), jax.random.key(0)
    searches = {
        "best_of_n": lambda reward, x0=x0, n=3: steering.best_of_n(
            V, {}, x0, reward, n=n, method=2
        ),
        "particle_search": lambda reward, x0=x0, n=3: steering.particle_search(
            V, {}, x0, key, GRID[::6], reward, particles=n
        ),
        "rollover_search": lambda reward, x0=x0, n=3: steering.rollover_search(
            V, {}, x0, key, GRID[::6], reward, quota=n
        ),
    }
    bad = lambda x: jnp.where(jnp.arange(6) == 4, jnp.nan, x[:, 0])  # noqa: E731
    for name, search in searches.items():
        with pytest.raises(ValueError, match=f"{name}: expected reward.x1. .*6.*got"):
            search(lambda x: x)
        with pytest.raises(ValueError, match=f"{name}: .*got nan at step 0 of row 4"):
            search(bad)
        x, info = jax.device_get(jax.jit(lambda x0, search=search: search(bad, x0))(x0))
        rows = {"best_of_n": [1], "particle_search": [3, 4, 5], "rollover_search": [4]}[name]
        lost = np.isnan(x[:, 0])
        np.testing.assert_array_equal(np.flatnonzero(lost), rows)
        np.testing.assert_array_equal(np.isnan(info.reward), lost)
    for name in ("best_of_n", "particle_search"):
        with pytest.raises(ValueError, match=f"{name}: expected a number of rows .* 4, .* got 6"):
            searches[name](lambda x: x[:, 0], n=4)
    with pytest.raises(ValueError, match="temperature > 0"):
        steering.particle_search(
            V, {}, x0, key, GRID, lambda x: x[:, 0], particles=3, temperature=0.0
        )
    for name in ("particle_search", "rollover_search"):
        with pytest.raises(ValueError, match=f"{name}: expected x0 of a floating type, got int32"):
            searches[name](lambda x: x[:, 0], x0=jnp.zeros((6, 1), int))
    with pytest.raises(ValueError, match="expected times from 0 to 1, got 0 to 0.5"):
        steering.rollover_search(V, {}, x0, key, [0.0, 0.5], lambda x: x[:, 0], quota=1)
    with pytest.raises(ValueError, match="quota"):
        searches["rollover_search"](lambda x: x[:, 0], n=0)


def test_keys_are_consumed_once_and_types_are_kept():
    """Also of what samples larger images."""
    image = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: -x)
    grid, reward = GRID[::4], lambda x: jnp.mean(x.reshape(len(x), -1), axis=1)
    samplers = {
        "particle_search": lambda key, x0: steering.particle_search(
            image, {}, x0, key, grid, reward, particles=2
        ),
        "rollover_search": lambda key, x0: steering.rollover_search(
            image, {}, x0, key, grid, reward, quota=2
        ),
        "hiflow": lambda key, x0: steering.hiflow(image, {}, x0, key, grid, factor=2),
        "rectified_hr": lambda key, x0: steering.rectified_hr(
            [image] * 3, {}, x0, key, grid, sizes=[(6, 6), (8, 8)], times=[0.3, 0.6]
        ),
    }
    for name, sampler in samplers.items():
        x0 = jnp.zeros((4, 4, 4, 1))
        assert not keys_consumed_twice(lambda key, f=sampler, x0=x0: f(key, x0), KEYS[0]), name
        for dtype in (jnp.bfloat16, jnp.float64):
            with jax.enable_x64(True):
                made = jax.eval_shape(sampler, KEYS[0], jnp.zeros((4, 4, 4, 1), dtype))
            assert made[0].dtype == dtype, name
        with pytest.raises(ValueError, match="key"):
            sampler(None, x0)
