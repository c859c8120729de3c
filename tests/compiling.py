"""How programs of tests are compiled, and how many a call compiles."""

import os
import subprocess
import sys

import jax

_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)


def leave_the_optimizer_out() -> None:
    """Compile in a third of the time, for programs that run once on a handful of numbers. Before JAX is first used.

    Subprocesses inherit it. XLA would stop at a flag that its version does not know: another process tries them first.
    """
    flags = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()
    trial = [sys.executable, "-c", "import jax; jax.devices()"]
    if subprocess.run(trial, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True).returncode == 0:
        os.environ["XLA_FLAGS"] = flags
    else:
        jax.config.update("jax_disable_most_optimizations", True)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


_COUNT = [0]
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: _COUNT.__setitem__(0, _COUNT[0] + name.endswith("backend_compile_duration"))
)


def compiled_again(**calls) -> dict[str, int]:
    """Make every call twice, without jit: those whose second call needed new programs, and how many. All should be in {}."""
    again = {}
    for name, call in calls.items():
        call()
        before = _COUNT[0]
        call()
        if _COUNT[0] > before:
            again[name] = _COUNT[0] - before
    return again
