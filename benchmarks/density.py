"""Coupling flows as densities: log_prob, a training step and samples, beside FlowJAX, zuko, nflows,
normflows and distrax.

    python benchmarks/density.py --torch-python PATH
    python benchmarks/density.py --short

PATH is the Python of an environment with torch, zuko, nflows and normflows; --distrax-python that
of one with distrax (it needs tensorflow-probability). All flows have the same form: `--depth`
couplings that transform one half of the numbers given the other by a ReLU network of two hidden
layers of 128, fixed permutations between them, no linear layers; splines of 8 bins on [-5, 5], or
an affine map. A training step is value and gradient of the mean negative log-likelihood and Adam.
The torch peers run eagerly on --threads threads, as their users run them.

"products" is the floor: the matrix products of the networks and their gradients, with the numbers
in between left as they come, which no way to write the couplings can save.

All take turns. Printed are the median milliseconds, the median over turns of peer / jflow (above 1:
jflow is faster), the seconds of the first training step, compilation included, and the compiler's
count of temporary memory for it (JAX only).
"""

import argparse
import os
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clocks import CLOCKS, interleaved, peer

from jflow import bijectors, distributions, flows, losses, nets, train

WHAT = ("log_prob", "train", "sample")


def jflow_model(features, kind, args, implementation=None):
    """implementation: of the spline's kernel."""
    transformer = {
        "spline": bijectors.univariate.rational_quadratic(8, 5.0, implementation=implementation),
        "affine": bijectors.univariate.affine(),
    }[kind]

    def layer(order):
        coupling = bijectors.coupling(
            transformer, nets.MLP((128, 128), nn.relu), split=features // 2
        )
        return bijectors.chain(bijectors.permute(order), coupling)

    orders = np.stack([np.random.default_rng(i).permutation(features) for i in range(args.depth)])
    stack = bijectors.scan(layer, args.depth, xs=orders)
    flow = flows.flow(stack, distributions.normal((features,)))
    x = data(features, args.batch)
    params = flow.init(jax.random.key(0), x)
    optimizer = optax.adam(1e-3)
    step = jax.jit(train.make_step(losses.nll(flow), optimizer))
    state = train.init_state(params, optimizer, jax.random.key(1))
    log_prob, sample = jax.jit(flow.log_prob), jax.jit(flow.sample, static_argnums=2)
    return {
        "log_prob": lambda: log_prob(params, x),
        "train": lambda: step(state, {"x": x}),
        "sample": lambda: sample(params, jax.random.key(2), args.batch),
    }, lambda: step.lower(state, {"x": x})


def flowjax_model(features, kind, args):
    import equinox as eqx
    import paramax
    from flowjax.bijections import Affine, RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow

    flow = coupling_flow(
        jax.random.key(0),
        base_dist=Normal(jnp.zeros(features)),
        transformer=RationalQuadraticSpline(knots=8, interval=5) if kind == "spline" else Affine(),
        flow_layers=args.depth,
        nn_width=128,
        nn_depth=2,
    )
    x = data(features, args.batch)
    params, static = eqx.partition(
        flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )
    optimizer = optax.adam(1e-3)
    opt_state = optimizer.init(params)

    def loss(params, x):
        return -paramax.unwrap(eqx.combine(params, static)).log_prob(x).mean()

    @jax.jit
    def step(params, opt_state, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    log_prob = jax.jit(lambda params, x: paramax.unwrap(eqx.combine(params, static)).log_prob(x))
    sample = jax.jit(
        lambda params, key: paramax.unwrap(eqx.combine(params, static)).sample(key, (args.batch,))
    )
    return {
        "log_prob": lambda: log_prob(params, x),
        "train": lambda: step(params, opt_state, x),
        "sample": lambda: sample(params, jax.random.key(2)),
    }, lambda: step.lower(params, opt_state, x)


def products_model(features, kind, args):
    """The networks of jflow_model alone: what a flow with couplings that cost nothing would
    take."""
    half, size = features // 2, {"spline": 3 * 8 - 1, "affine": 2}[kind]
    sizes = ((half, 128), (128, 128), (128, half * size))
    rng = np.random.default_rng(0)
    stacked = [
        jnp.asarray(rng.normal(size=(args.depth, *s)) / np.sqrt(s[0]), jnp.float32) for s in sizes
    ]
    x = data(features, args.batch)[:, :half]

    def run(stacked, x):
        def layer(x, weights):
            first, second, head = weights
            raw = nn.relu(nn.relu(x @ first) @ second) @ head
            return raw[:, :half], jnp.mean(
                raw
            )  # the mean reads all of raw, and its gradient writes all of it

        return jnp.mean(jax.lax.scan(layer, x, stacked)[1])

    once, step = jax.jit(run), jax.jit(jax.value_and_grad(run))
    return {
        "log_prob": lambda: once(stacked, x),
        "train": lambda: step(stacked, x),
        "sample": lambda: once(stacked, x),
    }, lambda: step.lower(stacked, x)


def data(features, batch):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, features)), jnp.float32)


