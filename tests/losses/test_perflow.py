"""PeRFlow: targets are the teacher's own ends of a window, weights of noise networks stay usable,
grids meet the windows."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_maps import random_params, silent_leaves

import jflow
from jflow import losses, nets, oracles, paths, solvers
from jflow.losses._perflow import perflow
from jflow.paths import parameterizations, schedules
from jflow.paths.schedules import piecewise
from jflow.solvers.grids import windows
from jflow.types import Field, Velocity

KEY = jax.random.key(0)
MEAN, COV = [1.0, -2.0], [[0.5, 0.2], [0.2, 0.3]]
KNOTS = (0.0, 0.3, 0.55, 1.0)
FINE = {"method": 200}  # of Heun: errors of some 1e-6, 1e-11 squared
SCHEDULES = {"linear": paths.LINEAR, "vp": schedules.vp(), "cosine": schedules.cosine()}


def window(t, knots=KNOTS):
    """The ends of t's window, found without the library."""
    at = jnp.asarray(knots, t.dtype)
    k = jnp.sum(t[:, None] >= at[None, 1:-1], axis=1)
    return at[k], at[k + 1]


def straight_student(carry):
    """The velocity of the lines between x at a and carry(x, a, b), an affine map of x: solved for
    the line through x at t."""

    def apply(params, x, t, cond=None, *, key=None):
        a, b = window(t)
        w = ((t - a) / (b - a))[:, None]
        offset = carry(jnp.zeros_like(x), a, b)
        matrix = jnp.stack(
            [carry(jnp.broadcast_to(e, x.shape), a, b) - offset for e in jnp.eye(2)], axis=-1
        )
        line = (1 - w[..., None]) * jnp.eye(2)[None] + w[..., None] * matrix
        start = jnp.linalg.solve(line, (x - w * offset)[..., None])[..., 0]
        v = (carry(start, a, b) - start) / (b - a)[:, None]
        return v if params is None else v + params["a"] * x + params["b"] * t[:, None]

    return Velocity(lambda *args: None, apply)


def fixed(times):
    return lambda key, n: jnp.asarray(times)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_residual_vanishes_at_the_straight_flow_of_a_gaussian(x64, name):
    oracle = oracles.gaussian(MEAN, COV, SCHEDULES[name])
    student = straight_student(oracle.flow_map)
    loss = perflow(
        student, oracles.as_velocity(oracle), knots=KNOTS, schedule=SCHEDULES[name], **FINE
    )
    batch = {"x": oracle.sample(KEY, 64).astype(jnp.float64)}
    run = jax.jit(lambda b: loss({"a": 0.0, "b": b}, KEY, batch, {"teacher": {}}))
    value, metrics = run(0.0)
    assert metrics["residual"] < 1e-6 and value < 1e-6
    assert run(0.1)[1]["residual"] > 1e-4


@pytest.mark.parametrize("dropped", [False, True])
def test_the_residual_vanishes_along_the_windows_of_a_mixture(x64, dropped):
    """The student says the slope between the ends as an independent solver finds them, for the
    row's own label, and more where it is asked off the line. A dropped label is dropped for the
    teacher too."""
    oracle = oracles.mixture([1.0, 2.0], [[-2.0, 0.0], [1.0, 1.0]], [0.2, 0.5])
    t = jnp.asarray([0.0, 0.1, 0.3, 0.5, 0.6, 0.95])
    x0 = jax.random.normal(KEY, (6, 2), jnp.float64)
    labels = jnp.asarray([0, 1, 1, 0, 1, 0])
    seen = jnp.full(6, 2) if dropped else labels
    x1 = oracle.sample(jax.random.key(1), 6).astype(jnp.float64)
    a, b = window(t)
    start = (1 - a)[:, None] * x0 + a[:, None] * x1
    end = jax.jit(oracles.mixture_flow_map, static_argnums=0)(oracle, start, a, b, seen)
    slope = (end - start) / (b - a)[:, None]

    def apply(params, x, t, cond=None, *, key=None):
        return slope + (x - start - (t - a)[:, None] * slope) + 10.0 * (cond != seen)[:, None]

    student = Velocity(lambda *args: {}, apply)
    loss = perflow(student, oracles.as_velocity(oracle), knots=KNOTS, time=fixed(t), **FINE)
    loss = losses.chain(losses.drop_cond(1.0, null=2), loss) if dropped else loss
    value, metrics = jax.jit(loss)({}, KEY, {"x0": x0, "x": x1, "cond": labels}, {"teacher": {}})
    assert metrics["residual"] < 1e-6 and value < 1e-6


