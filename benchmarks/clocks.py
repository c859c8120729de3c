"""What the benchmarks share: calls timed in turn, and peers that wait in a Python of their own for
their turn."""

import contextlib
import json
import subprocess
import time
from pathlib import Path

import jax
import numpy as np

CLOCKS = {
    "wall": time.perf_counter,
    "cpu": time.process_time,
}  # cpu: of all cores, for machines that others use too


def interleaved(calls, repeats, clock="wall"):
    """{name: [seconds]}: every call once, then every call again, so that what else the machine does
    meets all of them.

    calls: {name: () -> arrays}, waited for, or () -> seconds from a call that measures itself (a
    peer's). clock: of CLOCKS.
    """
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call, CLOCKS[clock]))
    return times


def seconds(call, clock=time.perf_counter):
    start = clock()
    done = call()
    if isinstance(done, float):
        return done
    jax.block_until_ready(done)
    return clock() - start


def medians(times):
    return {name: float(np.median(values)) for name, values in times.items()}


@contextlib.contextmanager
def peer(python, script, *args):
    """ask(request) -> answer: JSON lines to and from benchmarks/peers/`script`, run by the Python
    of another environment.

    None where no Python is given. A peer that fails ends the benchmark with its message.
    """
    if not python:
        yield None
        return
    path = str(Path(__file__).parent / "peers" / script)
    command = [python, path, *map(str, args)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def ask(request):
            line = ""
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(request), file=process.stdin, flush=True)
                line = process.stdout.readline()
            if not line:
                raise SystemExit(
                    f"{script} ended with status {process.wait()}: its message is above"
                )
            return json.loads(line)

        try:
            yield ask
        finally:
            process.stdin.close()
            process.wait()
