r"""Linear inverse problems by a flow that was trained for none of them.

    python experiments/inverse_problems/run.py mixture --out runs/inverse  # a minute
    python experiments/inverse_problems/run.py digits --out runs/inverse  # 8x8, no download
    # 14x14, padded to 16x16
    python experiments/inverse_problems/run.py digits --out runs/inverse_mnist \
        --mnist DATA/images/mnist.npz
    python experiments/inverse_problems/run.py mixture --out runs/short --short  # CI
    python experiments/inverse_problems/run.py digits --out runs/short --short

`mixture`: a mixture of Gaussians with its exact velocity, two of four numbers measured with noise.
Every method's samples are compared with those of the posterior, which is known: the 2-Wasserstein
distance, the error of the mean and of the covariance, by noise and evaluations. `digits`: one flow,
trained on digits; inpainting, super-resolution and deblurring of held-out ones: PSNR, agreement of
a classifier with the true label, energy distance, at equal evaluations. Both print a table and keep
it in OUT; `digits` draws OUT/samples.png. README.md has the results.
"""

import argparse
import json
import math
import pickle
import time
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.svm import SVC
from tqdm import tqdm

import jflow
from jflow import data, losses, metrics, nets, oracles, solvers, steering, train
from jflow.steering import measurements

EULER = diffrax.Euler()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["mixture", "digits"])
    parser.add_argument("--out", type=Path, required=True, help="folder of tables and pictures")
    parser.add_argument("--mnist", help="mnist.npz; digits of 8x8 without it")
    parser.add_argument("--steps", type=int, default=4000, help="updates of the flow")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--evaluations", type=int, default=60, help="of each method, for digits")
    parser.add_argument("--std", type=float, default=0.1, help="of the noise in y, for digits")
    parser.add_argument("--rows", type=int, default=500, help="held-out digits, at most")
    parser.add_argument("--samples", type=int, default=8, help="of each digit, for their mean")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="seconds")
    args = parser.parse_args()
    if args.short:
        args.steps, args.width, args.evaluations, args.rows, args.samples = 20, 32, 6, 20, 2
    args.out.mkdir(parents=True, exist_ok=True)
    {"mixture": mixture, "digits": digits}[args.part](args)


def methods(
    velocity,
    params,
    measurement,
    std,
    n,
    *,
    chef,
    dps,
    pnp_step=1.0,
    pnp_power=1.0,
    rate=0.1,
    start=0.0,
    spread=1.0,
    pull=1.0,
):
    """Name -> (x0, y, key) -> (x1, info), each of about n evaluations.

    chef, dps, pnp_step and rate are sizes: of a step of FlowChef, of all steps of DPS together, of
    a step of PnP-Flow, which falls as (1 - t)^pnp_power, and of Adam in D-Flow. start: the time
    from which pseudoinverse_guidance goes, from a data-consistent source, with r^2 as of data of
    the variance spread. pull: the scale of data_consistency, a number or a function of t.
    """
    method = solvers.fixed(n, EULER)

    def variance(t):
        return spread * (1 - t) ** 2 / (spread * t**2 + (1 - t) ** 2)

    def steered(make, t0=0.0):
        v = make(velocity)

        def run(x0, y, key):
            if t0:
                x0 = steering.consistent_source(measurement, x0, y, t0, ridge=std**2)
            return steering.sample_inverse(v, params, x0, measurement, y, method=method, t0=t0)

        return run

    def pnp(x0, y, key):
        return steering.pnp_flow(
            velocity, params, key, measurement, y, steps=n, step_size=pnp_step, power=pnp_power
        )

    def flower(spread):
        def run(x0, y, key):
            return steering.flower(
                velocity, params, x0, key, measurement, y, std, steps=n, spread=spread
            )

        return run

    def source(x0, y, key):  # (3 k + 1) solves of m steps
        m = max(2, round(math.sqrt(n / 15)))
        k = max(1, round((n / m - 1) / 3))
        return steering.d_flow(
            velocity,
            params,
            x0,
            measurement,
            y,
            steps=k,
            optimizer=optax.adam(rate),
            method=solvers.fixed(m, EULER),
        )

    def plain(x0, y, key):
        x1, info = solvers.sample(velocity, params, x0, method=method)
        return x1, info

    norm, square = steering.residual_norm(measurement), steering.squared_residual(measurement)
    return {
        "plain sampler": plain,
        "pseudoinverse_guidance": steered(
            lambda v: steering.pseudoinverse_guidance(v, measurement, std, variance=variance), start
        ),
        "data_consistency": steered(
            lambda v: steering.data_consistency(v, measurement, std, scale=pull)
        ),
        "data_consistency, std 0": steered(lambda v: steering.data_consistency(v, measurement)),
        "loss_guidance (DPS)": steered(lambda v: steering.loss_guidance(v, norm, dps)),
        "flow_chef": steered(lambda v: steering.flow_chef(v, square, chef * n)),
        "pnp_flow": pnp,
        "flower": flower(0.0),
        "flower, spread 1": flower(1.0),
        "d_flow": source,
    }


