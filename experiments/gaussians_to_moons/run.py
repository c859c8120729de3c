"""Eight Gaussians to two moons: W2 after 1, 4 and 100 Euler steps by coupling, beside torchcfm's
loop in the same run.

    python experiments/gaussians_to_moons/run.py --torch-python PATH --workdir DIR
    python experiments/gaussians_to_moons/run.py --conditional --workdir DIR
    python experiments/gaussians_to_moons/run.py --short

PATH is the Python of an environment with torch, POT and torchcfm; without it jflow alone is
measured. Each training, 20k steps of 256 rows of an MLP of 3 x 64, is a line of DIR/results.jsonl
as soon as it is done; those there already are not run again. The two libraries take turns, seed by
seed, so that what else the machine does meets both. Seconds are of the whole training, compilation
included. README.md has the results.
"""

import argparse
import functools
import json
import subprocess
import tempfile
import time
from pathlib import Path

import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jflow
from jflow import couplings, losses, metrics, nets, solvers, train

EULER = (1, 4, 100)


class Net(nn.Module):
    """torchcfm's network: x, t (and cond) side by side into 3 x 64 SELU units."""

    @nn.compact
    def __call__(self, x, t, cond=None):
        cond = t[:, None] if cond is None else jnp.concatenate([t[:, None], cond], axis=1)
        return nn.Dense(2)(nets.MLP((64, 64, 64), nn.selu)(x, cond))


def points(key, n, variance=0.1, moon=None):
    """Eight Gaussians at radius 5 [n, 2]; two moons of noise 0.2, times 3 minus 1 [n, 2]; and which
    moon, 0 or 1 [n]."""
    uniform_key, normal_key = jax.random.split(key)
    u = jax.random.uniform(
        uniform_key, (n, 3)
    )  # few draws: the network is so small that they count
    z = jax.random.normal(normal_key, (n, 4))
    angle = jnp.floor(8 * u[:, 0]) * (jnp.pi / 4)
    x0 = 5 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1) + jnp.sqrt(variance) * z[:, :2]
    label = jnp.floor(2 * u[:, 1]).astype(jnp.int32) if moon is None else jnp.full(n, moon)
    turn = jnp.pi * u[:, 2]
    upper = jnp.stack([jnp.cos(turn), jnp.sin(turn)], axis=1)
    lower = jnp.stack([1 - jnp.cos(turn), 0.5 - jnp.sin(turn)], axis=1)
    return x0, 3 * (jnp.where(label[:, None] == 0, upper, lower) + 0.2 * z[:, 2:]) - 1, label


def no_condition(x1, label):
    return {}


def by_moon(x1, label):
    return {"cond": 2.0 * label[:, None] - 1}


def by_coordinate(x1, label):
    return {"cond": x1[:, :1]}


def fitted(coupling, seed, args, condition=no_condition):
    """(sample(x0, cond, steps), seconds, seconds after the first visit of the host, last loss)."""

    def batches(state, key):
        x0, x1, label = points(key, args.batch, args.variance)
        return {"x": x1, "x0": x0} | condition(x1, label)

    start = time.perf_counter()
    velocity, optimizer = jflow.velocity(Net()), optax.adam(1e-3)
    init_key, train_key = jax.random.split(jax.random.key(seed))
    first = batches(None, init_key)
    params = velocity.init(init_key, first["x"], jnp.zeros(args.batch), first.get("cond"))
    loss = losses.chain(couplings.pair(coupling), losses.flow_matching(velocity))
    step = train.make_step(loss, optimizer)
    state = train.init_state(params, optimizer, train_key)
    inner = min(args.inner, args.steps)
    fit = train.fit(
        state, step, batches, steps=args.steps, inner=inner, log_every=inner, progress=False
    )
    jax.block_until_ready(fit.state.params)
    seconds = time.perf_counter() - start
    rows = fit.history
    steady = (
        (rows[-1]["time"] - rows[0]["time"])
        / max(1, rows[-1]["step"] - rows[0]["step"])
        * args.steps
    )

    @functools.partial(jax.jit, static_argnames="steps")
    def sample(x0, cond, steps):
        return solvers.sample(
            velocity, fit.state.params, x0, cond, method=solvers.fixed(steps, diffrax.Euler())
        )[0]

    return sample, seconds, steady, rows[-1]["loss"]


