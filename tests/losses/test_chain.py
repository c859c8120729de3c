"""Batch transforms in front of a loss: their order, their keys, what is refused, and what a
coupling does there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.random import clone

from jflow import couplings, losses, times, train
from jflow.types import FlowMap, Velocity

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (8, 2))
X0 = jax.random.normal(jax.random.key(2), (8, 2))
CONDITIONED = Velocity(
    None,
    lambda params, x, t, cond=None, *, key=None: (
        params * x + t[:, None] + jnp.sin(1.0 * cond)[:, None]
    ),
)
MAP = FlowMap(
    None,
    lambda params, x, t, r, cond=None, *, key=None: (
        CONDITIONED.apply(params, x, t, cond) + (r - t)[:, None] * x
    ),
)


def seen(params, key, batch, frozen=None):
    """A loss whose metrics are what it was given."""
    return jnp.zeros(()), {"params": params, "key": key, "batch": batch, "frozen": frozen}


def noted(name, notes):
    def transform(key, batch, frozen=None):
        notes.append((name, key, frozen))
        return {**batch, name: len(notes)}

    return transform


def test_transforms_run_in_order_with_keys_of_their_own():
    notes, frozen = [], {"ema": 1.0}
    loss = losses.chain(noted("one", notes), noted("two", notes), seen)
    _, got = loss(0.5, KEY, {"x": X}, frozen)
    assert [name for name, _, _ in notes] == ["one", "two"]
    assert got["batch"]["one"] == 1 and got["batch"]["two"] == 2 and got["params"] == 0.5
    assert all(told is frozen for _, _, told in notes) and got["frozen"] is frozen
    keys = [key for _, key, _ in notes] + [got["key"]]
    np.testing.assert_array_equal(
        jax.random.key_data(jnp.stack(keys)), jax.random.key_data(jax.random.split(KEY, 3))
    )
    # a chain is a Loss, and without a key a deterministic loss stays deterministic
    _, got = losses.chain(noted("zero", notes), loss)({}, None, {"x": X})
    assert got["key"] is None and [name for name, _, _ in notes[2:]] == ["zero", "one", "two"]


def bare(params, key, batch, frozen=None):
    return jnp.zeros(()), {}


MATCHING = losses.flow_matching(CONDITIONED)
DROP = losses.drop_cond(0.1, null=0)
MISUSE = {
    "expected batch transforms and, as the last argument, a Loss, got nothing": lambda: (
        losses.chain()
    ),
    r"expected the last argument to be a Loss, \(params, .*"
    r"got a function of \(key, batch, frozen=None\), a BatchTr": lambda: losses.chain(
        couplings.pair(couplings.independent()), DROP
    ),
    r"expected argument 0 to be a BatchTransform, .*"
    r"got a function of \(params, key, batch, .*, a Loss: it comes last": lambda: losses.chain(
        MATCHING, DROP
    ),
    r"expected argument 1 to be a BatchTransform, .*, a Loss: it comes last": lambda: losses.chain(
        DROP, bare, MATCHING
    ),
    r"expected argument 0 .*got a function of \(key, x0, x1, cond=None\), "
    r"a Coupling: couplings.pair\(coupling\) makes": lambda: losses.chain(
        couplings.optimal_transport(), MATCHING
    ),
    "expected the last argument to be a Loss, .*, a Coupling: couplings.pair": lambda: losses.chain(
        DROP, couplings.optimal_transport()
    ),
    "expected argument 0 .*got the function drop_cond: give what a call of it returns": (
        lambda: losses.chain(losses.drop_cond, MATCHING)
    ),
    "expected argument 0 .*got the function fresh_source: give what a call": lambda: losses.chain(
        losses.fresh_source, MATCHING
    ),
    "expected the last argument .*got the function flow_matching: give what": lambda: losses.chain(
        DROP, losses.flow_matching
    ),
    "expected argument 0 .*got a list: give them one by one": lambda: losses.chain(
        [DROP], MATCHING
    ),
    "expected the last argument to be a Loss, .*got a Velocity": lambda: losses.chain(
        DROP, CONDITIONED
    ),
    "pair: expected a Coupling, .*got the function optimal_transport: give what a call": (
        lambda: couplings.pair(couplings.optimal_transport)
    ),
    "pair: expected a Coupling, .*got None": lambda: couplings.pair(None),
    "chain, after argument 1: expected the batch to be a dict such as .*, got None": (
        lambda: losses.chain(DROP, lambda key, batch, frozen=None: None, MATCHING)(
            0.5, KEY, {"x": X, "cond": X[:, 0]}
        )
    ),
}


@pytest.mark.parametrize("message", MISUSE)
def test_misuse_is_named(message):
    with pytest.raises(TypeError, match=message):
        MISUSE[message]()


def test_functions_of_any_arguments_are_taken_at_their_word():
    loss = losses.chain(
        lambda *args: {**args[1], "x": 2 * X}, lambda *args: (jnp.sum(args[2]["x"]), {})
    )
    assert loss({}, KEY, {"x": X})[0] == jnp.sum(2 * X)


def test_what_pairs_comes_before_drop_cond():
    pair = couplings.pair(couplings.independent())
    batch = {"x": X, "cond": jnp.arange(8)}
    with pytest.raises(
        ValueError, match="pair: conditions were dropped before .*put losses.drop_cond after"
    ):
        losses.chain(DROP, pair, MATCHING)(0.5, KEY, batch)
    with pytest.raises(
        ValueError, match="with_source: conditions were dropped before .*put losses.drop_cond after"
    ):
        losses.chain(DROP, couplings.with_source(couplings.corrupted(jnp.sin, 0.1)), MATCHING)(
            0.5, KEY, batch
        )
    with pytest.raises(ValueError, match=r"pair: unknown keys in batch: \['paired'\]"):
        losses.chain(pair, losses.fresh_source(), MATCHING)(
            0.5, KEY, {**batch, "x0": X, "paired": batch["cond"] > 3}
        )
    for bad in (jnp.ones(8), jnp.ones(7, bool)):
        with pytest.raises(
            ValueError, match=r"flow_matching: expected 'dropped' of shape \[8\] and type bool"
        ):
            MATCHING(0.5, KEY, {**batch, "dropped": bad})


LOSSES = {
    "flow_matching": MATCHING,
    "mean_flow": losses.mean_flow(MAP, times=times.pairs(equal=0.5), omega=1.5, kappa=0.2, null=7),
    "shortcut": losses.shortcut(MAP),
    "velocity_matching": losses.velocity_matching(CONDITIONED),
}


@pytest.mark.parametrize("name", LOSSES)
def test_dropped_is_null(name):
    """All rows dropped are all rows told null, and none dropped leaves the batch as it was; twice
    dropped adds up."""
    loss, frozen = LOSSES[name], {"ema": 0.4}
    batch = {"x": X, "x0": X0, "cond": jnp.arange(8)}

    @jax.jit
    def run():
        values = []
        loss_key = jax.random.split(clone(KEY))[1]  # that of a chain of one transform
        for p, cond in ((0.0, batch["cond"]), (1.0, jnp.full(8, 7))):
            one = losses.chain(losses.drop_cond(p, null=7), loss)(0.3, clone(KEY), batch, frozen)[0]
            told = {**batch, "cond": cond, "dropped": jnp.full(8, p == 1)}
            values.append((one, loss(0.3, clone(loss_key), told, frozen)[0]))
        return values

    (kept, plain), (dropped, null) = run()
    assert kept == plain and dropped == null and abs(kept - dropped) > 1e-3


def test_dropping_twice_adds_up():
    cond = jnp.arange(1, 4001)
    twice = losses.chain(losses.drop_cond(0.5, null=0), losses.drop_cond(0.5, null=0), seen)
    _, got = twice({}, KEY, {"x": cond[:, None] / 1.0, "cond": cond})
    np.testing.assert_array_equal(got["batch"]["dropped"], got["batch"]["cond"] == 0)
    # 4 standard errors of a frequency
    np.testing.assert_allclose(
        got["batch"]["dropped"].mean(), 0.75, atol=4 * np.sqrt(0.75 * 0.25 / 4000)
    )


def test_a_pair_draws_its_source_and_takes_cond_and_weight_along():
    i, j = jnp.asarray([1, 1, 0]), jnp.asarray([2, 0, 1])
    x = X[:3].astype(jnp.bfloat16)
    batch = {
        "x": x,
        "cond": {"label": jnp.arange(3), "all": jnp.ones((1, 2))},
        "weight": jnp.arange(1.0, 4),
    }
    shown = []

    def coupling(key, x0, x1, cond=None):
        shown.append((x0, x1, cond))
        return i, j

    made = couplings.pair(coupling)(KEY, batch)
    assert set(made) == {"x", "x0", "cond", "weight"} and made["x0"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(made["x"], x[j])
    np.testing.assert_array_equal(made["x0"], shown[0][0][i])
    np.testing.assert_array_equal(made["cond"]["label"], j)
    assert made["cond"]["all"].shape == (3, 2)
    np.testing.assert_array_equal(made["weight"], batch["weight"][j])
    noise = couplings.pair(couplings.independent())(KEY, {"x": jnp.ones((4096, 1))})
    assert set(noise) == {"x", "x0"}
    # mean and variance of a standard normal, 4 standard errors
    np.testing.assert_allclose(
        [noise["x0"].mean(), noise["x0"].var()], [0, 1], atol=4 * np.sqrt(2 / 4096)
    )


def test_transport_of_weighted_pairs_in_two_parts():
    """accumulate=2: each part is paired within itself, and counts by the sum of its weights."""
    coupling, velocity = (
        couplings.optimal_transport(),
        Velocity(None, lambda p, x, t, cond=None, *, key=None: p * x),
    )
    matching = losses.flow_matching(velocity, time=lambda key, n: jnp.full(n, 0.5))
    batch = {"x": X, "x0": X0, "weight": jnp.asarray([1.0, 2.0, 0.5, 0.0, 3.0, 1.0, 1.5, 2.0])}
    optimizer = optax.sgd(1.0)

    def moved(loss, accumulate, batch):
        step = jax.jit(train.make_step(loss, optimizer, accumulate=accumulate))
        state, metrics = step(train.init_state(jnp.asarray(0.3), optimizer, KEY), batch)
        return np.asarray([metrics["loss"], state.params])

    def paired(batch):
        i, j = coupling(KEY, batch["x0"], batch["x"])
        return {"x0": batch["x0"][i], "x": batch["x"][j], "weight": batch["weight"][j]}

    found = moved(losses.chain(couplings.pair(coupling), matching), 2, batch)
    parts = [paired(jax.tree.map(lambda a, k=k: a[k::2], batch)) for k in (0, 1)]
    by_hand = jax.tree.map(
        lambda *a: jnp.concatenate(a), *parts
    )  # the weighted mean over rows that are paired already
    np.testing.assert_allclose(found, moved(matching, 1, by_hand), rtol=1e-6)
    assert np.all(np.abs(found - moved(matching, 1, batch)) > 1e-2)
    assert np.all(
        np.abs(found - moved(matching, 1, paired(batch))) > 1e-4
    )  # and of the whole batch, another pairing


def test_one_trace_for_two_calls():
    traces = []

    def apply(params, x, t, cond=None, *, key=None):
        traces.append(1)
        return x

    loss = losses.flow_matching(Velocity(None, apply))
    run = jax.jit(losses.chain(couplings.pair(couplings.sinkhorn()), losses.noised(0.1), loss))
    run({}, KEY, {"x": X})
    run({}, jax.random.key(1), {"x": X0})
    assert len(traces) == 1
