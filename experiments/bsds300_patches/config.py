"""Density of 8x8 patches of natural images, BSDS300: a neural spline flow.

    jflow train experiments/bsds300_patches data_dir=DATA --workdir runs/bsds300
    jflow evaluate runs/bsds300

DATA is the folder that holds images/bsds300_patches_500k20k100k.npz (or set JFLOW_DATA). Without
one, patches of scikit-learn's two photographs stand in, so that the code runs anywhere: their
numbers mean nothing beside published ones.
`short=True` shrinks the run to seconds, for CI.

Patches are prepared as by Zoran and Weiss (2011) and Papamakarios, Pavlakou, Murray, *Masked
Autoregressive Flow* (2017): uniform dequantization (once, with a fixed seed), division by 256, the
patch's mean taken off, the last pixel dropped: 63 numbers. Log-likelihoods are in nats of these.
The flow starts at the Gaussian of the training patches. README.md has what was seen of a run.
Method: Durkan, Bekasov, Murray, Papamakarios, *Neural Spline Flows* (2019), RQ-NSF (C).
"""

import os
from pathlib import Path

import jax
import numpy as np
import optax

from jflow import data, distributions, flows, losses, train
from jflow.apps import Experiment

FILE = "images/bsds300_patches_500k20k100k.npz"


def patches(data_dir: str) -> dict[str, np.ndarray]:
    """uint8 [n, 8, 8] under 'train', 'valid' and 'test'."""
    folder = data_dir or os.environ.get("JFLOW_DATA", "")
    if folder:
        path = Path(folder).expanduser() / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: not there; without data_dir and JFLOW_DATA two photographs stand in"
            )
        with np.load(path) as z:
            names = {
                "train": "train",
                "valid": "valid" if "valid" in z.files else "val",
                "test": "test",
            }
            return {part: z[name] for part, name in names.items()}
    from sklearn.datasets import load_sample_images

    rng, cut = np.random.default_rng(0), []
    for photo in load_sample_images().images:
        gray = np.round(photo @ [0.2989, 0.587, 0.114]).astype(np.uint8)
        rows, columns = (rng.integers(0, size - 7, 12_000) for size in gray.shape)
        cut.append(
            np.stack([gray[i : i + 8, j : j + 8] for i, j in zip(rows, columns, strict=True)])
        )
    cut = rng.permutation(np.concatenate(cut))
    return {"train": cut[:20_000], "valid": cut[20_000:22_000], "test": cut[22_000:]}


def features(x: np.ndarray, seed: int) -> np.ndarray:
    """uint8 [n, 8, 8] -> float32 [n, 63]."""
    x = x.reshape(len(x), 64)
    x = (x + np.random.default_rng(seed).random(x.shape)) / 256
    return (x - x.mean(1, keepdims=True))[:, :63].astype(np.float32)


def config(
    *,
    data_dir: str = "",
    depth: int = 10,
    hidden: tuple = (128, 128),
    bins: int = 5,
    bound: float = 10.0,
    learning_rate: float = 1e-3,
    steps: int = 22_000,
    batch: int = 512,
    ema: float = 0.999,
    eval_every: int = 2000,
    seed: int = 0,
    short: bool = False,
) -> Experiment:
    """The job that the head of this file describes.

    Args:
        data_dir: folder of the data; JFLOW_DATA if empty, and two photographs without either
        depth: how many coupling layers
        hidden: widths of the network of a layer
        bins: how many bins a spline has
        bound: beyond this many standard deviations a spline is the identity
        learning_rate: of Adam, at its highest
        steps: updates
        batch: rows of an update
        ema: decay of the average of the parameters, which samples are drawn with
        eval_every: updates between two evaluations
        seed: of the parameters and the batches
        short: shrink the run to seconds, for CI
    """
    if short:
        steps, depth, hidden, eval_every = 30, 2, (16,), 15
    parts = patches(data_dir)
    parts = data.Splits(
        *({"x": features(parts[p], i)} for i, p in enumerate(("train", "valid", "test")))
    )
    base = distributions.multivariate_normal(63)
    model = flows.neural_spline(
        (63,), depth=depth, hidden=hidden, bins=bins, bound=bound, base=base
    )
    pre = data.standardize()
    log_prob = jax.jit(model.log_prob)

    def init(key, rows):
        many = data.take(
            parts.train, slice(20_000)
        )  # a covariance of 63 columns wants more rows than a batch has
        return model.init(key, pre.apply(pre.fit(parts.train), many, None)["x"])

    def nats(params, state, rows) -> np.ndarray:
        found = []
        for start in range(0, len(rows["x"]), 2000):
            y = pre.apply(state, data.take(rows, slice(start, start + 2000)), None)
            found.append(np.asarray(log_prob(params, y["x"])) + pre.log_det(state, y))
        return np.concatenate(found)

    def evaluate(params, state, key, splits):
        valid, test = nats(params, state, splits.valid), nats(params, state, splits.test)
        return {
            "valid_nll": -valid.mean(),
            "test_log_likelihood": test.mean(),
            "test_standard_error": test.std() / np.sqrt(len(test)),
        }

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(200, steps), steps + 1, 0.001 * learning_rate
    )
    return Experiment(
        model=model,
        init=init,
        loss=losses.nll(model),
        optimizer=optax.chain(optax.clip_by_global_norm(5.0), optax.adam(schedule)),
        data=lambda: parts,
        preprocess=pre,
        steps=steps,
        batch=batch,
        seed=seed,
        ema=train.ema.warmup(ema),
        sample=lambda params, key, n: {"x": model.sample(params, key, n)},
        evaluate=evaluate,
        eval_every=eval_every,
        save_every=1000,
        monitor="valid_nll",
    )
