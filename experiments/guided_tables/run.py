"""Rows of numbers and categories, guided to a wish by TFG-Flow after the training.

    # known in closed form, 4 minutes on one core
    python experiments/guided_tables/run.py mixture --rows 4000 --pool 64 --out runs/guided_tables
    # 4 minutes on one core
    python experiments/guided_tables/run.py adult --out runs/guided_tables --data-dir DATA
    python experiments/guided_tables/run.py cancer --out runs/guided_tables  # no download
    python experiments/guided_tables/run.py mixture cancer --out runs/short --short  # CI

`mixture`: a flow that is known exactly, and wishes whose tilted laws are known. `adult`: a flow of
the census table that never saw the income, guided to a high one by a classifier of clean rows: an
independent one gives it to 20% of the rows before and 46% after, and 62% of real rows that have it.
`cancer` is the same for a small table of scikit-learn. Each prints the draws of `steering.tfg_flow`
beside what else one can do with the same flow and the same reward: draw more rows without guidance,
and keep some of them. `adult` and `cancer` draw OUT/NAME.png. README.md has the results.
"""

import argparse
import itertools
import os
import time
from functools import partial
from pathlib import Path

import exact
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from rows import READERS, Rows
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.preprocessing import QuantileTransformer

import jflow
from jflow import data, metrics, nets, solvers, steering, train
from jflow.types import Field

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REAL = "real rows that have it"
SETTINGS = [  # of tfg_flow, where they are not those of the command line
    {},
    {"draws": 1},  # so that the tokens are not guided
    {"draws": 4},
    {"draws": 64},
    {"scale": 0.0},
    {"scale": 0.5},
    {"scale": 2.0},
    {"scale": 0.0, "data_scale": 0.1},
    {"scale": 0.0, "data_scale": 0.5},
    {"steps": 8},
    {"steps": 16},
    {"steps": 128},
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=["mixture", *READERS])
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--data-dir", default=os.environ.get("JFLOW_DATA", ""), help="for adult")
    parser.add_argument("--rows", type=int, default=2000, help="that each method returns")
    parser.add_argument("--steps", type=int, default=32, help="of each sampler")
    parser.add_argument("--draws", type=int, default=16, help="of tokens, of tfg_flow")
    parser.add_argument("--pool", type=int, default=16, help="unguided rows for each that is kept")
    parser.add_argument("--updates", type=int, default=3000, help="of a flow of a table")
    parser.add_argument("--width", type=int, default=128, help="of the network of a flow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="seconds: few rows and updates")
    args = parser.parse_args()
    if args.short:
        args.rows, args.steps, args.draws, args.pool, args.updates, args.width = 32, 4, 2, 3, 20, 16
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        began = time.process_time()
        mixture(args) if part == "mixture" else table(part, args)
        print(f"{part}: {time.process_time() - began:.0f} s of CPU time\n", flush=True)


def sampler(model, params, source, args, cond=None):
    """(log reward, key, n, settings of tfg_flow) -> n rows, and CPU seconds for 1000 of them."""

    def run(log_reward, key, n, steps=args.steps, draws=args.draws, **scales):
        def sample(key):
            source_key, key = jax.random.split(key)
            x0, grid = source(source_key, n), solvers.grids.uniform(steps)
            return steering.tfg_flow(
                model, params, x0, key, grid, log_reward, cond, draws=draws, **scales
            )

        compiled = jax.jit(sample).lower(key).compile()
        began = time.process_time()
        x = jax.device_get(compiled(key))
        return x, (time.process_time() - began) / n * 1000

    return run


def unguided(run, key, n):
    return run(lambda x, cond: jnp.zeros(len(x["numbers"])), key, n, draws=1, scale=0.0)


def drawn(run, pool, log_reward, args, *, is_probability):
    """Rows by every method: its name, the passes through the network for a row that is kept,
    forward and backward, the rows, and CPU seconds for 1000 of them. pool: unguided rows, and CPU
    seconds for 1000 of those."""
    pool, seconds = pool
    keep = lambda index: jax.tree.map(lambda a: a[index], pool)  # noqa: E731
    yield "unguided", (args.steps, 0), keep(slice(args.rows)), seconds
    for setting in SETTINGS[: 2 if args.short else None]:
        x, spent = run(log_reward, jax.random.key(args.seed), args.rows, **setting)
        steps = setting.get("steps", args.steps)
        back = 0 if setting.get("scale") == 0 else steps
        yield f"tfg_flow {said(setting)}".strip(), (steps, back), x, spent
    value = np.asarray(jax.jit(log_reward)(pool, None))
    rng = np.random.default_rng(args.seed)
    for n in (3, 16, 64):
        if n <= args.pool:
            w = value[: n * args.rows].reshape(n, args.rows)
            best = np.argmax(w + rng.gumbel(size=w.shape), axis=0)  # drawn with softmax weights
            index = best * args.rows + np.arange(args.rows)
            yield f"one of {n} by weight", (n * args.steps, 0), keep(index), n * seconds
    if is_probability:
        kept = np.flatnonzero(np.log(rng.random(len(value))) < value)
        n = len(value) / max(len(kept), 1)
        yield "accepted by p(label)", (n * args.steps, 0), keep(kept[: args.rows]), n * seconds


def said(setting):
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in setting.items())