def test_points(seed, args, moon=None):
    """Sources, targets with their labels, and as many other targets for the floor."""
    keys = jax.random.split(jax.random.key(10_000 + seed))
    (x0, x1, label), (_, other, _) = (points(key, args.points, args.variance, moon) for key in keys)
    return x0, x1, label, other


def unconditional(args, couplings_of, done):
    """One line for each library, coupling and seed."""
    for seed in range(args.seeds):
        x0, x1, _, other = test_points(seed, args)
        for name, coupling in couplings_of.items():
            if ("jflow", name, seed) not in done:
                sample, seconds, steady, loss = fitted(coupling, seed, args)
                w2 = {str(k): metrics.wasserstein(sample(x0, None, steps=k), x1) for k in EULER}
                w2["floor"] = metrics.wasserstein(other, x1)
                yield {
                    "library": "jflow",
                    "coupling": name,
                    "seed": seed,
                    "w2": w2,
                    "seconds": seconds,
                } | {
                    "steady_seconds": steady,
                    "loss": loss,
                }
            if (
                args.torch_python
                and ("torchcfm", name, seed) not in done
                and name in args.torch_couplings
            ):
                yield torchcfm(name, seed, args, x0, x1)


def torchcfm(name, seed, args, x0, x1):
    with tempfile.TemporaryDirectory() as folder:
        points, made = f"{folder}/points.npz", f"{folder}/made.npz"
        np.savez(points, x0=x0)
        script = str(Path(__file__).with_name("torchcfm_run.py"))
        options = {
            "coupling": name,
            "seed": seed,
            "steps": args.steps,
            "batch": args.batch,
            "variance": args.variance,
        }
        flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        command = [args.torch_python, script, *flags, "--points", points, "--out", made]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(f"torchcfm_run.py failed: {ran.stderr.strip()[-2000:]}")
        samples = np.load(made)
        w2 = {k: metrics.wasserstein(samples[k], x1) for k in samples.files}
    return {"library": "torchcfm", "coupling": name, "seed": seed, "w2": w2} | json.loads(
        ran.stdout.splitlines()[-1]
    )


def conditional(args, done):
    """W2 given the moon (the mean over both, all sources under each), and of (x, cond) together
    given a coordinate."""
    kinds = {
        "independent": (couplings.independent(),) * 2,
        "exact": (couplings.optimal_transport(),) * 2,
        "aware": (
            couplings.optimal_transport(couplings.within_class()),
            couplings.optimal_transport(couplings.near_condition()),
        ),
    }
    for seed in range(args.seeds):
        for name, (for_class, for_coordinate) in kinds.items():
            if ("jflow", f"{name}, by moon", seed) not in done:
                sample, seconds, _, loss = fitted(for_class, seed, args, by_moon)
                w2 = {}
                for k in EULER:
                    each = []
                    for moon in (0, 1):
                        x0, x1, label, other = test_points(seed, args, moon)
                        each.append(
                            metrics.wasserstein(sample(x0, by_moon(x1, label)["cond"], steps=k), x1)
                        )
                    w2[str(k)] = float(np.mean(each))
                w2["floor"] = metrics.wasserstein(other, x1)
                yield row(f"{name}, by moon", seed, w2, seconds, loss)
            if ("jflow", f"{name}, by coordinate", seed) not in done:
                sample, seconds, _, loss = fitted(for_coordinate, seed, args, by_coordinate)
                x0, x1, _, other = test_points(seed, args)
                data = np.concatenate([x1, x1[:, :1]], axis=1)
                cond = other[:, :1]  # conditions of rows that are not those compared with
                made = {
                    str(k): np.concatenate([sample(x0, cond, steps=k), cond], axis=1) for k in EULER
                }
                w2 = {k: metrics.wasserstein(rows, data) for k, rows in made.items()}
                w2["floor"] = metrics.wasserstein(np.concatenate([other, cond], axis=1), data)
                yield row(f"{name}, by coordinate", seed, w2, seconds, loss)


