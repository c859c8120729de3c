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
`losses.flow_matching` along geodesics between points that optimal transport has paired once, before
the training. Reported is the negative log-density of test points in nats, with respect to area on
the unit sphere; log(4 pi) = 2.53 is that of the uniform law. `table.py` has that of von
Mises-Fisher kernels at the same training points beside it, alone and with a share of the uniform
law, whose width and share are chosen on the same validation points.
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
from tqdm import tqdm

import jflow
from jflow import (
    couplings,
    data,
    distributions,
    flows,
    losses,
    manifolds,
    nets,
    paths,
    solvers,
    times,
)
from jflow.apps import Experiment

FILES = {
    "volcano": "volerup.csv.gz",
    "earthquake": "quakes_all.csv.gz",
    "flood": "flood.csv.gz",
    "fire": "fire.csv.gz",
}
SPHERE = manifolds.sphere(2)


class Planes(nn.Module):
    """Learned features of a point x [b, 3] in [-1, 1]: those of the four corners of its cell on a
    grid, blended smoothly, on each of the planes of two coordinates. [b, 3 * channels]."""

    cells: int
    channels: int = 4

    @nn.compact
    def __call__(self, x):
        shape = (3, self.cells + 1, self.cells + 1, self.channels)
        grids = self.param("grids", nn.initializers.normal(0.1), shape)
        at = (x + 1) * (self.cells / 2)
        low = jnp.clip(jnp.floor(jax.lax.stop_gradient(at)), 0, self.cells - 1).astype(int)
        part = at - low
        part = part * part * (3 - 2 * part)  # flat at the corners: slopes do not jump
        features = []
        for grid, (i, j) in zip(grids, ((0, 1), (1, 2), (2, 0)), strict=True):
            a, b, u, v = low[:, i], low[:, j], part[:, i, None], part[:, j, None]
            near = (1 - v) * grid[a, b] + v * grid[a, b + 1]
            far = (1 - v) * grid[a + 1, b] + v * grid[a + 1, b + 1]
            features.append((1 - u) * near + u * far)
        return jnp.concatenate(features, axis=1)


