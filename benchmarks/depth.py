r"""Stacks of couplings against their depth: memory, time and gradients of plain, rematerialized and
reversible scans.

    python benchmarks/depth.py [--depths 4 16 64 256] [--features 16] [--rows 1024] \
        [--hidden 128 128]
    python benchmarks/depth.py --short

The affine stack has layers of actnorm, a permutation and an affine coupling, the spline stack of a
permutation, an LU map and a rational-quadratic coupling with 8 bins; the step is the negative
log-likelihood and its gradient. Each stack is trained for --steps first, on pairs of moons side by
side; then the four scans, on the same params and batch, take turns. Printed are

    temp MiB    temporary memory of the compiled step; params and their gradient, which are its
                arguments and results, are not in it
    step s      median of the --repeats, and `/ plain`, the median over turns of its ratio to the
                plain scan
    compile s   tracing and compiling, and `/ first`, its ratio to the first depth
    gradient    the largest difference from the plain scan's gradient in a leaf over the largest
                entry of the leaf, for the worst leaf
    rebuild     the largest error of a rebuilt activation (of the worst segment, for reversible=k)
"""

import argparse
import time
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clocks import interleaved, medians

from jflow import bijectors as bj
from jflow import data, nets

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MODES = {
    "plain": {},
    "remat": {"remat": True},
    "reversible": {"reversible": True},
    "reversible=16": {"reversible": 16},
}


