"""Posteriors of simulators beside reference posteriors: three tasks of the sbibm benchmark.

    python experiments/sbi_pack/run.py fit --data-dir DATA
    python experiments/sbi_pack/run.py fit --estimator fmpe --task two_moons --data-dir DATA
    python experiments/sbi_pack/run.py check --data-dir DATA   # the references, by closed form

DATA is a folder with sbi/TASK_obs1-5.zip, see the README; without it `fit` says the calibration
alone. For each task and seed one amortized posterior is trained on 10,000 simulations. C2ST is
the accuracy of a classifier between 10,000 draws and the 10,000 of the reference, 0.5 is best. A
fit takes about a minute on a CPU core, and a C2ST 10 to 90 s.
"""

import argparse
import bz2
import io
import math
import os
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jflow import metrics
from jflow.apps import sbi

OBSERVATIONS = range(1, 6)


class Task(NamedTuple):
    """A uniform prior on [-bound, bound]^d, a simulator, and its likelihood in nats, up to a
    constant."""

    d: int
    bound: float
    simulate: Any  # (key, theta [n, d]) -> x [n, k]
    log_likelihood: Any  # (theta [n, d], x [k]) -> [n]


def moons_shift(theta):
    """Where a pair of parameters moves the crescent: a rotation by 45 degrees and a fold."""
    across, along = theta[:, 0] + theta[:, 1], theta[:, 1] - theta[:, 0]
    return jnp.stack([-jnp.abs(across), along], 1) / math.sqrt(2)


def simulate_moons(key, theta):
    """A point of a half circle of radius N(0.1, 0.01^2) about (0.25, 0), shifted."""
    angle_key, radius_key = jax.random.split(key)
    angle = jax.random.uniform(angle_key, (len(theta),), minval=-math.pi / 2, maxval=math.pi / 2)
    radius = 0.1 + 0.01 * jax.random.normal(radius_key, (len(theta),))
    crescent = jnp.stack([radius * jnp.cos(angle) + 0.25, radius * jnp.sin(angle)], 1)
    return crescent + moons_shift(theta)


def moons_log_likelihood(theta, x):
    """In polar coordinates the density is that of the radius over r."""
    point = x[None] - moons_shift(theta) - jnp.array([[0.25, 0.0]])
    radius = jnp.linalg.norm(point, axis=1)
    log_density = -0.5 * jnp.square((radius - 0.1) / 0.01) - jnp.log(radius)
    return jnp.where(point[:, 0] > 0, log_density, -jnp.inf)


def simulate_mixture(key, theta):
    """theta with noise of standard deviation 1 or 0.1, one as likely as the other."""
    which_key, noise_key = jax.random.split(key)
    wide = jax.random.bernoulli(which_key, 0.5, (len(theta), 1))
    return theta + jnp.where(wide, 1.0, 0.1) * jax.random.normal(noise_key, theta.shape)


def mixture_log_likelihood(theta, x):
    square = jnp.square(x[None] - theta).sum(1)
    return jnp.logaddexp(-0.5 * square, -0.5 * square / 0.01 - 2 * math.log(0.1))


def simulate_slcp(key, theta):
    """Four points of a normal in the plane, whose mean and covariance are functions of theta."""
    first, second, correlation = theta[:, 2] ** 2, theta[:, 3] ** 2, jnp.tanh(theta[:, 4])
    e = jax.random.normal(key, (len(theta), 4, 2))
    mixed = correlation[:, None] * e[..., 0] + jnp.sqrt(1 - correlation**2)[:, None] * e[..., 1]
    noise = jnp.stack([first[:, None] * e[..., 0], second[:, None] * mixed], -1)
    return (theta[:, None, :2] + noise).reshape(len(theta), 8)


def slcp_log_likelihood(theta, x):
    """The covariance has 1e-6 added to its diagonal, as that of the benchmark's code."""
    first, second, correlation = theta[:, 2] ** 2, theta[:, 3] ** 2, jnp.tanh(theta[:, 4])
    a, c = first**2 + 1e-6, second**2 + 1e-6
    b = correlation * first * second
    determinant = a * c - b**2
    u, v = jnp.moveaxis(x.reshape(1, 4, 2) - theta[:, None, :2], -1, 0)
    square = c[:, None] * u**2 - 2 * b[:, None] * u * v + a[:, None] * v**2
    return -0.5 * (square / determinant[:, None]).sum(1) - 2 * jnp.log(determinant)


TASKS = {
    "two_moons": Task(2, 1.0, simulate_moons, moons_log_likelihood),
    "gaussian_mixture": Task(2, 10.0, simulate_mixture, mixture_log_likelihood),
    "slcp": Task(5, 3.0, simulate_slcp, slcp_log_likelihood),
}
ESTIMATORS = {"npe": sbi.npe(), "fmpe": sbi.fmpe()}


