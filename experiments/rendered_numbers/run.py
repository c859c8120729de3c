"""Numbers that a caption asks for, drawn by overshooting samplers (AMO).

    python experiments/rendered_numbers/run.py --out runs/numbers  # 6 minutes of CPU time
    python experiments/rendered_numbers/run.py --out runs/short --short  # CI

A picture of 16x16 pixels has a pattern, and above or below a number of two of scikit-learn's
digits; its caption is five words: "the", the two digits, the place and the pattern. A small
`nets.MMDiT` reads the words as text and is trained by flow matching, briefly, so that Euler steps
write many numbers wrong. The same noise and captions then go through stochastic steps in as many
evaluations: `solvers.ancestral`, `solvers.overshoot` and `steering.modulated_overshoot` (AMO),
which overshoots where `steering.attention_map` says that the picture attends to the words of the
digits. Prints tables of how many numbers a classifier of real digits reads as the caption says, and
of energy distances to held-out pictures; draws OUT/samples.png. The params are kept in
OUT and not trained again. README.md has the results.
"""

import argparse
import json
import pickle
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.svm import SVC

import jflow
from jflow import data, guidance, losses, metrics, nets, oracles, solvers, steering, train
from jflow.types import Condition, Field

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIDE, HALF = 16, 8
PATTERNS = "rows", "columns", "checks"
PLACES = "above", "below"
WORDS = ("the", *map(str, range(10)), *PLACES, *PATTERNS)
LENGTH, DIGITS, OTHERS = 5, (1, 2), (3, 4)  # of a caption, and where in it which words are
NULL = Condition(context=np.zeros((LENGTH, len(WORDS) + LENGTH), np.float32))
GUIDANCE = 2.0
SITES = "blocks:weights", "last_block:weights"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the table and picture")
    parser.add_argument("--updates", type=int, default=2000, help="of the network")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--draws", type=int, default=120, help="pictures of each method and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[4, 8, 16], help="evaluations, even numbers"
    )
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[2.0, 4.0, 8.0], help="how far steps overshoot"
    )
    parser.add_argument("--short", action="store_true", help="a few updates: numbers mean nothing")
    args = parser.parse_args()
    if args.short:
        args.updates, args.width, args.layers, args.draws = 20, 16, 2, 8
        args.seeds, args.steps, args.scales = [0], [2], [2.0]
    args.out.mkdir(parents=True, exist_ok=True)
    splits = data.digits()
    net = nets.MMDiT(
        patch_size=2, width=args.width, num_layers=args.layers, num_heads=4, grid_size=8
    )
    params = trained(net, splits.train, args)
    drawn = draw(net, params, args)
    read = reader(splits.train)
    report(drawn, read, splits, args)
    bias(args)
    picture(net, params, read, args)


def pictures(split, n, seed):
    """n pictures [n, 16, 16, 1] in [-1, 1] of a split's digits, and their captions, [n, 5]."""
    rng = np.random.default_rng(seed)
    words = captions(n, rng)
    labels, place, pattern = words[:, 1:3] - 1, words[:, 3] - 11, words[:, 4] - 13
    x = patterns(pattern, rng)
    of_class = [np.flatnonzero(split["cond"] == c) for c in range(10)]
    rows = [[rng.choice(of_class[c]) for c in pair] for pair in labels]
    ink = split["x"][rows][..., 0].swapaxes(1, 2).reshape(n, HALF, SIDE) / 16  # side by side
    at = np.arange(n)[:, None], (place * HALF)[:, None] + np.arange(HALF)  # of the half
    x[at] += ink * (1 - x[at])
    return x[..., None].astype(np.float32), words


def captions(n, rng):
    """Random captions, [n, 5], as indices of WORDS."""
    sizes = 1, 10, 10, len(PLACES), len(PATTERNS)
    first = 0, 1, 1, 11, 13
    return first + np.stack([rng.integers(0, size, n) for size in sizes], axis=1)


def patterns(kind, rng):
    """Waves over the whole picture, [n, 16, 16] in [-0.9, -0.2]: rows, columns, or both."""
    n = len(kind)
    length, phase = rng.uniform(3, 6, (2, n, 1)), rng.uniform(0, 2 * np.pi, (2, n, 1))
    waves = np.sin(2 * np.pi * np.arange(SIDE) / length + phase)
    down, across = waves[0][:, :, None], waves[1][:, None, :]
    kind = kind[:, None, None]
    return -0.55 + 0.35 * np.where(kind == 1, 1, down) * np.where(kind == 0, 1, across)


def encoded(words):
    """Captions as the text of an MMDiT: each word, and its place among them, one-hot. The pooled
    text says nothing, so that the words are read by attention alone."""
    n = len(words)
    word = jax.nn.one_hot(words, len(WORDS))
    place = jnp.broadcast_to(jnp.eye(LENGTH), (n, LENGTH, LENGTH))
    context = jnp.concatenate([word, place], axis=-1)
    return Condition(context=context, vector=jnp.zeros((n, 1)))


