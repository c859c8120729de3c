"""Where disasters strike: densities on the sphere by Riemannian flow matching.

Volcanic eruptions, earthquakes, floods and fires, latitudes and longitudes of
JFLOW_DATA/riemannian/earth (or folder=FOLDER), 80% to train on, 10% to choose by, 10% to report on:

    jflow train experiments/earth events=flood --workdir runs/flood
    jflow evaluate runs/flood
    jflow sample runs/flood --num 2000 --out flood.npz

`python experiments/earth/table.py --out runs/earth` trains all four, and writes the table and the
pictures. `short=True` trains on made points in seconds, for CI. The expected numbers are in
README.md beside this file.

The model is `flows.cnf` of a network on the sphere over the uniform law, trained by
`losses.flow_matching` along geodesics. Reported is the negative log-density of test points in nats,
with respect to area on the unit sphere (log(4 pi) = 2.53 for the uniform law), beside that of a von
Mises-Fisher kernel density of the same training points, whose width is chosen on the same
validation points.
"""

import gzip
import math
import os
from collections.abc import Sequence
from pathlib import Path

import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jflow
from jflow import couplings, data, distributions, flows, losses, manifolds, nets, paths, solvers
from jflow.apps import Experiment

FILES = {
    "volcano": "volerup.csv.gz",
    "earthquake": "quakes_all.csv.gz",
    "flood": "flood.csv.gz",
    "fire": "fire.csv.gz",
}
SPHERE = manifolds.sphere(2)


class Net(nn.Module):
    """A perceptron of a point and waves of its coordinates, of the frequencies 1, 2, 4, ..."""

    hidden: Sequence[int]
    octaves: int

    @nn.compact
    def __call__(self, x, t, cond=None):
        waves = [f(2.0**k * jnp.pi * x) for k in range(self.octaves) for f in (jnp.sin, jnp.cos)]
        times = nets.time_features(t, 32, scale=30.0)
        h = jnp.concatenate([x, *waves, times.astype(x.dtype)], axis=1)
        return nn.Dense(3, kernel_init=nn.initializers.zeros)(nets.MLP(self.hidden, nn.swish)(h))


def config(
    *,
    events: str = "flood",
    folder: str = "",
    width: int = 256,
    layers: int = 4,
    octaves: int = 3,
    steps: int = 8000,
    batch: int = 512,
    learning_rate: float = 1e-3,
    seed: int = 0,
    short: bool = False,
) -> Experiment:
    """The job that the head of this file describes.

    Args:
        events: volcano, earthquake, flood or fire
        folder: of the tables; riemannian/earth in JFLOW_DATA if empty
        width: of the network
        layers: of the network
        octaves: how many frequencies of the coordinates the network is shown
        steps: updates
        batch: points of an update
        learning_rate: of Adam, at its highest
        seed: of the split, the parameters and the batches
        short: shrink the run to seconds, for CI
    """
    if events not in FILES:
        raise ValueError(f"unknown events {events!r}: expected one of {', '.join(FILES)}")
    if short:
        width, layers, octaves, steps, batch = 8, 1, 1, 20, 16
    base = distributions.uniform_on(SPHERE)
    velocity = manifolds.tangent(jflow.velocity(Net((width,) * layers, octaves)), SPHERE)
    flow = flows.cnf(
        velocity,
        base,
        divergence=solvers.riemannian_divergence(SPHERE),
        method=solvers.fixed(8 if short else 64, solvers.projected(diffrax.Heun(), SPHERE)),
    )
    matching = losses.chain(
        couplings.with_source(couplings.from_distribution(base)),
        losses.flow_matching(
            velocity, path=paths.geodesic(SPHERE), metric=losses.riemannian_error(SPHERE)
        ),
    )

    def loss(params, key, batch, frozen=None):
        return matching(params["velocity"], key, batch, frozen)

    def splits():
        if short:
            x = np.asarray(SPHERE.random(jax.random.key(0), 100))
        else:
            x = points(events, folder)
        return data.split({"x": x}, valid=0.1, test=0.1, seed=seed)

    def score(params, x):
        parts = np.array_split(x, math.ceil(len(x) / 512))
        return float(-np.concatenate([log_prob(params, part) for part in parts]).mean())

    log_prob = jax.jit(flow.log_prob)
    sample_points = jax.jit(flow.sample, static_argnums=2)

    def evaluate(params, state, key, splits):
        width = kernel_width(splits.train["x"], splits.valid["x"])
        return {
            "valid_nll": score(params, splits.valid["x"]),
            "test_nll": score(params, splits.test["x"]),
            "kernel_test_nll": kernel_nll(splits.train["x"], splits.test["x"], width),
        }

    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20 + 1, steps, 1e-6)
    return Experiment(
        model=flow,
        init=lambda key, rows: flow.init(key, jnp.asarray(rows["x"])),
        loss=loss,
        optimizer=optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule)),
        data=splits,
        preprocess=data.identity(),
        steps=steps,
        batch=batch,
        seed=seed,
        ema=0.999 if not short else 0.9,
        sample=lambda params, key, n: {"x": sample_points(params, key, n)},
        evaluate=evaluate,
        monitor="valid_nll",
        eval_every=max(1, steps // 8),
        save_every=max(1, steps // 8),
        log_every=100 if not short else 10,
        inner=50 if not short else 5,
    )


def points(events: str, folder: str = "") -> np.ndarray:
    """The unit vectors [n, 3] float32 of a table."""
    path = Path(folder or Path(os.environ.get("JFLOW_DATA", "")) / "riemannian/earth")
    with gzip.open(path / FILES[events], "rt") as file:
        rows = np.genfromtxt(file, delimiter=",", comments="#")
    rows = rows[~np.isnan(rows).any(axis=1)]
    return manifolds.from_latitude_longitude(rows).astype(np.float32)


def kernel_nll(train: np.ndarray, x: np.ndarray, concentration: float) -> float:
    """The mean of -log p(x) of a von Mises-Fisher kernel at each training point, in nats."""
    k = concentration
    log_norm = math.log(k) - math.log(2 * math.pi) - math.log(-math.expm1(-2 * k))
    cosines = np.asarray(x, np.float64) @ np.asarray(train, np.float64).T
    log_kernel = log_norm + k * (np.minimum(cosines, 1) - 1)
    highest = log_kernel.max(axis=1)
    mean = np.exp(log_kernel - highest[:, None]).mean(axis=1)
    return float(-(highest + np.log(mean)).mean())


def kernel_width(train: np.ndarray, valid: np.ndarray) -> float:
    """The concentration of the kernels that is best on validation points."""
    grid = np.geomspace(10, 1e6, 51)
    return float(min(grid, key=lambda k: kernel_nll(train, valid, k)))
