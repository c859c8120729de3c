"""Adapters: the frame, and LoRA in its two forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import adapters, data, losses, nets, train

X, T, LABEL = jnp.ones((2, 4, 4, 1)), jnp.array([0.2, 0.7]), jnp.array([1, 2])
NET = nets.DiT(width=16, num_layers=3, num_heads=2, num_classes=3)
VELOCITY = nets.velocity(NET)


def drawn(tree, seed=0):
    """The tree with every leaf drawn anew: nothing is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), tree)


@pytest.fixture(scope="module")
def base():
    shapes = jax.eval_shape(VELOCITY.init, jax.random.key(0), X, T, LABEL)
    return drawn(shapes)


def run(params, velocity=VELOCITY):
    return velocity.apply(params, X, T, LABEL)


def test_forms_of_lora_agree(base):
    """At first the identity; then weights, activations and layer by layer give one function, which
    is that of the merged params; layers that were not chosen stay."""
    weights = adapters.lora(2, alpha=3.0, where=["blocks/*", "head*"], layers=(0, 2))
    beside = adapters.lora_activations(2, alpha=3.0, where=["blocks/*", "head*"], layers=(0, 2))
    fresh = weights.init(jax.random.key(1), base)
    assert jax.tree.all(jax.tree.map(np.array_equal, weights.apply(base, fresh), base))
    params = drawn(fresh, 1)
    merged = adapters.merge(base, weights, params)
    np.testing.assert_allclose(run(beside.apply(base, params)), run(merged), atol=2e-6)
    assert np.abs(run(merged) - run(base)).max() > 0.1

    new, old, made = (x["blocks"]["in"]["kernel"] for x in (merged, base, params))
    for i, j in ((0, 0), (2, 1)):
        change = 1.5 * np.asarray(made["A"][j]) @ np.asarray(made["B"][j])
        np.testing.assert_allclose(new[i], old[i] + change, atol=1e-6)
    np.testing.assert_array_equal(new[1], old[1])


@pytest.mark.parametrize("kind", ["velocity", "flow map", "k_adapter"])
def test_fit_trains_the_adapter_alone(kind, tmp_path):
    """Optimizer, average and params are the adapter's; the base stays to the bit."""
    net = nets.ResidualMLP(width=8, num_blocks=2)
    x = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    if kind != "flow map":
        model, make = nets.velocity(net), losses.flow_matching
        base = drawn(jax.eval_shape(model.init, jax.random.key(0), x, x[:, 0]))
    else:
        model, make = nets.flow_map(net), losses.mean_flow
        base = drawn(jax.eval_shape(model.init, jax.random.key(0), x, x[:, 0], x[:, 0]))
    adapter = adapters.lora_activations(1, where="blocks/*")
    adapter = adapters.k_adapter(2) if kind == "k_adapter" else adapter
    fresh = drawn(jax.eval_shape(adapter.init, jax.random.key(1), base), 1)
    loss = adapters.adapter_loss(make(adapters.wrap(model, adapter)))
    optimizer = optax.adam(1e-2)
    start = train.init_state(fresh, optimizer, jax.random.key(2), ema=0.9, frozen={"base": base})
    done = train.fit(
        start,
        train.make_step(loss, optimizer, ema=0.9),
        data.batches({"x": x}, 16, seed=0),
        steps=3,
        workdir=tmp_path,
        progress=False,
    ).state
    assert jax.tree.all(jax.tree.map(np.array_equal, done.frozen["base"], base))
    assert jax.tree.structure(done.params) == jax.tree.structure(fresh)
    assert jax.tree.structure(done.ema) == jax.tree.structure(fresh)
    sizes = [x.size for x in jax.tree.leaves(done.opt_state) if x.ndim]
    assert sum(sizes) == 2 * sum(x.size for x in jax.tree.leaves(fresh))
    moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), done.params, fresh)
    assert all(change > 0 for change in jax.tree.leaves(moved))
    kept = train.checkpoint.restore_params(tmp_path)
    assert jax.tree.structure(kept) == jax.tree.structure(fresh)


def test_where_that_meets_nothing_names_near_paths(base):
    with pytest.raises(ValueError, match="near it are blocks/attention/qkv/kernel"):
        adapters.lora(1, where="*attention/qvk*").init(jax.random.key(0), base)


def test_rank_above_the_layer_is_named(base):
    with pytest.raises(ValueError, match=r"'head/kernel'.*at most 4.*rank=5"):
        adapters.lora(5, where="head*").init(jax.random.key(0), base)


def test_adapter_of_another_base_names_the_leaf(base):
    adapter = adapters.lora(1)
    params = adapter.init(jax.random.key(0), base)
    other = {**base, "head": {"kernel": jnp.ones((16, 5)), "bias": jnp.ones(5)}}
    with pytest.raises(ValueError, match=r"do not fit 'head/kernel' of shape \[16, 5\]"):
        adapter.apply(other, params)
    with pytest.raises(ValueError, match="has no 'blocks'"):
        adapter.apply({"head": base["head"]}, params)
