"""Kernelized flows on tables of 100 to 400 rows, beside affine and spline couplings and Gaussians.

    python experiments/small_data/run.py [--data-dir DATA]
    python experiments/small_data/run.py --short

Expected: see README.md, about 10 minutes on two CPU cores. DATA holds tabular/ (or set JFLOW_DATA);
without it the tables are those of scikit-learn, wine and diabetes, and ionosphere is left out.

Repeated rows are dropped and columns on a lattice dequantized once. Each of five seeds draws n rows
to train on and tests on all others; a fifth of the n rows chooses the step to stop at, the same for
all flows, which have four coupling layers, one optimizer and one base: the full normal, which
starts at the moments of the rows. The five seeds train at once, as one vmapped step. Prints nats
per row of the test rows, and the paired difference of the kernelized flow to each other model with
its standard error over the seeds' means.
"""

import argparse
import csv
import gzip
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.datasets import load_diabetes, load_wine

from jflow import data, distributions, flows, losses, metrics, train
from jflow.types import Flow

SIZES = {"wine": (100,), "diabetes": (100, 200, 400), "ionosphere": (100, 200, 300)}


def table(name: str, folder: str) -> np.ndarray | None:
    """Distinct rows [n, d], dequantized; None where the file is not there."""
    if name == "ionosphere":
        path = Path(folder).expanduser() / "tabular" / "ionosphere.csv.gz"
        if not folder or not path.is_file():
            return None
        with gzip.open(path, "rt") as lines:  # all but the first two columns and the class
            x = np.array([row[2:-1] for row in csv.reader(lines)], np.float64)
    else:
        x = {"wine": load_wine, "diabetes": load_diabetes}[name]().data.astype(np.float64)
    x = np.unique(x, axis=0)
    noise = np.random.default_rng(0).random(x.shape)
    for j in range(x.shape[1]):
        lattice = data.find_lattice(x[:, j])
        if lattice is not None:
            x[:, j] += lattice[0] * noise[:, j]
    return x


def models(d: int) -> dict[str, Flow]:
    options = {"depth": 4, "base": distributions.multivariate_normal(d)}
    return {
        "kernelized": flows.kernelized((d,), points=32, **options),
        "real_nvp": flows.real_nvp((d,), hidden=(64, 64), **options),
        "neural_spline": flows.neural_spline((d,), hidden=(64, 64), **options),
    }


def splits(x: np.ndarray, n: int, seeds: int) -> list[list[np.ndarray]]:
    """(training, validation, test) rows of each seed, standardized by the n that are not for
    testing."""
    found = []
    for seed in range(seeds):
        rows = x[np.random.default_rng(seed).permutation(len(x))]
        rows = ((rows - rows[:n].mean(0)) / rows[:n].std(0)).astype(np.float32)
        found.append([rows[n // 5 : n], rows[: n // 5], rows[n:]])
    return found


def fit(flow: Flow, parts: list[np.ndarray], steps: int, every: int = 10) -> np.ndarray:
    """Nats [seeds, rows] of the test rows at the step of the best validation rows."""
    training, valid, test = parts  # [seeds, rows, d]
    schedule = optax.cosine_decay_schedule(3e-3, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(5.0), optax.adamw(schedule, weight_decay=0.1))
    step = train.make_step(losses.nll(flow), optimizer)

    def one(key, training, valid, test):
        init_key, train_key = jax.random.split(key)
        state = train.init_state(flow.init(init_key, training), optimizer, train_key)

        def chunk(carry, _):
            state, best, chosen = carry
            nats = jnp.mean(flow.log_prob(state.params, valid))
            chosen = jax.tree.map(lambda a, b: jnp.where(nats > best, a, b), state.params, chosen)
            state, _ = jax.lax.scan(lambda s, _: step(s, {"x": training}), state, length=every)
            return (state, jnp.maximum(best, nats), chosen), None

        carry = state, jnp.float32(-jnp.inf), state.params
        (_, _, chosen), _ = jax.lax.scan(chunk, carry, length=steps // every)
        return flow.log_prob(chosen, test)

    keys = jax.random.split(jax.random.key(0), len(training))
    return np.asarray(jax.jit(jax.vmap(one))(keys, training, valid, test), np.float64)


def gaussians(parts: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Nats [seeds, rows] of the maximum-likelihood Gaussian of the n rows, and of one shrunk."""
    found = {"Gaussian": [], "shrunk Gaussian": []}
    for training, valid, test in zip(*parts, strict=True):
        rows = np.concatenate([training, valid]).astype(np.float64)
        shrunk = LedoitWolf().fit(rows)
        found["Gaussian"].append(metrics.gaussian_log_prob(rows, test))
        law = multivariate_normal(shrunk.location_, shrunk.covariance_)
        found["shrunk Gaussian"].append(law.logpdf(test))
    return {name: np.stack(rows) for name, rows in found.items()}


def count(flow: Flow, d: int) -> int:
    shapes = jax.eval_shape(flow.init, jax.random.key(0), jnp.zeros((64, d)))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def picture(table: dict, path: Path) -> None:
    import matplotlib.pyplot as plt

    names = list(next(iter(table.values())))
    figure, axis = plt.subplots(figsize=(7.5, 3), layout="constrained")
    for i, name in enumerate(names[1:]):
        above = [row["kernelized"].mean(1) - row[name].mean(1) for row in table.values()]
        error = [a.std(ddof=1) / np.sqrt(len(a)) if len(a) > 1 else 0.0 for a in above]
        at = np.arange(len(above)) + 0.18 * (i - 1.5)
        axis.bar(at, np.mean(above, axis=1), 0.18, yerr=error, label=f"above {name}")
    axis.set_xticks(range(len(table)), [f"{name}\n{n} rows" for name, n in table])
    axis.set_yscale("symlog", linthresh=1)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_ylabel("nats per test row")
    axis.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", default=os.environ.get("JFLOW_DATA", ""))
    parser.add_argument("--sets", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, help="folder for the picture")
    parser.add_argument("--short", action="store_true", help="wine, two seeds, 20 steps, for CI")
    args = parser.parse_args()
    if args.short:
        args.sets, args.seeds, args.steps = ["wine"], 2, 20
    found = {}
    for name in args.sets:
        x = table(name, args.data_dir)
        if x is None:
            print(f"{name}: not there; set --data-dir or JFLOW_DATA", flush=True)
            continue
        d = x.shape[1]
        for n in SIZES[name]:
            parts = [np.stack(rows) for rows in zip(*splits(x, n, args.seeds), strict=True)]
            print(f"{name}: {n} rows of {d} columns, {len(x) - n} test rows", flush=True)
            row = {model: fit(flow, parts, args.steps) for model, flow in models(d).items()}
            row |= gaussians(parts)
            found[name, n] = row
            for model, nats in row.items():
                above = row["kernelized"].mean(1) - nats.mean(1)
                error = above.std(ddof=1) / np.sqrt(args.seeds)
                size = f"{count(models(d)[model], d):6d} params" if model in models(d) else ""
                print(
                    f"  {model:16s} {nats.mean():9.3f}   kernelized above it by"
                    f" {above.mean():8.3f} +- {error:.3f}  {size}",
                    flush=True,
                )
    if args.out is not None and found:
        picture(found, args.out / "small_data.png")


if __name__ == "__main__":
    main()
