"""How far the modes of a flow learned from n samples are from the true ones, against the closed
form.

    python experiments/limited_samples/run.py
    python experiments/limited_samples/run.py --short

Data: an even mixture of N(mu, s^2 I) and N(-mu, s^2 I) with |mu|^2 = d. The network predicts the
data at each time by a skip connection and one tied hidden unit, f(x) = c x + w tanh(4 w.x /
sqrt(d)), with its own c and w for every time, by least squares on n data rows with `noises` noise
rows each, fixed, and a ridge lam |w|^2. The setting is that of Cui, Krzakala, Vanden-Eijnden,
Zdeborova, "Analysis of learning a flow-based generative model from limited sample complexity",
2023, who take one noise row each; noises = infinity is training with fresh noise. `theory`, the
limit d -> infinity, is derived here from least squares, not copied from the paper.

The whole path of the library runs: `paths.parameterizations.from_data` of the network,
`losses.flow_matching` with the paper's weight as its metric, `train.make_step`, and Euler's method
of `solvers.sample`, whose steps the theory takes too. Prints for
each n: the squared distance of the generated mode's mean from mu over d, its cosine with mu, and
both of the theory.
"""

import argparse
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jflow import losses, paths, solvers, train
from jflow.paths import parameterizations
from jflow.types import Field, Velocity

STD, RIDGE, SHARP = 0.3, 0.1, 4.0


class Modes(NamedTuple):
    """distance: |mean - mu|^2 / d of the generated mode; cosine: of that mean with mu."""

    distance: float
    cosine: float


def least_squares(
    t: float, n: int, noises: float = 1, std: float = STD, ridge: float = RIDGE
) -> tuple[float, np.ndarray]:
    """The fitted network at time t in the limit d -> infinity: c, and w's coefficients (m, p, q).

    With the hidden unit saturated, w.x / sqrt(d) -> +-infinity with the row's sign e_i, f is c x +
    e_i w: least squares. At x_t = a x0 + b x1, a = 1 - t, b = t, with x1_i = e_i mu + std z_i and
    x0_i the mean of a row's noises,
        w = sum_i e_i (x1_i - c x_t,i) / (n + ridge) = m mu + p sum_i e_i z_i + q sum_i e_i x0_i
        m = n (1 - c b) / (n + ridge),  p = std (1 - c b) / (n + ridge),  q = -c a / (n + ridge)
    and with w put in, the loss over d is (1 - c b)^2 A + c^2 a^2 B up to a factor, so c = b A /
        (b^2 A + a^2 B) where A = ridge (1 + std^2) + (n - 1) std^2,   B = n + ridge - 1 / noises.
    """
    a, b = 1 - t, t
    along, across = ridge * (1 + std**2) + (n - 1) * std**2, n + ridge - 1 / noises
    c = b * along / (b**2 * along + a**2 * across)
    return c, np.asarray([n * (1 - c * b), std * (1 - c * b), -c * a]) / (n + ridge)


def theory(
    n: int, noises: float = 1, cells: int = 20, std: float = STD, ridge: float = RIDGE
) -> Modes:
    """The generated modes for d -> infinity, by Euler's steps on `cells` equal cells with the
    network of each one's middle: the flow dx/dt = (f(x) - x) / (1 - t) keeps a sign once it has
    one, and is linear in w's three directions."""
    state = np.zeros(3)  # of the mode's mean: along mu, sum e z and sum e x0
    for k in range(cells):
        t = (k + 0.5) / cells
        c, w = least_squares(t, n, noises, std, ridge)
        state = state + ((c - 1) * state + w) / (1 - t) / cells
    squares = state**2 * np.asarray(
        [1, n, n / noises]
    )  # the directions are orthogonal, of these lengths^2 / d
    return Modes(
        float((state[0] - 1) ** 2 + squares[1:].sum()), float(state[0] / np.sqrt(squares.sum()))
    )


def velocity(cells: int, d: int) -> Velocity:
    """The network, a Field of params {'skip' [cells], 'weight' [cells, d]}, as a velocity: that of
    each cell's middle."""

    def init(key, x, t, cond=None):
        # rows of random numbers, smaller than the modes: which sign is which is open
        return {
            "skip": jnp.zeros(cells),
            "weight": 0.3 * jax.random.normal(key, (d,))[None] * jnp.ones((cells, 1)),
        }

    def predict(params, x, t, cond=None, *, key=None):
        k = jnp.clip(jnp.floor(t * cells), 0, cells - 1).astype(int)
        c, w = params["skip"][k][:, None], params["weight"][k]
        return c * x + w * jnp.tanh(SHARP * jnp.sum(w * x, axis=1, keepdims=True) / np.sqrt(d))

    at_points = parameterizations.from_data(Field(init, predict), margin=0.0)

    def apply(params, x, t, cond=None, *, key=None):
        middle = (
            jnp.floor(t * cells + 1e-3) + 0.5
        ) / cells  # the start of a cell, as a sum of steps, may be below it
        return at_points.apply(params, x, middle, cond, key=key)

    return Velocity(init, apply)


