"""Every adapter against every promise of `types.Adapter`, on a small transformer."""

import functools
import pickle
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from keys import KEYS, keys_consumed_twice

from jflow import adapters, nets, train
from jflow.types import Adapter

NET = nets.DiT(width=8, num_layers=2, num_heads=1, num_classes=3)
VELOCITY = nets.velocity(NET)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 4, 4, 1)).astype(np.float32)
T, LABEL = np.array([0.2, 0.7], np.float32), np.array([1, 2])


class Row(NamedTuple):
    adapter: Adapter
    merges: bool = True
    at_first: float = 1e-6  # how far the model is from the base then; the scale of outputs is 1


BLOCKS = "blocks/*kernel"
TABLE = {
    "adapter_bias": Row(adapters.adapter_bias()),
    "adaptformer": Row(adapters.adaptformer(2), merges=False),
    "combine": Row(
        adapters.combine(
            {"a": adapters.lora(1, where=BLOCKS), "b": adapters.hydra(1, where="head*")}
        )
    ),
    "combine with weights": Row(
        adapters.combine(
            {"a": adapters.lora(1, where=BLOCKS), "b": adapters.adapter_bias()},
            {"a": 0.5, "b": 2.0},
        )
    ),
    "ether": Row(adapters.ether(2, where=BLOCKS), at_first=np.inf),
    "ether_plus": Row(adapters.ether_plus(2, where=BLOCKS)),
    "hydra": Row(adapters.hydra(2, where=BLOCKS)),
    "hyper_adapter": Row(adapters.hyper_adapter(adapters.lora(1, where=BLOCKS), 3)),
    "k_adapter": Row(adapters.k_adapter(4, after=(1, 0)), merges=False),
    "layerwise": Row(adapters.layerwise(adapters.hydra(1, where=BLOCKS)), merges=False),
    "layerwise of some layers": Row(
        adapters.layerwise(adapters.ether_plus(2, where=BLOCKS, layers=(1,)), layers=(1,)),
        merges=False,
    ),
    "lora": Row(adapters.lora(2, where=BLOCKS)),
    "lora_activations": Row(adapters.lora_activations(2, where=BLOCKS), merges=False),
    "mixture_of_adapters": Row(
        adapters.mixture_of_adapters(
            {"a": adapters.lora(1), "b": adapters.hydra(1)}, where="blocks/out"
        ),
        merges=False,
    ),
    "oft": Row(adapters.oft(2, where=BLOCKS)),
    "on_modules": Row(
        adapters.on_modules(
            lambda key, own: {"by": jnp.zeros(own["bias"].shape)},
            lambda params, module, run, x: jnp.add(*jnp.broadcast_arrays(run(x), params["by"])),
            where="blocks/out",
        ),
        merges=False,
    ),
    "on_weights": Row(
        adapters.on_weights(
            lambda key, own: {"log_scale": jnp.zeros(own["kernel"].shape[-1])},
            lambda own, params: {"kernel": own["kernel"] * jnp.exp(params["log_scale"])[None]},
            where=BLOCKS,
        )
    ),
}
EXCUSED = {
    "adapter_loss": "a loss",
    "dequantize": "params",
    "mera": "params",
    "merge": "params",
    "quantize": "params",
    "wrap": "a model",
}


