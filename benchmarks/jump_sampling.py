"""Seconds of the jumps of a discrete flow over those of its network alone.

    python benchmarks/jump_sampling.py
    python benchmarks/jump_sampling.py --short

Samples `--rows` texts of `--length` tokens of a vocabulary of 64 by `--steps` jumps, with
`nets.TokenDiT` (width 256, 4 layers) under `nets.TokenLogits`: each step of `solvers`, scanned over
the grid in one program, and the network alone as often on as many tokens, scanned too. Printed: the
median seconds of a step over turns, and the ratio to the network's. At most 1.2 is to reach.
Nothing is on the host between steps: the program has no callback, which is checked. Params are
random.
"""

import argparse

import jax
import jax.numpy as jnp
from clocks import interleaved, medians

import jflow
from jflow import nets, paths, solvers

VOCABULARY = 65
MASK = VOCABULARY - 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--short", action="store_true", help="2 rows of 16 tokens, for CI")
    args = parser.parse_args()
    if args.short:
        args.rows, args.length, args.steps, args.width, args.repeats = 2, 16, 2, 16, 2
    module = nets.TokenLogits(
        nets.TokenDiT(width=args.width, num_layers=4, num_heads=4), VOCABULARY, width=args.width
    )
    net = jflow.field(module)
    law = paths.unmasking(net, MASK)
    rates = paths.jump_rates(law)
    noisy = paths.jump_rates(law, corrector=paths.remasking(1.0, MASK))
    last = solvers.jump(law)
    made = {
        "jump": last,
        "euler_jump": solvers.euler_jump(rates),
        "exponential_jump, ending": solvers.ending(solvers.exponential_jump(rates), last),
        "euler_jump remasking, ending": solvers.ending(solvers.euler_jump(noisy), last),
        "confident_jump": solvers.confident_jump(law, MASK),
    }
    x0 = jnp.full((args.rows, args.length), MASK)
    params = net.init(jax.random.key(0), x0, jnp.zeros(args.rows))
    grid = solvers.grids.uniform(args.steps)

    def alone(params, x0):
        def advance(x, t):  # what comes next depends on what came, as little as it can
            logits = net.apply(params, x, t)
            return x + (logits[..., 0] > 1e30).astype(x.dtype), None

        return jax.lax.scan(advance, x0, jnp.asarray(grid[:-1], jnp.float32))[0]

    def sampler(step):
        return lambda params, x0: solvers.sample_sde(step, params, x0, jax.random.key(1), grid)[0]

    runs = {"network": alone} | {name: sampler(step) for name, step in made.items()}
    for name, run in runs.items():
        if "callback" in str(jax.make_jaxpr(run)(params, x0)):
            raise SystemExit(f"{name}: a callback to the host")
    compiled = {name: jax.jit(run) for name, run in runs.items()}
    calls = {
        name: lambda run=run: jax.block_until_ready(run(params, x0))
        for name, run in compiled.items()
    }
    for call in calls.values():
        call()  # compiles
    seconds = medians(interleaved(calls, args.repeats))
    print(
        f"{args.rows} texts of {args.length} tokens, {args.steps} steps, width {args.width},"
        f" {jax.devices()[0].device_kind}, jax {jax.__version__}, medians of {args.repeats} turns"
    )
    print(f"{'':30s}{'ms / step':>11s}{'ratio':>8s}")
    for name, value in seconds.items():
        print(f"{name:30s}{1e3 * value / args.steps:11.2f}{value / seconds['network']:8.3f}")


if __name__ == "__main__":
    main()
