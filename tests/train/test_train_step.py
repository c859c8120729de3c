"""init_state, make_step and ema: one update against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compiled_again

from jflow import train
from jflow.train import ema


def quadratic(params, key, batch, frozen=None):
    """mean (w - x)^2 over rows: gradient 2 (w - mean x)."""
    loss = jnp.mean((params["w"] - batch["x"]) ** 2)
    return loss, {"noise": jax.random.normal(key)}


BATCH = {"x": np.array([1.0, 2.0, 6.0], np.float32)}  # mean 3


def start(optimizer, **options):
    return train.init_state({"w": jnp.float32(1.0)}, optimizer, jax.random.key(5), **options)


def test_one_sgd_step_is_the_closed_form():
    step = train.make_step(quadratic, optax.sgd(0.25))
    state, metrics = step(start(optax.sgd(0.25)), BATCH)
    assert float(state.params["w"]) == 2.0  # 1 - 0.25 * 2 (1 - 3)
    assert float(metrics["grad_norm"]) == 4.0
    assert float(metrics["loss"]) == pytest.approx((0 + 1 + 25) / 3, rel=1e-6)  # float32
    assert state.step == 1 and state.step.dtype == jnp.int32


def test_key_of_a_step_is_folded_from_the_step_count():
    step, state = train.make_step(quadratic, optax.sgd(0.1)), start(optax.sgd(0.1))
    for n in range(3):
        state, metrics = step(state, BATCH)
        assert metrics["noise"] == jax.random.normal(jax.random.fold_in(jax.random.key(5), n))
    assert state.key == jax.random.key(5)


@pytest.mark.parametrize("decay", [0.75, lambda step: 0.5 + 0.1 * step])
def test_ema_is_the_weighted_sum_of_all_params(decay):
    at = decay if callable(decay) else lambda step: decay
    step, state = (
        train.make_step(quadratic, optax.sgd(0.25), ema=decay),
        start(optax.sgd(0.25), ema=decay),
    )
    expected = 1.0
    for n in range(4):
        state, _ = step(state, BATCH)
        w = 3 - 2 * 0.5 ** (n + 1)  # the error halves with every step
        expected = at(n) * expected + (1 - at(n)) * w
        assert float(state.params["w"]) == pytest.approx(w, rel=1e-6)
        assert float(state.ema["w"]) == pytest.approx(expected, rel=1e-6)  # float32


def test_warmup_forgets_the_start_and_ends_at_the_decay():
    decay = ema.warmup(0.9)
    np.testing.assert_allclose([decay(0), decay(8), decay(1000)], [0.1, 0.5, 0.9], rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1, True, "0.9", float("nan")])
def test_bad_decay_is_an_error_at_construction(decay):
    for make in (ema.warmup, lambda d: train.make_step(quadratic, optax.sgd(0.1), ema=d)):
        with pytest.raises(ValueError, match=r"decay in \(0, 1\)"):
            make(decay)
    with pytest.raises(ValueError, match=r"decay in \(0, 1\)"):
        start(optax.sgd(0.1), ema=decay)


def test_ema_of_bfloat16_params_moves_by_less_than_they_can():
    """The params jump from 1 to 2 and the average goes up by 2^-12 of what is left, where bfloat16
    has 2^-7 at 1."""
    params, hold = {"w": jnp.ones(2, jnp.bfloat16), "count": jnp.int32(3)}, optax.set_to_zero()
    average = ema.start(params)
    assert (average["w"].dtype, average["count"].dtype) == (jnp.float32, jnp.int32)
    assert train.init_state(params, hold, jax.random.key(0), ema=0.9).ema["w"].dtype == jnp.float32
    with jax.numpy_dtype_promotion("strict"):
        for _ in range(3):
            average = ema.update(
                average, {"w": jnp.full(2, 2, jnp.bfloat16), "count": jnp.int32(3)}, 1 - 2.0**-12
            )
    np.testing.assert_allclose(average["w"], 2 - (1 - 2.0**-12) ** 3, rtol=1e-6)


def test_ema_of_step_and_state_must_agree():
    with pytest.raises(ValueError, match="the state holds no average"):
        train.make_step(quadratic, optax.sgd(0.1), ema=0.9)(start(optax.sgd(0.1)), BATCH)
    with pytest.raises(ValueError, match="the step has no ema"):
        train.make_step(quadratic, optax.sgd(0.1))(start(optax.sgd(0.1), ema=0.9), BATCH)


def test_loss_reads_frozen_and_the_average_and_neither_is_differentiated():
    def loss(params, key, batch, frozen):
        assert sorted(frozen) == ["ema", "teacher"]
        factor = frozen["teacher"]["w"] * frozen["ema"]["w"]
        return params["w"] * factor, {}

    optimizer = optax.sgd(1.0)
    state = start(optimizer, ema=0.5, frozen={"teacher": {"w": jnp.float32(3.0)}})
    state, metrics = train.make_step(loss, optimizer, ema=0.5)(state, {})
    assert float(metrics["grad_norm"]) == 3.0  # teacher * average, with the average still at 1
    assert float(state.params["w"]) == -2.0 and float(state.frozen["teacher"]["w"]) == 3.0


def test_frozen_is_passed_as_it_was_given():
    seen = []

    def loss(params, key, batch, frozen):
        seen.append(frozen)
        return params["w"] ** 2, {}

    train.make_step(loss, optax.sgd(0.1))(start(optax.sgd(0.1)), {})
    assert seen == [None]
    with pytest.raises(ValueError, match="'ema'"):
        start(optax.sgd(0.1), ema=0.9, frozen={"ema": {}})


def test_refresh_sees_the_new_params_and_a_key_apart_from_the_loss():
    def refresh(params, frozen, key, batch):
        return {
            "count": frozen["count"] + 1,
            "target": params["w"],
            "noise": jax.random.normal(key),
        }

    frozen = {"count": jnp.int32(0), "target": jnp.float32(0), "noise": jnp.float32(0)}
    step = jax.jit(train.make_step(quadratic, optax.sgd(0.25), refresh=refresh))
    state, metrics = step(start(optax.sgd(0.25), frozen=frozen), BATCH)
    assert int(state.frozen["count"]) == 1 and float(state.frozen["target"]) == 2.0
    assert state.frozen["noise"] != metrics["noise"]
    changed = train.make_step(
        quadratic, optax.sgd(0.25), refresh=lambda p, f, k, b: {"count": f["count"]}
    )
    with pytest.raises(
        ValueError, match="refresh must keep the form of frozen: expected .*'target'"
    ):
        changed(start(optax.sgd(0.25), frozen=frozen), BATCH)


def test_state_copies_all_it_is_given_so_donation_takes_nothing_else():
    params = {"w": jnp.ones((3,)), "b": jnp.asarray(0.5)}  # the second is weakly typed

    def loss(params, key, batch, frozen):
        return jnp.sum(params["w"] * batch["x"]) + params["b"] * frozen["teacher"]["b"], {}

    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    key, traces = jax.random.key(0), []

    def counted(params, key, batch, frozen):
        traces.append(1)
        return loss(params, key, batch, frozen)

    state = train.init_state(
        params, optimizer, key, ema=0.9, frozen={"teacher": params, "again": params}
    )
    step = jax.jit(train.make_step(counted, optimizer, ema=0.9), donate_argnums=0)

    def advance():
        nonlocal state
        before, (state, _) = state, step(state, BATCH)
        assert before.params["w"].is_deleted()

    assert not compiled_again(advance=advance) and len(traces) == 1
    advance()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, key)))
    np.testing.assert_array_equal(state.frozen["again"]["w"], params["w"])


def test_old_style_key_is_refused():
    with pytest.raises(TypeError, match=r"jax\.random\.key"):
        train.init_state({}, optax.sgd(0.1), jnp.zeros(2, jnp.uint32))


def test_optimizer_that_reads_the_loss_gets_it():
    optimizer = optax.chain(
        optax.sgd(0.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1, accumulation_size=1)
    )
    step, state = jax.jit(train.make_step(quadratic, optimizer)), start(optimizer)
    for _ in range(6):
        state, _ = step(state, BATCH)
    assert float(state.opt_state[1].scale) < 1.0  # the loss did not fall: only its value can tell


def test_axis_name_averages_over_shards_and_tells_them_apart():
    optimizer = optax.sgd(0.25)
    step = train.make_step(quadratic, optimizer, axis_name="shard")
    stacked = train.stack_for_pmap(start(optimizer), 3)
    rows = {"x": BATCH["x"][:, None]}
    state, metrics = jax.vmap(step, axis_name="shard")(stacked, rows)
    np.testing.assert_allclose(state.params["w"], [2.0] * 3, rtol=1e-6)
    key = jax.random.fold_in(jax.random.key(5), 0)
    noise = np.mean([jax.random.normal(jax.random.fold_in(key, i)) for i in range(3)])
    np.testing.assert_allclose(metrics["noise"], [noise] * 3, rtol=1e-6)


def rows_loss(params, key, batch, frozen=None):
    """A mean over rows of a function that is not linear in the params, with a metric."""
    error = jnp.tanh(batch["x"] @ params["w"]) - batch["y"]
    return jnp.mean(error**2), {"error": jnp.mean(error), "noise": jax.random.normal(key)}


ROWS = {
    "x": np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32),
    "y": np.arange(12, dtype=np.float32) / 12,
}


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts):
    optimizer = optax.adam(0.1)
    start = train.init_state({"w": jnp.ones(3)}, optimizer, jax.random.key(5), ema=0.9)
    ends = []
    for accumulate in (1, parts):
        step, state = (
            jax.jit(train.make_step(rows_loss, optimizer, ema=0.9, accumulate=accumulate)),
            start,
        )
        for _ in range(3):
            state, metrics = step(state, ROWS)
        assert int(state.step) == 3 and int(state.opt_state[0].count) == 3  # one step is one update
        ends.append(
            (state.params, state.ema, {k: metrics[k] for k in ("loss", "error", "grad_norm")})
        )
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)  # float32: sums in another order


def test_parts_have_keys_of_their_own_and_metrics_are_averaged():
    step = train.make_step(rows_loss, optax.sgd(0.1), accumulate=3)
    state = train.init_state({"w": jnp.ones(3)}, optax.sgd(0.1), jax.random.key(5))
    _, metrics = step(state, ROWS)
    key = jax.random.fold_in(jax.random.key(5), 0)
    noise = [float(jax.random.normal(jax.random.fold_in(key, i))) for i in range(3)]
    assert len(set(noise)) == 3 and float(metrics["noise"]) == pytest.approx(
        np.mean(noise), rel=1e-5
    )


def test_accumulation_averages_over_shards_too():
    optimizer = optax.sgd(0.1)
    start = train.init_state({"w": jnp.ones(3)}, optimizer, jax.random.key(5))
    whole, _ = train.make_step(rows_loss, optimizer)(start, ROWS)
    step = train.make_step(rows_loss, optimizer, axis_name="shard", accumulate=2)
    rows = jax.tree.map(lambda x: x.reshape(3, 4, *x.shape[1:]), ROWS)
    state, _ = jax.vmap(step, axis_name="shard")(train.stack_for_pmap(start, 3), rows)
    np.testing.assert_allclose(state.params["w"], [whole.params["w"]] * 3, rtol=1e-5)


def test_parts_that_do_not_divide_the_batch():
    state = train.init_state({"w": jnp.ones(3)}, optax.sgd(0.1), jax.random.key(5))
    with pytest.raises(
        ValueError, match=r"accumulate=5 does not divide the batch: 'x' has the shape \[12, 3\]"
    ):
        train.make_step(rows_loss, optax.sgd(0.1), accumulate=5)(state, ROWS)
    for bad in (0, 1.5, True):
        with pytest.raises(ValueError, match="accumulate to be a whole number of at least 1"):
            train.make_step(rows_loss, optax.sgd(0.1), accumulate=bad)


def weighted_loss(params, key, batch, frozen=None):
    """The weighted mean of `rows_loss`'s rows: 0 / 0 without weight."""
    error, w = (jnp.tanh(batch["x"] @ params["w"]) - batch["y"]) ** 2, batch["weight"]
    mean = jnp.sum(w * error) / jnp.sum(w)
    return mean, {"error": mean}


