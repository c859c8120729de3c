"""DPO, rewards of noisy data and weights by reward against closed forms; guidance by a reward
against the velocity of the law that it leads to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.random import clone

from jflow import guidance, losses, oracles, train
from jflow.types import Field, Velocity

KEY = jax.random.key(0)
LINE = Velocity(
    None,
    lambda params, x, t, cond=None, *, key=None: params["a"] * x + params["b"] + 0 * t[:, None],
)


def at(t):
    """The law of one time."""
    return lambda key, n: jnp.full(n, t)


def numbers(a, b):
    return {"a": jnp.float32(a), "b": jnp.float32(b)}


def test_the_gradient_of_dpo_is_the_formula():
    """In numpy: of a linear velocity on given sources at a given time, with weights."""
    rng = np.random.default_rng(0)
    better, worse, x0 = rng.normal(size=(3, 5, 2))
    weight, t, beta, (a, b), (a_ref, b_ref) = rng.uniform(size=5), 0.3, 2.0, (0.4, -0.2), (0.1, 0.3)
    batch = {"x": better, "worse": worse, "x0": x0, "weight": weight}
    batch = {k: v.astype(np.float32) for k, v in batch.items()}
    loss = losses.dpo(LINE, beta, time=at(t))
    frozen = {"reference": numbers(a_ref, b_ref)}
    both = jax.jit(jax.value_and_grad(loss, has_aux=True))(numbers(a, b), KEY, batch, frozen)
    (value, metrics), slope = jax.device_get(both)

    def error(x1, a, b):  # and its derivatives by a and b
        x = (1 - t) * x0 + t * x1
        off = a * x + b - (x1 - x0)
        return (off**2).mean(1), (2 * off * x).mean(1), (2 * off).mean(1)

    (w, w_a, w_b), (w_ref, _, _) = error(better, a, b), error(better, a_ref, b_ref)
    (l, l_a, l_b), (l_ref, _, _) = error(worse, a, b), error(worse, a_ref, b_ref)
    margin = -beta / 2 * ((w - w_ref) - (l - l_ref))
    mean = lambda v: (weight * v).sum() / weight.sum()  # noqa: E731
    np.testing.assert_allclose(value, mean(np.log1p(np.exp(-margin))), rtol=1e-5)
    np.testing.assert_allclose(metrics["margin"], mean(margin), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], mean(margin > 0), rtol=1e-6)
    pull = beta / 2 / (1 + np.exp(margin))
    np.testing.assert_allclose(slope["a"], mean(pull * (w_a - l_a)), rtol=1e-4)
    np.testing.assert_allclose(slope["b"], mean(pull * (w_b - l_b)), rtol=1e-4)


def test_the_expected_gradient_of_dpo_at_equal_policies():
    """By hand: at the reference sigmoid(0) = 1/2, and of the constant b the gradient of an error is
    2 (v - x1 + x0) with v = a x_t + b, so that what is left is beta / 4 times 2 (1 - a t)
    E[worse - better], whatever b is, and 1 - a / 2 on average over t. Over 20000 pairs of unit
    normals at distance 0.7 the mean has a standard error of 0.5 1.15 sqrt(2 / 20000) = 0.006; four
    of them."""
    rng = np.random.default_rng(1)
    better, worse = rng.normal(0.7, 1, (20000, 1)), rng.normal(0, 1, (20000, 1))
    batch = {"x": jnp.asarray(better, jnp.float32), "worse": jnp.asarray(worse, jnp.float32)}
    params = numbers(-0.3, 0.2)
    loss = losses.dpo(LINE, 1.0)
    slope, metrics = jax.jit(jax.grad(loss, has_aux=True))(
        params, KEY, batch, {"reference": params}
    )
    assert abs(float(slope["b"]) + 0.5 * (1 + 0.3 / 2) * 0.7) < 0.025
    assert metrics["margin"] == 0 and metrics["accuracy"] == 0.5


def test_dpo_raises_the_win_rate_on_pairs_that_it_has_not_seen():
    """The better of two samples of N(0, 1) is the greater one. From a velocity of 0, with constants
    a and b, 200 updates of 64 pairs; the accuracy is that of 4000 other pairs, and a sample of the
    tuned velocity wins where it is greater than that of the reference, which is its noise."""
    rng = np.random.default_rng(2)
    pairs = np.sort(rng.normal(size=(8000, 2, 1)), axis=1).astype(np.float32)
    reference = numbers(0.0, 0.0)
    loss, optimizer = losses.dpo(LINE, 1.0), optax.adam(0.02)
    update = train.make_step(loss, optimizer)
    state = train.init_state(reference, optimizer, KEY, frozen={"reference": reference})

    def one(state, rows):
        return update(state, {"x": rows[:, 1], "worse": rows[:, 0]})

    held_out = {"x": pairs[4000:, 1], "worse": pairs[4000:, 0]}

    @jax.jit
    def run(state, rows):
        ends = state.params, jax.lax.scan(one, state, rows)[0].params
        both = jax.tree.map(lambda *p: jnp.stack(p), *ends)
        held = lambda p: loss(p, jax.random.key(9), held_out, state.frozen)  # noqa: E731
        return ends[1], jax.lax.map(held, both)

    rows = pairs[rng.integers(0, 4000, (200, 64))]
    params, (value, metrics) = jax.device_get(run(state, rows))
    before, after = metrics["accuracy"]
    # 1/2 before: ties, or signs of rounding, with a standard error of 0.008; four of them
    assert abs(before - 0.5) < 0.032 and after > 0.7 and value[1] < value[0]
    # samples: the solution of dx/dt = a x + b at t = 1, from the same noise
    a, b = float(params["a"]), float(params["b"])
    noise = rng.normal(size=4000)
    tuned = np.exp(a) * noise + b * np.expm1(a) / a
    assert np.mean(tuned > noise) > 0.9  # 1/2 without training, all of them ties


def test_one_round_of_weighted_regression_is_the_law_times_the_exponential_of_the_reward():
    """Samples of N(0.5, 1), reward x - x^2 / 2, beta = 0.8: the law is again normal, and the least
    squares of a linear velocity at one time, one step of Newton's, are its exact velocity. With
    40000 rows of an effective size of about 25000 the standard errors of a and b are 0.007; five of
    them."""
    rng = np.random.default_rng(3)
    x = rng.normal(0.5, 1, (40000, 1)).astype(np.float32)
    batch = {"x": x, "reward": (x - x**2 / 2)[:, 0]}
    beta, t = 0.8, 0.5
    weighted = losses.reward_weights(beta)
    loss = losses.chain(weighted, losses.flow_matching(LINE, time=at(t)))
    value = lambda v: loss({"a": v[0], "b": v[1]}, clone(KEY), batch)[0]  # noqa: E731
    slope, curvature = jax.jit(lambda v: (jax.grad(value)(v), jax.hessian(value)(v)))(jnp.zeros(2))
    found = -np.linalg.solve(np.asarray(curvature, float), np.asarray(slope, float))
    precision = 1 + 1 / beta
    mean, variance = (0.5 + 1 / beta) / precision, 1 / precision
    a = (t * variance - (1 - t)) / ((1 - t) ** 2 + t**2 * variance)
    np.testing.assert_allclose(found, [a, mean * (1 - a * t)], atol=0.035)
    size = np.asarray(weighted(KEY, batch)["weight"])
    assert size.sum() ** 2 / (size**2).sum() > 20000

    twice = weighted(KEY, {**batch, "weight": np.float32(x[:, 0] > 0)})["weight"]
    assert np.all(twice[x[:, 0] <= 0] == 0) and np.isclose(np.max(twice), 1)


def test_rewards_without_a_weight():
    """-inf is a weight of 0, also in all rows; NaN and inf, of which nothing can be raised inside
    jit, make the loss NaN, unless their row has no weight."""
    loss = losses.chain(losses.reward_weights(1.0), losses.flow_matching(LINE))
    x = np.ones((3, 1), np.float32)

    @jax.jit
    def run(reward, weight):
        batch = {"x": x, "reward": reward, "weight": weight}
        value = loss(numbers(0, 0), clone(KEY), batch)[0]
        return losses.reward_weights(1.0)(clone(KEY), batch)["weight"], value

    for reward, weight, expected in [
        ([0, -np.inf, np.log(2)], [1, 1, 1], [0.5, 0, 1]),
        ([-np.inf] * 3, [1, 1, 1], [0, 0, 0]),
        ([0, np.nan, np.log(2)], [1, 0, 1], [0.5, 0, 1]),
        ([0, np.nan, 1], [1, 1, 1], None),
        ([0, np.inf, 1], [1, 1, 1], None),
    ]:
        rows = np.asarray(reward, np.float32), np.asarray(weight, np.float32)
        found, value = jax.device_get(run(*rows))
        assert np.isnan(value) == (expected is None)
        if expected is not None:
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_guidance_by_the_exact_reward_is_the_velocity_of_the_law_it_leads_to():
    """Data N(0.5, 1), reward -(x - 2)^2 / 2: log E[exp(r(x1)) | x_t] is that of a normal posterior,
    and twice the gradient is not the velocity of twice the reward."""
    m, s2 = 0.5, 1.0
    base = oracles.as_velocity(oracles.gaussian([m], [[s2]]))
    tilted = oracles.as_velocity(oracles.gaussian([(m / s2 + 2.0) / 2], [[0.5]]))

    def reward(params, x, t, cond=None, *, key=None):
        x = x[:, 0]
        precision = 1 / s2 + t**2 / (1 - t) ** 2
        mean = (m / s2 + t * x / (1 - t) ** 2) / precision
        spread = 1 + 1 / precision
        return -0.5 * (mean - 2.0) ** 2 / spread

    guided = guidance.reward_guidance(base, Field(lambda *_: {}, reward), 1.0)
    params = {"velocity": {}, "reward": {}}
    x, t = jnp.linspace(-2, 3, 7)[:, None], jnp.linspace(0.05, 0.9, 7)
    found, expected = guided.apply(params, x, t), tilted.apply({}, x, t)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - base.apply({}, x, t)).max() > 0.1

    # the reward of the predicted data: its gradient by hand, x1 = x + (1 - t) v
    predicted = guidance.denoised_reward(base, lambda x, cond: -0.5 * (x[:, 0] - 2.0) ** 2)
    a = (t * s2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s2)
    x1 = x + ((1 - t)[:, None]) * base.apply({}, x, t)
    by_hand = (2.0 - x1) * (1 + (1 - t) * a)[:, None]
    slope = jax.grad(lambda x: predicted.apply({}, x, t).sum())(x)
    np.testing.assert_allclose(slope, by_hand, rtol=1e-4, atol=1e-5)


def test_a_learned_reward_of_noisy_data_is_the_probability_of_a_preference():
    """Pairs of N(1, 1) and N(0, 1) at time t: one source for both cancels in the difference of the
    two noisy numbers, t d with d of N(1, 2), whose log-odds of being that of (better, worse) rather
    than of (worse, better) are d. So the reward is x / t. The slope is found by Newton's steps on
    20000 pairs, with a standard error of about 0.02 / t."""
    rng = np.random.default_rng(4)
    batch = {"x": rng.normal(1, 1, (20000, 1)), "worse": rng.normal(0, 1, (20000, 1))}
    batch = {k: v.astype(np.float32) for k, v in batch.items()}
    linear = Field(None, lambda params, x, t, cond=None, *, key=None: params * x[:, 0])
    loss = losses.preference_reward(linear, time=at(0.5))
    value = lambda s: loss(s, clone(KEY), batch)[0]  # noqa: E731

    def newton(s, _):
        return s - jax.grad(value)(s) / jax.grad(jax.grad(value))(s), None

    s = jax.jit(lambda: jax.lax.scan(newton, jnp.zeros(()), None, length=6)[0])()
    assert abs(float(s) - 2.0) < 0.15
    accuracy = float(loss(s, KEY, batch)[1]["accuracy"])
    assert abs(accuracy - 0.7602) < 0.015  # P(N(1, 2) > 0), standard error 0.003


def test_bad_input_is_named():
    batch = {"x": np.zeros((4, 1), np.float32), "worse": np.zeros((4, 1), np.float32)}
    frozen, params = {"reference": numbers(0, 0)}, numbers(0, 0)
    loss = losses.dpo(LINE, 1.0)

    def weights(reward):
        return losses.reward_weights(1.0)(KEY, {"x": batch["x"], "reward": np.asarray(reward)})

    for said, call in [
        ("dpo: expected a finite beta > 0, got 0", lambda: losses.dpo(LINE, 0)),
        ("dpo: expected a finite beta > 0, got inf", lambda: losses.dpo(LINE, np.inf)),
        ("reward_weights: expected a finite beta > 0, got -1", lambda: losses.reward_weights(-1)),
        (
            "preference_reward: expected a Field, got the function",
            lambda: losses.preference_reward(lambda x: x),
        ),
        (
            "dpo: expected params as 'reference' in frozen, got None",
            lambda: loss(params, KEY, batch, {"reference": None}),
        ),
        (
            r"dpo: expected frozen\['reference'\]\['b'\] of shape \[\], got \[3\]",
            lambda: loss(params, KEY, batch, {"reference": {**params, "b": np.zeros(3)}}),
        ),
        ("dpo: expected 'reference' in frozen", lambda: loss(params, KEY, batch)),
        (
            "dpo: expected a reference of the form of params",
            lambda: loss(params, KEY, batch, {"reference": {}}),
        ),
        ("dpo: expected pairs", lambda: loss(params, KEY, {"x": batch["x"]}, frozen)),
        (
            r"dpo: expected 'worse' of shape \[4, 1\], got \[4, 2\]",
            lambda: loss(params, KEY, {**batch, "worse": np.zeros((4, 2), np.float32)}, frozen),
        ),
        (
            r"expected 'reward' of shape \[4\]|'reward' of shape \[4\], got \[4, 1\]",
            lambda: losses.reward_weights(1.0)(KEY, {"x": batch["x"], "reward": batch["x"]}),
        ),
        (
            r"expected 'reward' \[b\] in batch",
            lambda: losses.reward_weights(1.0)(KEY, {"x": batch["x"]}),
        ),
        (
            "reward_weights: expected the data under 'x' in batch",
            lambda: losses.reward_weights(1.0)(KEY, {"reward": np.zeros(4)}),
        ),
        ("numbers or -inf, got nan in row 2", lambda: weights([0, -np.inf, np.nan, np.inf])),
        ("numbers or -inf, got inf in row 0", lambda: weights([np.inf, 0, 0, 0])),
        (
            "reward_guidance: expected a reward of shape",
            lambda: guidance.reward_guidance(LINE, LINE, 1.0).apply(
                {"velocity": params, "reward": params}, batch["x"], 0.5
            ),
        ),
        (
            "reward_guidance: expected start in",
            lambda: guidance.reward_guidance(LINE, LINE, 1.0, start=1.0),
        ),
    ]:
        with pytest.raises((ValueError, TypeError), match=said):
            call()