def denoising(v, target, x_t, t):
    """|predicted x1 - x1|^2 / d: the paper weighs all times so."""
    to_x1 = lambda v: paths.velocity_to_data(v, x_t, t)  # noqa: E731
    return losses.mean_squared_error(to_x1(v), to_x1(target), x_t, t)


def ridged(loss, strength):
    """loss + strength |weight|^2."""

    def penalized(params, key, batch, frozen=None):
        value, metrics = loss(params, key, batch, frozen)
        return value + strength * jnp.sum(jnp.square(params["weight"])), metrics

    return penalized


def learned(
    n: int,
    d: int,
    noises: int = 1,
    *,
    cells: int = 20,
    steps: int = 1500,
    draws: int = 256,
    seed: int = 0,
) -> Modes:
    """Train on n rows and measure the mode that `draws` samples show."""
    keys = jax.random.split(jax.random.key(seed), 7)
    mu = jax.random.normal(keys[0], (d,))
    mu = mu * np.sqrt(d) / jnp.linalg.norm(mu)
    sign = jnp.where(jnp.arange(n) % 2 == 0, 1.0, -1.0)[:, None]
    x1 = jnp.repeat(sign * mu[None] + STD * jax.random.normal(keys[1], (n, d)), noises, axis=0)
    x0 = jax.random.normal(keys[2], (n * noises, d))
    middles = (jnp.arange(cells) + 0.5) / cells
    rows = n * noises
    batch = {
        "x": jnp.tile(x1, (cells, 1)),
        "x0": jnp.tile(x0, (cells, 1)),
    }  # every row at every time
    field = velocity(cells, d)
    loss = losses.flow_matching(
        field, time=lambda key, size: jnp.repeat(middles, rows), metric=denoising
    )
    loss = ridged(loss, RIDGE / (n * cells * d))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))
    step = train.make_step(loss, optimizer)
    state = train.init_state(field.init(keys[3], x1, middles), optimizer, keys[4])
    run = jax.jit(
        lambda state, batch: jax.lax.scan(lambda s, _: step(s, batch), state, length=steps)[0]
    )
    params = run(state, batch).params
    noise = jax.random.normal(keys[5], (draws, d))
    draw = jax.jit(
        lambda params, x: solvers.sample(
            field, params, x, method=solvers.fixed(cells, diffrax.Euler())
        )[0]
    )
    x = np.asarray(draw(params, noise), np.float64)
    return measure(x, np.asarray(mu, np.float64))


def measure(x: np.ndarray, mu: np.ndarray) -> Modes:
    """Of the samples' mode on the side of mu; what the scatter of the draws adds to squares is
    taken off."""
    n, d = x.shape
    x = x * np.sign(x @ mu)[:, None]
    mean = x.mean(axis=0)
    scatter = np.sum(x.var(axis=0)) / (n - 1) / d
    square = mean @ mean / d - scatter
    return Modes(
        float(np.sum((mean - mu) ** 2) / d - scatter), float(mean @ mu / d / np.sqrt(square))
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--d", type=int, default=2000)
    parser.add_argument("--noises", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="two n, 500 numbers, one seed, for CI")
    args = parser.parse_args()
    if args.short:
        args.n, args.d, args.noises, args.seeds = [4, 8], 500, [1], 1
    print(
        "noises    n   distance  +-        theory     cosine    theory   n distance of theory",
        flush=True,
    )
    for noises in args.noises:
        for n in args.n:
            found = np.asarray(
                [learned(n, args.d, noises, seed=seed) for seed in range(args.seeds)]
            )
            (distance, cosine), limit = found.mean(axis=0), theory(n, noises)
            error = found[:, 0].std() / np.sqrt(max(args.seeds - 1, 1))
            print(
                f"{noises:6d} {n:4d}   {distance:.5f}  {error:.5f}   {limit.distance:.5f}   "
                f" {cosine:.5f}   {limit.cosine:.5f}   {n * limit.distance:.4f}",
                flush=True,
            )
    limits = [n * theory(n, float("inf"), cells=2000).distance for n in (10, 100, 1000)]
    print(
        f"fresh noise, n distance at n = 10, 100, 1000: {np.round(limits, 4)}; Bayes-optimal: about"
        f" {STD**2:.4f}"
    )


if __name__ == "__main__":
    main()
