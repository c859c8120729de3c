"""MDT-dist: the velocity inside a consistency model is the teacher's at the exact map; both losses
move it there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_maps import (
    COSINE,
    GAUSSIAN,
    ORACLES,
    SINE,
    at,
    exact_map,
    near_data,
    random_params,
    same_when_repeated,
    silent_leaves,
    standard_scores,
)

import jflow
from jflow import losses, nets, oracles, solvers
from jflow.losses import marginal_transport, velocity_distillation, velocity_matching
from jflow.types import Velocity

KEY = jax.random.key(0)
LOSSES = {
    "matching": velocity_matching,
    "distillation": velocity_distillation,
    "both": marginal_transport,
}


@pytest.mark.parametrize("law", ORACLES)
@pytest.mark.parametrize("name", LOSSES)
def test_the_exact_map_has_no_residual(name, law, x64):
    oracle = ORACLES[law]
    loss = LOSSES[name](near_data(exact_map(law)), oracles.as_velocity(oracle))
    batch = {"x": oracle.sample(KEY, 64)}
    run = jax.jit(lambda params: loss(params, KEY, batch, {"teacher": {}}))
    value, metrics = run(at())
    assert value < 1e-6 and metrics["residual"] < 1e-6
    assert run(at(a=0.1))[1]["residual"] > 1e-3 and run(at(b=0.1))[1]["residual"] > 1e-4


@pytest.mark.parametrize("law", ORACLES)
def test_from_scratch_the_mean_gradient_at_the_exact_map_is_zero(law):
    loss = velocity_matching(near_data(exact_map(law, 4)))

    def gradient(key, params):
        data_key, loss_key = jax.random.split(key)
        return jax.grad(lambda p: loss(p, loss_key, {"x": ORACLES[law].sample(data_key, 1000)})[0])(
            params
        )

    scores = standard_scores(gradient)
    assert np.all(np.abs(scores(at())) < 3)
    assert np.all(np.abs(scores(at(0.1, 0.1))) > 10)


def fixed(t):
    return lambda key, n: jnp.full(n, t)


def pushed():
    """The exact F + c: its samples lie c beyond the data's, and its velocity is the teacher's + c
    everywhere."""
    flow_map = exact_map("gaussian")
    return Velocity(
        lambda *a: 0.0,
        lambda p, x, t, cond=None, *, key=None: flow_map.apply({}, x, t, jnp.ones_like(t)) + p,
    )


def test_distillation_moves_a_shifted_student_back(x64):
    """u - v = c and dx_t / dc = t: the gradient is t c, that of t^2 c' W^-1 c / 2, the divergence
    at t, in sign."""
    batch, frozen, c, t = {"x": jnp.zeros((16, 2))}, {"teacher": {}}, 0.3, 0.4
    loss = velocity_distillation(pushed(), oracles.as_velocity(GAUSSIAN), time=fixed(t))
    value, grad = jax.value_and_grad(lambda p: loss(p, KEY, batch, frozen)[0])(c)
    np.testing.assert_allclose(grad, t * c, rtol=1e-9)
    np.testing.assert_allclose(value, c**2 / 2, rtol=1e-9)


def test_matching_of_a_shifted_student(x64):
    """F - target = c, whatever t: the gradient is 2 c, through F alone."""
    batch, frozen = {"x": GAUSSIAN.sample(KEY, 16)}, {"teacher": {}}
    loss = velocity_matching(pushed(), oracles.as_velocity(GAUSSIAN))
    np.testing.assert_allclose(
        jax.grad(lambda p: loss(p, KEY, batch, frozen)[0])(0.3), 0.6, rtol=1e-9
    )


def test_a_finite_difference_stands_in_for_the_derivative(x64):
    student, teacher = near_data(exact_map("gaussian")), oracles.as_velocity(GAUSSIAN)
    batch, frozen, params = {"x": GAUSSIAN.sample(KEY, 16)}, {"teacher": {}}, at(0.3, 0.2)
    losses = [
        velocity_matching(student, teacher, jvp=jvp)(params, KEY, batch, frozen)[0]
        for jvp in (jax.jvp, solvers.finite_difference(1e-2), solvers.finite_difference(5e-3))
    ]
    errors = [abs(float(value - losses[0])) for value in losses[1:]]
    assert errors[1] < 1e-3 and 3.5 < errors[0] / errors[1] < 4.5  # second order


def test_a_normalized_tangent_moves_the_minimum(x64):
    student, teacher = near_data(exact_map("gaussian")), oracles.as_velocity(GAUSSIAN)
    batch, frozen = {"x": GAUSSIAN.sample(KEY, 64)}, {"teacher": {}}
    loss = velocity_matching(student, teacher, tangent=losses.normalized_tangent())
    value, metrics = loss(at(), KEY, batch, frozen)
    assert metrics["residual"] < 1e-12 and value > 1e-3


def test_the_sum_is_weighted_and_its_parts_are_named(x64):
    student, teacher = near_data(exact_map("gaussian")), oracles.as_velocity(GAUSSIAN)
    batch, frozen, params = {"x": GAUSSIAN.sample(KEY, 8)}, {"teacher": {}}, at(0.3, 0.2)
    value, m = marginal_transport(student, teacher, matching=0.5, distillation=2.0)(
        params, KEY, batch, frozen
    )
    np.testing.assert_allclose(
        value, 0.5 * m["matching/loss"] + 2 * m["distillation/loss"], rtol=1e-12
    )
    np.testing.assert_allclose(
        m["residual"], m["matching/residual"] + m["distillation/residual"], rtol=1e-12
    )
    alone, m = marginal_transport(student, teacher, distillation=0.0)(params, KEY, batch, frozen)
    one = velocity_matching(student, teacher)(params, jax.random.fold_in(KEY, 0), batch, frozen)[0]
    np.testing.assert_allclose(alone, one, rtol=1e-12)
    assert "distillation/loss" not in m


def test_a_tiled_event_changes_nothing(x64):
    """Of distillation at t = 1, where no noise is added."""
    x0, x1 = jax.random.normal(KEY, (8, 3)), jax.random.normal(jax.random.key(1), (8, 3))
    for loss in (
        velocity_matching(SINE, COSINE),
        velocity_distillation(SINE, COSINE, time=fixed(1.0)),
    ):
        same_when_repeated(loss, 0.7, x0, x1, {"teacher": {}}, rtol=1e-9)


def test_gradients_reach_every_param_and_stop_at_the_teacher():
    velocity = jflow.velocity(nets.ResidualMLP(8, 1, num_classes=2))
    x, t, cond = GAUSSIAN.sample(KEY, 4), jnp.ones(4), jnp.asarray([0, 1, 2, 2])
    params = random_params(velocity.init, x, t, cond)
    loss = losses.chain(losses.drop_cond(0.5, null=2), marginal_transport(velocity, velocity))
    batch, frozen = {"x": x, "cond": cond}, {"teacher": jax.tree.map(lambda p: 0.9 * p, params)}
    assert not silent_leaves(loss, params, batch, frozen)


def test_bad_input():
    student, teacher = near_data(exact_map("gaussian")), oracles.as_velocity(GAUSSIAN)
    batch = {"x": jnp.zeros((2, 2))}
    with pytest.raises(ValueError, match="above 0"):
        marginal_transport(student, teacher, matching=0.0, distillation=0.0)
    with pytest.raises(ValueError, match="finite matching >= 0"):
        marginal_transport(student, teacher, matching=-1.0)
    for make in LOSSES.values():
        with pytest.raises(ValueError, match="'teacher' in frozen"):
            make(student, teacher)(at(), KEY, batch)
