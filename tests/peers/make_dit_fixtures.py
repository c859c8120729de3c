"""Writes what diffusers computes for a tiny DiT with random weights, so that the tests need no
torch, and a file that safetensors and torch write.

    pip install torch diffusers transformers safetensors
    python tests/peers/make_dit_fixtures.py

Written with torch 2.13.0, diffusers 0.42.1, safetensors 0.8.0. DiTTransformer2DModel differs from
the published network in two places, which are set right here: the frequencies of time (divided by
half, not half - 1), and the epsilon of the second norm. It takes
images to be square, hence the table of `dit_weights.positions` and the patches in `outputs`.
"""

from pathlib import Path

import dit_weights as dit
import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save

HERE = Path(__file__).parent


def network() -> DiTTransformer2DModel:
    net = DiTTransformer2DModel(
        num_attention_heads=dit.HEADS,
        attention_head_dim=dit.WIDTH // dit.HEADS,
        in_channels=dit.CHANNELS,
        out_channels=2 * dit.CHANNELS,
        num_layers=dit.DEPTH,
        sample_size=8,
        patch_size=dit.PATCH,
        num_embeds_ada_norm=dit.CLASSES,
    )
    tensors = {k: torch.tensor(v) for k, v in dit.of_diffusers(dit.original()).items()}
    net.load_state_dict(tensors)  # strict: all names and shapes are theirs
    for block in net.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    net.pos_embed.height, net.pos_embed.width = 4, 6
    net.pos_embed.pos_embed = torch.tensor(dit.positions(4, 6), dtype=torch.float32)[None]
    return net.eval()


@torch.no_grad()
def outputs() -> np.ndarray:
    """[2 calls, b, 8, 12, 2 C]. The last linear map's output is taken: the network's own way from
    patches to images takes all images to be square."""
    given = {name: torch.tensor(array) for name, array in dit.inputs().items()}
    net, x, patches = network(), given["x"].permute(0, 3, 1, 2), []
    net.proj_out_2.register_forward_hook(lambda module, inputs, output: patches.append(output))
    for t in given["t"]:
        net(x, timestep=t, class_labels=given["y"])
    patches = torch.stack(patches).reshape(2, 2, 4, 6, dit.PATCH, dit.PATCH, 2 * dit.CHANNELS)
    return patches.permute(0, 1, 2, 4, 3, 5, 6).reshape(2, 2, 8, 12, -1).numpy()


def file() -> np.ndarray:
    """The bytes of a safetensors file with several types, strided and empty tensors."""
    tensors = {
        "half": torch.arange(6).reshape(2, 3).to(torch.float16),
        "brain": torch.tensor([1.0, -2.5, 3e38]).to(torch.bfloat16),
        "single": torch.tensor(0.1),
        "double": torch.tensor([[0.1]], dtype=torch.float64),
        "whole": torch.tensor([-1, 2**40]),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "float8": torch.tensor([1.0, -448.0]).to(torch.float8_e4m3fn),
    }
    return np.frombuffer(save(tensors, {"format": "pt"}), np.uint8)


if __name__ == "__main__":
    np.savez_compressed(HERE / "dit.npz", outputs=outputs(), bytes=file())