def mixture(args):
    law, rng = exact.four_kinds(), np.random.default_rng(args.seed)
    model, mask = exact.exact_model(law), law.tables.shape[-1] - 1

    slope = np.array([-0.7, 1.0])
    bonus = np.array([[0.0, 0.0, 1.5, 0.0, 0.0], [0.0, 0.0, 0.0, 1.5, 0.0]])
    wishes = {
        "a slight slope": exact.slope_wish(law, 0.3 * slope, 0.3 * bonus),
        "a slope": exact.slope_wish(law, slope, bonus),
        "a label": exact.label_wish(law, np.array([0.01, 0.02, 0.1, 0.6])),
    }
    run = sampler(model, {}, partial(start, 2, 2, mask), args)
    pool = unguided(run, jax.random.key(args.seed + 1), args.pool * args.rows)
    for name, (log_reward, tilted) in wishes.items():
        methods = drawn(run, pool, log_reward, args, is_probability=name == "a label")
        compared(name, log_reward, tilted, methods, args, rng)


def compared(name, log_reward, tilted, methods, args, rng):
    """A table of how far rows are from the tilted law: the largest error of the share of a value,
    the 2-Wasserstein distance of the numbers, and the mean log reward."""
    print(f"\n| {name} | passes | shares | W2 | log reward |\n|---|---|---|---|---|", flush=True)
    real = tilted.sample(rng, args.rows)

    def line(method, passes, x):
        shares = (x["tokens"][..., None] == np.arange(tilted.tables.shape[-1])).mean(0)
        n = min(len(x["tokens"]), 1000)
        w2 = metrics.wasserstein(x["numbers"][:n], real["numbers"][:n])
        value = np.mean(log_reward(jax.tree.map(jnp.asarray, x)))
        error = np.abs(shares - tilted.shares).max()
        print(f"| {method} | {passes} | {error:.3f} | {w2:.3f} | {value:.3f} |", flush=True)

    line("exact draws", "", tilted.sample(rng, args.rows))
    for method, spent, x, _ in methods:
        line(method, passes(spent), x)


def passes(spent):
    forward, backward = spent
    return f"{forward:.0f} + {backward:.0f}"


def table(name, args):
    rng = np.random.default_rng(args.seed)
    found = READERS[name](args.data_dir, rng)
    sizes = np.array([len(values) for values in found.categories.values()])
    mask, widths = int(sizes.max()), np.array(list(found.numbers.values()))
    numbers = found.fit.numbers + widths * rng.random(found.fit.numbers.shape)  # in their cells
    normal = QuantileTransformer(
        n_quantiles=min(1000, len(numbers)), output_distribution="normal", subsample=None
    ).fit(numbers)
    fit = {"numbers": normal.transform(numbers).astype(np.float32), "tokens": found.fit.tokens}
    label = {"cond": found.fit.label}

    net = partial(nets.ResidualMLP, width=args.width, num_blocks=3, time_scale=10.0)
    model, labeled = row_model(net(), sizes), row_model(net(num_classes=2), sizes)
    keys = jax.random.split(jax.random.key(args.seed + 1), 5)
    params = fitted("the flow", model, fit, mask, keys[0], args)
    told = fitted("the flow that is told the label", labeled, fit | label, mask, keys[1], args)
    log_reward = classifier(fit | label, mask, keys[2], args)

    line = judged(found, args)
    source = partial(start, len(widths), len(sizes), mask)
    run = sampler(labeled, told, source, args, jnp.ones(1, jnp.int32))
    by_label = unguided(run, keys[3], args.rows)
    run = sampler(model, params, source, args)
    pool = unguided(run, keys[4], args.pool * args.rows)
    shown = {}
    methods = drawn(run, pool, log_reward, args, is_probability=True)
    for method, spent, x, seconds in itertools.chain(
        [("told the label in training", (args.steps, 0), *by_label)], methods
    ):
        z = normal.inverse_transform(x["numbers"])
        z = np.where(widths > 0, np.floor(z), z)
        shown[method] = Rows(z, x["tokens"], np.ones(len(z), np.int32))
        line(method, passes(spent), shown[method], f"{seconds:.1f}")
    rows = {
        "not guided": shown["unguided"],
        "guided": shown["tfg_flow"],
        REAL: found.held[found.held.label == 1],
    }
    picture(args.out / f"{name}.png", found, rows)


