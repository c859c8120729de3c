"""A run that is killed, in processes of their own, ends as one that never stopped: bit for bit.
Meanwhile none can join."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from subprocesses import environment, started

from jflow._core import lock
from jflow.train import checkpoint

WORKER = Path(__file__).with_name("kill_worker.py")


def rows(workdir):
    kept = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in kept]


def test_killed_in_steps_and_in_saves_it_ends_with_the_same_bits(tmp_path):
    whole, tmp_path = tmp_path / "whole", tmp_path / "parts"
    folder = tmp_path / "checkpoints"
    # One thread of the linear algebra's: whoever forks should have no others.
    env = environment(OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_NUM_THREADS="1")
    with started(WORKER, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:

        def interrupt(where, n, number):
            """Train until it holds there, and send the signal. Returns the exit code and the steps
            of checkpoints."""
            print(tmp_path, where, n, file=server.stdin, flush=True)
            held, pid = server.stdout.readline().split()
            assert held == "held"
            with (
                pytest.raises(ValueError, match=rf"in use by another run \(pid {pid} on"),
                lock.hold(tmp_path),
            ):
                pass
            os.kill(int(pid), number)
            return int(server.stdout.readline()), checkpoint.steps(tmp_path)

        def finish(workdir):
            print(workdir, "nowhere", 0, file=server.stdin, flush=True)
            assert int(server.stdout.readline()) == 0

        finish(whole)
        killed = -signal.SIGKILL
        assert interrupt("step", 3, signal.SIGKILL) == (killed, [])
        assert interrupt("step", 9, signal.SIGKILL) == (killed, [6])
        assert rows(tmp_path)[-1]["step"] == 8  # which is to be done again
        assert interrupt("arrays", 12, signal.SIGKILL) == (killed, [6])
        assert list(folder.glob("00000012/params.*tmp*"))
        assert interrupt("manifest", 12, signal.SIGKILL) == (killed, [6])
        left = sorted(path.name for path in (folder / "00000012").iterdir())
        assert left[1:] == ["params", "rest"] and re.fullmatch(
            r"\.manifest\.json\..*\.part", left[0]
        )
        # SIGTERM saves where it stands: from 6 on, in the ninth step.
        assert interrupt("step", 9, signal.SIGTERM) == (128 + signal.SIGTERM, [6, 12, 15])
        assert interrupt("deletion", 6, signal.SIGKILL) == (killed, [12, 15, 18])
        assert (folder / "00000006").exists() and not (tmp_path / "final.npz").exists()
        finish(tmp_path)
    with np.load(whole / "final.npz") as a, np.load(tmp_path / "final.npz") as b:
        assert sorted(a) == sorted(b) and len(a.files) > 10
        for name in a:
            assert a[name].tobytes() == b[name].tobytes(), name
        assert ".frozen['base']['gain']" in a.files
    manifest = json.loads((folder / "00000030" / "manifest.json").read_text())
    assert [leaf for leaf in manifest["leaves"] if "frozen" in leaf] == ["frozen['other']"]
    assert rows(tmp_path) == rows(whole)
    assert checkpoint.steps(tmp_path) == [18, 24, 30] and len(list(folder.iterdir())) == 3
    assert not list(folder.rglob("*tmp*")) and not list(folder.rglob("*.part"))
