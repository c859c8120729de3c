"""Configs, `run` and `load`."""

import contextvars
import errno
import json
import os
import shutil
import sys
import warnings

import jax
import numpy as np
import pytest

from jflow import apps, data, train
from jflow._core import files, lock
from jflow.train import checkpoint

CONFIG = '''"""A diagonal normal fitted to rows on disk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jflow import data
from jflow.apps import Experiment


@dataclasses.dataclass
class Model:
    name: "str" = "normal"  # an annotation that dataclasses look up in the module


def config(
    *,
    rows="rows.npz",
    steps=6,
    rate=0.1,
    hidden=(8, 8),
    name="a",
    flag=False,
    drop: float | None = None,
    patience: "int | None" = None,
    untyped=None,
) -> Experiment:
    def load():
        with np.load(rows) as stored:
            return data.Splits({"x": stored["train"]}, {"x": stored["valid"]})

    def init(key, batch):
        return {"mean": jnp.mean(batch["x"], 0), "log_std": jax.random.normal(key, (2,))}

    def loss(params, key, batch, frozen=None):
        z = (batch["x"] - params["mean"][None]) * jnp.exp(-params["log_std"])[None]
        return jnp.mean(jnp.sum(z**2 / 2 + params["log_std"][None], 1)), {}

    def evaluate(params, state, key, splits):
        x = data.standardize().apply(state, splits.valid, None)
        return {"nll": loss(params, key, x)[0]}

    def sample(params, key, n):
        z = jax.random.normal(key, (n, 2))
        return {"x": params["mean"][None] + jnp.exp(params["log_std"])[None] * z}

    return Experiment(
        model=Model(),
        init=init,
        loss=loss,
        optimizer=optax.adam(rate),
        data=load,
        preprocess=data.standardize(),
        steps=steps,
        batch=16,
        ema=0.5,
        sample=sample,
        evaluate=evaluate,
        picture=lambda rows: (np.abs(rows["x"][:8]) % 1),
        eval_every=2,
        save_every=2,
        monitor="nll",
        patience=patience,
    )
'''


@pytest.fixture
def config(tmp_path):
    """A config file with its rows: the validation rows lie elsewhere, so that fitting on them would
    show."""
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "rows.npz",
        train=rng.normal(3.0, 2.0, (50, 2)),
        valid=rng.normal(50.0, 9.0, (20, 2)),
    )
    path = tmp_path / "config.py"
    path.write_text(CONFIG.replace('rows="rows.npz"', f"rows={str(tmp_path / 'rows.npz')!r}"))
    return path


def test_overrides_are_read_as_literals_of_the_defaults_type(config):
    given = {
        "steps": "4",
        "rate": "1",
        "hidden": "16, 32",
        "name": "12",
        "flag": "True",
        "drop": "0.5",
    }
    experiment, values = apps.load_config(config, given)
    del values["rows"], values["patience"], values["untyped"]
    assert values == {
        "steps": 4,
        "rate": 1.0,
        "hidden": (16, 32),
        "name": "12",
        "flag": True,
        "drop": 0.5,
    }
    assert isinstance(values["rate"], float) and experiment.steps == 4
    assert apps.load_config(config, {"hidden": [4], "flag": "true"})[1]["hidden"] == (4,)
    for given, value in {
        ("flag", "no"): False,
        ("flag", "0"): False,
        ("flag", "On"): True,
        ("steps", "1e3"): 1000,
        ("drop", "none"): None,
        ("drop", None): None,
        ("patience", "3"): 3,
        ("hidden", "16,"): (16,),
        ("untyped", None): None,
        ("untyped", 0.5): 0.5,  # it has a type of its own
    }.items():
        assert apps.load_config(config, dict([given]))[1][given[0]] == value
    assert apps.load_config(config.parent)[0].steps == 6  # a folder stands for its config.py
    assert sorted(p.name for p in config.parent.iterdir()) == [
        "config.py",
        "rows.npz",
    ]  # no __pycache__


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"step": "4"},
            r"unknown key 'step': did you mean 'steps'\? .* has the keys rows, steps, rate",
        ),
        ({"zzz": "4"}, r"unknown key 'zzz': .* has the keys rows"),
        ({"steps": "many"}, r"key 'steps': expected int \(a whole number\), got 'many'"),
        ({"steps": "4.5"}, r"expected int"),
        ({"steps": "True"}, r"expected int"),
        ({"steps": True}, r"expected int"),
        ({"steps": "-1"}, r"key 'steps': expected a whole number of at least 1, got '-1'"),
        ({"patience": "0"}, r"key 'patience': expected a whole number of at least 1"),
        ({"patience": "no"}, r"expected int \| None \(a whole number, or none\), got 'no'"),
        ({"rate": "fast"}, r"expected float"),
        ({"rate": "nan"}, r"expected float \(a finite number\), got 'nan'"),
        ({"drop": "-inf"}, r"expected float \| None"),
        ({"hidden": "16"}, r"expected tuple\[int, ...\]"),
        ({"hidden": "16,wide"}, r"each a whole number"),
        ({"flag": "maybe"}, r"expected bool \(true or false\), got 'maybe'"),
        ({"flag": 1}, r"expected bool"),
        ({"name": 3}, r"expected str"),
        ({"untyped": "no"}, r"key 'untyped' has no type, so that 'no' cannot be read: annotate it"),
    ],
)
def test_bad_overrides(config, given, said):
    with pytest.raises(ValueError, match=said):
        apps.load_config(config, given)


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("x = 1", ValueError, "no function config"),
        ("def config(steps=3): pass", ValueError, "'steps' is not one"),
        ("def config(*, steps): pass", ValueError, "'steps' is not one"),
        ("def config(**keys): pass", ValueError, "'keys' is not one"),
        ("def config(*, a=1): return a", TypeError, "must return a jflow.apps.Experiment, got int"),
    ],
)
def test_bad_configs(tmp_path, text, error, said):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(error, match=said):
        apps.load_config(tmp_path / "c.py")
    with pytest.raises(FileNotFoundError, match="no config at"):
        apps.load_config(tmp_path / "none.py")


