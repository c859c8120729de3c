"""Discrete consistency: the exact map is a fixed point up to the order of the step, from scratch in
the mean."""

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
from jflow import losses, nets, oracles, times, train
from jflow.solvers import grids
from jflow.types import Velocity


def gaps(h, high=0.9):
    """Steps of length h from uniform times."""

    def draw(key, n, frozen):
        t = jax.random.uniform(key, (n,), maxval=high)
        return t, t + h

    return draw


def steps_to_data(key, n, frozen):
    t = jax.random.uniform(key, (n,), maxval=0.9)
    return t, jnp.ones_like(t)


@pytest.mark.parametrize("advance, order", [(losses.euler_step, 1), (losses.heun_step, 2)])
@pytest.mark.parametrize("name", ORACLES)
def test_the_exact_map_is_left_alone_to_the_order_of_the_step(name, advance, order, x64):
    oracle, student = ORACLES[name], near_data(exact_map(name))
    batch = {"x": jnp.asarray(oracle.sample(jax.random.key(0), 16), jnp.float64)}
    x0 = jax.random.normal(jax.random.key(1), batch["x"].shape, jnp.float64)

    def residual(h):
        loss = losses.consistency_training(
            student, steps=gaps(h), teacher=oracles.as_velocity(oracle), advance=advance
        )
        return loss(at(), jax.random.key(2), {**batch, "x0": x0}, {"teacher": {}})[1]["residual"]

    lengths = np.asarray([2e-2, 1e-2, 5e-3])
    run = jax.jit(residual)
    found = np.asarray([float(run(h)) for h in lengths])
    slope = np.polyfit(np.log(lengths), np.log(found), 1)[0]
    assert abs(slope - 2 * order) < 0.1  # of a square
    assert found[-1] * (2e-4 / 5e-3) ** (2 * order) < 1e-6  # at steps of 2e-4


@pytest.mark.parametrize("name", ORACLES)
def test_from_scratch_the_mean_gradient_vanishes_at_the_exact_map(name):
    draw = ORACLES[name].sample
    loss = losses.consistency_training(near_data(exact_map(name, 4)), steps=gaps(1e-3))
    gradient = mean_gradient(loss, draw)
    mean, error = gradient(at())
    assert np.all(np.abs(mean) < 3 * error)
    moved, _ = gradient(at(a=0.1))
    assert abs(moved[0]) > 10 * error[0]


def test_a_step_to_data_is_flow_matching():
    """f(x_s, 1) = x1: (1 - t)^2 |F - (x1 - x0)|^2 per step of 1 - t."""
    batch = {"x": GAUSSIAN.sample(jax.random.key(0), 32)}
    loss = losses.consistency_training(ELEMENTWISE, steps=steps_to_data)
    plain = losses.flow_matching(
        ELEMENTWISE,
        time=times.uniform(0, 0.9),
        metric=lambda v, target, x, t: (1 - t) * losses.mean_squared_error(v, target, x, t),
    )
    one, metrics = loss(ELEMENTS, jax.random.key(1), batch)
    np.testing.assert_allclose(one, plain(ELEMENTS, jax.random.key(1), batch)[0], rtol=1e-5)
    unweighted, _ = losses.consistency_training(
        ELEMENTWISE, steps=steps_to_data, weight=lambda t, s: (s - t) ** -2
    )(ELEMENTS, jax.random.key(1), batch)
    np.testing.assert_allclose(metrics["residual"], unweighted, rtol=1e-5)


def test_the_target_holds_still(x64):
    """The gradient is that of the squared distance to a constant, in x_s = x_t + (s - t) (x1 -
    x0)."""
    t, s = jnp.linspace(0.1, 0.7, 8), jnp.linspace(0.3, 0.8, 8)
    x0, x1 = (jax.random.normal(jax.random.key(i), (8, 2), jnp.float64) for i in range(2))
    loss = losses.consistency_training(ELEMENTWISE, steps=lambda key, n, frozen: (t[:n], s[:n]))
    grads = jax.grad(lambda p: loss(p, jax.random.key(0), {"x": x1, "x0": x0})[0])(ELEMENTS)

    def f(params, t):
        x = x0 + t[:, None] * (x1 - x0)
        return x + (1 - t)[:, None] * ELEMENTWISE.apply(params, x, t)

    held = f(ELEMENTS, s)
    expected = jax.grad(lambda p: jnp.mean((f(p, t) - held) ** 2 / (s - t)[:, None]))(ELEMENTS)
    for name in ELEMENTS:
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-9)


