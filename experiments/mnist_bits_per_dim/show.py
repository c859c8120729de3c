"""A picture of a trained workdir: samples at temperatures 0.7 and 1.0 (two rows each), and walks
between test images.

    python experiments/mnist_bits_per_dim/show.py runs/mnist14 --out samples.png

A walk joins the latents of two test images on the great circle, since a straight line leaves the
shell where the noise lives; its ends are the images themselves.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jflow import apps, data

COLUMNS = 12


def circle(a, b, steps: int):
    """[steps, ...] from a to b, at constant angular speed."""
    cosine = jnp.sum(a * b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    t = jnp.linspace(0, 1, steps).reshape(-1, *[1] * a.ndim)
    return (jnp.sin((1 - t) * angle) * a[None] + jnp.sin(t * angle) * b[None]) / jnp.sin(angle)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("samples.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=4, help="walks")
    args = parser.parse_args()
    loaded = apps.load(args.workdir)
    keys = jax.random.split(jax.random.key(args.seed), 3)
    params, sample = loaded.params, loaded.experiment.sample
    splits = loaded.experiment.data()
    parts = [
        sample(params, key, 2 * COLUMNS, temperature=t)["x"]
        for key, t in zip(keys[:2], (0.7, 1.0), strict=True)
    ]

    x = jnp.asarray(splits.test["x"][: 2 * args.rows], jnp.float32)
    z = loaded.model.encode(params, x, keys[2])
    for i in range(args.rows):
        walk = loaded.model.decode(params, circle(z[2 * i], z[2 * i + 1], COLUMNS))
        parts.append(walk)
    sheet = data.image_grid(
        np.concatenate(parts), 0, float(splits.train["x"].max()), columns=COLUMNS, zoom=3
    )
    Image.fromarray(sheet).save(args.out)


if __name__ == "__main__":
    main()
