"""Kernelized flows on tables of 100 to 400 rows, beside spline couplings and Gaussians.

    python experiments/densities/small_data.py --out runs/small_data [--data-dir DATA]
    python experiments/densities/small_data.py --out runs/short --short

DATA holds tabular/ (or set JFLOW_DATA); without it the tables are those of scikit-learn, wine and
diabetes, and ionosphere is left out. Repeated rows are dropped and columns on a lattice dequantized
once.

The kernelized flow has splines whose knots are kernel machines, or affine couplings as in the
paper; beside them stand splines of networks. Each seed draws n rows to train on and tests on all
others. The flows have four coupling layers behind `bijectors.whiten`: they start at the Gaussian
whose correlations are shrunk as rows that are
left out want it; "shrunk Gaussian" is that of Ledoit and Wolf. Of the n rows each fifth in turn is
held out of a fit; all fits stop at the step, 0 among them, that is best for what was held out of
them, and the density is the mean of those of the five fits. The start is that of all flows, a mean
of five shrunk Gaussians. All fits of a table train at once, as one vmapped step.

Prints nats per test row, and the paired difference of the kernelized flow to each other model with
its standard error over the means of seeds. OUT gets table.md and small_data.png.
"""

import argparse
import csv
import gzip
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.datasets import load_diabetes, load_wine

from jflow import bijectors, data, flows, losses, metrics, train
from jflow.types import Flow

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SIZES = {"wine": (100,), "diabetes": (100, 200, 400), "ionosphere": (100, 200, 300)}
FOLDS, EVERY = 5, 10


def kernelized(d: int) -> Flow:
    """Splines whose knots are kernel machines."""
    white, knots = bijectors.whiten((d,)), bijectors.univariate.rational_quadratic()
    return flows.kernelized((d,), depth=4, univariate=knots, linear=False, standardize=white)


def kernelized_affine(d: int) -> Flow:
    """The couplings of the paper."""
    white = bijectors.whiten((d,))
    return flows.kernelized((d,), depth=4, linear=False, standardize=white)


def splines(d: int) -> Flow:
    white = bijectors.whiten((d,))
    return flows.neural_spline((d,), depth=4, hidden=(32, 32), linear=False, standardize=white)


def gaussian(rows: np.ndarray, test: np.ndarray) -> np.ndarray:
    return metrics.gaussian_log_prob(rows, test)


def shrunk_gaussian(rows: np.ndarray, test: np.ndarray) -> np.ndarray:
    law = LedoitWolf().fit(rows)
    return multivariate_normal(law.location_, law.covariance_).logpdf(test)


FLOWS = {"kernelized": kernelized, "kernelized, affine": kernelized_affine, "splines": splines}
GAUSSIANS = {"Gaussian": gaussian, "shrunk Gaussian": shrunk_gaussian}
OTHERS = ("kernelized, affine", "splines", "start", *GAUSSIANS)


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


