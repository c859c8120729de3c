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


def layer(name, x):
    b, n, width = x.shape
    qkv = linear(f"{name}.attention.qkv", norm(f"{name}.attention.norm", x))
    q, k, v = qkv.reshape(b, n, 3, width // tar.HEAD, tar.HEAD).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / tar.HEAD**0.5
    scores = scores.masked_fill(W["blocks.0.attn_mask"] == 0, -torch.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, width)
    x = x + linear(f"{name}.attention.proj", y)
    y = F.gelu(linear(f"{name}.mlp.main.0", norm(f"{name}.mlp.norm", x)))
    return x + linear(f"{name}.mlp.main.2", y)


def block(i, x, y):
    """(z, mean of the log-scales): tokens [b, n, C p p], reversed for odd i on the way in and
    out."""
    turn = (lambda a, axis: a.flip(axis)) if i % 2 else (lambda a, axis: a)
    x = turn(x, 1)
    table = W[f"blocks.{i}.class_embed"]
    classes = torch.stack([table[k] if k >= 0 else table.mean(0) for k in y.tolist()])
    h = linear(f"blocks.{i}.proj_in", x) + turn(W[f"blocks.{i}.pos_embed"], 0) + classes
    for j in range(tar.LAYERS):
        h = layer(f"blocks.{i}.attn_blocks.{j}", h)
    raw = linear(f"blocks.{i}.proj_out", h)
    raw = torch.cat([torch.zeros_like(raw[:, :1]), raw[:, :-1]], 1)  # token i is told by 0 .. i-1
    log_scale, mean = raw.chunk(2, -1)
    return turn((x - mean) * torch.exp(-log_scale), 1), log_scale.mean((1, 2))


@torch.no_grad()
def outputs():
    given = tar.inputs()
    x = torch.tensor(given["x"], dtype=torch.float64).permute(0, 3, 1, 2)
    x, total = F.unfold(x, tar.PATCH, stride=tar.PATCH).transpose(1, 2), 0
    for i in range(tar.DEPTH):
        x, log_scale = block(i, x, given["y"])
        total = total - log_scale
    z = F.fold(x.transpose(1, 2), tar.EVENT[:2], tar.PATCH, stride=tar.PATCH).permute(0, 2, 3, 1)
    return {"z": z.numpy(), "mean_log_det": total.numpy()}


if __name__ == "__main__":
    np.savez_compressed(tar.HERE / "tarflow.npz", **outputs())
