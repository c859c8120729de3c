"""Tail-adaptive flows on currencies' returns and on columns of which half have heavy tails.

    python experiments/heavy_tails/run.py [--data-dir DATA] [--out FOLDER]
    python experiments/heavy_tails/run.py --short

Expected: see README.md, about 10 minutes on two CPU cores. DATA holds timeseries/ (or set
JFLOW_DATA); without it the returns are left out.

synthetic: 5000 rows of a Gaussian copula (correlations 0.5) of 4 light columns (normal, uniform,
two betas) and 4 heavy ones (Student's t of 1.5 to 3 degrees of freedom). `naming` counts how often
`metrics.tail_index` of the data names all eight, over ten draws.
returns: daily log-returns of seven currencies in dollars (the Chinese column, pegged for years, is
left out, and so are days on which no price moved); prices dequantized at their resolution, 1e-6.

A tenth of the rows, at random, chooses the step to stop at, a fifth tests. The three flows are one
spline coupling flow over a normal base, over one of Student's t (`flows.heavy_tailed`), and with
light and heavy columns apart (`flows.tail_adaptive`), all behind a robust standardization. Prints
nats per test row, the paired difference of the tail-adaptive flow with its standard error over
rows, the tail index of each column in the data and in as many samples of each flow, and of how
many columns a flow has the kind of tail.
"""

import argparse
import gzip
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

from jflow import bijectors, flows, losses, metrics, train
from jflow.types import Flow

LAWS = {
    "normal": scipy.stats.norm(),
    "t 1.5": scipy.stats.t(1.5),
    "uniform": scipy.stats.uniform(),
    "t 2": scipy.stats.t(2),
    "beta 2 5": scipy.stats.beta(2, 5),
    "t 2.5": scipy.stats.t(2.5),
    "beta 3 3": scipy.stats.beta(3, 3),
    "t 3": scipy.stats.t(3),
}
HEAVY = np.array([name.startswith("t ") for name in LAWS])
CURRENCIES = ("Australia", "Britain", "Canada", "Switzerland", "Japan", "New Zealand", "Singapore")


