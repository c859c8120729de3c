"""BOSS: the dynamic programme against brute force, its costs against closed forms, and the flow
made straight at its times."""

import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_maps import silent_leaves

import jflow
from jflow import losses, nets, oracles, paths, solvers, times
from jflow.types import Velocity

GAUSSIAN = oracles.gaussian([2.0, -1.0], [0.25, 4.0])
MIXTURE = oracles.mixture([0.4, 0.6], [[-2.0, 0.0], [1.5, 1.0]], 0.05)
EULER = diffrax.Euler()
GRID = np.asarray([0.0, 0.2, 0.7, 1.0])


def field(f):
    return Velocity(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: f(x, t))


def noise(n, d=2, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, d)), float)


def solution(velocity, x0, times):
    """Trajectories [b, K + 1, d] at the times, by four steps of Tsit5 within each gap."""

    def gap(x, ends):
        grid = ends[0] + (ends[1] - ends[0]) * jnp.linspace(0, 1, 5)
        x, _ = solvers.sample(velocity, {}, x, method=solvers.on_grid(grid, diffrax.Tsit5()))
        return x, x

    times = jnp.asarray(times, x0.dtype)
    _, states = jax.jit(lambda x: jax.lax.scan(gap, x, jnp.stack([times[:-1], times[1:]], axis=1)))(
        x0
    )
    return jnp.concatenate([x0[:, None], jnp.moveaxis(states, 0, 1)], axis=1)


@pytest.mark.parametrize("last", [1, 2, 7])
def test_the_programme_finds_what_brute_force_finds(last):
    costs = np.random.default_rng(last).exponential(size=(last + 1, last + 1)) ** 2
    price = lambda way: sum(costs[i, j] for i, j in itertools.pairwise(way))  # noqa: E731
    for steps in range(1, last + 1):
        ways = [
            (0, *between, last) for between in itertools.combinations(range(1, last), steps - 1)
        ]
        way = solvers.bellman(costs, steps)
        assert (
            way[0] == 0 and way[-1] == last and len(way) == steps + 1 and np.all(np.diff(way) > 0)
        )
        np.testing.assert_allclose(price(way), min(map(price, ways)), rtol=1e-12)
    np.testing.assert_array_equal(solvers.bellman(costs, last), np.arange(last + 1))


def test_costs_are_those_of_single_euler_steps(x64):
    times = np.asarray([0.0, 0.1, 0.4, 1.0])
    x = solution(oracles.as_velocity(GAUSSIAN), noise(6), times)
    costs = jax.jit(lambda x: solvers.step_costs(oracles.as_velocity(GAUSSIAN), {}, x, times))(x)
    expected = np.full((4, 4), np.inf)
    for i, j in itertools.combinations(range(4), 2):
        step = x[:, i] + (times[j] - times[i]) * GAUSSIAN.velocity(x[:, i], times[i])
        expected[i, j] = np.mean((step - GAUSSIAN.flow_map(x[:, 0], 0.0, times[j])) ** 2)
    np.testing.assert_allclose(costs, expected, rtol=1e-6)


def test_costs_of_the_event_repeated_and_of_conditions(x64):
    """A mean over the event: [x, x] costs what x does. cond goes with the rows."""
    times, x = np.linspace(0, 1, 5), noise(6, 5).reshape(3, 5, 2)
    bend = field(lambda x, t: jnp.sin(x + t[:, None]))
    costs = solvers.step_costs(bend, {}, x, times)
    np.testing.assert_allclose(
        solvers.step_costs(bend, {}, jnp.concatenate([x, x], -1), times), costs, rtol=1e-12
    )
    scaled = Velocity(
        None, lambda params, x, t, cond=None, *, key=None: cond[:, None] * jnp.sin(x + t[:, None])
    )
    np.testing.assert_allclose(
        solvers.step_costs(scaled, {}, x, times, jnp.ones(3)), costs, rtol=1e-12
    )
    some = solvers.step_costs(scaled, {}, x, times, jnp.asarray([1.0, 2.0, 3.0]))
    assert not np.allclose(some[0, 1:], costs[0, 1:], rtol=1e-2)


def test_a_straight_flow_costs_nothing_and_a_bent_one_the_fourth_power_of_a_step(x64):
    times = np.linspace(0, 1, 4)
    x = noise(5)[:, None] + jnp.asarray(times)[None, :, None] * 0.7
    costs = solvers.step_costs(field(lambda x, t: jnp.full_like(x, 0.7)), {}, x, times)
    assert np.all(costs[np.triu_indices(4, 1)] < 1e-28)
    first = []
    for n in (50, 100):
        times = np.linspace(0, 1, n + 1)
        x = solution(oracles.as_velocity(MIXTURE), noise(64), times)
        costs = solvers.step_costs(oracles.as_velocity(MIXTURE), {}, x, times)
        first.append(float(np.mean(np.diag(costs, 1))))
    np.testing.assert_allclose(
        np.log2(first[0] / first[1]), 4, atol=0.2
    )  # squares of errors of second order


def test_its_grids_beat_equal_steps():
    """On the exact field of two Gaussians, on rows that the programme has not seen."""
    velocity, times = oracles.as_velocity(MIXTURE), np.linspace(0, 1, 51)
    costs = solvers.step_costs(velocity, {}, solution(velocity, noise(256), times), times)
    x0 = noise(1024, seed=1)
    exact = solution(velocity, x0, times)[:, -1]
    run = jax.jit(
        lambda x, grid: solvers.sample(velocity, {}, x, method=solvers.on_grid(grid, EULER))[0]
    )
    for steps in (4, 6, 10):
        grids = {
            "boss": times[solvers.bellman(costs, steps)],
            "equal": solvers.grids.uniform(steps),
        }
        miss = {
            name: float(jnp.sqrt(jnp.mean((run(x0, grid) - exact) ** 2)))
            for name, grid in grids.items()
        }
        assert miss["boss"] < miss["equal"], (steps, miss)


