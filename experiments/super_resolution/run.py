r"""Digits from the means of their blocks: flow matching beside DREAM, at equal updates and time.

    python experiments/super_resolution/run.py --out runs/enlarged --seeds 3  # 8x8, no download
    # 14x14, padded to 16x16
    python experiments/super_resolution/run.py --out runs/enlarged_mnist \
        --mnist DATA/images/mnist.npz --width 384 --rows 500
    python experiments/super_resolution/run.py --out runs/short --short  # CI

One network is trained to draw digits given their small image, by `losses.flow_matching` and by
`losses.dream` of several adaptations, from the same params and on the same batches; flow matching
goes on for a third more updates, since an update of DREAM takes longer. Prints, on held-out digits,
PSNR, the agreement of a classifier with the true label and the energy distance to real digits (1 is
as good as data), by Euler steps and by updates; draws OUT/samples.png. README.md has the results.
"""

import argparse
import json
import math
import time
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.svm import SVC

import jflow
from jflow import data, losses, metrics, nets, solvers, train
from jflow.steering import measurements

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS = (1, 2, 4, 16, 64)
ADAPTATIONS = {
    "DREAM, p = 3": lambda t: (1 - t) ** 3,
    "DREAM, p = 1": None,  # 1 - t, the default
    "DREAM, p = 0": 1.0,
}
SMALL, PLAIN, LONGER = (
    "the small image, enlarged",
    "flow matching",
    "flow matching, 4/3 of the updates",
)
MIXED = "sample, the rest first step"
PARTS = (0.75, 0.5, 0.25)
PARTS_OF_UPDATES = (1, 2, 4, 8)  # twelfths, judged on the way


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the table and picture")
    parser.add_argument("--mnist", help="mnist.npz; digits of 8x8 without it")
    parser.add_argument("--factor", type=int, default=4, help="side of a block, divides the side")
    parser.add_argument("--updates", type=int, default=2400, help="a multiple of 12, of each")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=128, help="more than an image has pixels")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate, held throughout")
    parser.add_argument("--rows", type=int, default=1000, help="held-out digits, at most")
    parser.add_argument("--seeds", type=int, default=1, help="how many of them: 0, 1, ...")
    parser.add_argument("--short", action="store_true", help="seconds: numbers mean nothing")
    args = parser.parse_args()
    if args.short:
        args.updates, args.width, args.rows = 24, 16, 20
    if args.updates % 12:
        parser.error(f"--updates: expected a multiple of 12, got {args.updates}")
    args.out.mkdir(parents=True, exist_ok=True)
    rows, test = images(args)
    judge = judge_of(rows, test)
    shrink = measurements.downsample(args.factor, rows["x"].shape[1:])
    rows, test = ({"x": x, "cond": np.asarray(shrink.apply(x))} for x in (rows["x"], test["x"]))
    pictures = {SMALL: shrink.pseudo_inverse(test["cond"]), "truth": test["x"]}
    table = [{"method": SMALL} | judge(pictures[SMALL])]
    print(f"held-out digits: agreement {judge(test['x'])['agreement']:.1f}%")
    for seed in range(args.seeds):
        found, made = compared(rows, test, judge, args, seed)
        table += found
        pictures = made | pictures  # of the first seed
    (args.out / "results.json").write_text(json.dumps(table, indent=1))
    report(table, args)
    draw(pictures, table, args)


def compared(rows, test, judge, args, seed: int):
    """The rows of the table of one seed, and what it drew."""
    velocity = jflow.velocity(nets.ResidualMLP(args.width, 3, time_scale=10.0))

    def solved(params, x0, n):
        method = solvers.fixed(n, diffrax.Euler())
        return solvers.sample(velocity, params, x0, test["cond"], method=method)[0]

    solved = jax.jit(solved, static_argnums=2)
    init_key, train_key, test_key = jax.random.split(jax.random.key(seed), 3)
    params = velocity.init(init_key, rows["x"][:1], jnp.zeros(1), rows["cond"][:1])
    x0 = jax.random.normal(test_key, test["x"].shape)
    table, pictures = [], {}

    def add(name, n, updates, x):
        table.append({"seed": seed, "method": name, "n": n, "updates": updates} | judge(x))

    trainings = {PLAIN: losses.flow_matching(velocity)} | {
        name: losses.dream(velocity, adaptation=a) for name, a in ADAPTATIONS.items()
    }
    for name, loss in trainings.items():
        print(f"seed {seed}, {name}", flush=True)
        updates = updates_of(LONGER if name == PLAIN else name, args)
        kept, seconds = fitted(loss, params, rows, updates, args, seed, train_key)
        table.append({"seed": seed, "method": name, "seconds": seconds})
        made = {n: solved(kept[args.updates], x0, n) for n in STEPS}
        for n, x in made.items():
            add(name, n, args.updates, x)
            pictures[name, n] = x
        for part in PARTS_OF_UPDATES:
            at = args.updates * part // 12
            add(name, 16, at, solved(kept[at], x0, 16))
        if name == PLAIN:
            for n in STEPS:
                add(LONGER, n, updates, solved(kept[updates], x0, n))
            for part in PARTS:
                add(f"{part} {MIXED}", 64, args.updates, part * made[64] + (1 - part) * made[1])
    return table, pictures


