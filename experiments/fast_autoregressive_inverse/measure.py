"""Passes that sampling a trained spline MAF takes: Jacobi iteration against one number after
another, on digits.

    python experiments/fast_autoregressive_inverse/measure.py
    python experiments/fast_autoregressive_inverse/measure.py --short

Trains `flows.neural_spline_autoregressive` on scikit-learn's 8x8 digits (dequantized, logit,
standardized: 64 numbers) and draws rows from it layer by layer, by `bijectors.jacobi` and by
`bijectors.sequential`. A pass is an evaluation of a layer's network on all rows; a layer takes as
many as its slowest row. Prints, for the untrained flow and after each third of the
training: passes, seconds of drawing (the best of 5), and how far the rows are from those of
`sequential` and of
`sequential` in float64, the largest over all numbers, relative to 1 + |x|. README.md has the
expected numbers.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jflow import bijectors, data, flows, losses, nets, train

BINS = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=5, help="layers")
    parser.add_argument(
        "--width", type=int, default=256, help="of the two hidden layers of a network"
    )
    parser.add_argument("--steps", type=int, default=600, help="of training, 128 digits each")
    parser.add_argument("--rows", type=int, default=64, help="to draw")
    parser.add_argument(
        "--tol", type=float, nargs="+", default=[1e-5, 4e-6, 1e-6], help="of the Jacobi iteration"
    )
    parser.add_argument(
        "--no-linear", action="store_true", help="leave out the LU maps between the layers"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--short", action="store_true", help="2 layers, 60 steps, one tolerance, for CI"
    )
    args = parser.parse_args()
    if args.short:
        args.depth, args.width, args.steps, args.tol = 2, 128, 60, [1e-5]

    model = flows.neural_spline_autoregressive(
        (64,),
        depth=args.depth,
        hidden=(args.width,) * 2,
        bins=BINS,
        linear=not args.no_linear,
        standardize=False,
    )
    rows, test = digits(args.seed)
    init_key, train_key, noise_key = jax.random.split(jax.random.key(args.seed), 3)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, args.steps // 20, args.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(5.0), optax.adam(schedule))
    step = jax.jit(train.make_step(losses.nll(model), optimizer))
    state = train.init_state(
        jax.jit(model.init)(init_key, jnp.asarray(test[:2])), optimizer, train_key
    )
    log_prob = jax.jit(model.log_prob)

    noise = jax.random.normal(noise_key, (args.rows, 64))
    solvers = {"sequential": bijectors.sequential()}
    solvers |= {f"jacobi {tol:.0e}": bijectors.jacobi(tol) for tol in args.tol}
    samplers = {
        name: sampler(args.width, not args.no_linear, solver) for name, solver in solvers.items()
    }

    def report(i):
        nats = float(jnp.mean(log_prob(state.params, test)))
        print(f"after {i} steps, test log-likelihood {nats:.2f} nats", flush=True)
        layers, reference = state.params["bijector"]["stacked"]["1"], None
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (layers, noise))
            exact = np.asarray(samplers["sequential"](*wide)[0])
        for name, run in samplers.items():
            x, passes, converged = jax.block_until_ready(run(layers, noise))  # compiles
            times = []
            for _ in range(5):
                start = time.perf_counter()
                jax.block_until_ready(run(layers, noise))
                times.append(time.perf_counter() - start)
            seconds = min(times)
            reference = (np.asarray(x), seconds) if reference is None else reference
            line(name, passes, converged, np.asarray(x), seconds, exact, *reference)

    if not args.short:
        report(0)
    for i in range(1, args.steps + 1):
        state, _ = step(state, {"x": jnp.asarray(rows(128))})
        if i % (args.steps if args.short else max(1, args.steps // 3)) == 0:
            report(i)


def digits(seed: int):
    """(n -> n training digits, newly dequantized [n, 64]; the test digits), in model units."""
    splits, rng = data.digits(), np.random.default_rng(seed)
    flat = {name: {"x": getattr(splits, name)["x"].reshape(-1, 64)} for name in ("train", "test")}
    pre = data.chain_preprocess(data.dequantize(17), data.logit(), data.standardize())
    fitted = pre.fit(flat["train"])

    def draw(n):
        return pre.apply(fitted, {"x": rng.choice(flat["train"]["x"], n)}, rng)["x"].astype(
            np.float32
        )

    return draw, pre.apply(fitted, flat["test"], rng)["x"].astype(np.float32)


def sampler(width: int, linear: bool, solver):
    """The flow's `forward` with its passes: (stacked params, z [b, 64]) -> (x [b, 64], passes
    [depth], converged)."""
    transformer = bijectors.univariate.rational_quadratic(BINS)
    net = nets.MADE(transformer.size, (width, width))

    def layer(z, params):
        splines = params["1"] if linear else params
        z, _, info = bijectors.autoregressive_inverse(transformer, net, splines, z, solver=solver)
        if linear:
            z, _ = bijectors.lu(64).inverse(params["0"], z)
        return z[:, ::-1], (info.passes, jnp.all(info.converged))

    @jax.jit
    def run(stacked, z):
        x, (passes, converged) = jax.lax.scan(layer, z, stacked, reverse=True)
        return x, passes[::-1], jnp.all(converged)

    return run


def line(name, passes, converged, x, seconds, exact, reference, reference_seconds) -> None:
    """Differences of a number are relative to 1 + |x|."""
    counted, most = int(passes.sum()), 64 * len(passes)
    if name == "sequential":
        counted = most  # its last pass of each layer only looks at the residual
    off, error = (np.max(np.abs(x - y) / (1 + np.abs(y))) for y in (reference, exact))
    print(
        f"  {name:12s} passes {counted:4d} of {most} (1/{most / counted:.1f}), layers"
        f" {passes.tolist()}; {seconds:.3f} s (1/{reference_seconds / seconds:.1f}); off sequential"
        f" {off:.1e}, off float64 {error:.1e}; all converged: {bool(converged)}",
        flush=True,
    )


if __name__ == "__main__":
    main()
