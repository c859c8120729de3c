"""What is special to each adapter: its formula, its limits, and a base in int8."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import adapters, nets, steering
from jflow.types import Condition

RNG = np.random.default_rng(0)


def drawn(*shape):
    return RNG.normal(size=shape).astype(np.float32)


X, BASE = drawn(5, 4), {"kernel": drawn(4, 6), "bias": drawn(6)}


def layer(own, x=X):
    return x @ np.asarray(own["kernel"]) + np.asarray(own["bias"])


def test_ether_is_a_reflection_of_the_inputs():
    """Orthogonal, of determinant -1 and distance 2 to the identity in each block; ETHER+ is never
    further than 2."""
    eye = {"kernel": np.eye(4, dtype=np.float32)}
    h = adapters.ether(2).apply(eye, {"kernel": {"u": drawn(2, 2)}})["kernel"]
    np.testing.assert_allclose(h @ h.T, np.eye(4), atol=1e-6)
    assert not np.any(h[:2, 2:]) and not np.any(h[2:, :2])
    for block in (h[:2, :2], h[2:, 2:]):
        np.testing.assert_allclose(np.linalg.det(block), -1, rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(block - np.eye(2)), 2, rtol=1e-5)

    side = lambda n: {"u": drawn(1, n), "v": drawn(1, n)}  # noqa: E731
    sides = {"in": side(4), "out": side(6)}
    found = adapters.ether_plus().apply(BASE, {"kernel": sides})["kernel"]
    maps = []
    for name, n in (("in", 4), ("out", 6)):
        u, v = (sides[name][k][0] / np.linalg.norm(sides[name][k]) for k in "uv")
        maps.append(np.eye(n) - np.outer(u, u) + np.outer(v, v))
        assert np.linalg.norm(maps[-1] - np.eye(n)) <= 2
    np.testing.assert_allclose(found, maps[0] @ BASE["kernel"] @ maps[1], atol=1e-5)
    with pytest.raises(ValueError, match=r"divide the 4 inputs of a kernel \[4, 6\], got blocks=3"):
        adapters.ether(3).init(jax.random.key(0), BASE)
    with pytest.raises(ValueError, match="divide the 6 outputs"):
        adapters.ether_plus(4).init(jax.random.key(0), BASE)


def test_oft_is_a_rotation_of_the_inputs():
    """Orthogonal, of determinant 1 and block-diagonal; columns keep their lengths and angles."""
    own = {"kernel": {"S": drawn(2, 1)}}
    r = adapters.oft(2).apply({"kernel": np.eye(4, dtype=np.float32)}, own)["kernel"]
    assert not np.any(r[:2, 2:]) and not np.any(r[2:, :2]) and np.abs(r - np.eye(4)).max() > 0.1
    for block, s in ((r[:2, :2], own["kernel"]["S"][0, 0]), (r[2:, 2:], own["kernel"]["S"][1, 0])):
        angle = 2 * np.arctan(s)  # of the Cayley transform in the plane
        expected = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        np.testing.assert_allclose(block, expected, atol=1e-6)
    new = np.asarray(adapters.oft().apply(BASE, {"kernel": {"S": drawn(1, 6)}})["kernel"])
    assert np.abs(new - BASE["kernel"]).max() > 0.1
    np.testing.assert_allclose(new.T @ new, BASE["kernel"].T @ BASE["kernel"], atol=1e-5)
    for blocks, said in ((3, "divide the 4 inputs"), (4, "parts of at least 2 inputs")):
        with pytest.raises(ValueError, match=said):
            adapters.oft(blocks).init(jax.random.key(0), BASE)


def test_hydra_is_a_branch_beside_and_one_after():
    shapes = {"A": (4, 2), "B": (2, 6), "C": (6, 2), "D": (2, 6), "d": (6,)}
    own = {name: drawn(*shape) for name, shape in shapes.items()}
    f = layer(BASE)
    expected = f + 0.5 * (X @ own["A"] @ own["B"] + f @ own["C"] @ own["D"] + own["d"])
    found = layer(adapters.hydra(2, scale=0.5).apply(BASE, {"kernel": own}))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"'kernel': expected a rank of at most 4.*rank=5"):
        adapters.hydra(5).init(jax.random.key(0), BASE)


MLP = {"in": {"kernel": drawn(3, 4), "bias": drawn(4)}, "out": BASE}


def test_adapter_bias_shifts_by_what_a_token_is():
    adapter, own = adapters.adapter_bias(), {"v": drawn(6), "w": drawn(6), "b": drawn()}
    new = adapter.apply({"mlp": MLP}, {"mlp": {"out": {"kernel": own}}})["mlp"]["out"]
    h = layer(BASE)
    np.testing.assert_allclose(
        layer(new), h + np.outer(h @ own["w"] + own["b"], own["v"]), atol=1e-5
    )
    with pytest.raises(ValueError, match=r"adapter_bias: expected MLPs of two layers"):
        adapter.init(jax.random.key(0), {"head": BASE})
    without = {"in": MLP["in"], "out": {"kernel": BASE["kernel"]}}
    with pytest.raises(ValueError, match=r"'mlp/out/kernel': expected a layer with a bias"):
        adapter.init(jax.random.key(0), {"mlp": without})


def test_adapters_in_another_order_average_to_the_same_function():
    """The plain average of two orders is another function."""
    one = {"A": drawn(4, 3), "B": drawn(3, 6)}
    order = [2, 0, 1]
    other = {"A": one["A"][:, order], "B": one["B"][order]}
    lora = adapters.lora(3)
    change = lambda own: lora.apply(BASE, {"kernel": own})["kernel"] - BASE["kernel"]  # noqa: E731
    merged = adapters.mera([one, other])
    np.testing.assert_allclose(change(merged), change(one), atol=1e-5)
    plain = {name: (one[name] + other[name]) / 2 for name in one}
    assert np.abs(change(plain) - change(one)).max() > 0.1

    bottleneck = {
        "down": {"kernel": drawn(2, 4, 3), "bias": drawn(2, 3)},  # of two layers
        "up": {"kernel": drawn(2, 3, 6), "bias": drawn(2, 6)},
    }
    moved = {
        "down": {name: x[..., order] for name, x in bottleneck["down"].items()},
        "up": {**bottleneck["up"], "kernel": bottleneck["up"]["kernel"][:, order]},
    }
    jax.tree.map(np.testing.assert_array_equal, adapters.mera([bottleneck, moved]), bottleneck)
    with pytest.raises(ValueError, match="of one form and rank"):
        adapters.mera([one, {"A": drawn(4, 2), "B": drawn(2, 6)}])
    with pytest.raises(ValueError, match="got none"):
        adapters.mera([])


NET = nets.ResidualMLP(width=8, num_blocks=2)
VELOCITY = nets.velocity(NET)
ROWS, T = drawn(5, 2), np.full(5, 0.3, np.float32)


def random_base():
    shapes = jax.eval_shape(VELOCITY.init, jax.random.key(0), ROWS, T)
    return jax.tree.map(lambda x: 0.5 * drawn(*x.shape), shapes)


def test_a_router_of_one_adapter_is_this_adapter():
    """Gates of 1 and 0, which biases of +-100 give to rounding."""
    base = random_base()
    one = {"a": adapters.lora_activations(2), "b": adapters.lora(1)}
    mixed = adapters.mixture_of_adapters(one, where="head")
    fresh = jax.eval_shape(mixed.init, jax.random.key(0), base)
    params = jax.tree.map(lambda x: drawn(*x.shape), fresh)
    params["head"]["router"] = {"kernel": np.zeros((8, 2), np.float32), "bias": None}
    for i, name in enumerate(one):
        params["head"]["router"]["bias"] = np.where(np.arange(2) == i, 100, -100).astype(np.float32)
        alone = adapters.lora(2 - i, where="head*").apply(base, {"head": params["head"][name]})
        found = VELOCITY.apply(mixed.apply(base, params), ROWS, T)
        np.testing.assert_allclose(found, VELOCITY.apply(alone, ROWS, T), atol=1e-5)


def test_a_small_network_beside_the_base_reads_its_blocks():
    """K-Adapter against its formula, from the blocks run one by one; what it reads depends on
    `after`, and nothing of it goes into the base."""
    base = random_base()
    beside = adapters.k_adapter(2, after=(0, 1), num_blocks=1)
    params = jax.tree.map(
        lambda x: 0.5 * drawn(*x.shape), jax.eval_shape(beside.init, jax.random.key(0), base)
    )
    plain, seen = steering.capture(NET, ["blocks"]).apply(base, ROWS, T)
    seen, plain = np.asarray(seen["blocks"][0]), np.asarray(plain)
    found = np.asarray(VELOCITY.apply(beside.apply(base, params), ROWS, T))
    assert len(seen) == 2

    def norm(h, own):
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
        return h * own["scale"] + own["bias"]

    a = np.zeros_like(seen[0])
    for i, h in enumerate(seen):
        own = jax.tree.map(lambda x: np.asarray(x[i]), params["head"]["layers"])  # noqa: B023
        dense = lambda h, own: h @ own["kernel"] + own["bias"]  # noqa: E731
        y = dense(h + a, own["down"])
        attention = own["SelfAttention_0"]  # of one token: its value
        value = dense(norm(y, own["LayerNorm_0"]), attention["qkv"])[:, -2:]
        y = y + dense(value, attention["out"])
        inner = dense(norm(y, own["LayerNorm_1"]), own["Dense_0"])
        y = y + dense(np.asarray(nn.gelu(inner)), own["Dense_1"])
        a = h + a + dense(y, own["up"])
    expected = plain + a @ params["head"]["out"]["kernel"]
    assert np.abs(found - plain).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)  # float32, of size 1000


def test_a_small_network_beside_says_what_it_cannot_read():
    base = random_base()
    one = lambda **options: adapters.k_adapter(2, **options)  # noqa: E731
    with pytest.raises(ValueError, match=r"blocks from 0 to 1, each once, got \[2\]"):
        one(after=(2,)).init(jax.random.key(0), base)
    with pytest.raises(ValueError, match="expected 'bloks' to meet some leaf.*near it are blocks"):
        one(blocks="bloks").init(jax.random.key(0), base)
    with pytest.raises(ValueError, match=r"expected num_heads to divide rank=2, got num_heads=3"):
        one(num_heads=3)
    with pytest.raises(ValueError, match="expected head='blocks/out' to name one Dense"):
        one(head="blocks/out").init(jax.random.key(0), base)

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x, t, cond=None):
            blocks = nn.scan(
                Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            return nn.Dense(2, name="head")(blocks(name="blocks")(x, None)[0])

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, h, _):
            return nn.Dense(2, name="out")(h), None

    model = adapters.wrap(nets.velocity(Scanned()), one())
    with pytest.raises(ValueError, match="does not leave its scan: expected nn.scan with variable"):
        jax.eval_shape(
            lambda key: model.apply(model.init(key, ROWS, T), ROWS, T), jax.random.key(0)
        )


def test_a_small_network_beside_reads_blocks_of_several_kinds_in_their_order():
    """The tokens of the image of an MMDiT, whose blocks are in three modules."""
    velocity = nets.velocity(nets.MMDiT(width=8, num_layers=4, num_heads=1, dual_layers=2))
    x, t = drawn(2, 4, 4, 1), drawn(2)
    cond = Condition(context=drawn(2, 3, 5), vector=drawn(2, 4))
    shapes = jax.eval_shape(velocity.init, jax.random.key(0), x, t, cond)
    base = jax.tree.map(lambda x: 0.5 * drawn(*x.shape), shapes)
    blocks = "dual_blocks", "blocks", "last_block"
    last = adapters.k_adapter(2, after=(3,), blocks=blocks)
    alone = adapters.k_adapter(2, after=(0,), blocks="last_block")
    fresh = jax.eval_shape(last.init, jax.random.key(0), base)
    params = jax.tree.map(lambda x: 0.5 * drawn(*x.shape), fresh)

    @jax.jit
    def run(base, params):
        adapted = (adapter.apply(base, params) for adapter in (last, alone))
        return [velocity.apply(own, x, t, cond) for own in (base, *adapted)]

    plain, found, expected = run(base, params)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - plain).max() > 0.1


def test_layer_by_layer_leaves_layers_that_were_not_chosen():
    """Also where an adapter divides by a length, in value and gradient."""
    base = random_base()
    for make in (adapters.lora, adapters.ether_plus):
        chosen = make(1, where="blocks/*kernel", layers=(1,))
        lean = adapters.layerwise(chosen, layers=(1,))
        fresh = jax.eval_shape(chosen.init, jax.random.key(0), base)
        params = jax.tree.map(lambda x: 0.5 * drawn(*x.shape), fresh)

        def total(params, adapter):
            return jnp.sum(jnp.sin(VELOCITY.apply(adapter.apply(base, params), ROWS, T)))

        both = [
            jax.jit(jax.value_and_grad(functools.partial(total, adapter=adapter)))(params)
            for adapter in (chosen, lean)
        ]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *both)
    with pytest.raises(ValueError, match="give layerwise the `layers` of its adapter, which are"):
        adapters.layerwise(chosen).apply(base, params)


@pytest.mark.parametrize("lifted", [False, True])
def test_a_network_that_ignores_an_adapter_is_an_error(lifted):
    """A model of one's own that applies a module by itself; also where its functions are jitted,
    and the second call traces nothing."""
    module = NET.clone()

    def own_apply(params, x, t, cond=None, *, key=None):
        if lifted:
            return VELOCITY.apply(params, x, t, cond, key=key)
        return module.apply({"params": params}, x, t, cond)

    model = VELOCITY._replace(apply=jax.jit(own_apply))
    beside = adapters.lora_activations(1, where="blocks/*kernel")
    base = random_base()
    params = {"base": base, "adapter": beside.init(jax.random.key(0), base)}
    for _ in range(2):
        if lifted:
            adapters.wrap(model, beside).apply(params, ROWS, T)
            continue
        with pytest.raises(ValueError, match="wrap: the Velocity ignores the adapter.*nets.veloc"):
            adapters.wrap(model, beside).apply(params, ROWS, T)
    weights = {"base": base, "adapter": params["adapter"]}
    adapters.wrap(model, adapters.lora(1, where="blocks/*kernel")).apply(weights, ROWS, T)


def test_a_base_in_int8_is_near_and_takes_adapters():
    """Kernels are off by at most half a step of 127; the adapter acts on what is read of them."""
    base = random_base()
    small = adapters.quantize(base)
    read = adapters.dequantize(small)
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(base), jax.tree.leaves(read), strict=True
    ):
        if path[-1].key != "kernel":
            np.testing.assert_array_equal(new, old)
            continue
        step = np.abs(old).max(axis=-2, keepdims=True) / 127
        assert np.all(np.abs(new - old) <= 0.501 * step)
    adapter = adapters.lora_activations(2, where="blocks/*kernel")
    fresh = jax.eval_shape(adapter.init, jax.random.key(0), small)
    params = jax.tree.map(lambda x: drawn(*x.shape), fresh)
    found = VELOCITY.apply(adapter.apply(small, params), ROWS, T)
    expected = VELOCITY.apply(adapter.apply(read, params), ROWS, T)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_lora_beside_the_layers_holds_no_second_copy_of_the_base():
    """The temporary memory of a gradient: that of the activations alone, or of the kernels too."""
    wide = nets.velocity(nets.ResidualMLP(width=256, num_blocks=4))
    x, t = jnp.ones((2, 2)), jnp.ones(2)
    base = jax.eval_shape(wide.init, jax.random.key(0), x, t)
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(base["blocks"]))

    def temporary(adapter):
        wrapped = adapters.wrap(wide, adapter)

        def loss(params, base):
            return jnp.sum(wrapped.apply({"base": base, "adapter": params}, x, t))

        params = jax.eval_shape(adapter.init, jax.random.key(0), base)
        compiled = jax.jit(jax.grad(loss)).lower(params, base).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(adapters.lora_activations(2, where="blocks/*kernel")) < 0.4 * size
    assert temporary(adapters.lora(2, where="blocks/*kernel")) > 0.9 * size
