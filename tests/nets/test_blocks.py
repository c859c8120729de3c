"""What takes the place of the MLP and of the residual connection of a transformer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflow
from jflow import adapters, losses, nets, steering
from jflow.nets import routers
from jflow.nets._product_keys import best_pairs

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4, 4, 2)).astype(np.float32)  # four tokens each
T = np.float32([0.2, 0.5, 0.9])
Y = RNG.normal(size=(2, 6, 4)).astype(np.float32)
TINY = {"width": 8, "num_layers": 2, "num_heads": 2}
FLOAT = 2e-6  # outputs of size 1, of sums of about ten products in float32


def spread(params):
    """Params away from their initial values, so that no part of a network is zero."""
    return jax.tree.map(
        lambda p: p + 0.2 * np.random.default_rng(p.size).normal(size=p.shape).astype(p.dtype),
        params,
    )


def drawn(init, *args):
    """Params of the shapes that init makes, normal over the root of what a column sums; to run init
    would be one more program."""
    shapes, rng = jax.eval_shape(init, jax.random.key(0), *args), np.random.default_rng(1)
    size = lambda p: p.shape[-2] ** 0.5 if len(p.shape) > 1 else 2.0  # noqa: E731
    return jax.tree.map(lambda p: (rng.normal(size=p.shape) / size(p)).astype(p.dtype), shapes)


def made(module, *args):
    """(drawn params, outputs) of a module that stands alone."""
    params = drawn(module.init, *args)["params"]
    return params, jax.device_get(jax.jit(module.apply)({"params": params}, *args))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# --- no row knows its neighbors ---

ALL = nets.DiT(
    **TINY,
    mlp=nets.MixtureOfExperts(4, routers.rectified(2), ratio=2),
    residual=nets.HyperConnections(2),
    shared=True,
    remat=True,
    dropout=0.5,
)
MODULES = {
    "experts": nets.MixtureOfExperts(4, routers.top_k(2), ratio=2),
    "limited experts": nets.MixtureOfExperts(4, routers.limited(1, capacity=1.0), ratio=2),
    "rectified experts": nets.MixtureOfExperts(4, routers.rectified(2), ratio=2),
    "product keys": nets.ProductKeyExperts(num_keys=4, k=3, num_heads=2, key_size=3),
    "parameter tokens": nets.ParameterAttention(5),
}


def check_rows(apply, params, rows, key):
    """Permuted rows have the permuted outputs, one row has the same between other ones, and the
    gradient reaches all params."""

    @jax.jit
    def run(params, rows):
        def square(params):
            return jnp.sum(apply(params, *rows, key=key) ** 2), apply(params, *rows, key=None)

        return jax.grad(square, has_aux=True)(params)

    take = lambda rows, at: [a[at] for a in rows]  # noqa: E731
    gradient, out = jax.device_get(run(params, rows))
    _, reversed_ = jax.device_get(run(params, take(rows, slice(None, None, -1))))
    others = [np.where(np.arange(len(a)).reshape(-1, *[1] * (a.ndim - 1)) == 1, a, 0) for a in rows]
    _, between = jax.device_get(run(params, others))
    size = np.abs(out).max()
    assert 0.1 < size < 100
    np.testing.assert_allclose(reversed_[::-1], out, atol=FLOAT * size)
    np.testing.assert_allclose(between[1], out[1], atol=FLOAT * size)
    assert np.abs(between[0] - out[0]).max() > 0.01 * size
    still = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(gradient)
        if not np.any(g) or not np.all(np.isfinite(g))
    ]
    assert not still, still


@pytest.mark.parametrize("name", MODULES)
def test_a_row_does_not_know_its_neighbors(name):
    module = MODULES[name]
    params, _ = made(module, Y)
    check_rows(lambda p, y, key: module.apply({"params": p}, y), params, [Y], None)


def test_a_velocity_does_not_know_its_neighbors():
    """With experts and streams in shared blocks. It is zero at first, and has a forward mode."""
    v = jflow.velocity(ALL)
    assert not np.any(jax.jit(lambda key: v.init(key, X, T)["head"]["kernel"])(jax.random.key(0)))
    params = drawn(v.init, X, T)
    out, _ = jax.eval_shape(lambda x: jax.jvp(lambda x: v.apply(params, x, T), (x,), (x,)), X)
    assert out.shape == X.shape
    check_rows(v.apply, params, [X, T], jax.random.key(1))


def test_the_type_of_the_computation_reaches_the_experts():
    """In bfloat16 the output is that of float32 to three digits, and params stay float32."""
    net = nets.DiT(**TINY, mlp=nets.MixtureOfExperts(2, routers.top_k(1)), dtype=jnp.bfloat16)
    v = jflow.velocity(net)
    params = jax.eval_shape(v.init, jax.random.key(0), X, T)
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype("float32")}
    lowered = str(jax.make_jaxpr(v.apply)(params, X, T))
    hidden = f"bf16[2,{X.shape[0]},4,32]"  # experts, rows, tokens, four widths
    assert hidden in lowered and hidden.replace("bf16", "f32") not in lowered


# --- routers ---


def probabilities(n=6, experts=4, rows=3):
    """Of which the first expert is everybody's favorite in the last row."""
    logits = np.random.default_rng(1).normal(size=(rows, n, experts))
    logits[-1, :, 0] += 5
    return softmax(logits).astype(np.float32)


