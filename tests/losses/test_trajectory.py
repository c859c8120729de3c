"""Trajectory distillation: its three targets hold at the teacher's flow map, and straightness where
the teacher is straight."""

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
    SINE_MAP,
    at,
    exact_map,
    near_map,
    random_params,
    same_when_repeated,
    silent_leaves,
)

import jflow
from jflow import nets, oracles, solvers, times
from jflow.losses import trajectory_distillation
from jflow.losses._teacher import average_velocity
from jflow.types import FlowMap, Velocity

KEY = jax.random.key(0)
TERMS = ("output", "change", "consistency", "straight")


@pytest.mark.parametrize("law", ORACLES)
def test_the_exact_map_has_no_residual(law, x64):
    oracle = ORACLES[law]
    loss = trajectory_distillation(
        near_map(exact_map(law)),
        oracles.as_velocity(oracle),
        method=solvers.fixed(8, diffrax.Dopri5()),
    )
    batch = {"x": oracle.sample(KEY, 64)}
    run = jax.jit(lambda params: loss(params, KEY, batch, {"teacher": {}}))
    value, metrics = run(at())
    assert value < 1e-6 and metrics["residual"] < 1e-6
    for moved in (at(a=0.1), at(b=0.1)):
        metrics = run(moved)[1]
        assert all(metrics[term] > 1e-5 for term in TERMS[:3])


def test_the_residual_falls_with_the_teachers_steps(x64):
    """Heun's error is of second order, its square of fourth."""
    model, batch = exact_map("mixture"), {"x": MIXTURE.sample(KEY, 64)}
    steps, residuals = (8, 16, 32), []
    for n in steps:
        loss = trajectory_distillation(
            model, oracles.as_velocity(MIXTURE), method=n, consistency=0.0
        )
        metrics = jax.jit(lambda loss=loss: loss({}, KEY, batch, {"teacher": {}})[1])()
        residuals.append(float(metrics["output"] + metrics["change"]))
    order = -np.polyfit(np.log(steps), np.log(residuals), 1)[0]
    assert 3.5 < order < 4.5, residuals


def shift(m):
    """x0 + m by the straight way, and its map."""
    return (
        Velocity(lambda *a: {}, lambda p, x, t, cond=None, *, key=None: jnp.full_like(x, m)),
        FlowMap(lambda *a: {}, lambda p, x, t, r, cond=None, *, key=None: jnp.full_like(x, m)),
    )


def test_a_straight_teacher_satisfies_all_four_and_a_curved_one_three(x64):
    batch, frozen = {"x": GAUSSIAN.sample(KEY, 32)}, {"teacher": {}}
    teacher, model = shift(1.5)
    loss = trajectory_distillation(model, teacher, straight=1.0)
    value, _ = jax.jit(lambda: loss({}, KEY, batch, frozen))()
    assert value < 1e-20
    loss = trajectory_distillation(
        exact_map("gaussian"), oracles.as_velocity(GAUSSIAN), method=16, straight=1.0
    )
    _, metrics = jax.jit(lambda: loss({}, KEY, batch, frozen))()
    assert metrics["residual"] < 1e-6 and metrics["straight"] > 1e-2


def test_the_average_velocity_of_a_teacher(x64):
    x, t = GAUSSIAN.sample(KEY, 16), jnp.linspace(0, 0.9, 16)
    teacher = oracles.as_velocity(GAUSSIAN)
    run = jax.jit(
        lambda r: average_velocity(teacher, {}, x, t, r, method=solvers.fixed(16, diffrax.Dopri5()))
    )
    for r in (t, jnp.ones(16), t * 0.5):  # standing, onward, backward
        y = run(r)
        np.testing.assert_allclose(y, GAUSSIAN.average_velocity(x, t, r), atol=1e-7)


def test_at_r_equal_t_the_change_is_the_teachers_velocity(x64):
    time, batch = times.uniform(), {"x": GAUSSIAN.sample(KEY, 32)}
    model = near_map(exact_map("gaussian"))
    loss = trajectory_distillation(
        model,
        oracles.as_velocity(GAUSSIAN),
        times=lambda key, n: (time(key, n),) * 2,
        output=0.0,
        consistency=0.0,
    )
    value, metrics = jax.jit(lambda: loss(at(a=0.3), KEY, batch, {"teacher": {}}))()
    assert value == metrics["change"]
    # u - v is what was added, a x_t: the mean square of 0.3 x_t, whatever the teacher
    other = trajectory_distillation(
        model, oracles.as_velocity(GAUSSIAN), times=lambda key, n: (time(key, n),) * 2
    )
    twice = jax.jit(lambda: other(at(a=0.6), KEY, batch, {"teacher": {}})[1]["change"])()
    np.testing.assert_allclose(twice, 4 * value, rtol=1e-9)


def test_terms_are_weighted_by_name(x64):
    model, batch, frozen = (
        near_map(exact_map("gaussian")),
        {"x": GAUSSIAN.sample(KEY, 16)},
        {"teacher": {}},
    )
    weights = dict(zip(TERMS, (0.5, 2.0, 3.0, 0.25), strict=True))
    loss = trajectory_distillation(model, oracles.as_velocity(GAUSSIAN), **weights)
    value, metrics = jax.jit(lambda: loss(at(0.3, 0.2), KEY, batch, frozen))()
    assert value == pytest.approx(
        float(sum(w * metrics[term] for term, w in weights.items())), rel=1e-12
    )
    assert all(metrics[term] > 1e-4 for term in TERMS)


def test_a_tiled_event_changes_nothing(x64):
    loss = trajectory_distillation(SINE_MAP, COSINE, straight=1.0)
    x0, x1 = jax.random.normal(KEY, (8, 3)), jax.random.normal(jax.random.key(1), (8, 3))
    same_when_repeated(loss, 0.7, x0, x1, {"teacher": {}}, rtol=1e-12)


def test_gradients_reach_every_param_and_stop_at_the_teacher():
    net = nets.ResidualMLP(8, 1, num_classes=2)
    model, velocity = jflow.flow_map(net), jflow.velocity(net)
    x, t, cond = GAUSSIAN.sample(KEY, 4), jnp.linspace(0, 0.9, 4), jnp.asarray([0, 1, 2, 2])
    params = random_params(model.init, x, t, t, cond)
    teacher = random_params(velocity.init, x, t, cond)
    loss = trajectory_distillation(model, velocity, method=2)
    batch = {"x": x, "cond": cond}
    assert not silent_leaves(loss, params, batch, {"teacher": teacher})


def test_bad_input():
    model, teacher = SINE_MAP, COSINE
    batch = {"x": jnp.zeros((2, 1))}
    with pytest.raises(ValueError, match="t <= r"):
        trajectory_distillation(model, teacher, times=lambda key, n: (jnp.ones(n), jnp.zeros(n)))
    with pytest.raises(ValueError, match="steps"):
        trajectory_distillation(model, teacher, method=0)
    with pytest.raises(ValueError, match="finite change >= 0"):
        trajectory_distillation(model, teacher, change=-1.0)
    with pytest.raises(ValueError, match="above 0"):
        trajectory_distillation(model, teacher, output=0.0, change=0.0, consistency=0.0)
    with pytest.raises(ValueError, match="'teacher' in frozen"):
        trajectory_distillation(model, teacher)(1.0, KEY, batch)
