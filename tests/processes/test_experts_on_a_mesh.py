"""Experts over eight fake devices: what `experts_worker.py` saw in a process of its own."""

import json
from pathlib import Path

import pytest
from subprocesses import run_python

WORKER = Path(__file__).with_name("experts_worker.py")


@pytest.fixture(scope="module")
def seen():
    out = json.loads(run_python(WORKER, devices=8).stdout)
    assert out["devices"] == 8
    return out


def test_values_and_gradients_are_those_of_one_device(seen):
    """Float32: sums over rows and experts are taken in another order. A device keeps a quarter of
    the experts."""
    found = seen["limited"]
    assert found["relative"] < 2e-5 and found["loss"] > 0.1
    assert found["bytes"] * 4 == found["bytes_of_all"]


def test_experts_that_do_not_divide_are_refused(seen):
    assert "mlp/experts" in seen["refused"]
    assert "6 over mesh axis expert of size 4" in seen["refused"]
