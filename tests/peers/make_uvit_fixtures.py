"""Writes outputs of U-ViT, so that the tests need no torch.

Run once, in an environment that has torch, and commit the result:

    pip install torch
    python tests/peers/make_uvit_fixtures.py

Written with torch 2.13.0. The authors' network is in no package: `UViT` below is written after a
description of its layers, names and order of operations, in torch, by the hand that wrote
`nets.UViT`; it shares no code with it. No weights are kept: every tensor and every input is drawn
from its name (`drawn`), here and in the tests. Kept are the names and shapes of the tensors, and
the outputs.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).parent
TIMES = 3.5, 625.0


def drawn(name, shape):
    """The tensor or input of a name; scales of norms lie around 1."""
    noise = np.random.default_rng(list(name.encode())).standard_normal(shape)
    if name.startswith("input."):
        return noise.astype(np.float32)
    scale = len(shape) == 1 and "norm" in name and "weight" in name
    return (scale + 0.15 * noise).astype(np.float32)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        b, n, width = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, width))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads, skip):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads), Mlp(width)
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, channels, width, p):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, p, stride=p)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class UViT(nn.Module):
    def __init__(self, size, p, channels, width, depth, heads, classes=None, conv=True):
        super().__init__()
        self.p, self.width, self.channels = p, width, channels
        self.patch_embed = PatchEmbed(channels, width, p)
        self.label_emb = None if classes is None else nn.Embedding(classes, width)
        self.extras = 1 if classes is None else 2
        patches = (size[0] // p) * (size[1] // p)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + patches, width))
        self.in_blocks = nn.ModuleList(Block(width, heads, False) for _ in range(depth // 2))
        self.mid_block = Block(width, heads, False)
        self.out_blocks = nn.ModuleList(Block(width, heads, True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, p * p * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, x, t, y=None):
        rows, columns, half = x.shape[2] // self.p, x.shape[3] // self.p, self.width // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / half)
        angles = t[:, None] * frequencies[None]
        time = torch.cat([angles.cos(), angles.sin()], dim=-1)
        tokens = [time[:, None], self.patch_embed(x)]
        if self.label_emb is not None:
            tokens.insert(0, self.label_emb(y)[:, None])
        x, skips = torch.cat(tokens, dim=1) + self.pos_embed, []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, self.extras :]
        x = x.reshape(len(x), rows, columns, self.p, self.p, self.channels)
        x = x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.channels, rows * self.p, -1)
        return self.final_layer(x)


@torch.no_grad()
def main():
    arrays = {}
    for name, classes, conv in (("labels", 6, True), ("plain", None, False)):
        model = UViT((8, 6), 2, 4, 32, 4, 2, classes, conv).eval()
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        model.load_state_dict({k: torch.tensor(drawn(k, s)) for k, s in shapes.items()})
        x = torch.tensor(drawn("input.x", (2, 8, 6, 4))).permute(0, 3, 1, 2)
        y = None if classes is None else torch.tensor([1, 5])
        out = model(x, torch.tensor(TIMES), y).permute(0, 2, 3, 1).numpy()
        arrays |= {f"{name}.out": out, f"{name}.shapes": np.array(json.dumps(shapes))}
        print(name, out.shape, np.std(out))
    np.savez_compressed(HERE / "uvit.npz", **arrays)


if __name__ == "__main__":
    main()
