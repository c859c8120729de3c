"""Flow-anchored consistency: both tasks vanish at the exact map, whichever way the network is told
of them."""

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
    near_map,
    random_params,
    same_when_repeated,
    silent_leaves,
)

import jflow
from jflow import losses, nets, oracles, solvers, times
from jflow.losses import anchored_consistency, squared_and_cosine_error
from jflow.solvers import expanded_time
from jflow.types import FlowMap, Velocity

JVPS = {"gaussian": jax.jvp, "mixture": solvers.finite_difference(1e-3)}


def elementwise_map(params, x, t, r, cond=None, *, key=None):
    return ELEMENTWISE.apply(params, x, t) + 0.3 * (r - t)[:, None] * jnp.cos(x)


ELEMENT_MAP = FlowMap(lambda *args: ELEMENTS, elementwise_map)
TOLD = expanded_time(ELEMENTWISE)


def in_expanded_time(flow_map):
    """A velocity that answers both questions exactly: data from t below 1, the flow at 2 - t
    beyond."""

    def apply(params, x, t, cond=None, *, key=None):
        beyond = t > 1
        there = jnp.where(beyond, 2 - t, t)
        out = flow_map.apply({}, x, there, jnp.where(beyond, there, 1.0))
        return out + params["a"] * x + params["b"] * t[:, None]

    return expanded_time(Velocity(lambda *args: at(), apply))


@pytest.mark.parametrize("told", [near_map, in_expanded_time])
@pytest.mark.parametrize("name", ORACLES)
def test_both_tasks_vanish_at_the_exact_map(name, told, x64):
    oracle = ORACLES[name]
    loss = anchored_consistency(
        told(exact_map(name)),
        teacher=oracles.as_velocity(oracle),
        time=times.uniform(0.02, 0.95),
        jvp=JVPS[name],
    )
    batch = {"x": jnp.asarray(oracle.sample(jax.random.key(0), 16), jnp.float64)}
    run = jax.jit(lambda params: loss(params, jax.random.key(1), batch, {"teacher": {}}))
    value, metrics = run(at())
    assert metrics["residual"] < 1e-6 and metrics["anchor"] < 1e-6 and value < 1e-6
    value, metrics = run(at(a=0.1))
    assert metrics["residual"] > 1e-3 and metrics["anchor"] > 1e-3


@pytest.mark.parametrize("told", [near_map, in_expanded_time])
@pytest.mark.parametrize("name", ORACLES)
def test_from_scratch_the_mean_gradient_vanishes_at_the_exact_map(name, told):
    draw, exact = ORACLES[name].sample, exact_map(name, 4)
    loss = anchored_consistency(
        told(exact), power=0.0, clip=float("inf"), anchor=losses.mean_squared_error
    )
    gradient = mean_gradient(loss, draw)
    mean, error = gradient(at())
    assert np.all(np.abs(mean) < 3 * error)
    moved, _ = gradient(at(a=0.1))
    assert abs(moved[0]) > 10 * error[0]


@pytest.mark.parametrize("name", ORACLES)
def test_the_shortcut_alone_has_a_mean_gradient_of_zero(name):
    """The anchor's gradient is larger and would hide one of the shortcut."""
    draw, exact = ORACLES[name].sample, exact_map(name, 4)
    nothing = lambda v, target, x, t: jnp.zeros_like(t)  # noqa: E731
    loss = anchored_consistency(near_map(exact), power=0.0, clip=float("inf"), anchor=nothing)
    gradient = mean_gradient(loss, draw)
    mean, error = gradient(at())
    assert np.all(np.abs(mean) < 3 * error)
    moved, _ = gradient(at(a=0.1))
    assert abs(moved[0]) > 10 * error[0]


def test_the_published_weights(x64):
    """Value and gradient of the shortcut, written out: half of the numbers clipped, p = 1/2, cos(pi
    t / 2)."""
    t = jnp.linspace(0.1, 0.9, 8)
    x0, x1 = (2 * jax.random.normal(jax.random.key(i), (8, 3), jnp.float64) for i in range(2))
    nothing = lambda v, target, x, t: jnp.zeros_like(t)  # noqa: E731
    loss = anchored_consistency(ELEMENT_MAP, anchor=nothing, clip=0.5, time=lambda key, n: t)
    run = jax.value_and_grad(lambda p: loss(p, jax.random.key(0), {"x": x1, "x0": x0})[0])
    value, grads = run(ELEMENTS)
    x, v, h = x0 + t[:, None] * (x1 - x0), x1 - x0, 1e-5
    u = lambda params, x, t: elementwise_map(params, x, t, jnp.ones_like(t))  # noqa: E731
    slope = (u(ELEMENTS, x + h * v, t + h) - u(ELEMENTS, x - h * v, t - h)) / (2 * h)
    g = u(ELEMENTS, x, t) - v - (1 - t)[:, None] * slope
    assert 0.2 < np.mean(np.abs(g) > 0.5) < 0.98
    step = (1 - jnp.sqrt(t))[:, None] * jnp.clip(g, -0.5, 0.5)
    e = jnp.mean(step**2, axis=1)
    np.testing.assert_allclose(
        value, jnp.mean(jnp.cos(jnp.pi / 2 * t) * e / jnp.sqrt(e + 1e-3)), rtol=1e-6
    )
    row = jnp.cos(jnp.pi / 2 * t) / jnp.sqrt(e + 1e-3)
    by_hand = jax.grad(lambda p: jnp.mean(row * jnp.mean(2 * u(p, x, t) * step, axis=1)))(ELEMENTS)
    for name in ELEMENTS:
        np.testing.assert_allclose(grads[name], by_hand[name], rtol=1e-6)


