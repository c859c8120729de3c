"""Shortcut models: a step is two half steps; what is asked of the network and of the average, and
how errors shrink."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact_maps import (
    GAUSSIAN,
    MIXTURE,
    ORACLES,
    at,
    exact_map,
    near_map,
    same_when_repeated,
    standard_scores,
)
from jax.random import clone

import jflow
from jflow import losses, nets, oracles, train
from jflow.losses import shortcut
from jflow.types import FlowMap, Velocity

KEY = jax.random.key(0)
FROZEN = {"ema": {"a": jnp.zeros(()), "b": jnp.zeros(())}, "teacher": {}}


@pytest.mark.parametrize("law", ORACLES)
def test_the_exact_map_has_no_residual(law, x64):
    oracle, exact = ORACLES[law], exact_map(law)
    # two Euler steps of 2^-14 are the map to 1e-4 or so: squared it does not show
    loss = shortcut(near_map(exact), levels=14, every=2, teacher=oracles.as_velocity(oracle))
    batch = {"x": oracle.sample(KEY, 256)}
    run = jax.jit(lambda params: loss(params, KEY, batch, FROZEN)[1])
    assert run(at())["residual"] < 1e-6
    for params in (at(a=0.1), at(b=0.1)):
        assert run(params)["residual"] > 1e-3 and run(params)["self_consistency"] > 1e-3


def test_what_is_left_at_the_exact_map_is_of_first_order_in_the_smallest_step(x64):
    """One row in `levels` is two Euler steps; the others compose exactly, so that levels * residual
    = O(step^2)."""
    batch = {"x": MIXTURE.sample(KEY, 4096), "x0": jax.random.normal(jax.random.key(1), (4096, 2))}
    exact = oracles.as_average_velocity(GAUSSIAN)
    levels = np.arange(4, 9)

    made = [
        shortcut(exact, levels=int(n), every=2, teacher=oracles.as_velocity(GAUSSIAN))
        for n in levels
    ]
    left = jax.jit(
        lambda: [
            f({}, clone(KEY), batch, {"ema": {}, "teacher": {}})[1]["self_consistency"]
            for f in made
        ]
    )()
    order = -np.polyfit(levels, np.log2(np.sqrt(levels * np.asarray(left))), 1)[0]
    assert 0.9 < order < 1.1


@pytest.mark.parametrize("law", ORACLES)
def test_as_published_the_mean_gradient_at_the_exact_map_is_zero(law):
    oracle, exact = ORACLES[law], exact_map(law, 4)
    # the smallest step makes the self-consistency rows exact, so that what is left is the spread of
    # x1 - x0
    loss = shortcut(near_map(exact), levels=18)

    def gradient(key, params):
        data_key, loss_key = jax.random.split(key)
        return jax.grad(
            lambda p: loss(p, loss_key, {"x": oracle.sample(data_key, 500)}, FROZEN)[0]
        )(params)

    scores = standard_scores(gradient)
    assert np.all(np.abs(scores(at())) < 3)
    assert np.abs(scores(at(a=0.1))[0]) > 10 and np.abs(scores(at(b=0.3))[1]) > 10


def test_what_is_asked_of_the_network_and_of_the_average():
    asked = []

    def apply(params, x, t, r, cond=None, *, key=None):
        asked.append([np.asarray(v) for v in (t, r, params["a"])])
        return jnp.zeros_like(x)

    loss = shortcut(FlowMap(lambda *_: {}, apply), levels=3, every=4)
    loss({"a": jnp.asarray(1.0)}, KEY, {"x": jnp.ones((400, 2))}, FROZEN)
    (t1, r1, own1), (t2, r2, own2), (t, r, own) = asked
    assert own1 == own2 == 0 and own == 1  # the average twice, then the params
    rows = np.arange(400) % 4 == 0
    d = (r - t)[rows]
    np.testing.assert_array_equal(r[~rows], t[~rows])
    assert set(d) == {1.0, 0.5, 0.25} and np.all(r <= 1)
    np.testing.assert_array_equal(t[rows] % d, 0)
    for size in (1.0, 0.5, 0.25):  # uniform: 5 standard errors
        assert abs(np.mean(d == size) - 1 / 3) < 5 * np.sqrt(2 / 9 / 100)
        assert len(set(t[rows][d == size])) == 1 / size
    np.testing.assert_array_equal(t1, t[rows])
    np.testing.assert_array_equal(t2, t[rows] + d / 2)
    half = np.where(d == 0.25, 0, d / 2)  # at the smallest size velocities
    np.testing.assert_array_equal(r1 - t1, half)
    np.testing.assert_array_equal(r2 - t2, half)


def test_the_matching_rows_are_flow_matching():
    velocity = Velocity(
        lambda *_: {}, lambda p, x, t, cond=None, *, key=None: p["a"] * jnp.sin(x) + t[:, None]
    )
    model = FlowMap(
        lambda *_: {}, lambda p, x, t, r, cond=None, *, key=None: velocity.apply(p, x, t)
    )
    batch = {"x": GAUSSIAN.sample(KEY, 64)}
    weight = jnp.where(jnp.arange(64) % 4 == 0, 1e-30, 1.0)
    batch = {**batch, "weight": weight}
    found, expected = jax.jit(
        lambda p: [
            f(p, clone(KEY), batch, FROZEN)[0]
            for f in (shortcut(model), losses.flow_matching(velocity))
        ]
    )(at(0.7))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_guidance_enters_at_the_smallest_step_once(x64):
    """Velocities RATE x + cond; steps are those of the guided field RATE x + null + 3 (cond -
    null), at every size."""
    rate, null = 0.8, jnp.asarray([0.5, -1.0])

    def apply(params, x, t, r, cond=None, *, key=None):
        z = rate * (r - t)
        growth = jnp.where(z == 0, 1, jnp.expm1(z) / jnp.where(z == 0, 1, z))[:, None]
        return growth * (
            rate * x + jnp.where((r == t)[:, None], cond, null[None] + 3 * (cond - null[None]))
        )

    field = Velocity(lambda *_: {}, lambda p, x, t, cond=None, *, key=None: rate * x + cond)
    batch = {"x": GAUSSIAN.sample(KEY, 256), "cond": jax.random.normal(jax.random.key(1), (256, 2))}

    def residual(scale):
        model = FlowMap(lambda *_: {}, apply)
        loss = shortcut(model, levels=14, every=2, teacher=field, scale=scale, null=null)
        loss = losses.chain(losses.drop_cond(0.3, null=null), loss)
        return jax.jit(lambda: loss({}, KEY, batch, {"ema": {}, "teacher": {}})[1]["residual"])()

    assert residual(3.0) < 1e-6 and residual(2.0) > 1e-2


def test_conditions_are_dropped_from_matching_rows_alone():
    asked = []

    def apply(params, x, t, r, cond=None, *, key=None):
        asked.append((np.asarray(cond), np.asarray(r - t)))
        return params * x

    loss, dropped = shortcut(FlowMap(lambda *_: {}, apply)), np.isin(np.arange(16), [0, 3, 8, 9])
    batch = {
        "x": jnp.ones((16, 2)),
        "cond": jnp.where(dropped, 99, jnp.arange(16)),
        "dropped": jnp.asarray(dropped),
    }
    own = (np.arange(16) % 4 == 0) & ~dropped
    value, metrics = loss(0.3, KEY, batch, {"ema": 0.9})
    np.testing.assert_array_equal(asked[0][0], np.where(dropped, 99, np.arange(16))[::4])
    cond, gap = asked[2]
    np.testing.assert_array_equal(cond, np.where(dropped, 99, np.arange(16)))
    np.testing.assert_array_equal(gap > 0, own)  # who is told null is asked for the velocity
    # and its target is one: it does not change with the averaged params, which those of the other
    # rows are made of
    alone = {**batch, "weight": 1.0 * dropped}
    assert loss(0.3, KEY, alone, {"ema": 0.9})[0] == loss(0.3, KEY, alone, {"ema": 0.1})[0]
    assert loss(0.3, KEY, batch, {"ema": 0.1})[0] != value and metrics["self_consistency"] > 0


def test_a_tiled_event_has_the_same_loss():
    def apply(params, x, t, r, cond=None, *, key=None):
        return jnp.sin(2 * x + t[:, None]) * (1 + (r - t)[:, None])

    loss = shortcut(FlowMap(lambda *_: {}, apply))
    x0 = jax.random.normal(jax.random.key(1), (64, 2))
    same_when_repeated(loss, {}, x0, GAUSSIAN.sample(KEY, 64), FROZEN, rtol=1e-5)


def test_a_step_of_training_moves_every_param_and_nothing_frozen():
    model = jflow.flow_map(nets.ResidualMLP(8, 1, num_classes=3))
    teacher = Velocity(lambda *_: {}, lambda p, x, t, cond=None, *, key=None: p["s"] * x)
    batch = {
        "x": GAUSSIAN.sample(KEY, 30),
        "cond": jnp.arange(30) % 3,
    }  # 30: not a multiple of every
    loss = losses.chain(
        losses.drop_cond(0.2, null=3), shortcut(model, teacher=teacher, scale=2.0, null=3)
    )
    shapes = jax.eval_shape(
        model.init, KEY, batch["x"], jnp.zeros(30), jnp.zeros(30), batch["cond"]
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(0.5 * rng.normal(size=p.shape), p.dtype), shapes)
    frozen = {"teacher": {"s": jnp.asarray(0.5)}}
    state = train.init_state(params, optax.sgd(1.0), KEY, ema=0.9, frozen=frozen)
    new, metrics = jax.jit(train.make_step(loss, optax.sgd(1.0), ema=0.9))(state, batch)
    for (path, old), moved in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(new.params), strict=True
    ):
        assert np.all(np.isfinite(moved)) and np.any(moved != old), jax.tree_util.keystr(path)
    assert set(metrics) == {"residual", "self_consistency", "loss", "grad_norm"}
    small = shortcut(
        FlowMap(lambda *_: {}, lambda p, x, t, r, cond=None, *, key=None: p["a"] * x),
        teacher=teacher,
    )
    g = jax.jit(jax.grad(lambda f: small(at(0.1), KEY, {"x": batch["x"]}, f)[0]))(
        {**frozen, "ema": at(0.2)}
    )
    assert all(leaf == 0 for leaf in jax.tree.leaves(g))


def test_bad_input():
    model, batch = oracles.as_average_velocity(GAUSSIAN), {"x": GAUSSIAN.sample(KEY, 8)}
    for options, said in (
        ({"levels": 0}, "levels to be a whole number of at least 1"),
        ({"every": 1}, "every to be a whole number of at least 2"),
        ({"every": 2.5}, "every to be a whole number"),
        ({"scale": float("nan")}, "finite scale"),
        ({"scale": 2.0}, "needs null"),
    ):
        with pytest.raises(ValueError, match=said):
            shortcut(model, **options)
    with pytest.raises(ValueError, match="'cond' in batch"):
        shortcut(model, scale=2.0, null=3)({}, KEY, batch, FROZEN)
    with pytest.raises(ValueError, match="'ema' in frozen"):
        shortcut(model)({}, KEY, batch)
    with pytest.raises(ValueError, match="'teacher' in frozen"):
        shortcut(model, teacher=oracles.as_velocity(GAUSSIAN))({}, KEY, batch, {"ema": {}})
    with pytest.raises(ValueError, match=r"shortcut: expected a velocity shaped like x"):
        flat = FlowMap(lambda *_: {}, lambda p, x, t, r, cond=None, *, key=None: x[:, :1])
        shortcut(flat)({}, KEY, batch, FROZEN)
