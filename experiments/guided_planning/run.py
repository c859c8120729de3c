"""Planning with a guided flow on an offline-control data set that this script makes.

    python experiments/guided_planning/run.py [--seeds 3] [--picture plans.png]

Some minutes a seed on two CPU cores; --short shrinks it to seconds. Prints the table of README.md
beside this file. Needs the extra `experiments`, no download.

A point mass with friction has to reach a goal behind a disc that costs reward. The data are
episodes of controllers that chase waypoints at random, sometimes the goal, and never mind the disc.
A flow over windows of (state, action) is trained on them, told the first state and, three times in
four, how good the window's return is among windows that start nearby (its rank, 0 to 1). To plan,
it is told that state and rank 1; guidance of scale w goes from "not told a rank" past "told rank
1". The first actions of the plan are taken, then it plans again.

Method: Zheng, Le, Shaul, Lipman, Grover, Chen, *Guided Flows for Generative Modeling and Decision
Making* (2023); there the condition is the return itself, and an inverse-dynamics model turns
planned states into actions.
"""

import argparse
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.spatial import cKDTree

import jflow
from jflow import guidance, losses, nets, solvers, train

GOAL, RADIUS = np.asarray([0.8, 0.0], np.float32), 0.35  # the disc is at the origin
EPISODE, HORIZON, COMMIT = 48, 24, 6  # steps of an episode, of a plan, and until the next plan
SCALES = (0.0, 1.0, 1.5, 2.0, 3.0)


def move(state, action):
    """One step of the world: state (x, y, vx, vy), action in [-1, 1]^2, walls at +-1.2."""
    velocity = 0.8 * state[..., 2:] + 0.02 * jnp.clip(action, -1, 1)
    position = jnp.clip(state[..., :2] + velocity, -1.2, 1.2)
    return jnp.concatenate([position, velocity], axis=-1)


def reward(state):
    """Minus the distance to the goal, and 2 less inside the disc."""
    inside = jnp.linalg.norm(state[..., :2], axis=-1) < RADIUS
    return -jnp.linalg.norm(state[..., :2] - GOAL, axis=-1) - 2.0 * inside


def starts(key, n):
    """At rest, anywhere."""
    return jnp.concatenate(
        [jax.random.uniform(key, (n, 2), minval=-1.1, maxval=1.1), jnp.zeros((n, 2))], axis=1
    )


@partial(jax.jit, static_argnames="to_goal")
def behave(key, state, to_goal=0.25):
    """Episodes [n, EPISODE, 6] of the behavior: PD control to a waypoint that changes every 12
    steps, and noise.

    A waypoint is the goal with probability `to_goal`, any place otherwise."""
    n = state.shape[0]

    def step(state, inputs):
        waypoint, noise = inputs
        action = jnp.clip(5 * (waypoint - state[:, :2]) - 20 * state[:, 2:] + 0.3 * noise, -1, 1)
        return move(state, action), jnp.concatenate([state, action], axis=1)

    chosen, place, noise = jax.random.split(key, 3)
    legs = EPISODE // 12
    is_goal = jax.random.bernoulli(chosen, to_goal, (legs, n, 1))
    anywhere = jax.random.uniform(place, (legs, n, 2), minval=-1.1, maxval=1.1)
    waypoints = jnp.repeat(jnp.where(is_goal, GOAL[None, None], anywhere), 12, axis=0)
    _, episodes = jax.lax.scan(step, state, (waypoints, jax.random.normal(noise, (EPISODE, n, 2))))
    return jnp.swapaxes(episodes, 0, 1)


def ranked(episodes, neighbors):
    """The rank [n, windows] in [0, 1] of each window's return among those of the windows whose
    first states are nearest."""
    states = np.asarray(episodes[..., :4], np.float64)
    gains = np.asarray(reward(episodes[..., :4]), np.float64)
    windows = EPISODE - HORIZON + 1
    total = np.concatenate([np.zeros((len(gains), 1)), np.cumsum(gains, axis=1)], axis=1)
    returns = (total[:, HORIZON:] - total[:, :windows]).ravel()
    first = states[:, :windows].reshape(-1, 4) / states.std(axis=(0, 1))
    _, near = cKDTree(first).query(first, k=neighbors, workers=2)
    return (returns[near] < returns[:, None]).mean(axis=1).astype(np.float32).reshape(-1, windows)


