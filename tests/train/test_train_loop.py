"""fit: what it logs, keeps, stops at and comes back to."""

import json
import logging
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from jflow import data, train
from jflow.train import checkpoint

OPTIMIZER = optax.adam(optax.cosine_decay_schedule(0.05, 100))
ROWS = {"x": np.random.default_rng(0).normal(1.0, 2.0, (64, 2)).astype(np.float32)}


def noisy(params, key, batch, frozen=None):
    noise = jax.random.normal(key, batch["x"].shape)
    return jnp.mean((batch["x"] @ params["w"] - noise) ** 2), {"size": jnp.sum(params["w"] ** 2)}


def rows(**options):
    return data.batches(ROWS, 8, seed=3, **options)


def go(steps, batches=None, *, loss=noisy, frozen=None, start=1.0, **options):
    state = train.init_state(
        {"w": start * jnp.eye(2)}, OPTIMIZER, jax.random.key(1), ema=0.9, frozen=frozen
    )
    step = train.make_step(loss, OPTIMIZER, ema=0.9)
    return train.fit(
        state, step, rows() if batches is None else batches, steps=steps, progress=False, **options
    )


def assert_same(a, b):
    for x, y in zip(
        jax.tree.leaves(a._replace(key=None)), jax.tree.leaves(b._replace(key=None)), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def timeless(history):
    return [{k: v for k, v in row.items() if k != "time"} for row in history]


class Poisoned:
    """Batches whose p-th (from 1) is not finite, for some p."""

    def __init__(self, *bad):
        self._rows, self._bad = rows(), bad

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self._rows)
        return {"x": batch["x"] * np.float32(np.nan)} if self.position in self._bad else batch

    @property
    def position(self):
        return self._rows.position

    def seek(self, position):
        self._rows.seek(position)


