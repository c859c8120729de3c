"""Solvers fitted to one trained velocity, beside plain ones, at 4 to 10 evaluations: BOSS, Bespoke
solvers, FlowTurbo.

    python experiments/few_step_solvers/run.py --out runs/solvers  # eight Gaussians
    python experiments/few_step_solvers/run.py --out runs/solvers --data checkerboard
    python experiments/few_step_solvers/run.py --out runs/short --short  # CI: numbers mean nothing

Trains a velocity from standard normal noise, solves its ODE finely on rows of noise, fits the
solvers to those solutions, and prints the root of the mean squared difference to a fine solution on
fresh rows, by evaluations of the velocity. Writes results.json and samples.png. Run again after a
kill it goes on with the velocity and the solutions that it has. README.md has the results.
"""

import argparse
import functools
import json
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import jflow
from jflow import data, losses, nets, solvers, times, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SETS = {"eight": data.eight_gaussians, "checkerboard": data.checkerboard}
KNOTS = np.linspace(0, 1, 101)
EULER, MIDPOINT, HEUN, FINE = diffrax.Euler(), diffrax.Midpoint(), diffrax.Heun(), diffrax.Tsit5()
INNER = 100  # updates between two visits of the host


class RungeKutta4(diffrax.AbstractERK):
    """The classical method of order four, which diffrax leaves out. It has no error estimate."""

    tableau = diffrax.ButcherTableau(
        c=np.array([0.5, 0.5, 1.0]),
        b_sol=np.array([1, 2, 2, 1]) / 6,
        b_error=np.zeros(4),
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
    )
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of the velocity, the solutions and the results",
    )
    parser.add_argument("--data", choices=SETS, default="eight")
    parser.add_argument(
        "--steps", type=int, default=20_000, help="of the velocity's training, 256 rows each"
    )
    parser.add_argument("--fit", type=int, default=2_000, help="updates of a solver, 256 rows each")
    parser.add_argument(
        "--tune", type=int, default=5_000, help="updates of a network: BOSS's velocity, the refiner"
    )
    parser.add_argument(
        "--solutions", type=int, default=8_192, help="rows solved finely, to fit to"
    )
    parser.add_argument("--rows", type=int, default=10_000, help="fresh rows to measure on")
    parser.add_argument(
        "--evaluations", type=int, nargs="+", default=[4, 6, 8, 10], help="even numbers from 4"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="shrink it to a minute")
    args = parser.parse_args()
    if args.short:
        args.steps, args.fit, args.tune, args.solutions, args.rows, args.evaluations = (
            200,
            100,
            100,
            512,
            500,
            [4],
        )
    if any(count % INNER for count in (args.steps, args.fit, args.tune)):
        parser.error(f"expected --steps, --fit and --tune to be multiples of {INNER}")
    if any(n < 4 or n % 2 for n in args.evaluations):
        parser.error(f"expected even --evaluations of at least 4, got {args.evaluations}")
    out = args.out / f"{args.data}-{args.seed}"
    out.mkdir(parents=True, exist_ok=True)
    keys = jax.random.split(jax.random.key(args.seed), 7)

    net = jflow.velocity(nets.TimeMLP((64, 64, 64)))
    x = jnp.asarray(SETS[args.data](100_000, 10 * args.seed + 1)["x"])
    fresh = net.init(keys[1], x[:2], jnp.zeros(2))
    plain = lambda key: {"x": x[jax.random.randint(key, (256,), 0, len(x))]}  # noqa: E731
    params = trained(
        losses.flow_matching(net), fresh, plain, args.steps, keys[0], workdir=out / "velocity"
    )
    print("velocity trained", flush=True)

    data.generate_reflow_trajectories(
        out / "solutions",
        net,
        params,
        data.normal_source((2,)),
        args.solutions,
        KNOTS,
        key=keys[2],
        method=4,
        batch=min(1024, args.solutions),
        progress=False,
    )
    solution = jnp.asarray(np.asarray(data.read_shards(out / "solutions")["x"]))
    x0 = jax.random.normal(keys[3], (args.rows, 2))
    exact = solvers.sample(net, params, x0, method=solvers.fixed(100, FINE))[0]
    check = solvers.sample(net, params, x0, method=solvers.fixed(200, FINE))[0]
    print(
        f"fine solution: two of them differ by {rms(exact, check):.1e}, rows have size"
        f" {rms(exact, 0):.2f}",
        flush=True,
    )

    rows = lambda key: jax.random.randint(key, (256,), 0, len(solution))  # noqa: E731
    whole = lambda key: {"x": solution[rows(key)]}  # noqa: E731
    ends = lambda key: {"x0": (z := solution[rows(key)])[:, 0], "x": z[:, -1]}  # noqa: E731
    fitted = functools.partial(trained, steps=args.fit, key=keys[4], rate=2e-2, decay=0.99)
    tuned = functools.partial(trained, steps=args.tune, key=keys[5])
    frozen = {"teacher": params}
    table, shown = {}, {"fine solution": dict.fromkeys(args.evaluations, exact[:2000])}

    def report(name, n, answer):
        x1, info = jax.jit(answer)(x0)
        counted = set(info.evaluations.tolist())
        if counted != {n}:
            raise ValueError(f"{name}: expected {n} evaluations, counted {counted}")
        table.setdefault(name, {})[n] = rms(x1, exact)
        shown.setdefault(name, {})[n] = x1[:2000]
        print(f"{n:3d} evaluations  {name:40s} {table[name][n]:.4f}", flush=True)

    def solved(method, velocity_params=params):
        return lambda x: solvers.sample(net, velocity_params, x, method=method)

    # a refiner, small beside the velocity, serves every number of evaluations
    refiner = solvers.refiner(jflow.velocity(nets.TimeMLP((32,))))
    small = refiner.init(keys[6], (x[:2], x[:2]), jnp.zeros(2))
    loss = losses.velocity_refiner(refiner, net, times=times.nearby_pairs(0.2))
    small = tuned(loss, small, plain, frozen=frozen)
    size = {"velocity": count(params), "refiner": count(small)}
    print(f"numbers in the velocity and the refiner: {size}", flush=True)

    costs = solvers.step_costs(net, params, solution[:1024], KNOTS)
    for n in args.evaluations:
        report("Euler", n, solved(solvers.fixed(n, EULER)))
        report("midpoint", n, solved(solvers.fixed(n // 2, MIDPOINT)))
        report("Heun", n, solved(solvers.fixed(n // 2, HEUN)))
        if n % 4 == 0:
            report("Runge-Kutta 4", n, solved(solvers.fixed(n // 4, RungeKutta4())))
        report("Adams-Bashforth 2", n, solved(solvers.fixed(n, solvers.adams_bashforth(2))))
        report("DPM-Solver++(2M)", n, solved(solvers.fixed(n, solvers.dpm_solver_pp(2))))
        report("pseudo corrector", n, solved(solvers.fixed(n - 1, solvers.pseudo_corrector())))

        at = solvers.bellman(costs, n)
        report("BOSS, grid alone, Euler", n, solved(solvers.on_grid(KNOTS[at], EULER)))
        at_grid = lambda key, at=at: {"x": solution[rows(key)][:, at]}  # noqa: E731
        student = tuned(losses.boss(net, KNOTS[at]), params, at_grid)
        report("BOSS, made straight, Euler", n, solved(solvers.on_grid(KNOTS[at], EULER), student))

        for name, solver, steps in (("RK1", EULER, n), ("RK2", MIDPOINT, n // 2)):
            theta = solvers.bespoke_params(steps, solver=solver)
            for kind, loss, batch in (
                ("bound", solvers.bespoke_bound(net, KNOTS, solver=solver), whole),
                ("error", solvers.bespoke_error(net, solver=solver), ends),
            ):
                mine = fitted(loss, theta, batch, frozen=frozen)
                answer = functools.partial(solvers.bespoke_sample, mine, net, params, solver=solver)
                report(f"Bespoke {name}, {kind}", n, answer)

        for refine in (1, 2):
            kinds = {"heun": 1, "pseudo": n - 2, "refine": refine}
            report(
                f"FlowTurbo, {refine} refined",
                n,
                lambda x, kinds=kinds: solvers.sample_refined(
                    net, params, refiner, small, x, **kinds
                ),
            )

    verdict(table, args.evaluations)
    size["bespoke solver of n evaluations"] = "4 n - 1"
    options = {name: str(value) for name, value in vars(args).items()}
    results = {"options": options, "numbers": size, "rms error": table}
    (out / "results.json").write_text(json.dumps(results, indent=1))
    picture(shown, table, args.evaluations, out / "samples.png")
    print(f"numbers: {out / 'results.json'}, picture: {out / 'samples.png'}")


def trained(loss, params, batch, steps, key, *, rate=2e-3, decay=0.999, frozen=None, workdir=None):
    """The averaged params after so many updates from the given ones; batch: key -> batch."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(rate, steps))
    )
    average = train.ema.warmup(decay)
    # the trainings that one key is for see the same batches
    state = train.init_state(params, optimizer, jax.random.clone(key), ema=average, frozen=frozen)
    step = train.make_step(loss, optimizer, ema=average)
    how = {
        "inner": INNER,
        "log_every": steps,
        "save_every": steps,
        "max_to_keep": 1,
        "progress": False,
    }
    return train.fit(
        state, step, lambda state, key: batch(key), steps=steps, workdir=workdir, **how
    ).state.ema


def rms(a, b):
    return float(jnp.sqrt(jnp.mean(jnp.square(a - b))))


def count(params):
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))


def picture(shown, table, evaluations, file):
    """Samples of each solver by evaluations, the error above: two solvers a line."""
    lines, n = -(-len(shown) // 2), len(evaluations)
    figure, axes = plt.subplots(lines, 2 * n, figsize=(2.3 * n, 1.4 * lines), squeeze=False)
    wide = 1.02 * float(jnp.max(jnp.abs(shown["fine solution"][evaluations[0]])))
    for ax in axes.flat:
        ax.axis("off")
    for i, (name, samples) in enumerate(shown.items()):
        half = axes[i % lines][i // lines * n :][:n]
        half[0].text(0, 1.2, name, fontsize=7, transform=half[0].transAxes)
        for ax, count in zip(half, evaluations, strict=True):
            if count in samples:
                ax.scatter(*np.asarray(samples[count]).T, s=0.4, c="k", linewidths=0)
                error = f": {table[name][count]:.3f}" if name in table else ""
                ax.set_title(f"{count}{error}", loc="left", fontsize=6, pad=1)
                ax.set(xlim=(-wide, wide), ylim=(-wide, wide), aspect="equal")
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.96, 0.05, 0.3)
    figure.savefig(file, dpi=75)
    plt.close(figure)


def verdict(table, evaluations):
    """Whether each fitted solver comes nearer than the best of the plain Runge-Kutta methods of as
    many evaluations."""
    for n in evaluations:
        plain = min(
            table[k][n]
            for k in ("Euler", "midpoint", "Heun", "Runge-Kutta 4")
            if n in table.get(k, {})
        )
        for name, row in table.items():
            if name.startswith(("BOSS", "Bespoke")):
                said = "yes" if row[n] < plain else "NO"
                print(f"{n:3d} evaluations  {name:28s} below the best of Runge-Kutta: {said}")


if __name__ == "__main__":
    main()