def condition(first, rank, with_rank):
    """The condition of the network: the first state, and the rank where there is one."""
    return jnp.concatenate(
        [first, jnp.where(with_rank, rank, 0.5), with_rank.astype(first.dtype)], axis=1
    )


def fit(key, episodes, ranks, args):
    """Flow matching over windows, as (velocity, params averaged over training)."""
    velocity = jflow.velocity(nets.ResidualMLP(width=args.width, num_blocks=4))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-3, args.steps))
    )
    average = train.ema.warmup(0.999)
    step = train.make_step(losses.flow_matching(velocity), optimizer, ema=average)

    def batch(key):
        episode, start, with_rank = jax.random.split(key, 3)
        episode = jax.random.randint(episode, (args.batch,), 0, episodes.shape[0])
        start = jax.random.randint(start, (args.batch,), 0, ranks.shape[1])
        x = episodes[episode[:, None], start[:, None] + jnp.arange(HORIZON)[None]]
        with_rank = jax.random.bernoulli(with_rank, 0.75, (args.batch, 1))
        return {"x": x, "cond": condition(x[:, 0, :4], ranks[episode, start][:, None], with_rank)}

    @jax.jit
    def run(state, keys):
        state, metrics = jax.lax.scan(lambda state, key: step(state, batch(key)), state, keys)
        return state, jnp.mean(metrics["loss"])

    first_key, init_key, train_key, batches_key = jax.random.split(key, 4)
    first = batch(first_key)
    params = velocity.init(init_key, first["x"], jnp.zeros(args.batch), first["cond"])
    state = train.init_state(params, optimizer, train_key, ema=average)
    keys = jax.random.split(batches_key, args.steps)
    for part in keys.reshape(10, -1):
        state, loss = run(state, part)
        print(f"step {int(state.step)}: loss {loss:.4f}", file=sys.stderr, flush=True)
    return velocity, state.ema


def planner(velocity, mean, std, solver_steps):
    """(params, state [n, 4], key, scale) -> plans [n, HORIZON, 6], in the units of the world."""

    def plan(params, state, key, scale):
        n = state.shape[0]
        first, best = (state - mean[None, :4]) / std[None, :4], jnp.ones((n, 1))
        cond = condition(first, best, best > 0), condition(first, best, best < 0)
        # the state is in the condition of both evaluations: a pair of conditions, not one null row
        guided = guidance.negative(velocity, guidance.scaled(scale))
        noise = jax.random.normal(key, (n, HORIZON, 6))
        x, _ = solvers.sample(guided, params, noise, cond, method=solver_steps)
        return x * std[None, None] + mean[None, None]

    return plan