def identity_slope(t):
    """The scale of data_consistency that takes the slope of the prediction, d x1 / d x, for 1."""
    return (t**2 + (1 - t) ** 2) / jnp.maximum(t, 0.02)


# --- a mixture of Gaussians, whose posterior is known ----------------------------------------


def mixture(args) -> None:
    d, count, rows = 4, 4, 20 if args.short else 400
    counts, stds = ([6], [0.5]) if args.short else ([10, 30, 100], [0.1, 0.5])
    rng = np.random.default_rng(args.seed)
    weights = np.array([0.5, 0.3, 0.2])
    means = 1.5 * rng.normal(size=(3, d))
    covs = np.stack([c @ c.T / 6 + 0.05 * np.eye(d) for c in rng.normal(size=(3, d, d))])
    a = np.linalg.qr(rng.normal(size=(d, 2)))[0].T
    oracle, seen = oracles.mixture(weights, means, covs), measurements.matrix(a)
    velocity = oracles.as_velocity(oracle)
    truth = np.asarray(oracle.sample(jax.random.key(args.seed), count))
    noise = rng.normal(size=(count, 2))
    found: list[dict] = []
    began = time.process_time()
    for std in stds:
        y = truth @ a.T + std * noise
        exact = [posterior(weights, means, covs, a, std, one, 2 * rows, rng) for one in y]
        floor = np.mean([metrics.wasserstein(x[:rows], x[rows:]) for x in exact])
        found.append({"std": std, "method": "two sets of the posterior", "W2": floor})
        x0 = rng.normal(size=(count * rows, d)).astype(np.float32)
        ys = np.repeat(y, rows, axis=0).astype(np.float32)
        for n in counts:
            todo = methods(velocity, {}, seen, std, n, chef=0.2, dps=8.0)
            for name, run in todo.items():
                key = jax.random.key(1)
                x1, info = jax.device_get(jax.jit(run)(x0, ys, key))
                errors = [
                    compared(mine, other[:rows])
                    for mine, other in zip(x1.reshape(count, rows, d), exact, strict=True)
                ]
                w2, mean, cov = np.mean(errors, axis=0)
                row = {"std": std, "method": name, "n": n, "W2": w2, "mean": mean, "cov": cov}
                row["evaluations"] = int(info.evaluations[0])
                if hasattr(info, "norm"):
                    row["residual"] = float(np.mean(info.norm**2 / 2) ** 0.5)  # of each number
                found.append(row)
        print(f"std {std}: {time.process_time() - began:.0f} s of CPU time", flush=True)
    (args.out / "mixture.json").write_text(json.dumps(found, indent=1))
    for std in stds:
        floor = next(float(r["W2"]) for r in found if r["std"] == std)
        print(f"\nstd {std}: W2 of two sets of the posterior {floor:.3f}")
        print(f"{'':26s}" + "".join(f"{f'{n}: W2, mean, cov':>26s}" for n in counts))
        for name in todo:
            cells = [r for r in found if (r["std"], r["method"]) == (std, name)]
            text = "".join(f"{r['W2']:12.3f}{r['mean']:7.3f}{r['cov']:7.3f}" for r in cells)
            print(f"{name:26s}{text}   residual {cells[-1].get('residual', math.nan):.3f}")


def posterior(weights, means, covs, a, std, y, n, rng):
    """n rows of the mixture given y."""
    spread = a @ covs @ a.T + std**2 * np.eye(len(a))
    gain = covs @ a.T @ np.linalg.inv(spread)
    away = y - means @ a.T
    log_w = np.log(weights) - 0.5 * (
        np.einsum("ki,kij,kj->k", away, np.linalg.inv(spread), away) + np.linalg.slogdet(spread)[1]
    )
    p = np.exp(log_w - log_w.max())
    picked = rng.choice(len(p), n, p=p / p.sum())
    root = np.linalg.cholesky(covs - gain @ a @ covs)
    center = means + np.einsum("kij,kj->ki", gain, away)
    return center[picked] + np.einsum(
        "nij,nj->ni", root[picked], rng.normal(size=(n, len(means[0])))
    )


def compared(x, y):
    """W2, the error of the mean, and that of the covariance."""
    return (
        metrics.wasserstein(x, y),
        np.linalg.norm(x.mean(0) - y.mean(0)),
        np.linalg.norm(np.cov(x.T) - np.cov(y.T)),
    )