def test_the_straight_velocity_has_no_residual_and_lands_exactly(x64):
    """The exact average velocity of each segment, at its start: a Gaussian's in closed form, a
    mixture's by its map."""

    def of(average):
        def apply(params, x, t, cond=None, *, key=None):
            k = jnp.clip(jnp.searchsorted(jnp.asarray(GRID), t, side="right") - 1, 0, 2)
            return average(x, t, jnp.asarray(GRID)[k + 1])

        return Velocity(lambda *args: {}, apply)

    def by_map(x, t, r):
        return (oracles.mixture_flow_map(MIXTURE, x, t, r) - x) / (r - t)[:, None]

    for oracle, velocity in ((GAUSSIAN, of(GAUSSIAN.average_velocity)), (MIXTURE, of(by_map))):
        x0 = noise(16)
        maps = (
            oracle.flow_map
            if oracle is GAUSSIAN
            else lambda x, t, r: oracles.mixture_flow_map(MIXTURE, x, t, r)
        )
        x = jnp.stack([x0, *(maps(x0, jnp.zeros(16), jnp.full(16, t)) for t in GRID[1:])], axis=1)
        moved = Velocity(
            lambda *args: {},
            lambda p, x, t, cond=None, *, key=None, v=velocity: v.apply({}, x, t) + p,
        )
        run = jax.jit(losses.boss(moved, GRID))
        value, metrics = run(0.0, jax.random.key(0), {"x": x})
        assert metrics["residual"] < 1e-14 and value == metrics["residual"]
        y, _ = jax.jit(
            lambda x, v=velocity: solvers.sample(v, {}, x, method=solvers.on_grid(GRID, EULER))
        )(x0)
        np.testing.assert_allclose(y, x[:, -1], atol=1e-7)
        value, _ = run(0.1, jax.random.key(0), {"x": x})
        np.testing.assert_allclose(value, 0.01, rtol=1e-4)


def test_it_is_sequential_reflow_at_the_starts_and_a_mean_over_the_event(x64):
    x, key = noise(12, 4).reshape(6, 4, 2), jax.random.key(1)
    bend = field(lambda x, t: jnp.sin(x + t[:, None]))
    value, _ = losses.boss(bend, GRID)({}, key, {"x": x})
    path, time = paths.sequential_path(GRID), times.sequential(GRID, starts=1.0)
    np.testing.assert_allclose(
        losses.flow_matching(bend, path=path, time=time)({}, key, {"x": x})[0], value
    )
    twice, _ = losses.boss(bend, GRID)({}, key, {"x": jnp.concatenate([x, x], -1)})
    np.testing.assert_allclose(twice, value, rtol=1e-12)
    # one row alone, at the one time that it draws
    one, _ = losses.boss(bend, GRID)({}, key, {"x": x, "weight": jnp.eye(6)[2]})
    slopes = (x[2, 1:] - x[2, :-1]) / jnp.diff(jnp.asarray(GRID))[:, None]
    rows = [np.mean((np.sin(x[2, k] + GRID[k]) - slopes[k]) ** 2) for k in range(3)]
    assert np.min(np.abs(one - np.asarray(rows))) < 1e-12


def test_gradients_reach_every_parameter():
    velocity = jflow.velocity(nets.ResidualMLP(8, 1))
    x = noise(8, 4).reshape(4, 4, 2)
    params = jax.tree.map(
        lambda p: p + 0.1, jax.jit(velocity.init)(jax.random.key(0), x[:, 0], jnp.zeros(4))
    )
    loss = losses.boss(velocity, GRID)
    assert not silent_leaves(loss, params, {"x": x})


def test_bad_input():
    velocity, x = field(lambda x, t: x), jnp.zeros((3, 4, 2))
    with pytest.raises(ValueError, match="rise strictly from 0 to 1"):
        solvers.step_costs(velocity, {}, x, [0.0, 0.5, 0.5, 1.0])
    with pytest.raises(ValueError, match=r"shape \[b, 3, ...\], got \[3, 4, 2\]"):
        solvers.step_costs(velocity, {}, x, [0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="lead with 3 rows"):
        solvers.step_costs(velocity, {}, x, GRID, jnp.zeros(4))
    with pytest.raises(ValueError, match=r"\[K \+ 1, K \+ 1\], got \[2, 3\]"):
        solvers.bellman(np.zeros((2, 3)), 1)
    for steps in (0, 4, 1.5, True):
        with pytest.raises(ValueError, match="from 1 to 3"):
            solvers.bellman(np.zeros((4, 4)), steps)
    with pytest.raises(ValueError, match="finite"):
        solvers.bellman(np.full((3, 3), np.nan), 1)
    with pytest.raises(ValueError, match="rise strictly from 0 to 1"):
        losses.boss(velocity, [0.0, 0.5])
    with pytest.raises(ValueError, match="needs a key"):
        losses.boss(velocity, GRID)({}, None, {"x": x})
    with pytest.raises(ValueError, match=r"shape \[b, 4, ...\]"):
        losses.boss(velocity, GRID)({}, jax.random.key(0), {"x": x[:, :3]})
