"""Class-conditional rectified flow on scikit-learn's digits (8x8, 1437 to train on, 360 to test): the main job.

Train, sample and evaluate (3 minutes at most on two CPU cores, no download):

    jflow train experiments/digits_rectified_flow --workdir runs/digits
    jflow sample runs/digits --num 100 --out samples.png
    jflow evaluate runs/digits

`short=True` shrinks it to seconds, for CI. The expected numbers are in README.md beside this file.

Method: Liu, Gong, Liu, *Flow Straight and Fast* (2022), one rectified flow with uniform times; labels are dropped for
10% of the rows so that the same network can be guided (Ho, Salimans, *Classifier-Free Diffusion Guidance*, 2022).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jflow
from jflow import data, guidance, losses, nets, solvers, train
from jflow.train import Experiment

CLASSES = 10  # the label 10 is the null label


def config(
    *,
    steps: int = 4000,
    batch: int = 256,
    learning_rate: float = 1e-3,
    width: int = 256,
    depth: int = 3,
    dropout: float = 0.1,
    drop: float = 0.1,
    ema: float = 0.999,
    solver_steps: int = 20,
    guidance_scale: float = 1.0,
    seed: int = 0,
    short: bool = False,
) -> Experiment:
    if short:
        steps, width, depth = 200, 64, 1
    net = nets.ResidualMLP(width=width, depth=depth, num_classes=CLASSES, dropout=dropout)
    velocity = jflow.velocity(net)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-4))

    def init(key, rows):
        return velocity.init(key, rows["x"], jnp.zeros(len(rows["x"])), rows["cond"])

    def sample(params, key, n, *, label=None, steps=solver_steps, guidance_scale=guidance_scale):
        cond = jnp.arange(n) % CLASSES if label is None else jnp.broadcast_to(jnp.asarray(label), (n,))
        field = velocity if guidance_scale == 1.0 else guidance.cfg(velocity, guidance_scale, null=CLASSES)
        x0 = jax.random.normal(key, (n, 8, 8, 1))
        x1, _ = jax.jit(lambda p, x0, c: solvers.sample(field, p, x0, c, steps=steps))(params, x0, cond)
        return {"x": jnp.clip(x1, -1, 1), "cond": cond}

    return Experiment(
        model=velocity,
        init=init,
        loss=losses.flow_matching(velocity, drop=drop, null=CLASSES),
        optimizer=optimizer,
        data=data.digits,
        preprocess=data.scale(0, 16),
        steps=steps,
        batch=batch,
        seed=seed,
        ema=train.ema.warmup(ema),
        sample=sample,
    )
