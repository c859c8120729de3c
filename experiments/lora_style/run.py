"""A LoRA that turns a trained model of digits to another style: light strokes on black become dark
strokes on white.

    python experiments/lora_style/run.py --out runs/style          # 10 minutes on two cores at most
    python experiments/lora_style/run.py --out runs/short --short  # CI

A small DiT is trained on scikit-learn's digits, then a LoRA on their negatives, with the base in
frozen['base']: OUT/base and OUT/lora are workdirs of `train.fit`, and the second holds the LoRA
alone. A command that was stopped goes on where it was. Prints a table, draws OUT/samples.png.
README.md has the results.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
from sklearn.svm import SVC

from jflow import adapters, data, guidance, losses, metrics, nets, solvers, train

CLASSES = 10  # the label 10 is the null label


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of workdirs and pictures")
    parser.add_argument("--width", type=int, default=96, help="of the DiT")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000, help="updates of the base")
    parser.add_argument("--lora-steps", type=int, default=1500, help="updates of the LoRA")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--where", default="*kernel", help="which kernels have a LoRA")
    parser.add_argument("--drop", type=float, default=0.1, help="share of rows without a label")
    parser.add_argument("--guidance", type=float, default=1.5, help="scale, in drawing")
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
    keys = jax.random.split(jax.random.key(args.seed), 4)
    fresh = velocity.init(keys[0], rows["x"][:1], jnp.zeros(1), rows["cond"][:1])
    base = fit(loss_of(velocity, args), fresh, rows, keys[1], args.steps, "base", args)
    kept = jax.device_get(base)

    lora = adapters.lora(args.rank, where=args.where)
    loss = adapters.adapter_loss(loss_of(adapters.wrap(velocity, lora), args))
    fresh = lora.init(keys[2], base)
    own = fit(loss, fresh, inverted, keys[3], args.lora_steps, "lora", args, base)
    if not jax.tree.all(jax.tree.map(same_bits, kept, base)):
        raise SystemExit("the base has changed")
    merged = adapters.merge(base, lora, own)

    judge, draw = judge_of(rows, test), sampler(velocity, args.guidance)
    drawn = {name: draw(params, test["cond"]) for name, params in (("a", base), ("b", merged))}
    found = {
        "base": (count(base), judge(drawn["a"])),
        "negatives of the base's": (None, judge(-drawn["a"])),
        f"LoRA, rank {args.rank}, {args.where}": (count(own), judge(drawn["b"])),
        "negatives of digits": (None, judge(-replay(rows, test))),
    }
    report(found, count(base))
    pictures = [draw(params, np.arange(100) // 10) for params in (base, merged)]
    save(pictures, args.out / "samples.png")


def loss_of(velocity, args):
    dropped = losses.drop_cond(args.drop, null=CLASSES)
    return losses.chain(dropped, losses.flow_matching(velocity))


def digits():
    """Training and test rows {'x' [n, 8, 8, 1] in [-1, 1], 'cond' [n]}."""
    splits = data.digits()
    return [
        {"x": np.asarray(part["x"], np.float32) / 8 - 1, "cond": np.asarray(part["cond"])}
        for part in (splits.train, splits.test)
    ]


def fit(loss, fresh, rows, key, steps, name, args, base=None):
    """Averaged params after so many updates, in OUT/name; with a base those of an adapter, whose
    checkpoints leave the base out."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.rate, max(1, steps // 20), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    average = train.ema.warmup(0.998)
    frozen = None if base is None else {"base": base}
    done = train.fit(
        train.init_state(fresh, optimizer, key, ema=average, frozen=frozen),
        train.make_step(loss, optimizer, ema=average),
        data.batches(rows, args.batch, seed=args.seed),
        steps=steps,
        workdir=args.out / name,
        unsaved=() if base is None else ("base",),
        inner=4 if args.short else 20,
        log_every=steps,
        save_every=steps if args.short else 500,
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


def sampler(velocity, scale):
    """(params, labels) -> images [n, 8, 8, 1] in [-1, 1], from one noise: 20 steps of Heun."""
    guided = guidance.cfg(velocity, scale, null=CLASSES)
    run = jax.jit(lambda params, x0, cond: solvers.sample(guided, params, x0, cond, method=20)[0])

    def draw(params, labels):
        x0 = jax.random.normal(jax.random.key(1), (len(labels), 8, 8, 1))
        return np.clip(run(params, x0, jnp.asarray(labels)), -1, 1)

    return draw


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


def replay(rows, test):
    """For each test label a training image of its class."""
    rng = np.random.default_rng(0)
    return rows["x"][[rng.choice(np.flatnonzero(rows["cond"] == c)) for c in test["cond"]]]


def report(found, size: int) -> None:
    print(f"\n{'':28s}{'params':>10s}{'share':>8s}{'agreement':>11s}{'energy':>8s}")
    for name, (params, scores) in found.items():
        share = f"{params:>10d}{params / size:>8.1%}" if params else f"{'':18s}"
        print(f"{name:28s}{share}{scores['agreement']:>11.1%}{scores['energy']:>8.2f}")
    print("the base is untouched, to the bit")


def save(pictures, path: Path) -> None:
    """The base's digits, and from the same noise those with the LoRA, side by side."""
    grids = [data.image_grid(x, -1, 1, zoom=4) for x in pictures]
    Image.fromarray(np.concatenate(grids, axis=1)).save(path)


if __name__ == "__main__":
    main()
