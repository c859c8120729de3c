"""Start the processes of one job on this machine, and end them all when one dies.

A process whose peer has died waits in a collective until its runtime aborts it in C++, minutes
later, where Python can
catch nothing: somebody has to watch from outside.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from jflow._core.environment import COORDINATOR, COUNT, INDEX
from jflow._core.files import expand

POLL = 0.05  # seconds


def launch(
    command: Sequence[str],
    processes: int,
    *,
    devices: int | None = None,
    workdir: str | Path | None = None,
    grace: float = 5.0,
) -> int:
    """Run `command` in so many processes that find each other by `train.initialize()`. Returns the
    job's exit status.

    devices: fake CPU devices for each, to try a job out without accelerators.
    workdir: where to look for the last checkpoint when the job fails (None: what the command has as
    --workdir).
    grace: seconds that the others are given to end by themselves, with a message of their own,
    after the first has died.

    The pids of the processes go to stderr. 0 when all end well. When one dies, the others are
    killed and stderr names it, its exit status or signal and the checkpoint that the same command
    goes on from; the status is that of the first that died (of several at once, one that a signal
    ended), 128 + n for signal n. SIGTERM and SIGINT are passed on to all, which save and leave.
    """
    if processes < 1 or (devices is not None and devices < 1):
        raise ValueError(
            f"expected processes and devices of at least 1, got {processes} and {devices}"
        )
    if not command:
        raise ValueError("there is no command to launch")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    jobs: list[subprocess.Popen] = []
    try:
        with _passed_on(jobs) as caught:
            for i in range(processes):
                env = {**os.environ, COORDINATOR: address, COUNT: str(processes), INDEX: str(i)}
                if devices is not None:
                    flags = (
                        f"{env.get('XLA_FLAGS', '')}"
                        f" --xla_force_host_platform_device_count={devices}"
                    )
                    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
                # A session of their own: Ctrl-C reaches them once, by way of the launcher.
                jobs.append(subprocess.Popen(list(command), env=env, start_new_session=True))
            pids = ", ".join(f"{i} is pid {job.pid}" for i, job in enumerate(jobs))
            print(f"jflow launch: process {pids}", file=sys.stderr, flush=True)
            return _supervise(
                jobs, grace, caught, _workdir(command) if workdir is None else expand(workdir)
            )
    finally:
        for job in jobs:
            if job.poll() is None:
                job.kill()
                job.wait()


def _supervise(
    jobs: list[subprocess.Popen], grace: float, caught: list[int], workdir: Path | None
) -> int:
    def dead():
        return [i for i, job in enumerate(jobs) if job.poll() not in (None, 0)]

    while not (gone := dead()):
        if all(job.poll() == 0 for job in jobs):
            return 0
        time.sleep(POLL)
    # of two that died between two looks, the one that a signal ended: the other lost its peer
    first = min(gone, key=lambda i: jobs[i].returncode > 0)
    until = time.monotonic() + grace
    while any(job.poll() is None for job in jobs) and time.monotonic() < until:
        time.sleep(POLL)
    left = [i for i, job in enumerate(jobs) if job.poll() is None]
    if not left and all(_asked(job, caught) for job in jobs):
        return _status(jobs[first])
    for i in left:
        jobs[i].kill()
    code = jobs[first].returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    others = f"; ended process {', '.join(map(str, left))} as well" if left else ""
    message = (
        f"process {first} of {len(jobs)} (pid {jobs[first].pid}) {how}{others}."
        f" {_last_checkpoint(workdir)}"
    )
    print(f"jflow launch: error: {message}", file=sys.stderr, flush=True)
    return _status(jobs[first])


def _asked(job: subprocess.Popen, caught: list[int]) -> bool:
    """Whether it left because a signal was passed on."""
    return any(job.returncode in (128 + number, -number) for number in caught)


def _status(job: subprocess.Popen) -> int:
    return job.returncode if job.returncode >= 0 else 128 - job.returncode


def _workdir(command: Sequence[str]) -> Path | None:
    for i, word in enumerate(command):
        name, equals, value = word.partition("=")
        if name == "--workdir":
            given = value if equals else command[i + 1] if i + 1 < len(command) else None
            return None if given is None else expand(given)
    return None


def _last_checkpoint(workdir: Path | None) -> str:
    if workdir is None:
        return "The same command goes on from its last checkpoint."
    from jflow.train import checkpoint  # here: it brings JAX along

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the processes have said which are damaged
        step = checkpoint.latest(workdir)
    if step is None:
        return f"There is no checkpoint in {workdir}: the same command starts anew."
    return (
        f"The last checkpoint in {workdir} is of step {step}: the same command goes on from there."
    )


@contextlib.contextmanager
def _passed_on(jobs: list[subprocess.Popen]):
    """Signals go to all jobs; a second one ends them at once (the launcher's own `finally`)."""
    caught: list[int] = []

    def pass_on(number, frame):
        if caught:
            raise SystemExit(128 + number)
        caught.append(number)
        for job in jobs:
            if job.poll() is None:
                job.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