def synthetic(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    normal = rng.multivariate_normal(np.zeros(8), np.full((8, 8), 0.5) + 0.5 * np.eye(8), n)
    u = scipy.stats.norm.cdf(normal)
    return np.stack([law.ppf(u[:, j]) for j, law in enumerate(LAWS.values())], axis=1)


def returns(folder: str) -> np.ndarray | None:
    """[days, 7]; None where the file is not there."""
    path = Path(folder).expanduser() / "timeseries" / "exchange_rate.txt.gz"
    if not folder or not path.is_file():
        return None
    with gzip.open(path, "rt") as lines:
        prices = np.loadtxt(lines, delimiter=",")[:, [0, 1, 2, 3, 5, 6, 7]]
    moved = np.any(np.diff(prices, axis=0) != 0, axis=1)
    prices = prices + 1e-6 * (np.random.default_rng(0).random(prices.shape) - 0.5)
    return np.diff(np.log(prices), axis=0)[moved]


def models(d: int, index: np.ndarray, short: bool) -> dict[str, Flow]:
    options = {"depth": 2 if short else 4, "hidden": (8,) if short else (64, 64)}
    robust = bijectors.robust_standardize((d,))
    return {
        "normal base": flows.neural_spline((d,), standardize=robust, **options),
        "heavy_tailed": flows.heavy_tailed(flows.neural_spline, (d,), **options),
        "tail_adaptive": flows.tail_adaptive((d,), index, **options),
    }


def fit(flow: Flow, rows: np.ndarray, valid: np.ndarray, steps: int, every: int = 50):
    """The params at the step of the best validation rows."""
    schedule = optax.cosine_decay_schedule(2e-3, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    step = train.make_step(losses.nll(flow), optimizer)

    @jax.jit
    def run(rows, valid, init_key, train_key, order_key):
        state = train.init_state(flow.init(init_key, rows), optimizer, train_key)

        def chunk(carry, key):
            state, best, chosen = carry
            nats = jnp.mean(flow.log_prob(state.params, valid))
            chosen = jax.tree.map(lambda a, b: jnp.where(nats > best, a, b), state.params, chosen)
            picks = jax.random.randint(key, (every, 256), 0, len(rows))
            state, _ = jax.lax.scan(lambda s, i: step(s, {"x": rows[i]}), state, picks)
            return (state, jnp.maximum(best, nats), chosen), None

        carry = state, jnp.float32(-jnp.inf), state.params
        keys = jax.random.split(order_key, steps // every)
        return jax.lax.scan(chunk, carry, keys)[0][2]

    return run(jnp.asarray(rows), jnp.asarray(valid), *jax.random.split(jax.random.key(0), 3))


def compare(name: str, x: np.ndarray, columns, steps: int, short: bool) -> dict[str, np.ndarray]:
    """Samples of each flow, and the data's test rows."""
    rows = x[np.random.default_rng(1).permutation(len(x))].astype(np.float32)
    tenth = len(rows) // 10
    test, valid, rows = rows[: 2 * tenth], rows[2 * tenth : 3 * tenth], rows[3 * tenth :]
    index = metrics.tail_index(rows)
    print(f"{name}: {len(rows)} rows, {len(valid)} to stop, {len(test)} to test", flush=True)
    print(f"  {'columns':14s} {' '.join(f'{c[:8]:>8s}' for c in columns)}")
    found, nats = {"data": x}, {}
    for model, flow in models(x.shape[1], index, short).items():
        params = fit(flow, rows, valid, steps)
        nats[model] = np.asarray(jax.jit(flow.log_prob)(params, test), np.float64)
        draw = jax.jit(flow.sample, static_argnums=2)
        found[model] = np.asarray(draw(params, jax.random.key(1), len(x)), np.float64)
    nats["Gaussian"] = metrics.gaussian_log_prob(rows, test)
    kinds = np.isfinite(metrics.tail_index(x))
    for model, samples in found.items():
        of = metrics.tail_index(samples)
        right = f"  {np.sum(np.isfinite(of) == kinds)} of {len(of)} as the data's"
        print(f"  {model:14s} {' '.join(f'{a:8.2f}' for a in of)}{right}", flush=True)
    for model, value in nats.items():
        above = nats["tail_adaptive"] - value
        print(
            f"  {model:14s} {value.mean():9.3f} nats; tail_adaptive above it by"
            f" {above.mean():7.3f} +- {above.std() / np.sqrt(len(above)):.3f}",
            flush=True,
        )
    return found


def picture(panels: list, path: Path) -> None:
    """How often a number is farther from the median, in the data and in samples."""
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    figure, axes = plt.subplots(
        1, len(panels), figsize=(3 * len(panels), 2.8), layout="constrained"
    )
    for axis, (title, found, j) in zip(axes, panels, strict=True):
        scale = scipy.stats.iqr(found["data"][:, j])
        for model, x in found.items():
            far = np.sort(np.abs(x[:, j] - np.median(x[:, j])))[::-1] / scale
            style = {"color": "black", "lw": 2.5, "alpha": 0.4} if model == "data" else {"lw": 1}
            axis.loglog(far, np.arange(1, len(far) + 1) / len(far), label=model, **style)
        axis.set(title=title, xlim=(0.3, None), xlabel="distance / interquartile range")
        axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes[0].set_ylabel("share farther away")
    axes[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", default=os.environ.get("JFLOW_DATA", ""))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--draws", type=int, default=10, help="of the synthetic rows, for naming")
    parser.add_argument("--out", type=Path, help="folder for the picture")
    parser.add_argument("--short", action="store_true", help="synthetic rows, 50 steps, for CI")
    args = parser.parse_args()
    if args.short:
        args.steps, args.draws, args.data_dir = 50, 1, ""
    named = [
        np.isfinite(metrics.tail_index(synthetic(5000, s))) == HEAVY for s in range(args.draws)
    ]
    print(
        f"naming: {np.sum(np.all(named, axis=1))} of {args.draws} draws with 8 of 8 named;"
        f" {np.sum(named)} of {8 * args.draws} columns",
        flush=True,
    )
    made = compare("synthetic", synthetic(5000, 0), LAWS, args.steps, args.short)
    panels = [("light: uniform", made, 2), ("heavy: t 2", made, 3)]
    x = returns(args.data_dir)
    if x is None:
        print("returns: not there; set --data-dir or JFLOW_DATA", flush=True)
    else:
        made = compare("returns", x, CURRENCIES, args.steps, args.short)
        panels += [("returns: Britain", made, 1), ("returns: Japan", made, 4)]
    if args.out is not None:
        picture(panels, args.out / "heavy_tails.png")


if __name__ == "__main__":
    main()
