r"""Digits from the means of their blocks in one evaluation, with a knob between fidelity and
realism.

    python experiments/restoration_knob/run.py --out runs/knob  # 8x8, no download
    # 28x28
    python experiments/restoration_knob/run.py --out runs/knob_mnist \
        --mnist DATA/images/mnist.npz --factor 7
    python experiments/restoration_knob/run.py --out runs/short --short  # CI

A teacher is trained by flow matching from the blurred picture with noise added to the picture
(`couplings.corrupted`), a student of one evaluation from it (`losses.tunable_distillation`).
Prints, on held-out digits, the root mean squared error and the energy distance to real digits for
the teacher's Euler steps and the student's knob; draws OUT/samples.png. README.md has the results.
"""

import argparse
import json
import math
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import jflow
from jflow import couplings, data, losses, metrics, nets, solvers, times, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS = (1, 2, 4, 20)
KNOBS = (0.0, 0.25, 0.5, 0.75, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the table and the picture"
    )
    parser.add_argument(
        "--mnist", help="mnist.npz (or a folder of idx files); digits of 8x8 without it"
    )
    parser.add_argument(
        "--factor", type=int, default=4, help="side of a block, a divisor of the picture's side"
    )
    parser.add_argument(
        "--sigma",
        type=float,
        default=0.5,
        help="std of the noise on the means, beside pixels in [-1, 1]",
    )
    parser.add_argument(
        "--steps", type=int, default=5000, help="updates of each of the two trainings"
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument(
        "--rate", type=float, default=1e-3, help="learning rate, falling to 0 along a cosine"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--short", action="store_true", help="20 steps of a narrow network: numbers mean nothing"
    )
    args = parser.parse_args()
    if args.short:
        args.steps, args.width = 20, 32
    rows, test = images(args.mnist)
    args.out.mkdir(parents=True, exist_ok=True)

    velocity = jflow.velocity(nets.TimeMLP((args.width,) * 3, time_scale=10.0))
    source = couplings.corrupted(couplings.block_means(args.factor), args.sigma)
    test_key, init_key, *train_keys = jax.random.split(jax.random.key(args.seed), 4)
    x0, cond = source(test_key, test, None)
    fresh = velocity.init(init_key, x0[:1], jnp.zeros(1), jax.tree.map(lambda c: c[:1], cond))

    degrade = couplings.with_source(source)
    matching = losses.chain(degrade, losses.flow_matching(velocity))
    teacher = fitted(matching, fresh, rows, args, train_keys[0])
    knob = times.uniform(0.0, 1.0)
    student_loss = losses.chain(degrade, losses.tunable_distillation(velocity, velocity, knob=knob))
    student = fitted(student_loss, teacher, rows, args, train_keys[1], {"teacher": teacher})

    made = {"blocks, noise added": x0}
    for n in STEPS:
        made[f"teacher, {n} step{'s' * (n > 1)}"] = solvers.sample(
            velocity, teacher, x0, cond, method=solvers.fixed(n, diffrax.Euler())
        )[0]
    for k in KNOBS:
        made[f"student, knob {k}"] = solvers.restore(velocity, student, x0, k, cond)
    made = {name: np.asarray(x) for name, x in made.items()}
    report(made, rows, test, args)


def images(mnist: str | None):
    """Training and held-out pictures [n, h, w, 1] in [-1, 1]."""
    splits = data.digits() if mnist is None else data.mnist(mnist)
    top = 16 if mnist is None else 255
    rows, test = (
        np.asarray(part["x"], np.float32) / (top / 2) - 1 for part in (splits.train, splits.test)
    )
    return rows, test[:1000]


def fitted(loss, params, rows, args, key, frozen=None):
    """Averaged params after args.steps updates."""
    optimizer = optax.adam(optax.cosine_decay_schedule(args.rate, args.steps))
    average = train.ema.warmup(0.998)
    return train.fit(
        train.init_state(params, optimizer, key, ema=average, frozen=frozen or {}),
        train.make_step(loss, optimizer, ema=average),
        data.batches({"x": rows}, args.batch, seed=args.seed),
        steps=args.steps,
        inner=math.gcd(args.steps, 20),
        log_every=args.steps,
        progress=True,
    ).state.ema


def report(made, rows, test, args) -> None:
    rng = np.random.default_rng(0)
    subsets = [rng.choice(len(rows), len(test), replace=False) for _ in range(5)]
    floor = np.mean([metrics.energy_distance(rows[i], test) for i in subsets])
    print(f"\n{'':24s}{'rms error':>12s}{'energy':>10s}")
    lines = {}
    for name, x in made.items():
        x = np.clip(x, -1, 1)
        lines[name] = (
            float(np.sqrt(np.mean((x - test) ** 2))),
            metrics.energy_distance(x, test) / float(floor),
        )
        print(f"{name:24s}{lines[name][0]:12.3f}{lines[name][1]:10.2f}")
    (args.out / "results.json").write_text(json.dumps(lines, indent=1))
    shown = {"held-out digits": test} | made
    figure, axes = plt.subplots(len(shown), 1, figsize=(8, 0.45 * len(shown)))
    for ax, (name, x) in zip(axes, shown.items(), strict=True):
        ax.imshow(np.concatenate(x[:16, :, :, 0], axis=1), cmap="gray", vmin=-1, vmax=1)
        ax.axis("off")
        ax.text(-0.02, 0.5, name, transform=ax.transAxes, ha="right", va="center", fontsize=7)
    figure.subplots_adjust(0.2, 0.01, 0.99, 0.99, hspace=0.08)
    figure.savefig(args.out / "samples.png", dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
