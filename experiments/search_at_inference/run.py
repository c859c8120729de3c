"""Search at inference: reward against evaluations of the velocity, for five searches.

    python experiments/search_at_inference/run.py --out runs/search  # a minute, no download
    python experiments/search_at_inference/run.py --out runs/short --short  # CI

In two dimensions the velocity is the exact one of eight Gaussians, and the reward says how near a
sample is to a point between two of them; on digits (8x8, scikit-learn's) it is a small network,
trained first, and the reward is ink, the mean of the pixels. Prints, for each search and budget,
the evaluations for each sample that is kept, its mean reward, and how good it is as a sample: the
log-density of the data (mixture), the mean distance to the nearest real digit (digits). Draws
OUT/rewards.png and, of digits before and after, OUT/samples.png. README.md has the results.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import jflow
from jflow import data, losses, metrics, nets, oracles, paths, solvers, steering, train
from jflow.paths import schedules

matplotlib.use("Agg")
import matplotlib.pyplot as plt

VP = schedules.cosine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the table and picture")
    parser.add_argument("--kept", type=int, default=512, help="samples of each search")
    parser.add_argument("--steps", type=int, default=16, help="of every sampler")
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--updates", type=int, default=4000, help="of the network for digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few samples and updates")
    args = parser.parse_args()
    if args.short:
        args.kept, args.budgets, args.updates = 16, [2], 20
    args.out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for ax, (name, task) in zip(axes, tasks(args).items(), strict=True):
        start = time.perf_counter()
        curves, samples = searched(name, task, args)
        print(f"{name}: {time.perf_counter() - start:.0f} s\n", flush=True)
        for label, points in curves.items():
            ax.plot(*zip(*points, strict=True), marker="o", ms=3, label=label)
        ax.set(title=name, xlabel="evaluations for each sample", ylabel="mean reward")
        ax.set_xscale("log", base=2)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(args.out / "rewards.png", dpi=110)
    draw(samples, args.out / "samples.png")  # of the last task, digits


def tasks(args):
    """Of each: the velocity, its params, the shape of an event, the reward, the quality of samples
    and its name."""
    centers = 2 * np.stack([[np.cos(a), np.sin(a)] for a in np.arange(8) * np.pi / 4])
    law = oracles.mixture(np.ones(8) / 8, centers, 0.04)
    point = jnp.array([1.8, 0.7])
    nearness = lambda x: -jnp.sum((x - point[None]) ** 2, axis=-1)  # noqa: E731
    quality = lambda x: float(jnp.mean(law.log_density(x, jnp.ones(len(x)))))  # noqa: E731
    rows = np.asarray(data.digits().train["x"], np.float32) / 8 - 1
    velocity = jflow.velocity(nets.ResidualMLP(width=128, num_blocks=3, time_scale=10.0))
    params = fitted(velocity, rows, args)
    ink = lambda x: jnp.mean(jnp.clip(x, -1, 1), axis=(1, 2, 3))  # noqa: E731
    nearest = lambda x: metrics.nearest_distance(np.clip(x, -1, 1), rows)  # noqa: E731
    return {
        "eight Gaussians": (oracles.as_velocity(law), {}, (2,), nearness, quality, "log-density"),
        "digits": (velocity, params, rows.shape[1:], ink, nearest, "distance to the nearest"),
    }


def fitted(velocity, rows, args):
    loss = losses.flow_matching(velocity)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, args.updates))
    init_key, fit_key = jax.random.split(jax.random.key(args.seed))
    return train.fit(
        train.init_state(
            velocity.init(init_key, rows[:2], 0.0), optimizer, fit_key, ema=train.ema.warmup(0.998)
        ),
        train.make_step(loss, optimizer, ema=train.ema.warmup(0.998)),
        data.batches({"x": rows}, 128, seed=args.seed),
        steps=args.updates,
        inner=20,
        log_every=args.updates,
    ).state.ema


def searched(name, task, args):
    """Of each search, points (evaluations, mean reward) over the budgets; and the first samples of
    one sample of the ODE, and of each search at its largest budget."""
    velocity, params, shape, reward, quality, what = task
    grid, method = solvers.grids.uniform(args.steps), solvers.fixed(args.steps, diffrax.Euler())
    converted = paths.reschedule(velocity, paths.LINEAR, VP)
    on_vp = {"step": partial(solvers.ancestral, schedule=VP), "schedule": VP}

    def best(params, x0, key, n):
        return steering.best_of_n(velocity, params, x0, reward, n=n, method=method)

    def particles(params, x0, key, n, velocity=velocity, **options):
        x, info = steering.particle_search(
            velocity, params, x0, key, grid, reward, particles=n, temperature=0.02, **options
        )
        kept = steering.best_of(info.reward, info.reward, n)
        return steering.best_of(x, info.reward, n), info._replace(
            reward=kept, evaluations=n * info.evaluations[: len(kept)]
        )

    def rollover(params, x0, key, n, velocity=velocity, **options):
        return steering.rollover_search(
            velocity, params, x0[::n], key, grid, reward, quota=n, **options
        )

    searches = {
        "best of n": best,
        "particles": particles,
        "particles, VP": partial(particles, velocity=converted, **on_vp),
        "rollover": rollover,
        "rollover, VP": partial(rollover, velocity=converted, **on_vp),
    }
    print(f"| {name} | n | evaluations | mean reward | {what} |\n|---|---|---|---|---|")
    curves, samples = {label: [] for label in searches}, {}
    for label, search in searches.items():
        for n in args.budgets:
            noise_key, key = jax.random.split(jax.random.key(args.seed + 1))
            x0 = jax.random.normal(noise_key, (args.kept * n, *shape))
            x, info = jax.jit(search, static_argnums=3)(params, x0, key, n)
            spent, found = float(info.evaluations.mean()), float(info.reward.mean())
            curves[label].append((spent, found))
            print(f"| {label} | {n} | {spent:.0f} | {found:.3f} | {quality(x):.2f} |", flush=True)
            if n == args.budgets[-1] or not samples:
                samples[f"{label}, n = {n}"] = np.asarray(x[:16])
    return curves, samples


def draw(samples, path: Path) -> None:
    """A line of digits for each search."""
    figure, axes = plt.subplots(len(samples), 1, figsize=(8, 0.48 * len(samples)))
    for ax, (name, x) in zip(np.atleast_1d(axes), samples.items(), strict=True):
        ax.imshow(np.concatenate(list(x[..., 0]), axis=1), cmap="gray", vmin=-1, vmax=1)
        ax.axis("off")
        ax.text(-0.02, 0.5, name, transform=ax.transAxes, ha="right", va="center", fontsize=8)
    figure.subplots_adjust(0.2, 0.01, 0.99, 0.99, 0, 0.06)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
