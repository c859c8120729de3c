"""A LoRA that turns a trained model of digits to another style: light strokes on black become dark
strokes on white.

    python experiments/lora_style/run.py --out runs/style          # 13 minutes of CPU time
    python experiments/lora_style/run.py --out runs/short --short  # CI

A small DiT is trained on scikit-learn's digits, then LoRAs on their negatives, with the base in
frozen['base']: OUT/base, OUT/all and OUT/blocks are workdirs of `train.fit`, and the last two hold
the LoRA alone. A command that was stopped goes on where it was. Prints a table, draws
OUT/samples.png. README.md has the results.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.svm import SVC

from jflow import adapters, data, losses, metrics, nets, solvers, train

CLASSES = 10  # the label 10 is the null label
PLACES = {"all": "*kernel", "blocks": "blocks/*kernel"}  # which kernels have a LoRA


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of workdirs and pictures")
    parser.add_argument("--width", type=int, default=96, help="of the DiT")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000, help="updates of the base")
    parser.add_argument("--lora-steps", type=int, default=3000, help="updates of each LoRA")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate, at its highest")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="shrink it to seconds, for CI")
    args = parser.parse_args()
    if args.short:
        args.width, args.layers, args.steps, args.lora_steps, args.batch = 16, 1, 4, 4, 32
    rows, test = digits()
    inverted = rows | {"x": -rows["x"]}

    net = nets.DiT(
        width=args.width, num_layers=args.layers, num_heads=4, num_classes=CLASSES, time_scale=10.0
    )
    velocity = nets.velocity(net)
    base_key, *keys = jax.random.split(jax.random.key(args.seed), 1 + 2 * len(PLACES))
    init_key, train_key = jax.random.split(base_key)
    fresh = velocity.init(init_key, rows["x"][:1], jnp.zeros(1), rows["cond"][:1])
    base = fit(velocity, losses.flow_matching, fresh, rows, train_key, args.steps, "base", args)
    kept = jax.device_get(base)

    judge = judge_of(rows, test)
    size = count(base)
    found = {"base": {"params": size, **judge(draw(velocity, base, test["cond"]))}}
    pictures = [draw(velocity, base, np.arange(100) // 10)]
    for name, where in PLACES.items():
        lora = adapters.lora(args.rank, where=where)
        wrapped = adapters.wrap(velocity, lora)
        init_key, train_key = keys.pop(), keys.pop()
        own = fit(
            wrapped,
            lambda model: adapters.adapter_loss(losses.flow_matching(model)),
            lora.init(init_key, base),
            inverted,
            train_key,
            args.lora_steps,
            name,
            args,
            base=base,
        )
        merged = adapters.merge(base, lora, own)
        found[name] = {"params": count(own), **judge(draw(velocity, merged, test["cond"]))}
        pictures.append(draw(velocity, merged, np.arange(100) // 10))
    if not jax.tree.all(jax.tree.map(same_bits, kept, base)):
        raise SystemExit("the base has changed")
    report(found, judge, rows, test)
    save(pictures, args.out / "samples.png")


def digits():
    """Training and test rows {'x' [n, 8, 8, 1] in [-1, 1], 'cond' [n]}."""
    splits = data.digits()
    return [
        {"x": np.asarray(part["x"], np.float32) / 8 - 1, "cond": np.asarray(part["cond"])}
        for part in (splits.train, splits.test)
    ]


def fit(model, make_loss, fresh, rows, key, steps, name, args, base=None):
    """Averaged params after so many updates, in OUT/name; with a base those of an adapter, whose
    checkpoints leave the base out."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.rate, max(1, steps // 20), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    average = train.ema.warmup(0.998)
    frozen = None if base is None else {"base": base}
    done = train.fit(
        train.init_state(fresh, optimizer, key, ema=average, frozen=frozen),
        train.make_step(make_loss(model), optimizer, ema=average),
        data.batches(rows, args.batch, seed=args.seed),
        steps=steps,
        workdir=args.out / name,
        unsaved=() if base is None else ("base",),
        inner=4 if args.short else 20,
        log_every=steps,
        save_every=steps,
    )
    if base is not None and not jax.tree.all(
        jax.tree.map(same_bits, base, done.state.frozen["base"])
    ):
        raise SystemExit(f"{name}: the base has changed")
    return done.state.ema


def same_bits(a, b) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def count(params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


@functools.cache
def sampler(velocity):
    return jax.jit(
        lambda params, x0, cond: solvers.sample(velocity, params, x0, cond, method=20)[0]
    )


def draw(velocity, params, labels):
    """Images [n, 8, 8, 1] in [-1, 1], from one noise: 20 steps of Heun."""
    x0 = jax.random.normal(jax.random.key(1), (len(labels), 8, 8, 1))
    return np.clip(sampler(velocity)(params, x0, jnp.asarray(labels)), -1, 1)


def judge_of(rows, test):
    """images with the labels of the test rows -> what README.md tabulates.

    The classifier and the energy distance are of the negatives of real digits.
    """
    flat = lambda x: np.asarray(x, np.float64).reshape(len(x), -1)  # noqa: E731
    real, other = flat(-rows["x"]), flat(-test["x"])
    classifier = SVC(gamma="scale", C=10.0).fit(real, rows["cond"])
    rng = np.random.default_rng(0)
    subsets = [rng.choice(len(real), len(other), replace=False) for _ in range(20)]
    floor = np.mean([metrics.energy_distance(real[i], other) for i in subsets])

    def judge(x):
        return {
            "agreement": float(classifier.score(flat(x), test["cond"])),
            "energy": metrics.energy_distance(flat(x), other) / float(floor),
        }

    return judge


def report(found, judge, rows, test) -> None:
    print(f"\n{'':24s}{'params':>10s}{'share':>8s}{'agreement':>11s}{'energy':>8s}")
    size = found["base"]["params"]
    for name, row in found.items():
        label = "base" if name == "base" else f"LoRA, {PLACES[name]}"
        print(
            f"{label:24s}{row['params']:>10d}{row['params'] / size:>8.1%}"
            f"{row['agreement']:>11.1%}{row['energy']:>8.2f}"
        )
    rng = np.random.default_rng(0)
    index = [rng.choice(np.flatnonzero(rows["cond"] == c)) for c in test["cond"]]
    real = judge(-rows["x"][index])
    print(f"{'negatives of digits':24s}{'':>18s}{real['agreement']:>11.1%}{real['energy']:>8.2f}")
    print("the base is untouched, to the bit")


def save(pictures, path: Path) -> None:
    """The base's digits, and from the same noise those with each LoRA, side by side."""
    from PIL import Image

    gap = np.full((1, 8, 80), 255, np.uint8)
    grids = []
    for x in pictures:
        grid = x[:, :, :, 0].reshape(10, 10, 8, 8).swapaxes(1, 2).reshape(80, 80)
        grids.append(np.uint8(np.rint((grid + 1) / 2 * 255)))
    side = [part for grid in grids for part in (grid, gap[0].T)][:-1]
    image = np.concatenate(side, axis=1)
    Image.fromarray(image).resize((image.shape[1] * 3, image.shape[0] * 3), 0).save(path)


if __name__ == "__main__":
    main()
