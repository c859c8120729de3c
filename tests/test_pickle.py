"""Nouns are tuples of closures: copies, pickles, and what is said without cloudpickle."""

import copy
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflow
from jflow import bijectors, distributions, flows, nets, types

X = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)


def test_every_noun_is_picklable():
    """All of the tuples of jflow.types but the one of arrays, by what their classes are told."""
    nouns = [
        noun
        for name in types.__all__
        if isinstance(noun := getattr(types, name), type)
        and hasattr(noun, "_fields")
        and noun is not types.Condition
    ]
    assert len(nouns) == 14 and all("__reduce__" in vars(noun) for noun in nouns)


FLOWS = {
    "spline": lambda: flows.neural_spline((2,), depth=2, hidden=(4,), bins=3),
    "iaf": lambda: flows.iaf((2,), depth=1, hidden=(4,)),
    "residual": lambda: flows.residual_flow((2,), depth=1, hidden=(4,)),
    "cnf": lambda: flows.cnf(
        jflow.velocity(nets.TimeMLP((4,))), distributions.normal((2,)), method=2
    ),
}


@pytest.mark.parametrize("name", FLOWS)
def test_a_pickled_flow_has_the_same_density(name):
    """Its params fit, as those of a checkpoint do."""
    pytest.importorskip("cloudpickle")
    flow = FLOWS[name]()
    again = pickle.loads(pickle.dumps(flow))
    assert type(again) is types.Flow and again is not flow

    @jax.jit
    def run(x):
        params = flow.init(jax.random.key(0), x)
        return flow.log_prob(params, x), again.log_prob(params, x)

    expected, found = run(X)
    np.testing.assert_array_equal(found, expected)
    key, params = jax.random.key(1), flow.init(jax.random.key(0), X)
    sample = jax.eval_shape(lambda params, key: again.sample(params, key, 3), params, key)
    assert sample.shape == (3, 2)


def test_cloudpickle_takes_what_refers_to_a_noun():
    """A function with a flow in its closure, and an `ElboFlow` with a compiled function."""
    cloudpickle = pytest.importorskip("cloudpickle")
    model = flows.importance_weighted(
        flows.elbo_flow(bijectors.uniform_dequantization(4), distributions.uniform((2,))), 2
    )
    levels, key = jnp.array([[0.0, 3.0]]), jax.random.key(1)
    score = pickle.loads(
        cloudpickle.dumps(lambda: model.elbo({"bijector": {}, "base": {}}, levels, key=key))
    )
    assert float(score()[0]) == pytest.approx(-2 * np.log(4), abs=1e-5)


def test_a_noun_within_a_noun_is_pickled_once():
    """A chain that holds one bijector 64 times is not 64 times as long."""
    pytest.importorskip("cloudpickle")
    layer = bijectors.coupling(bijectors.univariate.affine(), nets.MLP((4,)), split=1)
    one, many = (len(pickle.dumps(bijectors.chain(*[layer] * n))) for n in (1, 64))
    assert many < 1.5 * one


def test_another_process_takes_a_flow():
    """Started anew, with nothing but the pickle: what joblib and multiprocessing do."""
    pytest.importorskip("cloudpickle")
    flow = flows.flow(bijectors.sigmoid(), distributions.normal((1,)))
    work = pickle.dumps((flow, np.full((1, 1), 0.5, np.float32)))
    program = (
        "import pickle, sys; flow, x = pickle.load(sys.stdin.buffer);"
        'print(float(flow.log_prob({"bijector": {}, "base": {}}, x)[0]))'
    )
    done = subprocess.run([sys.executable, "-c", program], input=work, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    expected = -0.5 * np.log(2 * np.pi) + np.log(4)
    assert float(done.stdout) == pytest.approx(expected, abs=1e-5)


def test_copies_are_the_tuple_itself_and_pytrees_are_unharmed():
    flow = FLOWS["spline"]()
    assert copy.copy(flow) is flow and copy.deepcopy({"flow": flow})["flow"] is flow
    assert jax.tree.structure(flow).num_leaves == len(flow)
    assert jax.tree.map(lambda f: f, flow) == flow and flow._replace(init=flow.init) == flow


def test_without_cloudpickle_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(TypeError, match="Flow: expected cloudpickle to be installed.*params"):
        pickle.dumps(FLOWS["spline"]())
