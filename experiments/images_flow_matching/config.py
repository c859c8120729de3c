r"""Class-conditional flow matching on images, by any of the backbones (a U-Net or a DiT first of
all): scikit-learn's digits (8x8, no download: the CPU mode), MNIST, Fashion-MNIST or CIFAR-10.

    jflow train experiments/images_flow_matching --workdir runs/digits_unet
    python experiments/images_flow_matching/measure.py runs/digits_unet --out samples.png

    jflow train experiments/images_flow_matching dataset=cifar net=dit data_dir=DATA \
        --workdir runs/cifar_dit

DATA (or JFLOW_DATA) is the folder that holds images/mnist.npz, images/fashion_mnist_8k2k.npz or
images/cifar10_*. `short=True` shrinks it to seconds, for CI. measure.py beside this file judges a
run; the numbers, and commands for a GPU, are in README.md. A run that was stopped goes on when its
line is given again.

Method: Lipman et al., *Flow Matching for Generative Modeling* (2023), linear path, uniform times;
labels are dropped for 10% of the rows, so that the same network can be guided (Ho, Salimans,
*Classifier-Free Diffusion Guidance*, 2022).
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jflow
from jflow import data, guidance, losses, nets, solvers, train
from jflow.apps import Experiment
from jflow.types import Condition, Velocity

CLASSES = 10  # the label 10 is the null label


class Dataset(NamedTuple):
    load: Callable[[Path], data.Splits]  # from the folder of data
    shape: tuple[int, int, int]
    high: int  # the largest level; the least is 0
    flips: bool  # whether a mirrored image is as good
    unet: dict  # sizes that suit it
    dit: dict


def cifar(folder: Path) -> data.Splits:
    """6000 training images as JPEG and 4000 without loss to train on, 1000 test images as JPEG."""
    jpegs = data.cifar_jpegs(
        folder / "cifar10_jpeg_train6k.npz", folder / "cifar10_jpeg_test1k.npz"
    )
    sheets = data.cifar_sheets(folder / "cifar10_lossless")
    parts = (jpegs.train, sheets.train, sheets.test)
    return data.Splits(
        {k: np.concatenate([part[k] for part in parts]) for k in jpegs.train}, None, jpegs.test
    )


_28 = {
    "unet": {
        "channels": 64,
        "multipliers": (1, 2, 2),
        "num_blocks": 2,
        "attention": (False, False, True),
        "num_heads": 4,
    },
    "dit": {"patch_size": 2, "width": 256, "num_layers": 6, "num_heads": 4},
}
DATASETS = {
    "digits": Dataset(
        lambda folder: data.digits(),
        (8, 8, 1),
        16,
        False,
        unet={
            "channels": 32,
            "multipliers": (1, 2),
            "num_blocks": 1,
            "attention": (False, True),
            "num_heads": 2,
        },
        dit={"patch_size": 2, "width": 96, "num_layers": 4, "num_heads": 4},
    ),
    "mnist": Dataset(
        lambda folder: data.mnist(folder / "mnist.npz"), (28, 28, 1), 255, False, **_28
    ),
    "fashion": Dataset(
        lambda folder: data.mnist(folder / "fashion_mnist_8k2k.npz"), (28, 28, 1), 255, True, **_28
    ),
    "cifar": Dataset(
        cifar,
        (32, 32, 3),
        255,
        True,
        unet={
            "channels": 128,
            "multipliers": (1, 2, 2),
            "num_blocks": 2,
            "attention": (False, True, True),
            "num_heads": 4,
        },
        dit={"patch_size": 2, "width": 384, "num_layers": 12, "num_heads": 6},
    ),
}
UNETS = {"unet": nets.UNet, "adm": nets.ADM, "ddpmpp": nets.DDPMpp}
TRANSFORMERS = {
    "dit": nets.DiT,
    "uvit": nets.UViT,
    "lightning_dit": nets.LightningDiT,
    "mmdit": nets.MMDiT,
    "flux": nets.Flux,
}
SOLVERS = {"euler": diffrax.Euler(), "midpoint": diffrax.Midpoint(), "heun": diffrax.Heun()}


def config(
    *,
    dataset: str = "digits",
    net: str = "unet",
    data_dir: str = "",
    width: int = 0,
    depth: int = 0,
    dropout: float = 0.0,
    bfloat16: bool = False,
    steps: int = 1500,
    batch: int = 128,
    learning_rate: float = 1e-3,
    ema: float = 0.998,
    drop: float = 0.1,
    solver: str = "heun",
    solver_steps: int = 16,
    guidance_scale: float = 1.0,
    eval_every: int = 500,
    save_every: int = 500,
    seed: int = 0,
    short: bool = False,
) -> Experiment:
    """The job that the head of this file describes.

    Args:
        dataset: digits, mnist, fashion or cifar
        net: unet, adm, ddpmpp, dit, uvit, lightning_dit, mmdit or flux
        data_dir: folder of the data; JFLOW_DATA if empty
        width: channels of a U-Net's first level, or a transformer's width; 0: what suits the
        dataset
        depth: residual blocks a level, or blocks of a transformer; 0: what suits the dataset
        dropout: rate of dropout in the network, of unet, adm, ddpmpp and dit
        bfloat16: what the network computes in; parameters stay float32
        steps: updates
        batch: rows of an update
        learning_rate: of Adam, at its highest
        ema: decay of the average of the parameters, which samples are drawn with
        drop: share of the rows whose label is dropped
        solver: euler, midpoint or heun
        solver_steps: steps of the solver that samples, where --steps says nothing
        guidance_scale: scale of classifier-free guidance, where --guidance says nothing; 1 is
        without
        eval_every: updates between two evaluations
        save_every: updates between two checkpoints
        seed: of the parameters and the batches
        short: shrink the run to seconds, for CI
    """
    for key, value, known in (
        ("dataset", dataset, DATASETS),
        ("net", net, UNETS | TRANSFORMERS),
        ("solver", solver, SOLVERS),
    ):
        if value not in known:
            raise ValueError(f"unknown {key} {value!r}: expected one of {', '.join(known)}")
    if short:
        steps, width, depth, batch, solver_steps, eval_every = 60, 32, 1, 64, 4, 30
        depth += net in ("uvit", "mmdit")  # which have two blocks at least
    chosen = DATASETS[dataset]
    velocity = velocity_of(
        net, chosen, width, depth, dropout=dropout, dtype=jnp.bfloat16 if bfloat16 else None
    )
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, steps // 20), steps, 0.01 * learning_rate
    )

    def load():
        folder = data_dir or os.environ.get("JFLOW_DATA", "")
        if not folder and dataset != "digits":
            raise FileNotFoundError(
                f"dataset={dataset}: set data_dir=FOLDER or JFLOW_DATA; digits need no folder"
            )
        return chosen.load(Path(folder) / "images")

    @functools.cache
    def sampler(steps, scale, solver):
        field = velocity if scale == 1.0 else guidance.cfg(velocity, scale, null=CLASSES)
        return jax.jit(
            lambda p, x0, cond: solvers.sample(
                field, p, x0, cond, method=solvers.fixed(steps, SOLVERS[solver])
            )[0]
        )

    def sample(
        params, key, n, *, label=None, steps=solver_steps, guidance=guidance_scale, solver=solver
    ):
        cond = np.broadcast_to(np.arange(n) % CLASSES if label is None else label, (n,))
        if cond.min() < 0 or cond.max() >= CLASSES:
            raise ValueError(f"expected labels from 0 to {CLASSES - 1}, got {label}")
        x = sampler(steps, float(guidance), solver)(
            params, jax.random.normal(key, (n, *chosen.shape)), cond
        )
        return {"x": jnp.clip(x, -1, 1), "cond": cond}

    conditional = jax.jit(
        lambda params, key, rows: losses.flow_matching(velocity)(params, key, rows)[0]
    )
    preprocess = data.chain_preprocess(
        data.scale(0, chosen.high), *([flips()] if chosen.flips else [])
    )

    def evaluate(params, state, key, splits):
        """The loss with labels, on as many training as test rows (2000 at most), at the same times
        and noise."""
        n = min(2000, data.count(splits.test)) // 8

        def mean(rows):
            chunks = [data.take(rows, slice(i * n, (i + 1) * n)) for i in range(8)]
            keys = jax.random.split(jax.random.clone(key), 8)
            chunks = [preprocess.apply(state, chunk, None) for chunk in chunks]
            return float(
                np.mean([conditional(params, k, c) for k, c in zip(keys, chunks, strict=True)])
            )

        return {"train_loss": mean(splits.train), "test_loss": mean(splits.test)}

    return Experiment(
        model=velocity,
        init=lambda key, rows: velocity.init(
            key, rows["x"], jnp.zeros(len(rows["x"])), rows["cond"]
        ),
        loss=losses.chain(losses.drop_cond(drop, null=CLASSES), losses.flow_matching(velocity)),
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-4)
        ),
        data=load,
        preprocess=preprocess,
        steps=steps,
        batch=batch,
        seed=seed,
        ema=train.ema.warmup(ema),
        sample=sample,
        evaluate=evaluate,
        picture=lambda rows: data.image_grid(
            rows["x"], 0, chosen.high, zoom=max(1, 40 // chosen.shape[0])
        ),
        picture_rows=100,
        eval_every=eval_every,
        save_every=save_every,
    )


def velocity_of(net: str, dataset: Dataset, width: int, depth: int, **options) -> Velocity:
    """A backbone in the sizes that suit the dataset, with labels as cond."""
    if net in UNETS:
        module, sizes, names = UNETS[net], dataset.unet, ("channels", "num_blocks")
    else:
        module, sizes, names = TRANSFORMERS[net], dataset.dit, ("width", "num_layers")
    given = {name: size for name, size in zip(names, (width, depth), strict=True) if size}
    options |= {**sizes, **given, "num_classes": CLASSES}
    takes = {field.name for field in dataclasses.fields(module)}
    if options["dropout"] and "dropout" not in takes:
        raise ValueError(f"net={net} has no dropout, got {options['dropout']}")
    if net == "flux":
        head = options["width"] // options["num_heads"]
        sides = 2 * (head // 6)
        options |= {"num_single_layers": options["num_layers"]}
        options |= {"rope_axes": (head - 2 * sides, sides, sides)}
    velocity = jflow.velocity(module(**{k: v for k, v in options.items() if k in takes}))
    return velocity if "num_classes" in takes else spelled(velocity)


def spelled(velocity: Velocity) -> Velocity:
    """A label as a text of one word, for networks that read texts."""

    def text(label):
        word = jax.nn.one_hot(label, CLASSES + 1)
        return Condition(context=word[:, None], vector=word)

    return Velocity(
        lambda key, x, t, label: velocity.init(key, x, t, text(label)),
        lambda params, x, t, label, *, key=None: velocity.apply(params, x, t, text(label), key=key),
    )


def flips() -> data.Preprocess:
    """Mirrors every second image, at random, left to right; none without a generator. The density
    is that of both."""

    def apply(state, rows, rng):
        if rng is None:
            return rows
        flipped = rng.random(len(rows["x"])) < 0.5
        return {
            **rows,
            "x": np.where(flipped[:, None, None, None], rows["x"][:, :, ::-1], rows["x"]),
        }

    nothing = data.identity()
    return nothing._replace(apply=apply)
