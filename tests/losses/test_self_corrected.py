"""Self-corrected flow distillation: its consistency at the exact map, its correction on straight
ones, its discriminator."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact_maps import (
    COSINE,
    GAUSSIAN,
    MIXTURE,
    ORACLES,
    SINE,
    at,
    exact_map,
    near_data,
    random_params,
    same_when_repeated,
    silent_leaves,
)

import jflow
from jflow import losses, nets, oracles, times, train
from jflow.losses import adversarial, fixed_steps, self_corrected, self_correction
from jflow.types import Field, Velocity

KEY = jax.random.key(0)
LINEAR = Field(
    lambda *a: jnp.zeros(2),
    lambda p, x, t, cond=None, *, key=None: p[0] * jnp.sum(x, axis=1) + p[1],
)


@pytest.mark.parametrize("law", ORACLES)
def test_the_exact_map_is_consistent(law, x64):
    """Up to the Euler step of length 0.005: squares of 0.005^2."""
    oracle = ORACLES[law]
    loss = self_correction(near_data(exact_map(law)), oracles.as_velocity(oracle), reach=0.005)
    batch = {"x": oracle.sample(KEY, 64)}
    run = jax.jit(
        lambda params: loss(params, KEY, batch, {"teacher": {}, "ema": at()})[1]["residual"]
    )
    assert run(at()) < 1e-6
    assert run(at(a=0.1)) > 1e-3 and run(at(b=0.1)) > 1e-4


def test_the_residual_falls_with_the_reach(x64):
    """An Euler step is wrong in second order, its square in fourth."""
    loss = lambda reach: self_correction(  # noqa: E731
        near_data(exact_map("mixture")),
        oracles.as_velocity(MIXTURE),
        reach=reach,
        time=times.uniform(0.2, 0.8),
    )
    batch, reaches = {"x": MIXTURE.sample(KEY, 64)}, (0.08, 0.04, 0.02)
    residuals = [
        float(
            jax.jit(
                lambda r=r: loss(r)(at(), KEY, batch, {"teacher": {}, "ema": at()})[1]["residual"]
            )()
        )
        for r in reaches
    ]
    order = np.polyfit(np.log(reaches), np.log(residuals), 1)[0]
    assert 3.5 < order < 4.5, residuals


def test_correction_holds_on_straight_trajectories_alone(x64):
    frozen, batch = {"teacher": {}, "ema": {}}, {"x": GAUSSIAN.sample(KEY, 32)}
    straight = Velocity(
        lambda *a: {}, lambda p, x, t, cond=None, *, key=None: jnp.full_like(x, 1.5)
    )
    value, metrics = self_correction(straight, straight)({}, KEY, batch, frozen)
    assert value < 1e-20
    loss = self_correction(near_data(exact_map("gaussian")), oracles.as_velocity(GAUSSIAN))
    assert loss(at(), KEY, batch, frozen | {"ema": at()})[1]["correction"] > 1e-3


def test_only_the_student_at_x_t_and_z_t_is_differentiated(x64):
    """F = p constant, teacher 0: f(x_t) = x_t + (1 - t) p, both targets of the average q; y = x0 +
    p without gradient."""
    constant = Velocity(
        lambda *a: 0.0, lambda p, x, t, cond=None, *, key=None: jnp.full_like(x, 1.0) * p
    )
    teacher = Velocity(lambda *a: {}, lambda p, x, t, cond=None, *, key=None: jnp.zeros_like(x))
    t, p, q, reach = 0.25, 0.7, 0.2, 1e-9
    loss = self_correction(
        constant, teacher, time=lambda key, n: jnp.full(n, t), reach=reach, backward=2.0
    )
    batch = {"x": GAUSSIAN.sample(KEY, 8)}
    value, grad = jax.value_and_grad(lambda p: loss(p, KEY, batch, {"teacher": {}, "ema": q})[0])(p)
    apart = (1 - t) * (p - q)
    np.testing.assert_allclose(
        value, (1 + 2) * apart**2, rtol=1e-6
    )  # z_t + (1 - t) p = x0 + p: no correction
    np.testing.assert_allclose(grad, (1 + 2) * 2 * apart * (1 - t), rtol=1e-6)


def test_the_correction_moves_the_prediction_towards_the_one_step_not_back(x64):
    """F = (1 + t) p: the prediction from z_t is x0 + t y' + (1 - t^2) p with y' = y - x0 = p held,
    off by (t - t^2) p."""
    student = Velocity(
        lambda *a: 0.0,
        lambda p, x, t, cond=None, *, key=None: p * (1 + t[:, None]) * jnp.ones_like(x),
    )
    teacher = Velocity(lambda *a: {}, lambda p, x, t, cond=None, *, key=None: jnp.zeros_like(x))
    t, p = 0.25, 0.7
    loss = self_correction(
        student, teacher, time=lambda key, n: jnp.full(n, t), reach=1e-9, correction=1.0
    )
    frozen, batch = {"teacher": {}, "ema": p}, {"x": GAUSSIAN.sample(KEY, 8)}
    value, grad = jax.value_and_grad(lambda p: loss(p, KEY, batch, frozen)[0])(p)
    np.testing.assert_allclose(value, (t - t**2) ** 2 * p**2, rtol=1e-6)
    np.testing.assert_allclose(grad, 2 * (t - t**2) * p * (1 - t**2), rtol=1e-6)


def test_no_step_leaves_the_unit_interval():
    asked = []

    def apply(params, x, t, cond=None, *, key=None):
        jax.debug.callback(lambda t: asked.append(np.asarray(t)), t)
        return x

    student = Velocity(None, apply)
    self_correction(student, student, reach=1.0)(
        {}, KEY, {"x": jnp.zeros((256, 1))}, {"teacher": {}, "ema": {}}
    )
    jax.effects_barrier()
    asked = np.stack(asked)
    assert (
        np.all((asked >= 0) & (asked <= 1)) and len(asked) == 6
    )  # teacher, here, two near, y, z_t


def test_the_whole_is_the_sum_of_both():
    velocity = near_data(exact_map("gaussian"))
    teacher = oracles.as_velocity(GAUSSIAN)
    params = {"student": at(0.2, 0.1), "discriminator": jnp.asarray([0.3, 0.1])}
    frozen = {"teacher": {}, "ema": {"student": at(0.1), "discriminator": jnp.zeros(2)}}
    batch = {"x": GAUSSIAN.sample(KEY, 16)}
    value, metrics = self_corrected(velocity, teacher, LINEAR, weight=0.1)(
        params, KEY, batch, frozen
    )
    one, two = jax.random.split(KEY)
    own = {"teacher": {}, "ema": at(0.1)}
    student, said = self_correction(velocity, teacher)(params["student"], one, batch, own)
    gan, _ = adversarial(fixed_steps(velocity, 1), LINEAR, weight=0.1)(params, two, batch)
    np.testing.assert_allclose(value, student + gan, rtol=1e-5)
    np.testing.assert_allclose(metrics["residual"], said["residual"], rtol=1e-5)


def test_a_tiled_event_changes_nothing(x64):
    x0, x1 = jax.random.normal(KEY, (8, 3)), jax.random.normal(jax.random.key(1), (8, 3))
    loss = self_correction(SINE, COSINE)
    same_when_repeated(loss, 0.7, x0, x1, {"teacher": {}, "ema": 0.5}, rtol=1e-12)


def test_gradients_reach_every_param_and_stop_at_frozen():
    velocity = jflow.velocity(nets.ResidualMLP(8, 1))
    x, t = GAUSSIAN.sample(KEY, 4), jnp.ones(4)
    student = random_params(velocity.init, x, t)
    params = {"student": student, "discriminator": jnp.asarray([0.3, 0.1])}
    loss = self_corrected(velocity, velocity, LINEAR, metric=losses.pseudo_huber(0.1), r1=0.1)
    frozen = {"teacher": student, "ema": jax.tree.map(lambda p: 0.9 * p, params)}
    assert not silent_leaves(loss, params, {"x": x}, frozen)


def test_two_optimizers_and_the_average_in_one_step():
    """Each player moves at its own rate, and what frozen['ema'] holds of the student follows."""
    student = Velocity(lambda *a: 0.0, lambda p, x, t, cond=None, *, key=None: p * jnp.sin(x))
    loss = self_corrected(
        student, oracles.as_velocity(GAUSSIAN), LINEAR, correction=1.0, weight=0.1
    )
    params = {"student": jnp.asarray(0.7), "discriminator": jnp.asarray([0.3, 0.1])}
    batch = {"x": GAUSSIAN.sample(KEY, 16)}

    def move(rate):
        players = {"student": optax.sgd(rate), "discriminator": optax.sgd(0.5)}
        optimizer = optax.partition(players, {name: name for name in players})
        state = train.init_state(params, optimizer, KEY, ema=0.5, frozen={"teacher": {}})
        new, _ = train.make_step(loss, optimizer, ema=0.5)(state, batch)
        return jax.tree.map(lambda new, old: new - old, (new.params, new.ema), (params, params))

    (slow, average), (fast, _) = jax.jit(lambda: [move(0.1), move(0.2)])()
    assert abs(float(slow["student"])) > 1e-4
    np.testing.assert_allclose(
        fast["student"], 2 * slow["student"], rtol=1e-3
    )  # float32 differences of 0.7
    np.testing.assert_array_equal(fast["discriminator"], slow["discriminator"])
    for mean, one in zip(jax.tree.leaves(average), jax.tree.leaves(slow), strict=True):
        np.testing.assert_allclose(mean, one / 2, atol=1e-7)


def test_bad_input():
    velocity, teacher = near_data(exact_map("gaussian")), oracles.as_velocity(GAUSSIAN)
    batch = {"x": jnp.zeros((2, 2))}
    with pytest.raises(ValueError, match=r"reach in \(0, 1\]"):
        self_correction(velocity, teacher, reach=0.0)
    with pytest.raises(ValueError, match="finite correction >= 0"):
        self_correction(velocity, teacher, correction=-1.0)
    with pytest.raises(ValueError, match="'ema' in frozen"):
        self_correction(velocity, teacher)(at(), KEY, batch, {"teacher": {}})
    with pytest.raises(ValueError, match="'teacher' in frozen"):
        self_correction(velocity, teacher)(at(), KEY, batch, {"ema": at()})
    with pytest.raises(ValueError, match="discriminator"):
        self_corrected(velocity, teacher, LINEAR)(
            {"student": at()}, KEY, batch, {"teacher": {}, "ema": {"student": at()}}
        )
