"""ADM and DDPM++: the published layouts read and written, the outputs of torchcfm and of a twin in
torch, published sizes, what is refused."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflow
from jflow import convert, nets
from jflow._core.linen import apply_linen, init_linen

PEERS = np.load(Path(__file__).parents[1] / "peers" / "adm.npz")
DDPMPP_COUNT = 61_804_419  # of the twin in peers/make_adm_fixtures.py
SMALL = {"channels": 32, "multipliers": (1, 2), "attention": (False, True), "time_scale": 1.0}
PUBLISHED = {
    "A": nets.ADM(**SMALL, head_width=32, num_classes=5),
    "B": nets.ADM(**SMALL, head_width=32, num_classes=5, scale_shift=False, resample_blocks=False),
    "DDPM++": nets.DDPMpp(16, (1, 2), 2, (False, True), time_scale=999.0),
}
OPTIONS = {
    "A": {},
    "B": {"remat": True},
    "DDPM++": {"remat": True, "attention_fn": nets.chunked_attention(5)},
}


def drawn(name, shape):
    """The tensor or input of a name, as in peers/make_adm_fixtures.py."""
    noise = np.random.default_rng(list(name.encode())).standard_normal(shape)
    if name.startswith("input."):
        return jnp.asarray(noise, jnp.float32)
    scale = len(shape) == 1 and name.endswith("weight")
    return (scale + 0.12 * noise).astype(np.float32)


def tensors_of(model):
    shapes = json.loads(str(PEERS[f"{model}.shapes"]))
    return {name: drawn(name, tuple(shape)) for name, shape in shapes.items()}


def loaded(model, tensors):
    if model == "DDPM++":
        return convert.ddpmpp(tensors)
    return convert.adm(tensors, head_width=32, heads_first=model == "A")


def layout_of(model, net):
    if model == "DDPM++":
        return convert.ddpmpp_layout(net)
    out = {"A": 6, "B": 3}[model]
    return convert.adm_layout(net, 3, out_channels=out, heads_first=model == "A")


@pytest.mark.parametrize("model", PUBLISHED)
def test_outputs_are_those_of_the_peer(model, tmp_path):
    tensors = tensors_of(model)
    net, params = loaded(model, tensors)
    assert net == PUBLISHED[model]
    t, labels = jnp.array([3.5, 625.0]), jnp.array([1, 4])
    if model == "DDPM++":
        t, labels = t / 1000, None
    x, net = drawn("input.x", (2, 8, 12, 3)), net.clone(**OPTIONS[model])
    field = jflow.field(net)
    with jax.default_matmul_precision("highest"):
        out = field.apply(params, x, t, labels)
    expected = PEERS[f"{model}.out"][..., :3]  # A has variances after these
    error = np.max(np.abs(out - expected), axis=(1, 2, 3)) / np.abs(expected).max()
    assert error[0] < 1e-5
    assert error[1] < 1e-4  # the sines of 625 in float32 differ between the two

    convert.save(tmp_path / "model.safetensors", layout_of(model, net), params)
    written = convert.read_safetensors(tmp_path / "model.safetensors")
    assert written.keys() - {"sigmas"} == tensors.keys()  # which the fixture has no need of
    for name, tensor in tensors.items():
        if model == "A" and name.startswith("out.2."):
            tensor = np.concatenate([tensor[:3], 0 * tensor[3:]])
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def count_params(net, layout):
    """And each leaf has its row of the layout."""
    x, t = jnp.zeros((1, 64, 64, 3)), jnp.zeros(1)
    leaves = jax.eval_shape(partial(init_linen, net), jax.random.key(0), x, t)
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(leaves)
    }
    assert sizes.keys() == {row.path for row in layout.weights}
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("count", "channels", "multipliers", "num_blocks", "levels", "heads"),
    [
        (295_904_454, 192, (1, 2, 3, 4), 3, (1, 2, 3), {"head_width": 64}),
        (421_529_606, 256, (1, 1, 2, 3, 4), 2, (2, 3, 4), {"num_heads": 4}),
        (553_838_086, 256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5), {"head_width": 64}),
        (558_997_638, 256, (0.5, 1, 1, 2, 2, 4, 4), 2, (4, 5, 6), {"head_width": 64}),
    ],
    ids=["64", "128", "256", "512"],
)
def test_published_sizes_of_guided_diffusion(
    count, channels, multipliers, num_blocks, levels, heads
):
    attention = tuple(i in levels for i in range(len(multipliers)))
    net = nets.ADM(channels, multipliers, num_blocks, attention, num_classes=1000, **heads)
    null_label = 4 * channels
    variances = 3 * (9 * multipliers[0] * channels + 1)
    layout = convert.adm_layout(net, 3, out_channels=6)
    assert count_params(net, layout) == count + null_label - variances


def test_published_sizes_for_cifar():
    levels = (128, (1, 2, 2, 2)), (False, True, False, False)
    net = nets.ADM(
        *levels[0], 2, levels[1], head_width=64, scale_shift=False, resample_blocks=False
    )
    assert count_params(net, convert.adm_layout(net, 3)) == 35_746_307  # of torchcfm
    net = nets.DDPMpp(*levels[0], 4, levels[1])
    assert count_params(net, convert.ddpmpp_layout(net)) == DDPMPP_COUNT


@pytest.mark.parametrize("make", [nets.ADM, nets.DDPMpp])
def test_remat_and_attention_are_options(make):
    """Their outputs are compared with the peer's above."""
    x, t, calls = jnp.zeros((2, 2, 3, 2)), jnp.zeros(2), []

    def attention(q, k, v):
        calls.append(q.shape)
        return v

    def kept(net):  # how often the backward pass computes something again
        params = jax.eval_shape(partial(init_linen, net), jax.random.key(0), x, t)
        gradient = jax.grad(lambda params: jnp.sum(apply_linen(net, params, x, t)))
        return str(jax.make_jaxpr(gradient)(params)).count("prevent_cse=True")

    net = make(4, (1,), attention=(True,), attention_fn=attention)
    assert kept(net) == 0
    assert set(calls) == {(2, 6, 1, 4)}
    again = kept(net.clone(remat=True))
    assert again == 5 + 1 + (1 + 2 if make is nets.ADM else 2)  # blocks and attentions