def drawn(tree, seed):
    """The tree with every leaf drawn anew: nothing is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), tree)


BASE = drawn(jax.eval_shape(VELOCITY.init, jax.random.key(0), X, T, LABEL), 1)


@jax.jit
def plain(base):
    return VELOCITY.apply(base, X, T, LABEL)


@functools.cache
def measured(name):
    """What the tests look at, of one program for the wrapped model and its gradient."""
    row = TABLE[name]
    wrapped = adapters.wrap(VELOCITY, row.adapter)

    @jax.jit
    def run(base, params):
        def output(params):
            return wrapped.apply({"base": base, "adapter": params}, X, T, LABEL)

        value, pullback = jax.vjp(output, params)
        return value, *pullback(jnp.cos(value))

    fresh = jax.jit(row.adapter.init)(jax.random.key(2), BASE)
    params = drawn(fresh, 3)
    r = {"fresh": fresh, "params": params, "at first": run(BASE, fresh)[0]}
    r["adapted"], r["grads"] = run(BASE, params)
    if row.merges:
        merge = jax.jit(lambda base, params: adapters.merge(base, row.adapter, params))
        r["merged"] = merge(BASE, params)
        r["of the merged"] = plain(r["merged"])
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE)
    r["of a base in bfloat16"] = jax.eval_shape(run, half, params)[0]
    return jax.device_get(r)


def test_every_public_name_is_in_the_table():
    assert set(adapters.__all__) == {name.split()[0] for name in TABLE} | set(EXCUSED)


@pytest.mark.parametrize("name", TABLE)
def test_at_first_the_model_is_the_base(name):
    r, row = measured(name), TABLE[name]
    distance = np.abs(r["at first"] - plain(BASE)).max()
    assert distance <= row.at_first and (distance > 0.1) == np.isinf(row.at_first)
    assert np.abs(r["adapted"] - plain(BASE)).max() > 0.01


@pytest.mark.parametrize("name", TABLE)
def test_merged_weights_are_the_wrapped_model(name):
    row, r = TABLE[name], measured(name)
    if row.merges:
        np.testing.assert_allclose(r["of the merged"], r["adapted"], atol=2e-5)
        forms = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
        assert forms(r["merged"]) == forms(BASE)
        return
    with pytest.raises(ValueError, match="acts on activations, which no weights can hold"):
        adapters.merge(BASE, row.adapter, r["params"])


@pytest.mark.parametrize("name", TABLE)
def test_gradients_are_finite_and_reach_every_parameter(name):
    for path, g in jax.tree_util.tree_leaves_with_path(measured(name)["grads"]):
        assert np.all(np.isfinite(g)) and np.any(g != 0), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", TABLE)
def test_it_is_small_and_floats_alone(name):
    fresh = measured(name)["fresh"]
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(fresh))
    assert measured(name)["of a base in bfloat16"].shape == X.shape
    shapes = jax.eval_shape(TABLE[name].adapter.init, jax.random.key(0), BASE)
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(lambda x: x.shape, shapes)
    again = pickle.loads(pickle.dumps(fresh))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, fresh))


@pytest.mark.parametrize("name", TABLE)
def test_params_come_back_from_a_checkpoint(name, tmp_path):
    params = measured(name)["params"]
    state = train.init_state(params, optax.sgd(0.1), jax.random.key(0), frozen={"base": BASE})
    train.checkpoint.save(tmp_path, 1, state)
    alone, whole = (
        train.checkpoint.restore_params(tmp_path),
        train.checkpoint.restore(tmp_path, state),
    )
    for found in (alone, whole.state.params):
        assert jax.tree.all(jax.tree.map(np.array_equal, found, params))


@pytest.mark.parametrize("name", TABLE)
def test_another_base_is_an_error(name):
    """Of another width, and without blocks."""
    row, r = TABLE[name], measured(name)
    wide = nets.velocity(NET.clone(width=12))
    other = jax.eval_shape(wide.init, jax.random.key(0), X, T, LABEL)
    adapted = adapters.wrap(wide, row.adapter)
    if name != "on_modules":  # whose function here would broadcast numbers
        with pytest.raises((ValueError, TypeError)):
            jax.eval_shape(adapted.apply, {"base": other, "adapter": r["params"]}, X, T, LABEL)
    with pytest.raises(ValueError, match="expected|another base"):
        row.adapter.apply({"head": BASE["head"]}, r["params"])


@pytest.mark.parametrize("name", TABLE)
def test_keys_are_consumed_once(name):
    calls = lambda a: TABLE[name].adapter.init(a, BASE)  # noqa: E731
    assert not keys_consumed_twice(calls, *KEYS[:1])