def test_counts_of_the_experiment_are_checked(config):
    config.write_text(config.read_text().replace("steps=steps,", "steps=-steps,"))
    with pytest.raises(
        ValueError,
        match=r"config\.py: config must return an Experiment with steps from 1 to inf, got -6",
    ):
        apps.load_config(config)


def start(config, workdir, **overrides):
    experiment, values = apps.load_config(config, overrides)
    return apps.run(experiment, workdir, config_source=config, resolved=values, progress=False)


def test_run_then_load_without_the_data(config, tmp_path):
    workdir = tmp_path / "run"
    fitted = start(config, workdir, steps=5)
    assert (workdir / "config.py").read_text() == config.read_text()
    assert json.loads((workdir / "config.json").read_text())["values"]["steps"] == 5
    assert sorted(p.name for p in (workdir / "pictures").iterdir())[-1] == "step_00000005.png"
    with np.load(tmp_path / "rows.npz") as stored:
        x = stored["train"]
    (tmp_path / "rows.npz").unlink()

    loaded = apps.load(workdir)
    assert loaded.step == fitted.best.step and loaded.model.name == "normal"
    jax.tree.map(np.testing.assert_array_equal, loaded.params, fitted.best.ema)
    jax.tree.map(
        np.testing.assert_array_equal, apps.load(workdir, ema=False).params, fitted.best.params
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        apps.load(workdir, step=5, ema=False).params,
        fitted.state.params,
    )
    with pytest.raises(FileNotFoundError, match=r"step 3 .* \[2, 4, 5\]"):
        apps.load(workdir, step=3)

    np.testing.assert_allclose(
        loaded.preprocess.state["mean"], x.mean(0), rtol=1e-12
    )  # of the training rows alone
    y = loaded.preprocess.apply({"x": x})
    np.testing.assert_allclose(y["x"].std(0), 1.0, rtol=1e-6)
    np.testing.assert_allclose(loaded.preprocess.undo(y)["x"], x, rtol=1e-12)
    np.testing.assert_allclose(loaded.preprocess.log_det(y), -np.log(x.std(0)).sum(), rtol=1e-12)


def test_run_goes_on_where_it_stopped(config, tmp_path):
    whole = start(config, tmp_path / "whole")
    start(config, tmp_path / "parts")
    checkpoint.discard(tmp_path / "parts", 6)  # as if killed after step 4
    parts = start(config, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, parts.state.params, whole.state.params)
    jax.tree.map(np.testing.assert_array_equal, parts.state.ema, whole.state.ema)
    assert parts.best.value == whole.best.value


