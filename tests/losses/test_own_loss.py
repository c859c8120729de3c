"""Losses of one's own, made of public pieces alone, keep the promises of the package: rows of
weight 0 are not there, 'dropped' is accepted, a key is consumed once, and a tiled event has the
same loss.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from keys import KEYS, keys_consumed_twice

from jflow import distributions, losses, paths, times
from jflow.types import FlowMap, Velocity

# From here
LINE, PAIRS = paths.linear(), times.pairs(equal=0.5)


def own_loss(flow_map, velocity):
    """A flow map learns a teacher's velocity; rows count by how much of the way is left to them."""

    def loss(params, key, batch, frozen=None):
        pairs = losses.draw_pairs("own_loss", key, batch, PAIRS)
        (t, r), cond = pairs.t, pairs.cond
        x = LINE.point(pairs.x0, pairs.x1, t)
        v = velocity.apply(losses.frozen_entry("own_loss", frozen, "teacher"), x, t, cond)
        g, residual = losses.flow_map_residual(
            "own_loss", flow_map, params, x, t, r, v, cond, key=pairs.dropout_key
        )
        error = (1 - t) * losses.mean_event(jnp.abs(g))
        exact = losses.mean_event(jnp.square(residual))
        metrics = {"residual": losses.mean_of_rows(exact, pairs.weight)}
        return losses.mean_of_rows(error, pairs.weight), metrics

    return loss


# to here it stands in docs/pages/extending.md.


def own_likelihood(distribution):
    """A loss that regresses on no pairs reads its batch itself."""

    def loss(params, key, batch, frozen=None):
        x, cond, weight = losses.read_batch("own_likelihood", batch, ("x", "cond", "weight"))
        return losses.mean_of_rows(-distribution.log_prob({}, params * x, cond), weight), {}

    return loss


def dropout(x, key):
    return x if key is None else x * jax.random.bernoulli(key, 0.9, x.shape)


MAP = FlowMap(
    lambda *args: 1.0,
    lambda p, x, t, r, cond=None, *, key=None: dropout(p * jnp.sin(x) + (t * r)[:, None], key),
)
TEACHER = Velocity(
    lambda *args: 1.0, lambda p, x, t, cond=None, *, key=None: p * jnp.cos(x) * t[:, None]
)
OWN = {
    "own_loss": (own_loss(MAP, TEACHER), ("x", "x0", "weight")),
    "own_likelihood": (own_likelihood(distributions.normal((2,))), ("x", "weight")),
}
X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)
BATCH = {"x": X, "x0": X[::-1] / 2, "weight": np.array([1, 2, 0], np.float32)}
FROZEN = {"teacher": 0.5}


def of(name):
    """The loss, jitted with its gradient, and a batch for it."""
    loss, allowed = OWN[name]
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda batch, key=KEYS[0]: run(0.7, key, batch, FROZEN), {k: BATCH[k] for k in allowed}


@pytest.mark.parametrize("name", OWN)
def test_rows_of_weight_zero_and_dropped_rows(name):
    run, batch = of(name)
    expected = run(batch)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(expected))
    spoilt = {k: np.array(v) for k, v in batch.items()}
    for k in spoilt.keys() - {"weight"}:
        spoilt[k][2] = np.nan
    jax.tree.map(np.testing.assert_array_equal, run(spoilt), expected)
    dropped = {**batch, "dropped": np.array([True, False, True])}
    jax.tree.map(np.testing.assert_array_equal, run(dropped), expected)
    with pytest.raises(ValueError, match=f"{name}: unknown keys in batch"):
        run({**batch, "y": X})


@pytest.mark.parametrize("name", OWN)
def test_a_key_is_consumed_once(name):
    loss, allowed = OWN[name]
    batch = {k: BATCH[k] for k in allowed if k != "x0"}
    assert keys_consumed_twice(lambda key: loss(0.7, key, batch, FROZEN), KEYS[0]) == []


def test_a_tiled_event_has_the_same_loss():
    plain = FlowMap(MAP.init, lambda *args, key=None: MAP.apply(*args))
    loss = own_loss(plain, TEACHER)
    tiled = {k: v if k == "weight" else np.tile(v, (1, 2)) for k, v in BATCH.items()}
    one, two = (
        jax.jit(jax.value_and_grad(loss, has_aux=True))(0.7, KEYS[0], batch, FROZEN)
        for batch in (BATCH, tiled)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, two)


def test_what_is_missing_is_named():
    loss, _ = OWN["own_loss"]
    with pytest.raises(ValueError, match="own_loss is stochastic: it needs a key"):
        loss(0.7, None, BATCH, FROZEN)
    with pytest.raises(ValueError, match="own_loss: expected 'teacher' in frozen"):
        loss(0.7, KEYS[0], BATCH)


def test_it_goes_into_a_chain():
    chained = losses.chain(losses.drop_cond(0.5, null=7.0), OWN["own_loss"][0])
    value, metrics = jax.jit(chained)(0.7, KEYS[0], {**BATCH, "cond": np.arange(3.0)}, FROZEN)
    assert np.isfinite(value) and set(metrics) == {"residual"}