def with_text(key, batch, frozen=None):
    """The batch transform that makes a condition of the captions."""
    return {**batch, "cond": encoded(batch["cond"])}


def trained(net, split, args):
    """The averaged params of the network."""
    file = args.out / f"params-{args.width}-{args.layers}-{args.batch}-{args.updates}.pickle"
    if file.exists():
        return pickle.loads(file.read_bytes())
    start = time.process_time()
    velocity = jflow.velocity(net)
    x, words = pictures(split, 64 if args.short else 30_000, 0)
    rows = {"x": x, "cond": words.astype(np.int32)}
    init_key, key = jax.random.split(jax.random.key(0))
    params = velocity.init(init_key, x[:2], jnp.zeros(2), encoded(words[:2]))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, args.updates))
    average = train.ema.warmup(0.995)
    drop = losses.drop_cond(0.1, null=NULL)
    loss = losses.chain(with_text, drop, losses.flow_matching(velocity))
    state = train.fit(
        train.init_state(params, optimizer, key, ema=average),
        train.make_step(loss, optimizer, ema=average),
        data.batches(rows, args.batch, seed=0),
        steps=args.updates,
        inner=20,
        log_every=100,
        progress=True,
    ).state
    params = jax.device_get(state.ema)
    file.write_bytes(pickle.dumps(params))
    print(f"trained in {time.process_time() - start:.0f} s of CPU time", flush=True)
    return params


def methods(net, scales):
    """{name: (step, evaluations of the network for one of its steps)}."""
    velocity, amo = jflow.velocity(net), steering.modulated_overshoot
    digits, others = (
        steering.attention_map(net, SITES, words, patch=2) for words in (DIGITS, OTHERS)
    )
    guided = guidance.cfg(velocity, GUIDANCE, null=NULL)
    guided_digits = Field(digits.init, partial(with_guidance, velocity, digits))
    steps = {"Euler": solvers.ancestral(velocity, 0.0), "ancestral": solvers.ancestral(velocity)}
    steps |= {f"overshoot, {c:g}": solvers.overshoot(velocity, c) for c in scales}
    steps |= {f"AMO, {c:g}": amo(digits, c) for c in scales}
    largest = max(scales)
    steps[f"AMO of other words, {largest:g}"] = amo(others, largest)
    steps_of_two = {
        "Euler, guided": solvers.ancestral(guided, 0.0),
        f"overshoot, {largest:g}, guided": solvers.overshoot(guided, largest),
        f"AMO, {largest:g}, guided": amo(guided_digits, largest),
    }
    return {
        name: (step, 1 + (name in steps_of_two)) for name, step in (steps | steps_of_two).items()
    }


def with_guidance(velocity, field, params, x, t, cond=None, *, key=None):
    """The velocity of `guidance.cfg`, and the map under the caption."""
    v, m = field.apply(params, x, t, cond)
    other = guidance.with_cond(velocity, NULL).apply(params, x, t, cond)
    return other + GUIDANCE * (v - other), m


