"""Class-conditional digits in 1, 2 and 4 evaluations, by many methods at one training budget.

    python experiments/few_steps_digits/run.py --out runs/digits_few  # 8x8, no download
    # 14x14
    python experiments/few_steps_digits/run.py --out runs/mnist_few --mnist DATA/images/mnist.npz
    python experiments/few_steps_digits/run.py --out runs/short --short  # CI

Each method is a line of OUT/results.jsonl as soon as it is done, and is not trained again when the
command is repeated; its params and samples are kept beside it. Prints a table, draws
OUT/samples.png. README.md has the results.
"""

import argparse
import json
import math
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.svm import SVC

import jflow
from jflow import data, guidance, losses, metrics, nets, solvers, times, train
from jflow.types import Loss

CLASSES = 10  # the label 10 is the null label
COUNTS = (1, 2, 4)
EULER = diffrax.Euler()
WINDOWS = np.linspace(0, 1, 5)


class Job(NamedTuple):
    """loss; draw(params, x0, labels, n, key) -> (x1, info) for n in counts; is_flow_map: the
    student needs params for r beside the teacher's; fresh: it starts from params of its own; pairs:
    of which flow ('teacher', 'guided', a job's name), or None for data; counting: frozen['step']
    counts the updates."""

    loss: Loss
    draw: Callable
    counts: tuple[int, ...] = COUNTS
    fresh: bool = False
    is_flow_map: bool = False
    pairs: str | None = None
    counting: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of results, params and samples"
    )
    parser.add_argument(
        "--mnist",
        help="mnist.npz (or a folder of idx files), reduced to 14x14; digits of 8x8 without it",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        help="names as in the table, after those they start from; all without it",
    )
    parser.add_argument("--steps", type=int, default=3000, help="updates of every training")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument(
        "--rate", type=float, default=1e-3, help="learning rate, falling to 0 along a cosine"
    )
    parser.add_argument(
        "--scale", type=float, default=1.5, help="guidance of the pairs of InstaFlow"
    )
    parser.add_argument(
        "--pairs", type=int, default=20_000, help="of every teacher that is rectified"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="20 steps, a few methods")
    args = parser.parse_args()
    if args.short:
        args.steps, args.width, args.pairs = 20, 32, 256
        args.methods = args.methods or ["MeanFlow", "PeRFlow", "2-rectified"]
    rows, test = images(args)
    judge = judge_of(rows, test)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {
        k: v for k, v in vars(args).items() if k not in ("out", "short", "mnist", "methods")
    }
    file = args.out / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        raise SystemExit(f"{args.out} was made with other settings: {file.read_text()}")
    file.write_text(json.dumps(settings))

    net = nets.ResidualMLP(
        args.width, 3, num_classes=CLASSES, time_scale=10.0
    )  # gentle: several losses need d/dt
    todo = jobs(net, args.steps)
    if unknown := sorted(set(args.methods or []) - set(todo)):
        parser.error(f"unknown methods {unknown}; there are {list(todo)}")
    trained, made = {}, {}
    results = args.out / "results.jsonl"
    done = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )
    for name, job in todo.items():
        kept = args.out / f"{name}.pickle"
        if kept.exists() and any(row["method"] == name for row in done):
            trained[name] = pickle.loads(kept.read_bytes())
            continue
        if args.methods and name not in args.methods and name != "teacher":
            continue
        start = time.perf_counter()
        batches = rows
        if job.pairs is not None:
            if job.pairs not in ("guided", *trained):
                raise SystemExit(f"{name} needs {job.pairs!r}: train it too")
            if job.pairs not in made:
                made[job.pairs] = paired(net, job.pairs, trained, rows, args)
            batches = made[job.pairs]
        trained[name] = params = fitted(net, job, batches, trained, args)
        seconds = time.perf_counter() - start
        found, samples = judged(job, params, test, judge)
        kept.write_bytes(pickle.dumps(jax.device_get(params)))
        np.savez_compressed(args.out / f"{name}.npz", **samples)
        done.append({"method": name, "seconds": seconds, "found": found})
        with open(results, "a") as out:
            out.write(json.dumps(done[-1]) + "\n")
        print(f"{name}: {seconds:.0f} s", flush=True)
    report([row for name in todo for row in done if row["method"] == name], judge, rows, test, args)