@pytest.mark.parametrize("solver, order", [(diffrax.Euler(), 1), (diffrax.Heun(), 2)])
@pytest.mark.parametrize("name", ["linear", "vp"])
def test_the_residual_falls_with_the_steps_of_the_teacher(x64, name, solver, order):
    oracle = oracles.gaussian(MEAN, COV, SCHEDULES[name])
    student, teacher = straight_student(oracle.flow_map), oracles.as_velocity(oracle)
    batch = {"x": oracle.sample(KEY, 256).astype(jnp.float64)}
    errors = []
    for steps in (16, 32):
        loss = perflow(
            student,
            teacher,
            knots=KNOTS,
            schedule=SCHEDULES[name],
            method=solvers.fixed(steps, solver),
        )
        errors.append(float(jax.jit(loss)(None, KEY, batch, {"teacher": {}})[1]["residual"]) ** 0.5)
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.2


def test_one_window_is_reflow_and_many_are_the_teacher(x64):
    oracle = oracles.gaussian(MEAN, COV)
    teacher = oracles.as_velocity(oracle)
    x0 = jax.random.normal(KEY, (128, 2), jnp.float64)
    reflow = losses.flow_matching(teacher)({}, KEY, {"x0": x0, "x": oracle.flow_map(x0, 0.0, 1.0)})[
        0
    ]
    loss = perflow(teacher, teacher, knots=1, **FINE)
    data = oracle.sample(KEY, 128).astype(jnp.float64)
    np.testing.assert_allclose(
        jax.jit(loss)({}, KEY, {"x0": x0, "x": data}, {"teacher": {}})[0], reflow, atol=1e-5
    )
    errors = []
    for count in (32, 64):
        loss = perflow(teacher, teacher, knots=count, method=8)
        errors.append(
            float(jax.jit(loss)({}, KEY, {"x0": x0, "x": data}, {"teacher": {}})[1]["residual"])
            ** 0.5
        )
    assert abs(np.log2(errors[0] / errors[1]) - 1) < 0.2  # first order in the length of a window


def noise_of(oracle, schedule):
    """The exact network of noise."""

    def apply(params, x, t, cond=None, *, key=None):
        return paths.velocity_to_noise(oracle.velocity(x, t), x, t, schedule)

    return Field(lambda *args: {}, apply)


def data_of(oracle, schedule):
    def apply(params, x, t, cond=None, *, key=None):
        return paths.velocity_to_data(oracle.velocity(x, t), x, t, schedule)

    return Field(lambda *args: {}, apply)


@pytest.mark.parametrize("name", ["vp", "cosine"])
def test_a_student_with_the_teachers_weights_steps_as_ddim_does(x64, name):
    schedule = SCHEDULES[name]
    oracle = oracles.gaussian(MEAN, COV, schedule)
    convert, network = (
        (parameterizations.from_noise, noise_of)
        if name == "vp"
        else (parameterizations.from_data, data_of)
    )
    field = network(oracle, schedule)
    x0 = jax.random.normal(KEY, (16, 2), jnp.float64)
    student = convert(field, piecewise(schedule, KNOTS), margin=0)
    x, _ = solvers.sample(
        student, {}, x0, method=solvers.on_grid(windows(KNOTS, 3), diffrax.Euler())
    )
    by_ddim, _ = solvers.sample(
        convert(field, schedule, margin=0),
        {},
        x0,
        method=solvers.on_grid(np.asarray(KNOTS), solvers.ddim(schedule)),
    )
    np.testing.assert_allclose(x, by_ddim, atol=1e-9)


def test_the_parameterization_is_the_papers(x64):
    """lambda_t and eta_t of the published sampler, in the window from more noise (a) to less
    (b)."""
    schedule = schedules.vp()
    t = jnp.asarray([0.0, 0.2, 0.4, 0.54, 0.7, 0.99])
    a, b = window(t)
    z, eps = jax.random.normal(KEY, (2, 6, 2), jnp.float64)
    (alpha_a, alpha_b), (sigma_a, sigma_b) = ((f(a), f(b)) for f in schedule[:2])
    lam = alpha_b / alpha_a
    eta = sigma_b - lam * sigma_a
    below = lam * (t - a) + (b - t)
    end = (lam * (b - a) / below)[:, None] * z + (eta * (b - t) / below)[:, None] * eps
    network = Field(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: eps)
    v = parameterizations.from_noise(network, piecewise(schedule, KNOTS), margin=0).apply({}, z, t)
    np.testing.assert_allclose(v, (end - z) / (b - t)[:, None], rtol=1e-8)


def test_piecewise_meets_the_schedule_at_the_knots_with_the_slopes_after_them(x64):
    schedule = schedules.cosine()
    straight = piecewise(schedule, KNOTS)
    t = jnp.asarray(KNOTS)
    for mine, given in zip(straight[:2], schedule[:2], strict=True):
        values, slopes = jax.jvp(mine, (t,), (jnp.ones_like(t),))
        np.testing.assert_allclose(values, given(t), atol=1e-12)
        rises = np.diff(given(t)) / np.diff(t)
        np.testing.assert_allclose(slopes, [*rises, rises[-1]], rtol=1e-9)
    np.testing.assert_allclose(
        piecewise(paths.LINEAR, 7).alpha(jnp.linspace(0, 1, 23)), np.linspace(0, 1, 23)
    )


