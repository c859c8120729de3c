"""TrigFlow: a flow teacher is one of its networks already, and the exact consistency map has no
tangent left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_maps import (
    ELEMENTS,
    ELEMENTWISE,
    GAUSSIAN,
    MIXTURE,
    ORACLES,
    at,
    exact_map,
    mean_gradient,
    near_data,
    random_params,
    same_when_repeated,
    silent_leaves,
)

import jflow
from jflow import losses, nets, oracles, paths, solvers, times
from jflow.losses import clipped_tangent, trigflow_consistency

PLAIN = clipped_tangent(float("inf"))


@pytest.mark.parametrize("data_std", [1.0, 0.5])
def test_a_flow_teacher_is_a_trigflow_network(data_std, x64):
    """The transform is SANA-Sprint's closed form, predicts the same data, undoes
    from_trigonometric, and turns the exact velocity of one path into that of the other."""
    x, tau = jax.random.normal(jax.random.key(0), (6, 2), jnp.float64), jnp.linspace(0.05, 1.5, 6)
    field = paths.to_trigonometric(ELEMENTWISE, data_std=data_std)
    out = field.apply(ELEMENTS, x, tau)
    t = jnp.cos(tau) / (jnp.cos(tau) + data_std * jnp.sin(tau))
    n = jnp.hypot(data_std * t, 1 - t)
    s, state = t[:, None], n[:, None] * x
    v = ELEMENTWISE.apply(ELEMENTS, state, t)
    closed = ((data_std**2 * s - (1 - s)) * x - n[:, None] * v) / data_std
    np.testing.assert_allclose(out, closed, atol=1e-12)
    cos, sin = jnp.cos(tau)[:, None], jnp.sin(tau)[:, None]
    np.testing.assert_allclose(data_std * (cos * x - sin * out), state + (1 - s) * v, atol=1e-12)

    cosine = paths.schedules.cosine(data_std)
    back = paths.reschedule(
        paths.from_trigonometric(field, data_std=data_std), cosine, paths.LINEAR
    )
    np.testing.assert_allclose(back.apply(ELEMENTS, state, t), v, atol=1e-12)
    there = oracles.gaussian([1.0, -2.0], [[0.5, 0.2], [0.2, 0.3]], cosine)
    exact = paths.from_trigonometric(
        paths.to_trigonometric(oracles.as_velocity(GAUSSIAN), data_std=data_std), data_std=data_std
    )
    np.testing.assert_allclose(exact.apply({}, x, t), there.velocity(x, t), atol=1e-12)


def test_the_transform_is_finite_at_both_ends():
    field = paths.to_trigonometric(ELEMENTWISE)
    x = jnp.ones((2, 2))

    def out(tau):
        return field.apply(ELEMENTS, x, tau)

    value, slope = jax.jvp(out, (jnp.asarray([0.0, np.pi / 2]),), (jnp.ones(2),))
    assert np.all(np.isfinite(value)) and np.all(np.isfinite(slope))
    with pytest.raises(ValueError, match="data_std > 0"):
        paths.to_trigonometric(ELEMENTWISE, data_std=0.0)


@pytest.mark.parametrize("name", ORACLES)
def test_no_tangent_is_left_at_the_exact_map(name, x64):
    oracle = ORACLES[name]
    loss = trigflow_consistency(
        near_data(exact_map(name)),
        teacher=oracles.as_velocity(oracle),
        time=times.uniform(0.02, 0.95),
        data_std=0.7,
        jvp={"gaussian": jax.jvp, "mixture": solvers.finite_difference(1e-3)}[name],
    )
    batch = {"x": jnp.asarray(oracle.sample(jax.random.key(0), 16), jnp.float64)}
    run = jax.jit(lambda params: loss(params, jax.random.key(1), batch, {"teacher": {}}))
    assert run(at())[1]["residual"] < 1e-6
    assert run(at(a=0.1))[1]["residual"] > 1e-3


def test_the_residual_is_the_change_of_f_along_the_flow(x64):
    """(cos(tau) df/dtau)^2 of a student that is far from exact, f differenced along the exact
    trajectory."""
    data_std, t, h = 0.7, jnp.linspace(0.1, 0.9, 8), 1e-4
    loss = trigflow_consistency(
        ELEMENTWISE,
        teacher=oracles.as_velocity(GAUSSIAN),
        time=lambda key, n: t,
        data_std=data_std,
    )
    x0, x1 = (jax.random.normal(jax.random.key(i), (8, 2), jnp.float64) for i in range(2))
    _, metrics = loss(ELEMENTS, jax.random.key(0), {"x": x1, "x0": x0}, {"teacher": {}})
    x = x0 + t[:, None] * (x1 - x0)

    def f(s):
        there = GAUSSIAN.flow_map(x, t, s)
        return there + (1 - s)[:, None] * ELEMENTWISE.apply(ELEMENTS, there, s)

    slope = (f(t + h) - f(t - h)) / (2 * h)
    n2 = (data_std * t) ** 2 + (1 - t) ** 2
    cos = data_std * t / jnp.sqrt(n2)
    g = (cos * -n2 / data_std)[:, None] * slope  # dt/dtau = -n^2 / data_std
    np.testing.assert_allclose(metrics["residual"], jnp.mean(g**2), rtol=1e-6)


@pytest.mark.parametrize("tangent", [PLAIN, losses.normalized_tangent(0.1)])
def test_from_scratch_the_mean_gradient_vanishes_at_the_exact_map(tangent):
    """With the normalized tangent too, for a Gaussian's velocities are symmetric about their
    mean."""
    loss = trigflow_consistency(near_data(exact_map("gaussian")), tangent=tangent)
    gradient = mean_gradient(loss, GAUSSIAN.sample, batches=200)
    mean, error = gradient(at())
    assert np.all(np.abs(mean) < 3 * error)
    moved, _ = gradient(at(a=0.1))
    assert abs(moved[0]) > 10 * error[0]


def test_from_scratch_the_mean_gradient_vanishes_at_the_exact_map_of_a_mixture():
    """Of the tangent itself: one that is normalized is not linear in the noise."""
    draw = MIXTURE.sample
    loss = trigflow_consistency(near_data(exact_map("mixture", 4)), tangent=PLAIN)
    gradient = mean_gradient(loss, draw)
    mean, error = gradient(at())
    assert np.all(np.abs(mean) < 3 * error)
    moved, _ = gradient(at(a=0.1))
    assert abs(moved[0]) > 10 * error[0]


def test_the_warm_up_starts_as_a_regression_of_the_velocity(x64):
    """r = 0: the gradient is that of cos^2 |F - dx/dtau|^2; then r grows with the count of
    updates."""
    t = jnp.linspace(0.1, 0.9, 8)
    x0, x1 = (jax.random.normal(jax.random.key(i), (8, 2), jnp.float64) for i in range(2))
    batch = {"x": x1, "x0": x0}
    loss = trigflow_consistency(ELEMENTWISE, warmup=10, tangent=PLAIN, time=lambda key, n: t)

    def gradient(step):
        return jax.grad(lambda p: loss(p, jax.random.key(0), batch, {"step": jnp.int32(step)})[0])(
            ELEMENTS
        )

    tau = jnp.arctan2(1 - t, t)
    cos, sin = jnp.cos(tau)[:, None], jnp.sin(tau)[:, None]
    field = paths.to_trigonometric(ELEMENTWISE)

    def regression(params):
        error = field.apply(params, cos * x1 + sin * x0, tau) - (cos * x0 - sin * x1)
        return jnp.mean((cos * error) ** 2)

    expected = jax.grad(regression)(ELEMENTS)
    for name in ELEMENTS:
        np.testing.assert_allclose(gradient(0)[name], expected[name], rtol=1e-10)
    at = [gradient(step)["a"] for step in (0, 5, 10, 100)]
    np.testing.assert_allclose(at[1], (at[0] + at[2]) / 2, rtol=1e-10)  # linear in r
    np.testing.assert_allclose(at[2], at[3], rtol=1e-10)
    full = trigflow_consistency(ELEMENTWISE, tangent=PLAIN, time=lambda key, n: t)
    np.testing.assert_allclose(
        jax.grad(lambda p: full(p, jax.random.key(0), batch)[0])(ELEMENTS)["a"], at[2], rtol=1e-10
    )
    with pytest.raises(ValueError, match="'step' in frozen"):
        loss(ELEMENTS, jax.random.key(0), batch)


def test_tangents_are_bounded_and_repeating_the_event_changes_nothing():
    g = jax.random.normal(jax.random.key(0), (4, 3)) * jnp.asarray([1e-3, 0.1, 1.0, 1e6])[:, None]
    small = losses.normalized_tangent(0.1)(g)
    size = np.sqrt(np.mean(np.square(g), 1))
    np.testing.assert_allclose(
        np.sqrt(np.mean(np.square(small), 1)), size / (size + 0.1), rtol=1e-5
    )
    assert np.max(np.abs(clipped_tangent(0.5)(g))) == 0.5
    x0, x = (jax.random.normal(jax.random.key(i), (8, 3)) for i in range(2))
    loss = trigflow_consistency(ELEMENTWISE)
    same_when_repeated(loss, ELEMENTS, x0, x, rtol=2e-5)


def test_the_student_is_sampled_in_the_time_of_the_linear_path():
    x0 = jax.random.normal(jax.random.key(0), (5, 2))
    x1, _ = solvers.sample_flow_map(
        solvers.consistency_map(near_data(exact_map("gaussian"))), at(), x0
    )
    np.testing.assert_allclose(x1, GAUSSIAN.flow_map(x0, jnp.zeros(5), jnp.ones(5)), atol=2e-6)


def test_the_times_are_the_papers():
    """tau = arctan(exp(n) / data_std), n normal of mean -1 and deviation 1.4."""
    t = np.asarray(times.logit_normal(1.0, 1.4)(jax.random.key(0), 100_000), np.float64)
    n = np.log((1 - t) / t)  # = log(data_std tan(tau))
    assert abs(n.mean() + 1) < 4 * 1.4 / np.sqrt(1e5) and abs(n.std() - 1.4) < 4 * 1.4 / np.sqrt(
        2e5
    )


def test_what_is_frozen_has_no_gradient_and_every_param_learns():
    loss = trigflow_consistency(ELEMENTWISE, teacher=ELEMENTWISE)
    batch = {"x": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="'teacher' in frozen"):
        loss(ELEMENTS, jax.random.key(0), batch, {})
    velocity = jflow.velocity(nets.ResidualMLP(8, 2, num_classes=3, dropout=0.1))
    x, cond = jax.random.normal(jax.random.key(0), (8, 2)), jnp.arange(8) % 4
    params = random_params(velocity.init, x, jnp.zeros(8), cond)
    loss = trigflow_consistency(velocity, teacher=velocity)
    assert silent_leaves(loss, params, {"x": x, "cond": cond}, {"teacher": params}) == []


def test_bad_input():
    with pytest.raises(ValueError, match="data_std > 0"):
        trigflow_consistency(ELEMENTWISE, data_std=-1.0)
    with pytest.raises(ValueError, match="warmup"):
        trigflow_consistency(ELEMENTWISE, warmup=-1)
    with pytest.raises(ValueError, match="c > 0"):
        losses.normalized_tangent(0.0)
    with pytest.raises(ValueError, match="bound > 0"):
        clipped_tangent(0.0)
