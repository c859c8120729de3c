"""Two processes of four fake devices each, and one of eight: what `processes_worker.py` saw; and a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import jflow
from jflow.train import checkpoint

WORKER = Path(__file__).with_name("processes_worker.py")
CONFIG = Path(__file__).with_name("processes_config.py")
LAUNCH = [sys.executable, "-m", "jflow.cli", "launch", "--processes", "2", "--devices", "4", "--"]
# Float32: sums over rows are taken in another order on other devices, and Adam's division widens it.
CLOSE = {"rtol": 1e-5}


def environment(**more):
    path = os.pathsep.join(filter(None, [str(Path(jflow.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **more}


def run(command, **more):
    done = subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def interrupted(folder, send):
    """Train until there is a checkpoint, then send(launcher, its stderr); the launcher's status, stderr and seconds."""
    command = [*LAUNCH, sys.executable, "-m", "jflow.cli", "train", CONFIG, "--workdir", folder, "pause=0.1"]
    with open(folder.with_suffix(".log"), "w+") as log:
        launcher = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
        until = time.monotonic() + 240
        while not checkpoint.steps(folder):
            assert launcher.poll() is None and time.monotonic() < until, folder.with_suffix(".log").read_text()
            time.sleep(0.02)
        send(launcher, folder.with_suffix(".log").read_text())
        sent = time.monotonic()
        status = launcher.wait(timeout=120)
    return status, folder.with_suffix(".log").read_text(), time.monotonic() - sent


def kill_process_1(launcher, log):
    os.kill(int(re.search(r"1 is pid (\d+)", log)[1]), signal.SIGKILL)


def terminate_all(launcher, log):
    launcher.send_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    out = {"folder": folder, "first": run([*LAUNCH, sys.executable, WORKER, "first", folder])}
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    out["one"] = run([sys.executable, WORKER, "one", folder], **eight)
    for name, send in (("killed", kill_process_1), ("terminated", terminate_all)):
        out[name] = interrupted(folder / name, send)
        out[f"{name}_at"] = checkpoint.steps(folder / name)[-1]
    out["terminated_rows"] = len((folder / "terminated" / "metrics.jsonl").read_text().splitlines())
    out["again"] = run([*LAUNCH, sys.executable, WORKER, "again", folder])
    return out


def test_two_processes_have_the_losses_of_one(seen):
    two, one = seen["first"]["losses"], seen["one"]["losses"]
    assert seen["again"]["devices"] == 8 and len(two) == 12
    np.testing.assert_allclose(two, one, **CLOSE)
    assert len(set(np.round(two, 3))) == 12  # the training moves


@pytest.mark.parametrize("where", ["on_8", "on_4", "on_1"])
def test_checkpoint_of_two_processes_goes_on_anywhere(seen, where):
    np.testing.assert_allclose(seen["one"][where], seen["one"]["losses"], **CLOSE)
    assert checkpoint.steps(seen["folder"] / where) == [4, 8, 12]


def test_checkpoint_of_one_process_goes_on_in_two(seen):
    np.testing.assert_allclose(seen["again"]["from_one"], seen["one"]["losses"], **CLOSE)


def test_process_0_alone_writes_metrics_and_pictures(seen):
    folder = seen["folder"] / "two"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if "eval/loss" in row] == [8, 12]
    assert [row["loss"] for row in rows] == seen["first"]["losses"]
    assert len(list((folder / "pictures").iterdir())) == 2
    assert checkpoint.steps(folder) == [4, 8, 12] and checkpoint.latest(folder / "best") is not None


def test_each_process_reads_its_share(seen):
    """The worker's process 0: of rows over eight devices, over two groups of four, over none, over all axes."""
    assert seen["first"]["shares"] == [[0, 2], [0, 2], [0, 1], [0, 2]]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("config", "the processes disagree on key 'width': 32 in process 0, 64 in process 1"),
        ("steps", "the processes disagree on steps: 2 in process 0, 3 in process 1"),
        (
            "state",
            "the processes disagree on the state: params/w float32[2, 2] in process 0, params/w float32[2, 3] in process 1",
        ),
        ("batch", "the processes disagree on the batch: x float32[8, 2]"),
        ("step", "the processes disagree on the program of the step: "),
        ("rows", "batch 'x' of shape [2, 2] here does not divide over the mesh {'data': 8}"),
    ],
)
def test_what_processes_disagree_on_is_named(seen, what, said):
    assert seen["first"]["errors"][what].startswith(said)
    assert seen["first"]["errors"]["agreed"] is None and not seen["first"]["errors"]["never"]


def test_a_killed_process_ends_the_job_which_goes_on_to_the_same_bits(seen):
    status, log, seconds = seen["killed"]
    assert status == 128 + signal.SIGKILL and seconds < 60  # the grace is 5 s; the rest is a loaded machine's
    said = re.search(r"jflow launch: error: process 1 of 2 \(pid \d+\) was ended by SIGKILL.* is of step (\d+)", log)
    assert int(said[1]) == seen["killed_at"] < 12
    check_end(seen, "killed")


def test_sigterm_to_all_saves_the_step_that_was_reached_and_goes_on_to_the_same_bits(seen):
    status, log, seconds = seen["terminated"]
    assert status == 128 + signal.SIGTERM and seconds < 60
    assert seen["terminated_at"] == seen["terminated_rows"] < 12  # no step that was logged is lost
    check_end(seen, "terminated")


def check_end(seen, name):
    assert seen["again"][name] == seen["first"]["losses"]
    for ema in (False, True):
        a, b = (checkpoint.restore_params(seen["folder"] / run, 12, ema) for run in ("two", name))
        for leaf in ("in", "layers", "out"):
            assert np.asarray(a[leaf]).tobytes() == np.asarray(b[leaf]).tobytes()
