"""How far the images of trained flows are from test images, with and without an autoencoder.

    python experiments/latent_flow/measure.py runs/latents runs/pixels --judge runs/judge \
        --out samples.png

Prints a line for each workdir, as README.md explains them. The judge is that of
experiments/images_flow_matching, trained here once and kept in the folder --judge. --short is for
CI.
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np
from config import HIGH, images
from PIL import Image

import jflow
from jflow import data, metrics

sys.path.append(str(Path(__file__).parents[1] / "images_flow_matching"))
from judge import trained


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", type=Path, nargs="+", help="of part=latents or part=pixels")
    parser.add_argument("--judge", type=Path, required=True, help="folder of the judge")
    parser.add_argument("--num", type=int, default=2000, help="images, for the first test labels")
    parser.add_argument(
        "--batch", type=int, default=250, help="images drawn at once, which divides num"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dataset", default="mnist", choices=HIGH)
    parser.add_argument("--data-dir", default="", help="folder of the data; JFLOW_DATA without it")
    parser.add_argument("--out", type=Path, help="a picture: four rows of ten of each workdir")
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    if args.short:
        args.num, args.batch, args.dataset = 100, 100, "digits"
    splits, high = images(args.dataset, args.data_dir), HIGH[args.dataset]
    units = lambda rows: data.scale(0, high).apply({}, rows, None)  # noqa: E731
    judge = trained(splits, units, args.judge, steps=20 if args.short else 600)
    features = lambda x: metrics.moments(judge.features(units({"x": x})["x"]))  # noqa: E731
    rows = data.take(splits.test, slice(args.num))
    reference, labels = features(rows["x"]), rows["cond"]

    def say(name, x):
        agreement = np.mean(judge.labels(units({"x": x})["x"]) == labels)
        distance = metrics.frechet_between(features(x), reference)
        print(f"| {name} | {distance:.2f} | {agreement:.1%} |", flush=True)

    print("| images | frechet_classifier | agreement |\n|---|---|---|")
    rng = np.random.default_rng(0)
    real = [rng.choice(np.flatnonzero(splits.train["cond"] == label)) for label in labels]
    say("training images of the same labels", splits.train["x"][real])
    shown = []
    for workdir in args.workdirs:
        loaded = jflow.load(workdir)
        if "shift" in loaded.preprocess.state:
            latents = loaded.experiment.data().test
            latents = data.take(loaded.preprocess.apply(latents), slice(args.num))
            say("test images, encoded and decoded", np.rint(loaded.preprocess.undo(latents)["x"]))
        sample, params, parts = loaded.experiment.sample, loaded.params, []
        keys = jax.random.split(jax.random.key(args.seed), args.num // args.batch)
        for i, key in enumerate(keys):
            part = labels[i * args.batch : (i + 1) * args.batch]
            parts.append(sample(params, key, args.batch, label=part)["x"])
        x = loaded.preprocess.undo({"x": np.concatenate(parts)})["x"]
        x = np.clip(np.rint(x), 0, high)
        say(f"{workdir.name}, step {loaded.step}", x)
        first = [np.flatnonzero(labels == k)[:4] for k in range(10)]
        shown.append(x[np.stack(first, axis=1).ravel()])
    if args.out:
        sheet = data.image_grid(np.concatenate(shown), 0, high, zoom=2)
        Image.fromarray(sheet).save(args.out)


if __name__ == "__main__":
    main()
