"""Normalizations: each formula, where they stand, and what the papers say is the same."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jflow
from jflow import nets
from jflow._core.linen import apply_linen, init_linen
from jflow.types import Condition

WIDTH = 6
X = np.random.default_rng(0).normal(size=(2, 3, WIDTH)) + 0.5
IMAGE = jnp.asarray(np.random.default_rng(5).normal(size=(2, 2, 6, 1)), jnp.float32)
T = jnp.asarray([0.2, 0.7])
TEXT = Condition(context=jnp.ones((2, 3, 4)), vector=jnp.ones((2, 2)))
SIZES = {"width": 8, "num_layers": 2, "num_heads": 2}
BACKBONES = {
    "DiT": (partial(nets.DiT, **SIZES), (IMAGE, T)),
    "TokenDiT": (partial(nets.TokenDiT, **SIZES), (X, T)),
    "LightningDiT": (partial(nets.LightningDiT, **SIZES), (IMAGE, T)),
    "UViT": (partial(nets.UViT, **SIZES), (IMAGE, T)),
    "MMDiT": (partial(nets.MMDiT, **{**SIZES, "num_layers": 3}, dual_layers=1), (IMAGE, T, TEXT)),
    "Flux": (partial(nets.Flux, **SIZES, rope_axes=(0, 2, 2)), (IMAGE, T, TEXT)),
    "ViT": (partial(nets.ViT, **SIZES), (X,)),
    "CausalTransformer": (partial(nets.CausalTransformer, **SIZES), (X,)),
    "TarFlowTransformer": (partial(nets.TarFlowTransformer, **SIZES), (X,)),
}
PER_TOKEN = ("ViT", "CausalTransformer", "TarFlowTransformer")


def drawn(init, *args, seed=0, scale=0.4):
    """Params of the shapes that init(key, *args) makes."""
    shapes, rng = jax.eval_shape(init, jax.random.key(0), *args), np.random.default_rng(seed)
    return jax.tree.map(lambda p: (scale * rng.normal(size=p.shape)).astype(p.dtype), shapes)


def rms(x):
    return np.sqrt((x**2).mean(-1, keepdims=True))


def length(x):
    return np.linalg.norm(x, axis=-1)


FORMULAS = {
    "layer": (
        nets.LayerNorm,
        lambda x, s, b: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * s + b,
    ),
    "rms": (nets.RMSNorm, lambda x, s, b: x / rms(x) * s),
    "crms": (
        nets.CRMSNorm,
        lambda x, s, b: x / rms(np.append(x, -x.sum(-1, keepdims=True), -1)) * s,
    ),
    "dyt": (partial(nets.DyT, alpha=0.7), lambda x, s, b: np.tanh(0.7 * x) * s + b),
    "unit": (nets.UnitNorm, lambda x, s, b: x / length(x)[..., None] * s),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name):
    """Against numpy in float64, where an epsilon of 1e-6 beside squares of order one is left."""
    make, formula = FORMULAS[name]
    scale, bias = np.random.default_rng(1).normal(size=(2, WIDTH))
    with jax.enable_x64(True):
        for affine in (True, False):
            net = make(affine=affine, dtype=None, name=None)
            params = dict(net.init(jax.random.key(0), jnp.asarray(X)).get("params", {}))
            assert ("scale" in params) == affine
            given = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
            params |= {key: given[key] for key in params if key in given}
            s, b = (scale, bias) if affine else (1, 0)
            found = net.apply({"params": params}, jnp.asarray(X))
            np.testing.assert_allclose(found, formula(X, s, b), rtol=1e-5, atol=1e-5)
    low = make(affine=False, dtype=jnp.bfloat16, name=None)
    assert low.init_with_output(jax.random.key(0), X)[0].dtype == jnp.bfloat16


def test_dyt_is_elementwise_with_the_slope_of_the_paper():
    """At zero the Jacobian is scale alpha on the diagonal; |y - bias| <= |scale| far out."""
    net = nets.DyT(alpha=0.7)
    scale = jnp.linspace(-2, 2, WIDTH)
    params = {"params": {"alpha": jnp.asarray(0.7), "scale": scale, "bias": jnp.ones(WIDTH)}}
    slope = jax.jacfwd(partial(net.apply, params))(jnp.zeros(WIDTH))
    np.testing.assert_allclose(slope, np.diag(0.7 * scale), atol=1e-6)
    far = net.apply(params, jnp.full(WIDTH, 1e6)) - 1
    np.testing.assert_allclose(far, scale, atol=1e-6)


def test_pre_norms_on_a_recentered_stream_are_one_network():
    """DiT under random gates in float64: LayerNorm and the recentered RMSNorm differ by rounding,
    RMSNorm alone does not compute that."""
    with jax.enable_x64(True):
        make, x = BACKBONES["DiT"][0], np.asarray(IMAGE, np.float64)
        params = drawn(partial(init_linen, make()), x, T)

        @jax.jit
        def run(params, x):
            norms = nets.LayerNorm, nets.pre_rms_norm(), nets.RMSNorm
            return [apply_linen(make(norm=norm), params, x, T) for norm in norms]

        layer, recentered, other = run(params, x)
    np.testing.assert_allclose(recentered, layer, atol=1e-12)
    assert np.abs(other - layer).max() > 1e-2


def test_the_compressed_norm_is_the_same_network_with_one_number_less():
    """A pre-norm tower on tokens of mean zero: the last number is left out, writers lose its
    column, and readers subtract its row."""
    rng, d, depth = np.random.default_rng(2), 8, 3
    with jax.enable_x64(True):
        readers, writers = rng.normal(size=(2, depth, d, d)) / 2
        writers = writers - writers.mean(-1, keepdims=True)
        h = rng.normal(size=(4, d))
        h = h - h.mean(-1, keepdims=True)
        streams = {nets.LayerNorm: h, nets.RMSNorm: h, nets.CRMSNorm: h[:, :-1]}
        for norm, tokens in streams.items():
            for reader, writer in zip(readers, writers, strict=True):
                y = norm(affine=False).apply({}, jnp.asarray(tokens))
                if norm is nets.CRMSNorm:
                    reader, writer = reader[:-1] - reader[-1:], writer[:, :-1]
                tokens = tokens + np.tanh(y @ reader) @ writer
            streams[norm] = np.asarray(tokens)
    np.testing.assert_allclose(streams[nets.RMSNorm], streams[nets.LayerNorm], atol=1e-12)
    np.testing.assert_allclose(streams[nets.CRMSNorm], streams[nets.LayerNorm][:, :-1], atol=1e-12)
    assert np.abs(streams[nets.LayerNorm] - h).max() > 0.1


def block_run(norm, change=lambda params: params, seed=3):
    """A block of ViT with its own random params: (tokens in, tokens out, params)."""
    block = nets._vit.ViTBlock(2, 2, None, nets.dot_product_attention, norm)
    h = np.random.default_rng(seed).normal(size=(2, 3, 8)).astype(np.float32)
    params = change(drawn(block.init, h, None)["params"])
    return h, jax.device_get(jax.jit(block.apply)({"params": params}, h, None)[0]), params


def times(c, *paths):
    """A change of params: kernels and biases of the modules at paths are multiplied by c."""

    def change(params):
        for path in paths:
            inner = params
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = jax.tree.map(lambda leaf: np.float32(c) * leaf, inner[path[-1]])
        return params

    return change


def test_branches_of_peri_norm_are_bounded_whatever_their_weights():
    """Two branches add at most the largest |scale| of their norms, in root mean square, and each
    bias; weights times 100 change nothing, to rounding and the epsilon."""
    many = times(100.0, ("attention", "out"), ("leave",))
    h, plain, params = block_run(nets.peri_norm(nets.RMSNorm))
    _, scaled, _ = block_run(nets.peri_norm(nets.RMSNorm), many)
    np.testing.assert_allclose(scaled, plain, atol=1e-4)
    most = sum(np.abs(params[f"{name}_after"]["scale"]).max() for name in ("attention", "mlp"))
    assert rms(plain - h).max() <= most + 1e-5
    _, without, _ = block_run(nets.Norms(nets.RMSNorm), many)
    assert rms(without - h).max() > 10 * most


def test_norm_former_scales_heads_where_values_do():
    """Values times c are a head scale over c: the branch's own norm stands behind both."""

    def values(params):
        qkv = params["attention"]["qkv"]
        c = np.repeat(np.float32([1, 4]), [16, 8])
        params["attention"]["qkv"] = {"kernel": qkv["kernel"] * c[None], "bias": qkv["bias"] * c}
        return times(0.25, ("attention", "head_norm"))(params)

    _, plain, params = block_run(nets.norm_former())
    _, other, _ = block_run(nets.norm_former(), values)
    np.testing.assert_allclose(other, plain, atol=1e-5)
    assert params["attention"]["head_norm"]["scale"].shape == (2, 1)
    _, unscaled, _ = block_run(nets.norm_former(), times(0.25, ("attention", "head_norm")))
    np.testing.assert_allclose(unscaled, plain, atol=0.5)  # the norm behind it takes most out


