"""Digits of twice the size that a DiT was trained on, by methods that train nothing.

    # trained at 8x8, sampled at 16x16
    python experiments/higher_resolution/run.py --out runs/larger --mnist DATA/images/mnist.npz
    python experiments/higher_resolution/run.py --out runs/larger  # 4x4 to 8x8, no download
    python experiments/higher_resolution/run.py --out runs/short --short  # CI

Beside them are sampling at the larger size as if nothing were different, and samples of the small
size, enlarged. Prints a table and draws OUT/samples.png; the params are kept in OUT and not trained
again. README.md has the results.
"""

import argparse
import pickle
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.svm import SVC

import jflow
from jflow import data, guidance, losses, metrics, nets, solvers, steering, train

matplotlib.use("Agg")
import diffrax
import matplotlib.pyplot as plt

CLASSES = 10  # the label 10 is the null label
LARGER = ("scaled positions", "I-Max", "HiFlow", "RectifiedHR, one scale", "RectifiedHR")
METHODS = ("enlarged", "plain", *LARGER, *(f"{name}, sharper" for name in LARGER))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--mnist", help="mnist.npz (or a folder of idx files); digits of 8x8 without it"
    )
    parser.add_argument("--steps", type=int, default=4000, help="updates of the training")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--euler", type=int, default=32, help="steps of the samplers")
    parser.add_argument("--scale", type=float, default=1.5, help="of the guidance")
    parser.add_argument("--largest", type=float, default=2.5, help="of the rectified energy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few steps and samples")
    args = parser.parse_args()
    if args.short:
        args.steps, args.width, args.samples, args.euler = 5, 16, 20, 4
    args.out.mkdir(parents=True, exist_ok=True)
    rows, test = images(args.mnist)
    side = rows["x"].shape[1] // 2
    patch = 2 if side == 8 else 1
    net = nets.DiT(
        patch_size=patch, width=args.width, num_layers=4, num_heads=4, num_classes=CLASSES
    )
    velocity = jflow.velocity(net)
    small = {**rows, "x": halved(rows["x"])}
    params = fitted(velocity, small, args)
    made = samples(net, params, side, patch, args)
    report(made, rows, test, side, args)


def halved(x):
    """Images [b, H, W, C] as the means of blocks of 2 x 2 pixels."""
    b, height, width, channels = x.shape
    return x.reshape(b, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def images(mnist: str | None):
    """Digits for training and held-out ones, in [-1, 1], in the larger size."""
    splits = data.digits() if mnist is None else data.mnist(mnist)

    def reduced(split, n):
        x = np.asarray(split["x"][:n], np.float32)
        if mnist is None:
            x = x / 8 - 1
        else:
            x = halved(np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))) / 127.5 - 1
        return {"x": x, "cond": np.asarray(split["cond"][:n], np.int32)}

    return reduced(splits.train, 20_000), reduced(splits.test, 2000)


