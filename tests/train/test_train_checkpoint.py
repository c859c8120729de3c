"""Checkpoints: whole or not there, and the same bits back."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import train
from jflow.train import checkpoint

ADAM = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-3, 100))
)
NESTED = {
    "net": {"w": jnp.arange(6.0).reshape(2, 3), "half": jnp.ones(3, jnp.bfloat16)},
    "empty": {},
    "s": jnp.float32(3),
}


def make(params=NESTED, optimizer=ADAM, **options):
    return train.init_state(params, optimizer, jax.random.key(7), **options)


def raw(tree):
    """Leaves as numpy: keys by their data."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in jax.tree.leaves(tree)]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(raw(a), raw(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "params", [NESTED, {}, jnp.ones(3), jnp.float32(2)], ids=["nested", "empty", "leaf", "scalar"]
)
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (ADAM, {"ema": 0.9}),
        (optax.sgd(0.1), {"frozen": {"teacher": NESTED, "key": jax.random.key(1), "none": {}}}),
        (optax.inject_hyperparams(optax.adam)(learning_rate=1e-3), {}),
    ],
    ids=["adam", "sgd", "injected"],
)
def test_state_and_params_come_back_bit_for_bit(tmp_path, params, optimizer, options):
    state = make(params, optimizer, **options)
    checkpoint.save(tmp_path, 4, state, {"epoch": 1}, {"mean": np.arange(2.0)})
    back = checkpoint.restore(
        tmp_path, make(jax.tree.map(jnp.zeros_like, params), optimizer, **options)
    )
    assert_same(back.state, state)
    assert (back.step, back.position, back.extra) == (4, {"epoch": 1}, {"mean": [0.0, 1.0]})
    assert_same(checkpoint.restore_params(tmp_path), params if state.ema is None else state.ema)


def test_ema_or_raw_params(tmp_path):
    state = make({"w": jnp.ones(2)}, ema=0.9)._replace(ema={"w": jnp.full(2, 5.0)})
    checkpoint.save(tmp_path, 1, state)
    assert checkpoint.restore_params(tmp_path)["w"][0] == 5
    assert checkpoint.restore_params(tmp_path, ema=False)["w"][0] == 1
    assert checkpoint.restore_params(tmp_path, 1, True)["w"][0] == 5


def test_only_the_newest_stay_and_leftovers_of_a_kill_go(tmp_path):
    state = make({"w": jnp.ones(2)})
    leftover = tmp_path / "checkpoints" / "00000009" / "params.orbax-checkpoint-tmp"
    leftover.mkdir(parents=True)
    assert checkpoint.steps(tmp_path) == [] and checkpoint.latest(tmp_path) is None
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, state, max_to_keep=2)
    assert checkpoint.steps(tmp_path) == [20, 30] and checkpoint.latest(tmp_path) == 30
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000020", "00000030"]
    assert checkpoint.restore(tmp_path, state, 20).step == 20


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two checkpoints, of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        checkpoint.save(folder, step, make({"w": jnp.full((40, 40), float(step))}))
    return folder


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [_truncate, lambda f: f.write_bytes(b""), lambda f: f.unlink(), _flip]
)
def test_any_damaged_file_is_noticed_and_the_one_before_is_used(two, tmp_path, damage):
    like = make({"w": jnp.zeros((40, 40))})
    files = [p.relative_to(two) for p in (two / "checkpoints/00000002").rglob("*") if p.is_file()]
    assert len(files) > 10
    for file in files:
        shutil.rmtree(tmp_path / "w", ignore_errors=True)
        shutil.copytree(two, tmp_path / "w")
        damage(tmp_path / "w" / file)
        if file.name == "manifest.json" and not (tmp_path / "w" / file).exists():
            assert checkpoint.steps(tmp_path / "w") == [1]  # without its mark it was never finished
            continue
        with pytest.warns(UserWarning, match="00000002 is damaged and passed over"):
            back = checkpoint.restore(tmp_path / "w", like) if file == files[0] else None
            assert checkpoint.latest(tmp_path / "w") == 1
        assert back is None or (back.step == 1 and float(back.state.params["w"][0, 0]) == 1.0)
        with pytest.raises(ValueError, match="00000002 is damaged"):
            checkpoint.restore_params(tmp_path / "w", 2)


def test_errors_name_what_is_wrong(two, tmp_path):
    like = make({"w": jnp.zeros((40, 40))})
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.restore(tmp_path, like)
    with pytest.raises(FileNotFoundError, match=r"step 7 .* \[1, 2\]"):
        checkpoint.restore(two, like, 7)
    for other, said in [
        (
            make({"w": jnp.zeros((40, 41))}),
            r"params\['w'\] is float32\[40, 40\] there, float32\[40, 41\] here",
        ),
        (make({"v": jnp.zeros((40, 40))}), r"params\['v'\] is missing there"),
        (
            make({"w": jnp.zeros((40, 40))}, optax.sgd(0.1)),
            r"opt_state\[1\]\[0\]\.count is int32\[\] there, missing here",
        ),
        (make({"w": jnp.zeros((40, 40))}, ema=0.9), r"ema\['w'\] is missing there"),
    ]:
        with pytest.raises(ValueError, match=r"is of another model: " + said):
            checkpoint.restore(two, other)


def test_what_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="must be JSON, got object"):
        checkpoint.save(tmp_path, 1, make(), None, {"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_two_saves_of_one_step_leave_the_second(tmp_path):
    for value in (1.0, 2.0):
        checkpoint.save(tmp_path, 5, make({"w": jnp.full(2, value)}))
    assert checkpoint.restore_params(tmp_path)["w"][0] == 2.0
