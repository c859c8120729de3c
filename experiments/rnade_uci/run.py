r"""Log-likelihoods of small UCI tables under the protocol of Uria, Murray, Larochelle, *RNADE*
(2013): ten folds.

    python experiments/rnade_uci/run.py --data-dir DATA \
        [--sets red_wine white_wine ionosphere boston] [--columns raw distinct]

Each fold holds out a tenth of the rows to test; a tenth of the others chooses the step to stop at;
columns are standardized by the fold's training rows. The ten folds train at once, as one vmapped
step. Prints nats per row, the mean over all held-out rows and its standard error, beside a
Gaussian's.

--columns raw: the protocol's own. These columns sit on lattices and rows repeat, so a density can
rise without bound on the spikes, and the numbers compare with published ones only as far as
everybody's spikes were as wide. --columns distinct: repeated rows dropped, then columns on a
lattice dequantized once at their resolution: a comparison of densities.

DATA is the folder that holds tabular/ (or set JFLOW_DATA); `--sets wine` comes with scikit-learn
and needs none.
"""

import argparse
import csv
import gzip
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jflow import bijectors, data, distributions, flows, losses, metrics, nets, train
from jflow.types import Flow

PUBLISHED = {  # RNADE with mixtures of Gaussians; not checked against the paper itself
    "red_wine": -9.36,
    "white_wine": -10.23,
    "ionosphere": -2.50,
    "boston": -0.64,
}


def table(name: str, data_dir: str) -> np.ndarray:
    """Rows [n, d] in float64, the columns that RNADE's Gaussian likelihoods point to."""
    if name == "wine":
        from sklearn.datasets import load_wine

        return load_wine().data.astype(np.float64)
    files = {
        "red_wine": "winequality-red.csv.gz",
        "white_wine": "winequality-white.csv.gz",
        "ionosphere": "ionosphere.csv.gz",
        "boston": "boston_housing.data.gz",
    }
    folder = data_dir or os.environ.get("JFLOW_DATA", "")
    path = Path(folder).expanduser() / "tabular" / files[name]
    if not folder or not path.is_file():
        raise SystemExit(f"{path}: not there; set --data-dir or JFLOW_DATA, or take --sets wine")
    with gzip.open(path, "rt") as lines:
        if name == "boston":  # all but ZN, INDUS, CHAS, RAD
            return np.loadtxt(lines)[:, [0, 4, 5, 6, 7, 9, 10, 11, 12, 13]]
        rows = list(csv.reader(lines))
    if name == "ionosphere":  # all but the first two columns and the class
        return np.array([row[2:-1] for row in rows], np.float64)
    return np.array([row[:-1] for row in rows], np.float64)  # all but the quality


def distinct(x: np.ndarray) -> np.ndarray:
    """Repeated rows dropped, then lattice columns dequantized."""
    x = np.unique(x, axis=0)
    noise = np.random.default_rng(0).random(x.shape)
    for j in range(x.shape[1]):
        lattice = data.find_lattice(x[:, j])
        if lattice is not None:
            x[:, j] += lattice[0] * noise[:, j]
    return x


def coupling(d: int, args) -> Flow:
    base = distributions.multivariate_normal(d)
    return flows.neural_spline((d,), depth=4, hidden=(64, 64), bins=8, base=base)


def mixture(d: int, args) -> Flow:
    """One autoregressive layer of mixtures of logistics: RNADE's form, as a flow."""
    return autoregressive(d, args, bijectors.univariate.logistic_mixture(10), layers=1)


def spline(d: int, args) -> Flow:
    """A fine spline of each column by itself, next to the data, so that an atom of a column costs
    one bin; then splines whose knots depend on the columns before, and on the columns after."""
    marginal = bijectors.elementwise(bijectors.univariate.rational_quadratic(64, 5.0), (d,))
    return autoregressive(
        d, args, bijectors.univariate.rational_quadratic(8, 5.0), layers=2, first=[marginal]
    )


def autoregressive(d: int, args, transformer, layers: int, first=()) -> Flow:
    net = nets.MADE(transformer.size, (args.width,), dropout=args.dropout)
    layer = bijectors.autoregressive(transformer, net)
    to_noise = bijectors.chain(*first, layer, *[bijectors.reverse(), layer] * (layers - 1))
    return flows.flow(bijectors.invert(to_noise), distributions.normal((d,)))


MODELS = {f.__name__: f for f in (coupling, mixture, spline)}
# Those of boston and ionosphere are the better of two by runs of three folds.
DROPOUT = {
    "red_wine": 0.2,
    "white_wine": 0.2,
    "ionosphere": 0.6,
    "boston": 0.5,
    "wine": 0.5,
}