def test_weights():
    t, s = jnp.asarray([0.2, 0.5]), jnp.asarray([0.4, 1.0])
    np.testing.assert_allclose(losses.inverse_time_step(t, s), [5, 2], rtol=1e-6)
    np.testing.assert_allclose(
        losses.inverse_noise_step(t, s), 1 / ((1 - t) / t - (1 - s) / s), rtol=1e-6
    )


def test_repeating_the_event_changes_nothing():
    x0, x = (jax.random.normal(jax.random.key(i), (8, 3)) for i in range(2))
    loss = losses.consistency_training(ELEMENTWISE, steps=gaps(0.05))
    same_when_repeated(loss, ELEMENTS, x0, x, rtol=1e-5)


def test_easy_steps_shrink_by_stages():
    draw = losses.easy_steps(10, stages=4, time=lambda key, n: jnp.full(n, 0.5))
    scale = 1 + 8 / (1 + np.e)  # at sigma = 1
    for step, stage in ((0, 0), (9, 0), (10, 1), (29, 2), (35, 3), (10_000, 3)):
        t, s = draw(jax.random.key(0), 2, {"step": jnp.int32(step)})
        np.testing.assert_allclose((1 - s) / s, max(0, 1 - scale * 2.0 ** -(stage + 1)), atol=1e-6)
        np.testing.assert_allclose(t, 0.5)
    t, s = losses.easy_steps(1)(jax.random.key(0), 100_000, {"step": jnp.int32(10**6)})
    assert np.all(s - t > 0.9e-4) and np.all(s <= 1) and np.all(t >= 0)
    sigma = np.log(np.asarray((1 - t) / t))
    assert abs(np.mean(sigma) + 1.1) < 4 * 2 / np.sqrt(1e5)  # the paper's log-normal


def test_grid_steps_are_neighbors_on_a_grid_that_grows():
    draw = losses.grid_steps(grids.uniform, (2, 4), every=100)
    for step, n in ((0, 2), (99, 2), (100, 4), (1000, 4)):
        t, s = draw(jax.random.key(0), 200, {"step": jnp.int32(step)})
        np.testing.assert_allclose(np.unique(t), np.arange(n) / n)
        np.testing.assert_allclose(s - t, 1 / n)
    edm = grids.edm(6)
    t, s = losses.grid_steps(grids.edm, 6)(jax.random.key(0), 200, {})
    np.testing.assert_allclose(np.unique(t), edm[:-1], atol=1e-6)
    np.testing.assert_allclose(np.unique(s), edm[1:], atol=1e-6)


def test_updates_are_counted_and_the_average_is_the_target():
    """In a step of training: frozen['step'] grows, frozen['ema'] is what f is compared with."""
    import optax

    seen = []

    def target(params, frozen):
        seen.append(sorted(frozen))
        return losses.averaged_target(params, frozen)

    loss = losses.consistency_training(ELEMENTWISE, steps=losses.easy_steps(2), target=target)
    params = {name: jnp.asarray(value) for name, value in ELEMENTS.items()}
    optimizer = optax.sgd(0.1)
    state = train.init_state(
        params, optimizer, key=jax.random.key(0), ema=0.5, frozen={"step": jnp.zeros((), jnp.int32)}
    )
    step = train.make_step(loss, optimizer, ema=0.5, refresh=losses.count_steps)
    batch = {"x": jnp.ones((4, 2))}
    for _ in range(2):
        state, _ = step(state, batch)
    assert int(state.frozen["step"]) == 2 and state.frozen["step"].dtype == jnp.int32
    assert all(names == ["ema", "step"] for names in seen)
    other = {"a": jnp.asarray(0.1), "b": jnp.asarray(0.2)}
    plain = losses.consistency_training(ELEMENTWISE, steps=gaps(0.1))
    averaged = losses.consistency_training(
        ELEMENTWISE, steps=gaps(0.1), target=losses.averaged_target
    )
    value = lambda loss, frozen: loss(params, jax.random.key(0), batch, frozen)[0]  # noqa: E731
    assert value(averaged, {"ema": other}) != value(plain, None)
    np.testing.assert_allclose(value(averaged, {"ema": params}), value(plain, None))


