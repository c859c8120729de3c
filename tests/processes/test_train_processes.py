"""Two processes of four fake devices each, and one of eight: what `processes_worker.py` saw; and a
kill."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from subprocesses import environment, started

from jflow.apps._launch import launch
from jflow.train import checkpoint

WORKER = Path(__file__).with_name("processes_worker.py")
CONFIG = Path(__file__).with_name("processes_config.py")
# Float32: sums over rows are taken in another order on other devices, and Adam's division widens
# it.
CLOSE = {"rtol": 1e-5}
# They train the same: smaller programs, too, are compiled once for all of them.
SHARED = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}


def two_processes(folder):
    """What the worker does in two processes of four devices."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(**SHARED).items():
            patch.setenv(name, value)
        assert launch([sys.executable, str(WORKER), "two", str(folder)], 2, devices=4) == 0


def interrupted(folder, where, count, grace, send):
    """Train by the command line until `count` processes hold, then send(launcher, their pids).

    Returns the launcher's status, its stderr and the pids.
    """
    launcher = [
        "-m",
        "jflow.apps.cli",
        "launch",
        "--processes",
        "2",
        "--devices",
        "4",
        "--grace",
        grace,
        "--",
    ]
    job = [sys.executable, "-m", "jflow.apps.cli", "train", CONFIG, "--workdir", folder, "--quiet"]
    log = folder.with_suffix(".log")
    with open(log, "w") as err:
        with started(
            *launcher,
            *job,
            env=environment(HOLD=where, **SHARED),
            stdout=subprocess.PIPE,
            stderr=err,
        ) as process:
            pids = {}
            while len(pids) < count:
                line = process.stdout.readline()
                assert line, log.read_text()
                if found := re.search(
                    r"held: process (\d), pid (\d+)\n", line
                ):  # Gloo says things, too
                    pids[int(found[1])] = int(found[2])
            send(process, pids)
            process.communicate()
    return process.returncode, log.read_text(), pids


def kill_process_1(launcher, pids):
    os.kill(pids[1], signal.SIGKILL)


def terminate_all(launcher, pids):
    launcher.send_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    out = {"folder": folder}
    # Process 0 goes on into the step that process 1 holds before: it waits there for a peer that
    # dies. It may end by itself of that, or be ended: the grace is short.
    out["killed"] = interrupted(folder / "killed", "7:1", 1, 0.01, kill_process_1)
    # A long grace, for each to save and leave however slow it is.
    out["terminated"] = interrupted(folder / "terminated", "7", 2, 3600.0, terminate_all)
    for name in ("killed", "terminated"):
        out[f"{name}_at"] = checkpoint.steps(folder / name)
    out["terminated_rows"] = len((folder / "terminated" / "metrics.jsonl").read_text().splitlines())
    # One process leaves a checkpoint for two, and goes on from theirs; all start once, for that is
    # most of the cost.
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    log = folder / "one.log"
    with (
        open(log, "w") as err,
        started(WORKER, "one", folder, env=environment(8, **SHARED), stderr=err, **pipes) as one,
    ):
        assert one.stdout.readline() == "cut\n", log.read_text()
        two_processes(folder)
        one.communicate("\n")
    assert one.returncode == 0, log.read_text()
    return out | {
        name: json.loads((folder / f"{name}.json").read_text()) for name in ("one", "two")
    }


def test_two_processes_have_the_losses_of_one(seen):
    two, one = seen["two"]["losses"], seen["one"]["losses"]
    assert seen["two"]["devices"] == 8 and len(two) == 12
    np.testing.assert_allclose(two, one, **CLOSE)
    assert len(set(np.round(two, 3))) == 12  # the training moves


@pytest.mark.parametrize("where", ["on_8", "on_4", "on_1"])
def test_checkpoint_of_two_processes_goes_on_anywhere(seen, where):
    np.testing.assert_allclose(seen["one"][where], seen["one"]["losses"], **CLOSE)
    assert checkpoint.steps(seen["folder"] / where) == [4, 8, 12]


def test_checkpoint_of_one_process_goes_on_in_two(seen):
    np.testing.assert_allclose(seen["two"]["from_one"], seen["one"]["losses"], **CLOSE)


def test_process_0_alone_writes_metrics_and_pictures(seen):
    folder = seen["folder"] / "two"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if "eval/loss" in row] == [8, 12]
    assert [row["loss"] for row in rows] == seen["two"]["losses"]
    assert len(list((folder / "pictures").iterdir())) == 2
    assert checkpoint.steps(folder) == [4, 8, 12] and checkpoint.latest(folder / "best") is not None


def test_each_process_reads_its_share(seen):
    """The worker's process 0: of rows over eight devices, over two groups of four, over none, over
    all axes."""
    assert seen["two"]["shares"] == [[0, 2], [0, 2], [0, 1], [0, 2]]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("config", "the processes disagree on key 'width': 32 in process 0, 64 in process 1"),
        ("steps", "the processes disagree on steps: 2 in process 0, 3 in process 1"),
        (
            "state",
            (
                "the processes disagree on the state: params/w float32[2, 2] in process 0, params/w"
                " float32[2, 3] in process 1"
            ),
        ),
        ("batch", "the processes disagree on the batch: x float32[8, 2]"),
        ("step", "the processes disagree on the program of the step: "),
        ("rows", "batch 'x' of shape [2, 2] here does not divide over the mesh {'data': 8}"),
    ],
)
def test_what_processes_disagree_on_is_named(seen, what, said):
    assert seen["two"]["errors"][what].startswith(said)
    assert seen["two"]["errors"]["agreed"] is None and not seen["two"]["errors"]["never"]


def test_a_killed_process_ends_the_job_which_goes_on_to_the_same_bits(seen):
    status, log, pids = seen["killed"]
    assert status == 128 + signal.SIGKILL and f"1 is pid {pids[1]}\n" in log
    said = (
        rf"jflow launch: error: process 1 of 2 \(pid {pids[1]}\) was ended by SIGKILL.* is of step"
        r" 4: the same command"
    )
    assert re.search(said, log) and seen["killed_at"] == [4]
    check_end(seen, "killed")


def test_sigterm_to_all_saves_the_step_that_was_reached_and_goes_on_to_the_same_bits(seen):
    status, log, _ = seen["terminated"]
    assert status == 128 + signal.SIGTERM and "error" not in log
    assert (
        seen["terminated_at"] == [4, 7] and seen["terminated_rows"] == 7
    )  # no step that was logged is lost
    check_end(seen, "terminated")


def check_end(seen, name):
    assert seen["two"][name] == seen["two"]["losses"]
    for ema in (False, True):
        a, b = (checkpoint.restore_params(seen["folder"] / run, 12, ema) for run in ("two", name))
        for leaf in ("in", "layers", "out"):
            assert np.asarray(a[leaf]).tobytes() == np.asarray(b[leaf]).tobytes()
