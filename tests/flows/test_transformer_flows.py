"""TarFlow, STARFlow and Jet as recipes: what the contract table does not say."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors as bj
from jflow import distributions, flows, guidance, nets
from jflow.flows._transformers import jet_splits

SMALL = {"width": 8, "num_heads": 2}
EVENT = (4, 4, 2)
RECIPES = {
    "tarflow": lambda **o: flows.tarflow(EVENT, patch_size=2, depth=2, num_layers=1, **SMALL, **o),
    "starflow": lambda **o: flows.starflow(
        EVENT, patch_size=2, num_layers=2, num_shallow_layers=1, **SMALL, **o
    ),
    "jet": lambda **o: flows.jet(EVENT, patch_size=2, depth=4, num_layers=1, **SMALL, **o),
}


def images(b=3):
    return jnp.asarray(np.random.default_rng(0).normal(size=(b, *EVENT)), jnp.float32)


def randomised(flow, x, cond=None, scale=0.3):
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(flow.init, jax.random.key(0), x, cond)
    return jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape), p.dtype), shapes)


@pytest.mark.parametrize("name", RECIPES)
def test_at_init_the_map_is_the_identity_and_its_layers_differ(name):
    flow, x = RECIPES[name](standardize=False), images()
    params = jax.jit(flow.init)(jax.random.key(0), x)
    z, log_det = jax.jit(flow.inverse)(params, x)
    np.testing.assert_array_equal(z, x)
    np.testing.assert_array_equal(log_det, 0)
    kernels = [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if "stacked" in jax.tree_util.keystr(path) and "kernel" in jax.tree_util.keystr(path)
    ]
    assert len(kernels) >= 5
    for where, leaf in kernels:
        assert "head" in where or np.all(
            np.any((leaf[:-1] != leaf[1:]).reshape(len(leaf) - 1, -1), axis=1)
        ), where


@pytest.mark.parametrize("name", RECIPES)
def test_images_there_and_back_and_the_log_det_of_the_jacobian(name):
    flow, x = RECIPES[name](), images()
    params = randomised(flow, x)

    @jax.jit
    def run(x):
        z, log_det = flow.inverse(params, x)
        one = lambda row: flow.inverse(params, row[None])[0].reshape(-1)  # noqa: E731
        return z, log_det, flow.forward(params, z)[0], jax.vmap(jax.jacrev(one))(x)

    z, log_det, again, jacobian = run(x)
    assert z.shape == x.shape and np.abs(z - x).max() > 0.5
    np.testing.assert_allclose(again, x, atol=1e-4)
    expected = np.linalg.slogdet(np.asarray(jacobian, np.float64).reshape(3, 32, 32))[1]
    np.testing.assert_allclose(log_det, expected, atol=1e-3)


def test_one_set_of_params_serves_the_plain_the_guided_and_the_jacobi_flow():
    x, labels = images(), jnp.arange(3)
    make = lambda **o: RECIPES["tarflow"](num_classes=3, **o)  # noqa: E731
    plain = make()
    guided = make(guide=guidance.extrapolate(guidance.linear_ramp(2.0), null=3))
    jacobi = make(sampler=bj.decoding.jacobi(2, tol=1e-6))
    params = randomised(plain, x, labels)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, randomised(guided, x, labels))
    samples = [
        jax.jit(lambda key, f=f: f.sample(params, key, 3, labels))(jax.random.key(1))
        for f in (plain, guided, jacobi)
    ]
    np.testing.assert_allclose(samples[2], samples[0], atol=1e-4)
    assert np.all(np.abs(samples[1] - samples[0]).max((1, 2, 3)) > 1e-2)


def test_only_the_deep_block_of_starflow_reads_the_condition():
    x, labels = images(), jnp.arange(3)
    flow = RECIPES["starflow"](num_classes=3)
    params = randomised(flow, x, labels)
    named = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert [("stacked" in n) for n in named if "embedding" in n] == [False]
    layers = [
        p.shape[:2]
        for n, p in zip(named, jax.tree.leaves(params), strict=True)
        if "qkv']['kernel" in n
    ]
    assert sorted(layers) == [(2, 8), (3, 1)]  # 2 layers deep; 3 shallow blocks of 1
    log_prob = jax.jit(lambda labels: flow.log_prob(params, x, labels))
    assert np.all(log_prob(labels) != log_prob((labels + 1) % 3))


def test_jets_splits_are_permutations_of_channels_and_every_fifth_of_patches():
    rows, columns, size = 4, 4, 6
    splits = jet_splits(rows, columns, size, 30)
    passes = []
    for split in splits:
        np.testing.assert_array_equal(np.sort(split), np.arange(rows * columns * size))
        first = split.reshape(-1, size)[:, : size // 2]
        mask = np.zeros(rows * columns * size, bool)
        mask[first.reshape(-1)] = True
        passes.append(mask.reshape(rows, columns, size))
    of_channels = [mask for i, mask in enumerate(passes) if i % 5 < 4]
    for mask in of_channels:  # the same in every patch
        assert np.all(mask == mask[:1, :1]) and mask[0, 0].sum() == size // 2
    assert len({mask.tobytes() for mask in of_channels}) > 10  # of the 20 halves of 6
    row, column = np.indices((4, 4))
    for i, pattern in enumerate((row + column, row + column + 1, column, column + 1, row, row + 1)):
        expected = np.broadcast_to(pattern[..., None] % 2 == 0, (4, 4, size))
        np.testing.assert_array_equal(passes[5 * i + 4], expected)
    np.testing.assert_array_equal(np.sort(jet_splits(3, 3, 2, 5)[4]), np.arange(18))  # odd patches
    assert jet_splits(2, 1, 6, 5)[[0, 4]].tolist() == [
        [1, 3, 4, 0, 2, 5, 7, 9, 10, 6, 8, 11],
        [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11],
    ]


def drawn(name, shape):
    """The tensor of a name, as in peers/make_jet_fixtures.py."""
    noise = np.random.default_rng(list(name.encode())).standard_normal(shape)
    return (name.endswith("/scale") + 0.15 * noise).astype(np.float32)


def published_jet(depth, width, heads):
    """The params of a coupling's network of one layer, for tokens of 12 numbers, by the names of
    the authors, whose first coupling meets the data."""

    def named(name, *shape):
        return drawn(f"couplings/dnn/{name}", (depth, *shape))[::-1]

    def dense(name, *shape):
        return {"kernel": named(f"{name}/kernel", *shape), "bias": named(f"{name}/bias", shape[-1])}

    def norm(name):
        return {part: named(f"{name}/{part}", width) for part in ("scale", "bias")}

    block, size = "vit/encoderblock_0", width // heads
    attention = f"{block}/MultiHeadDotProductAttention_0"
    kernels, biases = [], []
    for part in ("query", "key", "value"):
        kernel = named(f"{attention}/{part}/kernel", width, heads, size)
        kernels.append(kernel.reshape(depth, width, width))
        biases.append(named(f"{attention}/{part}/bias", heads, size).reshape(depth, width))
    out = named(f"{attention}/out/kernel", heads, size, width).reshape(depth, width, width)
    layer = {
        "LayerNorm_0": norm(f"{block}/LayerNorm_0"),
        "LayerNorm_1": norm(f"{block}/LayerNorm_1"),
        "attention": {
            "qkv": {"kernel": np.concatenate(kernels, -1), "bias": np.concatenate(biases, -1)},
            "out": {"kernel": out, "bias": named(f"{attention}/out/bias", width)},
        },
        "in": dense(f"{block}/MlpBlock_0/Dense_0", width, 4 * width),
        "leave": dense(f"{block}/MlpBlock_0/Dense_1", 4 * width, width),
    }
    head = dense("final_proj", width, 12)  # shifts before scales; here a scale before each shift
    return {
        "net": {
            "tokens": dense("init_proj", 6, width),
            "positions": named("posemb", 1, 16, width)[:, 0],
            "blocks": jax.tree.map(lambda leaf: leaf[:, None], layer),
            "norm": norm("vit/encoder_norm"),
        },
        "head": {
            name: leaf.reshape(*leaf.shape[:-1], 2, 6)[..., ::-1, :]
            .swapaxes(-1, -2)
            .reshape(leaf.shape)
            for name, leaf in head.items()
        },
    }


def test_jet_is_that_of_its_authors():
    """The output of their code, with 30 couplings: each kind of split."""
    peer = np.load(Path(__file__).parents[1] / "peers" / "jet.npz")
    flow = flows.jet(
        (8, 8, 3), patch_size=2, width=8, depth=30, num_layers=1, num_heads=2, standardize=False
    )
    x = jnp.asarray(drawn("image", (2, 8, 8, 3)) / 0.15)
    params = jax.eval_shape(flow.init, jax.random.key(0), x)
    params["bijector"]["1"]["stacked"]["1"] = published_jet(30, 8, 2)
    with jax.default_matmul_precision("highest"):
        z, log_det = jax.jit(flow.inverse)(params, x)
    np.testing.assert_allclose(z, peer["z"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(log_det, peer["log_det"], rtol=1e-6)
    for count, depth, layers in zip(peer["counts"], (32, 64), (2, 5), strict=True):
        flow = flows.jet(
            (64, 64, 3), width=512, depth=depth, num_layers=layers, num_heads=8, standardize=False
        )
        image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        like = jax.eval_shape(flow.init, jax.random.key(0), image)
        assert sum(leaf.size for leaf in jax.tree.leaves(like)) == count


def test_dequantized_pixels_under_the_identity_cost_eight_bits():
    """x = 2 (level + u) / 256 - 1 is uniform on [-1, 1), whose density is 1/2: 8 bits a level."""
    base = distributions.uniform(EVENT, -1.0, 1.0)
    flow = flows.jet(
        EVENT, patch_size=2, depth=2, num_layers=1, **SMALL, standardize=False, base=base
    )
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, *EVENT)), jnp.float32)
    params = jax.jit(flow.init)(jax.random.key(0), x)
    bits = -(np.asarray(jax.jit(flow.log_prob)(params, x)) - 32 * np.log(128.0)) / 32 / np.log(2)
    np.testing.assert_allclose(bits, 8.0, atol=1e-6)


def test_starflow_on_the_latents_of_a_linear_autoencoder():
    """Images of 16 pixels from 4 factors; latents [2, 2, 2] by PCA. Trained briefly, the flow beats
    the standard normal, which it starts as and which has the latents' mean and deviations, by a nat
    at least."""
    import optax

    rng = np.random.default_rng(0)
    factors = rng.normal(size=(256, 4))
    x = np.tanh(factors @ rng.normal(size=(4, 16))) + 0.05 * rng.normal(size=(256, 16))
    mean = x.mean(0)
    _, _, basis = np.linalg.svd(x - mean, full_matrices=False)
    encode = lambda x: ((x - mean) @ basis[:8].T).reshape(-1, 2, 2, 2)  # noqa: E731
    decode = lambda h: h.reshape(-1, 8) @ basis[:8] + mean  # noqa: E731
    latents = encode(x)
    latents = jnp.asarray(latents / latents.std(0), jnp.float32)

    flow = flows.starflow(
        (2, 2, 2), width=16, num_layers=1, shallow_depth=1, num_shallow_layers=1, num_heads=2
    )
    loss = lambda p: -jnp.mean(flow.log_prob(p, latents))  # noqa: E731
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(state, _):
            params, opt = state
            value, grads = jax.value_and_grad(loss)(params)
            updates, opt = optimizer.update(grads, opt)
            return (optax.apply_updates(params, updates), opt), value

        return jax.lax.scan(step, (params, optimizer.init(params)), length=60)

    (params, _), values = train(jax.jit(flow.init)(jax.random.key(0), latents))
    assert values[-1] < values[0] - 1.0
    sample = jax.jit(lambda key: flow.sample(params, key, 64))(jax.random.key(1))
    assert decode(np.asarray(sample) * np.asarray(encode(x)).std(0)).shape == (64, 16)
    assert np.all(np.isfinite(sample))


def test_bad_input():
    with pytest.raises(ValueError, match=r"\(H, W, C\), got \[4, 4\]"):
        flows.tarflow((4, 4))
    with pytest.raises(ValueError, match="divides 4 and 4, got 3"):
        flows.jet(EVENT, patch_size=3)
    with pytest.raises(ValueError, match="even count of numbers in a patch, got 1"):
        flows.jet((4, 4, 1), patch_size=1)
    with pytest.raises(
        ValueError, match="jet: expected depth to be a whole number of at least 1, got 0"
    ):
        flows.jet(EVENT, patch_size=2, depth=0)
    with pytest.raises(
        ValueError, match="tarflow: expected depth to be a whole number of at least 1, got 0"
    ):
        flows.tarflow(EVENT, patch_size=2, depth=0)
    with pytest.raises(ValueError, match="max_log_scale > 0"):
        flows.starflow(EVENT, patch_size=2, max_log_scale=-1.0)
    flow = RECIPES["tarflow"]()
    with pytest.raises(ValueError, match="b, 4, 4, 2"):
        flow.log_prob(randomised(flow, images()), images()[:, :2])


def test_one_coupling_of_jet_by_hand():
    """Data to noise, the channels that pass and y = 2 sigmoid(s) x + b of the others, s and b by
    the ViT of the first."""
    scale = bj.univariate.affine(scale=bj.scales.sigmoid())
    flow = flows.jet(
        EVENT, patch_size=2, depth=1, num_layers=1, **SMALL, univariate=scale, standardize=False
    )
    x = images()
    params = randomised(flow, x)
    z, log_det = flow.inverse(params, x)
    patches = lambda x: np.asarray(bj.tokens(EVENT, 2).inverse({}, x)[0])  # noqa: E731
    layer = jax.tree.map(lambda p: p[0], params["bijector"]["1"]["stacked"]["1"])
    order = jet_splits(2, 2, 8, 1)[0].reshape(4, 8) % 8  # the same channels in each patch
    first, rest = order[0, :4], order[0, 4:]
    x, z = patches(x), patches(z)
    features = nets.ViT(num_layers=1, **SMALL).apply(
        {"params": layer["net"]}, jnp.asarray(x[..., first])
    )
    raw = np.asarray(features @ layer["head"]["kernel"]) + np.asarray(layer["head"]["bias"])
    s, b = np.moveaxis(raw.reshape(3, 4, 4, 2), -1, 0)
    factor = 2 / (1 + np.exp(-s))
    np.testing.assert_array_equal(z[..., first], x[..., first])
    np.testing.assert_allclose(z[..., rest], factor * x[..., rest] + b, atol=1e-5)
    np.testing.assert_allclose(log_det, np.log(factor).sum((1, 2)), atol=1e-5)