def test_what_is_frozen_has_no_gradient_and_what_is_missing_is_named():
    loss = losses.consistency_training(
        ELEMENTWISE,
        steps=gaps(0.1),
        teacher=ELEMENTWISE,
        advance=losses.heun_step,
        target=losses.averaged_target,
    )
    batch, frozen = {"x": jnp.ones((4, 2))}, {"teacher": {"a": 0.3, "b": 0.1}, "ema": ELEMENTS}
    assert not silent_leaves(loss, ELEMENTS, batch, frozen)
    with pytest.raises(ValueError, match="'teacher' in frozen, got the entries \\['ema'\\]"):
        loss(ELEMENTS, jax.random.key(0), batch, {"ema": ELEMENTS})
    with pytest.raises(ValueError, match="'ema' in frozen"):
        loss(ELEMENTS, jax.random.key(0), batch, {"teacher": ELEMENTS})
    with pytest.raises(ValueError, match="'step' in frozen"):
        losses.consistency_training(ELEMENTWISE, steps=losses.easy_steps(1))(
            ELEMENTS, jax.random.key(0), batch
        )


def test_every_param_of_a_network_learns():
    velocity = jflow.velocity(nets.ResidualMLP(8, 2, num_classes=3))
    x, cond = jax.random.normal(jax.random.key(0), (8, 2)), jnp.arange(8) % 4
    params = random_params(velocity.init, x, jnp.zeros(8), cond)
    loss = losses.consistency_training(
        velocity,
        steps=losses.easy_steps(10),
        metric=losses.pseudo_huber(0.01),
        weight=losses.inverse_noise_step,
        teacher=velocity,
    )
    frozen = {"step": jnp.int32(100), "teacher": params}
    assert silent_leaves(loss, params, {"x": x, "cond": cond, "weight": jnp.ones(8)}, frozen) == []


def test_bad_input():
    batch = {"x": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="0 <= t < s <= 1"):
        losses.consistency_training(ELEMENTWISE, steps=gaps(0.0))
    with pytest.raises(ValueError, match="shaped like x"):
        losses.consistency_training(
            Velocity(ELEMENTWISE.init, lambda params, x, t, cond=None, *, key=None: x[:, :1]),
            steps=gaps(0.1),
        )({}, jax.random.key(0), batch)
    with pytest.raises(ValueError, match="metric of shape"):
        losses.consistency_training(ELEMENTWISE, steps=gaps(0.1), metric=lambda v, target, x, t: v)(
            ELEMENTS, jax.random.key(0), batch
        )
    for options in (
        {"every": 0},
        {"every": 1, "stages": 0},
        {"every": 1, "q": 1.0},
        {"every": 1, "k": -1.0},
    ):
        with pytest.raises(ValueError, match="easy_steps: expected"):
            losses.easy_steps(**options)
    with pytest.raises(ValueError, match="2 counts need every"):
        losses.grid_steps(grids.uniform, (2, 4))
    with pytest.raises(ValueError, match="at least 1"):
        losses.grid_steps(grids.uniform, 0)
    with pytest.raises(ValueError, match="3 times that end at 1"):
        losses.grid_steps(lambda n: np.linspace(0, 0.9, n + 1), 2)
    with pytest.raises(ValueError, match="'step' in frozen"):
        losses.count_steps({}, {}, None, {})