def draw(net, params, args):
    """{name: {evaluations: pictures of each seed}}, all from the same noise and captions."""
    starts, drawn = [given(seed, args.draws) for seed in args.seeds], {}
    for name, (step, evaluations) in methods(net, args.scales).items():
        step = jax.jit(step)  # one program for all numbers of steps
        drawn[name] = {
            count: [walk(step, params, count // evaluations, *start)[-1] for start in starts]
            for count in args.steps
        }
        print(f"drawn: {name}", flush=True)
    return drawn


def walk(step, params, count, x, key, words):
    """The pictures after each of so many equal steps."""
    grid, cond, passed = solvers.grids.uniform(count), encoded(words), []
    for t, t_next, part in zip(grid[:-1], grid[1:], jax.random.split(key, count), strict=True):
        x, _, _ = step(params, x, t, t_next, part, cond)
        passed.append(np.asarray(x))
    return passed


def given(seed, n):
    """What every method starts from: the noise, the key of its steps, and the captions."""
    noise_key, key = jax.random.split(jax.random.key(100 + seed))
    words = captions(n, np.random.default_rng(100 + seed))
    return jax.random.normal(noise_key, (n, SIDE, SIDE, 1)), key, words


def parts(x, words):
    """The half with the number and the one without, [n, 8, 16] each."""
    halves = x[..., 0].reshape(len(x), 2, HALF, SIDE)
    at = np.arange(len(x)), words[:, 3] - 11
    return halves[at], halves[at[0], 1 - at[1]]


def reader(split):
    """(pictures, captions) -> the digits that are read where the caption places them, [n, 2]."""

    def crops(x, words):
        number, _ = parts(x, words)
        return number.reshape(len(x), HALF, 2, HALF).swapaxes(1, 2).reshape(2 * len(x), -1)

    x, words = pictures(split, 3000, 1)
    judge = SVC(C=10).fit(crops(x, words), words[:, 1:3].ravel() - 1)
    return lambda x, words: judge.predict(crops(x, words)).reshape(-1, 2)


def report(drawn, read, splits, args):
    """Prints and writes the tables, means over seeds and standard deviations: shares in percent,
    and energy distances over those of as many pictures of training digits."""
    held, held_words = pictures(splits.test, 1000, 2)

    def judged(x, words):
        right = read(x, words) == words[:, 1:3] - 1
        pairs = zip((x, *parts(x, words)), (held, *parts(held, held_words)), strict=True)
        return {
            "numbers right, %": 100 * np.mean(right.all(1)),
            "digits right, %": 100 * np.mean(right),
            **{
                f"energy, {name}": metrics.energy_distance(a, b)
                for name, (a, b) in zip(("picture", "number", "pattern"), pairs, strict=True)
            },
        }

    def columns(found):
        return {name: np.array([row[name] for row in found]) for name in found[0]}

    words = [given(seed, args.draws)[2] for seed in args.seeds]
    table = {
        name: {count: columns(list(map(judged, made, words))) for count, made in counts.items()}
        for name, counts in drawn.items()
    }
    real = columns([judged(*pictures(splits.train, args.draws, 10 + seed)) for seed in args.seeds])
    print("\nheld out:", judged(held, held_words), "\ntraining digits:", real)
    for column, of_real in real.items():
        unit, places = (1.0, 1) if column.endswith("%") else (np.mean(of_real), 2)
        print(f"\n| {column} | {' | '.join(map(str, args.steps))} |")
        print("|---" * (len(args.steps) + 1) + "|")
        for name, counts in table.items():
            cells = [found[column] / unit for found in counts.values()]
            cells = [f"{v.mean():.{places}f} +- {v.std():.{places}f}" for v in cells]
            print(f"| {name} | {' | '.join(cells)} |")
    (args.out / "results.json").write_text(json.dumps(table, default=np.ndarray.tolist))


def bias(args):
    """Prints the standard deviation that each step makes of a Gaussian of 0.5 with its exact
    velocity: a step is linear there."""
    velocity = oracles.as_velocity(oracles.gaussian([0.0], 0.25))
    steps = {"Euler": solvers.ancestral(velocity, 0.0), "ancestral": solvers.ancestral(velocity)}
    steps |= {f"overshoot, {c:g}": solvers.overshoot(velocity, c) for c in args.scales}
    print(f"\n| std of a Gaussian of 0.5 | {' | '.join(map(str, args.steps))} |")
    print("|---" * (len(args.steps) + 1) + "|")
    for name, step in steps.items():
        step, cells = jax.jit(step), []
        for count in args.steps:
            grid, variance = solvers.grids.uniform(count), 1.0
            for t, t_next in zip(grid[:-1], grid[1:], strict=True):
                _, mean, std = step({}, np.ones((1, 1)), t, t_next, None)
                variance = float(mean[0, 0] ** 2 * variance + std[0] ** 2)
            cells.append(f"{variance**0.5:.3f}")
        print(f"| {name} | {' | '.join(cells)} |")


def picture(net, params, read, args):
    """The first draws, a column a caption: what three steps make of the same noise, in a frame of
    green where it is read right, and to which words the last attended half-way."""
    count, scale, n = args.steps[-1], args.scales[-1], 10
    x0, key, words = given(args.seeds[0], args.draws)
    made = {}
    for name in ("Euler", f"overshoot, {scale:g}", f"AMO, {scale:g}"):
        passed = walk(jax.jit(methods(net, args.scales)[name][0]), params, count, x0, key, words)
        made[name] = passed[-1]
    maps = {}
    for name, tokens in (("the digits", DIGITS), ("place and pattern", OTHERS)):
        field = steering.attention_map(net, SITES, tokens, patch=2)
        half = passed[count // 2 - 1]
        m = np.asarray(field.apply(params, half, 0.5, encoded(words))[1])
        maps[f"attention to\n{name}"] = m
        print(f"\nmean of the map of {name}, in the two halves:", *map(np.mean, parts(m, words)))
    figure, axes = plt.subplots(len(made) + len(maps), n, figsize=(9, 4.9))
    for line, (name, images) in zip(axes, {**made, **maps}.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        low, colors = (-1, "gray") if name in made else (0, "viridis")
        right = (read(images, words) == words[:, 1:3] - 1).all(1)
        for i, ax in enumerate(line[: len(images)]):
            ax.imshow(images[i, ..., 0], cmap=colors, vmin=low, vmax=1)
            ax.set(xticks=[], yticks=[])
            frame = {"color": "tab:green" if right[i] else "tab:red", "linewidth": 2}
            for spine in ax.spines.values():
                spine.set(visible=name in made, **frame)
    for ax, row in zip(axes[0], words[:n], strict=False):
        the, *digits, place, pattern = (WORDS[i] for i in row)
        ax.set_title(f"{the} {' '.join(digits)}\n{place}\n{pattern}", fontsize=8)
    figure.tight_layout(pad=0.4)
    figure.savefig(args.out / "samples.png", dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
