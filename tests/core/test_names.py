"""An unknown name of a package is answered with what it is called here."""

import importlib
import pickle

import pytest

pytest.importorskip("griffe")
from site_hooks import NAMED, hooks
from subprocesses import run_python

import jflow
from jflow._core import names

PUBLIC = sorted({name.split(".")[0] for name in NAMED})


def message(package, name):
    with pytest.raises(AttributeError) as raised:
        getattr(importlib.import_module(package), name)
    return str(raised.value)


def test_each_other_name_of_a_public_name_is_answered_by_that_alone():
    synonyms = {name: hooks.other_names(target.docstring) for name, target in NAMED.items()}
    assert sum(map(len, synonyms.values())) > 150
    wrong = {}
    for name, others in synonyms.items():
        package, _, own = name.partition(".")
        module = importlib.import_module(f"jflow.{package}")
        if own.partition(".")[0] not in module.__all__:
            continue  # the modules of apps are imported one by one
        for other in others:
            found = names.called(module, other)
            if found != [own]:
                wrong[f"{name}: {other}"] = found
    assert not wrong, wrong


def test_every_public_package_answers():
    """But for the nouns, below which there is nothing."""
    for package in (f"jflow.{name}" for name in PUBLIC if name not in ("guidance", "types")):
        assert message(package, "CFG_").endswith("no attribute 'CFG_'; it is jflow.guidance.cfg")
    assert message("jflow", "CFG_").endswith("no attribute 'CFG_'; it is called guidance.cfg here")


@pytest.mark.parametrize(
    "package, name, answer",
    [
        ("jflow.metrics", "fid", "; it is called frechet_distance here"),
        ("jflow.losses", "dmd", "; it is called distribution_matching here"),
        ("jflow.couplings", "minibatch_ot", "; it is called optimal_transport here"),
        ("jflow.bijectors", "RQS", "; it is called univariate.rational_quadratic here"),
        ("jflow.oracles", "GaussIan", "; it is called Gaussian or gaussian here"),
        ("jflow.losses", "cfg", "; it is jflow.guidance.cfg"),
        ("jflow.losses", "nothing_like_it", ""),
        ("jflow.losses", "a.b", ""),
        ("jflow.guidance", "_cfg_", ""),
        ("jflow.guidance", "__cfg__", ""),
        ("jflow", "__fid__", ""),
    ],
)
def test_answers(package, name, answer):
    assert message(package, name) == f"module {package!r} has no attribute {name!r}{answer}"
    assert not hasattr(importlib.import_module(package), name)


def test_python_still_asks_whether_another_name_was_meant():
    """It compares the name that the error carries with those of the module that it carries."""
    with pytest.raises(AttributeError) as raised:
        _ = jflow.metrics.frechet_distanse
    assert raised.value.name == "frechet_distanse" and raised.value.obj is jflow.metrics
    assert "frechet_distance" in dir(raised.value.obj)


def test_modules_keep_what_python_does_with_them():
    assert pickle.loads(pickle.dumps(jflow.metrics.moments)) is jflow.metrics.moments
    namespace = {}
    exec("from jflow.metrics import *", namespace)
    assert {n for n in namespace if n != "__builtins__"} == set(jflow.metrics.__all__)
    with pytest.raises(ImportError, match="cannot import name 'fid'"):
        exec("from jflow.metrics import fid")


def test_imports_look_nothing_up():
    """A package is asked for each of its modules before it has it: no other package is imported for
    that, and the command line needs no JAX."""
    run_python(
        "-c",
        "import sys, jflow\n"
        "assert not hasattr(jflow, '_fid') and 'jax' not in sys.modules\n"
        "from jflow.train import ema\n"
        "assert 'jflow.metrics' not in sys.modules",
    )
