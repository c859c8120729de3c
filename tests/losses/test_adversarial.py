"""Games of two players: golden values, each player's own gradient, training through fixed steps,
losses in sum."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact_maps import random_params, silent_leaves, standard_scores
from jax.random import clone

import jflow
from jflow import losses, nets, train
from jflow.losses import (
    adversarial,
    fixed_steps,
    hinge_gan,
    least_squares_gan,
    non_saturating_gan,
    relativistic_gan,
    student_only,
    sum_losses,
    turbo,
)
from jflow.types import Field, Velocity

KEY = jax.random.key(0)
GAMES = {
    "non_saturating": (
        non_saturating_gan(),
        np.log1p(np.exp(-0.5)) + np.log1p(np.exp(-2.0)),
        np.log1p(np.exp(2.0)),
    ),
    "hinge": (hinge_gan(), 0.5, 2.0),
    "least_squares": (least_squares_gan(), 0.25 + 4.0, 9.0),
    "relativistic": (relativistic_gan(), np.log1p(np.exp(-2.5)), np.log1p(np.exp(2.5))),
}


def shifted(params, x0, cond=None):
    return x0 + params


LINEAR = Field(
    lambda *a: jnp.zeros(2),
    lambda p, x, t, cond=None, *, key=None: p[0] * jnp.sum(x, axis=1) + p[1],
)
PARAMS = {"student": jnp.asarray(0.3), "discriminator": jnp.asarray([0.7, -0.2])}
BATCH = {
    "x0": jax.random.normal(KEY, (64, 1)),
    "x": 2 + jax.random.normal(jax.random.key(1), (64, 1)),
}


@pytest.mark.parametrize("name", GAMES)
def test_games_at_logits_of_half_and_minus_two(name):
    """D(x) = 0.5, D(g) = -2."""
    game, judge, maker = GAMES[name]
    logits = Field(None, lambda p, x, t, cond=None, *, key=None: x[:, 0])
    batch = {"x0": jnp.full((3, 1), -2.0), "x": jnp.full((3, 1), 0.5)}
    params = {"student": jnp.asarray(0.0), "discriminator": {}}
    value, metrics = adversarial(shifted, logits, objective=game, weight=0.1)(params, KEY, batch)
    np.testing.assert_allclose(metrics["discriminator"], judge, rtol=1e-6)
    np.testing.assert_allclose(metrics["generator"], maker, rtol=1e-6)
    np.testing.assert_allclose(metrics["gap"], 2.5, rtol=1e-6)
    np.testing.assert_allclose(value, judge + 0.1 * maker, rtol=1e-6)


@pytest.mark.parametrize("name", GAMES)
def test_each_players_gradient_is_its_own(name, x64):
    game = GAMES[name][0]
    batch = jax.tree.map(lambda a: a.astype(jnp.float64), BATCH)
    grads = jax.grad(
        lambda p: adversarial(shifted, LINEAR, objective=game, weight=0.5)(p, KEY, batch)[0]
    )(PARAMS)

    def logits(p):
        return (
            LINEAR.apply(p["discriminator"], y, None)
            for y in (batch["x"], batch["x0"] + p["student"])
        )

    judge = jax.grad(lambda p: jnp.mean(game.discriminator(*logits(p))))(PARAMS)["discriminator"]
    maker = jax.grad(lambda p: 0.5 * jnp.mean(game.generator(*logits(p))))(PARAMS)["student"]
    np.testing.assert_allclose(grads["discriminator"], judge, rtol=1e-10)
    np.testing.assert_allclose(grads["student"], maker, rtol=1e-10)
    assert maker < 0  # towards the data


@pytest.mark.parametrize("name", GAMES)
def test_a_level_discriminator_has_no_mean_gradient_where_the_laws_are_equal(name):
    """10^5 draws; level is D = 0, of least squares 1/2."""
    loss = adversarial(shifted, LINEAR, objective=GAMES[name][0])
    level = jnp.asarray([0.0, 0.5 if name == "least_squares" else 0.0])

    def slope(key, shift):
        params = {"student": shift, "discriminator": level}
        data_key, loss_key = jax.random.split(key)
        x = 2 + jax.random.normal(data_key, (1000, 1))
        return jax.grad(lambda p: loss(p, loss_key, {"x": x})[0])(params)["discriminator"][0]

    scores = standard_scores(slope)
    assert abs(scores(2.0)) < 3
    assert scores(1.9) < -10  # D is to grow where the data are


def test_gradients_run_through_the_fixed_steps(x64):
    """dx/dt = p x by n Euler steps: x0 (1 + p / n)^n."""
    velocity = Velocity(lambda *a: 0.0, lambda p, x, t, cond=None, *, key=None: p * x)
    x0, n, p = jax.random.normal(KEY, (8, 2)), 4, 0.7
    generate = fixed_steps(velocity, n)
    np.testing.assert_allclose(generate(p, x0, None), x0 * (1 + p / n) ** n, rtol=1e-12)
    grad = jax.grad(lambda p: jnp.sum(generate(p, x0, None)))(p)
    np.testing.assert_allclose(grad, jnp.sum(x0) * (1 + p / n) ** (n - 1), rtol=1e-10)


def absolute(g, x):
    return jnp.mean(jnp.abs(g - x).reshape(x.shape[0], -1), axis=1)


FEATURES = Field(
    None, lambda p, x, t, cond=None, *, key=None: {"a": p[0] * x, "b": jnp.stack([x, 2 * x], -1)}
)


def test_turbo_adds_features_and_reconstruction(x64):
    velocity = Velocity(
        lambda *a: 0.0, lambda p, x, t, cond=None, *, key=None: p * jnp.ones_like(x)
    )
    batch = jax.tree.map(lambda a: a.astype(jnp.float64), BATCH)
    params = {"student": jnp.asarray(0.3), "discriminator": jnp.asarray([0.7, -0.2])}  # in float64
    loss = turbo(velocity, LINEAR, absolute, method=3, features=FEATURES)
    value, m = loss(params, KEY, batch)
    apart = float(jnp.mean(absolute(batch["x0"] + 0.3, batch["x"])))
    np.testing.assert_allclose(m["reconstruction"], apart, rtol=1e-12)
    np.testing.assert_allclose(
        m["features"], (0.7 + 1.5) * apart, rtol=1e-12
    )  # 0.7 of one leaf, (1 + 2) / 2 of the other
    total = m["discriminator"] + m["generator"] + 2 * m["features"] + 45 * m["reconstruction"]
    np.testing.assert_allclose(value, total, rtol=1e-12)
    grad = jax.grad(lambda p: loss(p, KEY, batch)[0])(params)
    plain = jax.grad(
        lambda p: adversarial(shifted, LINEAR, objective=least_squares_gan())(p, KEY, batch)[0]
    )(params)
    np.testing.assert_allclose(
        grad["discriminator"], plain["discriminator"], rtol=1e-12
    )  # features pull the student alone


def test_features_and_reconstruction_are_means_over_the_event():
    velocity = Velocity(lambda *a: 0.0, lambda p, x, t, cond=None, *, key=None: p * jnp.sin(x))
    loss = turbo(velocity, LINEAR, absolute, method=2, features=FEATURES)
    tiled = {name: jnp.tile(value, (1, 2)) for name, value in BATCH.items()}
    one, two = jax.jit(lambda: [loss(PARAMS, clone(KEY), batch)[1] for batch in (BATCH, tiled)])()
    for name in ("features", "reconstruction"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5)


def test_heads_are_summed_and_their_logits_averaged(x64):
    two = Field(
        None,
        lambda p, x, t, cond=None, *, key=None: {
            "one": LINEAR.apply(p, x, t)[:, None].repeat(5, axis=1),
            "two": LINEAR.apply(p, x, t),
        },
    )
    for name in ("discriminator", "generator", "gap"):
        one, both = (adversarial(shifted, d)(PARAMS, KEY, BATCH)[1][name] for d in (LINEAR, two))
        np.testing.assert_allclose(both, 2 * one, rtol=1e-6)


def test_penalties_are_sums_over_the_event():
    """D = a sum(x) + b: |grad|^2 = d a^2, so that a tiled event pays twice."""
    x = jax.random.normal(KEY, (4, 3))
    for event in (x, jnp.tile(x, (1, 2))):
        _, metrics = adversarial(shifted, LINEAR, r1=2.0, r2=0.5)(
            PARAMS, KEY, {"x0": event, "x": event}
        )
        np.testing.assert_allclose(
            metrics["penalty"], (1.0 + 0.25) * event.shape[1] * 0.7**2, rtol=1e-6
        )


def test_a_shift_is_learned_by_two_optimizers():
    """N(0, 1) moved to N(2, 1) against a linear discriminator with a penalty, both players in one
    step."""
    loss = adversarial(shifted, LINEAR, r1=1.0)
    optimizer = optax.partition(
        {
            "student": optax.MultiSteps(optax.sgd(0.2), 2).gradient_transformation(),
            "discriminator": optax.sgd(0.4),
        },
        {"student": "student", "discriminator": "discriminator"},
    )
    step = train.make_step(loss, optimizer)
    params = {"student": jnp.asarray(0.0), "discriminator": jnp.zeros(2)}
    state = train.init_state(params, optimizer, KEY)

    def update(state, key):
        state, metrics = step(state, {"x": 2 + jax.random.normal(key, (256, 1))})
        return state, state.params["student"]

    _, path = jax.jit(lambda s: jax.lax.scan(update, s, jax.random.split(jax.random.key(2), 400)))(
        state
    )
    assert abs(float(jnp.mean(path[-100:])) - 2) < 0.1
    assert np.all(path[0] == 0) and path[1] != 0  # the student moves every second time


def test_losses_in_sum():
    net = jflow.velocity(nets.TimeMLP((8,)))
    x = BATCH["x"]
    student = net.init(KEY, x, jnp.zeros(64))
    params = {"student": student, "discriminator": jnp.asarray([0.7, -0.2])}
    matching = losses.flow_matching(net)
    seen = []

    def watched(p, key, batch, frozen=None):
        seen.append(frozen)
        return matching(p, key, batch, frozen)

    gan = adversarial(fixed_steps(net, 2), LINEAR)
    total = sum_losses({"map": student_only(watched), "gan": gan})
    value, metrics = total(
        params, KEY, BATCH, {"ema": {"student": 1, "discriminator": 2}, "teacher": 3}
    )
    assert seen == [{"ema": 1, "teacher": 3}]
    first, second = jax.random.split(KEY)
    by_hand = matching(student, first, BATCH)[0] + gan(params, second, BATCH)[0]
    np.testing.assert_allclose(value, by_hand, rtol=1e-6)
    np.testing.assert_allclose(metrics["map/loss"] + metrics["gan/loss"], value, rtol=1e-6)
    assert "gan/gap" in metrics


class Judge(nn.Module):
    @nn.compact
    def __call__(self, x, t, cond=None):
        h = nn.tanh(nn.Dense(8)(jnp.concatenate([x, t[:, None]], axis=1)))
        return nn.Dense(1)(h)[:, 0]


def test_gradients_reach_every_param_of_both():
    velocity, judge = jflow.velocity(nets.ResidualMLP(8, 1)), jflow.field(Judge())
    x, t = BATCH["x"][:4], jnp.ones(4)
    params = {
        "student": random_params(velocity.init, x, t),
        "discriminator": random_params(judge.init, x, t),
    }
    loss = adversarial(fixed_steps(velocity, 2), judge, r1=0.1, reconstruction=absolute)
    assert not silent_leaves(loss, params, {"x": x})


def test_bad_input():
    with pytest.raises(ValueError, match="finite r1 >= 0"):
        adversarial(shifted, LINEAR, r1=-1.0)
    with pytest.raises(ValueError, match="finite weight >= 0"):
        adversarial(shifted, LINEAR, weight=float("inf"))
    with pytest.raises(
        ValueError, match=r"params with \['student', 'discriminator'\], got \['student'\]"
    ):
        adversarial(shifted, LINEAR)({"student": 1.0}, KEY, BATCH)
    with pytest.raises(ValueError, match="shaped like x"):
        adversarial(lambda p, x0, cond: x0[:, :0], LINEAR)(PARAMS, KEY, BATCH)
    scalar = Field(None, lambda p, x, t, cond=None, *, key=None: jnp.sum(x))
    with pytest.raises(ValueError, match="lead with b rows"):
        adversarial(shifted, scalar)(PARAMS, KEY, BATCH)
    still = Velocity(lambda *a: 0.0, lambda p, x, t, cond=None, *, key=None: p * x)
    with pytest.raises(ValueError, match="steps to be a whole number of at least 1, got 0"):
        turbo(still, LINEAR, absolute, method=0)(PARAMS, KEY, BATCH)
    with pytest.raises(ValueError, match="at least one loss"):
        sum_losses({})
    with pytest.raises(ValueError, match="student_only"):
        student_only(adversarial(shifted, LINEAR))({"teacher": 1}, KEY, BATCH)