def test_first_batch_and_batches_are_in_model_units(config, tmp_path):
    seen = []

    def init(key, batch):
        seen.append(batch["x"])
        return {"w": np.zeros(2)}

    def loss(params, key, batch, frozen):
        return ((batch["x"] - params["w"][None]) ** 2).mean() + 0 * frozen["rows"].sum(), {}

    experiment, _ = apps.load_config(config)
    experiment = experiment._replace(
        init=init,
        loss=loss,
        evaluate=None,
        monitor=None,
        picture=None,
        frozen=lambda params, key, batch: {"rows": batch["x"][:1]},
        refresh=lambda params, frozen, key, batch: {"rows": batch["x"][:1]},
    )
    fitted = apps.run(experiment, tmp_path / "w", config_source=CONFIG, progress=False)
    assert seen[0].shape == (16, 2) and np.abs(seen[0]).max() < 4
    assert np.abs(fitted.state.frozen["rows"]).max() < 4
    assert (tmp_path / "w" / "config.py").read_text() == CONFIG


def test_workdir_of_another_config_says_what_differs(config, tmp_path):
    workdir = tmp_path / "run"
    start(config, workdir, steps=2)
    with pytest.raises(ValueError, match=r"another config's: steps is 2 there, 3 here$"):
        start(config, workdir, steps=3)
    line = config.read_text().splitlines().index("    def init(key, batch):") + 1
    config.write_text(
        config.read_text().replace("def init(key, batch):", "def init(key, batch):  # edited")
    )
    with pytest.raises(ValueError, match=rf"config\.py differs from line {line} on"):
        start(config, workdir, steps=2)
    (workdir / "config.json").unlink()
    with pytest.raises(ValueError, match="checkpoints of a run without a config"):
        start(config, workdir, steps=2)
    with pytest.raises(FileNotFoundError, match="is not the workdir of an experiment"):
        apps.load(workdir)


def test_load_before_the_first_checkpoint(config, tmp_path):
    start(config, tmp_path / "run", steps=2)
    checkpoint.discard(tmp_path / "run", 2)
    checkpoint.discard(tmp_path / "run" / "best", 2)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        apps.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("old", "said"),
    [
        (
            "from jflow.train import Experiment",
            "cannot import name 'Experiment' from 'jflow.train'",
        ),
        ("from jflow import fewstep", "cannot import name 'fewstep' from 'jflow'"),
        (
            "from jflow import train\n\ndef config(): return train.Experiment()",
            "has no attribute 'Experiment'",
        ),
        (
            "from jflow import flows\n\ndef config(): return flows.tarflow((4, 4, 1), blocks=2)",
            "argument 'blocks'",
        ),
    ],
)
def test_a_config_of_an_older_jflow_is_told_of_the_table(tmp_path, old, said):
    (tmp_path / "config.py").write_text(old + "\n")
    with pytest.raises((ImportError, AttributeError, TypeError), match=said) as error:
        apps.load_config(tmp_path)
    assert (
        "docs/renames.tsv lists the names that changed since older versions; `python"
        f" docs/rename.py {tmp_path}" in str(error.value)
    )


def test_keys_must_be_json(config, tmp_path):
    experiment, values = apps.load_config(config)
    with pytest.raises(ValueError, match="must hold numbers, strings"):
        apps.run(
            experiment,
            tmp_path / "w",
            config_source=config,
            resolved={**values, "f": len},
            progress=False,
        )
    assert not (tmp_path / "w").exists()


def test_batch_larger_than_the_data(config, tmp_path):
    experiment, values = apps.load_config(config)
    experiment = experiment._replace(batch=51)
    with pytest.raises(ValueError, match="51 is larger than the data: 50"):
        apps.run(experiment, tmp_path / "w", config_source=config, resolved=values, progress=False)


def with_modules(config, name):
    """The config, its model's name from a file beside it by way of another; a third one is imported
    late."""
    folder = config.parent / name
    folder.mkdir()
    (folder / "parts").mkdir()
    (folder / "parts" / "__init__.py").write_text("")
    (folder / "parts" / "names.py").write_text(f"NAME = {name!r}\n")
    (folder / "layers.py").write_text(
        "import parts.names\nfrom parts import names\nassert names is parts.names\n"
    )
    (folder / "late.py").write_text("from layers import names\n")
    text = config.read_text().replace("model=Model()", "model=Model(layers.names.NAME)")
    text = text.replace("import dataclasses\n", "import dataclasses\nimport layers\n")
    late = (
        "def sample(params, key, n):\n        import late\n\n        assert late.names is"
        " layers.names\n"
    )
    (folder / "config.py").write_text(text.replace("def sample(params, key, n):\n", late))
    return folder / "config.py"


