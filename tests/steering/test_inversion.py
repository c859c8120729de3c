"""Inversion along the ODE of a velocity, plain and controlled, and edits by it."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from keys import KEYS, keys_consumed_twice

from jflow import oracles, solvers, steering
from jflow.paths import velocity_to_noise
from jflow.types import Velocity

ORACLE = oracles.mixture([0.4, 0.6], [[-2.0, 0.0], [2.0, 0.5]], 0.3)
EULER = diffrax.Euler()
RNG = np.random.default_rng(0)
X, X0 = (RNG.normal(size=(5, 2)).astype(np.float32) for _ in range(2))


def moved_mixture():
    """The velocity of a mixture that the condition [b] moves."""

    def apply(params, x, t, cond=None, *, key=None):
        shift = 0.0 if cond is None else cond[:, None]
        return ORACLE.velocity(x - t[:, None] * shift, t) + shift

    return Velocity(lambda *_: {}, apply)


V = moved_mixture()
OLD, NEW = jnp.zeros(5), jnp.full(5, 0.7)
toward = steering.SteeringCondition


def test_rf_solver_is_the_midpoint_and_its_inversion_error_has_its_order(x64):
    """The Taylor step is written out; they agree to rounding in float64, 1e-12 with states of order
    1 and 20 steps. Orders are regressed on a mixture, from 16 to 64 steps, of the noise that data
    is carried to, against the midpoint method of 1024 steps, whose error is 1/256 of that of 64: 1
    for Euler's method, 2 for RF-Solver, near 2 for FireFlow, whose first step is of order 1. The
    way back and forth cancels the leading term of RF-Solver's error: data comes back with order
    3."""
    x = jnp.asarray(ORACLE.sample(KEYS[0], 5), jnp.float64)

    def taylor(x, times):
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            h, at = t_next - t, lambda s: jnp.full(5, s)
            v = V.apply({}, x, at(t))
            slope = (V.apply({}, x + h / 2 * v, at(t + h / 2)) - v) / (h / 2)
            x = x + h * v + h**2 / 2 * slope
        return x

    times = np.linspace(1.0, 0.0, 21)
    method = solvers.on_grid(times, steering.rf_solver())
    noise = solvers.sample(V, {}, x, method=method)[0]
    np.testing.assert_allclose(noise, jax.jit(taylor)(x, times), rtol=0, atol=1e-12)

    few, many = 16, 64
    midpoint = steering.rf_solver()

    @jax.jit
    def errors(x):
        back = lambda n, solver: solvers.sample(  # noqa: E731
            V, {}, x, method=solvers.fixed(n, solver), t0=1.0, t1=0.0
        )[0]
        forth = lambda n: steering.edit_by_inversion(  # noqa: E731
            V, {}, x, OLD, OLD, method=solvers.fixed(n, midpoint)
        )
        exact = back(1024, midpoint)
        inversion = [
            [jnp.abs(back(n, solver) - exact).max() for n in (few, many)]
            for solver in (EULER, midpoint, solvers.fireflow())
        ]
        return jnp.asarray([*inversion, [jnp.abs(forth(n) - x).max() for n in (few, many)]])

    found = np.asarray(errors(x))
    euler, second, fireflow, both_ways = np.log(found[:, 0] / found[:, 1]) / np.log(many / few)
    assert 0.85 < euler < 1.15 and 1.8 < second < 2.3 and 1.5 < fireflow < 2.3, found
    assert 2.6 < both_ways < 3.6, found


def test_without_a_pull_it_is_the_velocity_and_with_all_of_it_the_image():
    """eta = 0 to the last digit; eta = 1 up to the rounding of ten steps of float32 on numbers of
    order 1, by Euler's steps of the ODE and by steps of the SDE."""
    points = toward(jnp.asarray(X), OLD), toward(jnp.asarray(X0), OLD)
    grid = solvers.grids.power(10, 1.5)
    forth, back = solvers.on_grid(grid, EULER), solvers.on_grid(grid[::-1], EULER)

    @jax.jit
    def run(x, x0):
        data, noise = ((steering.toward_data, steering.toward_noise),) * 2
        made = {}
        for amount in (0.0, 1.0):
            pulled, pushed = data[0](V, amount), noise[1](V, amount)
            made[f"ode {amount}"] = solvers.sample(pulled, {}, x0, points[0], method=forth)[0]
            made[f"back {amount}"] = solvers.sample(pushed, {}, x, points[1], method=back)[0]
            made[f"sde {amount}"] = solvers.sample_sde(
                solvers.ancestral(pulled), {}, x0, jax.random.clone(KEYS[0]), grid, points[0]
            )[0]
        made["ode"] = solvers.sample(V, {}, x0, OLD, method=forth)[0]
        made["back"] = solvers.sample(V, {}, x, OLD, method=back)[0]
        made["sde"] = solvers.sample_sde(
            solvers.ancestral(V), {}, x0, jax.random.clone(KEYS[0]), grid, OLD
        )[0]
        return made

    made = jax.device_get(run(X, X0))
    for name in ("ode", "back", "sde"):
        np.testing.assert_array_equal(made[f"{name} 0.0"], made[name])
    for name, end in (("ode", X), ("back", X0), ("sde", X)):
        np.testing.assert_allclose(made[f"{name} 1.0"], end, rtol=0, atol=2e-6)
        assert np.abs(made[name] - end).max() > 0.1


