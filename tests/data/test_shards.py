import json
import os

import jax
import numpy as np
import pytest

from jflow import data
from jflow.data import read_shards, write_shards

KEY = jax.random.key(3)
SIZES = {"batch": 4, "shard": 8, "progress": False}


def draw(key, n):
    return {"x": jax.random.normal(key, (n, 2)), "cond": jax.random.randint(key, (n,), 0, 5)}


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def killed_in_batch(i, error=KeyboardInterrupt):
    seen = []

    def dying(key, n):
        seen.append(key)
        if len(seen) > i:
            raise error
        return draw(key, n)

    return dying


def test_every_row_comes_from_the_key_of_its_batch(tmp_path):
    write_shards(tmp_path, draw, 19, key=KEY, **SIZES)
    rows = read_shards(tmp_path)
    expected = [draw(jax.random.fold_in(KEY, i), 4) for i in range(5)]
    for name in ("x", "cond"):
        np.testing.assert_array_equal(
            np.asarray(rows[name]), np.concatenate([e[name] for e in expected])[:19]
        )
    assert sorted(files(tmp_path)) == ["manifest.json", *(f"shard-0000{i}.npz" for i in range(3))]
    with np.load(tmp_path / "shard-00002.npz") as plain:  # a file that anyone can read
        np.testing.assert_array_equal(plain["x"], rows["x"][16:])


@pytest.mark.parametrize("batches", range(5))
def test_resumed_after_a_kill_the_bytes_are_those_of_one_run(tmp_path, batches):
    write_shards(tmp_path / "whole", draw, 19, key=KEY, **SIZES)
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        write_shards(folder, killed_in_batch(batches), 19, key=KEY, **SIZES)
    assert (
        len([name for name in files(folder) if name.endswith(".npz")]) == batches // 2
    )  # whole ones alone
    with pytest.raises(FileNotFoundError, match=f"lacks {3 - batches // 2} of 3 shards"):
        read_shards(folder)
    kept = list(folder.glob("*.npz"))
    for path in kept:
        os.utime(path, ns=(0, 0))  # a time that no file gets which is written now
    write_shards(folder, draw, 19, key=KEY, **SIZES)
    assert files(folder) == files(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == 0 for path in kept)


def test_what_a_hard_kill_leaves_is_redone(tmp_path):
    write_shards(tmp_path, draw, 19, key=KEY, **SIZES)
    before = files(tmp_path)
    shard = tmp_path / "shard-00001.npz"
    shard.write_bytes(shard.read_bytes()[:-7])  # a disk that lost the end
    left = tmp_path / ".shard-00001.npz.abc.part"
    left.mkdir()
    (left / "0.npy").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="shard-00001"):
        read_shards(tmp_path)
    write_shards(tmp_path, draw, 19, key=KEY, **SIZES)
    assert not left.exists() and files(tmp_path) == before


def test_a_finished_folder_draws_nothing(tmp_path):
    write_shards(tmp_path, draw, 19, key=KEY, **SIZES)
    write_shards(tmp_path, killed_in_batch(0), 19, key=KEY, **SIZES)


def test_workers_write_what_one_would(tmp_path):
    write_shards(tmp_path / "one", draw, 27, key=KEY, **SIZES)
    for i in (2, 0, 1):
        write_shards(tmp_path / "three", draw, 27, key=KEY, share=(i, 3), **SIZES)
    assert files(tmp_path / "three") == files(tmp_path / "one")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n": 20}, "n was 19, is 20"),
        ({"batch": 2}, "batch was 4, is 2"),
        ({"shard": 16}, "shard was 8, is 16"),
        ({"key": jax.random.key(4)}, "key was"),
        ({"about": {"steps": 50}}, "steps was 100, is 50"),
        ({"about": {}}, "steps was 100, is None"),
    ],
)
def test_other_options_are_refused(tmp_path, change, said):
    options = {"n": 19, "key": KEY, "about": {"steps": 100}, **SIZES}
    write_shards(tmp_path, draw, **options)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=said):
        write_shards(tmp_path, draw, **{**options, **change})
    assert files(tmp_path) == before


def test_shards_without_a_manifest_are_not_taken_over(tmp_path):
    write_shards(tmp_path, draw, 19, key=KEY, **SIZES)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="without a manifest"):
        write_shards(tmp_path, draw, 19, key=KEY, **SIZES)
    with pytest.raises(FileNotFoundError, match="manifest"):
        read_shards(tmp_path)


def test_rows_that_are_not_finite_are_not_written(tmp_path):
    def broken(key, n):
        rows = {name: np.array(value) for name, value in draw(key, n).items()}
        rows["x"][1, 0] = np.nan
        return rows

    with pytest.raises(FloatingPointError, match=r"shard-00000.*1 of 4 rows of 'x'"):
        write_shards(tmp_path, broken, 19, key=KEY, **SIZES)
    assert sorted(files(tmp_path)) == ["manifest.json"]


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"batch": 0}, {"batch": 3}, {"shard": 0}, {"share": (2, 2)}]
)
def test_bad_counts_are_named(tmp_path, wrong):
    with pytest.raises(ValueError, match="write_shards: expected"):
        write_shards(tmp_path, draw, **{"n": 19, "key": KEY, **SIZES, **wrong})


def test_a_draw_of_another_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give 4 rows, got 5"):
        write_shards(tmp_path, lambda key, n: draw(key, n + 1), 19, key=KEY, **SIZES)


def test_rows_are_read_where_they_are_indexed(tmp_path):
    write_shards(tmp_path / "a", draw, 19, key=KEY, **SIZES)
    write_shards(tmp_path / "b", draw, 5, key=jax.random.key(9), **SIZES)
    rows = read_shards(tmp_path / "a", tmp_path / "b")
    whole = {name: np.asarray(value) for name, value in rows.items()}
    assert len(rows["x"]) == 24 and rows["x"].shape == (24, 2) and rows["x"].dtype == np.float32
    index = np.random.default_rng(0).integers(-24, 24, 50)
    for chosen in (index, slice(3, 22, 5), np.arange(24) % 3 == 0, index.reshape(5, 10), -1):
        np.testing.assert_array_equal(rows["x"][chosen], whole["x"][chosen])
    one, other = data.batches(rows, 7, seed=1), data.batches(whole, 7, seed=1)
    for _ in range(7):
        a, b = next(one), next(other)
        np.testing.assert_array_equal(a["x"], b["x"])
        np.testing.assert_array_equal(a["cond"], b["cond"])
    np.testing.assert_array_equal(data.split(rows).train["x"], data.split(whole).train["x"])


def test_folders_of_other_rows_are_not_joined(tmp_path):
    write_shards(tmp_path / "a", draw, 8, key=KEY, **SIZES)
    write_shards(tmp_path / "b", lambda key, n: {"x": np.zeros((n, 2))}, 8, key=KEY, **SIZES)
    write_shards(
        tmp_path / "c", lambda key, n: {**draw(key, n), "x": np.zeros((n, 3))}, 8, key=KEY, **SIZES
    )
    with pytest.raises(ValueError, match="cond"):
        read_shards(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="differ in shape or type"):
        read_shards(tmp_path / "a", tmp_path / "c")


def test_the_manifest_is_json_that_says_it_all(tmp_path):
    write_shards(tmp_path, draw, 19, key=KEY, about={"guidance": 1.5}, **SIZES)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (
        manifest["about"] == {"guidance": 1.5}
        and manifest["n"] == 19
        and manifest["key"][1] == [0, 3]
    )