class Net(nn.Module):
    """A perceptron of a point and of what places are like: plane waves of random directions and of
    frequencies from 1 to `highest`, as many in each octave, and, with `cells`, learned features on
    grids of so many cells and of a quarter of them."""

    hidden: Sequence[int]
    waves: int
    highest: float
    cells: int = 0

    @nn.compact
    def __call__(self, x, t, cond=None):
        rng = np.random.default_rng(0)  # always the same: they are no parameters
        directions = rng.normal(size=(3, self.waves))
        directions /= np.linalg.norm(directions, axis=0)
        waves = directions * np.exp(rng.uniform(0, math.log(self.highest), self.waves))
        phases = x @ jnp.asarray(waves, x.dtype)
        time = nets.time_features(t, 32, scale=30.0).astype(x.dtype)
        grids = [Planes(n)(x) for n in (self.cells // 4, self.cells) if n]
        h = jnp.concatenate([x, jnp.sin(phases), jnp.cos(phases), time, *grids], axis=1)
        return nn.Dense(3, kernel_init=nn.initializers.zeros)(nets.MLP(self.hidden, nn.gelu)(h))


def config(
    *,
    events: str = "flood",
    folder: str = "",
    width: int = 128,
    layers: int = 4,
    waves: int = 128,
    highest: float = 200.0,
    cells: int = 0,
    steps: int = 20_000,
    batch: int = 256,
    pairs: int = 60_000,
    learning_rate: float = 5e-3,
    seed: int = 0,
    short: bool = False,
) -> Experiment:
    """The job that the head of this file describes.

    Args:
        events: volcano, earthquake, flood or fire
        folder: of the tables; riemannian/earth in JFLOW_DATA if empty
        width: of the network
        layers: of the network
        waves: how many plane waves the network is shown
        highest: their highest frequency, in radians a unit of length
        cells: of a grid of learned features, along each axis; none if 0
        steps: updates
        batch: points of an update
        pairs: of a point of the data and a uniform one, at least; made before the training
        learning_rate: of Adam, at its highest
        seed: of the split, the parameters and the batches
        short: shrink the run to seconds, for CI
    """
    if events not in FILES:
        raise ValueError(f"unknown events {events!r}: expected one of {', '.join(FILES)}")
    if short:
        width, layers, waves, cells, steps, batch = 8, 1, 4, min(cells, 8), 20, 16
    base = distributions.uniform_on(SPHERE)
    velocity = manifolds.tangent(
        jflow.velocity(Net((width,) * layers, waves, highest, cells)), SPHERE
    )
    flow = flows.cnf(
        velocity,
        base,
        divergence=solvers.riemannian_divergence(SPHERE),
        method=solvers.fixed(8 if short else 48, solvers.projected(diffrax.Dopri5(), SPHERE)),
    )
    matching = losses.flow_matching(
        velocity,
        path=paths.geodesic(SPHERE),
        time=times.from_quantile(lambda u: 1 - (1 - u) ** 2),  # more of them near the data
        metric=losses.riemannian_error(SPHERE),
    )

    def loss(params, key, batch, frozen=None):
        return matching(params["velocity"], key, batch, frozen)

    def splits():
        parts = split(events, folder, seed, short)
        return parts._replace(train=paired(parts.train["x"], 1 if short else pairs, seed))

    def score(params, x):
        parts = np.array_split(x, math.ceil(len(x) / 512))
        return float(-np.concatenate([log_prob(params, part) for part in parts]).mean())

    log_prob = jax.jit(flow.log_prob)
    sample_points = jax.jit(flow.sample, static_argnums=2)

    def evaluate(params, state, key, splits):
        return {
            "valid_nll": score(params, splits.valid["x"]),
            "test_nll": score(params, splits.test["x"]),
        }

    inner = 5 if short else 50  # updates between two visits of the host
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
        ema=0.998 if not short else 0.9,
        sample=lambda params, key, n: {"x": sample_points(params, key, n)},
        evaluate=evaluate,
        monitor="valid_nll",
        eval_every=inner * max(1, steps // (4 * inner)),
        save_every=inner * max(1, steps // (4 * inner)),
        log_every=2 * inner,
        inner=inner,
    )


def points(events: str, folder: str = "") -> np.ndarray:
    """The unit vectors [n, 3] float32 of a table."""
    path = Path(folder or Path(os.environ.get("JFLOW_DATA", "")) / "riemannian/earth")
    with gzip.open(path / FILES[events], "rt") as file:
        rows = np.genfromtxt(file, delimiter=",", comments="#")
    rows = rows[~np.isnan(rows).any(axis=1)]
    return manifolds.from_latitude_longitude(rows).astype(np.float32)


def split(events: str, folder: str = "", seed: int = 0, short: bool = False) -> data.Splits:
    """The points of a table, or made ones, to train on, to choose by and to report on."""
    x = np.asarray(SPHERE.random(jax.random.key(0), 100)) if short else points(events, folder)
    return data.split({"x": x}, valid=0.1, test=0.1, seed=seed)


def paired(x: np.ndarray, least: int, seed: int) -> dict[str, np.ndarray]:
    """At least so many pairs of uniform points 'x0' and points 'x' [n, 3], by optimal transport.

    In the batches of updates a place would be paired with another one each time, and the loss would
    be mostly variance; a block of some two thousand points leaves less of it.
    """
    couple = jax.jit(couplings.optimal_transport())
    rng, found = np.random.default_rng(seed), []
    for _ in tqdm(range(math.ceil(least / len(x))), desc="pairing", leave=False):
        for rows in np.array_split(rng.permutation(x), math.ceil(len(x) / 2048)):
            source_key, pair_key = jax.random.split(jax.random.key(rng.integers(2**31)))
            x0 = np.asarray(SPHERE.random(source_key, len(rows)))
            i, j = couple(pair_key, x0, rows)
            found.append((x0[i], rows[j]))
    x0, x1 = (np.concatenate(part) for part in zip(*found, strict=True))
    return {"x0": x0, "x": x1}


def kernel_log_prob(train: np.ndarray, x: np.ndarray, concentration: float) -> np.ndarray:
    """log p(x) [n] in nats of the mean of von Mises-Fisher kernels at the training points."""
    k = concentration
    log_norm = math.log(k) - math.log(2 * math.pi) - math.log(-math.expm1(-2 * k))
    cosines = np.asarray(x, np.float64) @ np.asarray(train, np.float64).T
    exponent = k * (np.minimum(cosines, 1) - 1)
    highest = exponent.max(axis=1)
    return log_norm + highest + np.log(np.exp(exponent - highest[:, None]).mean(axis=1))


def kernel_nll(splits: data.Splits) -> dict[str, float]:
    """The NLL of test points under kernels, alone and with a share of the uniform law, the
    concentration and the share being those that are best on validation points."""
    parts = [np.asarray(part["x"]) for part in splits]
    log_uniform, shares = -math.log(4 * math.pi), (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
    found = []
    for k in np.geomspace(100, 1e6, 9):
        valid, test = (kernel_log_prob(parts[0], x, k) for x in parts[1:])
        for share in shares:
            floor = math.log(share) + log_uniform if share else -math.inf
            mixed = lambda a, w=share, b=floor: -np.logaddexp(a + math.log1p(-w), b).mean()  # noqa: E731
            found.append((mixed(valid), mixed(test), share))
    return {
        "kernel_test_nll": float(min(row for row in found if row[2] == 0)[1]),
        "kernel_uniform_test_nll": float(min(found)[1]),
    }
