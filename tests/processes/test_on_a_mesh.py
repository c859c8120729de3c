"""Bijectors and flows over eight fake devices: what `mesh_worker.py` saw in a process of its
own."""

import json
from pathlib import Path

import pytest
from subprocesses import run_python

WORKER = Path(__file__).with_name("mesh_worker.py")


@pytest.fixture(scope="module")
def raised(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    return json.loads(run_python(WORKER, folder, devices=8).stdout)


@pytest.mark.parametrize("check", ["residual_maps", "scanned_stacks", "data_dependent_init"])
def test_one_device_and_several_agree(raised, check):
    assert raised[check] is None, raised[check]
