r"""Videos of moving digits whose motion is made coherent while they are drawn (FlowMo).

    python experiments/coherent_motion/run.py --out runs/motion  # 3 minutes of CPU time
    python experiments/coherent_motion/run.py --out runs/short --short  # CI

Videos of 8 frames of 12x12 pixels show one of scikit-learn's zeros and ones each: three quarters
move along a line or a circle, one quarter jump to another place in each frame. A small network is
trained on the mix by flow matching, and draws videos that jump. `steering.coherent_motion` then
lowers the temporal variance of what is drawn, from the same noise. Prints a table of that variance,
of the motion of the center of mass, which no method sees, and of energy distances to held-out
videos; draws OUT/before_and_after.png. README.md has the results.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import jflow
from jflow import data, losses, metrics, nets, paths, solvers, steering, times, train
from jflow.types import Velocity

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FRAMES, SIDE = 8, 12
ROOM = SIDE - 8.0  # a digit's corner is in [0, ROOM]
JERKY = 0.25  # the share of videos that jump
STEPS = 32  # of every sampler
EULER = solvers.fixed(STEPS, diffrax.Euler())
SHOWN = "plain", "FlowMo, SGD, 10", "FlowMo, SGD, t < 0.5, 10"  # in the picture


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the table and picture")
    parser.add_argument("--updates", type=int, default=1600, help="of the network")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--draws", type=int, default=96, help="videos of each method and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise")
    parser.add_argument("--short", action="store_true", help="a few updates: numbers mean nothing")
    args = parser.parse_args()
    if args.short:
        args.updates, args.width, args.layers, args.draws, args.seeds = 20, 16, 1, 12, [0]
    args.out.mkdir(parents=True, exist_ok=True)
    velocity, params = trained(args)
    drawn = draw(velocity, params, args)
    threshold = report(drawn, args)
    picture(drawn, threshold, args.out / "before_and_after.png")


class FramesAsTokens(nn.Module):
    """A network of tokens as one of videos [b, frames, h, w, c]. A token is a frame with the one
    before and the one after it; the three that predict a frame are added."""

    net: nn.Module

    @nn.compact
    def __call__(self, x, t, cond=None):
        n = x.shape[1]
        ends = ((0, 0), (1, 1), (0, 0))
        frames = jnp.pad(x.reshape(*x.shape[:2], -1), ends)
        windows = jnp.concatenate([frames[:, k : k + n] for k in range(3)], axis=-1)
        parts = jnp.split(self.net(windows, t, cond), 3, axis=-1)
        added = sum(jnp.pad(p, ((0, 0), (k, 2 - k), (0, 0))) for k, p in enumerate(parts))
        return added[:, 1:-1].reshape(x.shape)


def corners(n, jerky, rng):
    """Where the digits of n videos are, [n, frames, 2]: on lines, on circles, or anywhere."""
    k = np.arange(FRAMES)[None, :, None]
    first, last = rng.uniform(0, ROOM, (2, n, 1, 2))
    lines = first + (last - first) * k / (FRAMES - 1)
    radius = rng.uniform(0.5, ROOM / 2, (n, 1, 1))
    center = radius + (ROOM - 2 * radius) * rng.uniform(size=(n, 1, 2))
    angle = rng.uniform(0, 2 * np.pi, (n, 1, 1)) + rng.choice([-1, 1], (n, 1, 1)) * k * np.pi / 4
    circles = center + radius * np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    smooth = np.where(rng.uniform(size=(n, 1, 1)) < 0.5, lines, circles)
    return np.where(jerky[:, None, None], rng.uniform(0, ROOM, (n, FRAMES, 2)), smooth)


def videos(digits, jerky, rng):
    """Digits [n, 8, 8] that move, [n, frames, side, side, 1] in [-1, 1], between pixels linearly
    interpolated."""
    at = corners(len(digits), jerky, rng)[..., None, None]
    apart = np.arange(SIDE)[:, None] - np.arange(8) - at  # of a pixel from one of the digit
    rows, columns = np.moveaxis(np.maximum(0, 1 - np.abs(apart)), 2, 0)
    x = np.einsum("nfri,nij,nfcj->nfrc", rows, digits / 8.0, columns, optimize=True) - 1
    return x[..., None].astype(np.float32)


def some_videos(split, n, rng, jerky=None):
    """n videos of zeros and ones of a split; of the mix where it is not said whether they jump."""
    digits = split["x"][split["cond"] < 2]
    digits = digits[rng.integers(0, len(digits), n), :, :, 0]
    mix = rng.uniform(size=n) < JERKY
    return videos(digits, mix if jerky is None else np.full(n, jerky), rng)


def trained(args):
    """The velocity of a network and its averaged params.

    The network predicts the data, which fit through its narrow tokens as noise does not.
    """
    net = nets.TokenDiT(args.width, args.layers, positions=nets.LearnedPositions())
    velocity = paths.parameterizations.from_data(jflow.field(FramesAsTokens(net)), margin=0.05)
    rows = some_videos(data.digits().train, 16 * 1024, np.random.default_rng(0))
    init_key, key = jax.random.split(jax.random.key(0))
    params = velocity.init(init_key, rows[:2], jnp.zeros(2))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, args.updates))
    average = train.ema.warmup(0.995)
    loss = losses.flow_matching(velocity, time=times.logit_normal(-1.0))
    state = train.fit(
        train.init_state(params, optimizer, key, ema=average),
        train.make_step(loss, optimizer, ema=average),
        data.batches({"x": rows}, args.batch, seed=0),
        steps=args.updates,
        inner=20,
        log_every=args.updates,
        progress=True,
    ).state
    return velocity, state.ema


def draw(velocity, params, args):
    """{name: (evaluations of the velocity for a video, videos of each seed)}: all methods start
    from the same noise."""
    event = (FRAMES, SIDE, SIDE, 1)

    def plain(velocity, noise, rate):
        return solvers.sample(velocity, params, noise[:, 0], method=EULER)[0]

    def best_of_two(velocity, noise, rate):
        reward = lambda x: -steering.motion_variance(x)  # noqa: E731
        rows = noise.reshape(-1, *event)
        return steering.best_of_n(velocity, params, rows, reward, n=2, method=EULER)[0]

    def coherent(optimizer, window=(0.0, 0.25)):
        def run(velocity, noise, rate):
            options = {"optimizer": optimizer(rate), "window": window, "grid": STEPS}
            return steering.coherent_motion(velocity, params, noise[:, 0], **options)

        return run

    def coherent_patches(velocity, noise, rate):
        def apply(params, x, t, cond=None, *, key=None):
            return to_patches(velocity.apply(params, from_patches(x), t, cond, key=key))

        patched = Velocity(velocity.init, apply)
        return from_patches(coherent(optax.sgd)(patched, to_patches(noise[:, 0])[:, None], rate))

    runs = {
        "plain": (plain, [0.0]),
        "best of two": (best_of_two, [0.0]),
        "FlowMo, SGD": (coherent(optax.sgd), [1.0, 3.0, 10.0, 30.0]),
        "FlowMo, SGD, t < 0.5": (coherent(optax.sgd, (0.0, 0.5)), [10.0]),
        "FlowMo, SGD, 4x4 patches": (coherent_patches, [30.0]),
        "FlowMo, Adam": (coherent(optax.adam), [0.03, 0.1]),
    }
    keys = [jax.random.key(100 + seed) for seed in args.seeds]
    noises = [jax.random.normal(key, (args.draws, 2, *event)) for key in keys]
    drawn = {}
    for name, (run, rates) in runs.items():
        jitted, count = jax.jit(partial(run, velocity)), evaluations(run, noises[0][:1])
        for rate in rates:
            made = [np.clip(jitted(noise, rate), -1, 1) for noise in noises]
            drawn[f"{name}, {rate:g}" if rate else name] = count, made
    return drawn


def evaluations(run, noise):
    """Of how many rows a sampler asks its velocity for one video."""
    rows = []

    def apply(params, x, t, cond=None, *, key=None):
        jax.debug.callback(rows.append, len(x))
        return x

    jax.block_until_ready(run(Velocity(lambda *_: {}, apply), noise, 0.01))
    jax.effects_barrier()
    return int(sum(rows))


def to_patches(x):
    """[b, frames, side, side, 1] -> [b, frames, 3, 3, 16]."""
    x = x.reshape(*x.shape[:2], SIDE // 4, 4, SIDE // 4, 4)
    return jnp.swapaxes(x, 3, 4).reshape(*x.shape[:2], SIDE // 4, SIDE // 4, 16)


def from_patches(x):
    """[b, frames, 3, 3, 16] -> [b, frames, side, side, 1]."""
    x = x.reshape(*x.shape[:4], 4, 4)
    return jnp.swapaxes(x, 3, 4).reshape(*x.shape[:2], SIDE, SIDE, 1)


def centers(x):
    """The center of mass of each frame, [n, frames, 2], in pixels."""
    mass = (x[..., 0] + 1) / 2
    sums = np.stack([mass.sum(3) @ np.arange(SIDE), mass.sum(2) @ np.arange(SIDE)], axis=-1)
    return sums / np.maximum(mass.sum((2, 3)), 1e-6)[..., None]


def changes(x, order):
    """The root mean square over frames of a difference of the center, [n], in pixels."""
    return np.sqrt((np.diff(centers(x), order, axis=1) ** 2).sum(-1).mean(1))


def report(drawn, args):
    """Prints and writes the table: means over seeds, and standard deviations. Returns the second
    difference above which a video is called jerky."""
    splits, rng = data.digits(), np.random.default_rng(1)
    held, smooth = (some_videos(splits.test, 1024, rng, jerky) for jerky in (None, False))
    threshold = np.quantile(changes(some_videos(splits.train, 4096, rng, False), 2), 0.99)

    def judged(x, plain):
        second, speed = changes(x, 2), changes(x, 1)
        jerky, before = second > threshold, changes(plain, 2) > threshold
        return {
            "variance": np.mean(steering.motion_variance(x)),
            "second difference": np.mean(second),
            "jerky": np.mean(jerky),
            "mended": np.sum(before & ~jerky) / max(np.sum(before), 1),
            "broken": np.sum(~before & jerky) / max(np.sum(~before), 1),
            "speed": np.mean(speed),
            "if not jerky before": np.sum(speed[~before]) / max(np.sum(~before), 1),
            "energy": metrics.energy_distance(x, held),
            "of frames": metrics.energy_distance(x[:, 0], held[:, 0]),
        }

    fresh = {"data": None, "smooth data": False, "jerky data": True}
    table = {}
    for name, jerky in fresh.items():
        made = [some_videos(splits.train, args.draws, rng, jerky) for _ in args.seeds]
        table[name] = 0, [judged(x, x) for x in made]
    for name, (count, made) in drawn.items():
        table[name] = count, [judged(*pair) for pair in zip(made, drawn["plain"][1], strict=True)]
    print("| | evaluations | " + " | ".join(table["data"][1][0]) + " |")
    for name, (count, rows) in table.items():
        columns = [[row[column] for row in rows] for column in rows[0]]
        cells = [f"{np.mean(column):.3f} +- {np.std(column):.3f}" for column in columns]
        print(f"| {name} | {count} | " + " | ".join(cells) + " |")
    alarms = np.mean(changes(smooth, 2) > threshold)
    print(f"\njerky: above {threshold:.3f} pixels; of held-out smooth videos {alarms:.1%} are")
    (args.out / "results.json").write_text(json.dumps(table, default=float))
    return threshold


def picture(drawn, threshold, path):
    """The first draws, a line a method; those that are called jerky in red."""
    figure, axes = plt.subplots(15, 2, figsize=(8, 6.2), height_ratios=([1, 1, 1, 0.3] * 4)[:15])
    for (line, column), ax in np.ndenumerate(axes):
        ax.axis("off")
        if line % 4 == 3:  # space between draws
            continue
        i = line // 4 * 2 + column
        x = drawn[SHOWN[line % 4]][1][0][i : i + 1]
        ax.imshow(np.concatenate(x[0, ..., 0], axis=1), cmap="gray", vmin=-1, vmax=1)
        color = "tab:red" if changes(x, 2)[0] > threshold else "tab:green"
        size = FRAMES * SIDE, SIDE
        ax.add_patch(plt.Rectangle((-0.5, -0.5), *size, fill=False, ec=color, lw=2))
        if column == 0:
            name = SHOWN[line % 4].removeprefix("FlowMo, ")
            ax.text(-2, SIDE / 2, name, ha="right", va="center", fontsize=7)
    figure.subplots_adjust(0.13, 0.01, 0.99, 0.99, 0.03, 0.08)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
