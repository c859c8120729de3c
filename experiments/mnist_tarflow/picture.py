"""Samples of a trained TarFlow with and without guidance and denoising, from the same noise, in one
picture.

    python experiments/mnist_tarflow/picture.py runs/mnist_tarflow samples.png

Columns of panels: as sampled, denoised; rows: without guidance, with it. Each panel shows six
samples of each digit.
"""

import sys

import jax
import numpy as np
from PIL import Image

import jflow
from jflow import data


def main(workdir: str, out: str) -> None:
    loaded = jflow.load(workdir)

    def panel(guided, denoise):
        options = {"denoise": denoise} | ({} if guided else {"guidance": 1.0})
        rows = loaded.experiment.sample(loaded.params, jax.random.key(1), 60, **options)
        return data.image_grid(np.asarray(rows["x"]), -1, 1, zoom=3)

    rows = [
        np.concatenate([panel(guided, denoise) for denoise in (False, True)], axis=1)
        for guided in (False, True)
    ]
    Image.fromarray(np.concatenate(rows)).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
