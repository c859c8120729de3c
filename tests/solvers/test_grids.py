import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import oracles, solvers
from jflow.paths import LINEAR, Schedule, schedules
from jflow.solvers import grids

GRIDS = {
    "uniform": grids.uniform,
    "power": grids.power,
    "cosine": grids.cosine,
    "shifted": lambda n: grids.shifted(grids.uniform(n), 3.0),
    "edm": grids.edm,
    "edm cosine": lambda n: grids.edm(n, schedules.cosine()),
    "log_snr": grids.log_snr,
    "log_snr linear_vp": lambda n: grids.log_snr(n, schedules.linear_vp()),
}


@pytest.mark.parametrize("name", GRIDS)
def test_n_steps_are_n_plus_one_times_from_0_to_1(name):
    for n in (1, 2, 7):
        grid = GRIDS[name](n)
        assert grid.shape == (n + 1,) and grid.dtype == np.float64
        assert grid[0] == 0 and grid[-1] == 1 and np.all(np.diff(grid) > 0)
    again = jax.jit(lambda: jnp.asarray(GRIDS[name](4)))()  # a constant inside jit too
    np.testing.assert_allclose(again, GRIDS[name](4), rtol=1e-6)


def test_evaluations_are_the_steps_of_the_grid():
    v = oracles.as_velocity(oracles.gaussian([0.5], 0.3))
    for grid in (
        grids.edm(3),
        grids.shifted(grids.uniform(5), 2.0),
        [0.0, 0.3, 1.0],
    ):  # the last one "learned"
        _, info = solvers.sample(
            v, {}, jnp.zeros((1, 1)), method=solvers.on_grid(grid, solvers.ddim())
        )
        assert info.evaluations.tolist() == [len(grid) - 1]


def test_formulas():
    np.testing.assert_allclose(grids.power(4, 2.0), [0, 1 / 16, 1 / 4, 9 / 16, 1])
    np.testing.assert_allclose(grids.cosine(3), [0, 0.25, 0.75, 1])
    sigma = np.linspace(1, 0, 5)
    np.testing.assert_allclose(
        grids.shifted(grids.uniform(4), 3.0), 1 - 3 * sigma / (1 + 2 * sigma), rtol=1e-14
    )
    np.testing.assert_allclose(
        grids.shifted(grids.shifted(grids.cosine(4), 3.0), 1 / 3.0), grids.cosine(4), rtol=1e-14
    )


def test_edm_noise_levels_on_any_schedule(x64):
    i, n = np.arange(6), 6
    levels = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(grids.edm(n)[1:-1], 1 / (1 + levels[1:]), rtol=1e-12)
    for schedule in (
        LINEAR,
        Schedule(lambda t: t, lambda t: 1 - t),
        schedules.cosine(),
        schedules.linear_vp(),
    ):
        t = jnp.asarray(grids.edm(n, schedule)[1:-1])
        np.testing.assert_allclose(schedule.sigma(t) / schedule.alpha(t), levels[1:], rtol=1e-7)
    t = grids.log_snr(5, sigma_min=0.01, sigma_max=10.0)
    np.testing.assert_allclose(
        np.diff(np.log(t[1:-1] / (1 - t[1:-1]))), np.full(3, np.log(1000) / 5), rtol=1e-10
    )


def test_errors():
    for make, message in [
        (lambda: grids.uniform(0), "at least 1 step, got 0"),
        (lambda: grids.uniform(True), "at least 1 step, got True"),
        (lambda: grids.power(3, 0.0), "exponent > 0, got 0.0"),
        (lambda: grids.shifted(grids.uniform(3), 0.0), "factor > 0"),
        (lambda: grids.shifted([0.0, 0.7, 0.5, 1.0], 2.0), "rises strictly"),
        (lambda: grids.shifted([0.0], 2.0), r"got shape \[1\]"),
        (lambda: grids.edm(3, sigma_min=1.0, sigma_max=0.5), "sigma_min < sigma_max"),
        # the schedule never is as noisy as that
        (lambda: grids.edm(8, schedules.edm(sigma_max=1.0)), "rises strictly"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="integer, got 2.5"):
        grids.cosine(2.5)
