"""What a sample of a trained autoregressive flow costs, in log-densities: Jacobi iteration, beside
FlowJAX's sampler.

    python benchmarks/autoregressive_sampling.py --data-dir DATA --workdir runs/autoregressive
    python benchmarks/autoregressive_sampling.py --short

Trains `flows.neural_spline_autoregressive` and `flows.maf` (5 layers, two hidden layers) on
scikit-learn's digits, 8x8 and pooled to 4x4, and on MNIST at 14x14 (DATA holds images/mnist.npz; or
set JFLOW_DATA), keeps the params in a workdir if one is given, and draws `--rows` rows. A pass is
an evaluation of a layer's network on all rows; a layer takes as many as its slowest row. Printed
for each flow:

    passes         of the slowest row, layer by layer from the data on, and their mean: a
                   log-density takes 1 a layer
    sample / log p the median over turns of the ratio of times, all numbers of all rows drawn and
                   the density of as many rows
    off sequential the largest difference from `bijectors.sequential`, which solves for one number
                   after another, over `--check-rows` rows, relative to 1 + |x|: of a layer given
                   the same rows, and of the whole flow, where the layers that follow multiply what
                   one rounds; beside it how far both are from float64

FlowJAX's `masked_autoregressive_flow` of the same sizes, untrained (its sampler takes as many
passes as there are numbers, whatever the params), is measured in the same turns, on `--peer-rows`
rows, as is jflow on as many.
"""

import argparse
import os
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault(
    "OPENBLAS_NUM_THREADS", "1"
)  # XLA's triangular solves; its threads wait badly where cores are busy

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clocks import interleaved

from jflow import bijectors, data, flows, losses, metrics, nets, train

DEPTH, BINS = 5, 8


class Task(NamedTuple):
    levels: int
    width: int  # of the two hidden layers
    steps: int  # of training, 128 rows each
    rows: object  # data folder -> (train, test), levels [n, d]


