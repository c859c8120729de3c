"""Consistency flow matching: exact average velocities per segment are left alone, straight flows
altogether."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_maps import (
    ELEMENTS,
    ELEMENTWISE,
    GAUSSIAN,
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
from jflow import losses, nets, oracles, solvers
from jflow.losses import consistency_flow_matching
from jflow.types import Velocity

EDGES = np.asarray([0.0, 0.3, 1.0])


def end(t):
    return jnp.where(t < 0.3, jnp.asarray(0.3, t.dtype), jnp.ones_like(t))


@pytest.mark.parametrize("name", ORACLES)
def test_the_exact_average_velocities_are_left_alone_to_first_order(name, x64):
    oracle, student = ORACLES[name], near_data(exact_map(name), end)
    x0, noise = (jax.random.normal(jax.random.key(i), (24, 2), jnp.float64) for i in range(2))
    batch = {"x": jnp.asarray(oracle.sample(jax.random.key(2), 24), jnp.float64), "x0": x0}

    def residual(delta):
        loss = consistency_flow_matching(
            student,
            segments=EDGES,
            delta=delta,
            alpha=0.0,
            teacher=oracles.as_velocity(oracle),
            time=lambda key, n: jnp.concatenate(
                [jnp.linspace(0.01, 0.27, n // 2), jnp.linspace(0.31, 0.97, n // 2)]
            ),
        )
        return loss(at(), jax.random.key(3), batch, {"teacher": {}})[1]["residual"]

    lengths = np.asarray([2e-2, 5e-3])
    found = np.asarray([float(jax.jit(lambda d=d: residual(d))()) for d in lengths])
    assert abs(np.polyfit(np.log(lengths), np.log(found), 1)[0] - 2) < 0.1  # of a square
    assert found[-1] * (2e-4 / 5e-3) ** 2 < 1e-6


def test_euler_steps_that_meet_the_ends_are_exact():
    x0 = jax.random.normal(jax.random.key(0), (5, 2))
    x, info = solvers.sample(
        near_data(exact_map("gaussian"), end),
        at(),
        x0,
        method=solvers.on_grid(EDGES, diffrax.Euler()),
    )
    np.testing.assert_allclose(x, GAUSSIAN.flow_map(x0, jnp.zeros(5), jnp.ones(5)), atol=5e-6)
    np.testing.assert_array_equal(info.evaluations, 2)


@pytest.mark.parametrize("name", ORACLES)
def test_from_scratch_the_mean_gradient_vanishes_at_the_exact_map(name):
    draw, student = ORACLES[name].sample, near_data(exact_map(name, 4), end)
    loss = consistency_flow_matching(student, segments=EDGES, alpha=0.0)
    gradient = mean_gradient(loss, draw)
    mean, error = gradient(at())
    assert np.all(np.abs(mean) < 3 * error)
    moved, _ = gradient(at(a=0.3))
    assert abs(moved[0]) > 10 * error[0]


@pytest.mark.parametrize("segments", [1, 3])
def test_a_straight_flow_has_no_loss_at_all(segments):
    """Pairs that are a shift apart: v is the shift, whatever the segments, and v does not change
    either."""
    shift = jnp.asarray([1.0, -2.0])
    x0 = jax.random.normal(jax.random.key(0), (64, 2))
    constant = Velocity(
        lambda *args: {},
        lambda params, x, t, cond=None, *, key=None: (
            jnp.broadcast_to(shift[None], x.shape) + params
        ),
    )
    loss = consistency_flow_matching(constant, segments=segments, delta=0.05, alpha=1.0)
    batch = {"x0": x0, "x": x0 + shift[None]}
    for value in jax.tree.leaves(loss(jnp.zeros(()), jax.random.key(1), batch)):
        np.testing.assert_allclose(value, 0, atol=1e-9)
    assert loss(jnp.ones(()), jax.random.key(1), batch)[0] > 1e-6


def test_the_second_term_is_the_change_of_the_velocity():
    """Over a step of delta; at alpha = 1 minus alpha = 0."""
    t = jnp.linspace(0.05, 0.85, 8)
    x0, x1 = (jax.random.normal(jax.random.key(i), (8, 2)) for i in range(2))

    def value(alpha):
        loss = consistency_flow_matching(
            ELEMENTWISE, segments=1, delta=0.1, alpha=alpha, time=lambda key, n: t
        )
        return loss(ELEMENTS, jax.random.key(2), {"x": x1, "x0": x0})

    line = lambda t: x0 + t[:, None] * (x1 - x0)  # noqa: E731
    change = ELEMENTWISE.apply(ELEMENTS, line(t), t) - ELEMENTWISE.apply(
        ELEMENTS, line(t + 0.1), t + 0.1
    )
    np.testing.assert_allclose(value(1.0)[0] - value(0.0)[0], jnp.mean(change**2), rtol=1e-4)
    np.testing.assert_allclose(value(1.0)[1]["velocity"], jnp.mean(change**2), rtol=1e-4)


def test_the_targets_hold_still(x64):
    t = jnp.linspace(0.05, 0.45, 8)
    x0, x1 = (jax.random.normal(jax.random.key(i), (8, 2), jnp.float64) for i in range(2))
    loss = consistency_flow_matching(
        ELEMENTWISE, segments=2, delta=0.04, alpha=0.3, time=lambda key, n: t
    )
    grads = jax.grad(lambda p: loss(p, jax.random.key(0), {"x": x1, "x0": x0})[0])(ELEMENTS)

    def both(params, t):
        x = x0 + t[:, None] * (x1 - x0)
        v = ELEMENTWISE.apply(params, x, t)
        return x + (0.5 - t)[:, None] * v, v

    f, v = both(ELEMENTS, t + 0.04)

    def by_hand(params):
        left, slope = both(params, t)
        return jnp.mean((left - f) ** 2 + 0.3 * (slope - v) ** 2)

    expected = jax.grad(by_hand)(ELEMENTS)
    for name in ELEMENTS:
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-9)


def test_no_target_looks_beyond_the_end_of_its_segment():
    """Just before 0.5 the next segment's velocity, here enormous, changes neither value nor
    metrics."""
    t = jnp.linspace(0.4901, 0.4999, 8)
    batch = {"x": jnp.ones((8, 2)), "x0": jnp.zeros((8, 2))}

    def wild(size):
        def apply(params, x, t, cond=None, *, key=None):
            return jnp.where(t[:, None] >= 0.5, size, ELEMENTWISE.apply(params, x, t))

        loss = consistency_flow_matching(
            Velocity(ELEMENTWISE.init, apply),
            segments=2,
            delta=0.01,
            alpha=1.0,
            time=lambda key, n: t,
        )
        return jax.tree.leaves(loss(ELEMENTS, jax.random.key(0), batch))

    np.testing.assert_array_equal(wild(1e6), wild(0.0))
    assert np.all(np.isfinite(wild(jnp.nan)))


def test_with_the_whole_segment_as_boundary_it_is_flow_matching():
    batch = {"x": GAUSSIAN.sample(jax.random.key(0), 32)}
    loss = consistency_flow_matching(ELEMENTWISE, segments=2, boundary=1e-6, alpha=1.0)
    left = lambda t: jnp.where(t < 0.5, 0.5, 1.0) - t  # noqa: E731
    plain = losses.flow_matching(
        ELEMENTWISE,
        metric=lambda v, target, x, t: left(t) ** 2 * losses.mean_squared_error(v, target, x, t),
    )
    value, metrics = loss(ELEMENTS, jax.random.key(1), batch)
    np.testing.assert_allclose(value, plain(ELEMENTS, jax.random.key(1), batch)[0], rtol=1e-5)
    assert metrics["velocity"] == 0


def test_repeating_the_event_changes_nothing():
    x0, x = (jax.random.normal(jax.random.key(i), (8, 3)) for i in range(2))
    loss = consistency_flow_matching(ELEMENTWISE, delta=0.05, alpha=0.3)
    same_when_repeated(loss, ELEMENTS, x0, x, rtol=1e-5)


def test_what_is_frozen_has_no_gradient_and_every_param_learns():
    loss = consistency_flow_matching(
        ELEMENTWISE, teacher=ELEMENTWISE, target=losses.averaged_target, alpha=1.0
    )
    batch, frozen = {"x": jnp.ones((4, 2))}, {"teacher": ELEMENTS, "ema": {"a": 0.1, "b": 0.2}}
    assert not silent_leaves(loss, ELEMENTS, batch, frozen)
    for name in frozen:
        rest = {other: value for other, value in frozen.items() if other != name}
        with pytest.raises(ValueError, match=f"'{name}' in frozen"):
            loss(ELEMENTS, jax.random.key(0), batch, rest)
    velocity = jflow.velocity(nets.ResidualMLP(8, 2, num_classes=3))
    x, cond = jax.random.normal(jax.random.key(0), (8, 2)), jnp.arange(8) % 4
    params = random_params(velocity.init, x, jnp.zeros(8), cond)
    loss = consistency_flow_matching(velocity, delta=0.05, alpha=0.1, boundary=0.9)
    assert silent_leaves(loss, params, {"x": x, "cond": cond, "weight": jnp.ones(8)}) == []


def test_bad_input():
    for options, message in (
        ({"segments": 0}, "at least 1"),
        ({"segments": [0.0, 0.5]}, "from 0 to 1"),
        ({"delta": 0.0}, "0 < delta <= 0.5"),
        ({"delta": 0.6}, "0 < delta <= 0.5"),
        ({"alpha": -1.0}, "alpha >= 0"),
        ({"boundary": 0.0}, "boundary in"),
        ({"boundary": 0.9, "teacher": ELEMENTWISE}, "1 beside a teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            consistency_flow_matching(ELEMENTWISE, **options)
