r"""Digits edited into another class by a class-conditional velocity, by each method of
`jflow.steering` that edits.

    python experiments/editing_digits/run.py --out runs/editing  # 5 minutes of CPU time
    python experiments/editing_digits/run.py --out runs/short --short  # CI

A flow is trained on scikit-learn's digits, with labels dropped for 10% of the rows. Each held-out
digit is then edited into another class, drawn once. Prints the share that a classifier gives the
new class, the distance to the source beside that of a fresh sample of the new class, and the
evaluations; then the error of inversion against evaluations; draws OUT/edits.png. README.md has
the results.
"""

import argparse
import json
import math
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.svm import SVC

import jflow
from jflow import data, losses, metrics, nets, solvers, steering, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NULL = 10
STEPS = 40  # of the samplers
COUNTS = (8, 16, 32, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables and pictures")
    parser.add_argument("--steps", type=int, default=4000, help="updates of the training")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate, falling to 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--short", action="store_true", help="20 steps of a narrow network: numbers mean nothing"
    )
    args = parser.parse_args()
    if args.short:
        args.steps, args.width, args.depth = 20, 32, 1
    args.out.mkdir(parents=True, exist_ok=True)
    splits = data.digits()
    net = nets.ResidualMLP(width=args.width, num_blocks=args.depth, num_classes=NULL)
    velocity, params = trained(net, splits, args)
    rows = 20 if args.short else None
    x, old, new = sources(splits, rows)
    edited = edit_all(velocity, params, x, old, new, args)
    table = judged(edited, splits, x, new)
    errors = inversion_errors(velocity, params, x, old, COUNTS[:3] if args.short else COUNTS)
    (args.out / "results.json").write_text(json.dumps({"edits": table, "inversion": errors}))
    draw(edited, x, new, args.out / "edits.png")


def scaled(x) -> np.ndarray:
    """Pixels in [-1, 1]."""
    return np.asarray(x, np.float32) / 8 - 1


def trained(net, splits, args):
    """The velocity of a network and its averaged params."""
    velocity = jflow.velocity(net)
    init_key, key = jax.random.split(jax.random.key(args.seed))
    rows = {"x": scaled(splits.train["x"]), "cond": splits.train["cond"]}
    params = velocity.init(init_key, rows["x"][:1], jnp.zeros(1), rows["cond"][:1])
    optimizer = optax.adam(optax.cosine_decay_schedule(args.rate, args.steps))
    average = train.ema.warmup(0.998)
    loss = losses.chain(losses.drop_cond(0.1, null=NULL), losses.flow_matching(velocity))
    state = train.fit(
        train.init_state(params, optimizer, key, ema=average),
        train.make_step(loss, optimizer, ema=average),
        data.batches(rows, args.batch, seed=args.seed),
        steps=args.steps,
        inner=math.gcd(args.steps, 20),
        log_every=args.steps,
        progress=True,
    ).state
    return velocity, state.ema


def sources(splits, rows):
    """Held-out digits, their labels, and a class to edit each to."""
    x, old = scaled(splits.test["x"])[:rows], splits.test["cond"][:rows]
    steps = np.random.default_rng(0).integers(1, NULL, len(old))
    return jnp.asarray(x), jnp.asarray(old), jnp.asarray((old + steps) % NULL)