def splits(x: np.ndarray, n: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on [seeds, n, d] and to test on, standardized by the former."""
    orders = [np.random.default_rng(seed).permutation(len(x)) for seed in range(seeds)]
    rows = np.stack([(x[o] - x[o[:n]].mean(0)) / x[o[:n]].std(0) for o in orders])
    return rows[:, :n], rows[:, n:]


def fit(flow: Flow, rows: np.ndarray, test: np.ndarray, steps: int) -> np.ndarray:
    """Nats [2, seeds] of the test rows: at the start, and where held-out rows say to stop."""
    seeds, n, d = rows.shape
    held = n // FOLDS
    turned = np.stack([np.roll(rows, -held * i, axis=1) for i in range(FOLDS)], axis=1)
    others = np.concatenate([turned[:, :, :held], np.repeat(test[:, None], FOLDS, 1)], axis=2)
    flat = lambda x: jnp.asarray(x.reshape(seeds * FOLDS, -1, d), jnp.float32)  # noqa: E731
    optimizer = optax.chain(
        optax.clip_by_global_norm(5.0), optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    )
    step = train.make_step(losses.nll(flow), optimizer)

    def start(key, rows):
        init_key, train_key = jax.random.split(key)
        return train.init_state(flow.init(init_key, rows), optimizer, train_key)

    def train_on(state, rows):
        return jax.lax.scan(lambda s, _: step(s, {"x": rows}), state, length=EVERY)[0]

    train_on, log_prob = jax.jit(jax.vmap(train_on)), jax.jit(jax.vmap(flow.log_prob))
    seen, others = flat(turned[:, :, held:]), flat(others)
    keys = jax.random.split(jax.random.key(0), seeds * FOLDS)
    state = jax.jit(jax.vmap(start))(keys, seen)
    nats = [log_prob(state.params, others)]
    for _ in range(steps // EVERY):
        state = train_on(state, seen)
        nats.append(log_prob(state.params, others))
    nats = np.stack([np.asarray(each, np.float64) for each in nats], axis=1)
    nats = nats.reshape(seeds, FOLDS, *nats.shape[1:])  # [seeds, folds, stops, rows]
    stop = nats[..., :held].mean((1, 3)).argmax(1)
    print("  stops after", *(EVERY * stop), flush=True)
    mixed = (logsumexp(nats[..., held:], axis=1) - np.log(FOLDS)).mean(2)  # [seeds, stops]
    return np.stack([mixed[:, 0], mixed[np.arange(seeds), stop]])


def measured(rows: np.ndarray, test: np.ndarray, steps: int) -> dict[str, np.ndarray]:
    """The mean nats [seeds] of each model."""
    found = {}
    for name, make in FLOWS.items():
        start, found[name] = fit(make(rows.shape[-1]), rows, test, steps)
    found["start"] = start  # of all flows
    for name, law in GAUSSIANS.items():
        found[name] = np.array([law(*pair).mean() for pair in zip(rows, test, strict=True)])
    return found


def difference(found: dict[str, np.ndarray], model: str) -> tuple[float, float]:
    above = found["kernelized"] - found[model]
    return above.mean(), above.std(ddof=1) / np.sqrt(len(above))


def row(label: str, found: dict[str, np.ndarray]) -> str:
    cells = [label, f"{found['kernelized'].mean():.2f}"]
    for model in OTHERS:
        above, error = difference(found, model)
        cells.append(f"{found[model].mean():.2f} ({above:+.2f} +- {error:.2f})")
    return f"| {' | '.join(cells)} |"


def picture(tables: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7.5, 3), layout="constrained")
    for i, model in enumerate(OTHERS):
        mean, error = np.array([difference(found, model) for found in tables.values()]).T
        axis.bar(np.arange(len(mean)) + 0.16 * (i - 2), mean, 0.16, yerr=error, label=model)
    axis.set_xticks(range(len(tables)), tables)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_yscale("symlog", linthresh=1)  # tenths of a nat for some, tens for others
    axis.set_ylabel("nats per row")
    figure.legend(loc="outside upper center", ncols=5, title="the kernelized flow above")
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of table and picture")
    parser.add_argument("--data-dir", default=os.environ.get("JFLOW_DATA", ""))
    parser.add_argument("--sets", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--sizes", nargs="+", type=int, help="rows of a set; all of them if unset")
    parser.add_argument("--seeds", type=int, default=5, help="2 or more")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--short", action="store_true", help="wine, two seeds, 10 steps, for CI")
    args = parser.parse_args()
    if args.short:
        args.sets, args.seeds, args.steps = ["wine"], 2, 10
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [f"| rows of | kernelized | {' | '.join(OTHERS)} |", "|---" * 7 + "|"]
    tables = {}
    for name in args.sets:
        x = table(name, args.data_dir)
        if x is None:
            print(f"{name}: not there; set --data-dir or JFLOW_DATA", flush=True)
            continue
        for n in args.sizes or SIZES[name]:
            found = measured(*splits(x, n, args.seeds), args.steps)
            tables[f"{name}\n{n} rows"] = found
            lines.append(row(f"{name}, {n} of {len(x)}", found))
            print(lines[-1], flush=True)
            (args.out / "table.md").write_text("\n".join(lines) + "\n")
            picture(tables, args.out / "small_data.png")


if __name__ == "__main__":
    main()