def limited_by_hand(p, k, slots):
    """Token by token, all first choices first."""
    taken = np.zeros_like(p)
    for row in range(p.shape[0]):
        order = np.argsort(-p[row], axis=-1, kind="stable")
        for choice in range(k):
            for token in range(p.shape[1]):
                e = order[token, choice]
                taken[row, token, e] = taken[row, :, e].sum() < slots
    return taken


@pytest.fixture(scope="module")
def sent():
    p = probabilities()
    routes = (routers.top_k(2), routers.limited(2, capacity=1.0), routers.rectified(2))
    return p, jax.device_get([route(p)[0] for route in routes])


def test_weights_are_the_probabilities_of_the_chosen(sent):
    p, (all_, limited, rectified) = sent
    best = p >= np.sort(p, axis=-1)[..., -2:-1]
    np.testing.assert_allclose(all_, np.where(best, p, 0) / (p * best).sum(-1, keepdims=True), 1e-6)
    for weights in (limited, rectified):
        total = (p * (weights > 0)).sum(-1, keepdims=True)
        np.testing.assert_allclose(weights * total, np.where(weights > 0, p, 0), rtol=1e-5)


def test_limited_drops_what_comes_late(sent):
    """6 tokens, 2 choices, 4 experts: 3 slots, against a loop."""
    p, (_, limited, _) = sent
    np.testing.assert_array_equal(limited > 0, limited_by_hand(p, 2, 3))
    assert np.all((limited > 0).sum(1) <= 3) and np.any((limited > 0).sum(-1) < 2)


def test_rectified_drops_no_token_and_leaves_no_slot_empty(sent):
    p, (_, limited, rectified) = sent
    used = rectified > 0
    assert np.all(used.sum(1) == 3) and np.all(used.any(-1))
    assert np.all(used | ~(limited > 0))  # whoever found room keeps it
    # one choice, room for two: a token that is refused goes to its best expert with room
    crowd = np.float32([[[0.6, 0.3, 0.1]] * 5 + [[0.2, 0.3, 0.5]]])
    weights = jax.device_get(routers.rectified(1)(crowd)[0])
    np.testing.assert_array_equal(weights[0].argmax(-1), [0, 0, 1, 1, 2, 2])


def test_one_choice_keeps_its_probability():
    p = probabilities()
    weights, slots = routers.top_k(1)(p)
    np.testing.assert_array_equal(jax.device_get(weights).max(-1), p.max(-1))
    assert slots == 6 and routers.limited(1, capacity=1.0)(p)[1] == 2  # 6 / 4, rounded up


