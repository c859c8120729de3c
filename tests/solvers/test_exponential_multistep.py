"""The diffrax solvers of jflow: exponential integrators and multistep methods."""

import functools
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import oracles, solvers, types
from jflow.paths import LINEAR, Schedule, schedules

PEERS = Path(__file__).parents[1] / "peers" / "schedulers.npz"
COSINE = schedules.cosine()
MIXTURE = ([0.4, 0.6], [[-2.0, 0.0], [2.0, 0.5]], 0.3)
SOLVERS = {
    "ddim": solvers.ddim(),
    "ddim cosine": solvers.ddim(COSINE),
    "dpm_solver_2": solvers.dpm_solver_2(),
    "dpm_solver_2 cosine": solvers.dpm_solver_2(COSINE),
    "dpm_solver_2 log-SNR": solvers.dpm_solver_2(middle=solvers.midpoint_in_log_snr()),
    "dpm_solver_pp_2s": solvers.dpm_solver_pp_2s(),
    "dpm_solver_pp_2s log-SNR": solvers.dpm_solver_pp_2s(middle=solvers.midpoint_in_log_snr()),
    **{f"adams_bashforth {k}": solvers.adams_bashforth(k) for k in (1, 2, 3, 4)},
    **{f"dpm_solver_pp {k}": solvers.dpm_solver_pp(k) for k in (1, 2, 3)},
    **{f"unipc {k}": solvers.unipc(k) for k in (1, 2, 3)},
    "unipc cosine": solvers.unipc(2, COSINE),
    "fireflow": solvers.fireflow(),
    "pseudo_corrector": solvers.pseudo_corrector(),
}
everyone = pytest.mark.parametrize("name", SOLVERS)
TYPICAL = [
    "ddim cosine",
    "dpm_solver_2",
    "dpm_solver_pp_2s",
    "adams_bashforth 3",
    "dpm_solver_pp 3",
    "unipc 2",
    "fireflow",
]
typical = pytest.mark.parametrize("name", TYPICAL)


def schedule_of(name):
    return COSINE if "cosine" in name else LINEAR


def as_velocity(field):
    return types.Velocity(
        lambda *args: {}, lambda params, x, t, cond=None, *, key=None: field(params, x, t, cond)
    )


@functools.cache
def compiled(v, solver):
    """One program for all grids of one length."""
    return jax.jit(
        lambda params, x, grid: solvers.sample(v, params, x, method=solvers.on_grid(grid, solver))
    )


def run(v, x, solver, grid, params=None):
    return compiled(v, solver)({} if params is None else params, x, jnp.asarray(grid))


def draw(n=8, d=2):
    return jnp.asarray(np.random.default_rng(0).normal(size=(n, d)))


CALLS: list[int] = []


def counted(schedule):
    """The velocity of the mixture, which notes each evaluation in CALLS."""
    oracle = oracles.mixture(*MIXTURE, schedule=schedule)

    def apply(params, x, t, cond=None, *, key=None):
        jax.debug.callback(lambda: CALLS.append(1))
        return oracle.velocity(x, t)

    return types.Velocity(None, apply)


COUNTED = {schedule: counted(schedule) for schedule in (LINEAR, COSINE)}


def run_and_count(v, x, solver, grid):
    """The end, after a check that evaluations counted are those claimed, and that no row failed."""
    CALLS.clear()
    y, info = run(v, x, solver, grid)
    jax.block_until_ready(y)
    jax.effects_barrier()
    assert info.evaluations.tolist() == [len(CALLS)] * len(x)
    assert info.status.tolist() == [solvers.Status.OK] * len(x)
    assert np.abs(y).max() < 10
    return np.asarray(y)


@pytest.fixture(scope="module")
def exact_states():
    """x and where the ODE of the mixture takes it from 0.1 to 0.9, for both schedules."""
    with jax.enable_x64(True):
        x, grid = draw(16), np.linspace(0.1, 0.9, 101)
        return x, {s: run(v, x, diffrax.Dopri8(), grid)[0] for s, v in COUNTED.items()}


@everyone
def test_order_of_accuracy_on_a_mixture(x64, exact_states, name):
    """On a grid that starts with small steps, whose first one of low order does not show, and is
    uneven throughout."""
    x, states = exact_states
    v, exact, solver = COUNTED[schedule_of(name)], states[schedule_of(name)], SOLVERS[name]
    errors = []
    for n in (64, 128):
        y = run_and_count(v, x, solver, 0.1 + 0.8 * solvers.grids.power(n, 2))
        errors.append(float(np.sqrt(np.mean((y - exact) ** 2))))
    # the next order still shows: the slopes seen are from 3.68 for 4 to 2.03 for 2
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), solver.order(None), atol=0.35)


