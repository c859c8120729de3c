"""What the depth of a backbone costs to compile: seconds and instructions of its forward pass and
of its gradient, at depth 24 and at depth 4.

    python benchmarks/backbones.py
    python benchmarks/backbones.py --short

Tiny widths, since the sizes of arrays do not matter here. Tracing, lowering and XLA's compilation
are counted in processor time; depths take turns, and medians of their ratios are printed.
Instructions are those of the HLO that XLA gets. To reach: as many at both depths, since blocks are
scanned, and so a ratio of about 1.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from jflow import nets
from jflow.types import Condition

ROWS = 5  # not a number of layers, which would share constants of that size
IMAGE = jnp.zeros((ROWS, 4, 6, 3)), jnp.zeros(ROWS)
LABEL = jnp.zeros(ROWS, jnp.int32)
TEXT = Condition(context=jnp.zeros((ROWS, 7, 8)), vector=jnp.zeros((ROWS, 9)))
BACKBONES = {  # name: (depth -> module, its inputs)
    "DiT": (lambda n: nets.DiT(2, 16, n, 2, num_classes=10), (*IMAGE, LABEL)),
    "LightningDiT": (lambda n: nets.LightningDiT(2, 16, n, 2, num_classes=10), (*IMAGE, LABEL)),
    "UViT": (lambda n: nets.UViT(2, 16, n, 2, num_classes=10), (*IMAGE, LABEL)),
    "MMDiT": (lambda n: nets.MMDiT(2, 16, n, 2, dual_layers=n // 2, qk_norm=True), (*IMAGE, TEXT)),
    "Flux": (lambda n: nets.Flux(2, 16, n, n, 2, rope_axes=(2, 2, 4)), (*IMAGE, TEXT)),
    "TarFlowTransformer": (
        lambda n: nets.TarFlowTransformer(2, 16, n, 2, num_classes=10),
        (jnp.zeros((ROWS, 6, 12)), LABEL),
    ),
}


def programs(net, inputs) -> dict:
    """name -> (function, its arguments) of a network."""
    params = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    loss = jax.value_and_grad(lambda params, inputs: jnp.sum(net.apply(params, *inputs)))
    return {
        "forward": (lambda params, inputs: net.apply(params, *inputs), (params, inputs)),
        "gradient": (loss, (params, inputs)),
    }


def measured(function, arguments) -> tuple[float, int]:
    """(processor seconds from a Python function to a program, its instructions)"""
    start = time.process_time()
    lowered = jax.jit(lambda *arguments: function(*arguments)).lower(*arguments)
    lowered.compile()
    return time.process_time() - start, lowered.as_text(dialect="hlo").count(" = ")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--depths", type=int, nargs=2, default=[4, 24])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="two networks at depths 4 and 8, once")
    args = parser.parse_args()
    if args.short:
        args.nets, args.depths, args.repeats = ["DiT", "MMDiT"], [4, 8], 1
    jax.config.update("jax_enable_compilation_cache", False)
    low, high = args.depths
    print(f"jax {jax.__version__}, processor seconds, medians of {args.repeats}")
    print(
        f"| backbone | program | s, depth {low} | s, depth {high} | ratio | instructions, {low}"
        f" | instructions, {high} |\n|---|---|---|---|---|---|---|"
    )
    for name in args.nets:
        make, inputs = BACKBONES[name]
        both = [programs(make(depth), inputs) for depth in args.depths]
        for program in both[0]:
            seconds = []
            for turn in range(args.repeats):
                order = (1, -1)[turn % 2]  # who begins profits less from what jax remembers
                found = [measured(*one[program]) for one in both[::order]][::order]
                seconds.append([s for s, _ in found])
            first, second = np.median(seconds, axis=0)
            ratio = np.median([b / a for a, b in seconds])
            counts = " | ".join(str(count) for _, count in found)
            print(
                f"| {name} | {program} | {first:.2f} | {second:.2f} | {ratio:.2f} | {counts} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
