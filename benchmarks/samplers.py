"""Error against evaluations of every solver, on the exact velocity of eight Gaussians.

    python benchmarks/samplers.py [--short]

Two tables from one run. Deterministic solvers: the root mean square distance of their end points
from those of a Dopri8 solve in float64, for each number of evaluations. All samplers, stochastic
ones too: W2 to a sample of the data (`--rows` points; the floor, between two samples of the data,
is the last row). The last column is the time of one evaluation, the network's share included,
relative to a hand-written scan of Euler steps, as the median of `--repeats` runs in turn.
`--short` is a minute on two CPU cores.
"""

import argparse
import time

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from jflow import oracles, solvers
from jflow.metrics import wasserstein
from jflow.solvers import grids, noises

ORACLE = oracles.eight_gaussians()
V = oracles.as_velocity(ORACLE)
# evaluations a step, and at the start
ODE = {
    "Euler = DDIM": (solvers.ddim(), 1, 0),
    "Heun": (diffrax.Heun(), 2, 0),
    "midpoint = RF-Solver": (diffrax.Midpoint(), 2, 0),
    "DPM-Solver-2": (solvers.dpm_solver_2(), 2, 0),
    "DPM-Solver-2, log-SNR": (solvers.dpm_solver_2(middle=solvers.midpoint_in_log_snr()), 2, 0),
    "DPM-Solver++(2S)": (solvers.dpm_solver_pp_2s(), 2, 0),
    "DPM-Solver++(2M)": (solvers.dpm_solver_pp(2), 1, 0),
    "DPM-Solver++(3M)": (solvers.dpm_solver_pp(3), 1, 0),
    "UniPC-2": (solvers.unipc(2), 1, 0),
    "UniPC-3": (solvers.unipc(3), 1, 0),
    "Adams-Bashforth 2": (solvers.adams_bashforth(2), 1, 0),
    "Adams-Bashforth 3": (solvers.adams_bashforth(3), 1, 0),
    "Adams-Bashforth 4": (solvers.adams_bashforth(4), 1, 0),
    "FireFlow": (solvers.fireflow(), 1, 1),
}
SDE = {
    "Euler-Maruyama, decreasing": solvers.euler_maruyama(V, noises.decreasing()),
    "Euler-Maruyama, sigma": solvers.euler_maruyama(V, noises.of_sigma()),
    "Euler-Maruyama, SBDM": solvers.euler_maruyama(V, noises.sbdm()),
    "ancestral": solvers.ancestral(V),
    "overshoot": solvers.overshoot(V),
}
GRIDS = {"uniform": grids.uniform, "cosine": grids.cosine, "edm": grids.edm}


def euler_scan(x, grid):
    def step(x, ends):
        return x + (ends[1] - ends[0]) * V.apply({}, x, ends[0]), None

    return jax.lax.scan(step, x, (grid[:-1], grid[1:]))[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--grid", choices=GRIDS, default="uniform")
    parser.add_argument(
        "--short", action="store_true", help="300 rows; 4 and 16 evaluations; 3 repeats"
    )
    args = parser.parse_args()
    if args.short:
        args.rows, args.evaluations, args.repeats = 300, [4, 16], 3
    x0 = jax.random.normal(jax.random.key(0), (args.rows, 2))
    data, other = (np.asarray(ORACLE.sample(jax.random.key(k), args.rows)) for k in (1, 2))
    with jax.enable_x64(True):
        exact, _ = solvers.sample(
            V, {}, jnp.asarray(x0, jnp.float64), method=solvers.fixed(200, diffrax.Dopri8())
        )
    exact = np.asarray(exact)

    def compiled(name, n):
        """The sampler of n evaluations, or None where its steps don't come out even."""
        if name == "scan":
            grid = jnp.asarray(GRIDS[args.grid](n), jnp.float32)
            return jax.jit(lambda x: euler_scan(x, grid))
        if name in SDE:
            grid = GRIDS[args.grid](n)
            return jax.jit(
                lambda x: solvers.sample_sde(SDE[name], {}, x, jax.random.key(3), grid)[0]
            )
        solver, each, first = ODE[name]
        if (n - first) % each or n <= first:
            return None
        grid = GRIDS[args.grid]((n - first) // each)
        return jax.jit(lambda x: solvers.sample(V, {}, x, method=solvers.on_grid(grid, solver))[0])

    calls, ends = {}, {}
    for name in ["scan", *ODE, *SDE]:
        for n in args.evaluations:
            if (call := compiled(name, n)) is not None:
                calls[name, n], ends[name, n] = call, np.asarray(call(x0))
    most = max(args.evaluations)
    times = {name: [] for name, n in calls if n == most}
    for _ in range(args.repeats):
        for name in times:
            start = time.perf_counter()
            jax.block_until_ready(calls[name, most](x0))
            times[name].append(time.perf_counter() - start)
    scan = np.median(times["scan"])

    def table(title, names, value, last):
        print(
            f"\n{title}\n{'evaluations':28s}"
            + "".join(f"{n:>9d}" for n in args.evaluations)
            + f"{last:>9s}"
        )
        for name in names:
            cells = [
                f"{value(ends[name, n]):9.4f}" if (name, n) in ends else f"{'-':>9s}"
                for n in args.evaluations
            ]
            print(
                f"{name:28s}"
                + "".join(cells)
                + (f"{np.median(times[name]) / scan:9.2f}" if name in times else "")
            )

    print(
        f"{args.rows} rows, grid {args.grid}, {jax.devices()[0].device_kind}; a scan of {most}:"
        f" {1e3 * scan:.2f} ms"
    )
    table(
        "distance from the exact end points",
        ODE,
        lambda x: np.sqrt(np.mean(np.sum((x - exact) ** 2, axis=1))),
        "time",
    )
    table("W2 to data", [*ODE, *SDE], lambda x: wasserstein(x, data), "time")
    print(f"{'(another sample of the data)':28s}" + f"{wasserstein(other, data):9.4f}")


if __name__ == "__main__":
    main()