def test_squared_and_cosine():
    v = jnp.asarray([[[3.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [0.0, 0.0]]])
    target = jnp.asarray([[[0.0, 1.0], [0.0, 5.0]], [[-2.0, -2.0], [1.0, 0.0]]])
    square = np.mean(np.square(v - target), axis=(1, 2))
    longer = [
        np.concatenate([x, np.full((2, 2, 1), 0.1 * np.sqrt(2))], axis=-1) for x in (v, target)
    ]
    unit, other = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in longer)
    turned = 1 - np.mean(np.sum(unit * other, axis=-1), axis=1)
    np.testing.assert_allclose(
        squared_and_cosine_error(v, target, v, jnp.zeros(2)), square + turned, rtol=1e-6
    )
    np.testing.assert_allclose(
        turned, [0.5, 1.5], atol=0.1
    )  # an angle of 90 degrees and one of 0; 180 and none
    np.testing.assert_allclose(
        squared_and_cosine_error(target, target, v, jnp.zeros(2)), 0, atol=1e-6
    )
    assert np.all(
        np.isfinite(
            jax.grad(lambda v: jnp.sum(squared_and_cosine_error(v, target, v, jnp.zeros(2))))(v)
        )
    )


def test_expanded_time_asks_two_questions():
    x, t = jax.random.normal(jax.random.key(0), (4, 2)), jnp.linspace(0, 1, 4)
    np.testing.assert_allclose(
        TOLD.apply(ELEMENTS, x, t, jnp.ones(4)), ELEMENTWISE.apply(ELEMENTS, x, t), rtol=1e-6
    )
    np.testing.assert_allclose(
        TOLD.apply(ELEMENTS, x, t, t), ELEMENTWISE.apply(ELEMENTS, x, 2 - t), rtol=1e-6
    )
    model = in_expanded_time(exact_map("gaussian"))
    exact = GAUSSIAN.flow_map(x, jnp.zeros(4), jnp.ones(4))
    np.testing.assert_allclose(solvers.sample_flow_map(model, at(), x)[0], exact, atol=2e-6)
    flow = solvers.instantaneous_velocity(model)
    np.testing.assert_allclose(solvers.sample(flow, at(), x, method=100)[0], exact, atol=1e-3)


def test_repeating_the_event_changes_nothing():
    x0, x = (jax.random.normal(jax.random.key(i), (8, 3)) for i in range(2))
    loss = anchored_consistency(ELEMENT_MAP)
    same_when_repeated(loss, ELEMENTS, x0, x, rtol=1e-5)


@pytest.mark.parametrize("told", ["r", "expanded time"])
def test_what_is_frozen_has_no_gradient_and_every_param_learns(told):
    net = nets.ResidualMLP(8, 2, num_classes=3, dropout=0.1)
    teacher = jflow.velocity(net)
    model = jflow.flow_map(net) if told == "r" else expanded_time(teacher)
    x, t, cond = jax.random.normal(jax.random.key(0), (8, 2)), jnp.zeros(8), jnp.arange(8) % 4
    params = random_params(model.init, x, t, t, cond)
    frozen = {"teacher": random_params(teacher.init, x, t, cond)}
    loss = anchored_consistency(model, teacher=teacher)
    batch = {"x": x, "cond": cond, "weight": jnp.ones(8)}
    assert silent_leaves(loss, params, batch, frozen) == []
    plain = anchored_consistency(ELEMENT_MAP, teacher=ELEMENTWISE)
    with pytest.raises(ValueError, match="'teacher' in frozen"):
        plain(ELEMENTS, jax.random.key(0), {"x": x}, {})


def test_the_times_are_the_published_ones():
    captured = []

    def apply(params, x, t, r, cond=None, *, key=None):
        captured.append(t)
        return jnp.zeros_like(x)

    loss = anchored_consistency(FlowMap(lambda *args: {}, apply))
    loss({}, jax.random.key(0), {"x": jnp.zeros((100_000, 1))})
    t = np.asarray(captured[-1], np.float64)
    n = np.log(np.tan(np.pi / 2 * (1 - t)))
    assert abs(n.mean() + 0.8) < 4 * 1.6 / np.sqrt(1e5) and abs(n.std() - 1.6) < 4 * 1.6 / np.sqrt(
        2e5
    )


def test_bad_input():
    for options in ({"relax": 0.0}, {"clip": 0.0}, {"c": 0.0}, {"power": -1.0}):
        with pytest.raises(ValueError, match="expected relax > 0"):
            anchored_consistency(ELEMENT_MAP, **options)
    batch = {"x": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="anchor of shape"):
        anchored_consistency(ELEMENT_MAP, anchor=lambda v, target, x, t: v)(
            ELEMENTS, jax.random.key(0), batch
        )
    with pytest.raises(ValueError, match="shaped like x"):
        narrow = FlowMap(ELEMENT_MAP.init, lambda params, x, t, r, cond=None, *, key=None: x[:, :1])
        anchored_consistency(narrow)(ELEMENTS, jax.random.key(0), batch)