def test_euler_on_the_windows_of_the_exact_student_is_the_flow_map(x64):
    oracle = oracles.gaussian(MEAN, COV)
    student = straight_student(oracle.flow_map)
    x0 = jax.random.normal(KEY, (16, 2), jnp.float64)
    exact = oracle.flow_map(x0, 0.0, 1.0)
    for n in (3, 4, 7):
        grid = windows(KNOTS, n)
        x, info = solvers.sample(student, None, x0, method=solvers.on_grid(grid, diffrax.Euler()))
        np.testing.assert_allclose(x, exact, atol=1e-10)
        assert np.all(np.asarray(info.evaluations) == n)
    x, _ = solvers.sample(
        student, None, x0, method=solvers.fixed(4, diffrax.Euler())
    )  # misses the knots
    assert np.max(np.abs(x - exact)) > 1e-3


def test_window_grid():
    np.testing.assert_allclose(windows(2, 5), [0, 1 / 6, 1 / 3, 0.5, 0.75, 1])
    np.testing.assert_allclose(windows(KNOTS, 3), KNOTS)
    assert set(KNOTS) <= set(windows(KNOTS, 11)) and len(windows(KNOTS, 11)) == 12


def test_the_loss_is_a_mean_over_the_event():
    def apply(params, x, t, cond=None, *, key=None):
        return jnp.sin(x) + params * t[:, None]

    batch = {
        name: jax.random.normal(jax.random.key(i), (32, 2)) for i, name in enumerate(("x0", "x"))
    }
    twice = {name: jnp.concatenate([value, value], axis=1) for name, value in batch.items()}
    loss = perflow(Velocity(None, apply), Velocity(None, apply), knots=KNOTS)
    values = [jax.jit(loss)(1.0, KEY, rows, {"teacher": 0.5})[0] for rows in (batch, twice)]
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_gradients_reach_the_student_and_leave_the_teacher():
    net = nets.ResidualMLP(8, 1, num_classes=2)
    velocity, schedule = jflow.velocity(net), schedules.vp()
    straight = piecewise(schedule, 4)
    student, teacher = (parameterizations.from_noise(velocity, s) for s in (straight, schedule))
    x, cond = jax.random.normal(KEY, (16, 2)), jnp.arange(16) % 2
    params = random_params(velocity.init, x, jnp.zeros(16), cond)
    guided = jflow.guidance.cfg(teacher, 2.0, null=2)
    options = {"schedule": schedule, "metric": losses.noise_error(straight), "method": 2}
    loss = losses.chain(losses.drop_cond(0.5, null=2), perflow(student, guided, **options))
    assert not silent_leaves(loss, params, {"x": x, "cond": cond}, {"teacher": params})


def test_bad_input():
    velocity = oracles.as_velocity(oracles.gaussian(MEAN, COV))
    batch = {"x": jnp.zeros((4, 2))}
    for knots in ([0.0, 0.5], [0.1, 1.0], [0.2, 0.8]):
        with pytest.raises(ValueError, match="rise strictly from 0 to 1"):
            perflow(velocity, velocity, knots=knots)
    for knots in (0, [0.0, 0.5, 0.5, 1.0], [1.0, 0.0], 1.5):
        with pytest.raises(ValueError, match="at least 1|rise strictly"):
            piecewise(paths.LINEAR, knots)
    with pytest.raises(ValueError, match="one step a window"):
        windows(4, 3)
    with pytest.raises(ValueError, match="steps to be a whole number"):
        perflow(velocity, velocity, method=0)
    with pytest.raises(TypeError, match="AbstractSolver"):
        perflow(velocity, velocity, method=solvers.fixed(4, "euler"))
    with pytest.raises(ValueError, match="noise at t=0"):
        perflow(velocity, velocity, schedule=paths.Schedule(lambda t: 1 - t, lambda t: t))
    loss = perflow(velocity, velocity)
    with pytest.raises(ValueError, match="'teacher'"):
        loss({}, KEY, batch)
    with pytest.raises(ValueError, match="'teacher'"):
        loss({}, KEY, batch, {"ema": {}})
    with pytest.raises(ValueError, match="key"):
        loss({}, None, batch, {"teacher": {}})
    with pytest.raises(ValueError, match="metric of shape"):
        perflow(velocity, velocity, method=1, metric=lambda v, target, x, t: v)(
            {}, KEY, batch, {"teacher": {}}
        )