def folds(x: np.ndarray, k: int, seed: int):
    """(train, valid, test) of each fold, standardized by the rows that are not for testing."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    parts = []
    for i in range(k):
        test, rest = order[i::k], np.delete(order, np.s_[i::k])
        cut = len(rest) // 10
        mean, std = x[rest].mean(0), x[rest].std(0)
        parts.append(
            [((x[rows] - mean) / std).astype(np.float32) for rows in (rest[cut:], rest[:cut], test)]
        )
    return parts


def stack(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """[k, n, d] of the longest n, shorter ones filled up, and weights [k, n] that are 0 there."""
    n = max(len(r) for r in rows)
    full = np.stack([r[np.arange(n) % len(r)] for r in rows])
    return full, np.stack([(np.arange(n) < len(r)).astype(np.float32) for r in rows])


def fit(model: Flow, parts, args) -> list[np.ndarray]:
    """Nats [rows] of each fold's test rows at the step of its best validation rows."""
    k = len(parts)
    (train_rows, _), (valid, valid_weight), (test, _) = (
        stack([p[i] for p in parts]) for i in range(3)
    )
    params = jax.jit(jax.vmap(model.init))(
        jax.random.split(jax.random.key(args.seed), k), train_rows
    )
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, 50, args.steps + 1)
    optimizer = optax.chain(
        optax.clip_by_global_norm(5.0), optax.adamw(schedule, weight_decay=args.weight_decay)
    )
    average = train.ema.warmup(args.ema)
    keys = jax.random.split(jax.random.key(args.seed + 1), k)
    state = jax.jit(jax.vmap(lambda p, key: train.init_state(p, optimizer, key, ema=average)))(
        params, keys
    )
    step = jax.jit(
        jax.vmap(train.make_step(losses.nll(model), optimizer, ema=average)), donate_argnums=0
    )
    log_prob = jax.jit(jax.vmap(model.log_prob))

    @jax.jit
    def judge(best, score, state):
        now = jnp.sum(valid_weight * jax.vmap(model.log_prob)(state.ema, valid), 1) / jnp.sum(
            valid_weight, 1
        )
        better = now > score
        pick = jax.vmap(lambda b, new, old: jax.tree.map(lambda n, o: jnp.where(b, n, o), new, old))
        return pick(better, state.ema, best), jnp.where(better, now, score)

    rng = np.random.default_rng(args.seed)
    best, score = state.ema, jnp.full(k, -jnp.inf)
    best = jax.tree.map(jnp.copy, best)
    lengths = [len(p[0]) for p in parts]
    for i in tqdm(range(args.steps), unit="step", disable=args.quiet):
        rows = np.stack(
            [train_rows[j, rng.integers(0, n, args.batch)] for j, n in enumerate(lengths)]
        )
        state, _ = step(state, {"x": rows})
        if (i + 1) % args.eval_every == 0:
            best, score = judge(best, score, state)
    nats = np.asarray(log_prob(best, test))
    return [nats[j, : len(p[2])] for j, p in enumerate(parts)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir", default="", help="folder that holds tabular/ (default: JFLOW_DATA)"
    )
    parser.add_argument("--sets", nargs="+", default=list(PUBLISHED), choices=[*PUBLISHED, "wine"])
    parser.add_argument(
        "--columns", nargs="+", default=["raw", "distinct"], choices=["raw", "distinct"]
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument(
        "--width", type=int, default=128, help="hidden units of the autoregressive networks"
    )
    parser.add_argument(
        "--dropout",
        type=float,
        help="of the autoregressive networks (default: by set, see DROPOUT)",
    )
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    if args.folds < 2 or args.steps < args.eval_every:
        parser.error("expected at least 2 folds, and steps of at least --eval-every")
    print(
        f"{'set':12s} {'columns':10s} {'model':10s} {'nats':>8s} {'error':>6s} {'published':>9s}"
        f" {'seconds':>8s}"
    )
    for name in args.sets:
        for columns in args.columns:
            x = table(name, args.data_dir)
            parts = folds(x if columns == "raw" else distinct(x), args.folds, args.seed)
            gaussian = [metrics.gaussian_log_prob(np.concatenate(p[:2]), p[2]) for p in parts]
            report(name, columns, "gaussian", gaussian, 0.0)
            own = argparse.Namespace(
                **vars(args) | {"dropout": DROPOUT[name] if args.dropout is None else args.dropout}
            )
            for model in args.models:
                start = time.perf_counter()
                report(
                    name,
                    columns,
                    model,
                    fit(MODELS[model](x.shape[1], own), parts, args),
                    time.perf_counter() - start,
                )


def report(name: str, columns: str, model: str, nats: list[np.ndarray], seconds: float) -> None:
    nats = np.concatenate(nats)
    error = nats.std() / np.sqrt(len(nats))
    published = f"{PUBLISHED[name]:9.2f}" if columns == "raw" and name in PUBLISHED else " " * 9
    print(
        f"{name:12s} {columns:10s} {model:10s} {nats.mean():8.2f} {error:6.2f} {published}"
        f" {seconds:8.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