@pytest.mark.parametrize(
    "router", [routers.top_k(2), routers.limited(2, capacity=1.0), routers.rectified(2)]
)
def test_experts_are_a_weighted_sum(router):
    """Against all experts on all tokens, by loops in numpy."""
    module = nets.MixtureOfExperts(4, router, ratio=2)
    params, out = made(module, Y)
    weights = jax.device_get(router(softmax(Y @ params["router"]["kernel"]))[0])
    enter, leave = params["experts"]["in"], params["experts"]["out"]
    expected = sum(
        weights[..., e, None]
        * (gelu(Y @ enter["kernel"][e] + enter["bias"][e]) @ leave["kernel"][e] + leave["bias"][e])
        for e in range(4)
    )
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_a_capacity_saves_work():
    """Floating-point operations of one call outside any scan: slots of n tokens for each expert."""

    def cost(router):
        module = nets.MixtureOfExperts(8, router)
        y = jax.ShapeDtypeStruct((1, 64, 32), np.float32)
        params = jax.eval_shape(module.init, jax.random.key(0), y)
        return jax.jit(module.apply).lower(params, y).cost_analysis()["flops"]

    # Matrices of width 32 and 128 make nearly all of it; the rest is routing.
    assert cost(routers.limited(2, capacity=1.0)) < 0.35 * cost(routers.top_k(2))


# --- other backbones ---


class Gelu(nn.Module):
    """The MLP of U-ViT."""

    @nn.compact
    def __call__(self, y):
        enter, leave = nn.Dense(4 * y.shape[-1], name="in"), nn.Dense(y.shape[-1], name="out")
        return leave(nn.gelu(enter(y), approximate=False))


class Gated(nn.Module):
    """The MLP of LightningDiT."""

    @nn.compact
    def __call__(self, y):
        gate, value = jnp.split(nn.Dense(2 * 21, name="in")(y), 2, axis=-1)
        return nn.Dense(y.shape[-1], name="out")(nn.silu(gate) * value)


@pytest.mark.parametrize(
    ("net", "mlp", "blocks"),
    [
        (nets.UViT(**TINY), Gelu(), ["in_blocks", "mid_block", "out_blocks"]),
        (nets.LightningDiT(**TINY), Gated(), ["blocks"]),
    ],
)
def test_an_mlp_of_its_own_stands_where_the_usual_one_does(net, mlp, blocks):
    """With a module that is the usual MLP, the same velocity; each block has its own params."""
    usual, given = jflow.velocity(net), jflow.velocity(net.clone(mlp=mlp))

    @jax.jit
    def run(key):
        params = spread(usual.init(key, X, T))
        moved = dict(params)
        for name in blocks:
            block = dict(params[name])
            block["mlp"] = {"in": block.pop("mlp_in"), "out": block.pop("mlp_out")}
            moved[name] = block
        return moved, usual.apply(params, X, T), given.apply(moved, X, T)

    moved, expected, found = jax.device_get(run(jax.random.key(0)))
    first = jax.eval_shape(given.init, jax.random.key(0), X, T)
    assert jax.tree.map(np.shape, moved) == jax.tree.map(np.shape, first)
    np.testing.assert_allclose(found, expected, atol=FLOAT * np.abs(expected).max())
    assert np.abs(expected).max() > 0.1
    with pytest.raises(TypeError, match="expected mlp to be an instance of flax.linen.Module"):
        net.clone(mlp=jnp.tanh)


# --- WideNet, and reports of the routers ---