def test_tokens_of_ngpt_stay_on_the_sphere():
    """Length 1 behind each block; what a branch writes counts by its direction alone, so that
    kernels times c are the same network."""
    _, out, _ = block_run(nets.ngpt())
    np.testing.assert_allclose(length(out), 1, atol=1e-6)
    _, scaled, _ = block_run(nets.ngpt(), times(7.0, ("attention", "out"), ("leave",)))
    np.testing.assert_allclose(scaled, out, atol=1e-5)
    net = nets.ViT(**SIZES, norm=nets.ngpt())
    stored = jax.jit(lambda key: net.init(key, X)["params"]["blocks"]["mlp_join"]["rate"])
    np.testing.assert_allclose(stored(jax.random.key(0)), 8**-0.5, rtol=1e-6)  # an effective 0.05


def test_skips_leave_tokens_where_the_norm_keeps_them():
    """A block of U-ViT joins a skip by a linear map. On the sphere its length does not count; with
    a stream of mean zero the block is that of LayerNorm, recentered."""
    rng = np.random.default_rng(6)
    h, skip = jnp.asarray(rng.normal(size=(2, 2, 3, 8)), jnp.float32)
    block = lambda norms: nets._uvit.UViTBlock(2, 2, None, norms=norms)  # noqa: E731
    layer = nets.Norms(nets.LayerNorm)

    @jax.jit
    def run(key):
        sphere = drawn(block(nets.ngpt()).init, h, skip)["params"]
        longer = times(7.0, ("skip",))({**sphere})
        centered = drawn(block(nets.pre_rms_norm()).init, h, skip)["params"]
        with_bias = block(layer).init(key, h, skip)["params"]
        params = {**with_bias, **centered}
        for name in ("attention_norm", "mlp_norm"):
            params[name] = {**with_bias[name], **centered[name]}
        pairs = (nets.ngpt(), sphere), (nets.ngpt(), longer), (nets.pre_rms_norm(), centered)
        found = [block(n).apply({"params": p}, h, skip)[0] for n, p in (*pairs, (layer, params))]
        return found

    plain, scaled, centered, usual = jax.device_get(run(jax.random.key(0)))
    np.testing.assert_allclose(scaled, plain, atol=1e-5)
    np.testing.assert_allclose(centered, usual - usual.mean(-1, keepdims=True), atol=1e-5)
    assert np.abs(usual.mean(-1)).max() > 0.1


