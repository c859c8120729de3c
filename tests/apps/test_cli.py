import contextvars
import csv
import errno
import inspect
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from subprocesses import environment, run_python

import jflow
from jflow import apps
from jflow._core import lock
from jflow.apps import cli
from jflow.apps.configs.table import config as train_table
from jflow.nets import _fields

CONFIG = '''"""A normal for the moons: the least that trains."""

import itertools
import signal

import jax.numpy as jnp
import numpy as np
import optax

from jflow import data, distributions, losses
from jflow.apps import Experiment


def config(*, rate=0.05, steps=12, batch=16, wide=(8, 8), explode=False, pictures=True, stop=""):
    """
    Args:
        rate: of Adam,
            at all times
        batch (int): rows of an update
    """
    model = distributions.diagonal_normal((2,))
    nll = losses.nll(model)

    def loss(params, key, batch, frozen=None):
        value, metrics = nll(params, key, {"x": batch["x"]})
        return value + (jnp.nan if explode else 0.0), metrics

    calls = itertools.count()

    def apply(state, rows, rng):
        if stop and rng is not None and next(calls) == 3:  # the first is for init
            signal.raise_signal(getattr(signal, stop))
        return data.standardize().apply(state, rows, rng)

    def sample(params, key, n, *, label=None):
        cond = jnp.full(n, -1 if label is None else label)
        return {"x": model.sample(params, key, n), "cond": cond}

    def evaluate(params, state, key, splits):
        rows = data.standardize().apply(state, splits.test, None)
        return {"nll": -model.log_prob(params, jnp.asarray(rows["x"])).mean()}

    return Experiment(
        model=model,
        init=lambda key, batch: model.init(key, jnp.asarray(batch["x"])),
        loss=loss,
        optimizer=optax.adam(rate),
        data=lambda: data.split(data.moons(100, 0), test=0.2),
        preprocess=data.standardize()._replace(apply=apply),
        steps=steps,
        batch=batch,
        sample=sample,
        evaluate=evaluate,
        picture=(lambda rows: np.full((len(rows["x"]), 2, 3), 7, np.uint8)) if pictures else None,
        save_every=6,
        ema=0.9,
    )
'''


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "config.py").write_text(CONFIG)
    assert cli.main(["train", str(folder), "--workdir", str(folder / "run"), "--quiet"]) == 0
    return folder


def tree(folder: Path) -> dict[str, int]:
    """Every path below a folder, and when it was last written."""
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()
    }


def refused(capsys, argv, status: int) -> str:
    """The one line that a refused command prints."""
    assert cli.main([str(a) for a in argv]) == status
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "step/s" not in line]
    assert len(lines) == 1 and lines[0].startswith("jflow: error: "), err
    return lines[0]


