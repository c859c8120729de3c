"""Writes outputs of LightningDiT, so that the tests need no torch.

Run once, in an environment that has torch, and commit the result:

    pip install torch
    python tests/peers/make_lightning_dit_fixtures.py

Written with torch 2.13.0. The authors' network is in no package, and a file that it needs has
another licence: `LightningDiT` below is written after a description of its layers, names and order
of operations, in torch, by the hand that wrote `nets.LightningDiT`; it shares no code with it, and
takes images that are not square, which theirs does not. No weights are kept: every tensor and every
input is drawn from its name (`drawn`), here and in the tests. Kept are the names and shapes of the
tensors, the tables of positions of a square, and the outputs.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).parent


def drawn(name, shape):
    """The tensor or input of a name; scales of norms lie around 1."""
    noise = np.random.default_rng(list(name.encode())).standard_normal(shape)
    if name.startswith("input."):
        return noise.astype(np.float32)
    scale = len(shape) == 1 and "norm" in name
    return (scale + 0.15 * noise).astype(np.float32)


def table(rows, columns, width):
    """Sines and cosines of the column in the first half of the channels, of the row in the
    second."""
    omega = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
    parts = [f(grid[:, i : i + 1] * omega) for i in (1, 0) for f in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).float()[None]


def rope(rows, columns, size):
    """Cosines and sines [rows columns, size]; pairs share an angle, the row comes first."""
    half = size // 2
    frequencies = 1 / 10_000 ** (torch.arange(0, half, 2).float() / half)
    axes = [torch.arange(n).float()[:, None] * frequencies for n in (rows, columns)]
    row, column = (axis.repeat_interleave(2, dim=1) for axis in axes)
    angles = torch.cat([row.repeat_interleave(columns, 0), column.repeat(rows, 1)], dim=1)
    return angles.cos(), angles.sin()


def turned(x, cos, sin):
    other = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * cos + other * sin


class RootMeanSquare(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt())


class Attention(nn.Module):
    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if qk_norm:
            self.q_norm = RootMeanSquare(width // heads)
            self.k_norm = RootMeanSquare(width // heads)

    def forward(self, x, turns):
        b, n, width = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = turned(q, *turns), turned(k, *turns)
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, width))


class Gated(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        first, second = self.w12(x).chunk(2, dim=-1)
        return self.w3(first * first.sigmoid() * second)


def modulation(width, chunks):
    return nn.Sequential(nn.SiLU(), nn.Linear(width, chunks * width))


class Block(nn.Module):
    def __init__(self, width, heads, qk_norm, shift):
        super().__init__()
        self.norm1, self.norm2 = RootMeanSquare(width), RootMeanSquare(width)
        self.attn, self.mlp = Attention(width, heads, qk_norm), Gated(width)
        self.adaLN_modulation = modulation(width, 6 if shift else 4)
        self.shift = shift

    def forward(self, x, c, turns):
        parts = list(self.adaLN_modulation(c)[:, None].chunk(6 if self.shift else 4, dim=-1))
        if not self.shift:
            parts = [0, *parts[:2], 0, *parts[2:]]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        x = x + gate * self.attn(self.norm1(x) * (1 + scale) + shift, turns)
        return x + mlp_gate * self.mlp(self.norm2(x) * (1 + mlp_scale) + mlp_shift)


class Named(nn.Module):
    """A module that only holds others by name."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class LightningDiT(nn.Module):
    def __init__(self, p, channels, width, depth, heads, classes, qk_norm=False, shift=True):
        super().__init__()
        self.p, self.channels, self.size = p, channels, width // heads
        self.x_embedder = Named(proj=nn.Conv2d(channels, width, p, stride=p))
        mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = Named(mlp=mlp)
        self.y_embedder = Named(embedding_table=nn.Embedding(classes + 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, qk_norm, shift) for _ in range(depth))
        self.final_layer = Named(
            norm_final=RootMeanSquare(width),
            linear=nn.Linear(width, p * p * channels),
            adaLN_modulation=modulation(width, 2),
        )

    def forward(self, x, t, y):
        rows, columns = x.shape[2] // self.p, x.shape[3] // self.p
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        angles = t[:, None] * frequencies[None]
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))
        c = c + self.y_embedder.embedding_table(y)
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2)
        x = x + table(rows, columns, x.shape[-1])
        turns = rope(rows, columns, self.size)
        for block in self.blocks:
            x = block(x, c, turns)
        last = self.final_layer
        shift, scale = last.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        x = last.linear(last.norm_final(x) * (1 + scale) + shift)
        x = x.reshape(len(x), rows, columns, self.p, self.p, self.channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.channels, rows * self.p, -1)


@torch.no_grad()
def main():
    arrays = {"square.pos_embed": table(6, 6, 48).numpy()}
    for name, turn in zip(("cos", "sin"), rope(6, 6, 16), strict=True):
        arrays[f"square.feat_rope.freqs_{name}"] = turn.numpy()
    for name, p, qk_norm, shift in (("plain", 1, False, True), ("options", 2, True, False)):
        model = LightningDiT(p, 5, 48, 2, 3, 7, qk_norm, shift).eval()
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        model.load_state_dict({k: torch.tensor(drawn(k, s)) for k, s in shapes.items()})
        x = torch.tensor(drawn("input.x", (2, 4 * p, 6 * p, 5))).permute(0, 3, 1, 2)
        out = model(x, torch.tensor([0.25, 0.9]), torch.tensor([3, 7])).permute(0, 2, 3, 1).numpy()
        arrays |= {f"{name}.out": out, f"{name}.shapes": np.array(json.dumps(shapes))}
        print(name, out.shape, np.std(out))
    np.savez_compressed(HERE / "lightning_dit.npz", **arrays)


if __name__ == "__main__":
    main()
