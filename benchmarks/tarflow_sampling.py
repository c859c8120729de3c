"""Sampling a TarFlow: keys cached, recomputed, and by blockwise Jacobi, side by side in one run.

    python benchmarks/tarflow_sampling.py [WORKDIR of experiments/mnist_tarflow]

Prints, for each sampler, the median time of `--repeats` calls taken in turn, its ratio to the
cached one, and the largest difference from the cached samples. Without a workdir the params are
drawn at random, small enough for a contracting flow; Jacobi's passes, and so its time, depend on
the flow, so that only a trained one tells.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

import jflow
from jflow import flows
from jflow.bijectors import decoding

SHAPE, SIZES = (
    (14, 14, 1),
    {"patch_size": 2, "width": 64, "depth": 4, "num_layers": 1, "num_classes": 10},
)
SAMPLERS = {
    "cached": decoding.cached(),
    "uncached": decoding.uncached(),
    "jacobi, blocks of 7": decoding.jacobi(7, tol=1e-5),
    "jacobi, blocks of 16": decoding.jacobi(16, tol=1e-5),
    "jacobi, one block": decoding.jacobi(49, tol=1e-5),
    "jacobi, one block, 1e-3": decoding.jacobi(49, tol=1e-3),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdir", nargs="?")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    labels = jnp.arange(args.rows) % 10
    if args.workdir:
        params = jflow.load(args.workdir).params
    else:
        shapes = jax.eval_shape(
            flows.tarflow(SHAPE, **SIZES).init,
            jax.random.key(0),
            jnp.zeros((2, *SHAPE)),
            labels[:2],
        )
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda p: jnp.asarray(0.1 * rng.normal(size=p.shape), p.dtype), shapes
        )
    z = jax.random.normal(jax.random.key(0), (args.rows, *SHAPE))

    calls, values, times = {}, {}, {name: [] for name in SAMPLERS}
    for name, sampler in SAMPLERS.items():
        flow = flows.tarflow(SHAPE, **SIZES, sampler=sampler)
        calls[name] = jax.jit(lambda params, z, flow=flow: flow.forward(params, z, labels)[0])
        values[name] = np.asarray(calls[name](params, z))
    for _ in range(args.repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call(params, z))
            times[name].append(time.perf_counter() - start)

    print(
        f"{args.rows} samples of 49 tokens, {SIZES['blocks']} blocks,"
        f" {jax.devices()[0].device_kind}"
    )
    print(f"{'sampler':26s}{'seconds':>9s}{'ratio':>8s}{'largest difference':>20s}")
    cached = np.median(times["cached"])
    for name in SAMPLERS:
        seconds, gap = np.median(times[name]), np.abs(values[name] - values["cached"]).max()
        print(f"{name:26s}{seconds:9.3f}{seconds / cached:8.2f}{gap:20.1e}")


if __name__ == "__main__":
    main()
