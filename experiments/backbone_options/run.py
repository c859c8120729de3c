"""Normalizations, attentions and blocks of a DiT on digits, each at one budget.

    python experiments/backbone_options/run.py --out runs/options
    python experiments/backbone_options/run.py --out runs/mnist --data mnist --data-dir DATA
    python experiments/backbone_options/run.py --out runs/options --only sinkhorn --seeds 5
    python experiments/backbone_options/run.py --out runs/short --short  # CI: numbers mean nothing

Trains a DiT of 2 blocks and width 32 for each option, with flow matching, and prints a line for
each: the loss on test images, the Frechet distance of as many samples to them, the FLOPs of a
velocity, the number of params, and whether the trained velocity has a forward mode. The images are
scikit-learn's digits, 8x8 (1437 to train on and 360 to test), or the first of MNIST pooled to 14x14
(10,000 and 1000), from images/mnist.npz in DATA (or JFLOW_DATA). All seeds of an option are trained
as one program. Writes results.json after each, which a later run goes on with, and picture.png.
README.md has the results.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import jflow
from jflow import data, losses, metrics, nets, solvers, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES, ROWS = 10, 64
SIZES = {"width": 32, "num_layers": 2, "num_heads": 2, "num_classes": CLASSES}
LAYERS = 2 * SIZES["num_layers"]  # branches, which fixup counts


class Option(NamedTuple):
    """One line of the table: arguments of `DiT`, and what else a method is."""

    net: dict = {}
    wrap: Callable = lambda velocity: velocity  # of its noun, for normalized kernels
    first: Callable = lambda params: params  # of the first params
    last: Callable = optax.identity  # the last part of the optimizer
    warm: float = 0.0  # the share of the updates with statistics of the batch, which come first
    rate: float = 3e-3  # of Adam, at its highest


def hybrid(q, k, v):
    """`nets.hybrid_attention` of the rows of an image: a row of tokens sees those above it."""
    return nets.hybrid_attention(math.isqrt(q.shape[1]))(q, k, v)


NORMS = {
    "LayerNorm": Option(),
    "RMSNorm": Option({"norm": nets.RMSNorm}),
    "Pre-RMSNorm": Option({"norm": nets.pre_rms_norm()}),
    "Peri-LN": Option({"norm": nets.peri_norm()}),
    "NormFormer": Option({"norm": nets.norm_former()}),
    "DyT": Option({"norm": nets.DyT}),
    "nGPT": Option({"norm": nets.ngpt()}, last=nets.unit_kernels),
    "BatchNorm": Option({"norm": nets.BatchNorm}),
    "PowerNorm": Option({"norm": nets.PowerNorm}, warm=1 / 3),
    "PowerNorm, unscaled": Option({"norm": partial(nets.PowerNorm, groups=None)}, warm=1 / 3),
    "Unified": Option({"norm": nets.UnifiedNorm}, warm=1 / 3),
    "Unified, rate 1e-3": Option({"norm": nets.UnifiedNorm}, warm=1 / 3, rate=1e-3),
    "Online": Option({"norm": partial(nets.OnlineNorm, decay=0.99)}),  # 0.999 diverges
    "batch-channel, WS": Option({"norm": nets.BatchChannelNorm}, nets.standardized_kernels),
    "weight norm": Option({"norm": nets.NoNorm}, nets.weight_norm),
    "spectral norm": Option({"norm": nets.NoNorm}, nets.spectral_norm),
    "none": Option({"norm": nets.NoNorm}),
    "Fixup": Option({"norm": nets.NoNorm}, first=partial(nets.fixup, num_layers=LAYERS, last=())),
}
ATTENTIONS = {
    "Flowformer": Option({"attention_fn": nets.flow_attention()}),
    "Sinkhorn": Option({"attention_fn": nets.sinkhorn_attention(5)}),
    "TransNormer": Option({"attention_fn": nets.transnormer_attention()}),
    "Galerkin": Option({"attention_fn": nets.galerkin_attention}),
    "Fourier": Option({"attention_fn": nets.fourier_attention}),
    "hybrid": Option({"attention_fn": hybrid}),
}
BLOCKS = {
    "experts": Option({"mlp": nets.MixtureOfExperts(8)}),
    "experts, limited": Option({"mlp": nets.MixtureOfExperts(8, nets.routers.limited())}),
    "experts, rectified": Option({"mlp": nets.MixtureOfExperts(8, nets.routers.rectified())}),
    "WideNet": Option({"mlp": nets.MixtureOfExperts(8), "shared": True}),
    "PEER": Option({"mlp": nets.ProductKeyExperts(16, 4, 2, 16)}),
    "TokenFormer": Option({"mlp": nets.ParameterAttention(128)}),
    "hyper-connections": Option({"residual": nets.HyperConnections()}),
    "ladder": Option({"residual": nets.LadderResidual()}),
}
OPTIONS = {**NORMS, **ATTENTIONS, **BLOCKS}


def images(name: str, folder: str):
    """(images [n, side, side, 1] in [-1, 1], labels [n]) to train on, and those to test."""
    if name == "digits":
        splits, high = data.digits(), 16
    else:
        splits, high = data.mnist(Path(folder) / "images/mnist.npz"), 255

    def scaled(rows, most):
        x = np.asarray(rows["x"][:most], np.float32) / (high / 2) - 1
        if name == "mnist":  # the mean of every 2 x 2 pixels
            x = x.reshape(len(x), 14, 2, 14, 2, 1).mean((2, 4))
        return jnp.asarray(x), jnp.asarray(rows["cond"][:most])

    return scaled(splits.train, 10_000), scaled(splits.test, 1000)


def network(option: Option, **sizes):
    net = nets.DiT(**{**SIZES, **sizes}, **option.net)
    return net, option.wrap(jflow.velocity(net))


def trained(option: Option, rows, test, seeds: int, steps: int):
    """(samples [seeds, n, ...], test losses [seeds], the params of the first seed with their
    statistics) as one program."""
    (x, labels), (net, velocity) = rows, network(option)
    loss = losses.flow_matching(velocity)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.warmup_cosine_decay_schedule(0.0, option.rate, steps // 20, steps)),
        option.last(),
    )

    def start(key):
        params = option.first(velocity.init(key, x[:1], jnp.zeros(1), labels[:1]))
        plain = net.init(jax.random.key(0), x[:1], jnp.zeros(1), labels[:1])["params"]
        return params, nets.init_statistics(net, plain, x[:1], jnp.zeros(1), labels[:1])

    running = bool(jax.tree.leaves(jax.eval_shape(start, jax.random.key(0))[1]))
    refresh = nets.update_statistics(loss) if running else None
    of_running = nets.training_statistics(loss) if running else loss
    warm = round(option.warm * steps)
    parts = [(loss, warm), (of_running, steps - warm)]

    def one(seed):
        keys = jax.random.split(jax.random.key(seed), 5)
        init_key, train_key, rows_key, test_key, sample_key = keys
        params, statistics = start(init_key)
        state = train.init_state(params, optimizer, train_key, frozen={"buffers": statistics})

        def advance(step, state, key):
            rows = jax.random.choice(key, len(x), (ROWS,), replace=False)
            return step(state, {"x": x[rows], "cond": labels[rows]})[0], None

        for i, (objective, count) in enumerate(parts):
            if count:
                step = train.make_step(objective, optimizer, refresh=refresh)
                keys = jax.random.split(jax.random.fold_in(rows_key, i), count)
                state, _ = jax.lax.scan(partial(advance, step), state, keys)
        params = nets.with_statistics(state.params, state.frozen["buffers"])
        batch = {"x": test[0], "cond": test[1]}
        values = jax.lax.map(lambda key: loss(params, key, batch)[0], jax.random.split(test_key, 8))
        x0 = jax.random.normal(sample_key, test[0].shape)
        method = solvers.fixed(16, diffrax.Heun())
        samples, _ = solvers.sample(velocity, params, x0, test[1], method=method)
        return samples, jnp.mean(values), params

    samples, values, params = jax.jit(jax.vmap(one))(jnp.arange(seeds))
    return np.asarray(samples), np.asarray(values), jax.tree.map(lambda p: p[0], params)


def flops(option: Option, x) -> float:
    """Of a velocity of one image [1, ...] by one block, which XLA counts once in a scan."""
    _, velocity = network(option, num_layers=1)
    t, label = jnp.zeros(1), jnp.zeros(1, int)
    params = velocity.init(jax.random.key(0), x, t, label)
    return jax.jit(velocity.apply).lower(params, x, t, label).cost_analysis()["flops"]


def has_jvp(option: Option, params, x, labels) -> bool:
    _, velocity = network(option)
    run = lambda x: velocity.apply(params, x, jnp.full(len(x), 0.5), labels)  # noqa: E731
    try:
        tangent = jax.jit(lambda x: jax.jvp(run, (x,), (x,))[1])(x)
    except TypeError:  # what JAX raises for a derivative that is defined in reverse alone
        return False
    return bool(jnp.isfinite(tangent).all())


def measure(name: str, rows, test, seeds: int, steps: int) -> dict:
    option, began = OPTIONS[name], time.process_time()
    samples, values, params = trained(option, rows, test, seeds, steps)
    flat = lambda x: np.asarray(x, np.float64).reshape(len(x), -1)  # noqa: E731
    distances = [
        metrics.frechet_distance(flat(s), flat(test[0])) if np.isfinite(s).all() else np.inf
        for s in samples
    ]
    x, (_, velocity) = test[0][:1], network(option)
    made = jax.eval_shape(velocity.init, jax.random.key(0), x, jnp.zeros(1), jnp.zeros(1, int))
    return {
        "loss": [float(v) for v in values],
        "distance": [float(d) for d in distances],
        "flops": flops(option, x),
        "params": sum(int(np.prod(p.shape)) for p in jax.tree.leaves(made)),
        "jvp": has_jvp(option, params, test[0][:4], test[1][:4]),
        "seconds": time.process_time() - began,
        "digits": np.clip(samples[0, :10], -1, 1).round(2).tolist(),
    }


def line(name: str, row: dict) -> str:
    spread = lambda v, d: f"{np.mean(v):.{d}f} +- {np.std(v):.{d}f}"  # noqa: E731
    return (
        f"| {name} | {spread(row['loss'], 3)} | {spread(row['distance'], 2)} |"
        f" {row['flops'] / 1e6:.3f} | {row['params']:,} | {'yes' if row['jvp'] else 'no'} |"
    )


def draw(rows: dict, path: Path) -> None:
    """Ten samples of each option, a line each."""
    figure, axis = plt.subplots(figsize=(5, 0.42 * len(rows) + 0.1))
    side = np.shape(next(iter(rows.values()))["digits"])[1]
    tiles = np.concatenate(
        [np.concatenate(np.asarray(row["digits"])[..., 0], axis=1) for row in rows.values()]
    )
    axis.imshow(tiles, cmap="gray", vmin=-1, vmax=1, aspect="equal")
    axis.set_xticks([])
    axis.set_yticks(side * np.arange(len(rows)) + (side - 1) / 2, rows, fontsize=7)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument(
        "--data-dir", default=os.environ.get("JFLOW_DATA", ""), help="(default: JFLOW_DATA)"
    )
    parser.add_argument("--only", nargs="+", metavar="WORD", help="options whose names have it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--short", action="store_true", help="shrink it to seconds, for CI")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    store = args.out / "results.json"
    rows = json.loads(store.read_text()) if store.exists() else {}
    if args.short:
        args.seeds, args.steps = 1, 20
        args.only = args.only or ["Peri-LN", "BatchNorm", "Sinkhorn"]
    budget = {"data": args.data, "steps": args.steps}
    if any(not budget.items() <= row.items() for row in rows.values()):
        parser.error(f"{store} holds rows of another --data or --steps: take another --out")
    splits = images(args.data, args.data_dir)
    wanted = [n for n in OPTIONS if not args.only or any(w.lower() in n.lower() for w in args.only)]
    print("| option | loss | Frechet distance | MFLOPs | params | JVP |\n|---|---|---|---|---|---|")
    for name in wanted:
        if name not in rows or len(rows[name]["loss"]) < args.seeds:
            rows[name] = measure(name, *splits, args.seeds, args.steps) | budget
            rows = {name: rows[name] for name in OPTIONS if name in rows}
            store.write_text(json.dumps(rows))
        print(line(name, rows[name]), flush=True)
    draw(rows, args.out / "picture.png")


if __name__ == "__main__":
    main()