def test_a_step_of_ngpt_by_hand():
    rng = np.random.default_rng(4)
    h, branch, gate = rng.normal(size=(3, 2, 1, 4))
    h = h / length(h)[..., None]
    step = nets._normalization.UnitStep(rate=0.3)
    params = {"params": {"rate": jnp.full(4, -0.5)}}  # its absolute value counts: 0.5 / 4^-0.5 = 1
    found = step.apply(params, *(jnp.asarray(a, jnp.float32) for a in (h, branch, gate)))
    expected = h + 0.3 * (1 + gate) * (branch / length(branch)[..., None] - h)
    np.testing.assert_allclose(found, expected / length(expected)[..., None], atol=1e-6)


def test_rows_of_kernels_are_unit_after_a_step():
    net = nets.ViT(**SIZES, norm=nets.ngpt())
    params, gradient = (drawn(net.init, X, seed=seed)["params"] for seed in (1, 2))
    optimizer = optax.chain(optax.sgd(0.1), nets.unit_kernels())

    @jax.jit
    def step(params, gradient):
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    moved = jax.device_get(step(params, gradient))
    for path, axis in (("in", -2), ("leave", -1)):
        np.testing.assert_allclose(
            np.linalg.norm(moved["blocks"][path]["kernel"], axis=axis), 1, atol=1e-5
        )
    qkv = moved["blocks"]["attention"]["qkv"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(qkv, axis=-2), 1, atol=1e-5)
    expected = params["tokens"]["kernel"] - 0.1 * gradient["tokens"]["kernel"]
    np.testing.assert_allclose(moved["tokens"]["kernel"], expected, atol=1e-6)  # not a listed one
    with pytest.raises(ValueError, match="called with params"):
        nets.unit_kernels().update(params, optax.EmptyState())