def test_shared_blocks_are_equal_blocks():
    """The network with shared blocks is the usual one whose blocks have equal params, and says the
    same of its routers, and of what is captured inside a block."""
    options = {**TINY, "mlp": nets.MixtureOfExperts(4, routers.top_k(2), ratio=2)}
    shared, usual = nets.DiT(**options, shared=True), nets.DiT(**options)
    params = drawn(nets.routed(shared).init, X, T)
    rest = {name: tree for name, tree in params.items() if name not in ("shared", "stacked")}
    tiled = jax.tree.map(lambda p: np.stack([p, p]), params["shared"])
    equal = {**rest, "blocks": {**tiled, **params["stacked"]}}
    assert set(params["shared"]) == {"attention", "mlp"}
    assert set(params["stacked"]) == {"modulation"}

    def run(net, part, params):
        reader = steering.capture(net, [f"{part}/attention"])
        return nets.routed(net).apply(params, X, T), list(reader.apply(params, X, T)[1].values())

    found, expected = jax.device_get(
        jax.jit(
            lambda *params: (run(shared, "shared", params[0]), run(usual, "blocks", params[1]))
        )(params, equal)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    load = found[0]["load"]
    assert load.shape == (3, 2, 4)
    np.testing.assert_allclose(load.sum(-1), 2, rtol=1e-6)  # two experts a token


def test_adapters_and_int8_reach_shared_blocks():
    """LoRA beside the kernels is LoRA in them, and kernels in int8 are those in floats again."""
    v, where = jflow.velocity(nets.DiT(**TINY, shared=True)), ["shared/*kernel", "stacked/*kernel"]
    beside, inside = (make(2, where=where) for make in (adapters.lora_activations, adapters.lora))

    @jax.jit
    def run(key):
        base = spread(v.init(key, X, T))
        own = spread(beside.init(key, base))
        small = adapters.quantize(base, where=where)
        params = base, small, adapters.dequantize(small), beside.apply(base, own)
        return own, [v.apply(p, X, T) for p in (*params, inside.apply(base, own))]

    own, (plain, *found) = jax.device_get(run(jax.random.key(0)))
    assert own["shared"]["in"]["kernel"]["A"].shape == (8, 2)  # one for all
    assert own["stacked"]["modulation"]["kernel"]["A"].shape == (2, 8, 2)  # one for each
    for a, b in (found[:2], found[2:]):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert np.abs(a - plain).max() > 1e-3


def test_shared_blocks_are_traced_once_in_a_call():
    """However deep the network is: their init is not run again to compare it with the params."""
    calls = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, y):
            calls.append(y.shape)
            return nn.Dense(y.shape[-1])(y)

    v = jflow.velocity(nets.DiT(**{**TINY, "num_layers": 5}, mlp=Counted(), shared=True))
    params = jax.eval_shape(v.init, jax.random.key(0), X, T)
    calls.clear()
    jax.eval_shape(v.apply, params, X, T)
    assert len(calls) == 1


def test_balance_is_one_for_even_loads_and_e_for_a_collapse():
    from jflow.types import Field

    def said(load):
        def apply(params, x, t, cond=None, *, key=None):
            load_, p = (jnp.broadcast_to(jnp.float32(a), (len(x), 1, 4)) for a in (load, params))
            return {"velocity": 0 * x, "first": load_, "probability": p}

        loss = losses.balanced_matching(Field(lambda *args: {}, apply), weight=0.5)
        batch = {"x0": np.zeros((2, 3), np.float32), "x": np.ones((2, 3), np.float32)}
        return lambda p: loss(p, jax.random.key(0), batch)

    even, one = np.full(4, 0.25, np.float32), np.float32([1, 0, 0, 0])
    value, metrics = said(2 * even)(even)
    assert float(value) == 1.5 and float(metrics["balance"]) == 1.0 == float(metrics["matching"])
    assert float(said(one)(one)[1]["balance"]) == 4.0
    slope = jax.grad(lambda p: said(one)(p)[0])(even)
    np.testing.assert_allclose(slope, 0.5 * 4 * one)  # less for the expert that has everything


# --- product keys ---


def test_product_keys_find_the_best_of_all_pairs():
    """The k best sums, and the output, against all m^2 experts."""
    scores = np.random.default_rng(2).normal(size=(2, 5, 6)).astype(np.float32)
    best, pairs = jax.device_get(best_pairs(scores, 3))
    whole = (scores[0][:, :, None] + scores[1][:, None]).reshape(5, 36)
    order = np.argsort(-whole, axis=-1)[:, :3]
    np.testing.assert_array_equal(pairs, order)
    np.testing.assert_array_equal(best, np.take_along_axis(whole, order, -1))

    module = nets.ProductKeyExperts(num_keys=4, k=3, num_heads=2, key_size=2)
    params, out = made(module, Y)
    q = (Y @ params["queries"]["kernel"] + params["queries"]["bias"]).reshape(2, 6, 2, 2, 2)
    q = (q - q.mean(-1, keepdims=True)) / np.sqrt(q.var(-1, keepdims=True) + 1e-6)
    q = q * params["norm"]["scale"] + params["norm"]["bias"]
    half = np.einsum("bnhps,pms->pbnhm", q, params["keys"])
    s = (half[0][..., :, None] + half[1][..., None, :]).reshape(2, 6, 2, 16)
    s = softmax(np.where(s >= np.sort(s)[..., -3:-2], s, -np.inf))
    expected = np.einsum("bnhe,bne,ed->bnd", s, gelu(Y @ params["down"].T), params["up"])
    np.testing.assert_allclose(out, expected, atol=1e-5)


