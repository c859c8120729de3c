"""How good the images of a trained workdir are, by number of solver steps and by guidance scale.

    python experiments/images_flow_matching/measure.py runs/digits_unet --out samples.png

Prints two tables in Markdown, whose columns README.md explains, and writes their rows to
WORKDIR/measure.json. --inception FILE adds the FID, with weights that `jflow.convert.inception`
reads (jflow ships none). --short is for CI.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from judge import trained
from PIL import Image

from jflow import apps, convert, data, metrics, nets


def generate(loaded, key, labels, high, batch, **options):
    """(images of the labels [n], rounded to levels 0 .. high and scaled back to [0, 1], images a
    second without compilation). Every chunk is drawn whole, so that one program serves all."""
    n = len(labels)
    batch = min(batch, n)
    labels = np.resize(labels, -(-n // batch) * batch)

    def draw(i):
        part = labels[i : i + batch]
        rows = loaded.experiment.sample(
            loaded.params, jax.random.fold_in(key, i // batch), batch, label=part, **options
        )
        return np.asarray(rows["x"])

    draw(0)  # compiles
    started = time.perf_counter()
    parts = [draw(i) for i in range(0, len(labels), batch)]
    speed = len(labels) / (time.perf_counter() - started)
    x = loaded.preprocess.undo({"x": np.concatenate(parts)[:n]})["x"]
    return np.clip(np.rint(x), 0, high) / high, speed


def training_speed(workdir: Path, batch: int) -> float:
    """Images a second: the median over stretches between logged steps, so that compilation and
    evaluations drop out."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    pairs = [
        (b["step"] - a["step"], b["time"] - a["time"])
        for a, b in zip(rows[:-1], rows[1:], strict=True)
    ]
    return float(np.median([batch * n / max(t, 1e-9) for n, t in pairs if n > 0] or [np.nan]))


def same_labels(rng, given: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each of `labels` the index of a row of its class among `given`, no row twice."""
    index = np.empty(len(labels), int)
    for c in np.unique(labels):
        index[labels == c] = rng.choice(
            np.flatnonzero(given == c), np.sum(labels == c), replace=False
        )
    return index


def inception_features(path: Path, batch: int = 50):
    """images [n, H, W, 1 or 3] in [0, 1] -> their moments under the FID network."""
    params = convert.inception(path)
    apply = jax.jit(lambda x: nets.InceptionFID().apply({"params": params}, x))

    def found(x):
        seen = None
        for i in range(0, len(x), batch):
            part = np.broadcast_to(x[i : i + batch], (*x[i : i + batch].shape[:3], 3))
            seen = metrics.moments(apply(jnp.asarray(part, jnp.float32)), seen)
        return seen

    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 50])
    parser.add_argument("--solvers", nargs="+", default=["euler", "heun"])
    parser.add_argument(
        "--scales",
        type=float,
        nargs="*",
        default=[1.5, 2.0, 4.0],
        help="of guidance, Heun, 16 steps",
    )
    parser.add_argument(
        "--num", type=int, help="how many images (default: as many as test rows, 10,000 at most)"
    )
    parser.add_argument("--batch", type=int, default=250, help="images drawn at once")
    parser.add_argument("--inception", type=Path, help="npz file of FID weights")
    parser.add_argument(
        "--out",
        type=Path,
        help="a picture: ten images by each number of steps, from the same noise",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    if args.short:
        args.steps, args.solvers, args.scales, args.num = [1, 4], ["heun"], [2.0], args.num or 50

    loaded = apps.load(args.workdir)
    experiment = loaded.experiment
    splits = experiment.data()
    high = int(splits.train["x"].max())
    units = lambda rows: loaded.preprocess.apply(rows)  # noqa: E731
    judge = trained(splits, units, args.workdir / "judge")
    features = lambda x: judge.features(units({"x": x * high})["x"])  # noqa: E731

    n = min(args.num or 10_000, data.count(splits.test))
    test, labels = splits.test["x"][:n] / high, splits.test["cond"][:n]
    rng, real = np.random.default_rng(0), splits.train["x"]
    subsets = [real[same_labels(rng, splits.train["cond"], labels)] / high for _ in range(20)]
    reference = metrics.moments(features(test))
    near = min(n, 1000)
    held_out = metrics.nearest_distance(test[:near], real / high)
    inception = inception_features(args.inception) if args.inception else None
    target = inception(test) if inception else None

    def judged(x):
        found = {
            "frechet_classifier": metrics.frechet_between(metrics.moments(features(x)), reference),
            "agreement": float(np.mean(judge.labels(units({"x": x * high})["x"]) == labels)),
            "nearest": metrics.nearest_distance(x[:near], real / high) / held_out,
        }
        return found | ({"fid": metrics.frechet_between(inception(x), target)} if inception else {})

    floors = [metrics.frechet_between(metrics.moments(features(x)), reference) for x in subsets]
    about = {
        "step": loaded.step,
        "images": n,
        "judge_test_accuracy": float(
            np.mean(judge.labels(units(splits.test)["x"]) == splits.test["cond"])
        ),
        "floor_frechet_classifier": float(np.mean(floors)),
        "floor_deviation": float(np.std(floors)),
        "training_images_per_second": training_speed(args.workdir, experiment.batch),
    }
    if inception:
        about["floor_fid"] = metrics.frechet_between(inception(subsets[0]), target)
    for name, value in about.items():
        print(f"{name} {value:.6g}")

    key, table, shown = jax.random.key(args.seed), [], []

    def row(solver, steps, scale):
        options = {"solver": solver, "steps": steps, "guidance": scale}
        x, speed = generate(loaded, key, labels, high, args.batch, **options)
        found = options | judged(x) | {"images_per_second": speed}
        if not table:
            print("| " + " | ".join(found) + " |\n" + "|---" * len(found) + "|")
        print(
            "| "
            + " | ".join(v if isinstance(v, str) else f"{v:.4g}" for v in found.values())
            + " |",
            flush=True,
        )
        table.append(found)
        return x

    for solver in args.solvers:
        for steps in args.steps:
            shown.append(row(solver, steps, 1.0)[:10])
    for scale in args.scales:
        shown.append(row("heun", 4 if args.short else 16, scale)[:10])
    (args.workdir / "measure.json").write_text(
        json.dumps({**about, "rows": table}, indent=2) + "\n"
    )
    if args.out:
        sheet = data.image_grid(np.concatenate(shown), 0, 1, zoom=max(1, 40 // test.shape[1]))
        Image.fromarray(sheet).save(args.out)


if __name__ == "__main__":
    main()