def test_a_config_imports_the_files_beside_it_and_no_other_ones(config, tmp_path):
    paths = {name: with_modules(config, name) for name in ("one", "two")}
    loaded = {name: apps.load_config(path)[0] for name, path in paths.items()}
    assert {name: experiment.model.name for name, experiment in loaded.items()} == {
        "one": "one",
        "two": "two",
    }
    assert not {"layers", "parts", "late"} & set(sys.modules)
    assert not list(tmp_path.rglob("__pycache__"))
    start(paths["one"], tmp_path / "run", steps=2)
    kept = {p.relative_to(tmp_path / "run").as_posix() for p in (tmp_path / "run").rglob("*.py")}
    beside = {"layers.py", "late.py", "parts/__init__.py", "parts/names.py"}
    assert kept == {"config.py", *(f"config_imports/{name}" for name in beside)}
    names = paths["one"].parent / "parts" / "names.py"
    names.write_text("NAME = 'other'\n")
    with pytest.raises(ValueError, match=r"config_imports/parts/names\.py differs from line 1 on"):
        start(paths["one"], tmp_path / "run", steps=2)
    shutil.rmtree(paths["one"].parent)
    again = apps.load(tmp_path / "run")
    assert again.model.name == "one"
    assert again.experiment.sample(again.params, jax.random.key(0), 3)["x"].shape == (
        3,
        2,
    )  # which imports late
    (paths["two"].parent / "parts" / "names.py").write_text("import not_there\n")
    with pytest.raises(ImportError, match=r"config\.py: No module named 'not_there'"):
        apps.load_config(paths["two"])


def test_a_damaged_checkpoint_is_told_once(config, tmp_path):
    start(config, tmp_path / "run", steps=4)
    for folder in ("run", "run/best"):
        os.truncate(tmp_path / folder / "checkpoints" / "00000004" / "manifest.json", 9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        apps.load(tmp_path / "run")
        start(config, tmp_path / "run", steps=4)
        apps.load(tmp_path / "run")
    damaged = [str(w.message) for w in caught if "is damaged and passed over" in str(w.message)]
    assert len(damaged) == len(set(damaged)) > 0


def test_what_cannot_be_loaded_is_named(config, tmp_path):
    experiment, values = apps.load_config(config)
    step = train.make_step(experiment.loss, experiment.optimizer)
    rows = data.batches(experiment.data().train, 16, seed=0)
    state = train.init_state(
        experiment.init(jax.random.key(0), next(rows)), experiment.optimizer, jax.random.key(0)
    )
    fitted = train.fit(state, step, rows, steps=1, workdir=tmp_path / "fit", progress=False)
    with pytest.raises(
        FileNotFoundError, match=r"fit is not the workdir of an .*train\.checkpoint\.restore_params"
    ):
        apps.load(tmp_path / "fit")
    shutil.copy(config, tmp_path / "fit" / "config.py")
    file = tmp_path / "fit" / "config.json"
    for text in ('{"values": {', "[]", '{"values": 3}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"{file} is damaged: expected"):
            apps.load(tmp_path / "fit")
    file.write_text(json.dumps({"values": values}))
    checkpoint.save(tmp_path / "fit", 2, fitted.state)
    with pytest.raises(ValueError, match=r"step 2 in .*fit has no preprocess"):
        apps.load(tmp_path / "fit")


def test_one_run_in_a_workdir(config, tmp_path):
    """A run in another context, as another thread is one, finds the workdir taken; its holder may
    enter again."""
    workdir = tmp_path / "run"
    elsewhere = contextvars.Context()
    with lock.hold(workdir):
        said = rf"workdir {workdir} is in use by another run \(pid {os.getpid()} on .*\)"
        with pytest.raises(ValueError, match=said):
            elsewhere.run(start, config, workdir)
        assert [p.name for p in workdir.iterdir()] == [lock.FILE]
        with lock.hold(tmp_path / "link" / ".." / "run"), lock.hold(workdir):
            pass
        with pytest.raises(ValueError, match=said):  # it is still held
            elsewhere.run(start, config, workdir)
    assert not workdir.exists()  # which was made for nothing
    workdir.mkdir()
    (workdir / lock.FILE).write_text("pid 1 on the moon")  # as a killed run leaves it
    start(config, workdir, steps=1)
    assert not (workdir / lock.FILE).exists()


def test_a_lock_that_cannot_be_had_is_a_warning(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", fail)
    with pytest.warns(UserWarning, match=r"cannot lock .*No locks available"):
        with lock.hold(tmp_path):
            pass
