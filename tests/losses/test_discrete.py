"""Losses of tokens: the bound against the entropy of the data, what is said twice, and bad data."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.random import clone
from keys import KEYS

import jflow
from jflow import couplings, data, distributions, losses, nets, oracles, paths, solvers, times
from jflow.paths import schedules
from jflow.types import Field

MASK = 2
SEQUENCES = [[0, 0, 1], [0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0]]
WEIGHTS = [0.4, 0.1, 0.2, 0.25, 0.05]
ALL_MASKS, FAIR = [0.0, 0.0, 1.0], [0.5, 0.5]


def net(params, x, t, cond=None, *, key=None):
    """Logits that see all tokens and the time."""
    h = jnp.sin(1.0 + x.astype(float)) + jnp.mean(x, axis=1, keepdims=True)
    t = t[:, None] if t.ndim == 1 else t
    return params * jnp.stack([h, h * t - 1, 0.3 * h], axis=-1)


NET = Field(lambda *_: {}, net)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_from_masks_the_bound_of_the_exact_law_is_the_entropy(power):
    """Both by the loss at uniform times and by `discrete_bound`, for every schedule, within three
    standard errors."""
    schedule = schedules.polynomial(power)
    oracle = oracles.tokens(SEQUENCES, WEIGHTS, source=ALL_MASKS, schedule=schedule)
    source = distributions.tokens((3,), ALL_MASKS)
    loss = losses.chain(
        couplings.with_source(couplings.from_distribution(source)),
        losses.discrete_kl(oracle.field, schedule=schedule),
    )

    @jax.jit
    def run(key):
        row_key, loss_key, bound_key = jax.random.split(key, 3)

        def one(keys):
            return loss({}, keys[1], {"x": oracle.sample(keys[0], 128)})[0]

        values = jax.lax.map(one, jax.random.split(loss_key, (200, 2)))
        x = oracle.sample(row_key, 2000)
        bound = solvers.discrete_bound(
            oracle.field, {}, source, x, bound_key, times=32, schedule=schedule
        )
        return 3 * values, bound

    values, bound = jax.device_get(run(KEYS[0]))
    for nats in (values, -bound.elbo):
        error = nats.std() / math.sqrt(len(nats))
        assert abs(nats.mean() - oracle.entropy) < 3 * error < 0.15
    assert bound.error.shape == (2000,)


def test_from_uniform_tokens_it_is_more_and_the_error_is_that_of_repetitions():
    """An upper bound of the entropy; the standard error of the estimate is what two estimates
    differ by."""
    oracle = oracles.tokens(SEQUENCES, WEIGHTS, source=FAIR)
    source = distributions.tokens((3,), FAIR)

    @jax.jit
    def run(key):
        row_key, one_key, other_key = jax.random.split(key, 3)
        x = oracle.sample(row_key, 2000)
        make = lambda key: solvers.discrete_bound(oracle.field, {}, source, x, key, times=32)  # noqa: E731
        return make(one_key), make(other_key)

    one, other = jax.device_get(run(KEYS[1]))
    error = one.elbo.std() / math.sqrt(2000)
    assert -one.elbo.mean() - oracle.entropy > 5 * error
    spread = (one.elbo - other.elbo) / np.sqrt(one.error**2 + other.error**2)
    assert 0.9 < spread.std() < 1.15


def test_weightings_and_schedules_are_the_same_loss():
    """From masks the divergence is the cross-entropy of masked tokens times kappa' / (1 - kappa);
    at equal kappa schedules differ by kappa' alone: bridges between masked models and flows."""
    law = paths.unmasking(paths.without_time(NET), MASK)
    x = np.array([[0, 1, 1, 0, 1]] * 4)
    batch = {"x": x, "x0": np.full_like(x, MASK)}
    quadratic, t = schedules.polynomial(2.0), 0.6

    @jax.jit
    def run(key):
        def at(make, t, **more):
            return make(law, time=times.fixed([t]), **more)(0.7, clone(key), batch)[0]

        path = paths.discrete(quadratic)
        return (
            at(losses.discrete_kl, t, schedule=quadratic),
            at(losses.discrete_matching, t, path=path),
            at(losses.discrete_kl, t**2),
        )

    kl, cross_entropy, linear = jax.device_get(run(KEYS[0]))
    assert kl > 0
    np.testing.assert_allclose(kl, 2 * t / (1 - t**2) * cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(kl, 2 * t * linear, rtol=1e-5)


def test_times_of_each_token():
    """A token at time 1 is known and has no loss, one at time 0 is masked: any set is given."""
    law = paths.unmasking(NET, MASK)
    x = np.array([[0, 1, 1]])
    batch = {"x": x, "x0": np.full_like(x, MASK)}
    seen = []

    def apply(params, x, t, cond=None, *, key=None):
        seen.append(x)
        return law.apply(params, x, t, cond, key=key)

    given = lambda key, n: jnp.array([[1.0, 0.0, 1.0]])  # noqa: E731
    value, _ = losses.discrete_matching(Field(law.init, apply), time=given)(0.7, KEYS[0], batch)
    np.testing.assert_array_equal(seen[0], [[0, MASK, 1]])
    log_p = law.apply(0.7, jnp.array([[0, MASK, 1]]), jnp.array([[1.0, 0.0, 1.0]]))
    np.testing.assert_allclose(value, -log_p[0, 1, 1] / 3, rtol=1e-6)
    for draw in (times.tokens(2), lambda key, n: jnp.zeros(n + 1)):
        with pytest.raises(ValueError, match="discrete_matching: expected times of shape"):
            losses.discrete_matching(NET, time=draw)(0.7, KEYS[0], batch)


def test_what_is_no_token_is_no_number_and_is_named():
    """Under jit a token outside the vocabulary makes NaN, a mask in the data infinity; loaders say
    where."""
    law = paths.unmasking(NET, MASK)
    run = jax.jit(
        lambda x: losses.discrete_matching(law, time=times.fixed([0.0]))(
            0.7, KEYS[0], {"x": x, "x0": jnp.full_like(x, MASK)}
        )[0]
    )
    assert np.isfinite(run(np.array([[0, 1]])))
    assert run(np.array([[0, MASK]])) == np.inf
    assert np.isnan(run(np.array([[0, 3]]))) and np.isnan(run(np.array([[0, -1]])))
    for call, said in [
        (lambda: data.check_tokens([[0, 5]], 3), r"tokens in 0 ... 2, got 5 at \[0, 1\] \(1 of 2"),
        (
            lambda: data.check_tokens([[0, 2]], 3, mask=2),
            r"without the mask, 2, got it at \[0, 1\]",
        ),
        (lambda: run(np.array([[0.5, 1.0]])), "expected 'x' to hold tokens, integers, got float32"),
        (
            lambda: losses.discrete_matching(NET)(1.0, KEYS[0], {"x": np.array([[0, 1]])}),
            "discrete_matching: expected pairs, 'x0' beside 'x'",
        ),
        (
            lambda: solvers.discrete_bound(
                NET, 1.0, distributions.tokens((2,), FAIR), jnp.array([[0, 1]]), KEYS[0], times=5
            ),
            "discrete_bound: expected an even number of times, got 5",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(TypeError, match="check_tokens: expected integers, got float64"):
        data.check_tokens([0.5], 3)


def test_logits_of_any_network():
    """Of a text and of a grid; 0 at first, so that the loss is log V; gradients reach the params; a
    token outside the vocabulary makes its row NaN."""
    text = nets.TokenLogits(nets.TokenDiT(width=8, num_layers=1, num_heads=1), 3, width=4)
    field = jflow.field(text)
    x = np.array([[0, 1, 0, 1], [1, 1, 0, 0]])
    loss = losses.discrete_matching(field)

    @jax.jit
    def run(key, x):
        params = field.init(KEYS[1], x, jnp.zeros(2))
        moved = jax.tree.map(lambda p: p + 0.1, params)
        value = loss(params, key, {"x": x, "x0": jnp.full_like(x, MASK)})[0]
        slope = jax.grad(lambda p: loss(p, clone(key), {"x": x, "x0": jnp.full_like(x, MASK)})[0])(
            moved
        )
        return value, slope, field.apply(moved, x.at[0, 0].set(3), jnp.zeros(2))

    value, slope, spoilt = jax.device_get(run(KEYS[0], jnp.asarray(x)))
    np.testing.assert_allclose(value, math.log(3), rtol=1e-6)
    assert all(np.all(np.isfinite(g)) and np.any(g != 0) for g in jax.tree.leaves(slope))
    assert np.all(np.isnan(spoilt[0])) and np.all(np.isfinite(spoilt[1]))
    grid = nets.TokenLogits(nets.UNet(channels=8), 5, width=4)
    shapes = jax.eval_shape(
        lambda key, x: grid.init_with_output(key, x, jnp.zeros(2))[0],
        KEYS[0],
        jnp.zeros((2, 4, 4), int),
    )
    assert shapes.shape == (2, 4, 4, 5) and shapes.dtype == np.float32
    with pytest.raises(ValueError, match="TokenLogits: expected x to hold tokens"):
        jax.eval_shape(lambda key: text.init_with_output(key, x * 1.0, jnp.zeros(2)), KEYS[0])