def read(data_dir: Path, task: str, i: int) -> tuple[np.ndarray, np.ndarray]:
    """(observation, 10,000 draws of its reference posterior)."""
    with zipfile.ZipFile(data_dir / "sbi" / f"{task}_obs1-5.zip") as archive:

        def table(name, unpack=bytes):
            content = unpack(archive.read(f"num_observation_{i}/{name}"))
            return np.loadtxt(io.BytesIO(content), delimiter=",", skiprows=1)

        x = table("observation.csv")
        return x, table("reference_posterior_samples.csv.bz2", bz2.decompress)


def fit(name: str, estimator: str, seeds: int, data_dir: Path | None, short: bool) -> None:
    task, start = TASKS[name], time.time()
    prior = sbi.box_uniform([-task.bound] * task.d, [task.bound] * task.d)
    small = {"num_simulations": 500, "steps": 20} if short else {}
    scores, smallest = [], []
    for seed in range(seeds):
        fit_key, draw_key, test_key = jax.random.split(jax.random.key(seed), 3)
        begun = time.time()
        posterior = sbi.fit(
            fit_key, prior, task.simulate, estimator=ESTIMATORS[estimator], progress=False, **small
        )
        seconds = time.time() - begun
        found = sbi.calibration(
            test_key,
            posterior,
            task.simulate,
            num_simulations=50 if short else 500,
            progress=False,
        )
        smallest.append(min(found.p_values.values()))
        row = []
        for i in OBSERVATIONS if data_dir else ():
            x, reference = read(data_dir, name, i)
            theta = np.asarray(posterior.sample(jax.random.fold_in(draw_key, i), 10_000, x))
            row.append(metrics.c2st(reference, theta))
        scores.append(row)
        said = " ".join(f"{score:.3f}" for score in row)
        p = {k: round(value, 4) for k, value in found.p_values.items()}
        print(
            f"{name} {estimator} seed {seed}: fit {seconds:.0f} s, C2ST {said}, rejected"
            f" {list(found.rejected)} of p {p}",
            flush=True,
        )
    if data_dir:
        mean = np.mean(scores, axis=1)
        print(
            f"| {name} | {estimator} | "
            + " | ".join(f"{score:.3f}" for score in np.mean(scores, axis=0))
            + f" | **{mean.mean():.3f}** +- {mean.std(ddof=1) if seeds > 1 else 0:.3f} | "
            + ", ".join(f"{p:.3f}" for p in smallest)
            + f" | {time.time() - start:.0f} s |",
            flush=True,
        )


def check(name: str, data_dir: Path) -> None:
    """Whether the reference draws are of the likelihood here: Metropolis steps by it leave their
    distribution as it is. Half of the draws take 300 steps, the other half none."""
    task = TASKS[name]
    for i in OBSERVATIONS:
        x, reference = read(data_dir, name, i)
        observed = jnp.asarray(x, jnp.float32)
        theta = jnp.asarray(reference[::2], jnp.float32)
        spread = jnp.asarray(reference.std(0), jnp.float32)

        def log_density(theta, x=observed):
            inside = (jnp.abs(theta) <= task.bound).all(1)
            return jnp.where(inside, task.log_likelihood(theta, x), -jnp.inf)

        def step(carry, key, spread=spread, log_density=log_density):
            theta, value, accepted = carry
            scale_key, move_key, accept_key = jax.random.split(key, 3)
            scale = jnp.exp(jax.random.uniform(scale_key, (len(theta), 1), minval=-4.0, maxval=0.5))
            proposed = theta + scale * spread[None] * jax.random.normal(move_key, theta.shape)
            there = log_density(proposed)
            log_u = jnp.log(jax.random.uniform(accept_key, value.shape))
            yes = log_u < there - value
            theta, value = jnp.where(yes[:, None], proposed, theta), jnp.where(yes, there, value)
            return (theta, value, accepted + yes.mean() / 300), None

        start = (theta, log_density(theta), 0.0)
        keys = jax.random.split(jax.random.key(i), 300)
        (moved, _, accepted), _ = jax.jit(lambda s, k, step=step: jax.lax.scan(step, s, k))(
            start, keys
        )
        p = [stats.ks_2samp(a, b).pvalue for a, b in zip(reference[1::2].T, moved.T, strict=True)]
        print(f"{name} observation {i}: accepted {accepted:.2f}, KS p {np.round(p, 3)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["fit", "check"])
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("JFLOW_DATA"))
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("--estimator", choices=ESTIMATORS, default="npe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="seconds, to see that it runs")
    options = parser.parse_args()
    if options.what == "check" and options.data_dir is None:
        parser.error("check needs --data-dir")
    data_dir = None if options.data_dir is None else Path(options.data_dir)
    for name in options.task or TASKS:
        if options.what == "check":
            check(name, data_dir)
        else:
            seeds = 1 if options.short else options.seeds
            fit(name, options.estimator, seeds, data_dir, options.short)


if __name__ == "__main__":
    main()
