"""A choice of the suite once more with XLA's optimizer, which the rest leaves out, and the count of
compiled programs."""

import os

import jax
import pytest
from compiling import compiled_again
from subprocesses import run_python

# Where a search and a solve are rewritten, a scan that walks back, a scan over pixels, and a
# solver's steps: values, gradients and the reference in float64.
CHOICE = [
    "tests/kernels/test_columns.py::test_numbers_at_a_knot_lie_in_one_bin",
    "tests/kernels/test_columns.py::test_float32_against_the_reference_in_float64[spline-inverse]",
    "tests/kernels/test_columns.py::test_gradients_by_finite_differences[spline-forward]",
    *(
        f"tests/contracts/test_bijector_contract.py::{test}[{row}]"
        for row in ("masked_conv", "coupling spline", "scan reversible")
        for test in (
            "test_round_trips_and_log_dets",
            "test_gradients_are_finite_and_reach_every_parameter",
        )
    ),
    *(
        f"tests/contracts/test_flow_contract.py::{test}[cnf]"
        for test in (
            "test_log_prob_is_the_bases_plus_the_log_det",
            "test_sample_and_log_prob_agree_with_sample_and_with_log_prob",
            "test_gradients_are_finite_and_reach_every_parameter",
        )
    ),
]


@pytest.mark.skipif("JFLOW_TEST_OPTIMIZED" in os.environ, reason="runs inside of itself")
def test_a_choice_passes_with_the_optimizer(monkeypatch):
    monkeypatch.setenv("JFLOW_TEST_OPTIMIZED", "1")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    run_python("-m", "pytest", "-q", *CHOICE)  # fails where a test does, and where one is not found


def test_new_programs_are_counted():
    fresh = lambda: jax.jit(lambda x: x + 1)(1.0)  # noqa: E731
    assert compiled_again(fresh=fresh, kept=lambda: None) == {"fresh": 1}
