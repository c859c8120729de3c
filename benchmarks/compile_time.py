"""What it takes to compile the spline recipe, beside FlowJAX: CPU seconds from a Python function to
a program.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --short

`flows.neural_spline` with its linear maps against FlowJAX's `coupling_flow` of splines, which has
none: 8 bins or knots on [-5, 5], networks of one hidden layer of 50, log_prob, value and gradient
of the mean negative log-likelihood, and samples of 256 rows. Tracing, lowering and XLA's
compilation are counted in processor time; the two take turns. Below 1 in the last
column: jflow compiles faster.
"""

import argparse
import time

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import paramax
from flowjax.bijections import RationalQuadraticSpline
from flowjax.distributions import Normal
from flowjax.flows import coupling_flow

from jflow import flows

ROWS, HIDDEN, BINS = 256, 50, 8


def programs(log_prob, sample, params, x) -> dict:
    """name -> (function, its arguments)"""
    loss = jax.value_and_grad(lambda params, x: -jnp.mean(log_prob(params, x)))
    key = jax.random.key(1)
    return {
        "log_prob": (log_prob, (params, x)),
        "gradient": (loss, (params, x)),
        "samples": (sample, (params, key)),
    }


def jflow_programs(depth: int, x) -> dict:
    flow = flows.neural_spline(
        x.shape[1:], depth=depth, hidden=(HIDDEN,), bins=BINS, activation=nn.relu
    )
    params = jax.eval_shape(flow.init, jax.random.key(0), x)
    return programs(flow.log_prob, lambda params, key: flow.sample(params, key, ROWS), params, x)


def flowjax_programs(depth: int, x) -> dict:
    flow = coupling_flow(
        jax.random.key(0),
        base_dist=Normal(jnp.zeros(x.shape[1])),
        transformer=RationalQuadraticSpline(knots=BINS, interval=5),
        flow_layers=depth,
        nn_width=HIDDEN,
        nn_depth=1,
    )
    params, static = eqx.partition(
        flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )
    whole = lambda params: paramax.unwrap(eqx.combine(params, static))  # noqa: E731
    return programs(
        lambda params, x: whole(params).log_prob(x),
        lambda params, key: whole(params).sample(key, (ROWS,)),
        params,
        x,
    )


def seconds(function, arguments) -> float:
    start = time.process_time()
    jax.jit(lambda *arguments: function(*arguments)).lower(*arguments).compile()
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=int, default=8)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="depth 2, once")
    args = parser.parse_args()
    if args.short:
        args.depths, args.repeats = [2], 1
    jax.config.update("jax_enable_compilation_cache", False)
    x = np.random.default_rng(0).normal(size=(ROWS, args.features)).astype(np.float32)
    print(f"jax {jax.__version__}, {args.features} numbers, CPU seconds, medians of {args.repeats}")
    print("| depth | program | jflow | FlowJAX | jflow / FlowJAX |\n|---|---|---|---|---|")
    for depth in args.depths:
        totals = []
        for _ in range(args.repeats):
            both = jflow_programs(depth, x), flowjax_programs(depth, x)
            order = (1, -1)[len(totals) % 2]  # who begins profits less from what jax remembers
            totals.append(
                [[seconds(*one[name]) for one in both[::order]][::order] for name in both[0]]
            )
        totals = np.array(totals)  # repeat, program, library
        for i, name in enumerate(("log_prob", "gradient", "samples")):
            ours, theirs = np.median(totals[:, i], axis=0)
            ratio = np.median(totals[:, i, 0] / totals[:, i, 1])
            print(f"| {depth} | {name} | {ours:.2f} | {theirs:.2f} | {ratio:.2f} |", flush=True)
        whole = totals.sum(axis=1)
        ours, theirs = np.median(whole, axis=0)
        print(
            f"| {depth} | all three | {ours:.2f} | {theirs:.2f} |"
            f" {np.median(whole[:, 0] / whole[:, 1]):.2f} |"
        )


if __name__ == "__main__":
    main()