@everyone
def test_both_ends(x64, exact_states, name):
    """Nothing is NaN from t=0 to t=1, and from there it comes back."""
    x, v = exact_states[0], COUNTED[schedule_of(name)]
    run_and_count(v, x, SOLVERS[name], solvers.grids.edm(64))
    grid = solvers.grids.uniform(64)
    there = run_and_count(v, x, SOLVERS[name], grid)
    assert np.abs(there - x).max() > 1
    back = run_and_count(v, there, SOLVERS[name], grid[::-1])
    # 1 / 64 of a distance of 2 to 4 each way at first order; its square times 100, at the ends, for
    # the others
    atol = 0.2 if SOLVERS[name].order(None) == 1 else 0.04
    np.testing.assert_allclose(back, x, atol=atol)


@typical
@pytest.mark.parametrize("n", [1, 5])
def test_both_ends_in_float32(name, n):
    v, x = COUNTED[schedule_of(name)], draw().astype(jnp.float32)
    for grid in (solvers.grids.uniform(n), solvers.grids.uniform(n)[::-1]):
        run_and_count(v, x, SOLVERS[name], grid)


def test_diffusers_takes_the_same_steps(x64):
    peer = np.load(PEERS)
    v = as_velocity(
        lambda params, x, t, cond: jnp.sin(x @ jnp.asarray(peer["matrix"]) + 2 * t[:, None])
    )
    x, grid = jnp.asarray(peer["x"]), peer["grid"]
    for order in (1, 2, 3):
        np.testing.assert_allclose(
            run(v, x, solvers.unipc(order), grid)[0], peer[f"unipc_{order}"], rtol=1e-12
        )
        # UniPC without its corrector
        np.testing.assert_allclose(
            run(v, x, solvers.dpm_solver_pp(order), grid)[0], peer[f"unip_{order}"], rtol=1e-12
        )
    # these schedulers round to float32 on the way
    np.testing.assert_allclose(
        run(v, x, solvers.dpm_solver_pp(2), grid)[0], peer["dpm_solver_pp_2"], atol=1e-6
    )
    np.testing.assert_allclose(run(v, x, solvers.ddim(), grid)[0], peer["euler"], atol=1e-6)
    np.testing.assert_allclose(run(v, x, diffrax.Heun(), grid[:-1])[0], peer["heun"], atol=1e-6)