def test_the_pull_is_the_regulator_of_least_energy():
    """Of all controls c over n equal steps with x + h sum c = x1 those of least norm, by least
    squares, are (x1 - x) / (1 - t) throughout; and so is the pull, of v the rest. The noise that
    the SDE's score is made of is that of v and of x1 in the same proportion."""
    t, n, eta = 0.6, 8, 0.3
    h = (1 - t) / n
    least = np.linalg.lstsq(np.full((1, n), h), (X - X0).reshape(1, -1).astype(float), rcond=None)[
        0
    ]
    at, x0 = jnp.full(5, t), jnp.asarray(X0)
    made = steering.toward_data(V, eta).apply({}, x0, at, toward(jnp.asarray(X), NEW))
    v = V.apply({}, x0, at, NEW)
    for row in least.reshape(n, 5, 2)[[0, -1]]:
        np.testing.assert_allclose(made, (1 - eta) * v + eta * row, rtol=1e-5, atol=1e-5)
    both = velocity_to_noise(made, x0, at)
    expected = (1 - eta) * velocity_to_noise(v, x0, at) + eta * (X0 - t * X) / (1 - t)
    np.testing.assert_allclose(both, expected, rtol=1e-5, atol=1e-5)


def test_the_pull_is_in_its_window_alone():
    """Ends included as said, times of rows, amounts in time, and t = 0 and 1 are finite."""
    t = jnp.array([0.0, 0.2, 0.5, 0.8, 1.0])
    x, x1, x0 = jnp.asarray(X0), jnp.asarray(X), jnp.asarray(X0) + 1
    v = V.apply({}, x, t, NEW)
    forth = steering.toward_data(V, lambda t: t, window=(0.2, 0.8)).apply({}, x, t, toward(x1, NEW))
    back = steering.toward_noise(V, lambda t: t, window=(0.2, 0.8)).apply({}, x, t, toward(x0, NEW))
    for made, inside, pull in (
        (forth, [1, 2], lambda i: (X - X0)[i] / (1 - t[i])),
        (back, [2, 3], lambda i: -1.0 / t[i]),
    ):
        outside = [i for i in range(5) if i not in inside]
        np.testing.assert_array_equal(made[np.array(outside)], v[np.array(outside)])
        for i in inside:
            expected = v[i] + t[i] * (pull(i) - v[i])
            np.testing.assert_allclose(made[i], expected, rtol=1e-5, atol=1e-5)
    full = steering.toward_data(V, 1.0), steering.toward_noise(V, 1.0)
    for velocity in full:
        assert np.all(np.isfinite(velocity.apply({}, x, t, toward(x1, NEW))))
        slope = jax.grad(lambda x, v=velocity: jnp.sum(v.apply({}, x, t, toward(x1, NEW))))(x)
        assert np.all(np.isfinite(slope))


