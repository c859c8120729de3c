"""Cells that move without loss: a Lagrangian flow through days 0 and 2, tested on day 1.

    python experiments/densities/cells.py --out runs/cells        # with the data folder
    python experiments/densities/cells.py --out runs/short --short

One density p(x | t) by `losses.nll` of a flow that is told the time, with the velocity that moves
it, `flows.lagrangian_velocity`, kept small by `losses.kinetic_energy`. The cells of
trajectory/mouse_hematopoiesis (2 numbers a cell, days 0, 1 and 2; no cell is seen twice) of days 0
and 2 are trained on, those of day 1 are held out. OUT gets table.md and cells.png.
"""

import argparse
import gzip
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from scipy.optimize import linear_sum_assignment

from jflow import flows, losses, metrics, train

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROWS = 1000  # of each set, for the Wasserstein distance


def load_days(short):
    """Three arrays [n, 2], in units of the standard deviation of all."""
    if short:
        rng = np.random.default_rng(0)
        days = [rng.normal(size=(200, 2)) + [day, day**2 / 4] for day in range(3)]
    else:
        folder = Path(os.environ.get("JFLOW_DATA", "shared/data")) / "trajectory"
        with gzip.open(folder / "mouse_hematopoiesis.csv.gz", "rt") as file:
            table = np.loadtxt(file, delimiter=",", skiprows=1)
        days = [table[table[:, 0] == day, 1:] for day in range(3)]
    everything = np.concatenate(days)
    return [((d - everything.mean(0)) / everything.std(0)).astype(np.float32) for d in days]


def fit(days, scale, seed, args):
    """The flow of days 0 and 2, at times 0 and 1, with the energy of weight `scale`."""
    flow = flows.real_nvp((2,), depth=6, hidden=(64, 64), activation=jax.nn.tanh)
    x = jnp.concatenate([days[0], days[2]])
    t = jnp.repeat(jnp.asarray([0.0, 1.0]), np.asarray([len(days[0]), len(days[2])]))[:, None]
    keys = jax.random.split(jax.random.key(seed), 3)
    both = {"nll": losses.nll(flow)}
    if scale:
        both["energy"] = losses.kinetic_energy(flow, scale, draws=args.batch)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-3, args.steps))
    )
    step = train.make_step(losses.sum_losses(both), optimizer)
    state = train.init_state(flow.init(keys[0], x, t), optimizer, keys[1])

    def update(state, key):
        day, first, second = jax.random.split(key, 3)
        early = jax.random.randint(first, (args.batch,), 0, len(days[0]))
        late = len(days[0]) + jax.random.randint(second, (args.batch,), 0, len(days[2]))
        at = jnp.where(jax.random.bernoulli(day, 0.5, (args.batch,)), early, late)
        return step(state, {"x": x[at], "cond": t[at]})

    run = jax.jit(lambda state, keys: jax.lax.scan(update, state, keys)[0].params)
    return flow, run(state, jax.random.split(keys[2], args.steps))


def some(rng, x, n=ROWS):
    return np.asarray(x)[rng.permutation(len(x))[:n]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of table and picture")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--short", action="store_true", help="seconds: to see that it runs")
    args = parser.parse_args()
    if args.short:
        args.seeds, args.steps, args.batch = 1, 3, 16
    args.out.mkdir(parents=True, exist_ok=True)
    days, began = load_days(args.short), time.process_time()
    names = {0.0: "the density alone", 0.1: "energy 0.1", 1.0: "energy 1"}
    found: dict[str, list] = {}
    for seed in range(args.seeds):
        rng = np.random.default_rng(seed)
        n = min(ROWS, *(len(day) for day in days))
        start, middle, end = (some(rng, day, n) for day in days)
        again = some(rng, days[1], n)
        cost = np.sum((start[:, None] - end[None]) ** 2, axis=-1)
        i, j = linear_sum_assignment(cost)
        rows = {
            "another draw of day 1": again,
            "day 0": start,
            "day 2": end,
            "half way of optimal transport, day 0 to 2": (start[i] + end[j]) / 2,
        }
        energies = {}
        for scale, name in names.items():
            flow, params = fit(days, scale, seed, args)
            half = jnp.full((n, 1), 0.5)
            rows[f"Lagrangian flow, {name}"] = flow.sample(params, jax.random.key(9), n, half)
            energy = losses.kinetic_energy(flow, draws=512)
            _, said = jax.jit(energy)(params, jax.random.key(8), {"x": start})
            energies[f"Lagrangian flow, {name}"] = float(said["energy"])
        for name, row in rows.items():
            values = metrics.wasserstein(row, middle), energies.get(name, np.nan)
            found.setdefault(name, []).append(values)
        print(f"seed {seed}: {time.process_time() - began:.0f} CPU s", file=sys.stderr, flush=True)
    lines = ["| | W2 to day 1 | mean energy |", "|---|---|---|"]
    for name, values in found.items():
        w, energy = np.array(values).T
        last = "" if np.isnan(energy[0]) else f"{energy.mean():.2f}"
        lines.append(f"| {name} | {w.mean():.3f} ({w.min():.3f} to {w.max():.3f}) | {last} |")
    print("\n".join(lines))
    (args.out / "table.md").write_text("\n".join(lines) + "\n")

    velocity = flows.lagrangian_velocity(flow)
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharex=True, sharey=True)
    moving = jax.jit(velocity.apply)
    for axis, when, day in zip(axes, (0.0, 0.5, 1.0), days, strict=True):
        seen = some(np.random.default_rng(0), day, 400)
        axis.scatter(*seen.T, s=2, color="0.6")
        at = flow.sample(params, jax.random.key(3), 60, jnp.full((60, 1), when))
        v = moving(params, at, jnp.full(60, when))
        axis.quiver(*at.T, *v.T, angles="xy", scale=15, width=0.006)
        axis.set_title(f"day {2 * when:g}" + (", held out" if when == 0.5 else ""))
    figure.tight_layout()
    figure.savefig(args.out / "cells.png", dpi=80)


if __name__ == "__main__":
    main()
