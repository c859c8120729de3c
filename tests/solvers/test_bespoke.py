"""Bespoke solvers: the plain method at first, its order whatever is learned, changes of schedule,
the bound, and training."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jflow
from jflow import nets, oracles, paths, solvers
from jflow.paths import LINEAR, schedules
from jflow.solvers import _bespoke
from jflow.types import Velocity

EULER, MIDPOINT = diffrax.Euler(), diffrax.Midpoint()
GAUSSIAN = oracles.gaussian([2.0, -1.0], [0.25, 4.0])
MIXTURE = oracles.mixture([0.4, 0.6], [[-2.0, 0.0], [1.5, 1.0]], 0.3)
V = oracles.as_velocity(MIXTURE)
both = pytest.mark.parametrize("solver", [EULER, MIDPOINT], ids=["euler", "midpoint"])


def field(f):
    return Velocity(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: f(x, t))


def noise(n, d=2, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, d)), float)


@functools.cache
def solved(n, seed, gaps):
    """[n, gaps + 1, 2]: the mixture's solution from noise(n, seed) at equal times, in float64 by
    Dopri8."""
    times = np.linspace(0, 1, gaps + 1)
    with jax.enable_x64(True):
        x0 = jnp.asarray(np.random.default_rng(seed).normal(size=(n, 2)))
        maps = jax.jit(lambda x, t: oracles.mixture_flow_map(MIXTURE, x, t, t + 1 / gaps))
        states = [x0]
        for t in times[:-1]:
            states.append(maps(states[-1], jnp.full(n, t)))
        return np.stack(states, axis=1)


def scattered(steps, solver, seed=0, size=0.3):
    """A theta of no system."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(size * rng.normal(size=p.shape), p.dtype),
        solvers.bespoke_params(steps, solver=solver),
    )


@functools.cache
def sampler(velocity, solver):
    return jax.jit(lambda theta, x0: solvers.bespoke_sample(theta, velocity, {}, x0, solver=solver))


def run(theta, velocity, x0, solver):
    return sampler(velocity, solver)(theta, x0)