def in_parts(x):
    """[b, ...] -> [3, b / 3, ...] as accumulate=3 cuts rows."""
    return x.reshape(len(x) // 3, 3, *x.shape[1:]).swapaxes(0, 1)


@pytest.mark.parametrize("weights", [[3, 1, 0.5], [2, 0, 1], [0, 0, 0]], ids=str)
def test_parts_and_shards_count_by_their_weight(weights):
    """They give the update of the whole batch; a part without weight has nothing to say, and three
    of them make no update."""
    optimizer = optax.sgd(0.1)
    start = train.init_state({"w": jnp.ones(3)}, optimizer, jax.random.key(5))
    weight = np.array([1, 2, 0, 1], np.float32)[:, None] * np.array(weights, np.float32)[None]
    batch = ROWS | {"weight": weight.reshape(12)}
    parts, metrics = jax.jit(train.make_step(weighted_loss, optimizer, accumulate=3))(start, batch)
    mapped = jax.vmap(
        train.make_step(weighted_loss, optimizer, axis_name="shard"), axis_name="shard"
    )
    shards = jax.jit(mapped)(train.stack_for_pmap(start, 3), jax.tree.map(in_parts, batch))
    shards, shard_metrics = jax.tree.map(lambda x: x[0], (shards[0].params, shards[1]))
    value, slope = 0.0, {"w": np.zeros(3)}
    if any(weights):
        value, slope = jax.value_and_grad(lambda p: weighted_loss(p, None, batch)[0])(start.params)
    for params, found in ((parts.params, metrics), (shards, shard_metrics)):
        np.testing.assert_allclose(params["w"], 1 - 0.1 * slope["w"], rtol=1e-5)
        np.testing.assert_allclose([found["loss"], found["error"]], [value, value], rtol=1e-5)
        np.testing.assert_allclose(found["grad_norm"], np.linalg.norm(slope["w"]), rtol=1e-5)


def test_what_refresh_changed_is_averaged_by_weight():
    def refresh(params, frozen, key, batch):
        return {"mean": jnp.mean(batch["y"])}

    optimizer = optax.sgd(0.1)
    start = train.init_state(
        {"w": jnp.ones(3)}, optimizer, jax.random.key(5), frozen={"mean": jnp.float32(7)}
    )
    step = jax.vmap(
        train.make_step(weighted_loss, optimizer, refresh=refresh, axis_name="shard"),
        axis_name="shard",
    )
    y = np.where(np.arange(12) < 8, ROWS["y"], np.nan).reshape(3, 4)
    step = jax.jit(step)
    for weight, expected in (([1, 3, 0], (y[0].mean() + 3 * y[1].mean()) / 4), ([0, 0, 0], 7)):
        batch = {
            "x": ROWS["x"].reshape(3, 4, 3),
            "y": y,
            "weight": np.repeat(np.float32(weight)[:, None], 4, 1),
        }
        state, _ = step(train.stack_for_pmap(start, 3), batch)
        np.testing.assert_allclose(state.frozen["mean"], [expected] * 3, rtol=1e-6)


def quartic(params, key, batch, frozen):
    """(w^2 - mean x)^2, least at w = sqrt(mean x), times what is frozen."""
    return frozen["scale"] * (jnp.square(params["w"]) - jnp.mean(batch["x"])) ** 2, {}


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"axis_name": "shard"}], ids=str)
def test_optimizers_that_search_along_a_line(options):
    """They are given the loss as a function of params, whose gradient is that of all parts and
    shards."""
    search = optax.scale_by_backtracking_linesearch(10, store_grad=True)
    for optimizer in (optax.lbfgs(), optax.lbfgs(linesearch=search)):
        frozen = {"scale": jnp.float32(2)}
        state = train.init_state(
            {"w": jnp.float32(1.0)}, optimizer, jax.random.key(5), ema=0.5, frozen=frozen
        )
        step = train.make_step(quartic, optimizer, ema=0.5, **options)
        batch = {
            "x": np.array([2, 1, 2, 2, 3, 2], np.float32)
        }  # parts of equal mean, in which the loss is not linear
        if options.get("axis_name"):
            state, batch = train.stack_for_pmap(state, 3), jax.tree.map(in_parts, batch)
            step = jax.vmap(step, axis_name="shard")
        step = jax.jit(step)
        for _ in range(6):
            state, _ = step(state, batch)
        np.testing.assert_allclose(
            state.params["w"], np.sqrt(2) * np.ones_like(state.params["w"]), rtol=1e-4
        )


def test_polyak_steps():
    """The loss over the squared gradient, 26/3 / 16, times the gradient."""
    optimizer = optax.polyak_sgd(10.0)
    state, _ = jax.jit(train.make_step(quadratic, optimizer))(start(optimizer), BATCH)
    np.testing.assert_allclose(state.params["w"], 1 + 26 / 3 / 16 * 4, rtol=1e-6)