def jobs(net, steps: int) -> dict[str, Job]:
    velocity, model = jflow.velocity(net), jflow.flow_map(net)

    def dropping(loss):
        return losses.chain(losses.drop_cond(0.1, null=CLASSES), loss)

    pairs, warmup = times.pairs(times.logit_normal(0.4, 1.0), equal=0.5), steps // 4

    def euler(params, x0, labels, n, key):
        return solvers.sample(velocity, params, x0, labels, method=solvers.fixed(n, EULER))

    def jumps(params, x0, labels, n, key):
        return solvers.sample_flow_map(model, params, x0, labels, steps=n)

    def to_data(params, x0, labels, n, key):
        return solvers.sample_flow_map(
            solvers.consistency_map(velocity), params, x0, labels, steps=n, renoise=1.0, key=key
        )

    def anchored(params, x0, labels, n, key):
        return solvers.sample_flow_map(model, params, x0, labels, steps=n, renoise=1.0, key=key)

    grid = losses.grid_steps(solvers.grids.uniform, 64)
    distilled = losses.consistency_training(
        velocity, steps=grid, teacher=velocity, advance=losses.heun_step
    )
    easy = losses.consistency_training(velocity, steps=losses.easy_steps(max(1, steps // 8)))
    return {
        "teacher": Job(dropping(losses.flow_matching(velocity)), euler, (*COUNTS, 20), fresh=True),
        "MeanFlow": Job(
            dropping(losses.mean_flow(model, times=pairs)), jumps, fresh=True, is_flow_map=True
        ),
        "improved MeanFlow": Job(
            dropping(losses.improved_mean_flow(model, times=pairs)),
            jumps,
            fresh=True,
            is_flow_map=True,
        ),
        "shortcut": Job(
            dropping(losses.shortcut(model, levels=4)), jumps, fresh=True, is_flow_map=True
        ),
        "consistency training, easy": Job(easy, to_data, fresh=True, counting=True),
        "consistency distillation": Job(distilled, to_data),
        "sCM": Job(
            losses.trigflow_consistency(velocity, teacher=velocity, data_std=0.5, warmup=warmup),
            to_data,
            counting=True,
        ),
        "FACM": Job(
            losses.anchored_consistency(model, teacher=velocity), anchored, is_flow_map=True
        ),
        "AYF, Eulerian": Job(
            dropping(losses.eulerian_map_distillation(model, velocity, warmup=warmup)),
            jumps,
            is_flow_map=True,
            counting=True,
        ),
        "AYF, Lagrangian": Job(
            dropping(losses.lagrangian_map_distillation(model, velocity, warmup=warmup)),
            jumps,
            is_flow_map=True,
            counting=True,
        ),
        "TraFlow": Job(
            dropping(losses.trajectory_distillation(model, velocity)), jumps, is_flow_map=True
        ),
        "MDT-dist": Job(
            dropping(
                losses.marginal_transport(velocity, velocity, tangent=losses.normalized_tangent())
            ),
            to_data,
        ),
        "PeRFlow": Job(
            dropping(
                losses.perflow(velocity, velocity, time=times.sequential(WINDOWS, starts=0.75))
            ),
            euler,
            counts=(4,),
        ),
        "2-rectified": Job(dropping(losses.flow_matching(velocity)), euler, pairs="teacher"),
        "2-rectified, distilled": Job(
            losses.distillation(velocity), euler, counts=(1,), pairs="2-rectified"
        ),
        "InstaFlow: guided pairs": Job(losses.flow_matching(velocity), euler, pairs="guided"),
        "InstaFlow: distilled": Job(
            losses.distillation(velocity), euler, counts=(1,), pairs="InstaFlow: guided pairs"
        ),
    }


def images(args):
    """Training and test rows {'x' [n, h, w, 1] in [-1, 1], 'cond' [n]}."""
    if args.mnist is None:
        splits, top = data.digits(), 16
        train_rows, test = splits.train, splits.test
    else:
        splits, top = data.mnist(args.mnist), 255
        train_rows, test = splits.train, data.take(splits.test, np.arange(1000))
    scaled = []
    for part in (train_rows, test):
        x = np.asarray(part["x"], np.float32)
        if args.mnist is not None:  # the mean of every 2 x 2 pixels
            x = x.reshape(len(x), 14, 2, 14, 2, 1).mean(axis=(2, 4))
        scaled.append({"x": x / (top / 2) - 1, "cond": np.asarray(part["cond"])})
    return scaled


def judge_of(rows, test):
    """x with the test rows' labels -> {agreement, energy}: as in
    experiments/digits_rectified_flow."""
    flat = lambda x: np.asarray(x, np.float64).reshape(len(x), -1)  # noqa: E731
    rng = np.random.default_rng(0)
    some = rng.permutation(len(rows["x"]))[:10_000]
    classifier = SVC(gamma="scale", C=10.0).fit(flat(rows["x"][some]), rows["cond"][some])
    subsets = [rng.choice(len(rows["x"]), len(test["x"]), replace=False) for _ in range(20)]
    floor = np.mean([metrics.energy_distance(rows["x"][i], test["x"]) for i in subsets])

    def judge(x):
        return {
            "agreement": float(classifier.score(flat(x), test["cond"])),
            "energy": metrics.energy_distance(x, test["x"]) / float(floor),
        }

    return judge


def fitted(net, job: Job, rows, trained, args):
    """Averaged params after args.steps updates."""
    x, labels = jnp.zeros((1, *rows["x"].shape[1:])), jnp.zeros(1, int)
    init_key, train_key = jax.random.split(jax.random.key(args.seed))
    if job.is_flow_map:
        params = jflow.flow_map(net).init(init_key, x, jnp.zeros(1), jnp.zeros(1), labels)
    else:
        params = jflow.velocity(net).init(init_key, x, jnp.zeros(1), labels)
    frozen = {"step": jnp.zeros((), jnp.int32)} if job.counting else {}
    if not job.fresh:
        source = job.pairs if job.pairs in trained else "teacher"
        frozen["teacher"] = trained["teacher"]
        params = train.warm_start(params, trained[source])
    schedule = optax.cosine_decay_schedule(args.rate, args.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    average = train.ema.warmup(0.998)
    refresh = losses.count_steps if job.counting else None
    fit = train.fit(
        train.init_state(params, optimizer, train_key, ema=average, frozen=frozen),
        train.make_step(job.loss, optimizer, ema=average, refresh=refresh),
        data.batches(rows, min(args.batch, len(rows["x"])), seed=args.seed),
        steps=args.steps,
        inner=math.gcd(args.steps, 20),
        log_every=args.steps,
        progress=True,
    )
    return fit.state.ema


def paired(net, of: str, trained, rows, args):
    """{'x0', 'x', 'cond'}: 20 steps of Heun from noise, labels as often as in the data."""
    velocity, params = jflow.velocity(net), trained["teacher" if of == "guided" else of]
    velocity = guidance.cfg(velocity, args.scale, null=CLASSES) if of == "guided" else velocity
    carry = jax.jit(lambda x0, labels: solvers.sample(velocity, params, x0, labels, method=20)[0])
    rng, parts = np.random.default_rng(args.seed), []
    for i in range(0, args.pairs, 1000):
        n = min(1000, args.pairs - i)
        x0 = rng.standard_normal((n, *rows["x"].shape[1:])).astype(np.float32)
        labels = rng.choice(rows["cond"], n)
        parts.append({"x0": x0, "x": np.asarray(carry(x0, labels)), "cond": labels})
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def judged(job: Job, params, test, judge):
    x0 = jax.random.normal(jax.random.key(1), test["x"].shape)
    samples = {}

    def draw(n):
        x, info = jax.jit(lambda x0, labels, key: job.draw(params, x0, labels, n, key))(
            x0, test["cond"], jax.random.key(2)
        )
        samples[str(n)] = np.asarray(x[:40])
        return jnp.clip(x, -1, 1), info

    return metrics.quality_by_evaluations(draw, judge, job.counts), samples


def report(done, judge, rows, test, args) -> None:
    print(
        f"\n{'':28s}"
        + "".join(f"{f'{n}: agreement, energy':>24s}" for n in (*COUNTS, 20))
        + f"{'seconds':>9s}"
    )
    real = judge(replay(rows, test))
    print(f"{'training images':28s}{real['agreement']:>16.1%}{real['energy']:8.2f}")
    for row in done:
        cells = {round(f["evaluations"]): f for f in row["found"]}
        text = [
            f"{cells[n]['agreement']:.1%}{cells[n]['energy']:8.2f}" if n in cells else ""
            for n in (*COUNTS, 20)
        ]
        print(
            f"{row['method']:28s}" + "".join(f"{t:>24s}" for t in text) + f"{row['seconds']:9.0f}"
        )
    picture([row["method"] for row in done], args.out)


def replay(rows, test):
    """For each test label a training image of its class."""
    rng = np.random.default_rng(0)
    return rows["x"][[rng.choice(np.flatnonzero(rows["cond"] == c)) for c in test["cond"]]]


def picture(names, out: Path) -> None:
    """samples.png: a method a row, ten images for each of its numbers of evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(names), len(COUNTS), figsize=(9, 0.42 * len(names) + 0.3), squeeze=False
    )
    for line, name in zip(axes, names, strict=True):
        samples = np.load(out / f"{name}.npz")
        for ax, n in zip(line, map(str, COUNTS), strict=True):
            ax.axis("off")
            if n in samples:
                ax.imshow(
                    np.concatenate(samples[n][:10, :, :, 0], axis=1), cmap="gray", vmin=-1, vmax=1
                )
        line[0].text(
            -0.05, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=7
        )
    for ax, n in zip(axes[0], COUNTS, strict=True):
        ax.set_title(f"{n} evaluation{'s' * (n > 1)}", fontsize=8)
    figure.subplots_adjust(0.2, 0.01, 0.99, 0.95, 0.03, 0.1)
    figure.savefig(out / "samples.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
