"""OFTSR: chords on the teacher's trajectory, and what the knob does on a law where both ends are
known."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_maps import (
    COSINE,
    GAUSSIAN,
    MIXTURE,
    ORACLES,
    SINE,
    at,
    exact_map,
    random_params,
    same_when_repeated,
    silent_leaves,
)

import jflow
from jflow import couplings, losses, nets, oracles, solvers, times
from jflow.losses import lagrangian_map_distillation, tunable_distillation
from jflow.solvers import restore
from jflow.types import FlowMap, Velocity

KEY = jax.random.key(0)


def chords(flow_map):
    """The exact student: the average velocity from 0 to the knob, + a x + b t."""

    def apply(params, x, t, cond=None, *, key=None):
        u = flow_map.apply({}, x, jnp.zeros_like(t), t, cond)
        return u + params["a"] * x + params["b"] * t[:, None]

    return Velocity(lambda key, x, t, cond=None: at(), apply)


@pytest.mark.parametrize("law", ORACLES)
def test_the_exact_student_has_no_residual(law, x64):
    oracle = ORACLES[law]
    loss = tunable_distillation(
        chords(exact_map(law)),
        oracles.as_velocity(oracle),
        method=solvers.fixed(1, diffrax.Dopri5()),
    )
    batch = {"x0": jax.random.normal(KEY, (64, 2)), "x": jnp.zeros((64, 2))}
    run = jax.jit(lambda params: loss(params, KEY, batch, {"teacher": {}}))
    value, metrics = run(at())
    assert value < 1e-6 and metrics["residual"] < 1e-6 and metrics["boundary"] < 1e-6
    assert run(at(a=0.1))[1]["residual"] > 1e-3 and run(at(b=0.1))[1]["residual"] > 1e-4


@pytest.mark.parametrize(("solver", "order"), [(diffrax.Euler(), 2), (diffrax.Midpoint(), 4)])
def test_the_residual_falls_with_the_step(solver, order, x64):
    """The squares of first and second order."""
    student, batch = (
        chords(exact_map("mixture")),
        {"x0": jax.random.normal(KEY, (64, 2)), "x": jnp.zeros((64, 2))},
    )
    steps, residuals = (0.1, 0.05, 0.025), []
    for step in steps:
        loss = tunable_distillation(
            student,
            oracles.as_velocity(MIXTURE),
            step=step,
            method=solvers.fixed(1, solver),
            knob=times.uniform(0.2, 0.8),
        )
        residuals.append(
            float(
                jax.jit(lambda loss=loss: loss(at(), KEY, batch, {"teacher": {}})[1]["residual"])()
            )
        )
    found = np.polyfit(np.log(steps), np.log(residuals), 1)[0]
    assert order - 0.5 < found < order + 0.5, residuals


def test_small_steps_are_lagrangian_distillation_from_the_source(x64):
    """gradient / (step / s) -> that of lagrangian_map_distillation at t = 0, r = knob; the error
    halves with the step."""
    student, teacher, knob = chords(exact_map("gaussian")), oracles.as_velocity(GAUSSIAN), 0.4
    batch = {"x0": jax.random.normal(KEY, (16, 2)), "x": jnp.zeros((16, 2))}
    params, frozen = at(0.3, -0.2), {"teacher": {}}
    model = FlowMap(None, lambda p, x, t, r, cond=None, *, key=None: student.apply(p, x, r, cond))
    limit = lagrangian_map_distillation(
        model, teacher, times=lambda key, n: (jnp.zeros(n), jnp.full(n, knob))
    )
    aim = jax.jit(jax.grad(lambda p: limit(p, KEY, batch, frozen)[0]))(params)
    errors = []
    for step in (2e-3, 1e-3):
        loss = tunable_distillation(
            student, teacher, knob=lambda key, n: jnp.full(n, knob), step=step, boundary=0.0
        )
        got = jax.jit(jax.grad(lambda p, loss=loss: loss(p, KEY, batch, frozen)[0]))(params)
        share = step / (knob + step)
        errors.append(
            max(
                abs(float(g / share - a))
                for g, a in zip(*map(jax.tree.leaves, (got, aim)), strict=True)
            )
        )
    assert errors[1] < 0.02 and 1.8 < errors[0] / errors[1] < 2.2, errors


# x1 of N(0, 1), x0 = x1 + SIGMA noise: x_t = x1 + (1 - t) SIGMA noise, of variance
# 1 + (1 - t)^2 SIGMA^2
SIGMA = 0.8


def variance(t):
    return 1 + (1 - t) ** 2 * SIGMA**2


RESTORING = Velocity(
    lambda *a: {},
    lambda p, x, t, cond=None, *, key=None: (-(SIGMA**2) * (1 - t) / variance(t))[:, None] * x,
)


def scaled_chords(p, x, t, cond=None, *, key=None):
    """(x_t - x0) / t with x_t = x0 sqrt(variance(t) / variance(0)), as a difference of squares."""
    root, first = jnp.sqrt(variance(t)), np.sqrt(variance(0.0))
    return ((t - 2) * SIGMA**2 / (first * (root + first)))[:, None] * x * (1 + p)


def test_the_knob_trades_fidelity_for_realism(x64):
    """On Gaussians with a source made from the data: knob 0 is E[x1 | x0], knob 1 has the data's
    law."""
    student = Velocity(lambda *a: 0.0, scaled_chords)
    source = couplings.corrupted(lambda x: x, SIGMA)
    loss = tunable_distillation(student, RESTORING, method=solvers.fixed(1, diffrax.Dopri5()))
    loss = losses.chain(couplings.with_source(source), loss)
    x1 = jax.random.normal(KEY, (20_000, 1))
    value, metrics = jax.jit(lambda: loss(0.0, KEY, {"x": x1}, {"teacher": {}}))()
    assert value < 1e-9 and metrics["residual"] < 1e-9
    x0, cond = source(jax.random.key(1), x1, None)
    np.testing.assert_allclose(restore(student, 0.0, x0, 0.0, cond), x0 / (1 + SIGMA**2), rtol=1e-9)
    np.testing.assert_allclose(
        restore(student, 0.0, x0, 1.0, cond), x0 / np.sqrt(1 + SIGMA**2), rtol=1e-9
    )
    knobs = (0.0, 0.5, 1.0)
    outs = [np.asarray(restore(student, 0.0, x0, jnp.full(20_000, k), cond)) for k in knobs]
    errors, spreads = [np.mean((o - x1) ** 2) for o in outs], [np.var(o) for o in outs]
    assert errors[0] < errors[1] < errors[2] and spreads[0] < spreads[1] < spreads[2]
    assert abs(spreads[2] - 1) < 5 * np.sqrt(2 / 20_000)
    assert abs(errors[0] - SIGMA**2 / (1 + SIGMA**2)) < 5 * np.sqrt(2 / 20_000)


def test_alignment_holds_on_straight_trajectories_alone(x64):
    batch, frozen = (
        {"x0": jax.random.normal(KEY, (16, 2)), "x": jnp.zeros((16, 2))},
        {"teacher": {}},
    )
    straight = Velocity(
        lambda *a: {}, lambda p, x, t, cond=None, *, key=None: jnp.full_like(x, 1.5)
    )
    loss = tunable_distillation(straight, straight, align=1.0)
    value, _ = jax.jit(lambda: loss({}, KEY, batch, frozen))()
    assert value < 1e-20
    loss = tunable_distillation(
        chords(exact_map("gaussian")), oracles.as_velocity(GAUSSIAN), align=1.0
    )
    assert jax.jit(lambda: loss(at(), KEY, batch, frozen)[1]["align"])() > 1e-3


def test_a_tiled_event_changes_nothing(x64):
    loss = tunable_distillation(SINE, COSINE, align=0.5)
    x0, weight = jax.random.normal(KEY, (8, 3)), jnp.arange(8.0)
    same_when_repeated(loss, 0.7, x0, 0 * x0, {"teacher": {}}, rtol=1e-12, weight=weight)


def test_the_last_knob_is_finite():
    loss = tunable_distillation(SINE, COSINE, knob=lambda key, n: jnp.linspace(0, 1, n))
    x0 = jax.random.normal(KEY, (8, 3))
    value, metrics = jax.jit(lambda: loss(0.7, KEY, {"x0": x0, "x": x0}, {"teacher": {}}))()
    assert np.isfinite(value) and np.isfinite(metrics["residual"])


def test_gradients_reach_every_param_and_stop_at_the_teacher():
    velocity = jflow.velocity(nets.ResidualMLP(8, 1, num_classes=2))
    x, t, cond = GAUSSIAN.sample(KEY, 4), jnp.linspace(0, 0.9, 4), jnp.asarray([0, 1, 2, 2])
    params = random_params(velocity.init, x, t, cond)
    loss = tunable_distillation(velocity, velocity, align=0.1)
    batch = {"x0": x, "x": x, "cond": cond}
    frozen = {"teacher": jax.tree.map(lambda p: 0.9 * p, params)}
    assert not silent_leaves(loss, params, batch, frozen)


def test_bad_input():
    student, teacher = SINE, COSINE
    batch = {"x0": jnp.zeros((2, 1)), "x": jnp.zeros((2, 1))}
    for step in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"step in \(0, 1\]"):
            tunable_distillation(student, teacher, step=step)
    with pytest.raises(ValueError, match="finite boundary >= 0"):
        tunable_distillation(student, teacher, boundary=-1.0)
    with pytest.raises(ValueError, match="'teacher' in frozen"):
        tunable_distillation(student, teacher)(1.0, KEY, batch)
    with pytest.raises(ValueError, match="'x0' beside 'x'"):
        tunable_distillation(student, teacher)(1.0, KEY, {"x": jnp.zeros((2, 1))}, {"teacher": {}})
    with pytest.raises(ValueError, match=r"shape \[2\]"):
        restore(student, 1.0, jnp.zeros((2, 1)), jnp.zeros(3))
