"""A training step of flow matching: jflow beside torchcfm's loop and plain JAX, for a perceptron, a
U-Net and a DiT.

    python benchmarks/flow_matching_step.py --torch-python PATH
    python benchmarks/flow_matching_step.py --size base --dtype bfloat16     # for a GPU
    python benchmarks/flow_matching_step.py --short

PATH is the Python of an environment with torch and torchcfm. Batch, sizes, linear path, uniform
times and Adam are the same everywhere; the batch stays on the device, noise and times are drawn at
every step. `jflow` is a jitted `train.make_step`; "n in a scan" runs n of them in one program, as
`train.fit(inner=n)` does; "plain JAX" is benchmarks/peers/plain_jax.py. All take turns. Printed:
the median milliseconds of a step, the median over turns of the ratio it / jflow (above 1: slower),
the time of the first call (tracing, compilation and a step), the compiled program's temporary
memory, and with --peak-tflops, or on a GPU, the share of the peak that the model's own arithmetic
makes: 6 per weight and token, and the attention, counted for the DiT alone.
"""

import argparse
import json
import os
import time
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clocks import interleaved, peer
from peers import plain_jax

import jflow
from jflow import losses, nets, train


class Case(NamedTuple):
    shape: tuple[int, ...]
    batch: int
    turn: int  # steps between two looks at the clock
    sizes: dict


class MLP(nn.Module):
    """torchcfm's network: x and t side by side into SELU layers."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, x, t, cond=None):
        return nn.Dense(x.shape[1])(nets.MLP((self.width,) * self.layers, nn.selu)(x, t[:, None]))


_UNET = {
    "channels": 32,
    "multipliers": (1, 2),
    "num_blocks": 1,
    "attention": (False, True),
    "num_heads": 2,
}
SIZES = {
    "small": {
        "mlp": Case((2,), 256, 200, {"width": 64, "layers": 3}),
        "unet": Case((16, 16, 1), 64, 2, _UNET),
        "dit": Case(
            (16, 16, 1), 32, 2, {"patch_size": 2, "width": 128, "num_layers": 4, "num_heads": 4}
        ),
    },
    "base": {
        "mlp": Case((64,), 4096, 100, {"width": 1024, "layers": 3}),
        "unet": Case(
            (32, 32, 3),
            128,
            5,
            {
                "channels": 128,
                "multipliers": (1, 2, 2),
                "num_blocks": 2,
                "attention": (False, True, True),
                "num_heads": 4,
            },
        ),
        "dit": Case(
            (32, 32, 4), 256, 5, {"patch_size": 2, "width": 768, "num_layers": 12, "num_heads": 12}
        ),
    },
}
NETS = {"mlp": MLP, "unet": nets.UNet, "dit": nets.DiT}


class Contestant(NamedTuple):
    turn: object  # () -> array, after `steps` steps
    steps: int
    first: float  # seconds
    memory: int | None  # bytes


def contestant(step, state, batch, turn, inner=1):
    """step(state, batch) -> (state, ...), compiled ahead of time so that its memory can be read
    off."""

    def several(state, batch):
        return jax.lax.scan(lambda state, _: (step(state, batch)[0], None), state, length=inner)[0]

    held = [jax.tree.map(jnp.copy, state)]
    start = time.perf_counter()
    compiled = (
        jax.jit(several if inner > 1 else lambda *args: step(*args)[0], donate_argnums=0)
        .lower(*held, batch)
        .compile()
    )
    held[0] = jax.block_until_ready(compiled(held[0], batch))
    first = time.perf_counter() - start

    def run():
        for _ in range(max(1, turn // inner)):
            held[0] = compiled(held[0], batch)
        return held[0]

    analysis = compiled.memory_analysis()
    return Contestant(
        run, max(1, turn // inner) * inner, first, analysis and analysis.temp_size_in_bytes
    )


def plain_step(velocity, optimizer):
    step = plain_jax.step_of(velocity, optimizer)
    return lambda state, batch: (step(*state, batch["x"])[:3], None)


def contestants(net, case, args):
    dtype = jnp.dtype(args.dtype)
    module = NETS[net](**case.sizes) if net == "mlp" else NETS[net](**case.sizes, dtype=dtype)
    velocity, optimizer = jflow.velocity(module), optax.adam(1e-4)
    x_key, params_key, train_key = jax.random.split(jax.random.key(0), 3)
    batch = {"x": jax.random.normal(x_key, (case.batch, *case.shape))}
    params = jax.jit(velocity.init)(params_key, batch["x"], jnp.zeros(case.batch))
    step = train.make_step(losses.flow_matching(velocity), optimizer)
    state = train.init_state(params, optimizer, train_key)
    yield "jflow", contestant(step, state, batch, case.turn)
    plain = {}
    if net == "mlp":
        yield f"jflow, {case.turn} in a scan", contestant(step, state, batch, case.turn, case.turn)
        plain["plain JAX"] = plain_jax.mlp
    if net == "dit":
        make = partial(plain_jax.dit, case.sizes["patch_size"], case.sizes["num_heads"], dtype)
        plain = {
            "plain JAX, unrolled": make(scanned=False),
            "plain JAX, scanned": make(scanned=True),
        }
    for name, other in plain.items():
        check(velocity.apply, other, params, batch["x"], name)
        start = (params, optimizer.init(params), train_key)
        yield name, contestant(plain_step(other, optimizer), start, batch, case.turn)
        if net == "mlp":
            in_scan = contestant(plain_step(other, optimizer), start, batch, case.turn, case.turn)
            yield f"{name}, {case.turn} in a scan", in_scan


def check(ours, other, params, x, name):
    """Raise unless both networks return the same, on weights that are nowhere zero."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + jnp.asarray(0.05 * rng.normal(size=p.shape), p.dtype), params
    )
    t = jnp.linspace(0, 1, len(x))[:4]
    a, b = (np.asarray(jax.jit(f)(params, x[:4], t), np.float32) for f in (ours, other))
    if not np.max(np.abs(a - b)) <= 0.05 * np.max(np.abs(a)):  # bfloat16 rounds to 3 digits
        raise SystemExit(f"{name} is not the same network: {a.ravel()[:3]} and {b.ravel()[:3]}")