def compare(features, kind, args, ask, ask_distrax):
    calls, lowered, first, memory = {}, {}, {}, {}
    for name, make in (
        ("jflow", jflow_model),
        ("products", products_model),
        ("FlowJAX", flowjax_model),
    ):
        calls[name], lowered[name] = make(features, kind, args)
        start = time.perf_counter()
        jax.block_until_ready(calls[name]["train"]())
        first[name] = time.perf_counter() - start
        memory[name] = lowered[name]().compile().memory_analysis().temp_size_in_bytes
    peers = [(ask, name) for name in ("zuko", "nflows", "normflows")] if ask else []
    peers += [(ask_distrax, "distrax")] if ask_distrax else []
    for asked, name in peers:
        sizes = {
            "library": name,
            "kind": kind,
            "features": features,
            "batch": args.batch,
            "depth": args.depth,
        }
        calls[name] = {
            w: lambda asked=asked, q={**sizes, "what": w}: asked(q)["seconds"] for w in WHAT
        }
        first[name] = calls[name]["train"]()
    times = {}
    for what in WHAT:
        turns = {name: call[what] for name, call in calls.items()}
        interleaved(turns, 1)  # compiles
        times[what] = interleaved(turns, args.repeats, args.clock)
    print(f"\n{kind}, D = {features}, batch {args.batch}, depth {args.depth}")
    print(f"{'':10s}" + "".join(f"{w + ', ms':>15s}{'peer/jflow':>11s}" for w in WHAT), end="")
    print(f"{'first step, s':>15s}{'temp MiB':>10s}")
    for name in calls:
        print(f"{name:10s}", end="")
        for what in WHAT:
            seconds = np.asarray(times[what][name])
            ratio = np.median(seconds / np.asarray(times[what]["jflow"]))
            print(f"{1e3 * np.median(seconds):15.1f}{ratio:11.2f}", end="")
        print(
            f"{first[name]:15.1f}" + (f"{memory[name] / 2**20:10.0f}" if name in memory else ""),
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", help="a Python with torch, zuko, nflows and normflows")
    parser.add_argument("--distrax-python", help="a Python with distrax and tensorflow-probability")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--features", type=int, nargs="+", default=[16, 64])
    parser.add_argument(
        "--kinds", nargs="+", default=["spline", "affine"], choices=["spline", "affine"]
    )
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="cpu: processor time, JAX libraries alone",
    )
    parser.add_argument(
        "--short", action="store_true", help="256 rows, 2 layers, 16 numbers, 2 turns, for CI"
    )
    args = parser.parse_args()
    if args.clock == "cpu" and (args.torch_python or args.distrax_python):
        parser.error("--clock cpu times this process: leave the peers of other processes out")
    if args.short:
        args.batch, args.depth, args.features, args.repeats = 256, 2, [16], 2
    with (
        peer(args.torch_python, "torch_density.py", "--threads", args.threads) as ask,
        peer(args.distrax_python, "distrax_density.py") as ask_distrax,
    ):
        for kind in args.kinds:
            for features in args.features:
                compare(features, kind, args, ask, ask_distrax)


if __name__ == "__main__":
    main()
