"""Few-step flow policies, from behavior cloning to reinforcement learning, on two control tasks.

    python experiments/reinflow_planning/run.py --out runs/reinflow             # the planning world
    python experiments/reinflow_planning/run.py --out runs/pendulum --task pendulum # needs gymnax
    python experiments/reinflow_planning/run.py --out runs/short --short        # seconds, for CI

A flow of 4 Euler steps from noise to the next actions, told the state, is cloned from episodes of a
mediocre controller by `losses.flow_matching`. Then ReinFlow: `solvers.noise_injection` adds noise
of a learned size to its steps, and `losses.ppo` trains both on the returns. Returns are of the flow
without the noise, before and after. OUT gets table.md and curve.png; README.md beside this file has
the results.

The planning world is that of experiments/guided_planning: a point mass, a goal behind a disc that
costs reward, and controllers that chase waypoints at random. The pendulum is Pendulum-v1 of gymnax
(pip install gymnax), whose controller swings it up by its energy and is replaced by a random torque
half of the time.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import jflow
from jflow import losses, nets, solvers, train
from jflow.solvers import grids
from jflow.types import Field

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FLOW_STEPS, DISCOUNT, LAMBDA = 4, 0.99, 0.95


class Task(NamedTuple):
    """A control task of several decisions, each of a chunk of actions."""

    starts: Callable  # (key, n) -> states, a pytree of [n, ...]
    observe: Callable  # states -> [n, k], of order one
    act: Callable  # (states, actions [n, chunk, dims] in [-1, 1]) -> (states, reward [n])
    demonstrate: Callable  # (key, n) -> (observations [m, k], actions [m, chunk, dims])
    decisions: int  # of an episode
    chunk: int  # actions of a decision
    dims: int  # of an action
    unit: float  # what a reward is divided by, for the critic


def planning() -> Task:
    """The world of experiments/guided_planning."""
    file = Path(__file__).parents[1] / "guided_planning" / "run.py"
    spec: Any = importlib.util.spec_from_file_location("guided_planning", file)
    world = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(world)
    chunk, scale = world.COMMIT, jnp.asarray([1.0, 1.0, 0.1, 0.1])

    def act(state, actions):
        def one(state, action):
            return world.move(state, action), world.reward(state)

        state, rewards = jax.lax.scan(one, state, jnp.swapaxes(actions, 0, 1))
        return state, jnp.sum(rewards, axis=0)

    def demonstrate(key, n):
        start_key, key = jax.random.split(key)
        episodes = world.behave(key, world.starts(start_key, n))
        at = np.arange(0, world.EPISODE - chunk + 1)
        windows = episodes[:, at[:, None] + np.arange(chunk)]
        windows = windows.reshape(-1, chunk, 6)
        return windows[:, 0, :4] / scale, windows[..., 4:]

    return Task(
        world.starts,
        lambda state: state / scale,
        act,
        demonstrate,
        world.EPISODE // chunk,
        chunk,
        2,
        10.0,
    )


def pendulum() -> Task:
    """Pendulum-v1 of gymnax, 200 steps, 4 of a decision."""
    import gymnax

    env, options = gymnax.make("Pendulum-v1")
    torque = options.max_torque

    def observe(state):
        speed = state.theta_dot / options.max_speed
        return jnp.stack([jnp.cos(state.theta), jnp.sin(state.theta), speed], axis=1)

    def one(state, action):
        """All pendulums by one step; the key of gymnax decides nothing here."""
        step = lambda s, a: env.step_env(jax.random.key(0), s, a, options)  # noqa: E731
        _, state, reward, _, _ = jax.vmap(step)(state, torque * action[:, 0])
        return state, reward

    def act(state, actions):
        state, rewards = jax.lax.scan(one, state, jnp.swapaxes(actions, 0, 1))
        return state, jnp.sum(rewards, axis=0)

    def starts(key, n):
        return jax.vmap(lambda key: env.reset(key, options)[1])(jax.random.split(key, n))

    def demonstrate(key, n):
        start_key, random_key, noise_key = jax.random.split(key, 3)

        def control(state, at):
            random, noise = at
            angle = (state.theta + jnp.pi) % (2 * jnp.pi) - jnp.pi
            energy = state.theta_dot**2 / 2 + 15 * jnp.cos(angle)  # 15: upright and at rest
            swing = 0.3 * state.theta_dot * (15 - energy)
            near = (jnp.cos(angle) > 0.8) & (jnp.abs(state.theta_dot) < 3)
            wanted = jnp.where(near, -10 * angle - 2 * state.theta_dot, swing) / torque
            action = jnp.clip(jnp.where(random, 2 * noise, wanted + 0.3 * noise), -1, 1)[:, None]
            return one(state, action)[0], (observe(state), action)

        random = jnp.repeat(jax.random.bernoulli(random_key, 0.5, (10, n)), 20, axis=0)
        at = random, jax.random.normal(noise_key, (200, n))
        _, (seen, actions) = jax.lax.scan(control, starts(start_key, n), at)
        begin = np.arange(0, 197)
        windows = actions[begin[:, None] + np.arange(4)]  # [197, 4, n, 1]
        return seen[begin].reshape(-1, 3), jnp.swapaxes(windows, 1, 2).reshape(-1, 4, 1)

    return Task(starts, observe, act, demonstrate, 50, 4, 1, 30.0)


class Critic(nn.Module):
    """The value of an observation, so many decisions before the end."""

    @nn.compact
    def __call__(self, seen, left):
        h = jnp.concatenate([seen, left[:, None]], axis=1)
        for _ in range(2):
            h = nn.tanh(nn.Dense(64)(h))
        return nn.Dense(1)(h)[:, 0]


def one_seed(seed, task, args):
    """({name: return of each test episode}, the return of each iteration)."""
    keys = jax.random.split(jax.random.key(seed), 8)
    seen, actions = task.demonstrate(keys[0], args.episodes)
    actions = actions.reshape(len(actions), -1)
    size = actions.shape[1]

    velocity = jflow.velocity(nets.ResidualMLP(width=args.width, num_blocks=2))
    net = jflow.velocity(nets.ResidualMLP(width=32, num_blocks=1))
    noise = Field(net.init, net.apply)
    step = solvers.noise_injection(velocity, noise, low=args.low, high=args.high)
    grid, method = grids.uniform(FLOW_STEPS), solvers.fixed(FLOW_STEPS, diffrax.Euler())
    one = actions[:1], jnp.zeros(1), seen[:1]

    # behavior cloning
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, args.steps))
    cloning = train.make_step(losses.flow_matching(velocity), optimizer)
    state = train.init_state(velocity.init(keys[1], *one), optimizer, keys[2])

    def clone(state, key):
        at = jax.random.randint(key, (256,), 0, len(actions))
        return cloning(state, {"x": actions[at], "cond": seen[at]})

    run = jax.jit(lambda state, keys: jax.lax.scan(clone, state, keys))
    cloned = run(state, jax.random.split(keys[3], args.steps))[0].params

    # returns of the flow without noise, on the same starts before and after
    @jax.jit
    def returns(params, key):
        start_key, key = jax.random.split(key)
        state = task.starts(start_key, args.test)

        def decide(state, key):
            x0 = jax.random.normal(key, (args.test, size))
            x, _ = solvers.sample(velocity, params, x0, task.observe(state), method=method)
            return task.act(state, jnp.clip(x.reshape(-1, task.chunk, task.dims), -1, 1))

        return jnp.sum(jax.lax.scan(decide, state, jax.random.split(key, task.decisions))[1], 0)

    # ReinFlow: PPO with generalized advantages
    critic = Critic()
    policy = {"velocity": jax.tree.map(jnp.copy, cloned), "noise": noise.init(keys[4], *one)}
    params = {"policy": policy, "critic": critic.init(keys[5], seen[:1], jnp.zeros(1))}
    gradient = losses.ppo(step, clip=args.clip, entropy=args.entropy)

    def loss(params, key, batch, frozen=None):
        critic_part = {name: batch[name] for name in ("cond", "left", "return")}
        rows = {k: v for k, v in batch.items() if k not in ("left", "return")}
        value, metrics = gradient(params["policy"], key, rows)
        error = critic.apply(params["critic"], critic_part["cond"], critic_part["left"])
        error = jnp.mean((error - critic_part["return"]) ** 2)
        return value + error, {**metrics, "critic": error}

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(args.rate))
    update = train.make_step(loss, optimizer)
    n, decisions = args.envs, task.decisions

    def collect(params, key):
        start_key, key = jax.random.split(key)

        def decide(state, at):
            left, key = at
            x0_key, walk_key = jax.random.split(key)
            x0 = jax.random.normal(x0_key, (n, size))
            seen = task.observe(state)
            x, path = solvers.sample_sde(
                step, params["policy"], x0, walk_key, grid, seen, return_trajectory=True
            )
            action = jnp.clip(x.reshape(n, task.chunk, task.dims), -1, 1)
            left = jnp.full(n, left)
            value = critic.apply(params["critic"], seen, left)
            after, reward = task.act(state, action)
            batch = losses.policy_batch(path, jnp.zeros(n), seen)
            return after, ({**batch, "left": left}, value, reward)

        left = jnp.arange(decisions, 0, -1) / decisions
        at = left, jax.random.split(key, decisions)
        _, (batch, values, rewards) = jax.lax.scan(decide, task.starts(start_key, n), at)

        def back(carry, at):  # nothing comes after the last decision
            advantage, after = carry
            reward, value = at
            delta = reward / task.unit + DISCOUNT * after - value
            advantage = delta + DISCOUNT * LAMBDA * advantage
            return (advantage, value), advantage

        start = jnp.zeros_like(values[0]), jnp.zeros_like(values[0])
        _, advantages = jax.lax.scan(back, start, (rewards, values), reverse=True)
        scaled = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
        batch = {**batch, "advantage": scaled, "return": advantages + values}
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), batch)
        return flat, jnp.mean(jnp.sum(rewards, axis=0))

    def iterate(state, key):
        collect_key, *epochs = jax.random.split(key, 1 + args.epochs)
        batch, mean = collect(state.params, collect_key)

        def epoch(state, key):
            order = jax.random.permutation(key, n * decisions).reshape(args.parts, -1)
            part = lambda state, at: update(state, jax.tree.map(lambda a: a[at], batch))  # noqa: E731
            return jax.lax.scan(part, state, order)

        state, metrics = jax.lax.scan(epoch, state, jnp.stack(epochs))
        return state, (mean, metrics["log_ratio"][0, 0], metrics["clipped"][-1].mean())

    state = train.init_state(params, optimizer, keys[6])
    began = time.process_time()
    run = jax.jit(lambda state, keys: jax.lax.scan(iterate, state, keys))
    curve, first = [], []
    for part in jnp.split(jax.random.split(keys[7], args.iterations), args.pieces):
        state, (mean, ratio, clipped) = jax.device_get(run(state, part))
        curve, first = [*curve, *mean], [*first, *ratio]
        print(
            f"seed {seed}, {len(curve)} iterations, {time.process_time() - began:.0f} CPU s:"
            f" return {mean[-1]:.1f}, clipped {clipped[-1]:.3f}",
            file=sys.stderr,
            flush=True,
        )
    print(f"seed {seed}: largest |log-ratio| of first updates {max(first):.1e}", flush=True)
    key = jax.random.key(1000 + seed)
    rows = {
        "behavior cloning": returns(cloned, key),
        "ReinFlow": returns(state.params["policy"]["velocity"], jax.random.clone(key)),
    }
    rows = jax.device_get(rows)
    print({name: round(float(row.mean()), 1) for name, row in rows.items()}, flush=True)
    return rows, curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of table and picture")
    parser.add_argument("--task", choices=("planning", "pendulum"), default="planning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000, help="updates of behavior cloning")
    parser.add_argument("--iterations", type=int, default=60, help="rollouts of ReinFlow")
    parser.add_argument("--envs", type=int, default=64, help="episodes of a rollout")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-4, help="of Adam")
    parser.add_argument("--clip", type=float, default=0.2)
    parser.add_argument("--entropy", type=float, default=0.0)
    parser.add_argument("--low", type=float, default=0.05, help="least noise of a step")
    parser.add_argument("--high", type=float, default=0.3, help="most noise of a step")
    parser.add_argument("--short", action="store_true", help="seconds: to see that it runs")
    args = parser.parse_args()
    args.episodes, args.test, args.epochs, args.parts, args.pieces = 1000, 500, 4, 4, 10
    if args.task == "planning":
        args.envs *= 4  # an episode has 8 decisions, and 50 of the pendulum
    if args.short:
        args.seeds, args.steps, args.iterations, args.envs, args.pieces = 1, 20, 2, 8, 1
        args.episodes, args.test, args.width = 20, 16, 16
    args.out.mkdir(parents=True, exist_ok=True)
    task = {"planning": planning, "pendulum": pendulum}[args.task]()

    made = [one_seed(seed, task, args) for seed in range(args.seeds)]
    lines = ["| policy | " + " | ".join(f"seed {i}" for i in range(args.seeds)) + " | mean |"]
    lines.append("|---" * (args.seeds + 2) + "|")
    for name in ("behavior cloning", "ReinFlow"):
        means = [rows[name].mean() for rows, _ in made]
        cells = " | ".join(f"{m:.1f}" for m in means)
        lines.append(f"| {name} | {cells} | {np.mean(means):.1f} |")
    print("\n".join(lines))
    (args.out / "table.md").write_text("\n".join(lines) + "\n")

    figure, axis = plt.subplots(figsize=(5, 3))
    for seed, (rows, curve) in enumerate(made):
        axis.plot(curve, color=f"C{seed}", label=f"seed {seed}")
        axis.axhline(rows["behavior cloning"].mean(), color=f"C{seed}", ls=":", lw=1)
    axis.set(xlabel="rollouts", ylabel="return with noise", title=args.task)
    axis.legend()
    figure.tight_layout()
    figure.savefig(args.out / "curve.png", dpi=90)


if __name__ == "__main__":
    main()