def execute(plan):
    """(params, state, key, scale) -> episodes [n, EPISODE, 6] and the error of plans, replanned
    every COMMIT steps.

    The error is between the position planned for the last committed step and the one that the
    actions led to."""

    def episode(params, state, key, scale):
        def leg(state, key):
            plans = plan(params, state, key, scale)
            actions = jnp.swapaxes(plans[:, :COMMIT, 4:], 0, 1)
            after, steps = jax.lax.scan(
                lambda s, a: (move(s, a), jnp.concatenate([s, a], axis=1)), state, actions
            )
            return after, (steps, jnp.linalg.norm(plans[:, COMMIT, :2] - after[:, :2], axis=1))

        _, (steps, errors) = jax.lax.scan(leg, state, jax.random.split(key, EPISODE // COMMIT))
        return jnp.swapaxes(steps.reshape(EPISODE, -1, 6), 0, 1), errors

    return jax.jit(episode)


def summary(episodes):
    """The return of each episode, and the share of its time inside the disc."""
    inside = jnp.linalg.norm(episodes[..., :2], axis=-1) < RADIUS
    return np.asarray(jnp.sum(reward(episodes[..., :4]), axis=1)), np.asarray(
        jnp.mean(inside, axis=1)
    )


def one_seed(seed, args):
    """Rows of the table, name -> (return, inside, error of plans), and what the picture shows."""
    data_key, fit_key, test_key, run_key = jax.random.split(jax.random.key(seed), 4)
    start_key, behave_key = jax.random.split(data_key)
    data = behave(behave_key, starts(start_key, args.episodes))
    mean, std = jnp.mean(data, axis=(0, 1)), jnp.std(data, axis=(0, 1))
    ranks = jnp.asarray(ranked(data, args.neighbors))
    began = time.perf_counter()
    velocity, params = fit(fit_key, (data - mean) / std, ranks, args)
    print(f"seed {seed}: trained in {time.perf_counter() - began:.0f} s", flush=True)

    state = starts(test_key, args.test)
    rows = {}
    for name, share in (("behavior", 0.25), ("behavior, always to the goal", 1.0)):
        rows[name] = (*summary(behave(jax.random.clone(run_key), state, share)), np.nan)
    plan = planner(velocity, mean, std, args.solver_steps)
    run = execute(plan)
    for scale in SCALES:
        episodes, errors = run(params, state, jax.random.clone(run_key), scale)
        rows[f"flow, scale {scale:g}"] = (*summary(episodes), np.asarray(errors))
    return rows, np.asarray(summary(data)[0]), (plan, params)


def draw(plan, params, path):
    """Plans from one place behind the disc, by guidance scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    state = jnp.tile(jnp.asarray([[-0.9, 0.05, 0.0, 0.0]]), (48, 1))
    figure, axes = plt.subplots(1, len(SCALES), figsize=(2.6 * len(SCALES), 2.8))
    for cell, scale in zip(axes, SCALES, strict=True):
        plans = np.asarray(jax.jit(plan)(params, state, jax.random.key(0), scale))
        cell.add_patch(plt.Circle((0, 0), RADIUS, color="0.8"))
        cell.plot(plans[:, :, 0].T, plans[:, :, 1].T, lw=0.6, color="C0", alpha=0.6)
        cell.plot(*GOAL, "*", color="C1", ms=10)
        cell.set(
            xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), xticks=[], yticks=[], title=f"scale {scale:g}"
        )
        cell.set_aspect("equal")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="seconds: to see that it runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8000, help="a multiple of 10")
    parser.add_argument("--picture", help="file for a picture of plans")
    args = parser.parse_args()
    args.width, args.batch, args.episodes, args.neighbors = 256, 256, 4000, 64
    args.test, args.solver_steps = 500, 10
    if args.short:
        args.seeds, args.steps, args.width, args.episodes, args.test = 1, 50, 64, 200, 32

    seeds = [one_seed(seed, args) for seed in range(args.seeds)]
    print(
        "| plan by | return | spread over seeds | time inside the disc | error of plans"
        " |\n|---|---|---|---|---|"
    )
    for name in seeds[0][0]:
        returns, inside, error = (
            np.asarray([np.mean(rows[name][k]) for rows, _, _ in seeds]) for k in range(3)
        )
        spread = f"{returns.std(ddof=1):.2f}" if len(returns) > 1 else "-"
        print(
            f"| {name} | {returns.mean():.2f} | {spread} | {inside.mean():.3f} |"
            f" {error.mean():.4f} |"
        )
    best = [np.quantile(returns, [0.5, 0.9, 0.99, 1.0]) for _, returns, _ in seeds]
    print(
        "returns in the data, 50, 90, 99, 100%: "
        + ", ".join(f"{q:.2f}" for q in np.mean(best, axis=0))
    )
    if args.picture:
        draw(*seeds[0][2], args.picture)


if __name__ == "__main__":
    main()