def row(name, seed, w2, seconds, loss):
    return {
        "library": "jflow",
        "coupling": name,
        "seed": seed,
        "w2": w2,
        "seconds": seconds,
        "loss": loss,
    }


def table(rows):
    """Mean and standard error over seeds, and the seconds beside torchcfm's of the same coupling
    (OT: exact)."""
    groups = {}
    for r in rows:
        groups.setdefault((r["library"], r["coupling"]), []).append(r)
    seconds = {key: np.median([r["seconds"] for r in found]) for key, found in groups.items()}
    print(
        f"{'':32s}{'seeds':>6s}"
        + "".join(f"{k:>18s}" for k in ("1 step", "4 steps", "100 steps", "floor")),
        end="",
    )
    print(f"{'seconds':>9s}{'torchcfm / jflow':>18s}")
    for (library, name), found in groups.items():
        print(f"{library + ' ' + name:32s}{len(found):6d}", end="")
        for k in (*map(str, EULER), "floor"):
            values = [r["w2"][k] for r in found if k in r["w2"]]
            error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
            print(f"{np.mean(values):9.3f} +-{error:6.3f}" if values else f"{'':18s}", end="")
        peer = seconds.get(("torchcfm", "independent" if name == "independent" else "exact"))
        ratio = f"{peer / seconds[library, name]:18.2f}" if peer and library == "jflow" else ""
        print(f"{seconds[library, name]:9.1f}{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, help="where results.jsonl goes; nowhere without it")
    parser.add_argument(
        "--torch-python", help="a Python with torch, POT and torchcfm, to run its loop in turn"
    )
    parser.add_argument(
        "--torch-couplings",
        nargs="+",
        default=["independent", "exact"],
        help="also: sinkhorn (slow)",
    )
    parser.add_argument(
        "--couplings",
        nargs="+",
        default=["independent", "exact", "sinkhorn", "sinkhorn, likeliest"],
        help="also: stable",
    )
    parser.add_argument(
        "--conditional", action="store_true", help="given the moon, or the horizontal coordinate"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--points", type=int, default=2000, help="for W2")
    parser.add_argument(
        "--variance", type=float, default=0.1, help="of each Gaussian (torchcfm's helper: 0.316)"
    )
    parser.add_argument("--epsilon", type=float, default=0.01, help="of Sinkhorn, relative")
    parser.add_argument(
        "--inner", type=int, default=500, help="updates between two visits of the host"
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="for CI: 40 steps of 64 rows, 100 points, 2 seeds, with --conditional one",
    )
    args = parser.parse_args()
    if args.short:
        args.seeds = 1 if args.conditional else 2
        args.steps, args.inner, args.batch, args.points = 40, 20, 64, 100
    results = args.workdir and args.workdir / "results.jsonl"
    rows = []
    if results and results.exists():
        rows = [json.loads(line) for line in results.read_text().splitlines()]
    done = {(r["library"], r["coupling"], r["seed"]) for r in rows}
    plain = {"independent": couplings.independent(), "exact": couplings.optimal_transport()}
    plain["sinkhorn"] = couplings.sinkhorn(args.epsilon)
    plain["sinkhorn, likeliest"] = couplings.sinkhorn(
        args.epsilon, draw=couplings.most_likely_permutation
    )
    plain["stable"] = couplings.stable_matching()
    plain = {name: plain[name] for name in args.couplings}
    for new in conditional(args, done) if args.conditional else unconditional(args, plain, done):
        rows.append(new)
        print(json.dumps(new), flush=True)
        if results:
            args.workdir.mkdir(parents=True, exist_ok=True)
            with open(results, "a") as file:
                file.write(json.dumps(new) + "\n")
    table(rows)


if __name__ == "__main__":
    main()
