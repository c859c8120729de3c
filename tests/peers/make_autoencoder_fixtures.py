"""Writes outputs of diffusers' AutoencoderKL, so that the tests need no torch.

Run once, in an environment that has torch and diffusers, and commit the result:

    pip install torch diffusers
    python tests/peers/make_autoencoder_fixtures.py

Written with torch 2.13.0, diffusers 0.42.1. No weights are kept: every tensor and every input is
drawn from its name (`drawn`), here and in the tests, none is zero. Kept are, for each model in each
of its two layouts, the names and shapes of the tensors, and the outputs. The names of the original
layout are written here by hand, from the published code; diffusers' own converter carries those
tensors into the model that is run, which takes every one of them. Of the published sizes names and
shapes alone are kept. The attention's names of older versions of diffusers are those that its
`_convert_deprecated_attention_blocks` renames.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

HERE = Path(__file__).parent
DRAWN = 0.12  # the standard deviation of the tensors
SIZES = {  # widths, blocks of a level, latent channels, quant convs, groups
    "sd": ((32, 64), 1, 4, True, 32),
    "sd3": ((16, 32, 32), 2, 6, False, 8),
    "SD": ((128, 256, 512, 512), 2, 4, True, 32),
    "SD3": ((128, 256, 512, 512), 2, 16, False, 32),
}


def drawn(name, shape):
    """The tensor or input of a name; scales of norms lie around 1."""
    noise = np.random.default_rng(list(name.encode())).standard_normal(shape)
    if name.startswith("input."):
        return noise.astype(np.float32)
    scale = len(shape) == 1 and name.endswith("weight")
    return (scale + DRAWN * noise).astype(np.float32)


def conv(name, outputs, inputs, side=3):
    return {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(name, inputs, outputs):
    names = norm(f"{name}.norm1", inputs) | conv(f"{name}.conv1", outputs, inputs)
    names |= norm(f"{name}.norm2", outputs) | conv(f"{name}.conv2", outputs, outputs)
    return names | (conv(f"{name}.nin_shortcut", outputs, inputs, 1) if inputs != outputs else {})


def middle(name, width):
    names = block(f"{name}.mid.block_1", width, width) | block(f"{name}.mid.block_2", width, width)
    names |= norm(f"{name}.mid.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        names |= conv(f"{name}.mid.attn_1.{part}", width, width, 1)
    return names


def original(widths, blocks, latents, quant, _):
    names = conv("encoder.conv_in", widths[0], 3)
    before = widths[0]
    for i, width in enumerate(widths):
        for j in range(blocks):
            names |= block(f"encoder.down.{i}.block.{j}", before, width)
            before = width
        if i < len(widths) - 1:
            names |= conv(f"encoder.down.{i}.downsample.conv", width, width)
    names |= middle("encoder", before) | norm("encoder.norm_out", before)
    names |= conv("encoder.conv_out", 2 * latents, before)
    names |= conv("decoder.conv_in", before, latents) | middle("decoder", before)
    for i, width in reversed(list(enumerate(widths))):
        for j in range(blocks + 1):
            names |= block(f"decoder.up.{i}.block.{j}", before, width)
            before = width
        if i:
            names |= conv(f"decoder.up.{i}.upsample.conv", width, width)
    names |= norm("decoder.norm_out", before) | conv("decoder.conv_out", 3, before)
    if quant:
        names |= conv("quant_conv", 2 * latents, 2 * latents, 1)
        names |= conv("post_quant_conv", latents, latents, 1)
    return names


def model_of(widths, blocks, latents, quant, groups):
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=blocks,
        latent_channels=latents,
        norm_num_groups=groups,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    ).eval()


def filled(model, tensors):
    model.load_state_dict({name: torch.as_tensor(tensor) for name, tensor in tensors.items()})
    return model


def run(model, latents):
    x = torch.as_tensor(drawn("input.x", (2, 8, 12, 3))).permute(0, 3, 1, 2)
    z = torch.as_tensor(drawn("input.z", (2, 4, 6, latents))).permute(0, 3, 1, 2)
    posterior = model.encode(x).latent_dist
    found = posterior.mean, posterior.logvar, model.decode(z).sample
    return [out.permute(0, 2, 3, 1).numpy() for out in found]


@torch.no_grad()
def main():
    kept = {}
    for name, sizes in SIZES.items():
        with torch.device("meta"):
            theirs = {n: tuple(t.shape) for n, t in model_of(*sizes).state_dict().items()}
        ours = original(*sizes)
        kept[f"{name}.original.shapes"] = json.dumps(ours)
        kept[f"{name}.diffusers.shapes"] = json.dumps(theirs)
        if name.isupper():
            continue
        model = model_of(*sizes)
        tensors = {n: torch.as_tensor(drawn(n, shape)) for n, shape in ours.items()}
        converted = convert_ldm_vae_checkpoint(tensors, model.config)
        outputs = {
            "original": run(filled(model, converted), sizes[2]),
            "diffusers": run(
                filled(model, {n: drawn(n, shape) for n, shape in theirs.items()}), sizes[2]
            ),
        }
        for layout, arrays in outputs.items():
            for part, array in zip(("mean", "log_variance", "images"), arrays, strict=True):
                kept[f"{name}.{layout}.{part}"] = array
                print(name, layout, part, array.shape, float(np.abs(array).max()))
    np.savez_compressed(HERE / "autoencoder.npz", **kept)


if __name__ == "__main__":
    main()