def test_ddim_is_eulers_method_on_the_linear_path(x64):
    v, x, grid = oracles.as_velocity(oracles.mixture(*MIXTURE)), draw(), solvers.grids.cosine(6)
    euler, _ = run(v, x, diffrax.Euler(), grid)
    for solver in (solvers.ddim(), solvers.adams_bashforth(1), solvers.dpm_solver_pp(1)):
        np.testing.assert_allclose(run(v, x, solver, grid)[0], euler, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", [COSINE, schedules.polynomial(2.0), schedules.vp()])
def test_one_point_of_data_is_exact(x64, schedule):
    """Whatever holds the prediction of x1 makes no error where it is constant: x_t = alpha x1 +
    sigma x0, on any path."""
    x0, x1 = draw(), draw(1)[0]
    v = oracles.as_velocity(oracles.gaussian(x1, 1e-12, schedule))
    (a, s), (a_end, s_end) = (
        ([float(f(jnp.asarray(t))) for f in schedule[:2]]) for t in (0.0, 0.8)
    )
    start = a * x1[None] + s * x0
    for solver in (
        solvers.ddim(schedule),
        solvers.dpm_solver_pp_2s(schedule),
        solvers.dpm_solver_pp(3, schedule),
        solvers.unipc(2, schedule),
    ):
        y, _ = run(v, start, solver, 0.8 * solvers.grids.uniform(4))
        np.testing.assert_allclose(
            y, a_end * x1[None] + s_end * x0, rtol=1e-6, atol=1e-6
        )  # vp: sqrt(1e-12) / alpha(0)


def test_published_formulas_of_the_single_step_methods(x64):
    """In lambda = log(alpha / sigma), halfway: DPM-Solver-2, and DPM-Solver++(2S) with r = 1/2."""
    oracle, x, (t, s) = oracles.mixture(*MIXTURE, schedule=COSINE), draw(), (0.3, 0.45)
    v = oracles.as_velocity(oracle)
    alpha, sigma = (lambda t: np.sin(np.pi * t / 2)), (lambda t: np.cos(np.pi * t / 2))
    lam = lambda t: np.log(alpha(t) / sigma(t))  # noqa: E731
    h = lam(s) - lam(t)
    mid = 2 / np.pi * np.arctan(np.exp(lam(t) + h / 2))
    noise = lambda x, t: -sigma(t) * oracle.score(x, t)  # noqa: E731
    data = lambda x, t: (x - sigma(t) * noise(x, t)) / alpha(t)  # noqa: E731
    u = alpha(mid) / alpha(t) * x - sigma(mid) * np.expm1(h / 2) * noise(x, t)
    expected = alpha(s) / alpha(t) * x - sigma(s) * np.expm1(h) * noise(u, mid)
    middle = solvers.midpoint_in_log_snr(COSINE)
    y, _ = run(v, x, solvers.dpm_solver_2(COSINE, middle), [t, s])
    np.testing.assert_allclose(y, expected, rtol=1e-10)
    u = sigma(mid) / sigma(t) * x - alpha(mid) * np.expm1(-h / 2) * data(x, t)
    expected = sigma(s) / sigma(t) * x - alpha(s) * np.expm1(-h) * data(u, mid)
    y, _ = run(v, x, solvers.dpm_solver_pp_2s(COSINE, middle), [t, s])
    np.testing.assert_allclose(y, expected, rtol=1e-10)


def test_a_schedule_without_inverse_has_its_middle_too(x64):
    plain = Schedule(lambda t: t, lambda t: 1 - t)
    for t, s in ((0.2, 0.7), (0.9, 0.3), (0.0, 0.5), (0.5, 1.0), (0.0, 1.0)):
        given, expected = (
            solvers.midpoint_in_log_snr(sch)(jnp.asarray(t), jnp.asarray(s))
            for sch in (plain, LINEAR)
        )
        np.testing.assert_allclose(given, expected, atol=1e-10)
    np.testing.assert_allclose(
        solvers.midpoint_in_log_snr()(0.2, 0.7), 1 / (1 + np.sqrt(4 * 3 / 7)), rtol=1e-12
    )


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_bashforth_integrates_polynomials(x64, order):
    """Of degree order - 1 in t, exactly, on an uneven grid, once it knows enough points."""
    grid = np.asarray([0.0, 0.07, 0.2, 0.22, 0.5, 0.6, 0.93])
    powers = np.arange(1.0, order + 1)
    v = as_velocity(
        lambda params, x, t, cond: jnp.sum(powers[None] * t[:, None] ** (powers[None] - 1), axis=1)[
            :, None
        ]
    )
    ends = [
        float(run(v, jnp.zeros((1, 1)), solvers.adams_bashforth(order), grid[:n])[0][0, 0])
        for n in (6, 7)
    ]
    np.testing.assert_allclose(
        ends[1] - ends[0], np.sum(grid[-1] ** powers - grid[-2] ** powers), rtol=1e-12
    )


def test_fireflow_and_rf_solver_by_hand(x64):
    v, x, grid = oracles.as_velocity(oracles.mixture(*MIXTURE)), draw(), solvers.grids.power(5, 1.5)
    f = lambda x, t: v.apply({}, x, t)  # noqa: E731
    y, last, z = x, f(x, 0.0), x
    for t, h in zip(grid, np.diff(grid), strict=False):
        last = f(y + h / 2 * last, t + h / 2)
        y = y + h * last
        slope = f(z, t)
        second = (f(z + h / 2 * slope, t + h / 2) - slope) / (h / 2)
        z = z + h * slope + h**2 / 2 * second  # RF-Solver, as it is written
    np.testing.assert_allclose(run(v, x, solvers.fireflow(), grid)[0], y, rtol=1e-10)
    np.testing.assert_allclose(run(v, x, diffrax.Midpoint(), grid)[0], z, rtol=1e-10)


@pytest.mark.parametrize("name", ["dpm_solver_2 log-SNR", "unipc 2"])
def test_gradients_by_the_adjoints_and_of_the_grid(x64, name):
    """RecursiveCheckpoint and Direct agree, and with differences; the times of the grid have a
    gradient as well."""
    v, x = (
        as_velocity(lambda params, x, t, cond: params["a"] * jnp.sin(x + 2 * t[:, None])),
        draw(4),
    )
    at = (jnp.asarray(1.1), x, jnp.asarray([0.0, 0.2, 0.35, 0.7, 1.0]))

    def loss(a, x, grid, adjoint):
        return jnp.sum(
            jnp.sin(
                solvers.sample(
                    v, {"a": a}, x, method=solvers.on_grid(grid, SOLVERS[name], adjoint=adjoint)
                )[0]
            )
        )

    checkpointed, direct = (
        jax.jit(jax.value_and_grad(lambda *args: loss(*args, adjoint), argnums=(0, 1, 2)))  # noqa: B023
        for adjoint in (diffrax.RecursiveCheckpointAdjoint(), diffrax.DirectAdjoint())
    )
    _, slopes = checkpointed(*at)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12), slopes, direct(*at)[1]
    )
    d = 1e-6
    for k, move in ((0, d), (2, d * np.eye(5)[2])):
        plus, minus = (
            checkpointed(*(a + sign * move if i == k else a for i, a in enumerate(at)))[0]
            for sign in (1, -1)
        )
        np.testing.assert_allclose(
            np.sum(slopes[k] * move / d), (plus - minus) / (2 * d), rtol=1e-5, atol=1e-7
        )
    assert all(np.all(np.isfinite(g)) and np.any(g != 0) for g in slopes)