def paths(tree):
    return {"/".join(str(p.key) for p in path) for path, _ in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_transformer_takes_every_place(name):
    """Traced, not run: the outputs keep their shape, and the params gain what stands there."""
    make, args = BACKBONES[name]
    args = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), args)

    def shapes(**options):
        run = lambda key: make(**options).init_with_output(key, *args)  # noqa: E731
        out, variables = jax.eval_shape(run, jax.random.key(0))
        assert set(variables) == {"params"}
        return out.shape, paths(variables["params"])

    shape, plain = shapes()
    assert shapes(norm=nets.RMSNorm)[0] == shape
    gained = []
    for norm in (nets.Norms(*[nets.LayerNorm] * 7), nets.ngpt()):
        found, inside = shapes(norm=norm)
        assert found == shape
        gained.append({p.rsplit("/", 1)[0].rsplit("/", 1)[-1] for p in inside - plain})
    assert len(gained[0]) >= 6
    if name not in ("MMDiT", "Flux"):  # whose streams have names of their own
        places = {"first_norm", "q_norm", "k_norm", "head_norm", "attention_after", "hidden_norm"}
        assert places | {"mlp_after"} <= gained[0]
        assert {"attention_join", "mlp_join", "q_norm", "k_norm"} <= gained[1]


@pytest.mark.parametrize("name", BACKBONES)
def test_what_a_backbone_cannot_take_is_named_with_what_it_can(name):
    make, _ = BACKBONES[name]
    with pytest.raises(TypeError, match=f"{name}: expected norm to be a function .* got 'rms'"):
        make(norm="rms")
    with pytest.raises(TypeError, match="nets.RMSNorm .* got a RMSNorm"):
        make(norm=nets.RMSNorm())
    with pytest.raises(TypeError, match=f"{name}: expected after_mlp of norm .* got 3"):
        make(norm=nets.Norms(after_mlp=3))
    if name not in ("CausalTransformer", "TarFlowTransformer"):
        with pytest.raises(TypeError, match=f"{name}: expected attention_fn .* got 'softmax'"):
            make(attention_fn="softmax")
    if name in PER_TOKEN:
        for norm in (nets.BatchNorm, partial(nets.PowerNorm, decay=0.5)):
            with pytest.raises(ValueError, match="of each token by itself, such as nets.LayerNorm"):
                make(norm=nets.Norms(hidden=norm))


def test_bad_options_are_named():
    for make, text in (
        (lambda: nets.DyT(alpha=0.0), "DyT: expected alpha to be finite and positive, got 0.0"),
        (lambda: nets.ngpt(rate=-1.0), "rate to be finite and positive"),
        (lambda: nets.BatchNorm(decay=1.0), r"expected decay in \(0, 1\), got 1.0"),
        (lambda: nets.UnifiedNorm(outlier=1.0), "outlier > 1"),
        (
            lambda: nets.BatchChannelNorm(groups=4, affine=False).apply({}, jnp.ones((2, 6))),
            "divide the width 6",
        ),
        (lambda: nets.PowerNorm(groups=4).apply({}, jnp.ones((2, 6))), "PowerNorm: expected group"),
        (lambda: nets.PowerNorm(groups=0), "PowerNorm: expected groups"),
        (lambda: nets.fixup({"in": {}}, 2), r"named \['in', 'leave', 'out', 'qkv'\]"),
    ):
        with pytest.raises(ValueError, match=text):
            make()
    with pytest.raises(
        TypeError, match=r"weight_norm: expected a Velocity.*jflow.velocity\(module"
    ):
        nets.weight_norm(nets.DiT())


