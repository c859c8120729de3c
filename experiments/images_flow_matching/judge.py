"""The classifier that judges generated images: a small convolutional network, trained here on the
training split.

Its features, the 64 numbers before the logits, are what `frechet_classifier` compares. That
distance is of this network: it is not the FID, and numbers of different judges, or of different
datasets, do not compare.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jflow import data, train

CLASSES = 10


class Judge(NamedTuple):
    """Of images [n, H, W, C] in model units, any n."""

    features: Callable  # -> float32 [n, 64]
    labels: Callable  # -> int [n]


class Classifier(nn.Module):
    """module(x [b, H, W, C]) -> (logits [b, 10], features [b, 64])."""

    @nn.compact
    def __call__(self, x):
        for width in (32, 64):
            x = nn.silu(nn.GroupNorm(8)(nn.Conv(width, (3, 3))(x)))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        features = nn.silu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        return nn.Dense(CLASSES)(features), features


def trained(
    splits: data.Splits,
    preprocess,
    workdir: Path,
    *,
    batch: int = 128,
    chunk: int = 500,
    steps: int = 2000,
) -> Judge:
    """The judge of a training split: 30 epochs, `steps` updates at most, seed 0. `workdir` keeps it
    for the next call.

    preprocess: rows -> rows in model units, the same for what is to be judged.
    """
    net = Classifier()
    rows = preprocess(splits.train)
    steps = min(steps, 30 * data.count(rows) // batch)

    def loss(params, key, batch, frozen=None):
        logits, _ = net.apply({"params": params}, batch["x"])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["cond"])), {}

    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2)
    params = jax.jit(net.init)(jax.random.key(0), rows["x"][:1])["params"]
    fitted = train.fit(
        train.init_state(params, optimizer, jax.random.key(1)),
        train.make_step(loss, optimizer),
        data.batches(rows, batch, seed=0),
        steps=steps,
        workdir=workdir,
        save_every=steps,
        progress=False,
    )
    apply = jax.jit(lambda x: net.apply({"params": fitted.state.params}, x))

    def judged(x):
        parts = [apply(x[i : i + chunk]) for i in range(0, len(x), chunk)]
        logits, features = (np.concatenate(part) for part in zip(*parts, strict=True))
        return logits.argmax(1), features

    return Judge(lambda x: judged(x)[1], lambda x: judged(x)[0])
