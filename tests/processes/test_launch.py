"""The launcher on commands that need no JAX, and `jflow train --mesh`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from subprocesses import LIMIT, environment, started

from jflow.apps import cli
from jflow.apps._launch import _supervise, launch

CONFIG = str(Path(__file__).with_name("processes_config.py"))


FOR_EVER = 3600.0  # seconds: longer than any process here lives


def python(text):
    """A command; the alarm ends what hangs, and is no death that any test expects."""
    return [
        sys.executable,
        "-c",
        (
            f"import os, signal, sys, time\nsignal.alarm({LIMIT})\nme ="
            f" os.environ['JFLOW_PROCESS']\n{text}"
        ),
    ]


def test_all_well(tmp_path):
    text = (
        f"open({str(tmp_path)!r} + '/' + me, 'w').write(os.environ['JFLOW_COORDINATOR'] +"
        " os.environ['XLA_FLAGS'])"
    )
    assert launch(python(text), 3, devices=2) == 0
    seen = {(tmp_path / str(i)).read_text() for i in range(3)}
    assert len(seen) == 1 and seen.pop().endswith("--xla_force_host_platform_device_count=2")


@pytest.mark.parametrize(
    ("death", "status", "said"),
    [
        ("sys.exit(3)", 3, "ended with status 3"),
        ("os.kill(os.getpid(), 9)", 137, "was ended by SIGKILL"),
    ],
)
def test_one_that_dies_ends_the_others(capfd, tmp_path, death, status, said):
    text = f"if me == '1':\n    {death}\nsignal.pause()"  # the others never end by themselves
    assert launch([*python(text), "--workdir", str(tmp_path)], 3, grace=0.01) == status
    err = capfd.readouterr().err
    assert "process 1 of 3 (pid " in err and said in err and "ended process 0, 2 as well" in err
    assert f"There is no checkpoint in {tmp_path}: the same command starts anew." in err


def test_of_two_that_died_between_two_looks_the_killed_one_is_named(capfd):
    jobs = [
        subprocess.Popen([sys.executable, "-c", text])
        for text in ("exit(1)", "import os; os.kill(os.getpid(), 9)")
    ]
    for job in jobs:
        job.wait()
    assert _supervise(jobs, 0.1, [], None) == 137
    assert f"process 1 of 2 (pid {jobs[1].pid}) was ended by SIGKILL" in capfd.readouterr().err


def test_others_that_end_by_themselves_have_their_say(capfd, tmp_path):
    """Process 1 lives until the launcher has seen process 0 dead, which is when the pid is free."""
    os.mkfifo(tmp_path / "pid")
    text = f"""
if me == "0":
    open("{tmp_path}/pid", "w").write(str(os.getpid()))
else:
    first = int(open("{tmp_path}/pid").read())
    try:
        while True:
            os.kill(first, 0)
            time.sleep(0.01)
    except ProcessLookupError:
        pass
# one write each, for the lines of two processes to stay whole
os.write(2, f"mine {{me}}\\n".encode())
sys.exit(2)
"""
    assert launch(python(text), 2, grace=FOR_EVER) == 2
    err = capfd.readouterr().err
    assert "mine 0" in err and "mine 1" in err and "process 0 of 2" in err and "as well" not in err
    assert "goes on from its last checkpoint" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(tmp_path, number):
    """Both processes say goodbye and leave with 128 + number, and so does the launcher."""
    text = (
        f"def leave(*_):\n    open({str(tmp_path)!r} + '/' + me, 'w').close()\n   "
        f" sys.exit({128 + number})\nsignal.signal({int(number)}, leave)\nos.write(1,"
        " b'ready\\n')\nsignal.pause()"
    )
    command = [
        "-m",
        "jflow.apps.cli",
        "launch",
        "--processes",
        "2",
        "--grace",
        FOR_EVER,
        "--",
        *python(text),
    ]
    with started(
        *command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as job:
        assert "1 is pid" in job.stderr.readline()  # it knows of both
        assert [job.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        job.send_signal(number)
        _, err = job.communicate()
    assert job.returncode == 128 + number and "error" not in err
    assert "; to go on, give the same command: jflow launch --processes 2" in err
    assert sorted(os.listdir(tmp_path)) == ["0", "1"]


def test_mistakes():
    with pytest.raises(ValueError, match="at least 1, got 0 and None"):
        launch(["true"], 0)
    with pytest.raises(ValueError, match="no command"):
        launch([], 2)
    with pytest.raises(FileNotFoundError):
        launch(["/no/such/program"], 2)


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("data=many", "--mesh: expected axes such as data=2,model=4, got 'data=many'"),
        ("data", "expected key=value, got 'data'"),
        ("data=3", "a mesh of {'data': 3} does not take 1 devices"),
    ],
)
def test_bad_meshes(tmp_path, capsys, mesh, said):
    assert (
        cli.main(["train", CONFIG, "--workdir", str(tmp_path / "w"), "--mesh", mesh, "steps=2"])
        == 2
    )
    assert said in capsys.readouterr().err and not (tmp_path / "w").exists()


def test_train_on_a_mesh(tmp_path):
    losses = []
    for name, mesh in (("one", []), ("mesh", ["--mesh", "data=-1"])):
        assert (
            cli.main(
                ["train", CONFIG, "--workdir", str(tmp_path / name), "steps=2", "--quiet", *mesh]
            )
            == 0
        )
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2
