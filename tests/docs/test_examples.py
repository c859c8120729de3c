"""The examples of all public names run as they are written, with arguments and results checked
against the annotations of jflow, shapes among them."""

import pytest
from subprocesses import run_python

CHECKED = "jflow,beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"


def test_examples_and_annotations(monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    pytest.importorskip("beartype")
    run_python("-m", "pytest", "-q", "tests/docs/examples.py", f"--jaxtyping-packages={CHECKED}")
