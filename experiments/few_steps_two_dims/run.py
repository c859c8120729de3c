"""Every way to sample in few evaluations, on three sets in the plane at one training budget: a
table of W2, and pictures.

    # 35 minutes of processor time a set
    python experiments/few_steps_two_dims/run.py --out runs/few
    python experiments/few_steps_two_dims/run.py --out runs/few --sets moons --methods teacher sCM
    # CI: numbers mean nothing
    python experiments/few_steps_two_dims/run.py --out runs/short --short

Five seeds are trained side by side, in one program. Each method is a line of OUT/results.jsonl as
soon as it is done, and is not trained again when the command is repeated; its params are kept for
those that start from them. At the end, or with --report alone, the tables are printed and
OUT/SET.png shows the samples of the first seed. README.md has the results.
"""

import argparse
import functools
import json
import math
import pickle
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from methods import Job, jobs, velocity
from tqdm import tqdm

from jflow import data, metrics, solvers, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SETS = {"eight": data.eight_gaussians, "checkerboard": data.checkerboard, "moons": data.moons}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results and pictures")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument(
        "--methods", nargs="+", help="names as in the tables; all of them without it"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5000, help="updates of every training")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument(
        "--rate", type=float, default=2e-3, help="learning rate, falling to 0 along a cosine"
    )
    parser.add_argument("--rows", type=int, default=20_000, help="of data, and pairs of a teacher")
    parser.add_argument("--points", type=int, default=1000, help="for W2")
    parser.add_argument("--report", action="store_true", help="print what there is, train nothing")
    parser.add_argument(
        "--short", action="store_true", help="2 seeds, 20 steps, one set, a few methods"
    )
    args = parser.parse_args()
    if args.short:
        args.seeds, args.steps, args.rows, args.points, args.sets = 2, 20, 512, 64, ["moons"]
        args.methods = args.methods or [
            "teacher",
            "MeanFlow",
            "sCM",
            "PeRFlow",
            "2-rectified",
            "distribution matching",
        ]
    todo = jobs(args.steps)
    if unknown := sorted(set(args.methods or []) - set(todo)):
        parser.error(f"unknown methods {unknown}; there are {list(todo)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.sets:
        folder = args.out / name
        folder.mkdir(exist_ok=True)
        if not args.report:
            train_all(folder, SETS[name], todo, args)
        report(folder, name, todo)


def train_all(folder: Path, make, todo: dict[str, Job], args) -> None:
    """Train what is wanted and not there yet; every job's lines and params are written when it is
    done."""
    settings = {k: getattr(args, k) for k in ("seeds", "steps", "batch", "rate", "rows", "points")}
    if (folder / "settings.json").exists() and json.loads(
        (folder / "settings.json").read_text()
    ) != settings:
        raise SystemExit(
            f"{folder} was made with other settings: {(folder / 'settings.json').read_text()}"
        )
    (folder / "settings.json").write_text(json.dumps(settings))
    real = seeds_of(lambda seed: standard(make, args.rows, 100 + seed), args)
    fresh = seeds_of(lambda seed: standard(make, args.points, 200 + seed), args)
    again = seeds_of(lambda seed: standard(make, args.points, 300 + seed), args)
    done, trained, pairs = set(rows_of(folder)), {}, {}
    if "floor" not in done:
        write(
            folder,
            "floor",
            [{"evaluations": 0, "w2": [w2(a, b) for a, b in zip(fresh, again, strict=True)]}],
            0,
            0,
        )
    for name, job in todo.items():
        file = folder / f"{name}.pickle"
        if name in done and file.exists():
            trained[name] = pickle.loads(file.read_bytes())
            continue
        if args.methods and name not in args.methods and name != "teacher":
            continue
        start = time.perf_counter()
        if job.pairs_of is None:
            rows = {"x": real}
        else:
            if job.pairs_of not in trained:
                raise SystemExit(f"{name} needs {job.pairs_of!r}: train it too")
            if job.pairs_of not in pairs:
                pairs[job.pairs_of] = paired(trained[job.pairs_of], args)
            rows = cut(pairs[job.pairs_of], job.truncate)
        params, loss = fitted(f"{folder.name}, {name}", job, rows, trained, args)
        trained[name] = params
        seconds = time.perf_counter() - start
        found, samples = judged(job, params, fresh, args)
        if name == "teacher":
            more, many = judged(job._replace(counts=(100,)), params, fresh, args)
            found, samples = found + more, samples | many
        file.write_bytes(pickle.dumps(jax.device_get(params)))
        np.savez(folder / f"{name}.npz", **{str(n): x for n, x in samples.items()})
        write(folder, name, found, seconds, loss)


def standard(make, n: int, seed: int) -> np.ndarray:
    """n rows, divided by the standard deviation of the set (one number, from rows of their own)."""
    return make(n, seed)["x"] / make(100_000, 1)["x"].std()


def seeds_of(make, args):
    return jnp.asarray(np.stack([make(seed) for seed in range(args.seeds)]))


def paired(params, args) -> dict:
    """{'x0', 'x'} [seeds, rows, 2] of the ODE, 50 steps of Heun."""
    x0 = jax.random.normal(jax.random.key(7), (args.seeds, args.rows, 2))
    carry = jax.jit(jax.vmap(lambda p, x: solvers.sample(velocity, p, x, method=50)[0]))
    return {"x0": x0, "x": carry(params, x0)}


def cut(rows: dict, share: float) -> dict:
    if share == 0:
        return rows
    one = [
        data.truncate_pairs({k: np.asarray(v[i]) for k, v in rows.items()}, share)
        for i in range(len(rows["x"]))
    ]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *one)