def model_flops(case):
    """Of a training step of a DiT: 2 per weight and token forward, 4 backward, and the two products
    of attention."""
    width, depth, p = (case.sizes[k] for k in ("width", "num_layers", "patch_size"))
    tokens, patch = case.shape[0] * case.shape[1] // p**2, p * p * case.shape[2]
    a_token = depth * (12 * width**2 + 2 * tokens * width) + 2 * patch * width
    a_row = width * (256 + width) + (6 * depth + 2) * width**2
    return 6 * case.batch * (tokens * a_token + a_row)


def compare(net, case, args):
    config = {
        "net": net,
        "shape": case.shape,
        "batch": case.batch,
        "sizes": case.sizes,
        "turn": case.turn,
    }
    config |= {"dtype": args.dtype, "threads": args.threads}
    entries = dict(contestants(net, case, args))
    calls, steps = {k: e.turn for k, e in entries.items()}, {k: e.steps for k, e in entries.items()}
    with peer(args.torch_python, "torch_flow_matching.py", "--config", json.dumps(config)) as ask:
        if ask:
            name = "torchcfm"
            calls[name], steps[name] = lambda: ask({"steps": case.turn})["seconds"], case.turn
            answer = ask({"steps": case.turn})
            entries[name] = Contestant(None, case.turn, answer["first"], answer["memory"])
        times = interleaved(calls, args.repeats)
    mine = np.asarray(times["jflow"]) / steps["jflow"]
    peak = args.peak_tflops or (989 if jax.default_backend() == "gpu" else None)
    shape = "x".join(map(str, case.shape))
    print(f"\n{net} {case.sizes}, {case.batch} rows of {shape}, {args.dtype}")
    print(
        f"{'':32s}{'ms':>9s}{'it / jflow':>12s}{'first call, s':>15s}"
        f"{'temp, MiB':>11s}{'of peak':>9s}"
    )
    for name, seconds in times.items():
        entry, each = entries[name], np.asarray(seconds) / steps[name]
        memory = f"{entry.memory / 2**20:11.1f}" if entry.memory is not None else f"{'-':>11s}"
        share = (
            f"{model_flops(case) / np.median(each) / (1e12 * peak):9.3f}"
            if peak and net == "dit"
            else f"{'-':>9s}"
        )
        ratio = np.median(each / mine)
        print(
            f"{name:32s}{1e3 * np.median(each):9.3f}{ratio:12.2f}"
            f"{entry.first:15.2f}{memory}{share}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", help="a Python with torch and torchcfm")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="small",
        help="base: DiT-B/2 on 32x32x4 and the like, for a GPU",
    )
    parser.add_argument("--batch", type=int, help="rows, in place of the size's own")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of U-Net and DiT; params: float32",
    )
    parser.add_argument(
        "--peak-tflops", type=float, help="of the device; 989 on a GPU (an H200's in bfloat16)"
    )
    parser.add_argument("--repeats", type=int, default=20, help="turns")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of torch, where they beat one"
    )
    parser.add_argument("--short", action="store_true", help="the perceptron alone, 3 turns")
    args = parser.parse_args()
    if args.short:
        args.nets, args.repeats = ["mlp"], 3
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, medians of {args.repeats} turns")
    for net in args.nets:
        case = SIZES[args.size][net]
        compare(net, case._replace(batch=args.batch or case.batch), args)


if __name__ == "__main__":
    main()