def fitted(loss, params, rows, updates, args, seed, key):
    """Averaged params after every twelfth of args.updates, and the CPU seconds of an update."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(args.rate))
    average = train.ema.warmup(0.998)
    twelfth = args.updates // 12
    kept, clock = {}, {}

    def keep(state):
        n = int(state.step)
        kept[n], clock[n] = jax.device_get(state.ema), time.process_time()
        return {}

    train.fit(
        train.init_state(params, optimizer, key, ema=average),
        train.make_step(loss, optimizer, ema=average),
        data.batches(rows, min(args.batch, len(rows["x"])), seed=seed),
        steps=updates,
        inner=math.gcd(twelfth, 20),
        log_every=twelfth,
        eval_every=twelfth,
        evaluate=keep,
    )
    # the first twelfth has the compilation
    return kept, (clock[updates] - clock[twelfth]) / (updates - twelfth)


def images(args):
    """Training and test rows {'x' [n, h, w, 1] in [-1, 1], 'label' [n]}."""
    if args.mnist is None:
        splits, top = data.digits(), 16
    else:
        splits, top = data.mnist(args.mnist), 255
    scaled = []
    for part, most in ((splits.train, 20_000), (splits.test, args.rows)):
        x = np.asarray(part["x"][:most], np.float32)
        if args.mnist is not None:  # the mean of every 2 x 2 pixels, and a frame of 1
            x = x.reshape(len(x), 14, 2, 14, 2, 1).mean(axis=(2, 4))
            x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        scaled.append({"x": x / (top / 2) - 1, "label": np.asarray(part["cond"][:most])})
    return scaled


def judge_of(rows, test):
    """x for the test rows -> {psnr, agreement, energy}, as in inverse_problems."""
    flat = lambda x: np.asarray(x, np.float64).reshape(len(x), -1)  # noqa: E731
    rng = np.random.default_rng(0)
    some = rng.permutation(len(rows["x"]))[:10_000]
    classifier = SVC(gamma="scale", C=10.0).fit(flat(rows["x"][some]), rows["label"][some])
    subsets = [rng.choice(len(rows["x"]), len(test["x"]), replace=False) for _ in range(10)]
    floor = np.mean([metrics.energy_distance(rows["x"][i], test["x"]) for i in subsets])

    def judge(x):
        x = np.clip(np.asarray(x), -1, 1)
        error = np.maximum(np.mean((x - test["x"]) ** 2, axis=(1, 2, 3)), 1e-12)
        return {
            "psnr": float(np.mean(10 * np.log10(4 / error))),
            "agreement": 100 * float(classifier.score(flat(x), test["label"])),
            "energy": float(metrics.energy_distance(x, test["x"]) / floor),
        }

    return judge


def by_seed(table, measure: str, **of):
    """A measure of each seed."""
    return np.array([r[measure] for r in table if measure in r and of.items() <= r.items()])


def over_seeds(table, measure: str, **of):
    return spread(by_seed(table, measure, **of))


def spread(values):
    """The mean and the standard deviation over the seeds; the latter of one is 0."""
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0


def updates_of(name: str, args) -> int:
    """How many updates the params of a line of the table have seen."""
    return args.updates * 4 // 3 if name == LONGER else args.updates


def report(table, args) -> None:
    names = list(dict.fromkeys(r["method"] for r in table))
    print(f"\n{'':36s}{'steps':>6s}{'PSNR':>16s}{'agreement in %':>16s}{'energy':>16s}")
    for name in names:
        at = {"updates": updates_of(name, args)}
        for n in sorted({r["n"] for r in table if r["method"] == name and "n" in r}) or [0]:
            of = {"method": name} | (at | {"n": n} if n else {})
            cells = [over_seeds(table, m, **of) for m in ("psnr", "agreement", "energy")]
            text = "".join(f"{mean:8.2f} +- {sd:4.2f}" for mean, sd in cells)
            print(f"{name:36s}{n:6d}{text}")
    updates = [args.updates * part // 12 for part in (*PARTS_OF_UPDATES, 12)]
    print("\nPSNR, energy of 16 steps after so many updates; CPU time of one in ms")
    print(f"{'':36s}" + "".join(f"{n:>16d}" for n in updates))
    for name in (PLAIN, *ADAPTATIONS):
        cells = [
            [over_seeds(table, m, method=name, n=16, updates=n)[0] for m in ("psnr", "energy")]
            for n in updates
        ]
        mean, sd = over_seeds(table, "seconds", method=name)
        text = "".join(f"{psnr:8.2f}{energy:8.2f}" for psnr, energy in cells)
        print(f"{name:36s}{text}   {1000 * mean:.2f} +- {1000 * sd:.2f}")
    print("\nDREAM beside flow matching, within a seed: PSNR of 1 step and of 16, more by;")
    print("energy of 16 steps over that of flow matching where, with fewer, it has as much PSNR")
    for base in (PLAIN, LONGER):
        for name in ADAPTATIONS:
            cells = [
                spread(gained(table, name, base, 1, args)[0]),
                *(spread(values) for values in gained(table, name, base, 16, args)),
            ]
            text = "".join(f"{mean:8.2f} +- {sd:4.2f}" for mean, sd in cells)
            print(f"{name} and {base:36s}{text}")


def gained(table, name, base, n, args):
    """PSNR of `name` in n steps minus that of `base`, and its energy over that of `base` at the
    PSNR of `name`, between its counts of steps (NaN outside of them), of each seed."""

    def of(method, measure, n):
        return by_seed(table, measure, method=method, n=n, updates=updates_of(method, args))

    psnr, energy = (of(name, measure, n) for measure in ("psnr", "energy"))
    curve = [np.stack([of(base, m, k) for k in STEPS[::-1]]) for m in ("psnr", "energy")]
    at_equal = [
        np.exp(np.interp(p, x, np.log(e), np.nan, np.nan))
        for p, x, e in zip(psnr, *(points.T for points in curve), strict=True)
    ]
    return psnr - of(base, "psnr", n), energy / at_equal


def draw(pictures, table, args) -> None:
    """Eight digits before and after, and the energy against the PSNR by steps."""
    few, many = STEPS[1], STEPS[-2]
    lines = {
        "the small image": pictures[SMALL],
        "truth": pictures["truth"],
        "one step": pictures[PLAIN, 1],
    }
    for name in (PLAIN, "DREAM, p = 1", "DREAM, p = 0"):
        lines |= {f"{name}, {n} steps": pictures[name, n] for n in (few, many)}
    figure = plt.figure(figsize=(9.5, 4.2))
    left = figure.add_gridspec(len(lines), 1, left=0.14, right=0.53, bottom=0.01, top=0.99)
    for ax, (name, x) in zip(left.subplots(), lines.items(), strict=True):
        shown = np.concatenate(list(np.asarray(x)[:8, ..., 0]), axis=1)
        ax.imshow(shown, cmap="gray", vmin=-1, vmax=1)
        ax.axis("off")
        ax.text(-0.02, 0.5, name, transform=ax.transAxes, ha="right", va="center", fontsize=7)
    ax = figure.add_axes((0.6, 0.11, 0.39, 0.87))
    curves = {name: [(name, n) for n in STEPS] for name in (PLAIN, LONGER, *ADAPTATIONS)}
    mixed = [(f"{part} {MIXED}", STEPS[-1]) for part in PARTS]
    curves["flow matching, mixed"] = [(PLAIN, STEPS[-1]), *mixed, (PLAIN, 1)]
    for name, points in curves.items():
        at = {"updates": updates_of(name, args)}
        x, y = (
            [over_seeds(table, measure, method=method, n=n, **at)[0] for method, n in points]
            for measure in ("psnr", "energy")
        )
        ax.plot(x, y, "o-" if name in ADAPTATIONS else "o--", ms=4, lw=1, label=name)
    ax.set(yscale="log", xlabel="PSNR", ylabel="energy distance, 1 is real digits")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.tick_params(labelsize=7, which="both")
    ax.legend(fontsize=7)
    figure.savefig(args.out / "samples.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
