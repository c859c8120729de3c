"""For tests that start processes: what those find in their environment, and how a test and its
processes wait for events."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax

import jflow

LIMIT = 600  # seconds, so that what hangs ends; no test asserts anything about it


def environment(devices: int | None = None, **more: str) -> dict[str, str]:
    """For a Python process on the CPU, with so many fake devices.

    It finds this jflow and the modules of this folder, and takes over XLA's flags and the cache of
    compiled programs.
    """
    paths = [
        str(Path(jflow.__file__).parents[1]),
        str(Path(__file__).parent),
        os.environ.get("PYTHONPATH", ""),
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_PLATFORMS": "cpu"}
    if devices is not None:
        flags = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        )
        env["XLA_FLAGS"] = flags.strip()
    if jax.config.jax_compilation_cache_dir:
        env["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
        seconds = jax.config.jax_persistent_cache_min_compile_time_secs
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(seconds)
    return env | more


def run_python(*arguments, devices: int | None = None) -> subprocess.CompletedProcess:
    """Run Python with these arguments to its end, which must be a good one; stdout and stderr are
    captured."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment(devices), capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done


@contextlib.contextmanager
def started(*arguments, **options) -> Iterator[subprocess.Popen]:
    """Python with these arguments in the background; options are Popen's. It is killed at the end
    of the block."""
    command = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(command, **{"env": environment(), "text": True, **options}) as process:
        watchdog = threading.Timer(LIMIT, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.terminate()  # a launcher ends its own processes then
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def hold(said: str) -> None:
    """Called in a process of a test: say so on stdout, and wait there until a signal ends this
    process or is caught.

    The signal may come as soon as the line is out: it wakes this function even if it comes before
    the wait.
    """
    woken, waker = socket.socketpair()
    with woken, waker:
        waker.setblocking(False)
        before = signal.set_wakeup_fd(waker.fileno())
        os.write(1, f"{said}\n".encode())  # one write, for the lines of two processes to stay whole
        woken.settimeout(LIMIT)
        woken.recv(1)
        signal.set_wakeup_fd(before)