@pytest.mark.parametrize("make", [nets.weight_norm, nets.spectral_norm, nets.standardized_kernels])
def test_normalized_kernels(make):
    """The function at first, the property of the kernel, and the gradient in a direction, which is
    orthogonal to it since its length does not count."""
    net, x = make(jflow.velocity(nets.TimeMLP(hidden=(8,)))), X[:, 0].astype(np.float32)

    @jax.jit
    def run(key):
        params, draw = net.init(key, x, T), np.random.default_rng(6)
        moved = jax.tree.map(lambda p: p + 0.3 * draw.normal(size=p.shape).astype(p.dtype), params)
        gradient = jax.grad(lambda p: jnp.sum(net.apply(p, x, T) ** 2))(moved)
        larger = jax.tree.map(lambda p: p, moved)
        larger["MLP_0"]["Dense_0"]["kernel"]["direction"] *= 3.0
        if make is nets.standardized_kernels:
            larger["MLP_0"]["Dense_0"]["kernel"]["direction"] += 1.0
        return params, moved, gradient, [net.apply(p, x, T) for p in (params, moved, larger)]

    params, moved, gradient, (first, out, same) = jax.device_get(run(jax.random.key(0)))
    np.testing.assert_array_equal(first, 0)  # the head is zero, and its direction is not
    assert np.abs(params["head"]["kernel"]["direction"]).max() > 0.1
    assert not params["head"]["kernel"]["gain"].any() and np.abs(out).max() > 0.1
    np.testing.assert_allclose(same, out, atol=1e-4)
    kernel, slope = (tree["MLP_0"]["Dense_0"]["kernel"] for tree in (moved, gradient))
    w, g = kernel["direction"], slope["direction"]
    assert np.abs(g).max() > 1e-3
    np.testing.assert_allclose(np.sum(w * g), 0, atol=1e-4 * np.sum(np.abs(w * g)))
    if make is nets.weight_norm:
        assert np.abs(np.sum(w * g, axis=0)).max() < 1e-4 * np.abs(w * g).max()
    if make is nets.spectral_norm:  # the largest singular value is the gain, at most 1% below it
        largest = np.linalg.svd(w / nets.norms.spectral_bound(jnp.asarray(w)))[1][0]
        assert 0.99 < largest < 1 + 1e-5 and kernel["gain"].shape == (1, 1)
    scanned = make(jflow.velocity(nets.TokenDiT(**SIZES)))
    shapes = jax.eval_shape(scanned.init, jax.random.key(0), X.astype(np.float32), T)
    gain = shapes["blocks"]["in"]["kernel"]["gain"].shape
    assert gain == ((2, 1, 1) if make is nets.spectral_norm else (2, 1, 32))


def test_fixup_changes_the_function_as_much_at_any_depth():
    """The identity between first and last layer at first, and one step of gradient descent on the
    kernels moves the output of 64 layers by 0.3 to 3 times as much as that of 4; without it, by
    over 100 times, or to no number."""
    moves = {}
    for depth in (4, 64):
        net = nets.ViT(width=8, num_layers=depth, num_heads=2, norm=nets.NoNorm)
        x = jnp.asarray(X, jnp.float32)

        @jax.jit
        def run(key, x, net=net, depth=depth):
            plain = net.init(key, x)["params"]
            fixed = nets.fixup(plain, 2 * depth)
            empty = jax.tree.map(lambda p: p, fixed)
            empty["blocks"] = jax.tree.map(jnp.zeros_like, empty["blocks"])
            f = lambda params: net.apply({"params": params}, x)  # noqa: E731

            def moved(params):
                loss = lambda params: jnp.mean((f(params) - 1) ** 2)  # noqa: E731
                gradient = jax.grad(loss)(params)
                move = lambda path, p, g: p - 0.02 * g * (path[-1].key == "kernel")  # noqa: E731
                after = f(jax.tree.map_with_path(move, params, gradient))
                return jnp.sqrt(jnp.mean((after - f(params)) ** 2))

            both = jax.tree.map(lambda *leaves: jnp.stack(leaves), fixed, plain)
            return f(fixed) - f(empty), jax.lax.map(moved, both)

        difference, (moves[depth], moves[-depth]) = jax.device_get(run(jax.random.key(0), x))
        np.testing.assert_allclose(difference, 0, atol=1e-6)
    assert 0.3 < moves[64] / moves[4] < 3
    assert not moves[-64] / moves[-4] < 100


def test_a_zero_token_has_a_finite_derivative():
    norm = nets.UnitNorm(affine=False).bind({})
    for x in (np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float16)):
        value, back = jax.vjp(norm, x)
        assert not np.any(value)
        assert np.all(np.isfinite(back(jnp.ones_like(value))[0]))
        assert np.all(np.isfinite(jax.jvp(norm, (x,), (np.ones_like(x),))[1]))


def test_places_hold_functions_that_make_modules():
    with pytest.raises(
        TypeError, match="DiT: expected pre of norm to be a function .* a nets.Norm"
    ):
        nets.DiT(norm=nets.peri_norm(nets.ngpt()))
    with pytest.raises(ValueError, match="a norm of each token by itself.* got BatchNorm"):
        nets.DiT(norm=nets.BatchNorm, shared=True)
