"""Shared by every test: how programs are compiled and kept, and an error where shapes would
broadcast by rank."""

import gc
import os
from pathlib import Path

import jax
import psutil
import pytest
from compiling import (
    compare_shapes_once,
    leave_contexts,
    leave_the_optimizer_out,
    make_arrays_in_numpy,
    share_contexts,
)

if not {"PYTEST_XDIST_WORKER", "JFLOW_TEST_OPTIMIZED"} & set(os.environ):  # workers inherit it
    leave_the_optimizer_out()
share_contexts()
compare_shapes_once()
make_arrays_in_numpy()

jax.config.update("jax_numpy_rank_promotion", "raise")
if os.environ.get("JFLOW_TEST_KEYS") == "1":
    from jax.experimental.key_reuse import _core as key_reuse
    from jax.extend.core import primitives

    # JAX refuses every program that consumes a key twice. Between programs it is not asked: a test
    # may call two functions with one key to compare them. The two primitives are not known to it:
    # vmap puts them where keys are scanned and where a condition differs from row to row.
    jax.config.update("jax_debug_key_reuse", True)
    key_reuse.call_impl_with_key_reuse_checks = lambda _, run, *args, **options: run(
        *args, **options
    )
    for primitive, passed_on in ((primitives.transpose_p, 0), (primitives.select_n_p, 1)):
        forward = key_reuse.KeyReuseSignature(key_reuse.Forward(passed_on, 0))
        key_reuse.key_reuse_signatures[primitive] = forward
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("JFLOW_TEST_CACHE", str(Path.home() / ".cache/jflow-tests")),
)
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", 0.5
)  # to write a program takes a tenth of a second
# Tracing allocates much, and a collection would look at all that was imported each time.
gc.freeze()
gc.set_threshold(100_000, 50, 1000)


@pytest.fixture(autouse=True, scope="module")
def free_compiled():
    """A worker would otherwise keep every program that it compiled, gigabytes of them by the
    end."""
    yield
    leave_contexts()
    if psutil.Process().memory_info().rss > psutil.virtual_memory().total / 5:
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