@both
def test_at_first_it_is_the_plain_method(x64, solver):
    v, x0 = V, noise(16)
    x1, info = run(solvers.bespoke_params(5, solver=solver), v, x0, solver)
    plain, info_plain = jax.jit(
        lambda x: solvers.sample(v, {}, x, method=solvers.fixed(5, solver))
    )(x0)
    np.testing.assert_allclose(x1, plain, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(info.evaluations, info_plain.evaluations)
    assert info.evaluations[0] == (5 if solver is EULER else 10) and np.all(
        info.status == solvers.Status.OK
    )


@both
def test_it_has_as_many_numbers_as_the_paper_says(solver):
    for n in (1, 4, 10):
        theta = solvers.bespoke_params(n, solver=solver)
        assert sum(p.size for p in theta.values()) == (4 * n - 1 if solver is EULER else 8 * n - 1)
        nodes = _bespoke._read(scattered(n, solver, size=2.0))
        assert np.all(np.diff(nodes.t) > 0) and (nodes.t[0], nodes.t[-1], nodes.s[0]) == (0, 1, 1)
        assert np.all(nodes.dt > 0) and np.all(nodes.s > 0)


@both
def test_its_order_is_kept_whatever_is_learned(x64, solver):
    """Random smooth t(r) and s(r), regressed on a mixture."""
    v, x0, steps, end = V, noise(256), (16, 32, 64), solved(256, 0, 16)[:, -1]
    for seed in range(2):
        a, b, c, d = np.random.default_rng(seed).uniform(-0.7, 0.7, size=4)
        time = lambda r: (  # noqa: E731
            r + (a * jnp.sin(jnp.pi * r) + b / 2 * jnp.sin(2 * jnp.pi * r)) / jnp.pi / 2  # noqa: B023
        )
        scale = lambda r: jnp.exp(c * r + d * jnp.sin(3 * r))  # noqa: B023, E731
        miss = []
        for n in steps:
            theta = solvers.bespoke_params(n, solver=solver, time=time, scale=scale)
            miss.append(np.sqrt(np.mean((run(theta, v, x0, solver)[0] - end) ** 2)))
        slope = -np.polyfit(np.log(steps), np.log(miss), 1)[0]
        # what is left of the next order: 0.1 for a step of 1/16 and its halves
        np.testing.assert_allclose(slope, 1 if solver is EULER else 2, atol=0.15)


@both
def test_a_change_of_schedule_is_one_of_them(x64, solver):
    """The same steps as those of `paths.reschedule` on the cosine path, sin x1 + cos x0 = c ((1 -
    t) x0 + t x1)."""
    v, x0, cosine = V, noise(16), schedules.cosine()
    sin, cos = (lambda r: jnp.sin(jnp.pi / 2 * r)), (lambda r: jnp.sin(jnp.pi / 2 * (1 - r)))
    time, scale = (lambda r: sin(r) / (sin(r) + cos(r))), (lambda r: sin(r) + cos(r))
    theta = solvers.bespoke_params(6, solver=solver, time=time, scale=scale)
    other = paths.reschedule(v, LINEAR, cosine)
    expected, _ = jax.jit(lambda x: solvers.sample(other, {}, x, method=solvers.fixed(6, solver)))(
        x0
    )
    np.testing.assert_allclose(run(theta, v, x0, solver)[0], expected, atol=1e-10)
    plain, _ = jax.jit(lambda x: solvers.sample(v, {}, x, method=solvers.fixed(6, solver)))(x0)
    assert np.abs(plain - expected).max() > 1e-2


def test_conditions_and_types():
    v = Velocity(
        None, lambda params, x, t, cond=None, *, key=None: params["a"] * cond[:, None] * jnp.sin(x)
    )
    theta, x0, cond = scattered(3, MIDPOINT), noise(4).astype(jnp.bfloat16), jnp.arange(4.0)
    x1, _ = solvers.bespoke_sample(theta, v, {"a": 2.0}, x0, cond)
    assert x1.dtype == jnp.bfloat16
    alone, _ = solvers.bespoke_sample(theta, v, {"a": 2.0}, x0[2:3], cond[2:3])
    np.testing.assert_allclose(x1[2:3].astype(float), alone.astype(float), rtol=1e-2)


def test_states_between_knots_are_of_fourth_order(x64):
    """At a third and two thirds of their gaps."""
    v, x0, t = oracles.as_velocity(GAUSSIAN), noise(8), jnp.asarray([0.0, 1 / 3, 2 / 3, 1.0])
    truth = jnp.stack([GAUSSIAN.flow_map(x0, 0.0, time) for time in t])
    miss = []
    for n in (32, 64):
        knots = np.linspace(0, 1, n + 1)
        x = jnp.stack([GAUSSIAN.flow_map(x0, 0.0, time) for time in knots], axis=1)
        states = jax.vmap(lambda t, x=x, knots=knots: _bespoke._between(v, {}, x, knots, t, None))(
            t
        )
        np.testing.assert_allclose(
            states[jnp.asarray([0, 3])], truth[jnp.asarray([0, 3])], atol=1e-12
        )
        miss.append(float(jnp.max(jnp.abs(states - truth))))
    np.testing.assert_allclose(np.log2(miss[0] / miss[1]), 4, atol=0.2)


@both
def test_the_bound_is_one(x64, solver):
    """On a Gaussian, whose velocity is linear with a known Lipschitz constant, every row's error is
    at most its bound."""
    v, x0, knots = oracles.as_velocity(GAUSSIAN), noise(64), np.linspace(0, 1, 65)
    x = jnp.stack([GAUSSIAN.flow_map(x0, 0.0, t) for t in knots], axis=1)
    t = np.linspace(0, 1, 1001)
    variances = (1 - t[:, None]) ** 2 + t[:, None] ** 2 * np.asarray([0.25, 4.0])
    rate = (t[:, None] * np.asarray([0.25, 4.0]) - (1 - t[:, None])) / variances
    loss = solvers.bespoke_bound(v, knots, solver=solver, lipschitz=float(np.abs(rate).max()))
    bounds = jax.jit(
        jax.vmap(lambda theta, x: loss(theta, None, {"x": x[None]}, {"teacher": {}})[0], (None, 0))
    )
    tight = []
    for seed in range(4):
        theta = scattered(4, solver, seed)
        miss = np.sqrt(np.mean((run(theta, v, x0, solver)[0] - x[:, -1]) ** 2, axis=1))
        bound = np.asarray(bounds(theta, x))
        assert np.all(miss <= bound * (1 + 1e-4)), seed  # the cubic between knots is off by less
        tight.append(np.max(miss / bound))
    assert max(tight) > 0.05  # and it says something


@both
def test_the_bound_by_hand(x64, solver):
    """d_i from single steps, M_i from the definition, in loops."""
    v, x0, knots, n = (
        field(lambda x, t: jnp.sin(x + 2 * t[:, None])),
        noise(5),
        np.linspace(0, 1, 201),
        2,
    )
    x, _ = jax.jit(
        lambda x: jax.lax.scan(lambda x, ends: (_fine(v, x, ends),) * 2, x, _gaps(knots))
    )(x0)[::-1]
    x = jnp.concatenate([x0[:, None], jnp.moveaxis(x, 0, 1)], axis=1)
    theta = scattered(n, solver, 5)
    value, metrics = jax.jit(
        lambda theta: solvers.bespoke_bound(v, knots, solver=solver)(
            theta, None, {"x": x}, {"teacher": {}}
        )
    )(theta)
    k = 1 if solver is EULER else 2
    nodes = jax.tree.map(np.asarray, _bespoke._read(theta))
    t, dt, s, ds = nodes
    f, h = (lambda y, i: ds[i] / s[i] * y + dt[i] * s[i] * np.sin(y / s[i] + 2 * t[i])), 1 / n
    rate = lambda i: abs(ds[i]) / s[i] + dt[i]  # noqa: E731
    at = lambda time: np.stack(  # noqa: E731
        [[np.interp(time, knots, x[b, :, d]) for d in range(2)] for b in range(5)]
    )
    d, growth = [], []
    for i in range(n):
        a, b = i * k, (i + 1) * k
        y = s[a] * at(t[a])
        end = y + h * (f(y, a) if k == 1 else f(y + h / 2 * f(y, a), a + 1))
        d.append(np.sqrt(np.mean((end / s[b] - at(t[b])) ** 2, axis=1)))
        growth.append(
            s[a] / s[b] * (1 + h * (rate(a) if k == 1 else rate(a + 1) * (1 + h / 2 * rate(a))))
        )
    expected = sum(d[i] * np.prod(growth[i + 1 :]) for i in range(n))
    np.testing.assert_allclose(
        value, np.mean(expected), rtol=1e-3
    )  # linear interpolation at 201 knots
    np.testing.assert_allclose(metrics["residual"], np.mean(np.square(d)), rtol=1e-3)


def _gaps(knots):
    return jnp.stack([jnp.asarray(knots[:-1]), jnp.asarray(knots[1:])], axis=1)


def _fine(v, x, ends):
    return solvers.sample(v, {}, x, method=solvers.on_grid(ends, diffrax.Tsit5()))[0]


@both
def test_a_straight_flow_has_no_loss(x64, solver):
    constant, x0, knots = field(lambda x, t: jnp.full_like(x, 0.7)), noise(6), np.linspace(0, 1, 9)
    x = x0[:, None] + jnp.asarray(knots)[None, :, None] * 0.7
    theta = solvers.bespoke_params(3, solver=solver)
    for loss, batch in (
        (solvers.bespoke_bound(constant, knots, solver=solver), {"x": x}),
        (solvers.bespoke_error(constant, solver=solver), {"x0": x0, "x": x[:, -1]}),
    ):
        both = jax.value_and_grad(
            lambda p, loss=loss, b=batch: loss(p, None, b, {"teacher": {}}), has_aux=True
        )
        (value, metrics), grads = jax.jit(both)(theta)
        assert value < 1e-12 and metrics["residual"] < 1e-24
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_means_over_the_event_and_weighted_ones_over_rows(x64):
    bend, theta, knots, x = (
        field(lambda x, t: jnp.sin(x + t[:, None])),
        scattered(2, MIDPOINT),
        [0, 0.5, 1],
        noise(6, 6),
    )
    x = x.reshape(6, 3, 2)
    for loss, batch in (
        (solvers.bespoke_bound(bend, knots), {"x": x}),
        (solvers.bespoke_error(bend), {"x0": x[:, 0], "x": x[:, -1]}),
    ):
        value = jax.jit(
            lambda b, w, loss=loss: loss(theta, None, {**b, "weight": w}, {"teacher": {}})[0]
        )
        rows = [value(batch, jnp.eye(6)[i]) for i in range(6)]
        assert np.ptp(rows) > 0.1
        np.testing.assert_allclose(
            value(batch, jnp.arange(6.0)), np.dot(rows, np.arange(6)) / 15, rtol=1e-12
        )
        twice = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=-1), batch)
        np.testing.assert_allclose(
            value(twice, jnp.arange(6.0)), value(batch, jnp.arange(6.0)), rtol=1e-12
        )