# --- digits ----------------------------------------------------------------------------------


def digits(args) -> None:
    rows, test = images(args)
    params, velocity = fitted(rows, args)
    side = rows["x"].shape[1]
    judge = judge_of(rows, test)
    event = rows["x"].shape[1:]
    hidden = np.ones(event, bool)
    middle = slice(side // 4, side - side // 4)
    hidden[middle, middle] = False
    at = np.arange(-2, 3)
    bell = np.exp(-0.5 * (at / (side / 8)) ** 2)
    kernel = np.outer(bell, bell) / bell.sum() ** 2
    problems = {
        "inpainting": measurements.mask(hidden),
        "super-resolution": measurements.downsample(4, event),
        "deblurring": measurements.blur(kernel, event),
    }
    if args.short:
        problems = {"super-resolution": problems["super-resolution"]}
    # found on 150 digits of MNIST that are neither trained on nor reported on
    sizes = {
        "inpainting": {"chef": 0.2, "pnp_step": 1.0, "pnp_power": 0.1},
        "super-resolution": {"chef": 4.0, "pnp_step": 16.0, "pnp_power": 0.1},  # |A|^2 is 1 / 16
        "deblurring": {"chef": 1.0, "pnp_step": 4.0, "pnp_power": 0.5, "rate": 0.35, "pull": 2.0},
    }
    common = {"dps": 60.0, "rate": 0.2, "start": 0.1, "spread": 0.1, "pull": identity_slope}
    truth = jnp.asarray(test["x"])
    draws = jax.random.split(jax.random.key(1), args.samples)
    table, pictures = [], {}
    real = judge(test["x"])
    print(f"held-out digits: agreement {real['agreement']:.1%}, energy {real['energy']:.2f}")
    for problem, seen in problems.items():
        clean = seen.apply(truth)
        noise = args.std * jax.random.normal(jax.random.key(2), clean.shape)
        y = measurements.mask(hidden).apply(noise) if problem == "inpainting" else noise
        y = clean + y
        made = {
            "measurement, pseudo-inverse": ([seen.pseudo_inverse(y)], 0),
            "Gaussian, posterior mean": ([gaussian_mean(rows["x"], seen, y, args.std)], 0),
        }
        todo = methods(
            velocity,
            params,
            seen,
            args.std,
            args.evaluations,
            **{**common, **sizes[problem]},
        )
        del todo["plain sampler"], todo["flower, spread 1"]
        for name, run in tqdm(todo.items(), desc=problem, unit="method"):
            made[name] = samples_of(run, event, y, draws)
        for name, (samples, evaluations) in made.items():
            samples = np.clip(np.asarray(samples), -1, 1)
            row = {"problem": problem, "method": name, "evaluations": evaluations}
            for of, x in (("", samples[0]), ("mean_", samples.mean(axis=0))):
                error = np.mean((x - test["x"]) ** 2, axis=(1, 2, 3))
                found = {**judge(x), "psnr": float(np.mean(10 * np.log10(4 / error)))}
                row |= {of + measure: value for measure, value in found.items()}
            away = seen.apply(jnp.asarray(samples[0])) - y
            row["residual"] = float(jnp.sqrt(jnp.mean(away**2)))
            table.append(row)
            pictures[problem, name] = samples[0][:8]
        pictures[problem, "truth"] = test["x"][:8]
    (args.out / "digits.json").write_text(json.dumps(table, indent=1))
    for problem in problems:
        print(
            f"\n{problem:30s}{'PSNR':>8s}{'agreement':>11s}{'energy':>8s}{'residual':>10s}{'n':>5s}"
            f"   mean of {args.samples}: PSNR  agreement"
        )
        for r in table:
            if r["problem"] == problem:
                print(
                    f"{r['method']:30s}{r['psnr']:8.2f}{r['agreement']:11.1%}{r['energy']:8.2f}"
                    f"{r['residual']:10.3f}{r['evaluations']:5d}"
                    f"{r['mean_psnr']:17.2f}{r['mean_agreement']:11.1%}"
                )
    draw(pictures, list(problems), args.out / "samples.png")


def samples_of(run, event, y, keys):
    """A method's samples of every measurement, one a key, and evaluations of one."""
    run, samples = jax.jit(run), []
    for key in keys:
        source_key, own_key = jax.random.split(key)
        x0 = jax.random.normal(source_key, (len(y), *event))
        x, info = jax.device_get(run(x0, y, own_key))
        samples.append(x)
    return samples, int(info.evaluations[0])


def images(args):
    """Training and test rows {'x' [n, h, w, 1] in [-1, 1], 'cond' [n]}."""
    if args.mnist is None:
        splits, top = data.digits(), 16
    else:
        splits, top = data.mnist(args.mnist), 255
    scaled = []
    for part, most in ((splits.train, 20_000), (splits.test, args.rows)):
        part = data.take(part, np.arange(min(most, len(part["x"]))))
        x = np.asarray(part["x"], np.float32)
        if args.mnist is not None:  # the mean of every 2 x 2 pixels, and a frame of 1
            x = x.reshape(len(x), 14, 2, 14, 2, 1).mean(axis=(2, 4))
            x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        scaled.append({"x": x / (top / 2) - 1, "cond": np.asarray(part["cond"])})
    return scaled


def fitted(rows, args):
    """Averaged params of a flow without conditions, kept in OUT for the next time."""
    velocity = jflow.velocity(nets.ResidualMLP(args.width, 3))
    kept = args.out / f"params-{args.width}-{args.steps}-{args.seed}.pickle"
    if kept.exists():
        return pickle.loads(kept.read_bytes()), velocity
    init_key, train_key = jax.random.split(jax.random.key(args.seed))
    x = {"x": rows["x"]}
    params = velocity.init(init_key, jnp.zeros((1, *rows["x"].shape[1:])), jnp.zeros(1))
    schedule = optax.cosine_decay_schedule(1e-3, args.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    average = train.ema.warmup(0.998)
    began = time.process_time()
    fit = train.fit(
        train.init_state(params, optimizer, train_key, ema=average),
        train.make_step(losses.flow_matching(velocity), optimizer, ema=average),
        data.batches(x, min(256, len(rows["x"])), seed=args.seed),
        steps=args.steps,
        inner=20,
        log_every=args.steps,
    )
    print(f"trained in {time.process_time() - began:.0f} s of CPU time", flush=True)
    kept.write_bytes(pickle.dumps(jax.device_get(fit.state.ema)))
    return fit.state.ema, velocity


def gaussian_mean(x, seen, y, std):
    """E[x | y] where x is Gaussian with the mean and the covariance of the training images."""
    flat = np.asarray(x, np.float64).reshape(len(x), -1)
    event, mean = x.shape[1:], flat.mean(axis=0)
    cov = np.cov(flat.T) + 1e-6 * np.eye(len(mean))
    columns = np.eye(len(mean), dtype=np.float32).reshape(-1, *event)
    a = np.asarray(seen.apply(columns), np.float64).reshape(len(mean), -1).T
    kept = np.abs(a).sum(axis=1) > 0  # inpainting has rows of zeros
    a = a[kept]
    given = np.asarray(y, np.float64).reshape(len(y), -1)[:, kept]
    gain = cov @ a.T @ np.linalg.inv(a @ cov @ a.T + std**2 * np.eye(len(a)))
    return (mean + (given - mean @ a.T) @ gain.T).reshape(len(y), *event)


def judge_of(rows, test):
    """x with the test rows' labels -> {agreement, energy}, as in few_steps_digits."""
    flat = lambda x: np.asarray(x, np.float64).reshape(len(x), -1)  # noqa: E731
    rng = np.random.default_rng(0)
    some = rng.permutation(len(rows["x"]))[:10_000]
    classifier = SVC(gamma="scale", C=10.0).fit(flat(rows["x"][some]), rows["cond"][some])
    subsets = [rng.choice(len(rows["x"]), len(test["x"]), replace=False) for _ in range(10)]
    floor = np.mean([metrics.energy_distance(rows["x"][i], test["x"]) for i in subsets])

    def judge(x):
        return {
            "agreement": float(classifier.score(flat(x), test["cond"])),
            "energy": float(metrics.energy_distance(x, test["x"]) / floor),
        }

    return judge


def draw(pictures, problems, path: Path) -> None:
    """A problem a column, a method a row: before, after, and the truth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for _, name in pictures))
    figure, axes = plt.subplots(
        len(names), len(problems), figsize=(9.5, 0.36 * len(names) + 0.4), squeeze=False
    )
    for line, name in zip(axes, names, strict=True):
        for ax, problem in zip(line, problems, strict=True):
            ax.axis("off")
            shown = np.concatenate(list(pictures[problem, name][..., 0]), axis=1)
            ax.imshow(shown, cmap="gray", vmin=-1, vmax=1)
        line[0].text(
            -0.03, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=7
        )
    for ax, problem in zip(axes[0], problems, strict=True):
        ax.set_title(problem, fontsize=8)
    figure.subplots_adjust(0.19, 0.01, 0.99, 0.94, 0.03, 0.08)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