def fitted(title: str, job: Job, rows: dict, trained: dict, args):
    """Averaged params of every seed, leaves [seeds, ...], and the mean of the last losses."""
    steps = job.longer * args.steps
    rate = optax.cosine_decay_schedule(args.rate, steps)
    adam = lambda factor: optax.chain(  # noqa: E731
        optax.clip_by_global_norm(1.0), optax.adam(lambda i: factor * rate(i))
    )
    optimizer = adam(1.0)
    if job.rate_factors:
        optimizer = optax.partition(
            {who: adam(f) for who, f in job.rate_factors.items()},
            {who: who for who in job.rate_factors},
        )
    average = train.ema.warmup(job.memory)

    def start(key, trained):
        init_key, train_key = jax.random.split(key)
        params = job.init(init_key, trained)
        return train.init_state(
            params, optimizer, train_key, ema=average, frozen=job.frozen(trained)
        )

    step = train.make_step(job.loss, optimizer, ema=average, refresh=job.refresh)

    def update(state, key, rows):
        at = jax.random.randint(key, (args.batch,), 0, rows["x"].shape[0])
        state, metrics = step(state, jax.tree.map(lambda leaf: leaf[at], rows))
        return state, metrics["loss"]

    @functools.partial(jax.jit, donate_argnums=0)
    def some(states, keys, rows):
        return jax.lax.scan(lambda s, key: jax.vmap(update)(s, key, rows), states, keys)

    state_key, batches_key = jax.random.split(jax.random.key(0))
    states = jax.vmap(start)(jax.random.split(state_key, args.seeds), trained)
    length = math.gcd(steps, 500)
    visits = jax.random.split(batches_key, (steps // length, length, args.seeds))
    with tqdm(total=steps, desc=title, disable=None) as bar:
        for keys in visits:
            states, losses = some(states, keys, rows)
            bar.update(length)
            bar.set_postfix(loss=f"{float(jnp.mean(losses)):.4g}")
    return states.ema, float(jnp.mean(losses))


def judged(job: Job, params, fresh, args):
    """For each count {'evaluations', 'failed', 'w2' of every seed}, and the first seed's samples by
    count."""
    x0 = jax.random.normal(jax.random.key(1), (args.seeds, args.points, 2))
    keys = jax.random.split(jax.random.key(2), args.seeds)
    found, samples = [], {}
    for n in job.counts:
        draw = jax.jit(jax.vmap(lambda params, x0, key, n=n: job.draw(params, x0, n, key)))
        x, info = jax.device_get(draw(params, x0, keys))
        good = [a[s == solvers.Status.OK] for a, s in zip(x, info.status, strict=True)]
        row = {
            "evaluations": int(info.evaluations.max()),
            "failed": float(np.mean(info.status != solvers.Status.OK)),
        }
        found.append(
            row
            | {
                "w2": [
                    w2(a, b[: len(a)]) if len(a) else math.nan
                    for a, b in zip(good, fresh, strict=True)
                ]
            }
        )
        samples[n] = x[0]
    return found, samples


def w2(a, b) -> float:
    return float(metrics.wasserstein(np.asarray(a), np.asarray(b)))


def write(folder: Path, name: str, found: list, seconds: float, loss: float) -> None:
    with open(folder / "results.jsonl", "a") as file:
        file.write(
            json.dumps({"method": name, "found": found, "seconds": seconds, "loss": loss}) + "\n"
        )


def rows_of(folder: Path) -> dict:
    """{method: its line of results.jsonl}"""
    file = folder / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {row["method"]: row for row in map(json.loads, lines)}


def report(folder: Path, title: str, todo: dict[str, Job]) -> None:
    """The table of W2 - floor, mean and standard error over seeds, and the picture."""
    found = rows_of(folder)
    if not found:
        return
    floor = np.asarray(found["floor"]["found"][0]["w2"])
    rows = {name: found[name] for name in todo if name in found}
    counts = (1, 2, 4, 8, 100)
    error = lambda x: np.std(x, ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan  # noqa: E731
    print(
        f"\n{title}: W2 of two sets of data {floor.mean():.3f} +- {error(floor):.3f}; W2 less that,"
        " by evaluations"
    )
    print(f"{'':36s}" + "".join(f"{n:>16d}" for n in counts) + f"{'seconds':>9s}")
    for name, row in rows.items():
        cells = {int(f["evaluations"]): np.asarray(f["w2"]) - floor for f in row["found"]}
        text = [
            f"{cells[n].mean():.3f} +- {error(cells[n]):.3f}" if n in cells else "" for n in counts
        ]
        print(
            f"{name:36s}" + "".join(f"{t:>16s}" for t in text) + f"{row['seconds']:9.0f}",
            flush=True,
        )
    picture(folder, list(rows), folder.parent / f"{title}.png")


def picture(folder: Path, names: list, file: Path) -> None:
    """Samples of the first seed: a panel for each method and number of evaluations, three methods a
    line."""
    counts, lines = ("1", "2", "4", "8"), math.ceil(len(names) / 3)
    best = np.load(folder / "teacher.npz")["100"]
    limits = np.stack([best.min(axis=0) - 0.2, best.max(axis=0) + 0.2], axis=1)
    figure = plt.figure(figsize=(12, 1.15 * lines))
    for i, (name, place) in enumerate(zip(names, np.ndindex(lines, 3), strict=False)):
        samples = np.load(folder / f"{name}.npz")
        for k, n in enumerate(counts):
            # a narrow empty column parts the three methods
            left, low = (place[1] * 4.3 + k + 0.02) / 12.6, 1 - (place[0] + 0.97) / lines
            ax = figure.add_axes((left, low, 0.97 / 12.6, 0.8 / lines), xticks=[], yticks=[])
            ax.set(xlim=limits[0], ylim=limits[1])
            if k == 0:
                ax.set_title(name, loc="left", fontsize=7, pad=2)
            if n not in samples:
                ax.axis("off")
                continue
            ax.scatter(*samples[n].T, s=0.5, c=f"C{i % 3}", linewidths=0)
            ax.text(0.03, 0.86, n, fontsize=6, transform=ax.transAxes)
    figure.savefig(file, dpi=75)
    plt.close(figure)


if __name__ == "__main__":
    main()