def trained(loss, theta, batch, updates=400, rate=2e-2):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, updates))

    def update(state, _):
        theta, opt = state
        grads = jax.grad(lambda p: loss(p, None, batch, {"teacher": {}})[0])(theta)
        step, opt = optimizer.update(grads, opt)
        return (optax.apply_updates(theta, step), opt), None

    return jax.jit(lambda p: jax.lax.scan(update, (p, optimizer.init(p)), length=updates)[0][0])(
        theta
    )


@functools.cache
def plain_misses(evaluations):
    """By method: its error in as many evaluations, or the most that it can use of them."""
    fresh, end = noise(1024, seed=1), solved(1024, 1, 1)[:, -1].astype(np.float32)
    methods = {diffrax.Euler: 1, diffrax.Midpoint: 2, diffrax.Heun: 2, diffrax.Bosh3: 3}
    steps = {kind(): evaluations // each for kind, each in methods.items()}
    run = jax.jit(
        lambda x: [
            solvers.sample(V, {}, x, method=solvers.fixed(n, kind))[0] for kind, n in steps.items()
        ]
    )
    return {
        type(kind): float(jnp.sqrt(jnp.mean((y - end) ** 2)))
        for kind, y in zip(steps, run(fresh), strict=True)
    }


@pytest.mark.parametrize(
    "evaluations, solver, kind",
    [(10, MIDPOINT, "error"), (4, EULER, "bound")],
    ids=["10 midpoint error", "4 euler bound"],
)
def test_trained_it_beats_the_plain_methods_at_equal_evaluations(evaluations, solver, kind):
    """On rows that it was not trained on; the exact field of two Gaussians in the plane is the
    model. By the error, below every plain method; by the bound, which is looser, below the method
    that it changes."""
    x = jnp.asarray(solved(256, 0, 16), jnp.float32)
    theta = solvers.bespoke_params(evaluations // (1 if solver is EULER else 2), solver=solver)
    if kind == "bound":
        theta = trained(
            solvers.bespoke_bound(V, np.linspace(0, 1, 17), solver=solver), theta, {"x": x}, 200
        )
    else:
        theta = trained(
            solvers.bespoke_error(V, solver=solver), theta, {"x0": x[:, 0], "x": x[:, -1]}, 200
        )
    x1, info = run(theta, V, noise(1024, seed=1), solver)
    assert info.evaluations[0] == evaluations
    miss = float(jnp.sqrt(jnp.mean((x1 - solved(1024, 1, 1)[:, -1].astype(np.float32)) ** 2)))
    plain = plain_misses(evaluations)
    assert miss < (plain[type(solver)] if kind == "bound" else min(plain.values())) * 0.8, (
        miss,
        plain,
    )


def test_the_teacher_is_frozen_and_needed_and_every_number_is_trained():
    net = jflow.velocity(nets.ResidualMLP(8, 1))
    x0, knots = noise(4), np.linspace(0, 1, 5)
    x = jnp.stack([x0 * (1 + t) for t in knots], axis=1)
    params = jax.tree.map(lambda p: p + 0.2, jax.jit(net.init)(jax.random.key(0), x0, jnp.zeros(4)))
    theta = scattered(1, MIDPOINT)
    for loss, batch in (
        (solvers.bespoke_bound(net, knots), {"x": x}),
        (solvers.bespoke_error(net), {"x0": x0, "x": x[:, -1]}),
    ):
        ours, teachers = jax.jit(
            jax.grad(
                lambda p, t, loss=loss, b=batch: loss(p, None, b, {"teacher": t})[0], argnums=(0, 1)
            )
        )(theta, params)
        assert all(np.all(np.isfinite(g)) and np.all(g != 0) for g in jax.tree.leaves(ours))
        assert all(np.all(g == 0) for g in jax.tree.leaves(teachers))
        for frozen in (None, {"ema": params}):
            with pytest.raises(ValueError, match="'teacher' in frozen"):
                loss(theta, None, batch, frozen)


def test_bad_input():
    v, x, knots = field(lambda x, t: x), jnp.zeros((3, 5, 2)), np.linspace(0, 1, 5)
    frozen = {"teacher": {}}
    for made in (solvers.bespoke_params, solvers.bespoke_bound, solvers.bespoke_error):
        args = {solvers.bespoke_params: (3,), solvers.bespoke_bound: (v, knots)}.get(made, (v,))
        with pytest.raises(ValueError, match="Euler.. or diffrax.Midpoint"):
            made(*args, solver=diffrax.Heun())
    with pytest.raises(ValueError, match="at least 1, got 0"):
        solvers.bespoke_params(0)
    with pytest.raises(ValueError, match="t from 0.0 to 2.0"):
        solvers.bespoke_params(3, time=lambda r: 2 * r)
    with pytest.raises(ValueError, match=r"s\(0\) = 2.0"):
        solvers.bespoke_params(3, scale=lambda r: 2 + r)
    with pytest.raises(ValueError, match="lipschitz >= 0"):
        solvers.bespoke_bound(v, knots, lipschitz=-1.0)
    with pytest.raises(ValueError, match="rise strictly from 0 to 1"):
        solvers.bespoke_bound(v, knots[:-1])
    with pytest.raises(ValueError, match="a multiple of 2 for Midpoint"):
        solvers.bespoke_sample(solvers.bespoke_params(3, solver=EULER), v, {}, x[:, 0])
    with pytest.raises(ValueError, match=r"'times' \[m - 1\]"):
        solvers.bespoke_sample({"speeds": jnp.zeros(4)}, v, {}, x[:, 0])
    theta = solvers.bespoke_params(2)
    with pytest.raises(ValueError, match=r"shape \[b, 5, ...\], got \[3, 4, 2\]"):
        solvers.bespoke_bound(v, knots)(theta, None, {"x": x[:, :4]}, frozen)
    with pytest.raises(ValueError, match="'x0' beside 'x'"):
        solvers.bespoke_error(v)(theta, None, {"x": x}, frozen)
    with pytest.raises(ValueError, match="unknown keys"):
        solvers.bespoke_bound(v, knots)(theta, None, {"x": x, "y": x}, frozen)