def layers(args):
    """{name: permutation -> one layer}; the networks are smooth, so that a rebuilt activation meets
    no kink in them."""
    d, net = args.features, nets.MLP(tuple(args.hidden), nn.silu)
    affine = bj.coupling(bj.univariate.affine(), net, split=d // 2)
    spline = bj.coupling(bj.univariate.rational_quadratic(8, 5.0), net, split=d // 2)
    return {
        "affine": lambda order: bj.chain(bj.actnorm(d), bj.permute(order), affine),
        "spline": lambda order: bj.chain(bj.permute(order), bj.lu(d), spline),
    }


def stack(layer, features, depth, **options):
    return bj.scan(layer, depth, xs=orders(features, depth), **options)


def orders(features, depth):
    return np.stack([np.random.default_rng(i).permutation(features) for i in range(depth)]).astype(
        np.int32
    )


def negative_log_likelihood(bijector):
    def loss(params, x):
        z, log_det = bijector.forward(params, x)
        return jnp.mean(0.5 * jnp.sum(jnp.square(z), axis=-1) - log_det)

    return loss


def moons(args):
    """Standardized [rows, features]: independent pairs of moons side by side."""
    x = np.concatenate(
        [data.moons(args.rows, seed)["x"] for seed in range((args.features + 1) // 2)], axis=-1
    )
    x = x[:, : args.features]
    return jnp.asarray((x - x.mean(0)) / x.std(0), jnp.float32)


def trained(bijector, depth, x, steps):
    """Params after Adam at a rate that falls with depth, without which deep stacks diverge; and the
    loss on the way."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0, 4e-3 / depth, 20))
    )
    params = jax.jit(lambda key: bijector.init(key, x, side="source"))(jax.random.key(0))

    @jax.jit
    def step(params, moments):
        loss, gradient = jax.value_and_grad(negative_log_likelihood(bijector))(params, x)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, updates), moments, loss

    moments, losses = optimizer.init(params), []
    for _ in range(steps):
        params, moments, loss = step(params, moments)
        losses.append(float(loss))
    return params, losses


def rebuild_error(layer, features, segment, params, x):
    """Of the worst of the segments, each of which is rebuilt from its own output."""
    folded = jax.tree.map(lambda p: p.reshape(-1, segment, *p.shape[1:]), params["stacked"])
    depth = segment * len(jax.tree.leaves(folded)[0])

    def one(x, layers):
        p, order = layers
        part, p = bj.scan(layer, segment, xs=order), {"stacked": p, "shared": {}}
        return part.forward(p, x)[0], bj.rebuild_error(part, p, x)

    xs = (folded, orders(features, depth).reshape(-1, segment, features))
    return float(jnp.max(jax.jit(lambda x, xs: jax.lax.scan(one, x, xs)[1])(x, xs)))


def compiled(clock, function, *args):
    """(the program, seconds of tracing and compiling it)"""
    jax.clear_caches()
    start = clock()
    program = jax.jit(function).lower(*args).compile()
    return program, clock() - start


def seconds(clock, program, *args):
    start = clock()
    jax.block_until_ready(program(*args))
    return clock() - start


def difference(tree, expected):
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in leaves)


def table(name, layer, args, x):
    print(
        f"\n{name}: features {args.features}, rows {args.rows}, hidden {args.hidden}, {args.steps}"
        " steps of training"
    )
    print(f"{'depth':>5s} {'scan':14s}{'temp MiB':>10s}{'step s':>9s}{'/ plain':>9s}", end="")
    print(f"{'compile s':>11s}{'/ first':>9s}{'gradient':>10s}{'rebuild':>10s}")
    first = {}
    for depth in args.depths:
        modes = {m: o for m, o in MODES.items() if depth % int(o.get("reversible", 1)) == 0}
        params, losses = trained(
            stack(layer, args.features, depth, remat=True), depth, x, args.steps
        )
        print(f"{depth:5d} trained from {losses[0]:.2f} to {losses[-1]:.2f} nats")
        programs, compiling = {}, {}
        for _ in range(args.compiles):  # in turn, as the steps
            for mode, options in modes.items():
                loss = negative_log_likelihood(stack(layer, args.features, depth, **options))
                programs[mode], taken = compiled(
                    CLOCKS[args.clock], jax.value_and_grad(loss), params, x
                )
                compiling.setdefault(mode, []).append(taken)
        compiling = medians(compiling)
        gradients = {mode: program(params, x)[1] for mode, program in programs.items()}
        calls = {
            mode: partial(seconds, CLOCKS[args.clock], p, params, x) for mode, p in programs.items()
        }
        times = interleaved(calls, args.repeats)
        for mode, options in modes.items():
            first.setdefault(mode, compiling[mode])
            ratio = np.median(np.array(times[mode]) / np.array(times["plain"]))
            mib = programs[mode].memory_analysis().temp_size_in_bytes / 2**20
            print(
                f"{depth:5d} {mode:14s}{mib:10.2f}{np.median(times[mode]):9.3f}{ratio:9.2f}", end=""
            )
            print(f"{compiling[mode]:11.2f}{compiling[mode] / first[mode]:9.2f}", end="")
            print(f"{difference(gradients[mode], gradients['plain']):10.1e}", end="")
            segment = options.get("reversible", 0)
            segment = depth if segment is True else segment
            print(
                (
                    f"{rebuild_error(layer, args.features, segment, params, x):10.1e}"
                    if segment
                    else ""
                ),
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 128])
    parser.add_argument(
        "--stacks", nargs="+", choices=["affine", "spline"], default=["affine", "spline"]
    )
    parser.add_argument(
        "--steps", type=int, default=100, help="of training before the gradients are compared"
    )
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument(
        "--compiles",
        type=int,
        default=3,
        help="times that each program is compiled; the median counts",
    )
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: of this process, on a busy machine",
    )
    parser.add_argument("--short", action="store_true", help="small, shallow and affine, for CI")
    args = parser.parse_args()
    if args.short:
        args.stacks, args.depths, args.features, args.rows, args.hidden = (
            ["affine"],
            [4, 16],
            4,
            128,
            [16],
        )
        args.steps, args.repeats, args.compiles = 20, 3, 1
    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {args.repeats} turns,"
        f" {args.clock} time"
    )
    x = moons(args)
    for name in args.stacks:
        table(name, layers(args)[name], args, x)


if __name__ == "__main__":
    main()