def test_train_says_what_it_did_and_takes_keys_anywhere(tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    run = tmp_path / "run"
    argv = [
        "train",
        tmp_path / "config.py",
        "rate=0.1",
        "--workdir",
        run,
        "wide=[4,4]",
        "steps=5",
        "--quiet",
    ]
    assert cli.main([str(a) for a in argv]) == 0
    assert capsys.readouterr().out == ""
    values = json.loads((run / "config.json").read_text())["values"]
    assert (values["rate"], values["wide"], values["steps"], values["batch"]) == (
        0.1,
        [4, 4],
        5,
        16,
    )
    assert cli.main([str(a) for a in argv[:-1]]) == 0  # nothing is left to do
    assert f"{run}: step 5" in capsys.readouterr().out


def test_sample_npz(trained):
    out = trained / "s.npz"
    base = ["sample", str(trained / "run"), "--out", str(out), "--quiet", "--batch", "4"]
    assert cli.main([*base, "--num", "10", "--label", "3"]) == 0
    with np.load(out) as z:
        x, cond = z["x"], z["cond"]
    assert x.shape == (10, 2) and cond.tolist() == [3] * 10
    assert cli.main([*base, "--num", "7"]) == 0  # chunks do not depend on how many follow
    with np.load(out) as z:
        np.testing.assert_array_equal(z["x"], x[:7])
    assert cli.main([*base, "--num", "7", "--seed", "1"]) == 0
    with np.load(out) as z:
        assert not np.any(z["x"] == x[:7])
    assert cli.main([*base, "--num", "7", "--no-ema"]) == 0
    with np.load(out) as z:
        assert not np.any(z["x"] == x[:7])


def test_samples_are_in_the_units_of_the_data(trained):
    from jflow import data

    assert (
        cli.main(
            [
                "sample",
                str(trained / "run"),
                "--out",
                str(trained / "m.npz"),
                "--num",
                "4000",
                "--quiet",
            ]
        )
        == 0
    )
    with np.load(trained / "m.npz") as z:
        x = z["x"]
    rows = data.moons(100, 0)["x"]
    # 100 rows against the normal fitted to 80 of them: a tenth of a standard deviation or so
    np.testing.assert_allclose(x.mean(0), rows.mean(0), atol=0.3 * rows.std(0).max())
    np.testing.assert_allclose(x.std(0), rows.std(0), rtol=0.3)


def test_sample_csv_and_png(trained):
    run = str(trained / "run")
    assert (
        cli.main(
            [
                "sample",
                run,
                "--num",
                "5",
                "--out",
                str(trained / "s.csv"),
                "--batch",
                "2",
                "--quiet",
            ]
        )
        == 0
    )
    with open(trained / "s.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["x_0", "x_1", "cond"] and len(rows) == 6
    assert (
        cli.main(
            [
                "sample",
                run,
                "--num",
                "5",
                "--out",
                str(trained / "s.png"),
                "--batch",
                "2",
                "--quiet",
            ]
        )
        == 0
    )
    image = np.asarray(Image.open(trained / "s.png"))
    assert image.shape == (5, 2, 3) and (image == 7).all()  # all five rows reach the picture


def test_evaluate(trained, capsys):
    assert cli.main(["evaluate", str(trained / "run")]) == 0
    written = json.loads((trained / "run" / "evaluation.json").read_text())
    assert (
        written["step"] == 12 and 2 < written["nll"] < 4
    )  # a standard normal on its own data has 2.84
    said, wrote = capsys.readouterr().out.splitlines()
    assert said.split() == ["nll", f"{written['nll']:.6g}", "smaller", "is", "better"]
    assert wrote == f"wrote {trained / 'run' / 'evaluation.json'}"
    assert cli.main(["evaluate", str(trained / "run"), "--step", "6"]) == 0
    assert json.loads((trained / "run" / "evaluation.json").read_text())["step"] == 6


def test_mistakes_are_one_line_and_leave_nothing(trained, capsys):
    run, out = trained / "run", trained / "x.npz"
    (trained / "plain.py").write_text("print()")
    (trained / "broken.py").write_text("def config(:")
    (trained / "empty").mkdir()
    (trained / "loose" / "checkpoints" / "00000001").mkdir(parents=True)
    train, fresh = ["train", trained / "config.py"], ["--workdir", trained / "fresh", "--quiet"]
    sample = ["sample", run, "--num", 4, "--out"]
    table = trained / "t.csv"
    table.write_text("x,y\n" + "".join(f"{i},{i * i % 17}\n" for i in range(30)))
    fit = ["fit", table, "--out", trained / "fresh", "--quiet"]
    before = tree(trained)
    for argv, said in [
        (["sing"], "sing"),
        ([], "COMMAND"),
        ([*train, "--quiet"], "--workdir"),
        ([*train, "--bright", *fresh], "--bright"),
        ([*train, *fresh, "raet=0.1"], "did you mean 'rate'"),
        ([*train, *fresh, "rate"], "expected key=value, got 'rate'"),
        ([*train, *fresh, "rate=fast"], "'rate'"),
        ([*train, *fresh, "steps=5", "steps=6"], "given twice"),
        ([*train, *fresh, "batch=81"], "batch of 81 is larger than the data: 80 rows"),
        (
            [*train, *fresh, "batch=0"],
            "key 'batch': expected a whole number of at least 1, got '0'",
        ),
        ([*train, *fresh, "steps=-1"], "key 'steps'"),
        (
            [*train, *fresh, "explode=perhaps"],
            "key 'explode': expected bool (true or false), got 'perhaps'",
        ),
        ([*train, *fresh, "rate=inf"], "key 'rate'"),
        ([*train, *fresh, "--mesh", "data=0"], "{'data': 0}"),
        ([*train, "--workdir", "~nobody-of-this-name/run"], "no such home folder"),
        ([*train, "--workdir", run, "rate=0.2", "--quiet"], "rate is 0.05 there, 0.2 here"),
        ([*train, "--workdir", table, "--quiet"], "t.csv"),
        (["train", trained / "none.py", *fresh], "none.py"),
        (["train", trained / "plain.py", *fresh], "no function config"),
        (
            ["sample", trained / "empty", "--num", 4, "--out", out],
            "not the workdir of an experiment",
        ),
        (
            ["sample", trained / "loose", "--num", 4, "--out", out],
            "not the workdir of an experiment",
        ),
        (["sample", trained / "none", "--num", 4, "--out", out], "none"),
        (
            ["sample", run, "--num", 0, "--out", out],
            "--num: expected a whole number of at least 1, got '0'",
        ),
        (["sample", run, "--num", "many", "--out", out], "--num"),
        ([*sample, out, "--batch", 0], "--batch: expected a whole number of at least 1"),
        ([*sample, out, "--steps", -1], "--steps: expected a whole number of at least 1"),
        ([*sample, out, "--guidance", "nan"], "--guidance: expected a finite number, got 'nan'"),
        ([*sample, out, "--guidance=-inf"], "--guidance: expected a finite number"),
        ([*sample, out, "--seed", "1.5"], "--seed: expected a whole number from 0"),
        (["evaluate", run, "--seed", -1], "--seed: expected a whole number from 0"),
        (
            ["launch", "--processes", 0, "--", "true"],
            "--processes: expected a whole number of at least 1",
        ),
        ([*sample, trained / "x.gif"], ".png, .npz, .csv"),
        ([*sample, trained / "none" / "x.npz"], "cannot write"),
        ([*sample, table / "x.npz"], "cannot write"),
        ([*sample, out, "--guidance", 2], "takes no guidance; its options are: label"),
        ([*sample, out, "--step", 7], "no checkpoint of step 7"),
        (["evaluate", trained / "empty"], "not the workdir"),
        (["fit", trained / "none.csv", "--out", trained / "fresh"], "none.csv"),
        ([*fit, "wdith=3"], "did you mean 'width'"),
        ([*fit, "low=1,2"], "'low' is found from the table"),
        ([*fit, "drop=z"], "no column 'z'"),
    ]:
        line = refused(capsys, argv, 2)
        assert said in line, (argv, line)
        assert tree(trained) == before, argv
        assert not (trained / "fresh").exists()
    # a config that Python refuses is named by the kind of mistake
    assert "SyntaxError" in refused(capsys, ["train", trained / "broken.py", *fresh], 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the table is empty"),
        ("x,y\n", "no rows"),
        ("x,y\n1,2\n", "one row"),
        ("x,y\n" + "1,2\n3,2\n" * 20, "column 'y' is constant: 2 in every row"),
        (
            "x,y\n" + "".join(f"{i},{i * i}\n" for i in range(20)) + "7,wet\n",
            "column 'y' line 22 holds 'wet'",
        ),
        ("x,y\n1,2\n3,4\n5,7\n", "3 rows; a fit needs at least 10"),
    ],
)
def test_tables_that_cannot_be_fitted(tmp_path, capsys, text, said):
    (tmp_path / "t.csv").write_text(text)
    line = refused(capsys, ["fit", tmp_path / "t.csv", "--out", tmp_path / "run", "--quiet"], 2)
    assert said in line
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_a_failed_sample_leaves_the_old_file(trained, capsys):
    out = trained / "old.npz"
    out.write_bytes(b"precious")
    refused(capsys, ["sample", trained / "run", "--num", 4, "--out", out, "--steps", 3], 2)
    assert out.read_bytes() == b"precious"
    assert not list(trained.glob(".old*"))


def test_debug_shows_the_traceback(trained, capsys):
    assert (
        cli.main(["sample", str(trained / "run"), "--num", "0", "--out", "x.npz", "--debug"]) == 2
    )
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("jflow: error: argument --num")


def test_a_loss_that_is_not_finite_is_a_failed_run(tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    line = refused(
        capsys, ["train", tmp_path, "--workdir", tmp_path / "run", "explode=True", "--quiet"], 1
    )
    assert "not finite at step 1" in line and "loss=nan" in line


def test_pictures_need_a_painter(tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    assert (
        cli.main(
            [
                "train",
                str(tmp_path),
                "--workdir",
                str(tmp_path / "run"),
                "pictures=False",
                "--quiet",
            ]
        )
        == 0
    )
    assert ".npz" in refused(
        capsys, ["sample", tmp_path / "run", "--num", 2, "--out", tmp_path / "a.png"], 2
    )


def test_params_of_another_model_are_refused(tmp_path, trained, capsys):
    """A workdir whose checkpoints came from elsewhere."""
    (tmp_path / "config.py").write_text(CONFIG.replace("(2,)", "(3,)"))
    (tmp_path / "config.json").write_text((trained / "run" / "config.json").read_text())
    (tmp_path / "checkpoints").symlink_to(trained / "run" / "checkpoints")
    line = refused(capsys, ["sample", tmp_path, "--num", 2, "--out", tmp_path / "a.npz"], 2)
    assert "3" in line and not (tmp_path / "a.npz").exists()


LIMITED = """import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from jflow.apps import cli
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("command", ["sample", "train"])
def test_a_full_disk(tmp_path, trained, command):
    """Files may grow to 20 kB: the write fails half way, says so, and leaves nothing."""
    (tmp_path / "config.py").write_text(CONFIG)
    argv = {
        "sample": ["sample", trained / "run", "--num", "100000", "--out", tmp_path / "a.npz"],
        "train": ["train", tmp_path, "--workdir", tmp_path / "run", "--quiet"],
    }[command]
    limit = {"sample": 20_000, "train": 200}[command]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *map(str, argv)],
        capture_output=True,
        text=True,
        env=environment(
            PYTHONDONTWRITEBYTECODE="1", JAX_ENABLE_COMPILATION_CACHE="false"
        ),  # which would be written to
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("jflow: error: cannot write") and done.stderr.count("\n") == 1, (
        done.stderr
    )
    assert [p.name for p in tmp_path.iterdir()] == ["config.py"]


def test_a_full_disk_in_words_of_other_libraries(capsys, monkeypatch):
    def fail(args):
        raise ExceptionGroup(
            "unhandled errors in a task group (1 sub-exception)", [ValueError("x"), full]
        )

    full = OSError(errno.ENOSPC, "No space left on device", "/runs/x/params")
    monkeypatch.setattr(cli, "evaluate", fail)
    fail.__name__ = "evaluate"
    assert (
        refused(capsys, ["evaluate", "x"], 1)
        == "jflow: error: /runs/x/params: No space left on device"
    )


def test_a_workdir_in_use_is_left_alone(trained, capsys):
    argv = ["train", trained / "config.py", "--workdir", trained / "taken", "--quiet"]
    with lock.hold(trained / "taken"):
        (trained / "taken" / "begun").write_text("by the first run, before its first checkpoint")
        line = contextvars.Context().run(refused, capsys, argv, 2)
        assert "taken is in use by another run (pid " in line
        assert (trained / "taken" / "begun").exists()


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_says_what_is_saved_and_how_to_go_on(tmp_path, capsys, name, status):
    (tmp_path / "config.py").write_text(CONFIG)
    run = tmp_path / "run"
    argv = ["train", str(tmp_path), "--workdir", str(run), "--quiet", "wide=4, 4", f"stop={name}"]
    before = {
        number: signal.signal(number, signal.default_int_handler)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        try:
            ended = cli.main(argv)
        except SystemExit as end:
            ended = end.code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended == status
    saved, resumed = capsys.readouterr().err.splitlines()
    assert saved == f"jflow: {name}: step 3 is saved in {run}; the same call goes on from there"
    assert resumed.endswith(
        f"jflow train {tmp_path} --workdir {run} --quiet 'wide=4, 4' stop={name}"
    )


HELP = """import contextlib, io, sys
from jflow.apps import cli

out = io.StringIO()
commands = ["train", "launch", "sample", "evaluate", "score", "fit"]
asked = [["--version"], ["--help"], *([c, "--help"] for c in commands)]
asked += [["train", sys.argv[1], "--help"]]
for argv in asked:
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main(argv)
        raise AssertionError(argv)
    out.write("---")
heavy = {"jax", "flax", "numpy", "pandas"} & set(sys.modules)
assert not heavy, heavy
import jflow
assert {"flows", "velocity"} <= set(dir(jflow))
print(out.getvalue(), end="")
"""


def test_help_and_version_need_no_jax(trained, tmp_path):
    (tmp_path / "help.py").write_text(HELP)
    assert jflow.velocity is _fields.velocity and jflow.load is apps.load and jflow.kernels
    with pytest.raises(AttributeError, match="module 'jflow' has no attribute 'flowz'"):
        jflow.flowz  # noqa: B018
    version, own, *commands, train, _ = run_python(tmp_path / "help.py", trained).stdout.split(
        "---"
    )
    assert version == f"jflow {jflow.__version__}\n" and "usage: jflow [-h]" in own
    for name, text in zip(
        ["train", "launch", "sample", "evaluate", "score", "fit"], commands, strict=True
    ):
        assert f"usage: jflow {name}" in text and f"  jflow {name} " in text  # an example
    table = inspect.signature(train_table).parameters
    found = {"table", "fingerprint", "codes", "numbers", "low", "high", "order", "eval_every"}
    for name in set(table) - found:  # which the command finds out
        kind, default, about = re.search(
            rf"\n  {name}: (.+) = (.+)\n      (\w.+)\n", commands[-1]
        ).groups()
        assert eval(default) == table[name].default and kind == inspect.formatannotation(
            table[name].annotation
        )
    assert "\n  fingerprint" not in commands[-1]
    assert (
        "\n  rate: float = 0.05\n      of Adam, at all times\n  steps: int = 12\n  batch: int ="
        " 16\n      rows of" in train
    )


def test_the_findings_of_a_table_keep_their_lines(tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "1,x\n" * 20)
    assert cli.main(["fit", str(path), "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  column 'a' is constant: 1 in every row",
        "  column 'b' is constant: 'x' in every row",
        "Leave them out with drop=a,b",
    ]