def test_the_null_label_is_a_row_of_zeros():
    tensors = tensors_of("A")
    _, params = loaded("A", tensors)
    table = params["embed"]["cond_0"]["embedding"]
    np.testing.assert_array_equal(table[:5], tensors["label_emb.weight"])
    np.testing.assert_array_equal(table[5], np.zeros(128))


def test_noise_levels_are_those_of_the_authors_or_others(tmp_path):
    """50 to 0.01 in their configs/default_cifar10_configs.py, 90 in that of CelebA; the networks do
    not read them."""
    pp = tensors_of("DDPM++")
    net, params = convert.ddpmpp(pp | {"sigmas": np.geomspace(90, 0.01, 1000)})
    for layout, first in ((convert.ddpmpp_layout(net), 50.0), (of_celeba(net), 90.0)):
        convert.save(tmp_path / "pp.safetensors", layout, params)
        levels = convert.read_safetensors(tmp_path / "pp.safetensors")["sigmas"]
        expected = np.exp(np.linspace(np.log(first), np.log(0.01), 1000))
        np.testing.assert_allclose(levels, expected, rtol=1e-6)
        _, again = convert.ddpmpp(tmp_path / "pp.safetensors")
        jax.tree.map(np.testing.assert_array_equal, again, params)


def of_celeba(net):
    return convert.ddpmpp_layout(net, sigmas=(90.0, 0.01))


def test_bad_weights_are_named():
    a, b, pp = map(tensors_of, ("A", "B", "DDPM++"))

    def fails(message, loader, *args, **options):
        with pytest.raises(ValueError, match=message):
            loader(*args, **options)

    adm = partial(convert.adm, head_width=32)
    fails("adm: expected either num_heads or head_width.*None and head_width=None", convert.adm, a)
    fails("expected either num_heads or head_width", adm, a, num_heads=2)
    fails(r"head_width=24 .* to divide the 64 channels", convert.adm, a, head_width=24)
    fails(r"adm: .*'time_embed.0.weight' of 2 axes, got 1 others: x", adm, {"x": np.zeros(2)})
    fails(
        r"ddpmpp: .*'all_modules.0.weight' of 2 axes, got \d+ others: time_embed", convert.ddpmpp, a
    )
    gone = "output_blocks.3.0.in_layers.2.bias"
    fails(f"missing: {gone}", adm, without(a, gone))
    fails(r"unknown: more", adm, {**b, "more": np.zeros(1)})
    gone = "all_modules.5.Conv_1.bias"
    fails(f"missing: {gone}", convert.ddpmpp, without(pp, gone))
    wrong = {**pp, "all_modules.6.Conv_0.bias": np.zeros(3, np.float32)}
    fails(r"expected 'all_modules.6.Conv_0.bias' of shape \[32\], got \[3\]", convert.ddpmpp, wrong)
    for levels in (np.linspace(50, 0.01, 10), -np.ones(10)):  # the first is not geometric
        fails("DDPM.* 'sigmas' .* other numbers", convert.ddpmpp, {**pp, "sigmas": levels})
    fails(r"DDPM.* 'sigmas' of shape \[1\]", convert.ddpmpp, {**pp, "sigmas": np.ones((2, 2))})
    fails("3 or 6 channels out, got 4", convert.adm_layout, nets.ADM(), 3, out_channels=4)
    fails("without labels, got num_classes=3", convert.ddpmpp_layout, nets.DDPMpp(num_classes=3))


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize("make", [nets.ADM, nets.DDPMpp])
def test_bad_inputs_are_named(make):
    x, t, name = jnp.zeros((1, 4, 6, 3)), jnp.zeros(1), make.__name__
    net = make(8)
    params = jax.eval_shape(partial(init_linen, net), jax.random.key(0), x, t)

    def fails(message, x, cond=None):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            jax.eval_shape(partial(apply_linen, net), params, x, t, cond)

    fails(r"expected x of shape .* divisible by 2 for 2 levels, got \[1, 3, 6, 3\]", x[:, :3])
    fails(r"expected x of shape \[b, H, W, C\]", x[0])
    fails(r"expected x of 3 channels, for which its params are, got \[1, 4, 6, 2\]", x[..., :2])
    for options in (
        {"attention": (True,)},
        {"multipliers": (), "attention": ()},
        {"channels": 5},
        {"channels": 8, "multipliers": (0.1, 1)},
        {"num_blocks": 0},
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            make(**options)
