"""Writes outputs of ADM and DDPM++, so that the tests need no torch.

Run once, in an environment that has torch and torchcfm, and commit the result:

    pip install torch torchcfm
    python tests/peers/make_adm_fixtures.py

Written with torch 2.13.0 and torchcfm 1.0.7, whose `UNetModel` is the network of guided diffusion.
The authors' DDPM++ is in no package: `DDPMpp` below is written after a description of its layers,
names and order of operations, in torch, by the hand that wrote `nets.DDPMpp`; it shares no code
with it. No weights are kept: every tensor and every input is drawn from its name (`drawn`), here
and in the tests. Kept are the names and shapes of the tensors, and the outputs.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchcfm.models.unet.unet import UNetModel

HERE = Path(__file__).parent
SHAPE = 2, 8, 12, 3


def drawn(name, shape):
    """The tensor or input of a name; scales of norms lie around 1."""
    noise = np.random.default_rng(list(name.encode())).standard_normal(shape)
    if name.startswith("input."):
        return noise.astype(np.float32)
    scale = len(shape) == 1 and name.endswith("weight")
    return (scale + 0.12 * noise).astype(np.float32)


class NIN(nn.Module):
    def __init__(self, into, out):
        super().__init__()
        self.W = nn.Parameter(torch.zeros(into, out))
        self.b = nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return torch.einsum("bchw,cd->bdhw", x, self.W) + self.b[None, :, None, None]


def group_norm(channels):
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.GroupNorm_0 = group_norm(channels)
        for i in range(4):
            setattr(self, f"NIN_{i}", NIN(channels, channels))

    def forward(self, x):
        y = self.GroupNorm_0(x)
        q, k, v = (f(y).flatten(2) for f in (self.NIN_0, self.NIN_1, self.NIN_2))
        weights = (q.transpose(1, 2) @ k / math.sqrt(x.shape[1])).softmax(-1)
        y = self.NIN_3((v @ weights.transpose(1, 2)).reshape(x.shape))
        return (x + y) / math.sqrt(2)


class Block(nn.Module):
    def __init__(self, into, out, time, resample=None):
        super().__init__()
        self.resample = resample
        self.GroupNorm_0, self.GroupNorm_1 = group_norm(into), group_norm(out)
        self.Conv_0 = nn.Conv2d(into, out, 3, padding=1)
        self.Conv_1 = nn.Conv2d(out, out, 3, padding=1)
        self.Dense_0 = nn.Linear(time, out)
        self.Conv_2 = nn.Conv2d(into, out, 1) if into != out or resample else nn.Identity()

    def resized(self, x):
        if self.resample == "up":
            return nn.functional.interpolate(x, scale_factor=2, mode="nearest")
        return nn.functional.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x, c):
        silu = nn.functional.silu
        y = self.Conv_0(self.resized(silu(self.GroupNorm_0(x))))
        y = y + self.Dense_0(silu(c))[:, :, None, None]
        y = self.Conv_1(silu(self.GroupNorm_1(y)))
        return (self.Conv_2(self.resized(x)) + y) / math.sqrt(2)


class DDPMpp(nn.Module):
    def __init__(self, width, multipliers, depth, attention, channels=3):
        super().__init__()
        self.width, modules = width, []
        self.plan = plan = []  # what happens with each module after the first three

        def add(module, *what):
            modules.append(module)
            plan.append(what)

        time = 4 * width
        modules += [nn.Linear(width, time), nn.Linear(time, time)]
        modules.append(nn.Conv2d(channels, width, 3, padding=1))
        skips, into = [width], width
        for i, m in enumerate(multipliers):
            for _ in range(depth):
                add(Block(into, m * width, time), "block", *([] if attention[i] else ["keep"]))
                into = m * width
                if attention[i]:
                    add(Attention(into), "attention", "keep")
                skips.append(into)
            if i < len(multipliers) - 1:
                add(Block(into, into, time, "down"), "block", "keep")
                skips.append(into)
        add(Block(into, into, time), "block")
        add(Attention(into), "attention")
        add(Block(into, into, time), "block")
        for i in reversed(range(len(multipliers))):
            for _ in range(depth + 1):
                add(Block(into + skips.pop(), multipliers[i] * width, time), "block", "join")
                into = multipliers[i] * width
            if attention[i]:
                add(Attention(into), "attention")
            if i:
                add(Block(into, into, time, "up"), "block")
        modules += [group_norm(into), nn.Conv2d(into, channels, 3, padding=1)]
        self.all_modules = nn.ModuleList(modules)

    def forward(self, x, t):
        half, modules = self.width // 2, self.all_modules
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / (half - 1))
        angles = 999 * t[:, None] * frequencies[None]
        c = modules[0](torch.cat([angles.sin(), angles.cos()], dim=-1))
        c = modules[1](nn.functional.silu(c))
        x = modules[2](x)
        skips = [x]
        for module, what in zip(modules[3:-2], self.plan, strict=True):
            if "join" in what:
                x = torch.cat([x, skips.pop()], dim=1)
            x = module(x, c) if "block" in what else module(x)
            if "keep" in what:
                skips.append(x)
        return modules[-1](nn.functional.silu(modules[-2](x)))


@torch.no_grad()
def main():
    arrays = {}
    common = {
        "image_size": 8,
        "in_channels": 3,
        "model_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": (1, 2),
        "attention_resolutions": (2,),
        "num_head_channels": 32,
        "num_classes": 5,
    }
    models = {
        "A": UNetModel(**common, out_channels=6, use_scale_shift_norm=True, resblock_updown=True),
        "B": UNetModel(**common, out_channels=3, use_new_attention_order=True),
        "DDPM++": DDPMpp(16, (1, 2), 2, (False, True)),
    }
    x = torch.tensor(drawn("input.x", SHAPE)).permute(0, 3, 1, 2)
    y = torch.tensor([1, 4])
    for name, model in models.items():
        model.eval()
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        model.load_state_dict({k: torch.tensor(drawn(k, s)) for k, s in shapes.items()})
        if name == "DDPM++":
            out = model(x, torch.tensor([0.0035, 0.625]))
        else:
            out = model(torch.tensor([3.5, 625.0]), x, y)
        out = out.permute(0, 2, 3, 1).numpy()
        arrays |= {f"{name}.out": out, f"{name}.shapes": np.array(json.dumps(shapes))}
        print(name, out.shape, np.std(out))
    with torch.device("meta"):
        model = DDPMpp(128, (1, 2, 2, 2), 4, (False, True, False, False))
    print("parameters of DDPM++ for CIFAR-10:", sum(p.numel() for p in model.parameters()))
    np.savez_compressed(HERE / "adm.npz", **arrays)


if __name__ == "__main__":
    main()