def test_backsolve_goes_back_along_the_same_solver(x64):
    """It solves its own equation, to the accuracy of the solver."""
    v, x = as_velocity(lambda params, x, t, cond: jnp.sin(x + 2 * t[:, None])), draw()
    slopes = []
    for adjoint in (diffrax.BacksolveAdjoint(), diffrax.RecursiveCheckpointAdjoint()):
        how = solvers.fixed(40, solvers.unipc(2), adjoint=adjoint)
        loss = lambda x, how=how: jnp.sum(solvers.sample(v, {}, x, method=how)[0])  # noqa: E731
        slopes.append(jax.jit(jax.grad(loss))(x))
    assert np.abs(slopes[1] - 1).max() > 0.1
    np.testing.assert_allclose(
        slopes[0], slopes[1], atol=5e-3
    )  # second order at the ends: some 1 / 40^2


@pytest.mark.parametrize("name", ["dpm_solver_pp_2s", "unipc 2"])
def test_log_dets_pytrees_and_types(name):
    """A log-det is a state like any other: log_det of the Gaussian's map is log 0.5 in each of two
    dimensions."""
    v, x = oracles.as_velocity(oracles.gaussian([0.7, 0.7], 0.25)), draw().astype(jnp.bfloat16)
    run_ = jax.jit(
        lambda x: solvers.sample_with_log_det(v, {}, x, method=solvers.fixed(40, SOLVERS[name]))
    )
    y, log_det, info = run_(x)
    assert y.dtype == jnp.bfloat16 and log_det.dtype == jnp.float32
    np.testing.assert_allclose(log_det, 2 * np.log(0.5), atol=1e-2)  # second order: some 1 / 40^2
    tree = {"a": jnp.ones((3, 2, 2, 1)), "b": jnp.ones((3,))}
    decay = as_velocity(lambda params, x, t, cond: jax.tree.map(jnp.negative, x))
    y, _ = run(decay, tree, SOLVERS[name], np.linspace(0, 1, 51))
    jax.tree.map(
        lambda y: np.testing.assert_allclose(y, np.full(y.shape, np.exp(-1)), rtol=5e-3), y
    )


def test_traced_once_though_built_again():
    """Two solvers of equal options are equal: no second compilation, with or without jit, and
    nothing talks to the host."""
    traces = []

    def apply(params, x, t, cond=None, *, key=None):
        traces.append(1)
        return params["a"] * x

    v = types.Velocity(None, apply)
    call = lambda a, x: solvers.sample(v, {"a": a}, x, method=solvers.fixed(3, solvers.unipc(2)))  # noqa: E731
    for f in (jax.jit(call), call):
        f(jnp.asarray(1.0), jnp.ones((2, 2)))
        first = len(traces)
        f(jnp.asarray(2.0), jnp.zeros((2, 2)))
        assert len(traces) == first > 0
    assert "callback" not in str(jax.make_jaxpr(call)(jnp.asarray(1.0), jnp.ones((2, 2))))


def test_orders_that_there_are():
    for make, most in (
        (solvers.adams_bashforth, 4),
        (solvers.dpm_solver_pp, 3),
        (solvers.unipc, 3),
    ):
        for order in (0, most + 1, 1.5, True):
            with pytest.raises(
                ValueError, match=rf"expected order to be one of \[1, .*{most}\], got {order}"
            ):
                make(order)
    with pytest.raises(ValueError, match="no error estimate"):
        solvers.sample(
            as_velocity(lambda p, x, t, c: x),
            {},
            draw(),
            method=solvers.adaptive(solvers.unipc(), rtol=1e-3, atol=1e-3),
        )
