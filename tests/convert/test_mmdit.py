"""SD3, SD3.5 and Flux: published layouts read and written, and the outputs of diffusers."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflow
from jflow import convert, nets, paths
from jflow.convert import _layouts
from jflow.types import Condition

FOLDER = Path(__file__).parents[1] / "peers"
PEERS = np.load(FOLDER / "mmdit.npz")
SD3 = ("sd3", "sd35")
FLUX = ("flux_dev", "flux_schnell")
LAYOUTS = ("original", "diffusers")
TABLES = {"original": "pos_embed", "diffusers": "pos_embed.pos_embed"}


def drawn(name, shape):
    """The tensor or input of a name, as in peers/make_mmdit_fixtures.py."""
    noise = np.random.default_rng(list(name.encode())).standard_normal(shape)
    if name.startswith("input."):
        return jnp.asarray(noise, jnp.float32)
    scale = len(shape) == 1 and "bias" not in name
    return (scale + 0.12 * noise).astype(np.float32)


def shapes_of(model, layout):
    shapes = json.loads(str(PEERS[f"{model}.{layout}.shapes"]))
    return {name: tuple(shape) for name, shape in shapes.items()}


def tensors_of(model, layout):
    tensors = {name: drawn(name, shape) for name, shape in shapes_of(model, layout).items()}
    return tensors | ({TABLES[layout]: PEERS[f"{model}.table"]} if model in SD3 else {})


def read(model, files, **options):
    if model in SD3:
        return convert.mmdit(files, **options)
    return convert.flux(files, rope_axes=(4, 6, 6), **options)


def layout_of(net, layout):
    known = {
        ("MMDiT", "original"): convert.mmdit_layout,
        ("MMDiT", "diffusers"): convert.mmdit_diffusers_layout,
        ("Flux", "original"): convert.flux_layout,
        ("Flux", "diffusers"): convert.flux_diffusers_layout,
    }
    return known[type(net).__name__, layout](net)


@pytest.mark.parametrize("model", SD3 + FLUX)
def test_outputs_are_those_of_diffusers(model):
    """In both layouts, as a velocity: diffusers is given sigma = 1 - t, and predicts minus v."""
    size = (2, 6, 8, 16) if model in SD3 else (2, 6, 4, 4)
    cond = Condition(
        context=drawn("input.context", (2, 5, 20)), vector=drawn("input.vector", (2, 24))
    )
    guidance = {"guidance": 1 / 256} if model in FLUX else {}
    found = {layout: read(model, tensors_of(model, layout), **guidance) for layout in LAYOUTS}
    assert len({net for net, _ in found.values()}) == 1
    velocity = paths.from_noise_time(jflow.field(found["original"][0]))
    t = 1 - jnp.array([1 / 256, 0.625])
    with jax.default_matmul_precision("highest"):
        for layout, (_, params) in found.items():
            v = velocity.apply(params, drawn("input.x", size), t, cond)
            expected = PEERS[f"{model}.{layout}.out"]
            error = np.max(np.abs(v + expected), axis=(1, 2, 3)) / np.abs(expected).max()
            assert error[0] < 1e-5
            assert error[1] < 1e-4  # the sines of 625 in float32 differ between the two


def test_sizes_are_read_from_shapes():
    net, _ = read("sd35", tensors_of("sd35", "diffusers"))
    assert net == nets.MMDiT(2, 128, 3, 2, 1, True, grid_size=6, grid_step=4 / 6, time_scale=1000.0)
    net, _ = read("flux_dev", tensors_of("flux_dev", "original"), guidance=2.0)
    assert net == nets.Flux(2, 32, 2, 2, 2, rope_axes=(4, 6, 6), guidance=2.0, time_scale=1000.0)


@pytest.mark.parametrize("model", ("sd35", "flux_dev"))
def test_both_layouts_give_the_same_bits_and_are_written_back(model, tmp_path):
    tensors = tensors_of(model, "original")
    net, params = read(model, tensors)
    for layout in LAYOUTS:
        file = tmp_path / f"{layout}.safetensors"
        convert.save(file, layout_of(net, layout), params)
        again, same = read(model, file)
        assert again == net
        jax.tree.map(np.testing.assert_array_equal, same, params)
        shapes = shapes_of(model, layout) | (
            {TABLES[layout]: PEERS[f"{model}.table"].shape} if model in SD3 else {}
        )
        assert {n: t.shape for n, t in convert.read_safetensors(file).items()} == shapes
    written = convert.read_safetensors(tmp_path / "original.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_allclose(written[name], tensor, rtol=0, atol=1e-6, err_msg=name)
    # the norms that nothing follows have their halves swapped in diffusers' layout
    theirs = convert.read_safetensors(tmp_path / "diffusers.safetensors")
    shift, scale = np.split(tensors["final_layer.adaLN_modulation.1.weight"], 2)
    np.testing.assert_array_equal(theirs["norm_out.linear.weight"], np.concatenate([scale, shift]))


FLUX_1 = nets.Flux(2, 3072, 19, 38, 24, rope_axes=(16, 56, 56))
PUBLISHED = {
    "SD3-medium": (2_028_328_000, nets.MMDiT(2, 1536, 24, 24)),
    "SD3.5-medium": (2_243_171_520, nets.MMDiT(2, 1536, 24, 24, 13, True, grid_size=384)),
    "SD3.5-large": (8_056_627_520, nets.MMDiT(2, 2432, 38, 38, qk_norm=True)),
    "FLUX.1-dev": (11_901_408_320, FLUX_1.clone(guidance=3.5)),
    "FLUX.1-schnell": (11_891_178_560, FLUX_1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", PUBLISHED)
def test_names_and_shapes_of_the_published_sizes(model, layout):
    count, net = PUBLISHED[model]
    shapes = shapes_of(model, layout)
    assert sum(math.prod(shape) for shape in shapes.values()) == count
    x, t, context, vector = (
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in (
            (1, 2, 2, 16),
            (1,),
            (1, 1, 4096),
            (1, 768 if model.startswith("FLUX") else 2048),
        )
    )
    cond = Condition(context=context, vector=vector)
    leaves, _ = _layouts._leaves(_layouts.shapes_of(net, x, t, cond))
    assert sum(math.prod(leaf.shape) for leaf in leaves.values()) == count
    names = layout_of(net, layout)
    empty = {name: np.broadcast_to(np.int8(0), shape) for name, shape in shapes.items()}
    _layouts._check(names, _layouts._weights(names, leaves), leaves, empty)


@pytest.mark.parametrize("model", PUBLISHED)
def test_names_and_shapes_are_those_of_the_authors_code(model):
    """tests/peers/make_published_names.py wrote down what the published modules have."""
    published = {}
    for name, first, last, shape in json.loads((FOLDER / "published_names.json").read_text())[
        model
    ]:
        for i in [None] if first is None else range(first, last + 1):
            published[name.format(i)] = tuple(shape)
    if not model.startswith("FLUX"):
        assert len(published.pop(TABLES["original"])) == 3
    assert shapes_of(model, "original") == published


def test_a_file_of_several_models():
    prefix = "model.diffusion_model."
    tensors = {prefix + name: tensor for name, tensor in tensors_of("sd3", "original").items()}
    tensors["first_stage_model.decoder.conv_in.weight"] = np.zeros((2, 2, 3, 3), np.float32)
    _, params = convert.mmdit(tensors, prefix=prefix)
    _, alone = convert.mmdit(tensors_of("sd3", "original"))
    jax.tree.map(np.testing.assert_array_equal, params, alone)
    with pytest.raises(ValueError, match=r"mmdit: expected weights with .*another prefix"):
        convert.mmdit(tensors)


def test_weights_of_other_models_and_changed_ones():
    sd3, flux = tensors_of("sd3", "original"), tensors_of("flux_dev", "original")
    with pytest.raises(ValueError, match=r"mmdit: .*'x_embedder.proj.weight' or 'pos_embed"):
        convert.mmdit(flux)
    with pytest.raises(ValueError, match=r"flux: .*'img_in.weight' or 'x_embedder.weight'"):
        convert.flux(sd3)
    with pytest.raises(ValueError, match=r"missing: context_embedder.bias; unknown: lora"):
        convert.mmdit(
            {n: t for n, t in sd3.items() if n != "context_embedder.bias"} | {"lora": np.zeros(2)}
        )
    with pytest.raises(ValueError, match=r"final_layer.linear.weight' of shape \[64, 128\], got"):
        convert.mmdit(sd3 | {"final_layer.linear.weight": np.zeros((32, 128), np.float32)})
    with pytest.raises(ValueError, match=r"expected 'pos_embed' as jflow computes it"):
        convert.mmdit(sd3 | {"pos_embed": sd3["pos_embed"] + 0.1})
    with pytest.raises(ValueError, match="flux: expected rope_axes.* heads of 16"):
        convert.flux(flux)
