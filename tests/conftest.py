"""Shared by every test: how programs are compiled and kept, and an error where shapes would broadcast by rank."""

import os
import resource
import subprocess
import sys
from pathlib import Path

# Most programs here run once, on a handful of numbers: optimizing them would take most of the suite's time. XLA reads its flags
# when jax is first used, stops at one that this version does not know, and hands them on to subprocesses.
_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if "PYTEST_XDIST_WORKER" not in os.environ:
    _env = {**os.environ, "XLA_FLAGS": f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}"}
    if (
        subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=_env, capture_output=True).returncode
        == 0
    ):
        os.environ["XLA_FLAGS"] = _env["XLA_FLAGS"]
    else:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_compilation_cache_dir", os.environ.get("JFLOW_TEST_CACHE", str(Path.home() / ".cache/jflow-tests"))
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True, scope="module")
def free_compiled():
    """A worker would otherwise keep every program that it compiled, gigabytes of them by the end."""
    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 3 * 2**20:  # KiB
        jax.clear_caches()


@pytest.fixture
def x64():
    """Run one test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: JFLOW_DATA, or one that lies beside the checkout."""
    folder = Path(os.environ.get("JFLOW_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no data folder: set JFLOW_DATA to run this test")
    return folder
