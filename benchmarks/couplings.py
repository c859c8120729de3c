"""Seconds of a coupling of one batch, beside scipy's assignment and POT's plans, in one run.

    python benchmarks/couplings.py [--sizes 256 512 1024 2048] [--dims 2 784] [--repeats 7]

Two dimensions: eight Gaussians to two moons. More: two Gaussians. Labels, for the class-aware ones,
are of ten classes. The calls take turns; printed are the median milliseconds, what POT's exact plan
takes over it (more than 1: faster than POT), and the mean cost of the pairs over that of the
optimum. POT's `emd` gives a plan to draw from; the draw itself is not counted. Peers need POT (pip
install pot).
"""

import argparse
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from jflow import couplings, data

EPSILON = 0.01  # of Sinkhorn, in jflow's unit of costs (`plans.scale`) and, for POT, in mean costs
COUPLINGS = {
    "exact": couplings.optimal_transport(),
    "exact, within class": couplings.optimal_transport(couplings.within_class()),
    "exact, near condition": couplings.optimal_transport(couplings.near_condition()),
    "sinkhorn": couplings.sinkhorn(EPSILON),
    "sinkhorn, likeliest": couplings.sinkhorn(EPSILON, draw=couplings.most_likely_permutation),
    "sinkhorn, with replacement": couplings.sinkhorn(
        EPSILON, draw=couplings.sample_with_replacement
    ),
    "unbalanced": couplings.unbalanced(EPSILON),
    "stable": couplings.stable_matching(),
    "partial 0.8": couplings.partial_optimal_transport(0.8),
}


def rows(n, d, seed):
    if d == 2:
        moons = data.moons(n, seed + 1, noise=0.2)
        x0, x1 = data.eight_gaussians(n, seed)["x"], 3 * moons["x"] - 1
    else:
        rng = np.random.default_rng(seed)
        x0, x1 = (rng.normal(m, s, (n, d)).astype(np.float32) for m, s in ((0, 1), (1, 0.5)))
    return (
        jnp.asarray(x0),
        jnp.asarray(x1),
        jnp.asarray(np.random.default_rng(seed).integers(0, 10, n)),
    )


def peers(ot, n):
    uniform = np.full(n, 1 / n)
    return {
        "POT emd": lambda cost: ot.emd(uniform, uniform, cost),
        "POT sinkhorn": lambda cost: ot.sinkhorn(uniform, uniform, cost, EPSILON * cost.mean()),
        "scipy assignment": linear_sum_assignment,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 784])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    try:
        import ot
    except ImportError:
        sys.exit("benchmarks/couplings.py compares with POT: pip install pot")
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {args.repeats} repeats")
    for d in args.dims:
        for n in args.sizes:
            table(ot, n, d, args.repeats)


def table(ot, n, d, repeats):
    batches = [rows(n, d, 100 * k) for k in range(repeats)]
    matrices = [
        np.asarray(couplings.squared_euclidean(*batch[:2]), np.float64) for batch in batches
    ]
    calls, gaps = {}, {}
    for name, coupling in COUPLINGS.items():
        pair = jax.jit(
            lambda key, x0, x1, label, coupling=coupling: tuple(
                map(jnp.asarray, coupling(key, x0, x1, label))
            )
        )
        if "condition" in name:
            pair = jax.jit(
                lambda key, x0, x1, label, coupling=coupling: coupling(key, x0, x1, x1[:, :1])
            )
        calls[name] = lambda k, pair=pair: jax.block_until_ready(
            pair(jax.random.key(k), *batches[k])
        )
        i, j = map(np.asarray, calls[name](0))  # compiles
        best = linear_sum_assignment(matrices[0])
        gaps[name] = matrices[0][i, j].mean() / matrices[0][best].mean()
    for name, call in peers(ot, n).items():
        calls[name] = lambda k, call=call: call(matrices[k])
    times = {name: [] for name in calls}
    for k in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call(k)
            times[name].append(time.perf_counter() - start)
    median = {name: 1e3 * np.median(found) for name, found in times.items()}
    print(f"\nn = {n}, d = {d}")
    print(f"{'':28s}{'ms':>10s}{'POT emd / it':>14s}{'cost / optimum':>16s}")
    for name, ms in median.items():
        print(f"{name:28s}{ms:10.2f}{median['POT emd'] / ms:14.2f}", end="")
        print(f"{gaps[name]:16.3f}" if name in gaps else "")


if __name__ == "__main__":
    main()
