"""Writes what a tiny TarFlow with random weights computes, so that the tests need no torch.

    pip install torch
    python tests/peers/make_tarflow_fixtures.py

Written with torch 2.13.0, in float64. The authors' file may not be copied, and no package has the
network: the one below is a twin by the same hand as jflow's, from the equations, over the published
names.
"""

import numpy as np
import tarflow_weights as tar
import torch
import torch.nn.functional as F

W = {name: torch.tensor(tensor, dtype=torch.float64) for name, tensor in tar.original().items()}


def linear(name, x):
    return F.linear(x, W[f"{name}.weight"], W[f"{name}.bias"])


def norm(name, x):
    return F.layer_norm(x, x.shape[-1:], W[f"{name}.weight"], W[f"{name}.bias"], 1e-5)


def layer(name, x, temperature):
    b, n, width = x.shape
    qkv = linear(f"{name}.attention.qkv", norm(f"{name}.attention.norm", x))
    q, k, v = qkv.reshape(b, n, 3, width // tar.HEAD, tar.HEAD).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / tar.HEAD**0.5 / temperature
    scores = scores.masked_fill(W["blocks.0.attn_mask"] == 0, -torch.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, width)
    x = x + linear(f"{name}.attention.proj", y)
    y = F.gelu(linear(f"{name}.mlp.main.0", norm(f"{name}.mlp.norm", x)))
    return x + linear(f"{name}.mlp.main.2", y)


def turn(i, x, axis=1):
    """The tokens in the order of block i, or back."""
    return x.flip(axis) if i % 2 else x


def numbers(i, x, y, temperature=1.0):
    """(log-scales, means) of tokens [b, n, C p p] in the order of block i."""
    table = W[f"blocks.{i}.class_embed"]
    classes = torch.stack([table[k] if k >= 0 else table.mean(0) for k in y.tolist()])
    h = linear(f"blocks.{i}.proj_in", x) + turn(i, W[f"blocks.{i}.pos_embed"], 0) + classes
    for j in range(tar.LAYERS):
        h = layer(f"blocks.{i}.attn_blocks.{j}", h, temperature)
    raw = linear(f"blocks.{i}.proj_out", h)
    raw = torch.cat([torch.zeros_like(raw[:, :1]), raw[:, :-1]], 1)  # token i is told by 0 .. i-1
    return raw.chunk(2, -1)


def block(i, x, y):
    """(z, mean of the log-scales): tokens [b, n, C p p], reversed for odd i on the way in and
    out."""
    x = turn(i, x)
    log_scale, mean = numbers(i, x, y)
    return turn(i, (x - mean) * torch.exp(-log_scale)), log_scale.mean((1, 2))


def sampled(z, y, weight, temperature=1.0):
    """Tokens of latents [b, n, C p p], each by a pass over all; slot k is guided by weight
    k / (n - 1) away from the mean of the classes at the temperature."""
    none = torch.full_like(torch.tensor(y), -1)
    for i in reversed(range(tar.DEPTH)):
        x = turn(i, z).clone()
        for k in range(tar.TOKENS):
            w = weight * k / (tar.TOKENS - 1)
            both = zip(numbers(i, x, y), numbers(i, x, none, temperature), strict=True)
            log_scale, mean = (a + w * (a - b) for a, b in both)
            x[:, k] = x[:, k] * torch.exp(log_scale[:, k]) + mean[:, k]
        z = turn(i, x)
    return z


def tokens(x):
    x = torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2)
    return F.unfold(x, tar.PATCH, stride=tar.PATCH).transpose(1, 2)


def images(x):
    x = F.fold(x.transpose(1, 2), tar.EVENT[:2], tar.PATCH, stride=tar.PATCH)
    return x.permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def outputs():
    given = tar.inputs()
    x, total = tokens(given["x"]), 0
    for i in range(tar.DEPTH):
        x, log_scale = block(i, x, given["y"])
        total = total - log_scale
    of_z = lambda *guide: images(sampled(tokens(given["z"]), given["y"], *guide))  # noqa: E731
    return {
        "z": images(x),
        "mean_log_det": total.numpy(),
        "sample": of_z(0.0),
        "guided": of_z(1.5, 2.0),
    }


if __name__ == "__main__":
    np.savez_compressed(tar.HERE / "tarflow.npz", **outputs())