def pooled(x, size):
    """Sums of blocks of pixels: [n, h, w, 1] -> [n, size * size]."""
    n, h = x.shape[:2]
    return (
        x.astype(int)
        .reshape(n, size, h // size, size, h // size)
        .sum((2, 4))
        .reshape(n, size * size)
    )


def digits(size):
    splits = data.digits()
    return pooled(splits.train["x"], size), pooled(splits.test["x"], size)


def mnist(folder):
    splits = data.mnist(Path(folder) / "images" / "mnist.npz")
    train_x, test = (
        np.rint(pooled(part["x"], 14) / 4).astype(int) for part in (splits.train, splits.test)
    )
    return train_x, test[:2000]


TASKS = {
    "digits 4x4": Task(65, 128, 600, lambda folder: digits(4)),
    "digits 8x8": Task(17, 256, 600, lambda folder: digits(8)),
    "MNIST 14x14": Task(256, 512, 800, mnist),
}
SPLINE, AFFINE = bijectors.univariate.rational_quadratic(BINS), bijectors.univariate.affine()


def spline_flow(features, width):
    return flows.neural_spline_autoregressive(
        (features,), depth=DEPTH, hidden=(width, width), bins=BINS, standardize=False
    )


def affine_flow(features, width):
    return flows.maf((features,), depth=DEPTH, hidden=(width, width), standardize=False)


KINDS = {"spline": (spline_flow, SPLINE, True), "affine": (affine_flow, AFFINE, False)}


def fitted(name, kind, args):
    """(model, params, size of the event, a line about the training)."""
    task, make = TASKS[name], KINDS[kind][0]
    rows, test = task.rows(args.data_dir)
    features = rows.shape[1]
    pre = data.chain_preprocess(data.dequantize(task.levels), data.logit(), data.standardize())
    fit_state = pre.fit({"x": rows})
    model, steps = make(features, task.width), args.steps or task.steps
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, max(1, steps // 20), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(5.0), optax.adam(schedule))
    init_key, train_key = jax.random.split(jax.random.key(args.seed))
    params = jax.jit(model.init)(init_key, jnp.zeros((2, features)))
    batches = data.batches(
        {"x": rows},
        128,
        seed=args.seed,
        transform=lambda rows, rng: pre.apply(fit_state, rows, rng),
    )
    began = time.process_time()
    fit = train.fit(
        train.init_state(params, optimizer, train_key),
        train.make_step(losses.nll(model), optimizer),
        batches,
        steps=steps,
        workdir=args.workdir and args.workdir / f"{name.replace(' ', '_')}_{kind}",
        progress=False,
    )
    spent = (
        f"{time.process_time() - began:.0f} s of CPU time"
        if fit.history
        else "found in the workdir"
    )
    params, log_prob = fit.state.params, jax.jit(model.log_prob)
    y = pre.apply(fit_state, {"x": test}, np.random.default_rng(args.seed))
    chunks = [log_prob(params, y["x"][i : i + 500]) for i in range(0, len(test), 500)]
    nats = np.concatenate(chunks) + pre.log_det(fit_state, y)
    bpd = metrics.bits_per_dim(nats, features)
    return (
        model,
        params,
        features,
        f"{steps} steps, {spent}, test {float(np.mean(bpd)):.3f} bits/dim",
    )


def sampler(kind, features, width, solver, other=None):
    """The flow's `forward` with its passes: (stacked params, z [b, d]) -> (x [b, d], passes
    [depth], converged, gap).

    gap: the largest difference that the solver `other` makes to a layer, given the same rows; 0
    without one."""
    _, transformer, linear = KINDS[kind]
    net = nets.MADE(transformer.size, (width, width))

    def layer(z, params):
        net_params, gap = params["1"] if linear else params, 0.0
        x, _, info = bijectors.autoregressive_inverse(
            transformer, net, net_params, z, solver=solver
        )
        if other is not None:
            y, _, _ = bijectors.autoregressive_inverse(
                transformer, net, net_params, z, solver=other
            )
            gap = jnp.max(jnp.abs(y - x) / (1 + jnp.abs(x)))
        if linear:
            x, _ = bijectors.lu(features).inverse(params["0"], x)
        return x[:, ::-1], (info.passes, jnp.all(info.converged), gap)

    @jax.jit
    def run(stacked, z):
        x, (passes, converged, gap) = jax.lax.scan(layer, z, stacked, reverse=True)
        return x, passes, jnp.all(converged), jnp.max(gap)

    return run


def largest(x, y):
    return float(np.max(np.abs(np.asarray(x) - y) / (1 + np.abs(y))))


def flowjax_calls(kind, features, width, rows):
    """{name: call} of its density and its sampler, for `rows` rows; nothing where FlowJAX is not
    installed."""
    try:
        import equinox as eqx
        from flowjax.bijections import RationalQuadraticSpline
        from flowjax.distributions import Normal
        from flowjax.flows import masked_autoregressive_flow
    except ImportError:
        return {}
    with jax.numpy_rank_promotion("allow"):
        flow = masked_autoregressive_flow(
            jax.random.key(0),
            base_dist=Normal(jnp.zeros(features)),
            transformer=(
                RationalQuadraticSpline(knots=BINS, interval=5) if kind == "spline" else None
            ),
            flow_layers=DEPTH,
            nn_width=width,
            nn_depth=2,
            nn_activation=jax.nn.silu,
        )
    x = jax.random.normal(jax.random.key(1), (rows, features))
    log_prob = eqx.filter_jit(lambda flow, x: flow.log_prob(x))
    sample = eqx.filter_jit(lambda flow, key: flow.sample(key, (rows,)))
    return {
        "FlowJAX log p": lambda: log_prob(flow, x),
        "FlowJAX sample": lambda: sample(flow, jax.random.key(2)),
    }


def jflow_calls(model, params, features, rows, name="jflow"):
    x = jax.random.normal(jax.random.key(1), (rows, features))
    log_prob = jax.jit(model.log_prob)
    sample = jax.jit(lambda params, key: model.sample(params, key, rows))
    return {
        f"{name} log p": lambda: log_prob(params, x),
        f"{name} sample": lambda: sample(params, jax.random.key(2)),
    }


def measure(name, kind, args):
    model, params, features, about = fitted(name, kind, args)
    stacked, width = params["bijector"]["stacked"]["1"], TASKS[name].width
    print(f"\n{name}, {features} numbers, {kind}: {about}", flush=True)

    z = jax.random.normal(jax.random.key(args.seed + 1), (args.rows, features))
    x, passes, converged, _ = sampler(kind, features, width, bijectors.jacobi())(stacked, z)
    line = (
        f"  passes {' '.join(map(str, passes.tolist()))}, mean {float(passes.mean()):.1f} of"
        f" {features}"
    )
    print(line + ("" if converged else ", NOT all rows converged"), flush=True)
    if args.check_rows:
        few = z[: args.check_rows]
        one_by_one = sampler(kind, features, width, bijectors.sequential(), bijectors.jacobi())
        exact, _, _, gap = one_by_one(stacked, few)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (stacked, few))
            truth = np.asarray(sampler(kind, features, width, bijectors.jacobi())(*wide)[0])
        mine, exact = np.asarray(x[: len(few)]), np.asarray(exact)
        print(
            f"  {len(few)} rows: off sequential {gap:.1e} a layer, {largest(mine, exact):.1e} in"
            f" all; off float64 {largest(mine, truth):.1e}, sequential {largest(exact, truth):.1e}",
            flush=True,
        )
    calls = jflow_calls(model, params, features, args.rows)
    if args.peer_rows:
        calls |= jflow_calls(model, params, features, args.peer_rows, "jflow, few rows")
        calls |= flowjax_calls(kind, features, width, args.peer_rows)
    for call in calls.values():
        jax.block_until_ready(call())  # compiles
    times = interleaved(calls, args.repeats)
    for label in (key.removesuffix(" sample") for key in calls if key.endswith(" sample")):
        density, draw = (np.asarray(times[f"{label} {what}"]) for what in ("log p", "sample"))
        count = args.rows if label == "jflow" else args.peer_rows
        print(
            f"  {label:16s}{count:6d} rows: log p {np.median(density):8.4f} s, sample"
            f" {np.median(draw):8.4f} s, sample / log p {np.median(draw / density):6.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--data-dir", default=os.environ.get("JFLOW_DATA", ""), help="holds images/mnist.npz"
    )
    parser.add_argument(
        "--workdir", type=Path, help="keeps the params; a training found there is not done again"
    )
    parser.add_argument(
        "--steps", type=int, help="of training; 600 on digits and 800 on MNIST by default"
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument(
        "--check-rows", type=int, default=512, help="to solve one number after another; 0: none"
    )
    parser.add_argument(
        "--peer-rows",
        type=int,
        default=64,
        help="for FlowJAX, whose sampler is slow; 0: without it",
    )
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--short", action="store_true", help="4x4 digits, 60 steps, 256 rows, 3 turns, for CI"
    )
    args = parser.parse_args()
    if args.short:
        args.tasks, args.steps, args.rows, args.check_rows, args.repeats = (
            ["digits 4x4"],
            60,
            256,
            64,
            3,
        )
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {DEPTH} layers, medians of"
        f" {args.repeats} turns"
    )
    for name in args.tasks:
        if name.startswith("MNIST") and not args.data_dir:
            print(f"\n{name}: left out, it needs --data-dir or JFLOW_DATA")
            continue
        for kind in args.kinds:
            measure(name, kind, args)


if __name__ == "__main__":
    main()