def start(numbers, columns, mask, key, n):
    """The source: noise and masks."""
    return {
        "numbers": jax.random.normal(key, (n, numbers)),
        "tokens": jnp.full((n, columns), mask, jnp.int32),
    }


def judged(found, args):
    """Prints the head of a table, and returns what prints a line of it: the share of rows that an
    independent classifier gives the label; beside held rows that have it the energy distance of
    the numbers, the largest and the mean difference of the shares of a value, and the AUC of
    boosted trees that tell them apart."""
    d = len(found.numbers)
    categorical = np.arange(d + len(found.categories)) >= d
    flat = lambda rows: np.concatenate([rows.numbers, rows.tokens], axis=1)  # noqa: E731
    judge = HistGradientBoostingClassifier(categorical_features=categorical, random_state=args.seed)
    judge.fit(flat(found.judge), found.judge.label)
    real, same = (rows[rows.label == 1] for rows in (found.held, found.fit))
    std = found.fit.numbers.std(0)

    def shares(tokens):
        counts = [
            np.bincount(tokens[:, j], minlength=len(values))
            for j, values in enumerate(found.categories.values())
        ]
        return np.concatenate(counts) / len(tokens)

    def line(method, passes, rows, seconds=""):
        energy = metrics.energy_distance(rows.numbers / std, real.numbers / std)
        apart = np.abs(shares(rows.tokens) - shares(real.tokens))
        print(
            f"| {method} | {passes} | {judge.predict(flat(rows)).mean():.1%} | {energy:.3f} |"
            f" {apart.max():.3f} | {apart.mean():.4f} |"
            f" {metrics.classifier_test(flat(rows), flat(real), categorical).auc:.3f} |"
            f" {seconds} |",
            flush=True,
        )

    print(
        f"\nThe judge is right on {judge.score(flat(found.held), found.held.label):.1%} of the"
        f" held rows, of which {len(real.label)} of {len(found.held.label)} have the label.\n"
        f"\n| {found.wish} | passes | judged | energy | largest share | mean share | detection |"
        " CPU s |\n|---|---|---|---|---|---|---|---|"
    )
    rng = np.random.default_rng(args.seed)
    line(REAL, "", same[rng.permutation(len(same.label))[: args.rows]])
    return line