def test_fit_is_the_jitted_step_over_the_batches():
    state = train.init_state({"w": jnp.eye(2)}, OPTIMIZER, jax.random.key(1), ema=0.9)
    step, batches = jax.jit(train.make_step(noisy, OPTIMIZER, ema=0.9)), rows()
    for _ in range(12):
        state, metrics = step(state, next(batches))
    fitted = go(12, log_every=5)
    # fit's program also watches for what is not finite, so that XLA may fuse the update another
    # way: float32 rounding.
    for a, b in zip(
        jax.tree.leaves(fitted.state.params), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert [row["step"] for row in fitted.history] == [5, 10, 12] and fitted.best is None
    assert fitted.history[-1]["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-5)
    assert list(fitted.history[0]) == ["step", "time", "loss", "grad_norm", "size"]


def test_one_trace_and_one_program_for_all_steps(caplog):
    traces = []

    def counted(params, key, batch, frozen):
        traces.append(1)
        return noisy(params, key, batch, frozen)

    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        go(12, loss=counted, log_every=4)
    compiled = [r for r in caplog.messages if r.startswith("Compiling jit(run)")]
    assert len(traces) == 1 and len(compiled) == 1


def test_resumed_run_is_the_unbroken_one(tmp_path):
    options = dict(
        log_every=3,
        save_every=4,
        eval_every=5,
        evaluate=lambda s: {"w": jnp.sum(s.params["w"])},
        monitor="w",
    )
    whole = go(20, workdir=tmp_path / "whole", **options)
    go(8, workdir=tmp_path / "parts", **options)
    go(13, workdir=tmp_path / "parts", **options)
    parts = go(20, workdir=tmp_path / "parts", **options)
    assert_same(parts.state, whole.state)
    assert parts.best.value == whole.best.value
    np.testing.assert_array_equal(parts.best.params["w"], whole.best.params["w"])
    kept = [
        row for row in timeless(lines(tmp_path / "parts")) if row["step"] not in (8, 13)
    ]  # the parts' own ends
    assert kept == timeless(lines(tmp_path / "whole"))
    # And once more: nothing to do, and all of it there.
    before = (tmp_path / "parts" / "metrics.jsonl").read_bytes()
    again = go(20, workdir=tmp_path / "parts", batches=rows(), **options)
    assert_same(again.state, whole.state)
    assert again.best.value == whole.best.value and again.history == parts.history
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == before


def test_rows_past_the_checkpoint_and_cut_lines_go(tmp_path):
    go(10, workdir=tmp_path, log_every=2, save_every=4)
    checkpoint.discard(tmp_path, 10)  # as if killed after step 8
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    assert [row["step"] for row in go(12, workdir=tmp_path, log_every=2, save_every=4).history] == [
        2,
        4,
        6,
        8,
        10,
        12,
    ]
    assert [row["step"] for row in lines(tmp_path)] == [2, 4, 6, 8, 10, 12]


def test_truncated_newest_checkpoint_is_named_and_passed_over(tmp_path):
    whole = go(12)
    go(9, workdir=tmp_path, save_every=3)
    for file in (tmp_path / "checkpoints" / "00000009").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    with pytest.warns(UserWarning, match="00000009 is damaged and passed over"):
        resumed = go(12, workdir=tmp_path, save_every=3)
    assert_same(resumed.state, whole.state)
    assert checkpoint.steps(tmp_path) == [6, 9, 12] and checkpoint.restore_extra(
        tmp_path, 9
    )  # written anew


def test_all_checkpoints_damaged_starts_afresh(tmp_path):
    go(3, workdir=tmp_path)
    os.truncate(tmp_path / "checkpoints" / "00000003" / "manifest.json", 10)
    with pytest.warns(UserWarning, match="passed over"):
        assert_same(go(5, workdir=tmp_path).state, go(5).state)


def test_workdir_of_another_model_is_an_error(tmp_path):
    go(2, workdir=tmp_path, frozen={"a": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"frozen\['a'\] is float32\[2\] there, missing here"):
        go(4, workdir=tmp_path)


def test_what_is_unsaved_is_taken_from_the_state_and_has_to_be_the_same(tmp_path):
    def loss(params, key, batch, frozen):
        value, metrics = noisy(params, key, batch)
        return value + jnp.sum(frozen["base"]["w"] * params["w"]), metrics

    base = {"w": jnp.eye(2), "on": jnp.array(True), "key": jax.random.key(4)}
    options = dict(loss=loss, frozen={"base": base}, unsaved=["base"])
    go(3, workdir=tmp_path, **options)
    resumed = go(6, workdir=tmp_path, **options).state
    assert_same(resumed._replace(frozen=None), go(6, **options).state._replace(frozen=None))
    assert resumed.frozen["base"]["w"].tolist() == [[1, 0], [0, 1]]
    there = json.loads((tmp_path / "checkpoints/00000006/manifest.json").read_text())
    assert not [name for name in there["leaves"] if name.startswith("frozen")]
    swapped = {**base, "w": jnp.eye(2)[::-1]}  # the same numbers in another order
    with pytest.raises(ValueError, match="'base/w', .* than that of the checkpoint of step 6"):
        go(9, workdir=tmp_path, **{**options, "frozen": {"base": swapped}})
    with pytest.raises(ValueError, match=r"parts of state.frozen, which has \['base'\], got"):
        go(9, workdir=tmp_path, **{**options, "unsaved": ["bsae"]})


def test_what_is_unsaved_may_not_be_refreshed(tmp_path):
    state = train.init_state(
        {"w": jnp.eye(2)}, OPTIMIZER, jax.random.key(1), frozen={"n": jnp.zeros(())}
    )
    refresh = lambda params, frozen, key, batch: {"n": frozen["n"] + 1}  # noqa: E731
    step = train.make_step(noisy, OPTIMIZER, refresh=refresh)
    options = dict(steps=4, save_every=2, workdir=tmp_path, unsaved=["n"], progress=False)
    with pytest.raises(ValueError, match="'n', .* has changed before step 2: do not refresh it"):
        train.fit(state, step, rows(), **options)
    assert not checkpoint.steps(tmp_path)


def test_nonfinite_names_step_metrics_and_last_good_checkpoint(tmp_path):
    with pytest.raises(
        train.NonFiniteError, match=r"loss .*at step 7: .*loss=nan.*last good checkpoint: step 6"
    ):
        go(20, Poisoned(7, 9), workdir=tmp_path, save_every=3, log_every=10)
    assert checkpoint.steps(tmp_path) == [3, 6]
    assert isinstance(train.NonFiniteError("x"), FloatingPointError)
    with pytest.raises(train.NonFiniteError, match=r"step 2: .*no checkpoint was saved"):
        go(20, Poisoned(2))


def test_params_that_overflow_are_never_saved(tmp_path):
    """The loss and the gradient of step 4 are finite, what the update makes of the params is
    not."""
    jump = optax.inject_hyperparams(optax.sgd)(
        learning_rate=lambda n: jnp.where(n == 3, jnp.inf, 0.01)
    )
    step = train.make_step(noisy, jump)
    with pytest.raises(train.NonFiniteError, match="the params are not finite at step 4"):
        state = train.init_state({"w": jnp.eye(2)}, jump, jax.random.key(0))
        train.fit(state, step, rows(), steps=8, workdir=tmp_path, save_every=2, progress=False)
    assert checkpoint.steps(tmp_path) == [2]


def test_skip_nonfinite_leaves_those_updates_out(tmp_path):
    fitted = go(6, Poisoned(2, 5), skip_nonfinite=True, workdir=tmp_path, save_every=2, log_every=1)
    assert [row["skipped"] for row in fitted.history] == [0, 1, 1, 1, 2, 2]
    assert lines(tmp_path)[1]["loss"] is None and np.isnan(fitted.history[1]["loss"])
    assert int(fitted.state.step) == 6 and int(fitted.state.opt_state[0].count) == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(fitted.state._replace(key=None)))
    resumed = go(8, Poisoned(7), skip_nonfinite=True, workdir=tmp_path, save_every=2, log_every=1)
    assert resumed.history[-1]["skipped"] == 3  # counted on


@pytest.fixture
def heeded():
    """SIGTERM and SIGINT at their defaults: a shell that starts the tests in the background has
    SIGINT ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_signal_finishes_the_step_and_saves(tmp_path, heeded, capsys, number, raised):
    before = signal.getsignal(number)

    def transform(batch, rng):
        if len(seen) == 4:
            signal.raise_signal(number)
        seen.append(1)
        return batch

    seen = []
    with pytest.raises(raised) as error:
        go(20, rows(transform=transform), workdir=tmp_path)
    assert raised is KeyboardInterrupt or error.value.code == 143
    assert checkpoint.steps(tmp_path) == [5] and signal.getsignal(number) is before
    assert (
        f"jflow: {number.name}: step 5 is saved in {tmp_path}; the same call goes on"
        in capsys.readouterr().err
    )
    assert_same(go(20, workdir=tmp_path).state, go(20).state)


def test_outside_the_main_thread_signals_are_left_alone():
    results = []
    thread = threading.Thread(target=lambda: results.append(go(3)))
    thread.start()
    thread.join()
    assert int(results[0].state.step) == 3


def test_early_stopping_keeps_the_best_and_stays_stopped(tmp_path):
    scores = {2: 5.0, 4: 3.0, 6: 4.0, 8: float("nan"), 10: 1.0}
    options = dict(
        eval_every=2,
        evaluate=lambda s: {"v": scores[int(s.step)]},
        monitor="v",
        save_every=3,
        workdir=tmp_path,
    )
    fitted = go(20, patience=2, **options)
    assert int(fitted.state.step) == 8 and (fitted.best.step, fitted.best.value) == (4, 3.0)
    np.testing.assert_array_equal(fitted.best.params["w"], go(4).state.params["w"])
    np.testing.assert_array_equal(fitted.best.ema["w"], go(4).state.ema["w"])
    assert [row.get("eval/v") for row in lines(tmp_path)] == [5.0, 3.0, 4.0, None]
    again = go(20, patience=2, **options)
    assert int(again.state.step) == 8 and again.best.step == 4
    np.testing.assert_array_equal(again.best.params["w"], fitted.best.params["w"])
    kept = checkpoint.restore_params(tmp_path / "best", 4, ema=False)
    np.testing.assert_array_equal(kept["w"], fitted.best.params["w"])


def test_best_stays_while_a_kept_checkpoint_may_name_it(tmp_path):
    """The newest checkpoint is lost: the best of the one before it must still be there."""
    options = dict(
        eval_every=2,
        evaluate=lambda s: {"v": -int(s.step)},
        monitor="v",
        save_every=2,
        max_to_keep=2,
    )
    go(8, workdir=tmp_path, **options)
    assert checkpoint.steps(tmp_path) == [6, 8] and checkpoint.steps(tmp_path / "best") == [6, 8]
    checkpoint.discard(tmp_path, 8)
    fitted = go(6, workdir=tmp_path, **options)
    assert fitted.best.step == 6 and checkpoint.steps(tmp_path / "best") == [6]


def test_lost_best_is_a_warning_and_the_bar_stays(tmp_path):
    options = dict(eval_every=2, monitor="v", save_every=2, workdir=tmp_path)
    go(2, evaluate=lambda s: {"v": 1.0}, **options)
    os.truncate(tmp_path / "best/checkpoints/00000002/manifest.json", 0)
    with pytest.warns(UserWarning, match="best params so far are lost"):
        assert go(4, evaluate=lambda s: {"v": 2.0}, **options).best is None


def test_pictures_and_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    go(4, workdir=tmp_path, eval_every=2, picture=lambda s: np.full((3, 5), 0.5), log_every=2)
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == [
        "step_00000002.png",
        "step_00000004.png",
    ]
    image = Image.open(tmp_path / "pictures" / "step_00000002.png")
    assert image.size == (5, 3) and image.getpixel((0, 0)) == 128
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"grad_norm") == 2
    with pytest.raises(ValueError, match=r"got shape \[3\]"):
        go(2, workdir=tmp_path / "b", picture=lambda s: np.zeros(3))


def test_rollouts_get_the_state_and_a_new_key_every_step(tmp_path):
    seen = []

    def rollout(state, key):
        seen.append((int(state.step), tuple(jax.random.key_data(key).tolist())))
        return {"x": jax.random.normal(key, (4, 2)) + state.params["w"][0, 0]}

    whole = go(6, rollout)
    steps, keys = zip(*seen, strict=True)
    loss_keys = {
        tuple(jax.random.key_data(jax.random.fold_in(jax.random.key(1), n)).tolist())
        for n in range(6)
    }
    assert steps == tuple(range(6)) and len({*keys} | loss_keys) == 12
    go(3, rollout, workdir=tmp_path)
    assert_same(go(6, rollout, workdir=tmp_path).state, whole.state)


def drawn(state, key):
    return {"x": jax.random.normal(key, (4, 2)) + state.params["w"][0, 0]}


def test_inner_updates_are_the_same_updates():
    """With the same keys: XLA may fuse the scanned update another way, float32 rounding. Metrics
    are those of the logged update, and the loop's program is one."""
    one, several = go(12, drawn, log_every=6), go(12, drawn, log_every=6, inner=3)
    for a, b in zip(
        *(jax.tree.leaves(f.state._replace(key=None)) for f in (one, several)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert [row["step"] for row in several.history] == [6, 12]
    for a, b in zip(timeless(one.history), timeless(several.history), strict=True):
        assert a.keys() == b.keys() and a == pytest.approx(b, rel=1e-4)
    placed = go(12, drawn, log_every=6, inner=3, sharding=train.data_sharding(train.data_mesh()))
    np.testing.assert_allclose(
        placed.state.params["w"], one.state.params["w"], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("options", [{"inner": 3}, {"prefetch": 2}, {"inner": 3, "prefetch": 2}])
def test_batches_of_an_iterator_are_the_same_however_they_are_fed(options):
    """Stacked, made ahead, or both; and the caller's iterator stands where the run did."""
    one, batches = go(12, log_every=6), rows()
    other = go(12, batches, log_every=6, **options)
    for a, b in zip(
        *(jax.tree.leaves(f.state._replace(key=None)) for f in (one, other)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    for a, b in zip(timeless(one.history), timeless(other.history), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert batches.position == 12
    placed = go(12, log_every=6, sharding=train.data_sharding(train.data_mesh()), **options)
    np.testing.assert_allclose(
        placed.state.params["w"], one.state.params["w"], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("inner", [1, 2])
def test_batches_made_ahead_resume_bit_for_bit(tmp_path, inner):
    """What was fetched and not used when a part ended is given again."""
    options = dict(prefetch=3, inner=inner, log_every=4, save_every=4)
    whole = go(12, workdir=tmp_path / "whole", **options)
    go(8, workdir=tmp_path / "parts", **options)
    checkpoint.discard(tmp_path / "parts", 8)  # as if killed after step 4
    parts = go(12, workdir=tmp_path / "parts", **options)
    assert_same(parts.state, whole.state)
    assert checkpoint.restore(tmp_path / "parts", parts.state).position == 12


def test_a_frozen_encoder_changes_no_loss_where_it_runs_ahead():
    """Inside the step, a batch ahead in a thread, or once for all rows: the loss of every update is
    the same, to float32 rounding, since XLA fuses the first with the step."""
    encoder = {"a": np.float32([[0.4, -0.3], [0.2, 0.5]])}

    def encode(params, x, *, key=None):
        return jnp.tanh(x @ params["a"])

    def encoding(params, key, batch, frozen):
        return noisy(params, key, {"x": encode(frozen["encoder"], batch["x"])})

    run = jax.jit(encode)
    ahead = rows(transform=lambda rows, rng: {"x": np.asarray(run(encoder, rows["x"]))})
    once = data.batches(data.latents(encode, encoder, ROWS, progress=False), 8, seed=3)
    inside, *others = (
        go(12, log_every=1, loss=encoding, frozen={"encoder": encoder}),
        go(12, ahead, log_every=1, prefetch=1),
        go(12, once, log_every=1),
    )
    expected = [row["loss"] for row in inside.history]
    assert len(expected) == 12 and len(set(expected)) == 12
    for other in others:
        np.testing.assert_allclose([row["loss"] for row in other.history], expected, rtol=1e-5)
    assert abs(go(1, log_every=1).history[0]["loss"] / expected[0] - 1) > 1e-2  # without one


def test_inner_updates_resume_bit_for_bit(tmp_path):
    options = dict(
        inner=2,
        log_every=4,
        save_every=4,
        eval_every=6,
        evaluate=lambda s: {"w": jnp.sum(s.params["w"])},
        monitor="w",
    )
    whole = go(12, drawn, workdir=tmp_path / "whole", **options)
    go(8, drawn, workdir=tmp_path / "parts", **options)
    parts = go(12, drawn, workdir=tmp_path / "parts", **options)
    assert_same(parts.state, whole.state)
    assert parts.best.step == whole.best.step and parts.best.value == whole.best.value
    kept, all_of = (
        [r for r in timeless(lines(tmp_path / p)) if r["step"] != 8] for p in ("parts", "whole")
    )
    assert kept == all_of  # 8 was the end of a part, and so was evaluated
    with pytest.raises(
        ValueError, match="expected a state whose step inner=5 divides, got step 12"
    ):
        go(15, drawn, workdir=tmp_path / "parts", inner=5, log_every=5, save_every=5)


def test_inner_updates_name_the_bad_one_and_skip_it(tmp_path):
    """Update 7 is the first of the third visit of three; with skip_nonfinite it alone is left
    out."""

    def poisoned(state, key):
        return {"x": jnp.where(state.step == 6, jnp.nan, drawn(state, key)["x"])}

    with pytest.raises(
        train.NonFiniteError, match=r"loss .*at step 7: .*loss=nan.*last good checkpoint: step 6"
    ):
        go(12, poisoned, workdir=tmp_path, inner=3, save_every=6, log_every=12)
    assert checkpoint.steps(tmp_path) == [6]
    fitted = go(12, poisoned, inner=3, skip_nonfinite=True, log_every=3)
    assert [row["skipped"] for row in fitted.history] == [0, 0, 1, 1]
    assert int(fitted.state.opt_state[0].count) == 11


def test_a_step_is_a_body_for_scan():
    state = train.init_state({"w": jnp.eye(2)}, OPTIMIZER, jax.random.key(1), ema=0.9)
    step, stream = train.make_step(noisy, OPTIMIZER, ema=0.9), rows()
    batches = [next(stream) for _ in range(5)]
    scanned, metrics = jax.jit(lambda s, b: jax.lax.scan(step, s, b))(
        state, jax.tree.map(lambda *x: np.stack(x), *batches)
    )
    for batch in batches:
        state, last = step(state, batch)
    for a, b in zip(
        *(jax.tree.leaves(s._replace(key=None)) for s in (state, scanned)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert metrics["loss"].shape == (5,) and metrics["loss"][-1] == pytest.approx(
        float(last["loss"]), rel=1e-5
    )


def test_progress_bar_goes_to_stderr(capsys):
    state = train.init_state({"w": jnp.eye(2)}, OPTIMIZER, jax.random.key(1))
    train.fit(state, train.make_step(noisy, OPTIMIZER), rows(), steps=3)
    out, err = capsys.readouterr()
    assert "compiling" in err and "compiling" not in err.rsplit("\r", 1)[-1]
    assert out == "" and "3/3" in err and "loss=" in err and "step/s" in err
    go(2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"steps": 0}, ValueError, "steps to be a whole number of at least 1, got 0"),
        ({"log_every": 0}, ValueError, "log_every"),
        ({"max_to_keep": 1.5}, ValueError, "max_to_keep"),
        ({"patience": 0}, ValueError, "patience"),
        ({"inner": 0}, ValueError, "inner to be a whole number of at least 1, got 0"),
        ({"inner": 2, "batches": drawn}, ValueError, "steps to be a multiple of inner=2, got 3"),
        (
            {"inner": 3, "batches": drawn, "log_every": 4},
            ValueError,
            "log_every to be a multiple of inner=3, got 4",
        ),
        ({"prefetch": -1}, ValueError, "prefetch to be a whole number of at least 0, got -1"),
        (
            {"inner": 3, "log_every": 3, "batches": iter([{"x": ROWS["x"]}] * 2)},
            ValueError,
            "ended after step 0",
        ),
        ({"monitor": "v"}, ValueError, "monitor='v' names a number of `evaluate`"),
        ({"patience": 3}, ValueError, "patience counts evaluations of `monitor`"),
        ({"picture": lambda s: None}, ValueError, "pictures are saved to the workdir"),
        ({"batches": [1, 2]}, TypeError, "an iterator or a callable"),
        ({"batches": iter([{"x": ROWS["x"]}] * 2)}, ValueError, "batches ended after step 2"),
        ({"batches": iter([]), "workdir": "never"}, TypeError, "`position` and `seek"),
        ({"monitor": "u", "evaluate": lambda s: {"v": 1.0}}, ValueError, r"monitor 'u' .* \['v'\]"),
        (
            {"evaluate": lambda s: {"v": np.zeros(3)}},
            ValueError,
            r"'v': expected a scalar, got shape \[3\]",
        ),
    ],
)
def test_bad_options(options, error, said):
    with pytest.raises(error, match=said):
        go(**{"steps": 3, **options})