def fitted(velocity, rows, args):
    side = rows["x"].shape[1]
    file = args.out / f"params-{side}-{args.width}-{args.steps}-{args.batch}-{args.seed}.pickle"
    if file.exists():
        print(f"the params of {file}")
        return pickle.loads(file.read_bytes())
    start = time.perf_counter()
    loss = losses.chain(losses.drop_cond(0.1, null=CLASSES), losses.flow_matching(velocity))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, args.steps))
    init_key, fit_key = jax.random.split(jax.random.key(args.seed))
    first = {name: jnp.asarray(value[: args.batch]) for name, value in rows.items()}
    params = velocity.init(init_key, first["x"], 0.0, first["cond"])
    everything = jax.tree.map(jnp.asarray, rows)
    step = train.make_step(loss, optimizer, ema=0.999)

    def update(state, key):
        at = jax.random.randint(key, (args.batch,), 0, len(everything["x"]))
        return step(state, jax.tree.map(lambda a: a[at], everything))

    state = train.init_state(params, optimizer, fit_key, ema=0.999)
    run = jax.jit(lambda state, keys: jax.lax.scan(update, state, keys))
    keys = jax.random.split(jax.random.key(args.seed + 1), args.steps)
    for part in np.array_split(np.arange(args.steps), max(args.steps // 1000, 1)):
        state, found = run(state, keys[part])
        print(f"loss {float(jnp.mean(found['loss'])):.4f}", flush=True)
    params = jax.device_get(state.ema)
    file.write_bytes(pickle.dumps(params))
    print(f"trained in {time.perf_counter() - start:.0f} s", flush=True)
    return params


def samples(net, params, side, patch, args):
    """The images of each method, their labels, the evaluations of small and of large images, and
    the energies of the prediction on the way where a method says them."""
    n, large = args.samples, 2 * side
    labels = jnp.arange(n) % CLASSES
    keys = jax.random.split(jax.random.key(args.seed + 2), 4)
    low0 = jax.random.normal(keys[0], (n, side, side, 1))
    high0 = jax.random.normal(keys[1], (n, large, large, 1))
    scaled = steering.scaled_positions(params, large, large, 2.0, patch)
    method = solvers.fixed(args.euler, diffrax.Euler())
    grid, steps = solvers.grids.uniform(args.euler), args.euler
    begin = 0.4
    late = int(np.ceil(begin * steps))

    def guided(net, scale=args.scale):
        return guidance.cfg(jflow.velocity(net), scale, null=CLASSES)

    def solve(velocity, params, x0, cond=labels):
        return solvers.sample(velocity, params, x0, cond, method=method)[0]

    def larger(net, params, scaled, up):
        """Name -> images, evaluations of small ones, of large ones, energies on the way."""
        velocity = guided(net)
        projected = steering.projected_flow(velocity, 2)
        cond = steering.SteeringCondition(up, labels)
        flowed, _ = steering.hiflow(
            velocity, params, low0, keys[2], grid, labels, factor=2, start=begin, large=scaled
        )

        def refreshed(after):
            stages = {"sizes": [(large, large)], "times": [begin]}
            x1, energies = steering.rectified_hr(
                [velocity, after], [params, scaled], low0, keys[3], grid, labels, **stages
            )
            return x1, late + 1, steps - late, energies

        return {
            "scaled positions": (solve(velocity, scaled, high0), 0, steps, None),
            "I-Max": (solve(projected, scaled, high0, cond), steps, steps, None),
            "HiFlow": (flowed, steps, steps - late, None),
            "RectifiedHR, one scale": refreshed(velocity),
            "RectifiedHR": refreshed(guided(net, args.largest)),
        }

    @jax.jit
    def run(params, scaled):
        up = steering.resized(solve(guided(net), params, low0), large, large)
        sharp = net.clone(attention_fn=steering.proportional_attention((side // patch) ** 2))
        sharper = larger(sharp, params, scaled, up)
        return {
            "enlarged": (up, steps, 0, None),
            "plain": (solve(guided(net), params, high0), 0, steps, None),
            **larger(net, params, scaled, up),
            **{f"{name}, sharper": made for name, made in sharper.items()},
        }

    made = jax.device_get(run(params, scaled))
    return {name: (*made[name], np.asarray(labels)) for name in METHODS}


def report(made, rows, test, side, args) -> None:
    flat = lambda x: np.asarray(x).reshape(len(x), -1)  # noqa: E731
    judge = SVC(C=10).fit(flat(rows["x"][:5000]), rows["cond"][:5000])
    real = test["x"][: args.samples]
    print("\n| | energy distance | of its 2x2 means | agreement | mean square | small | large |")
    print("|---|---|---|---|---|---|---|")

    def line(name, x, labels, low, high):
        found = [
            metrics.energy_distance(flat(x), flat(real)),
            metrics.energy_distance(flat(halved(x)), flat(halved(real))),
            float(np.mean(judge.predict(flat(x)) == labels)),
            float(np.mean(np.square(x))),
        ]
        print(f"| {name} | " + " | ".join(f"{v:.3f}" for v in found) + f" | {low} | {high} |")

    line("real, for training", rows["x"][-args.samples :], rows["cond"][-args.samples :], 0, 0)
    for name, (x, low, high, _, labels) in made.items():
        line(name, x, labels, low, high)
    for name in ("RectifiedHR, one scale", "RectifiedHR"):
        energies = made[name][3].mean(1)
        print(f"{name}: mean square of the prediction {np.round(energies, 3).tolist()}")

    first = [int(np.argmax(test["cond"] == c)) for c in range(CLASSES)]
    lines = {"real": test["x"][first]} | {name: of[0][:CLASSES] for name, of in made.items()}
    figure, axes = plt.subplots(len(lines), 1, figsize=(7, 0.5 * len(lines)))
    for ax, (name, shown) in zip(axes, lines.items(), strict=True):
        ax.imshow(np.concatenate(list(shown[..., 0]), axis=1), cmap="gray", vmin=-1, vmax=1)
        ax.axis("off")
        ax.text(-0.02, 0.5, name, transform=ax.transAxes, ha="right", va="center", fontsize=8)
    figure.subplots_adjust(0.3, 0.01, 0.99, 0.99, 0, 0.06)
    figure.savefig(args.out / "samples.png", dpi=110)


if __name__ == "__main__":
    main()
