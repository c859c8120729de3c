"""Class-conditional TarFlow on MNIST pooled to 14x14: noise augmentation, guidance, denoising.

Train, sample and evaluate (10 minutes of CPU time; JFLOW_DATA/images/mnist.npz or path=FILE):

    jflow train experiments/mnist_tarflow --workdir runs/mnist_tarflow
    python experiments/mnist_tarflow/picture.py runs/mnist_tarflow samples.png
    jflow sample runs/mnist_tarflow --num 100 --out guided.png --guidance 2
    jflow evaluate runs/mnist_tarflow

side=28 trains on the pixels themselves, side=8 on scikit-learn's digits, which need no file;
`short=True` does that in seconds, for CI. Expected numbers are in README.md beside this file.

Method: Zhai et al., *Normalizing Flows are Capable Generative Models* (2024).
"""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.svm import SVC

from jflow import data, flows, guidance, losses, metrics, train
from jflow.apps import Experiment

CLASSES = 10  # the label 10 is the null label


def config(
    *,
    side: int = 14,
    path: str = "",
    patch_size: int = 2,
    width: int = 64,
    depth: int = 4,
    layers: int = 1,
    noise: float = 0.1,
    drop: float = 0.1,
    steps: int = 2000,
    batch: int = 64,
    learning_rate: float = 2e-3,
    ema: float = 0.995,
    guidance_scale: float = 2.0,
    judged: int = 1000,
    seed: int = 0,
    short: bool = False,
) -> Experiment:
    """The job that the head of this file describes.

    Args:
        side: of an image, 28, 14 or 8
        path: MNIST's npz file; images/mnist.npz in JFLOW_DATA if empty
        patch_size: side of the patch that is a token
        width: of the transformers
        depth: how many autoregressive blocks
        layers: attention layers of a block
        noise: standard deviation of the noise on the images, which span -1 to 1
        drop: share of the rows whose label is dropped
        steps: updates
        batch: rows of an update
        learning_rate: of Adam, at its highest
        ema: decay of the average of the parameters, which samples are drawn with
        guidance_scale: 1 + the paper's w; 1 is without
        judged: how many images an evaluation looks at
        seed: of the parameters and the batches
        short: shrink the run to seconds, for CI
    """
    if short:
        side, width, depth, layers, steps, judged = 8, 32, 2, 1, 60, 100
    shape, high = (side, side, 1), 16 if side == 8 else 255
    sizes = {
        "patch_size": patch_size,
        "width": width,
        "depth": depth,
        "num_layers": layers,
        "num_classes": CLASSES,
    }
    flow = flows.tarflow(shape, **sizes)
    loss = losses.chain(
        losses.noised(noise), losses.drop_cond(drop, null=CLASSES), losses.nll(flow)
    )
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps)

    @functools.cache
    def sampler(weight):
        guide = guidance.extrapolate(guidance.linear_ramp(weight), null=CLASSES) if weight else None
        guided = flows.tarflow(shape, **sizes, guide=guide)  # the same params
        return jax.jit(lambda params, key, cond: guided.sample(params, key, len(cond), cond))

    @jax.jit
    def clean(params, x, cond):
        return guidance.denoise(flow, params, x, noise, cond)

    def sample(params, key, n, *, label=None, guidance=guidance_scale, denoise=True):
        cond = jnp.broadcast_to(
            jnp.arange(n) % CLASSES if label is None else jnp.asarray(label), (n,)
        )
        if cond.min() < 0 or cond.max() > CLASSES:
            raise ValueError(f"expected labels from 0 to {CLASSES}, the null label, got {label}")
        x = sampler(float(guidance) - 1)(params, key, cond)
        return {"x": jnp.clip(clean(params, x, cond) if denoise else x, -1, 1), "cond": cond}

    @jax.jit
    def nats_per_pixel(params, key, x, cond):
        x = x + noise * jax.random.normal(key, x.shape)
        return -jnp.mean(flow.log_prob(params, x, cond)) / np.prod(shape)

    def evaluate(params, state, key, splits):
        """On `judged` test rows and as many samples of their labels; see README.md."""
        rows = data.take(splits.test, slice(judged))
        x = jnp.asarray(data.scale(0, high).apply(state, rows, None)["x"])
        nothing = jnp.full_like(rows["cond"], CLASSES)
        noise_key, sample_key = jax.random.split(key)
        nats = {"nats_per_pixel": rows["cond"], "nats_per_pixel_no_label": nothing}
        scores = {  # of the same noise
            name: float(nats_per_pixel(params, jax.random.clone(noise_key), x, cond))
            for name, cond in nats.items()
        }
        judge = judge_of(splits, rows, high)
        for scale in (1.0, guidance_scale):
            for denoise in (False, True):
                own_key = jax.random.clone(sample_key)  # from the same noise
                drawn = sample(
                    params, own_key, len(x), label=rows["cond"], guidance=scale, denoise=denoise
                )
                pixels = data.scale(0, high).undo(state, jax.tree.map(np.asarray, drawn))["x"]
                name = f"{'plain' if scale == 1 else 'guided'}{'_denoised' if denoise else ''}"
                scores |= {f"{name}_{score}": value for score, value in judge(pixels).items()}
        return scores

    return Experiment(
        model=flow,
        init=lambda key, rows: flow.init(key, rows["x"], rows["cond"]),
        loss=loss,
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=1e-4)
        ),
        data=lambda: images(side, path),
        preprocess=data.scale(0, high),
        steps=steps,
        batch=batch,
        seed=seed,
        ema=train.ema.warmup(ema),
        sample=sample,
        evaluate=evaluate,
        picture=lambda rows: data.image_grid(rows["x"], 0, high, zoom=4),
        picture_rows=100,
        save_every=max(1, steps // 4),
        eval_every=steps,
    )