def picture(path, found, rows):
    """Histograms of the numbers and bars of the first categories."""
    colors = dict(zip(rows, ["0.75", "tab:blue", "tab:orange"], strict=True))
    wide = [*found.numbers, *list(found.categories)[:3]]
    figure, axes = plt.subplots(2, 3, figsize=(11, 6))
    for ax, column in zip(axes.flat, wide, strict=True):
        if column in found.numbers:
            j, width = list(found.numbers).index(column), found.numbers[column]
            every = np.concatenate([r.numbers[:, j] for r in rows.values()])
            low, high = np.quantile(every, [0.005, 0.995])
            edges = np.linspace(low, high, 31)
            if width:
                edges = np.unique(np.round(edges)) - 0.5
            for name, r in rows.items():
                options = {"density": True, "bins": edges, "color": colors[name], "label": name}
                if name == "not guided":
                    ax.hist(r.numbers[:, j], **options)
                else:
                    ax.hist(r.numbers[:, j], histtype="step", lw=1.8, **options)
            ax.set_yticks([])
        else:
            j, values = list(found.categories).index(column), found.categories[column]
            shares = {
                name: np.bincount(r.tokens[:, j], minlength=len(values)) / len(r.tokens)
                for name, r in rows.items()
            }
            order = np.argsort(shares[REAL])[-8:]
            for k, (name, share) in enumerate(shares.items()):
                place = np.arange(len(order)) + 0.27 * (1 - k)
                ax.barh(place, 100 * share[order], 0.27, color=colors[name], label=name)
            ax.set_yticks(np.arange(len(order)), [values[i] for i in order], fontsize=7)
            ax.set_xlabel("% of the rows", fontsize=8)
        ax.set_title(column, fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper right", ncol=3, fontsize=9)
    figure.suptitle(f"{path.stem}: rows guided to {found.wish}", fontsize=11, x=0.02, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def row_model(net: nn.Module, sizes) -> Field:
    """A network of vectors as one of rows: the velocity of the numbers, and logits of the tokens,
    -inf for the mask and for values that a column does not have; a known token is itself."""
    velocity, count = jflow.velocity(net), int(max(sizes)) + 1
    there = jnp.arange(count)[None] < jnp.asarray(sizes)[:, None]

    def flat(x):
        hot = jax.nn.one_hot(x["tokens"], count)
        return jnp.concatenate([x["numbers"], hot.reshape(len(hot), -1)], axis=1)

    def apply(params, x, t, cond=None, *, key=None):
        out = velocity.apply(params, flat(x), t, cond, key=key)
        v, logits = jnp.split(out, [x["numbers"].shape[1]], axis=1)
        logits = jnp.where(there, logits.reshape(len(v), len(sizes), count), -jnp.inf)
        known = jnp.log(jax.nn.one_hot(x["tokens"], count))
        hidden = (x["tokens"] == count - 1)[..., None]
        return {"numbers": v, "tokens": jnp.where(hidden, logits, known)}

    return Field(lambda key, x, t, cond=None: velocity.init(key, flat(x), t, cond), apply)


def row_loss(model, mask):
    """Flow matching of the numbers, and nats of the masked tokens, at one time."""

    def loss(params, key, batch, frozen=None):
        t_key, noise_key, mask_key = jax.random.split(key, 3)
        z1, a1 = batch["numbers"], batch["tokens"]
        t = jax.random.uniform(t_key, (len(z1),))
        z0 = jax.random.normal(noise_key, z1.shape)
        z = z0 + t[:, None] * (z1 - z0)
        a = jnp.where(jax.random.uniform(mask_key, a1.shape) < t[:, None], a1, mask)
        out = model.apply(params, {"numbers": z, "tokens": a}, t, batch.get("cond"))
        error = jnp.sum((out["numbers"] - (z1 - z0)) ** 2, axis=1)
        nats = optax.softmax_cross_entropy_with_integer_labels(out["tokens"], a1)
        parts = {"error": jnp.mean(error), "nats": jnp.mean(jnp.sum(nats, axis=1))}
        return parts["error"] + parts["nats"], parts

    return loss


def fitted(what, model, rows, mask, key, args):
    few = jax.tree.map(lambda a: a[:2], rows)
    init_key, fit_key = jax.random.split(key)
    params = model.init(init_key, few, jnp.zeros(2), few.get("cond"))
    return trained(what, row_loss(model, mask), params, rows, fit_key, args.updates)


def classifier(rows, mask, key, args):
    """log p(label | row) of clean rows, by a small perceptron."""
    net = nn.Sequential([nets.MLP((64, 64), nn.silu), nn.Dense(1)])

    def score(params, x):
        hot = jax.nn.one_hot(x["tokens"], mask)
        flat = jnp.concatenate([x["numbers"], hot.reshape(len(hot), -1)], axis=1)
        return net.apply({"params": params}, flat)[:, 0]

    def loss(params, key, batch, frozen=None):
        value = optax.sigmoid_binary_cross_entropy(score(params, batch), batch["cond"])
        return jnp.mean(value), {}

    width = rows["numbers"].shape[1] + mask * rows["tokens"].shape[1]
    init_key, fit_key = jax.random.split(key)
    params = net.init(init_key, jnp.zeros((1, width)))["params"]
    params = trained("the classifier", loss, params, rows, fit_key, args.updates // 2)
    return lambda x, cond: jax.nn.log_sigmoid(score(params, x))


def trained(what, loss, params, rows, key, updates):
    print(f"training {what}", flush=True)
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, updates), weight_decay=1e-3)
    ema = train.ema.warmup(0.998)
    began = time.process_time()
    state = train.fit(
        train.init_state(params, optimizer, key, ema=ema),
        train.make_step(loss, optimizer, ema=ema),
        data.batches(rows, min(256, len(rows["tokens"]) // 2), seed=0),
        steps=updates,
        inner=10,
        log_every=max(10, updates // 100 * 10),
    ).state
    print(f"{time.process_time() - began:.0f} s of CPU time", flush=True)
    return state.ema


if __name__ == "__main__":
    main()
