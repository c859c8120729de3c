"""Rectified diffusion: on a teacher's pairs the path of any schedule is an ODE that DDIM follows
exactly in one step."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_maps import random_params, silent_leaves
from jax.random import clone

import jflow
from jflow import losses, nets, oracles, paths, solvers
from jflow.losses._rectified_diffusion import (
    end_error,
    noise_error,
    phased_rectified_diffusion,
    rectified_diffusion,
)
from jflow.paths import parameterizations, schedules
from jflow.types import Field, Velocity

KEY = jax.random.key(0)
MEAN, STD = np.asarray([[1.0, -2.0]]), np.asarray([[0.5, 1.5]])
GAUSSIAN = oracles.gaussian(MEAN[0], STD[0] ** 2)
SCHEDULES = {"linear": paths.LINEAR, "vp": schedules.vp(), "cosine": schedules.cosine()}
KNOTS = (0.0, 0.3, 0.55, 1.0)
FINE = {"method": 800}  # of Heun: errors of some 1e-7


def to_data(x):
    mean, std = (jnp.asarray(v, x.dtype) for v in (MEAN, STD))
    return mean + std * x  # the flow map of every schedule


def rectified(schedule):
    """alpha' x1 + sigma' x0 at the pair whose path goes through x at t."""

    def apply(params, x, t, cond=None, *, key=None):
        t = t[:, None]
        (a, da), (s, ds) = (jax.jvp(f, (t,), (jnp.ones_like(t),)) for f in schedule[:2])
        mean, std = (jnp.asarray(v, x.dtype) for v in (MEAN, STD))
        x0 = (x - a * mean) / (a * std + s)
        v = da * to_data(x0) + ds * x0
        return v if params is None else v + params["a"] * x + params["b"] * t

    return Velocity(lambda *args: None, apply)


def noise_pairs(n, dtype=jnp.float64):
    x0 = jax.random.normal(KEY, (n, 2), dtype)
    return {"x0": x0, "x": to_data(x0)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_exact_field_has_no_residual_and_one_step_of_ddim_lands_on_the_data(x64, name):
    schedule = SCHEDULES[name]
    batch, velocity = noise_pairs(64), rectified(schedule)
    np.testing.assert_allclose(batch["x"], GAUSSIAN.flow_map(batch["x0"], 0.0, 1.0), atol=1e-12)
    loss = rectified_diffusion(velocity, schedule, metric=noise_error(schedule))
    value, metrics = loss(None, KEY, batch)
    assert metrics["residual"] < 1e-6 and value < 1e-6
    assert loss({"a": 0.0, "b": 0.1}, KEY, batch)[1]["residual"] > 1e-4
    zero = jnp.zeros((1, 1))
    start = schedule.alpha(zero) * batch["x"] + schedule.sigma(zero) * batch["x0"]
    end = schedule.alpha(zero + 1) * batch["x"] + schedule.sigma(zero + 1) * batch["x0"]
    draw = lambda method: solvers.sample(velocity, None, start, method=method)[0]  # noqa: E731
    for grid in ([0.0, 1.0], [0.0, 0.2, 0.9, 1.0]):
        np.testing.assert_allclose(
            draw(solvers.on_grid(grid, solvers.ddim(schedule))), end, atol=1e-6
        )
    np.testing.assert_allclose(end, batch["x"], atol=1e-6)
    bent = np.max(np.abs(draw(solvers.fixed(1, diffrax.Euler())) - end))
    assert bent < 1e-6 if name == "linear" else bent > 0.1  # first order is not straight


def test_a_mixture_is_rectified_along_vp(x64):
    oracle, schedule = (
        oracles.mixture([1.0, 2.0], [[-2.0, 0.0], [1.0, 1.0]], [0.2, 0.5]),
        schedules.vp(),
    )
    x0 = jax.random.normal(KEY, (6, 2), jnp.float64)
    x1 = oracles.mixture_flow_map(oracle, x0, 0.0, 1.0)
    t = jnp.linspace(0.05, 0.95, 6)
    eps = Field(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: x0)
    loss = rectified_diffusion(
        parameterizations.from_noise(eps, schedule, margin=0),
        schedule,
        time=lambda key, n: t,
        metric=noise_error(schedule),
    )
    value, metrics = loss({}, KEY, {"x0": x0, "x": x1})
    assert metrics["residual"] < 1e-6 and value < 1e-6


def test_on_the_linear_path_it_is_flow_matching():
    batch = noise_pairs(64, jnp.float32)
    velocity = Velocity(None, lambda params, x, t, cond=None, *, key=None: jnp.sin(x))
    a, b = (
        rectified_diffusion(velocity)({}, KEY, batch)[0],
        losses.flow_matching(velocity)({}, KEY, batch)[0],
    )
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_metrics_compare_what_the_network_predicts(x64):
    """A network of noise under `noise_error` and one of data under `end_error` see their own
    squared errors."""
    schedule, batch = schedules.vp(), noise_pairs(32)
    t = jnp.linspace(0.02, 0.98, 32)
    network = Field(None, lambda params, x, t, cond=None, *, key=None: jnp.sin(x) + t[:, None])
    seen = schedule.alpha(t)[:, None] * batch["x"] + schedule.sigma(t)[:, None] * batch["x0"]
    guess = jnp.sin(seen) + t[:, None]
    for convert, metric, truth in (
        (parameterizations.from_noise, noise_error(schedule), batch["x0"]),
        (parameterizations.from_data, end_error(schedule), batch["x"]),
    ):
        velocity = convert(network, schedule, margin=0)
        value, _ = rectified_diffusion(velocity, schedule, time=lambda key, n: t, metric=metric)(
            {}, KEY, batch
        )
        # `end_error` is in the state at t=1, sigma(1) of which is noise: 5e-9 of the variance
        np.testing.assert_allclose(value, jnp.mean((guess - truth) ** 2), rtol=1e-6)


@pytest.mark.parametrize("law", ["gaussian", "mixture"])
def test_random_pairs_give_the_marginal_velocity(law):
    """With x0 drawn by itself the exact velocity of the schedule has zero mean gradient, in
    whichever metric."""
    schedule = schedules.cosine()
    if law == "gaussian":
        oracle = oracles.gaussian([1.0, -2.0], [0.5, 0.3], schedule)
    else:
        oracle = oracles.mixture([1.0, 2.0], [[-2.0, 0.0], [1.0, 1.0]], [0.2, 0.5], schedule)

    def apply(params, x, t, cond=None, *, key=None):
        return oracle.velocity(x, t) + params["a"] * x + params["b"] * t[:, None]

    velocity, params = Velocity(None, apply), {"a": jnp.zeros(()), "b": jnp.zeros(())}
    for metric in (losses.mean_squared_error, noise_error(schedule), end_error(schedule)):
        loss = rectified_diffusion(velocity, schedule, metric=metric)

        def slope(key, loss=loss):
            data, noise, run = jax.random.split(key, 3)
            batch = {"x": oracle.sample(data, 1000), "x0": jax.random.normal(noise, (1000, 2))}
            return jax.grad(lambda p: loss(p, run, batch)[0])(params)

        for g in jax.tree.leaves(jax.jit(jax.vmap(slope))(jax.random.split(KEY, 100))):
            assert abs(float(g.mean())) < 3 * float(g.std()) / 10  # standard error over 100 batches
            assert float(g.std()) > 0


def recorder(answer):
    seen = {}

    def apply(params, x, t, cond=None, *, key=None):
        seen.update(x=x, t=t)
        return answer(x, t)

    return Velocity(lambda *args: {}, apply), seen


PHASES = jnp.asarray([0.31, 0.4, 0.5, 0.6, 0.8, 0.9])  # the windows where alpha > 0 on both paths


def phases(schedule, law):
    """An oracle, pairs, the noise of each row's window, z_t there, and alpha and sigma / alpha at
    its ends and at t."""
    if law == "gaussian":
        oracle = oracles.gaussian(MEAN[0], STD[0] ** 2, schedule)
        carry = oracle.flow_map
    else:
        oracle = oracles.mixture([1.0, 2.0], [[-2.0, 0.0], [1.0, 1.0]], [0.2, 0.5], schedule)
        carry = lambda x, t, r: oracles.mixture_flow_map(oracle, x, t, r)  # noqa: E731
    t = PHASES.astype(jnp.float64)
    a, b = (
        jnp.asarray(v)
        for v in ([0.3, 0.3, 0.3, 0.55, 0.55, 0.55], [0.55, 0.55, 0.55, 1.0, 1.0, 1.0])
    )
    x0, x1 = jax.random.normal(KEY, (2, 6, 2), jnp.float64)
    at = {
        n: (schedule.alpha(s)[:, None], schedule.sigma(s)[:, None])
        for n, s in (("a", a), ("t", t), ("b", b))
    }
    ratio = {n: sigma / alpha for n, (alpha, sigma) in at.items()}
    z_a = at["a"][0] * x1 + at["a"][1] * x0
    z_b = carry(z_a, a, b)
    noise = (z_b / at["b"][0] - z_a / at["a"][0]) / (ratio["b"] - ratio["a"])
    z_t = at["t"][0] * (z_a / at["a"][0] + (ratio["t"] - ratio["a"]) * noise)
    return oracle, {"x0": x0, "x": x1}, noise, z_t, at, ratio


@pytest.mark.parametrize("law", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", ["vp", "cosine"])
def test_phases_follow_the_published_form(x64, name, law):
    """In each window x / alpha is linear in sigma / alpha, between the ends that the teacher
    connects."""
    schedule, t = SCHEDULES[name], PHASES.astype(jnp.float64)
    oracle, batch, noise, z_t, at, ratio = phases(schedule, law)

    eps = Field(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: noise)
    exact = parameterizations.from_noise(eps, schedule, margin=0)
    options = {"knots": KNOTS, "schedule": schedule, "time": lambda key, n: t, **FINE}
    student, seen = recorder(lambda x, t: exact.apply({}, x, t))
    loss = phased_rectified_diffusion(student, oracles.as_velocity(oracle), **options)
    assert loss({}, KEY, batch, {"teacher": {}})[1]["residual"] < 1e-6
    np.testing.assert_allclose(seen["x"], z_t, atol=1e-6)

    # off by one in the noise: the ends of the windows, as published, differ by alpha_b (ratio_b -
    # ratio_t)
    wrong = Field(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: noise + 1)
    student = parameterizations.from_noise(wrong, schedule, margin=0)
    options["metric"] = end_error(schedule, KNOTS)
    loss = phased_rectified_diffusion(student, oracles.as_velocity(oracle), **options)
    value = loss({}, KEY, batch, {"teacher": {}})[0]
    np.testing.assert_allclose(
        value, jnp.mean((at["b"][0] * (ratio["b"] - ratio["t"])) ** 2), rtol=1e-5
    )


@pytest.mark.parametrize("solver, order", [(diffrax.Euler(), 1), (diffrax.Heun(), 2)])
def test_the_residual_of_phases_falls_with_the_steps_of_the_teacher(x64, solver, order):
    schedule, errors = SCHEDULES["vp"], []
    oracle, batch, noise, *_ = phases(schedule, "mixture")
    eps = Field(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: noise)
    student = parameterizations.from_noise(eps, schedule, margin=0)
    options = {
        "knots": KNOTS,
        "schedule": schedule,
        "time": lambda key, n: PHASES.astype(jnp.float64),
    }
    for steps in (32, 64):
        teacher = oracles.as_velocity(oracle)
        loss = phased_rectified_diffusion(
            student, teacher, **options, method=solvers.fixed(steps, solver)
        )
        errors.append(float(jax.jit(loss)({}, KEY, batch, {"teacher": {}})[1]["residual"]) ** 0.5)
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.2


def test_phases_of_the_linear_path_are_perflow():
    velocity = Velocity(None, lambda params, x, t, cond=None, *, key=None: jnp.sin(x) + t[:, None])
    batch = {"x": jax.random.normal(KEY, (32, 2))}
    teacher = oracles.as_velocity(GAUSSIAN)
    one = phased_rectified_diffusion(velocity, teacher, schedule=paths.LINEAR)
    other = losses.perflow(velocity, teacher)
    np.testing.assert_allclose(
        *[jax.jit(loss)({}, KEY, batch, {"teacher": {}})[0] for loss in (one, other)], rtol=1e-5
    )


def test_the_loss_is_a_mean_over_the_event():
    velocity = Velocity(None, lambda params, x, t, cond=None, *, key=None: jnp.sin(x) + t[:, None])
    batch = noise_pairs(32, jnp.float32)
    twice = {name: jnp.concatenate([value, value], axis=1) for name, value in batch.items()}
    schedule = schedules.vp()
    for metric in (losses.mean_squared_error, noise_error(schedule), end_error(schedule, 4)):
        loss = rectified_diffusion(velocity, schedule, metric=metric)
        np.testing.assert_allclose(*[loss({}, KEY, rows)[0] for rows in (batch, twice)], rtol=1e-4)
    loss = phased_rectified_diffusion(velocity, velocity, schedule=schedule)
    both = jax.jit(
        lambda: [loss({}, clone(KEY), rows, {"teacher": {}})[0] for rows in (batch, twice)]
    )
    np.testing.assert_allclose(*both(), rtol=1e-4)


def test_gradients_reach_every_param():
    schedule, net = schedules.vp(), jflow.velocity(nets.ResidualMLP(8, 1, num_classes=2))
    batch = {**noise_pairs(16, jnp.float32), "cond": jnp.arange(16) % 2, "weight": jnp.ones(16)}
    params = random_params(net.init, batch["x"], jnp.zeros(16), batch["cond"])
    velocity = parameterizations.from_noise(net, schedule)
    loss = rectified_diffusion(velocity, schedule, metric=noise_error(schedule))
    loss = losses.chain(losses.drop_cond(0.5, null=2), loss)
    assert not silent_leaves(loss, params, batch)


def test_bad_input():
    velocity = rectified(paths.LINEAR)
    with pytest.raises(ValueError, match="'x0' beside 'x'"):
        rectified_diffusion(velocity)(None, KEY, {"x": jnp.zeros((2, 2))})
    with pytest.raises(ValueError, match="noise at t=0"):
        rectified_diffusion(velocity, paths.Schedule(lambda t: 1 - t, lambda t: t))
    with pytest.raises(ValueError, match="key"):
        rectified_diffusion(velocity)(None, None, noise_pairs(2, jnp.float32))
    with pytest.raises(ValueError, match="rise strictly from 0 to 1"):
        end_error(paths.LINEAR, [0.0, 0.5])
    phased = lambda **options: phased_rectified_diffusion(  # noqa: E731
        velocity, velocity, schedule=schedules.vp(), **options
    )
    with pytest.raises(ValueError, match="rise strictly from 0 to 1"):
        phased(knots=[0.2, 1.0])
    with pytest.raises(ValueError, match="steps to be a whole number of at least 1, got 0"):
        phased(method=0)
    with pytest.raises(ValueError, match="'teacher'"):
        phased_rectified_diffusion(velocity, velocity, schedule=paths.LINEAR)(
            None, KEY, {"x": jnp.zeros((2, 2))}
        )
