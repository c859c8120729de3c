r"""Bits per dimension of images under discrete flows: MNIST at 28x28 or 14x14, or scikit-learn's
digits (8x8, no download).

    jflow train experiments/mnist_bits_per_dim dataset=mnist size=14 steps=1600 data_dir=DATA \
        --workdir runs/mnist14
    jflow evaluate runs/mnist14
    python experiments/mnist_bits_per_dim/show.py runs/mnist14 --out samples.png

DATA is the folder that holds images/mnist.npz (or set JFLOW_DATA). size=14 is the CPU mode, 17
minutes of CPU time: means of 2x2 pixels, rounded to integers again. size=28 is MNIST itself, for a
GPU. `short=True` shrinks a run to seconds, for CI. Results are in README.md; a run that was stopped
goes on when its line is given again.

Rows hold integer levels 0 .. L-1; the model is a Transport that dequantizes them, so that `elbo` is
a bound of log P(x) in nats and bits/dim are -elbo / (D log 2), D the number of pixels. Importance
weighting over draws of the noise tightens it.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from jflow import bijectors as bj
from jflow import data, flows, losses, metrics, nets, train
from jflow.apps import Experiment
from jflow.types import ElboFlow, Flow


class Model(NamedTuple):
    flow: ElboFlow  # of levels
    images: Flow  # of real images, the base of `flow`
    encode: Callable  # (params, x in levels, key) -> latents
    decode: Callable  # (params, latents) -> x in levels


def splits(dataset: str, size: int, data_dir: str) -> tuple[data.Splits, int]:
    """(rows {'x': uint8 [n, size, size, 1]}, the number of levels); 2000 of MNIST's training rows
    validate."""
    if dataset == "digits":
        rows, valid, levels = data.digits(), 200, 17
    elif dataset == "mnist":
        folder = data_dir or os.environ.get("JFLOW_DATA", "")
        if not folder:
            raise FileNotFoundError(
                "dataset=mnist: set data_dir=FOLDER or JFLOW_DATA; dataset=digits needs no folder"
            )
        rows, valid, levels = data.mnist(Path(folder) / "images" / "mnist.npz"), 2000, 256
    else:
        raise ValueError(f"unknown dataset {dataset!r}: expected digits or mnist")
    if dataset == "mnist" and size not in (14, 28):
        raise ValueError(f"expected size 14 or 28, got {size}")

    def images(x):
        if dataset == "mnist" and size == 14:
            x = np.rint(x.reshape(-1, 14, 2, 14, 2, 1).mean((2, 4), dtype=np.float32)).astype(
                np.uint8
            )
        return {"x": x}

    train_x, test = rows.train["x"], images(rows.test["x"])
    return data.Splits(images(train_x[:-valid]), images(train_x[-valid:]), test), levels


def as_floats() -> data.Preprocess:
    """Levels stay levels, as float32: the model dequantizes them."""
    return data.Preprocess(
        lambda rows: {},
        lambda state, rows, rng: {**rows, "x": rows["x"].astype(np.float32)},
        lambda state, rows: {**rows, "x": np.rint(rows["x"]).astype(np.uint8)},
        lambda state, rows: np.zeros(len(rows["x"])),
    )


# Models, event_shape and the sizes of `config` -> a Flow on real images. Add one here.


def glow(event_shape, *, scales, depth, hidden, univariate):
    return flows.glow(event_shape, scales=scales, depth=depth, hidden=hidden, univariate=univariate)


def jet(event_shape, *, scales, depth, hidden, univariate):
    sizes = {"patch_size": 2, "width": hidden, "depth": depth, "num_layers": 2, "num_heads": 4}
    return flows.jet(event_shape, univariate=univariate, remat=True, **sizes)


MODELS = {"glow": glow, "jet": jet}
UNIVARIATE = {
    "affine": bj.univariate.affine,
    "spline": lambda: bj.univariate.rational_quadratic(8, 5.0),
    "logistics": lambda: bj.univariate.logistic_mixture(4),
}


def config(
    *,
    model: str = "glow",
    dataset: str = "digits",
    size: int = 14,
    data_dir: str = "",
    scales: int = 1,
    depth: int = 8,
    hidden: int = 64,
    univariate: str = "spline",
    noise_depth: int = 2,
    noise_hidden: int = 32,
    learning_rate: float = 2e-3,
    steps: int = 2000,
    batch: int = 128,
    ema: float = 0.998,
    draws: int = 16,
    eval_rows: int = 10_000,
    eval_every: int = 1000,
    seed: int = 0,
    short: bool = False,
) -> Experiment:
    """The job that the head of this file describes.

    Args:
        model: glow or jet
        dataset: mnist or digits
        size: of an image of mnist, 28 or 14
        data_dir: folder of the data; JFLOW_DATA if empty
        scales: of Glow; 14 can be halved once, 28 twice
        depth: how many layers a scale
        hidden: channels of the networks
        univariate: what couplings apply: affine, spline or logistics
        noise_depth: couplings of the variational dequantization; 0: uniform noise
        noise_hidden: channels of its networks
        learning_rate: of Adam, at its highest
        steps: updates
        batch: rows of an update
        ema: decay of the average of the parameters, which samples are drawn with
        draws: of the importance-weighted bound
        eval_rows: rows of an evaluation at most
        eval_every: updates between two evaluations
        seed: of the parameters and the batches
        short: shrink the run to seconds, for CI
    """
    if short:
        univariate = "affine"
        depth, hidden, noise_depth, steps, batch, draws, eval_rows, eval_every = (
            2,
            16,
            1,
            40,
            64,
            2,
            100,
            40,
        )
    for name, table, key in ((model, MODELS, "model"), (univariate, UNIVARIATE, "univariate")):
        if name not in table:
            raise ValueError(f"unknown {key} {name!r}: expected one of {', '.join(table)}")
    parts, levels = splits(dataset, size, data_dir)
    event_shape = parts.train["x"].shape[1:]
    pixels = int(np.prod(event_shape))
    to_levels = bj.uniform_dequantization(levels)
    if noise_depth:
        noise = flows.dequantization_noise(
            event_shape, depth=noise_depth, net=nets.GlowNet(noise_hidden)
        )
        to_levels = bj.variational_dequantization(noise, levels)
    image_flow = MODELS[model](
        event_shape, scales=scales, depth=depth, hidden=hidden, univariate=UNIVARIATE[univariate]()
    )
    flow = flows.elbo_flow(bj.chain(bj.sigmoid(0.05), to_levels), image_flow)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, steps // 20), steps, 0.01 * learning_rate
    )
    bound = jax.jit(lambda params, x, key: flow.elbo(params, x, key=key))

    def bpd(params, x, key, draws=1):
        """By log mean exp of `draws` bounds a row: the importance-weighted bound."""
        x = x[:eval_rows].astype(np.float32)
        chunks = np.split(x, range(500, len(x), 500))
        keys = jax.random.split(key, (draws, len(chunks)))
        nats = [
            np.concatenate([bound(params, c, k) for c, k in zip(chunks, row, strict=True)])
            for row in keys
        ]
        return metrics.bits_per_dim(metrics.log_mean_exp(nats), pixels)

    def evaluate(params, state, key, splits):
        keys = jax.random.split(key, 4)
        return {
            "valid_bpd": bpd(params, splits.valid["x"], keys[0]),
            "test_bpd": bpd(params, splits.test["x"], keys[1]),
            # both of the same rows: the first 1000 of MNIST's test images are easier than the rest
            "first_bpd": bpd(params, splits.test["x"][:1000], keys[2]),
            "first_bpd_weighted": bpd(params, splits.test["x"][:1000], keys[3], draws),
        }

    def encode(params, x, key):
        y, _ = flow.inverse(params, x, key=key)
        return image_flow.inverse(params["base"], y)[0]

    def decode(params, z):
        return flow.forward(params, image_flow.forward(params["base"], z)[0])[0]

    image_model = Model(flow, image_flow, jax.jit(encode), jax.jit(decode))

    def sample(params, key, n, *, temperature=1.0):
        """At temperature T the base has deviation T."""
        return {
            "x": image_model.decode(params, temperature * jax.random.normal(key, (n, *event_shape)))
        }

    return Experiment(
        model=image_model,
        init=jax.jit(lambda key, rows: flow.init(key, rows["x"])),
        loss=losses.negative_elbo(flow),
        optimizer=optax.chain(optax.clip_by_global_norm(50.0), optax.adam(schedule)),
        data=lambda: parts,
        preprocess=as_floats(),
        steps=steps,
        batch=batch,
        seed=seed,
        ema=train.ema.warmup(ema),
        sample=sample,
        evaluate=evaluate,
        picture=lambda rows: data.image_grid(rows["x"], 0, levels - 1, zoom=2),
        picture_rows=100,
        eval_every=eval_every,
        monitor="valid_bpd",
    )