def test_the_limits_of_rf_inversion_and_otip():
    """Without pulls it is the plain inversion by Euler's method; with all of it x comes back, up to
    rounding as above; the transport is as long as v, fades, and is nothing at strength 0."""
    call = lambda f, key=KEYS[1], **options: f(  # noqa: E731
        V, {}, jnp.asarray(X), OLD, NEW, jax.random.clone(key), method=8, **options
    )

    @jax.jit
    def run():
        return {
            "plain": steering.edit_by_inversion(
                V, {}, jnp.asarray(X), OLD, NEW, method=solvers.fixed(8, EULER)
            ),
            "none": call(steering.rf_inversion, gamma=0.0, eta=0.0),
            "all": call(steering.rf_inversion, eta=1.0, window=(0.0, 1.0)),
            "some": call(steering.rf_inversion),
            "other key": call(steering.rf_inversion, KEYS[2]),
            "strength 0": call(steering.otip, strength=0.0),
            "otip": call(steering.otip),
            "otip all": call(steering.otip, eta=1.0, window=(0.0, 1.0)),
        }

    made = jax.device_get(run())
    np.testing.assert_allclose(made["none"], made["plain"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(made["all"], X, rtol=0, atol=2e-6)
    np.testing.assert_allclose(made["otip all"], X, rtol=0, atol=2e-6)
    np.testing.assert_allclose(made["strength 0"], made["some"], rtol=1e-6, atol=1e-6)
    for name in ("other key", "otip", "plain"):
        assert np.abs(made[name] - made["some"]).max() > 1e-3, name

    t = jnp.array([0.0, 0.1, 0.2, 0.4, 0.9])
    x, x1 = jnp.asarray(X0), jnp.asarray(X)
    made = steering.transport_guided(V, 0.5, phase=0.4).apply({}, x, t, toward(x1, NEW))
    v, d = V.apply({}, x, t, NEW), (X - X0) / (1 - t[:, None])
    much = 0.25 * (1 + np.cos(np.pi * np.asarray(t) / 0.4)) * (np.asarray(t) < 0.4)
    ratio = np.linalg.norm(v, axis=1) / np.linalg.norm(d, axis=1)
    np.testing.assert_allclose(made, v + (much * ratio)[:, None] * (d - v), rtol=1e-5, atol=1e-5)
    slope = jax.grad(
        lambda x: jnp.sum(steering.transport_guided(V).apply({}, x, t, toward(x1, NEW)))
    )(x1)  # d = 0
    assert np.all(np.isfinite(slope))


def test_an_edit_by_inversion_follows_the_condition_and_keeps_its_start(x64):
    """The condition moves the mixture by a constant: the exact edit adds it, and from a start the
    part of it that is to come; to 2e-3 with steps of second order of 1/64."""
    x = jnp.asarray(ORACLE.sample(KEYS[3], 5), jnp.float64)
    grid = solvers.on_grid(np.linspace(0, 1, 65), steering.rf_solver())

    @jax.jit
    def run(x):
        edit = lambda **options: steering.edit_by_inversion(V, {}, x, OLD, NEW, **options)  # noqa: E731
        middle = solvers.sample(V, {}, x, OLD, method=64, t0=1.0, t1=0.5)[0]
        expected = solvers.sample(V, {}, middle - 0.35, OLD, method=64, t0=0.5)[0] + 0.7
        return edit(method=64), edit(method=grid), edit(start=0.5, method=32), expected

    steps, on_grid, kept, expected = run(x)
    np.testing.assert_allclose(steps, x + 0.7, rtol=0, atol=2e-3)
    np.testing.assert_allclose(on_grid, steps, rtol=0, atol=1e-12)
    np.testing.assert_allclose(kept, expected, rtol=0, atol=2e-3)
    assert np.abs(kept - x).mean() < np.abs(steps - x).mean()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_types_rows_and_keys(dtype):
    """Data comes back in its type; one row of a condition is for all; keys are consumed once."""
    with jax.enable_x64(True):
        x = jnp.asarray(X, dtype)
        for f in (steering.rf_inversion, steering.otip):
            run = lambda key, f=f, x=x: f(V, {}, x, OLD[:1], NEW, key, method=3)  # noqa: E731
            assert jax.eval_shape(run, KEYS[0]).dtype == dtype
            assert not keys_consumed_twice(run, KEYS[0])
        made = jax.eval_shape(
            lambda x: steering.edit_by_inversion(V, {}, x, OLD[:1], NEW, method=3), x
        )
        assert made.dtype == dtype and made.shape == x.shape


def test_bad_input_is_named():
    x = jnp.asarray(X)
    edit = lambda f=steering.rf_inversion, x=x, cond=OLD, new=NEW, key=KEYS[0], **options: f(  # noqa: E731
        V, {}, x, cond, new, key, **options
    )
    plain = lambda cond=OLD, new=NEW, **options: steering.edit_by_inversion(  # noqa: E731
        V, {}, x, cond, new, **options
    )
    grid = solvers.on_grid([0.0, 0.5, 1.0])
    pulled = steering.toward_data(V, 0.5)
    for call, said in [
        (lambda: steering.toward_data(V, 1.5), r"toward_data: expected .*eta in \[0, 1\], got 1.5"),
        (lambda: steering.toward_noise(V, -0.5), r"toward_noise: .*gamma in \[0, 1\], got -0.5"),
        (
            lambda: steering.toward_data(V, 0.5, window=(0.0, 1.2)),
            "toward_data: expected a window",
        ),
        (lambda: steering.toward_noise(V, 0.5, window=(0.6, 0.4)), r"toward_noise: .*\(0.6, 0.4\)"),
        (lambda: steering.transport_guided(V, 2.0), "transport_guided: .*strength in"),
        (
            lambda: steering.transport_guided(V, phase=0.0),
            "transport_guided: expected a window",
        ),
        (lambda: edit(window=(0.0, -0.1)), "toward_data: expected a window"),
        (lambda: edit(cond=None), "rf_inversion: expected cond, the condition of x, got None"),
        (
            lambda: edit(steering.otip, new=None),
            "otip: expected new_cond, what to edit to, got None",
        ),
        (lambda: edit(cond=OLD[:3]), "rf_inversion: expected cond to lead with 5 rows"),
        (lambda: edit(key=None), "rf_inversion is stochastic: it needs a key"),
        (lambda: edit(x=jnp.ones((5, 2), int)), "rf_inversion: expected x of a floating type"),
        (lambda: plain(start=1.0), r"edit_by_inversion: expected start in \[0, 1\), got 1.0"),
        (lambda: plain(start=0.2, method=grid), "a grid carries its own start"),
        (lambda: plain(new=None), "edit_by_inversion: expected new_cond"),
        (
            lambda: pulled.apply({}, x, jnp.zeros(5), NEW),
            "toward_data: .* a steering.SteeringCondition",
        ),
        (
            lambda: pulled.apply({}, x, jnp.zeros(5), toward(x[:, :1], NEW)),
            r"toward_data: expected the target of shape \[5, 2\], got \[5, 1\]",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(TypeError, match="toward_data: expected a Velocity or a Field"):
        steering.toward_data(V.apply, 0.5)