# --- parameter tokens ---


def test_parameter_tokens_follow_their_formula_and_grow_exactly():
    params, out = made(nets.ParameterAttention(5), Y)
    s = Y @ params["keys"].T
    s = np.sqrt(5) * s / np.linalg.norm(s, axis=-1, keepdims=True)
    np.testing.assert_allclose(out, gelu(s) @ params["values"], atol=FLOAT * 5)

    grow = lambda params: nets.add_parameter_tokens(params, jax.random.key(1), 7)  # noqa: E731
    square = lambda p: jnp.sum(nets.ParameterAttention(5).apply({"params": p}, Y) ** 2)  # noqa: E731
    slope = jax.jit(jax.grad(square))(grow(params))
    assert np.all(np.any(slope["keys"][5:] != 0, axis=-1))  # the new ones learn

    v = jflow.velocity(nets.DiT(**TINY, mlp=nets.ParameterAttention(5)))
    small = drawn(v.init, X, T)
    large = grow(small)
    assert large["blocks"]["mlp"]["values"].shape == (2, 12, 8)
    before, after = jax.device_get([jax.jit(v.apply)(p, X, T) for p in (small, large)])
    np.testing.assert_allclose(after, before, atol=FLOAT * np.abs(before).max())


def test_a_token_of_zeros_is_finite():
    params, _ = made(nets.ParameterAttention(5), Y)
    run = lambda y: nets.ParameterAttention(5).apply({"params": params}, y)  # noqa: E731
    value, slope = jax.jvp(run, (0 * Y,), (Y,))
    assert not np.any(value) and np.all(np.isfinite(slope))


# --- hyper-connections ---


def test_hyper_connections_begin_as_the_residual_network():
    """Whatever the other params are."""
    plain = jflow.velocity(nets.DiT(**TINY))
    rich = jflow.velocity(nets.DiT(**TINY, residual=nets.HyperConnections(3)))
    start = jax.jit(rich.init)(jax.random.key(0), X, T)
    is_connection = lambda path: "residual" in jax.tree_util.keystr(path)  # noqa: E731
    params = jax.tree_util.tree_map_with_path(
        lambda path, old, new: old if is_connection(path) else new, start, spread(start)
    )
    blocks = {k: p for k, p in params["blocks"].items() if not k.endswith("residual")}
    assert len(blocks) == len(params["blocks"]) - 2  # those of attention and MLP
    expected, found = jax.device_get(
        (
            jax.jit(plain.apply)({**params, "blocks": blocks}, X, T),
            jax.jit(rich.apply)(params, X, T),
        )
    )
    np.testing.assert_allclose(found, expected, atol=FLOAT * np.abs(expected).max())


def test_the_ladder_is_its_recursion():
    module, rng = nets.LadderResidual(), np.random.default_rng(0)
    branches = [lambda x, w=w: np.tanh(x @ w) for w in rng.normal(size=(4, 3, 3))]
    before = now = rng.normal(size=(2, 5, 3))
    h = jnp.asarray(np.stack([now, now], axis=2), jnp.float32)
    for f in branches:
        x, add = module.apply({}, h)
        h = add(f(np.asarray(x)))
        before, now = now, now + f(before)
        np.testing.assert_allclose(h.mean(2), now, atol=1e-5)  # float32, of numbers up to 4
    net = nets.DiT(**TINY, residual=module)
    trees = [jax.eval_shape(n.init, jax.random.key(0), X, T) for n in (net, nets.DiT(**TINY))]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])


