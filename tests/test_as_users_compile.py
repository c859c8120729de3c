"""A choice of the suite once more with XLA's optimizer, which the rest leaves out, and the count of
compiled programs."""

import os

import jax
import pytest
from compiling import compiled_again
from subprocesses import run_python

CHOICE = {
    "tests/kernels/test_columns.py": "knot or float32_against or (finite_differences and spline)",
    "tests/contracts/test_bijector_contract.py": "(scan and (remat or reversible)) or masked_conv",
    "tests/contracts/test_flow_contract.py": "(neural_spline or cnf) and (base or agree or reach)",
}


@pytest.mark.skipif("JFLOW_TEST_OPTIMIZED" in os.environ, reason="runs inside of itself")
@pytest.mark.parametrize("path", CHOICE)
def test_passes_with_the_optimizer(path, monkeypatch):
    monkeypatch.setenv("JFLOW_TEST_OPTIMIZED", "1")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    run_python(
        "-m", "pytest", "-q", path, "-k", CHOICE[path]
    )  # fails where a test does, and where none is chosen


def test_new_programs_are_counted():
    fresh = lambda: jax.jit(lambda x: x + 1)(1.0)  # noqa: E731
    assert compiled_again(fresh=fresh, kept=lambda: None) == {"fresh": 1}
