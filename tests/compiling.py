"""How programs of tests are compiled, and how many a call compiles."""

import os
import subprocess
import sys

import jax

_FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",  # gone in jax 0.12
    "--xla_cpu_parallel_codegen_split_count=1",
)


def leave_the_optimizer_out() -> None:
    """Compile in a third of the time, for programs that run once on a handful of numbers. Before
    JAX is first used.

    Subprocesses inherit the flags. One that this version does not know ends the process, so a
    subprocess tries them first, and those that it names are left out."""
    trial = [sys.executable, "-c", "import jax; jax.devices()"]
    flags = list(_FLAGS)
    while flags:
        env = {
            **os.environ,
            "XLA_FLAGS": " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip(),
        }
        done = subprocess.run(trial, env=env, capture_output=True, text=True)
        if done.returncode == 0:
            os.environ["XLA_FLAGS"] = env["XLA_FLAGS"]
            return
        print(f"XLA flags: {done.stderr.strip()[-300:]}", file=sys.stderr)
        unknown = [flag for flag in flags if flag.split("=")[0] in done.stderr]
        flags = [flag for flag in flags if unknown and flag not in unknown]


_COUNT = [0]
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: _COUNT.__setitem__(
        0, _COUNT[0] + name.endswith("backend_compile_duration")
    )
)


def compiled_again(**calls) -> dict[str, int]:
    """Make every call twice: {name: the programs that the second call compiled}, without those that
    compiled none."""
    again = {}
    for name, call in calls.items():
        call()
        before = _COUNT[0]
        call()
        if _COUNT[0] > before:
            again[name] = _COUNT[0] - before
    return again
