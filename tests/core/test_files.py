"""Paths that a user gives, and a disk that is full, wherever something is written or read."""

import errno
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jflow import apps, data, train
from jflow._core.files import expand
from jflow.apps import sampling, tables
from jflow.apps._launch import _workdir
from jflow.data import writers
from jflow.train import _record, checkpoint


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder; the working folder is another one, and stays empty."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert not list((tmp_path / "here").iterdir())


def trained(folder):
    """A run of two steps in a folder."""
    state = train.init_state({"w": jnp.ones(2)}, optax.sgd(0.1), jax.random.key(0))
    step = train.make_step(
        lambda params, key, batch, frozen=None: (jnp.sum(params["w"]), {}), optax.sgd(0.1)
    )
    batches = data.batches({"x": np.zeros((4, 2))}, 2, seed=0)
    return train.fit(
        state, step, batches, steps=2, workdir=folder, progress=False, log_every=1
    ).state


def test_a_tilde_is_the_home_folder(home):
    state = trained("~/run")
    checkpoint.save("~/run", 3, state)
    assert checkpoint.steps("~/run") == [2, 3] == checkpoint.steps(home / "run")
    checkpoint.discard("~/run", 3)
    assert checkpoint.latest("~/run") == 2 and checkpoint.restore("~/run", state).step == 2
    with pytest.raises(FileNotFoundError, match=str(home / "run")):
        apps.load("~/run")
    with pytest.raises(FileNotFoundError, match=str(home / "config.py")):
        apps.load_config("~/config.py")
    (home / "t.csv").write_text("a,b\n1,2\n3,5\n")
    assert data.read_table("~/t.csv").rows == 2 and tables.digest("~/t.csv") == tables.digest(
        home / "t.csv"
    )
    for read in (data.mnist, data.cifar_sheets):
        with pytest.raises(FileNotFoundError, match=str(home / "none")):
            read("~/none")
    with writers.npz_writer("~/a.npz", 1) as write:
        write({"x": np.zeros((1, 2))})
    with sampling.sample_writer("~/a.csv", 1):
        pass
    draw = lambda key, n: {"x": jnp.zeros((n, 2))}  # noqa: E731
    data.write_shards("~/shards", draw, 4, key=jax.random.key(0), batch=2, progress=False)
    assert len(data.read_shards("~/shards")["x"]) == 4
    assert (
        _workdir(["jflow", "train", "--workdir", "~/run"])
        == _workdir(["--workdir=~/run"])
        == home / "run"
    )
    assert {path.name for path in home.iterdir()} == {"run", "t.csv", "a.npz", "a.csv", "shards"}


def test_no_such_home_is_refused_unless_a_file_has_the_name(home):
    with pytest.raises(ValueError, match="~nobody-of-this-name/run: there is no such home folder"):
        expand("~nobody-of-this-name/run")
    Path("~lock.csv").touch()
    assert expand("~lock.csv") == Path("~lock.csv")
    Path("~lock.csv").unlink()
    assert expand("a/~") == Path("a/~") and expand(home) == home


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        ExceptionGroup(
            "one sub-exception", [ExceptionGroup("of a thread", [ValueError("late"), FULL])]
        ),
        ValueError("cannot write\n  array: os_error_code='28' and more"),  # as tensorstore says it
    ],
    ids=["plain", "group", "tensorstore"],
)
def test_a_full_disk_under_a_checkpoint_is_one_line(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    state = train.init_state({"w": jnp.ones(2)}, optax.sgd(0.1), jax.random.key(0))
    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    said = (
        rf"cannot write checkpoint {tmp_path}/.*00000001: No space left on device; there is none"
        r" before it$"
    )
    with pytest.raises(OSError, match=said):
        checkpoint.save(tmp_path, 1, state)


def test_a_full_disk_under_metrics_and_samples_names_the_file(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise FULL

    monkeypatch.setattr(_record, "open", fail, raising=False)
    with pytest.raises(
        OSError, match=f"cannot write metrics to {tmp_path}: No space left on device"
    ):
        _record.Recorder(tmp_path, 0).write({"step": 1, "loss": 0.5})
    for error in (FULL, ExceptionGroup("of a thread", [FULL])):
        with pytest.raises(
            OSError, match=f"cannot write {tmp_path}/a.csv: No space left on device"
        ) as raised:
            with sampling.sample_writer(tmp_path / "a.csv", 1):
                raise error
        assert raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/b.npz: No space left on device"):
        monkeypatch.setattr(writers, "open", lambda name, *_: fail(name), raising=False)
        with writers.npz_writer(tmp_path / "b.npz", 1) as write:
            write({"x": np.zeros((1, 2))})
