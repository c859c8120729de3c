r"""The torch side of flow_matching_step.py: torchcfm's loop on networks of the same sizes.

    TORCH_PYTHON benchmarks/peers/torch_flow_matching.py \
        --config '{"net": "mlp", "shape": [2], "batch": 256, ...}'

Answers requests on stdin, a JSON line each: {"steps": n} -> {"seconds", "params", "memory"}; memory
is the most that the step held on a GPU, in bytes, null on a CPU. The networks are jflow's `nets` in
plain torch, zero heads included.
"""

import argparse
import contextlib
import json
import math
import sys
import time

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torchcfm import ConditionalFlowMatcher
except ImportError as error:
    sys.exit(
        f"{error}: this script needs torch and torchcfm (pip install torch; pip install --no-deps"
        " torchcfm)"
    )


class MLP(nn.Module):
    def __init__(self, shape, width, layers):
        super().__init__()
        widths = [shape[0] + 1] + [width] * layers
        hidden = [m for i, o in zip(widths, widths[1:]) for m in (nn.Linear(i, o), nn.SELU())]  # noqa: B905
        self.net = nn.Sequential(*hidden, nn.Linear(width, shape[0]))

    def forward(self, t, x):
        return self.net(torch.cat([x, t[:, None]], dim=1))


class Embed(nn.Module):
    """Sines and cosines of t through two layers, and the SiLU before every modulation."""

    def __init__(self, width, features=256, scale=100.0):
        super().__init__()
        self.register_buffer(
            "frequencies", scale * 10_000.0 ** (-torch.arange(features // 2) / (features // 2))
        )
        self.net = nn.Sequential(
            nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, t):
        angles = t[:, None] * self.frequencies
        return self.net(torch.cat([angles.cos(), angles.sin()], dim=1))


def attend(qkv, heads):
    """Tokens [b, n, 3 width] -> [b, n, width]."""
    b, n, size = qkv.shape
    q, k, v = qkv.view(b, n, 3, heads, size // (3 * heads)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, size // 3)


class DiTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.width = heads, width
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, h, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c)[:, None].chunk(
            6, dim=-1
        )
        y = F.layer_norm(h, (self.width,), eps=1e-6) * (1 + scale_a) + shift_a
        h = h + gate_a * self.out(attend(self.qkv(y), self.heads))
        y = F.layer_norm(h, (self.width,), eps=1e-6) * (1 + scale_m) + shift_m
        return h + gate_m * self.mlp(y)


class DiT(nn.Module):
    def __init__(self, shape, patch_size, width, depth, heads):
        super().__init__()
        height, side, channels = shape
        self.patch, self.grid, self.width = (
            patch_size,
            (height // patch_size, side // patch_size),
            width,
        )
        self.patches = nn.Linear(patch_size**2 * channels, width)
        self.register_buffer("positions", torch.randn(self.grid[0] * self.grid[1], width))
        self.embed = Embed(width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.modulation, self.head = (
            nn.Linear(width, 2 * width),
            nn.Linear(width, patch_size**2 * channels),
        )
        for layer in (self.modulation, self.head, *(block.modulation for block in self.blocks)):
            nn.init.zeros_(layer.weight)

    def forward(self, t, x):
        b, channels = x.shape[:2]
        (rows, columns), p = self.grid, self.patch
        tokens = (
            x.view(b, channels, rows, p, columns, p)
            .permute(0, 2, 4, 3, 5, 1)
            .reshape(b, rows * columns, -1)
        )
        h, c = self.patches(tokens) + self.positions, self.embed(t)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        h = self.head(F.layer_norm(h, (self.width,), eps=1e-6) * (1 + scale) + shift)
        return h.view(b, rows, columns, p, p, channels).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


class UNetBlock(nn.Module):
    def __init__(self, channels, embed, heads, skip):
        super().__init__()
        groups = math.gcd(8, channels)
        self.heads, self.merge = heads, nn.Conv2d(2 * channels, channels, 1) if skip else None
        self.norm_in, self.norm_out = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv_in, self.conv_out = (
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)
        )
        self.modulation = nn.Linear(embed, 2 * channels)
        nn.init.zeros_(self.conv_out.weight)
        if heads:
            self.norm = nn.GroupNorm(groups, channels)
            self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
            nn.init.zeros_(self.out.weight)

    def forward(self, h, skip, c):
        if self.merge is not None:
            h = self.merge(torch.cat([h, skip], dim=1))
        y = self.conv_in(F.silu(self.norm_in(h)))
        shift, scale = self.modulation(c)[:, :, None, None].chunk(2, dim=1)
        h = h + self.conv_out(F.silu(self.norm_out(y) * (1 + scale) + shift))
        if self.heads:
            tokens = self.out(attend(self.qkv(self.norm(h).flatten(2).transpose(1, 2)), self.heads))
            h = h + tokens.transpose(1, 2).reshape(h.shape)
        return h


class UNet(nn.Module):
    def __init__(self, shape, channels, multipliers, blocks, attention, heads):
        super().__init__()
        widths, embed = [channels * m for m in multipliers], 4 * channels
        self.stem, self.embed = nn.Conv2d(shape[-1], widths[0], 3, padding=1), Embed(embed)

        def stack(level, skip):
            heads_here = heads if attention[level] else 0
            return nn.ModuleList(
                UNetBlock(widths[level], embed, heads_here, skip) for _ in range(blocks)
            )

        inner = range(len(widths) - 1)
        self.down, self.up = (
            nn.ModuleList(stack(i, skip) for i in inner) for skip in (False, True)
        )
        self.middle = stack(-1, False)
        self.shrink = nn.ModuleList(nn.Conv2d(widths[i], widths[i + 1], 2, 2) for i in inner)
        self.grow = nn.ModuleList(nn.Conv2d(widths[i + 1], widths[i], 3, padding=1) for i in inner)
        self.norm, self.head = (
            nn.GroupNorm(math.gcd(8, widths[0]), widths[0]),
            nn.Conv2d(widths[0], shape[-1], 3, padding=1),
        )
        nn.init.zeros_(self.head.weight)

    def forward(self, t, x):
        h, c, skips = self.stem(x), self.embed(t), []
        for level, shrink in zip(self.down, self.shrink):  # noqa: B905
            for block in level:
                h = block(h, None, c)
                skips.append(h)
            h = shrink(h)
        for block in self.middle:
            h = block(h, None, c)
        for level, grow in zip(reversed(self.up), reversed(self.grow)):  # noqa: B905
            h = grow(F.interpolate(h, scale_factor=2))
            for block in level:
                h = block(h, skips.pop(), c)
        return self.head(F.silu(self.norm(h)))


NETS = {"mlp": MLP, "unet": UNet, "dit": DiT}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--config", required=True, help="JSON: net, shape, batch, sizes, dtype, threads"
    )
    config = json.loads(parser.parse_args().config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = config["shape"]
    model = NETS[config["net"]](shape, **config["sizes"]).to(device)
    optimizer, matcher = (
        torch.optim.Adam(model.parameters(), 1e-4),
        ConditionalFlowMatcher(sigma=0.0),
    )
    x1 = torch.randn(
        config["batch"], *(shape if len(shape) == 1 else [shape[-1], *shape[:-1]]), device=device
    )
    half = config["dtype"] == "bfloat16"

    def run(steps):
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            t, x_t, u_t = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
            with torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext():
                v = model(t, x_t)
            torch.mean((v.float() - u_t) ** 2).backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def best_of_two(threads):
        torch.set_num_threads(threads)
        return min(run(config["turn"]) for _ in range(2))

    first = run(1)
    torch.set_num_threads(min({1, config["threads"]}, key=best_of_two))
    for line in sys.stdin:
        answer = {
            "seconds": run(json.loads(line)["steps"]),
            "first": first,
            "params": sum(p.numel() for p in model.parameters()),
            "memory": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
