"""Guidance of discrete flows against enumeration: sequences with a known law of their label."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from keys import KEYS, keys_consumed_twice

from jflow import guidance, oracles, paths
from jflow.types import Field

SEQUENCES = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
WEIGHTS = np.array([0.1, 0.4, 0.2, 0.3])
LIKELY = np.array([0.9, 0.2, 0.6, 0.05])  # p(label 1 | sequence)
SOURCES = {"mask": [0.0, 0.0, 1.0], "uniform": [0.5, 0.5]}


def laws(source):
    """The oracles of all data and of those of each label."""
    make = lambda w: oracles.tokens(SEQUENCES, w, source=SOURCES[source])  # noqa: E731
    return make(WEIGHTS), [make(WEIGHTS * (1 - LIKELY)), make(WEIGHTS * LIKELY)]


def predictor(oracle):
    """log p(label | x_t), exactly, of one-hot vectors."""

    def apply(params, x, t, cond=None, *, key=None):
        given = jnp.stack([1 - jnp.asarray(LIKELY), jnp.asarray(LIKELY)])[cond]
        likely = oracle.responsibilities(jnp.argmax(x, -1), t) * given.astype(x.dtype)
        return params * jnp.log(jnp.sum(likely, axis=1))

    return Field(lambda *_: jnp.ones(()), apply)


def states(source):
    size = len(SOURCES[source])
    x = np.array(list(itertools.product(range(size), repeat=2)))
    labels = np.repeat([0, 1], len(x))
    return np.concatenate([x, x]), labels


@pytest.mark.parametrize("source", SOURCES)
def test_rates_with_an_exact_predictor_are_those_of_the_conditional_data(source):
    """At scale 1, for every state and label: from masks those of the flow of the conditional data,
    and always the rates times the ratio, enumerated; at scale 0 they are the rates themselves; a
    scale of time is that number; rows sum to zero."""
    oracle, of_label = laws(source)
    x, labels = states(source)
    rates = paths.jump_rates(oracle.field)
    params = {"rates": {}, "predictor": 1.0}

    @jax.jit
    def run(t, x, labels):
        guided = lambda scale: guidance.predictor_rates(rates, predictor(oracle), scale)  # noqa: E731
        found = [
            guided(s).apply(params, x, t, labels) for s in (1.0, 0.0, 2.0, lambda t: 0 * t + 2)
        ]
        exact = [paths.jump_rates(one.field).apply({}, x, t) for one in of_label]
        return (
            found,
            jnp.where(labels[:, None, None] == 1, exact[1], exact[0]),
            rates.apply({}, x, t),
        )

    @jax.jit
    def log_prob(x, t, labels):
        hot = jax.nn.one_hot(x, len(SOURCES[source]))
        return predictor(oracle).apply(1.0, hot, jnp.full(len(x), t), labels)

    for t in (0.1, 0.7):
        (one, zero, two, in_time), exact, plain = jax.device_get(
            run(np.full(len(x), t, np.float32), x, labels)
        )
        if source == "mask":
            np.testing.assert_allclose(one, exact, rtol=1e-4, atol=1e-5)
        for token, y in itertools.product(range(2), range(one.shape[-1])):
            other = x.copy()
            other[:, token] = y
            ratio = np.exp(log_prob(other, t, labels) - log_prob(x, t, labels))
            expected = plain[:, token, y] * ratio
            off = (x[:, token] != y) & (plain[:, token, y] > 0)
            np.testing.assert_allclose(one[off, token, y], expected[off], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(zero, plain, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(in_time, two, rtol=1e-6)
        np.testing.assert_allclose(np.sum(two, -1), 0, atol=1e-5)
        assert np.abs(one - plain).max() > 0.05 and np.abs(two - one).max() > 0.05


def test_the_first_order_form_is_exact_where_the_predictor_is_linear():
    """And is another one elsewhere, from one evaluation and its gradient."""
    oracle, _ = laws("uniform")
    x, labels = states("uniform")
    rates, t = paths.jump_rates(oracle.field), np.full(len(x), 0.4, np.float32)
    slope, count = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2)), jnp.float32), []

    def linear(params, x, t, cond=None, *, key=None):
        count.append(1)
        return params * jnp.einsum("bnv,nv->b", x, slope) * (cond + 1)

    def bent(params, x, t, cond=None, *, key=None):
        return params * jnp.tanh(linear(params, x, t, cond))

    params = {"rates": {}, "predictor": jnp.float32(1.0)}
    made = [
        form(rates, Field(lambda *_: jnp.ones(()), field), 1.5)
        for field in (linear, bent)
        for form in (guidance.predictor_rates, guidance.taylor_rates)
    ]
    exact, taylor, bent_exact, bent_taylor = jax.device_get(
        jax.jit(lambda x: [one.apply(params, x, t, labels) for one in made])(x)
    )
    np.testing.assert_allclose(taylor, exact, rtol=1e-4, atol=1e-5)
    assert np.abs(bent_taylor - bent_exact).max() > 0.05
    count.clear()
    jax.eval_shape(made[1].apply, params, x, t, labels)
    assert len(count) == 1
    shapes = jax.eval_shape(made[1].init, KEYS[0], x, t, labels)
    assert set(shapes) == {"rates", "predictor"}


def test_classifier_free_guidance_is_of_log_probabilities():
    """Against enumeration; scale 1 is the conditional law; after `unmasking`, too, where known
    tokens and the mask are excluded."""
    oracle, of_label = laws("mask")
    x, labels = states("mask")
    t = np.full(len(x), 0.3, np.float32)

    def apply(params, x, t, cond=None, *, key=None):
        log_p = [one.field.apply({}, x, t) for one in (*of_label, oracle)]
        log_p = jnp.stack([jnp.maximum(p, -30.0) for p in log_p])
        return params * jnp.take_along_axis(log_p, cond[None, :, None, None], axis=0)[0]

    field = Field(lambda *_: jnp.ones(()), apply)
    law = paths.unmasking(field, 2)

    @jax.jit
    def run(x, labels):
        guided = lambda scale: guidance.discrete_cfg(law, scale, null=2).apply(1.0, x, t, labels)  # noqa: E731
        outside = paths.unmasking(guidance.discrete_cfg(field, 3.0, null=2), 2)
        null = law.apply(1.0, x, t, jnp.full_like(labels, 2))
        return (
            *map(guided, (1.0, 3.0, lambda t: 0 * t + 3)),
            outside.apply(1.0, x, t, labels),
            law.apply(1.0, x, t, labels),
            null,
        )

    one, three, in_time, outside, given, free = map(np.exp, jax.device_get(run(x, labels)))
    np.testing.assert_allclose(one, given, atol=1e-6)
    masked = x == 2
    tilted = given[masked][:, :2] ** 3 / free[masked][:, :2] ** 2
    np.testing.assert_allclose(
        three[masked][:, :2], tilted / tilted.sum(-1, keepdims=True), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_array_equal(three[masked][:, 2], 0)
    np.testing.assert_array_equal(three[~masked], np.eye(3)[x[~masked]])
    np.testing.assert_allclose(in_time, three, rtol=1e-6)
    np.testing.assert_allclose(outside, three, atol=1e-5)
    assert np.abs(three - given).max() > 0.1


def test_jumps_by_a_reward_are_those_of_the_tilted_law():
    """The mean over many draws is the law of x1 under independent tokens times the reward,
    enumerated; what the reward excludes does not come; without any good draw it is not used."""
    oracle, _ = laws("mask")
    x = np.array([[2, 2], [0, 2], [2, 1]])
    t, t_next = 0.25, 0.5
    reward = np.array([[1.0, 3.0], [0.2, 0.0]])  # of both tokens
    log_reward = lambda x1, cond: jnp.log(jnp.asarray(reward))[x1[:, 0], x1[:, 1]]  # noqa: E731
    step = guidance.reweighted_jump(oracle.field, log_reward, draws=20_000)
    drawn, mean, std = jax.device_get(jax.jit(lambda key: step({}, x, t, t_next, key))(KEYS[0]))
    p = np.exp(oracle.field.apply({}, x, np.full(3, t)))
    joint = p[:, 0, :2, None] * p[:, 1, None, :2] * reward[None]
    joint = joint / joint.sum((1, 2), keepdims=True)
    tilted = np.zeros_like(p)
    tilted[:, 0, :2], tilted[:, 1, :2] = joint.sum(2), joint.sum(1)
    q = (t_next - t) / (1 - t)
    np.testing.assert_allclose(mean, (1 - q) * np.eye(3)[x] + q * tilted, atol=0.02)
    np.testing.assert_allclose(std, np.sqrt(mean * (1 - mean)), atol=1e-3)
    assert drawn.shape == x.shape and np.issubdtype(drawn.dtype, np.integer)
    none = guidance.reweighted_jump(
        oracle.field, lambda x1, cond: jnp.full(x1.shape[:1], -jnp.inf), draws=4
    )
    assert np.all(np.isfinite(none({}, jnp.asarray(x), t, t_next, KEYS[0])[1]))
    assert not keys_consumed_twice(lambda key: none({}, jnp.asarray(x), t, t_next, key), KEYS[0])


def test_bad_options():
    oracle, _ = laws("uniform")
    rates, x, t = paths.jump_rates(oracle.field), jnp.array([[0, 1]]), jnp.zeros(1)
    wide = Field(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: x[..., 0])
    params = {"rates": {}, "predictor": {}}
    label = jnp.array([1])
    for call, said in [
        (
            lambda: guidance.predictor_rates(rates, predictor(oracle)).apply(params, x, t),
            "predictor_rates: expected cond, what to guide towards, got None",
        ),
        (
            lambda: guidance.taylor_rates(rates, wide).apply(params, x, t, label),
            r"taylor_rates: expected log p\(cond \| x\) of shape \[1\], got \[1, 2\]",
        ),
        (
            lambda: guidance.discrete_cfg(oracle.field, 2.0, null=0).apply({}, x, t),
            "discrete_cfg: expected cond",
        ),
        (
            lambda: guidance.reweighted_jump(oracle.field, lambda x1, cond: x1)(
                {}, x, 0.0, 0.5, KEYS[0]
            ),
            r"reweighted_jump: expected log_reward of shape \[16\], got \[16, 2\]",
        ),
        (
            lambda: guidance.reweighted_jump(oracle.field, lambda x1, cond: x1, draws=0),
            "reweighted_jump: expected draws to be a whole number",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
