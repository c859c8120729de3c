"""The examples of the docstrings print what they say. `test_examples.py` runs this file with every
annotation of jflow checked; by hand: python -m pytest tests/docs/examples.py."""

import doctest
import importlib

import jax
import pytest

pytest.importorskip("griffe")
from site_hooks import NAMED

WITH_EXAMPLE = [n for n, t in NAMED.items() if t.docstring and ">>>" in t.docstring.value]


def test_there_are_examples():
    assert len(WITH_EXAMPLE) >= 100


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_example(name):
    module, _, attribute = f"jflow.{name}".rpartition(".")
    described = getattr(importlib.import_module(module), attribute)
    said = []
    with jax.numpy_rank_promotion("allow"):  # as in a program of a user's
        for example in doctest.DocTestFinder(recurse=False).find(described, name, globs={}):
            doctest.DocTestRunner().run(example, out=said.append)
    assert not said, "".join(said)
