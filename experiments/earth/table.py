"""Trains the four densities of config.py, and writes their table and their pictures.

    python experiments/earth/table.py --out runs/earth  # 20 minutes on one busy core
    python experiments/earth/table.py --out runs/earth --seeds 0 1 2 3 4
    python experiments/earth/table.py --out runs/short --short  # CI

A run that is finished is not trained again. Prints a line for each set: the test NLL in nats of the
checkpoint that is best on validation points, mean and standard deviation over seeds, beside the
kernel density of the same splits. Draws OUT/earth.png: the test points of the first seed on two
sides of the globe, and the density.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from config import kernel_nll, split

from jflow import apps, manifolds

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUMBERS = ("test_nll", "kernel_test_nll", "kernel_uniform_test_nll")
SETS = {  # options of config.py for each; fires are the largest set, and of narrow places
    "volcano": {},
    "earthquake": {},
    "flood": {},
    "fire": {
        "waves": 32,
        "cells": 256,
        "pairs": 120_000,
        "batch": 512,
        "steps": 100_000,
        "learning_rate": 3e-3,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of runs and pictures")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=None, help="updates of each training")
    parser.add_argument("--short", action="store_true", help="CI: numbers mean nothing")
    args = parser.parse_args()
    sets = args.sets[:1] if args.short else args.sets
    config = Path(__file__).with_name("config.py")
    table = {}
    for events in sets:
        rows = []
        for seed in args.seeds:
            keys = {"events": events, "seed": seed, "short": args.short} | SETS[events]
            keys |= {} if args.steps is None else {"steps": args.steps}
            experiment, values = apps.load_config(config, keys)
            workdir = args.out / f"{events}_{seed}"
            apps.run(experiment, workdir, config_source=config, resolved=values, progress=False)
            rows.append(best(workdir) | kernel_nll(split(events, seed=seed, short=args.short)))
            print(events, seed, json.dumps(rows[-1]), flush=True)
        table[events] = rows
    print("| | flow | kernels | kernels and a uniform share |\n|---|---|---|---|")
    for events, rows in table.items():
        cells = [spread([row[name] for row in rows]) for name in NUMBERS]
        print(f"| {events} | {' | '.join(cells)} |")
    (args.out / "table.json").write_text(json.dumps(table, indent=1))
    first = {events: apps.load(args.out / f"{events}_{args.seeds[0]}") for events in sets}
    draw(
        first,
        {events: split(events, seed=args.seeds[0], short=args.short) for events in sets},
        args.out,
    )


def best(workdir: Path) -> dict:
    """The evaluation of least NLL on validation points."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    scores = [row for row in rows if "eval/valid_nll" in row]
    row = min(scores, key=lambda row: row["eval/valid_nll"])
    return {"step": row["step"], "test_nll": row["eval/test_nll"]}


def spread(values: list[float]) -> str:
    error = f" +- {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{error}"


def draw(loaded: dict, splits: dict, out: Path) -> None:
    """A row a set: test points on both sides of the globe, and the density on a map."""
    figure, axes = plt.subplots(
        len(loaded), 3, figsize=(9, 2.3 * len(loaded)), width_ratios=(1, 1, 2), squeeze=False
    )
    longitude, latitude = np.meshgrid(np.linspace(-178.5, 178.5, 120), np.linspace(-88.5, 88.5, 60))
    grid = manifolds.from_latitude_longitude(np.stack([latitude, longitude], -1).reshape(-1, 2))
    for (events, run), row in zip(loaded.items(), axes, strict=True):
        x = np.asarray(splits[events].test["x"])
        for axis, turn in zip(row[:2], (0, 180), strict=True):
            globe(axis, x, turn)
        row[0].set_ylabel(events)
        log_prob = jax.jit(run.model.log_prob)
        parts = [log_prob(run.params, jnp.asarray(p, jnp.float32)) for p in np.split(grid, 20)]
        log_density = np.concatenate(parts).reshape(latitude.shape)
        row[2].pcolormesh(
            longitude, latitude, np.clip(log_density, -6, 4), cmap="magma", rasterized=True
        )
        row[2].set(xticks=[], yticks=[], aspect="equal")
    axes[0, 0].set_title("Africa's side", fontsize=9)
    axes[0, 1].set_title("the Pacific's side", fontsize=9)
    axes[0, 2].set_title("log density, nats, -6 to 4", fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(out / "earth.png", dpi=70)


def globe(axis, x: np.ndarray, turn: float) -> None:
    """The points on the side of the globe whose middle is at a longitude, from afar."""
    a = np.radians(turn)
    depth = x[:, 0] * np.cos(a) + x[:, 1] * np.sin(a)
    right = x[:, 1] * np.cos(a) - x[:, 0] * np.sin(a)
    axis.add_patch(plt.Circle((0, 0), 1, color="0.93"))
    for latitude in np.radians([-60, -30, 0, 30, 60]):
        side = np.cos(latitude)
        axis.plot([-side, side], [np.sin(latitude)] * 2, color="0.8", linewidth=0.5)
    for longitude in np.radians(np.arange(-60, 61, 30)):
        z = np.linspace(-1, 1, 50)
        axis.plot(np.sin(longitude) * np.sqrt(1 - z**2), z, color="0.8", linewidth=0.5)
    axis.scatter(right[depth > 0], x[depth > 0, 2], s=2, color="tab:red", linewidths=0)
    axis.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xticks=[], yticks=[], aspect="equal")
    axis.spines[:].set_visible(False)


if __name__ == "__main__":
    main()