def edit_all(velocity, params, x, old, new, args):
    """{name: (edited digits, evaluations of the velocity)}."""
    key, x0_key = jax.random.split(jax.random.key(args.seed + 1))
    x0 = jax.random.normal(x0_key, x.shape)
    grid = np.linspace(0.0, 1.0, STEPS + 1)
    h, late = float(grid[1]), 3 * STEPS // 5  # FlowEdit and its relatives take the last steps
    flow, source = (velocity, params), (x, old, new)
    pulls = {"eta": 0.9, "window": (0.0, 0.5), "method": STEPS}

    def invert(solver, n):
        return steering.edit_by_inversion(*flow, *source, method=solvers.fixed(n, solver))

    def by_sde():
        step = solvers.ancestral(steering.toward_data(velocity, 0.9, window=(0.0, 0.5)))
        return solvers.sample_sde(step, params, x0, key, grid, steering.SteeringCondition(x, new))[
            0
        ]

    def close(z, t):
        return jnp.sum((z - t[:, None, None, None] * x) ** 2, axis=(1, 2, 3)) / 2

    def like_source(z):
        return -close(z, jnp.ones(len(x)))

    def anchored():
        return steering.anchored_guidance(
            *flow, x0, new, log_prob=like_source, scale=0.3, iterations=5, grid=10
        )[0]

    def periodic():
        return steering.periodic_guidance(
            *flow, x0, new, loss=close, optimizer=optax.sgd(0.1), window=(0.0, 0.6), grid=STEPS
        )

    def delta(**options):
        times, optimizer = grid[STEPS - late : -1], optax.sgd(h)
        return steering.delta_velocity(
            *flow, *source, key, times=times, optimizer=optimizer, **options
        )

    def directed():
        return steering.flow_director(
            *flow, *source, key, scale=1.5, n_max=late, n_avg=4, grid=STEPS
        )

    def approximate():
        return steering.approximate_flow(
            *flow, *source, key, times=grid[:-1], optimizer=optax.sgd(h / 2)
        )

    methods = {
        "fresh sample of the new class": (
            lambda: solvers.sample(*flow, x0, new, method=STEPS // 2)[0],
            STEPS,
        ),
        "inversion, Euler": (lambda: invert(diffrax.Euler(), STEPS), 2 * STEPS),
        "inversion, RF-Solver": (lambda: invert(steering.rf_solver(), STEPS // 2), 2 * STEPS),
        "inversion, FireFlow": (lambda: invert(solvers.fireflow(), STEPS - 1), 2 * STEPS),
        "RF-Inversion": (lambda: steering.rf_inversion(*flow, *source, key, **pulls), 2 * STEPS),
        "RF-Inversion's SDE, from noise": (by_sde, STEPS),
        "OTIP": (
            lambda: steering.otip(*flow, *source, key, strength=0.3, phase=0.5, **pulls),
            2 * STEPS,
        ),
        "FlowEdit": (
            lambda: steering.flow_edit(*flow, *source, key, n_max=late, grid=STEPS),
            2 * late,
        ),
        "FlowDirector": (directed, 8 * late),
        "DVRF": (delta, 2 * late),
        "DDS": (lambda: delta(shift=0.0), 2 * late),
        "DreamFlow": (approximate, 2 * STEPS),
        "RectifID, like the source": (anchored, 60),
        "GuideFlow3D, near the source": (periodic, STEPS),
    }
    return {name: (np.asarray(jax.jit(run)()), count) for name, (run, count) in methods.items()}


def judged(edited, splits, x, new):
    """The table of edits."""
    flat = lambda x: np.asarray(x, np.float64).reshape(len(x), -1)  # noqa: E731
    rows = scaled(splits.train["x"])
    classifier = SVC(gamma=0.001 * 64, C=10.0).fit(flat(rows), splits.train["cond"])
    rng = np.random.default_rng(0)
    subsets = [rng.choice(len(rows), len(x), replace=False) for _ in range(20)]
    test = scaled(splits.test["x"])[: len(x)]
    floor = np.mean([metrics.energy_distance(rows[i], test) for i in subsets])
    table = {}
    print(f"{'':31s}{'agreement':>10s}{'distance':>10s}{'energy':>8s}{'evaluations':>13s}")
    for name, (made, count) in edited.items():
        made = np.clip(made, -1, 1)
        distance = float(np.sqrt(np.mean((made - np.asarray(x)) ** 2, axis=(1, 2, 3))).mean())
        agreement = float(classifier.score(flat(made), np.asarray(new)))
        energy = float(metrics.energy_distance(made, test) / floor)
        table[name] = {
            "agreement": agreement,
            "distance": distance,
            "energy": energy,
            "evaluations": count,
        }
        print(f"{name:31s}{agreement:10.1%}{distance:10.3f}{energy:8.2f}{count:13d}")
    return table


def inversion_errors(velocity, params, x, old, counts):
    """Root mean squared errors against evaluations each way, and the orders regressed: of the
    noise, against the midpoint method in many steps, and of the data that comes back."""
    carried = jax.jit(
        lambda x, method, ends: solvers.sample(
            velocity, params, x, old, method=method, t0=ends[0], t1=ends[1]
        )[0],
        static_argnums=(1, 2),
    )
    exact = carried(x, solvers.fixed(4 * max(counts), steering.rf_solver()), (1.0, 0.0))
    table = {}
    print(f"\n{'rms error of':24s}" + "".join(f"{n:>10d}" for n in counts) + f"{'order':>8s}")
    for name, solver, steps in (
        ("Euler", diffrax.Euler(), lambda n: n),
        ("RF-Solver", steering.rf_solver(), lambda n: n // 2),
        ("FireFlow", solvers.fireflow(), lambda n: n - 1),
    ):
        rows = {"noise": [], "data": []}
        for n in counts:
            method = solvers.fixed(steps(n), solver)
            noise = carried(x, method, (1.0, 0.0))
            again = carried(noise, method, (0.0, 1.0))
            for what, made, true in (("noise", noise, exact), ("data", again, x)):
                rows[what].append(float(jnp.sqrt(jnp.mean((made - true) ** 2))))
        for what, errors in rows.items():
            order = float(-np.polyfit(np.log(counts), np.log(errors), 1)[0])
            table[f"{name}, {what}"] = {"errors": errors, "order": order}
            line = "".join(f"{error:10.5f}" for error in errors)
            print(f"{name + ', ' + what:24s}{line}{order:8.2f}")
    return table


def draw(edited, x, new, path) -> None:
    """The classes to edit to above the sources in the first line, a method a line."""
    shown = {"source": np.asarray(x)} | {name: made for name, (made, _) in edited.items()}
    figure, axes = plt.subplots(len(shown), 1, figsize=(8, 0.45 * len(shown)))
    for ax, (name, made) in zip(axes, shown.items(), strict=True):
        ax.imshow(np.concatenate(made[:16, :, :, 0], axis=1), cmap="gray", vmin=-1, vmax=1)
        ax.axis("off")
        ax.text(-0.02, 0.5, name, transform=ax.transAxes, ha="right", va="center", fontsize=7)
    for column, label in enumerate(np.asarray(new)[:16]):
        axes[0].text(8 * column + 3.5, -2, f"to {label}", ha="center", fontsize=6)
    figure.subplots_adjust(0.24, 0.01, 0.99, 0.97, hspace=0.08)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