def images(side: int, path: str = "") -> data.Splits:
    """MNIST at 28x28 or pooled by two to 14x14, from a file or folder that `data.mnist` reads; 8:
    scikit-learn's digits."""
    if side == 8:
        return data.digits()
    if side not in (14, 28):
        raise ValueError(f"expected side=8, 14 or 28, got {side}")
    if not path and "JFLOW_DATA" not in os.environ:
        raise ValueError(
            "set JFLOW_DATA to a folder with images/mnist.npz, or path=FILE, or take side=8"
        )
    splits = data.mnist(path or Path(os.environ["JFLOW_DATA"]) / "images" / "mnist.npz")
    return splits if side == 28 else data.Splits(pooled(splits.train), None, pooled(splits.test))


def pooled(rows):
    """The means of 2x2 pixels, rounded."""
    x = rows["x"].reshape(-1, 14, 2, 14, 2, 1).mean((2, 4))
    return {**rows, "x": np.rint(x).astype(np.uint8)}


def judge_of(splits, rows, high):
    """images [n, h, w, 1] in data units, with the labels of `rows` -> agreement and energy.

    agreement: the share that a support-vector classifier of 5000 training images gives their label.
    energy: energy distance to the images of `rows`, over its mean for 5 random subsets of as many
    training images.
    """
    flat = lambda x: np.asarray(x, np.float64).reshape(len(x), -1) / high  # noqa: E731
    x, labels = splits.train["x"], splits.train["cond"]
    classifier = SVC(C=10.0).fit(flat(x[:5000]), labels[:5000])
    rng = np.random.default_rng(0)
    subsets = [rng.choice(len(x), len(rows["x"]), replace=False) for _ in range(5)]
    floor = np.mean([metrics.energy_distance(flat(x[i]), flat(rows["x"])) for i in subsets])

    def judge(images):
        return {
            "agreement": float(classifier.score(flat(images), rows["cond"])),
            "energy": metrics.energy_distance(flat(images), flat(rows["x"])) / float(floor),
        }

    return judge
