"""AutoencoderKL: published layouts read and written, and the outputs of diffusers."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import convert, nets
from jflow.convert import _layouts

PEERS = np.load(Path(__file__).parents[1] / "peers" / "autoencoder.npz")
NETS = {
    "sd": nets.AutoencoderKL(widths=(32, 64), num_blocks=1),
    "sd3": nets.AutoencoderKL(3, 6, (16, 32, 32), quant_convs=False, groups=8),
    "SD": nets.AutoencoderKL(),
    "SD3": nets.AutoencoderKL(latent_channels=16, quant_convs=False),
}
CONFIGS = {
    "sd": {"scaling_factor": 0.18215, "norm_num_groups": 32},
    "sd3": {"scaling_factor": 1.5305, "shift_factor": 0.0609, "norm_num_groups": 8},
}
LAYOUTS = {
    "original": convert.autoencoder_kl_layout,
    "diffusers": convert.autoencoder_kl_diffusers_layout,
}
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def drawn(name, shape):
    """The tensor or input of a name, as in peers/make_autoencoder_fixtures.py."""
    noise = np.random.default_rng(list(name.encode())).standard_normal(shape)
    if name.startswith("input."):
        return jnp.asarray(noise, jnp.float32)
    scale = len(shape) == 1 and name.endswith("weight")
    return (scale + 0.12 * noise).astype(np.float32)


def shapes_of(model, layout):
    shapes = json.loads(str(PEERS[f"{model}.{layout}.shapes"]))
    return {name: tuple(shape) for name, shape in shapes.items()}


def tensors_of(model, layout):
    return {name: drawn(name, shape) for name, shape in shapes_of(model, layout).items()}


def folder_of(model, path, layout="diffusers", **config):
    """A folder as diffusers writes it."""
    path.mkdir(exist_ok=True)
    config = {"_class_name": "AutoencoderKL", **CONFIGS[model], **config}
    (path / "config.json").write_text(json.dumps(config))
    file = path / "diffusion_pytorch_model.safetensors"
    convert.write_safetensors(file, tensors_of(model, layout))
    return path


@pytest.mark.parametrize("model", CONFIGS)
def test_outputs_are_those_of_diffusers(model, tmp_path):
    """The moments and the images in both layouts, with the scale and shift of config.json."""
    net, config = NETS[model], CONFIGS[model]
    scale, shift = config["scaling_factor"], config.get("shift_factor", 0.0)
    x = drawn("input.x", (2, 8, 12, 3))
    z = drawn("input.z", (2, 4, 6, net.latent_channels))
    found = {
        layout: convert.autoencoder_kl(folder_of(model, tmp_path, layout)) for layout in LAYOUTS
    }
    both = found["original"][0]

    @jax.jit
    def run(params):
        moments = net.apply({"params": params}, x, method="encode")
        latents, images = both.encode(params, x), both.decode(params, scale * (z - shift))
        return {"mean": moments[0], "log_variance": moments[1], "images": images}, latents

    for layout, (loaded, params) in found.items():
        assert loaded.net == net
        with jax.default_matmul_precision("highest"):
            outputs, latents = run(params)
        for part, out in outputs.items():
            expected = PEERS[f"{model}.{layout}.{part}"]
            assert np.abs(out - expected).max() < 1e-5 * np.abs(expected).max(), (layout, part)
        np.testing.assert_allclose(latents, scale * (outputs["mean"] - shift), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", ("SD", "SD3"))
def test_names_and_shapes_of_the_published_sizes(model, layout):
    count, decoder = {"SD": (83_653_863, 49_490_179), "SD3": (83_819_683, 49_545_475)}[model]
    shapes, names = shapes_of(model, layout), LAYOUTS[layout](NETS[model])
    like = _layouts.shapes_of(NETS[model], jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
    leaves, _ = _layouts._leaves(like)
    sizes = {path: math.prod(leaf.shape) for path, leaf in leaves.items()}
    assert sum(sizes.values()) == count
    assert sum(n for path, n in sizes.items() if path.startswith("decoder/")) == decoder
    empty = {name: np.broadcast_to(np.int8(0), shape) for name, shape in shapes.items()}
    _layouts._check(names, _layouts._weights(names, leaves), leaves, empty)
