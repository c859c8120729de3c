"""A run that is killed, in processes of their own, ends as one that never stopped: bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import jflow
from jflow.train import checkpoint

WORKER = Path(__file__).with_name("kill_worker.py")


def spawn(workdir):
    path = os.pathsep.join(filter(None, [str(Path(jflow.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, WORKER, workdir], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(workdir, number=None, batches=0, wait=0.0):
    """Let it draw so many batches, wait, and send the signal; or let it end. Returns the exit code."""
    worker = spawn(workdir)
    if number is not None:
        for _ in range(batches):
            assert worker.stdout.readline() == "batch\n"
        time.sleep(wait)
        worker.send_signal(number)
    _, errors = worker.communicate(timeout=120)
    assert worker.returncode in (0, -signal.SIGKILL, 128 + signal.SIGTERM), errors
    return worker.returncode


def rows(workdir):
    kept = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in kept]


def test_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    whole, tmp_path = tmp_path / "whole", tmp_path / "parts"
    never_stops = spawn(whole)  # meanwhile
    rng = np.random.default_rng(0)
    # Before the first checkpoint; twice after one or two more, in a step or in a save (which takes about as long as the
    # six steps between two of them); and once by SIGTERM, which saves where it stands.
    assert run(tmp_path, signal.SIGKILL, 3) == -signal.SIGKILL
    assert checkpoint.steps(tmp_path) == []
    for _ in range(2):
        assert run(tmp_path, signal.SIGKILL, int(rng.integers(8, 14)), rng.uniform(0, 0.1)) == -signal.SIGKILL
    reached = checkpoint.latest(tmp_path)
    assert 0 < reached < 90
    assert run(tmp_path, signal.SIGTERM, 2) == 128 + signal.SIGTERM
    assert reached < checkpoint.latest(tmp_path) < 90
    assert not (tmp_path / "final.npz").exists()
    assert run(tmp_path) == 0
    _, errors = never_stops.communicate(timeout=120)
    assert never_stops.returncode == 0, errors
    with np.load(whole / "final.npz") as a, np.load(tmp_path / "final.npz") as b:
        assert sorted(a) == sorted(b) and len(a.files) > 10
        for name in a:
            assert a[name].tobytes() == b[name].tobytes(), name
    assert rows(tmp_path) == rows(whole)
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))