def test_hyper_connections_follow_their_formula():
    module = nets.HyperConnections(3)
    h = np.random.default_rng(3).normal(size=(2, 5, 3, 4)).astype(np.float32)

    def run(h):
        x, add = module.apply({"params": params}, h)
        return x, add(2 * x)

    params = drawn(lambda key, h: module.init_with_output(key, h)[1]["params"], h)
    x, after = jax.device_get(jax.jit(run)(h))
    norm = params["norm"]
    y = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    c = np.tanh((y * norm["scale"] + norm["bias"]) @ params["change"]["kernel"])
    read = params["read"] + params["reading"] * c[..., 0]
    mix = params["mix"] + params["reading"] * c[..., 1:4]
    write = params["write"] + params["writing"] * c[..., 4]
    expected = sum(read[..., i, None] * h[..., i, :] for i in range(3))
    np.testing.assert_allclose(x, expected, atol=1e-5)
    for j in range(3):
        kept = sum(mix[..., i, j, None] * h[..., i, :] for i in range(3))
        np.testing.assert_allclose(
            after[..., j, :], kept + write[..., j, None] * 2 * expected, atol=1e-5
        )


# --- bad input ---


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nets.MixtureOfExperts(0), "num_experts to be a whole number of at least 1, got 0"),
        (lambda: routers.top_k(0), "k to be a whole number"),
        (lambda: routers.limited(1, capacity=0.0), "capacity that is positive and finite, got 0"),
        (lambda: routers.rectified(1, capacity=0.5), "capacity that is finite and >= 1, got 0.5"),
        (lambda: routers.top_k(5)(probabilities()), "k of at most 4 experts, got 5"),
        (lambda: nets.ProductKeyExperts(4, k=5), "k of at most num_keys=4, got 5"),
        (lambda: nets.ParameterAttention(0), "num_tokens to be a whole number"),
        (lambda: nets.ParameterAttention(4, scale=0.0), "expected scale > 0, got 0"),
        (
            lambda: nets.add_parameter_tokens({"a": np.zeros(2)}, jax.random.key(0), 2),
            r"with a ParameterAttention, got \['a'\]",
        ),
        (lambda: nets.HyperConnections(0), "streams to be a whole number"),
        (lambda: nets.HyperConnections(2, dynamic=0.0), "dynamic > 0, or None for the static form"),
        (
            lambda: nets.HyperConnections(2).init(jax.random.key(0), np.zeros((1, 5, 3, 4))),
            r"h of shape \[b, n, 2, width\], got \[1, 5, 3, 4\]",
        ),
        (lambda: losses.balanced_matching(nets.routed(nets.DiT()), weight=-1.0), "weight >= 0"),
    ],
)
def test_bad_values(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_bad_options_of_a_network():
    with pytest.raises(TypeError, match="TokenDiT: expected mlp to be an instance of flax.linen"):
        nets.TokenDiT(mlp=jnp.tanh)
    with pytest.raises(TypeError, match=r"DiT: expected residual to be nets.HyperConnections\(\)"):
        nets.DiT(residual=nets.MixtureOfExperts())
    with pytest.raises(ValueError, match="mixtures of one number of experts.*got mixtures of none"):
        net = nets.routed(nets.DiT(**TINY))
        jax.eval_shape(lambda key: net.apply(net.init(key, X, T), X, T), jax.random.key(0))


def test_norms_that_other_options_leave_no_place_for():
    with pytest.raises(ValueError, match="DiT: a norm inside the MLP has no place in an mlp"):
        nets.DiT(norm=nets.norm_former(), mlp=nets.MixtureOfExperts(2))
    with pytest.raises(ValueError, match="TokenDiT: expected a residual or a norm that joins"):
        nets.TokenDiT(norm=nets.ngpt(), residual=nets.HyperConnections())


def test_norms_stand_beside_the_blocks():
    """A norm after each branch, and one in front of it, with experts and streams."""
    v = jflow.velocity(ALL.clone(norm=nets.peri_norm(nets.RMSNorm)))
    params = jax.eval_shape(v.init, jax.random.key(0), X, T)
    assert set(params["shared"]) == {"attention", "mlp"}
    assert {"attention_after", "mlp_after", "modulation"} <= set(params["stacked"])
    assert params["stacked"]["mlp_after"]["scale"].shape == (2, 8)
