"""Flow policies with exact soft values (MEow), and imitation by a ratio of two flows (CFIL).

    python experiments/flow_control/run.py --out runs/control     # minutes on two CPU cores
    python experiments/flow_control/run.py --out runs/short --short

The world is that of experiments/guided_planning: a point mass, a goal behind a disc that costs
reward. A decision holds its action for 4 steps, 12 decisions are an episode. `losses.soft_bellman`
trains a `flows.soft_policy` from its own episodes and nothing else, beside behavior cloning of the
mediocre episodes of that experiment by `losses.nll`. Then the policy that was learned is the
expert: from 4 of its episodes and no reward, `losses.coupled_flows` gives a reward to a second
policy, beside behavior cloning of the same 4 episodes. OUT keeps what
each seed found, so that a run goes on where it was cut off, and gets table.md and curve.png;
README.md beside this file has the results.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from jflow import bijectors, distributions, flows, losses, nets, train

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HOLD, DECISIONS, UNIT = 4, 12, 10.0  # steps of a decision, decisions, what rewards are divided by
DISCOUNT, TEMPERATURE, BATCH = 0.9, 0.02, 256
SCALE = np.asarray([1.0, 1.0, 0.1, 0.1], np.float32)  # of a state


def load_world() -> Any:
    file = Path(__file__).parents[1] / "guided_planning" / "run.py"
    spec: Any = importlib.util.spec_from_file_location("guided_planning", file)
    world = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(world)
    return world


WORLD = load_world()


def act(state, action):
    """Hold an action: (the state after, the reward of the steps)."""

    def one(state, _):
        return WORLD.move(state, action), WORLD.reward(state)

    state, rewards = jax.lax.scan(one, state, None, length=HOLD)
    return state, jnp.sum(rewards, axis=0)


def observe(state):
    return state / SCALE[None]


class Number(nn.Module):
    """A number of the state."""

    @nn.compact
    def __call__(self, state):
        return nn.Dense(1)(nets.MLP((64, 64), nn.tanh)(state))


def make_policy(args):
    net = nets.MLP((args.width, args.width), nn.tanh)
    couple = bijectors.coupling(bijectors.univariate.shift(), net, split=1)
    bend = bijectors.chain(
        bijectors.scan(bijectors.chain(couple, bijectors.reverse()), 4),
        bijectors.supports.interval(-1, 1),
    )
    linear = bijectors.amortized(bijectors.affine((2,)), net)
    return flows.soft_policy(bend, linear, distributions.normal((2,)), TEMPERATURE, Number())


def returns(decide, key, n):
    """Of episodes [n], where decide(key, seen) gives actions."""
    start_key, key = jax.random.split(key)

    def one(state, key):
        state, reward = act(state, decide(key, observe(state)))
        return state, reward

    state = WORLD.starts(start_key, n)
    return jnp.sum(jax.lax.scan(one, state, jax.random.split(key, DECISIONS))[1], axis=0)


def clone(key, seen, actions, args):
    """Behavior cloning: a conditional flow by likelihood; returns decide(key, seen)."""
    flow = flows.transformed(
        flows.real_nvp((2,), depth=4, hidden=(args.width,) * 2),
        bijectors.supports.interval(-1, 1),
    )
    keys = jax.random.split(key, 3)
    actions = jnp.clip(actions, -0.995, 0.995)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, args.cloning))
    step = train.make_step(losses.nll(flow), optimizer)
    state = train.init_state(flow.init(keys[0], actions, seen), optimizer, keys[1])

    def update(state, key):
        at = jax.random.randint(key, (BATCH,), 0, len(actions))
        return step(state, {"x": actions[at], "cond": seen[at]})

    run = jax.jit(lambda state, keys: jax.lax.scan(update, state, keys)[0].params)
    params = run(state, jax.random.split(keys[2], args.cloning))
    return lambda key, seen: flow.sample(params, key, len(seen), seen)


def learn(key, args, expert=None):
    """A soft policy from its own episodes; with rows of an expert [m, 6], for imitation alone.

    Returns decide(key, seen), and the mean reward of a decision along training."""
    policy = make_policy(args)
    pair = flows.real_nvp((6,), depth=4, hidden=(64, 64), standardize=False)
    ratio = losses.coupled_log_ratio(pair, pair, args.bound)
    keys = jax.random.split(key, 6)
    seen, actions = jnp.zeros((args.envs, 4)), jnp.zeros((args.envs, 2))
    clipped = lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))  # noqa: E731
    optimizer, pair_optimizer = clipped(args.rate), clipped(3e-4)
    step = train.make_step(losses.soft_bellman(policy, DISCOUNT), optimizer, ema=0.99)
    state = train.init_state(policy.init(keys[0], actions, seen), optimizer, keys[1], ema=0.99)
    rows = jnp.concatenate([seen, actions], axis=1)
    both = dict(zip(("agent", "expert"), (pair.init(k, rows) for k in keys[2:4]), strict=True))
    coupled = losses.coupled_flows(pair, pair, bound=args.bound, likelihood=args.likelihood)
    pair_step = train.make_step(coupled, pair_optimizer)
    pair_state = train.init_state(both, pair_optimizer, keys[4])
    size = args.envs * args.buffer
    memory = {
        "x": jnp.zeros((size, 2)),
        "cond": jnp.zeros((size, 4)),
        "next": jnp.zeros((size, 4)),
        "reward": jnp.zeros(size),
    }

    def smooth(key, rows):  # a little noise, as between levels of a grid
        return rows + args.noise * jax.random.normal(key, rows.shape)

    def iterate(carry, at):
        state, pair_state, memory, world = carry
        i, key = at
        keys = jax.random.split(key, 7)
        seen = observe(world)
        action = policy.sample(state.params, keys[0], args.envs, seen)
        action = jnp.clip(action, -0.995, 0.995)
        after, reward = act(world, action)
        new = {"x": action, "cond": seen, "next": observe(after), "reward": reward / UNIT}
        place = args.envs * (i % args.buffer)
        memory = jax.tree.map(
            lambda m, n: jax.lax.dynamic_update_slice_in_dim(m, n, place, 0), memory, new
        )
        again = jax.random.bernoulli(keys[1], 1 / DECISIONS, (args.envs, 1))
        world = jnp.where(again, WORLD.starts(keys[2], args.envs), after)
        filled = jnp.minimum(i + 1, args.buffer) * args.envs
        chosen = jax.random.randint(keys[3], (BATCH,), 0, filled)
        batch = jax.tree.map(lambda m: m[chosen], memory)
        if expert is not None:
            joint = jnp.concatenate([memory["cond"], memory["x"]], axis=1)
            back_key, their_key = jax.random.split(keys[4])
            back = jax.random.randint(back_key, (BATCH,), 0, jnp.minimum(filled, args.newest))
            newest = joint[(place + args.envs - 1 - back) % filled]
            theirs = expert[jax.random.randint(their_key, (BATCH,), 0, len(expert))]
            noisy = {"x": smooth(keys[5], newest), "expert": smooth(keys[6], theirs)}
            pair_state, _ = pair_step(pair_state, noisy)
            batch["reward"] = -ratio(pair_state.params, joint[chosen]) / args.bound
        state, _ = step(state, batch)
        return (state, pair_state, memory, world), jnp.mean(reward)

    start_key, run_key = jax.random.split(keys[5])
    carry = state, pair_state, memory, WORLD.starts(start_key, args.envs)
    at = jnp.arange(args.iterations), jax.random.split(run_key, args.iterations)
    run = jax.jit(lambda carry, at: jax.lax.scan(iterate, carry, at))
    (state, *_), curve = run(carry, at)
    params = state.ema
    return lambda key, seen: policy.push(params, jnp.zeros((len(seen), 2)), seen), curve


def demonstrations(key, decide, n):
    """Rows (state, action) [n DECISIONS, 6] of episodes."""
    start_key, key = jax.random.split(key)

    def one(state, key):
        action = decide(key, observe(state))
        return act(state, action)[0], jnp.concatenate([observe(state), action], axis=1)

    state = WORLD.starts(start_key, n)
    rows = jax.lax.scan(one, state, jax.random.split(key, DECISIONS))[1]
    return rows.reshape(-1, 6)


def one_seed(seed, args):
    keys = jax.random.split(jax.random.key(seed), 10)
    began = time.process_time()

    def test(name, decide):
        found = jax.jit(lambda key: returns(decide, key, args.test))(jax.random.key(1000 + seed))
        rows[name] = np.asarray(found)
        print(
            f"seed {seed}, {time.process_time() - began:.0f} CPU s: {name} {found.mean():.1f}",
            file=sys.stderr,
            flush=True,
        )

    rows: dict = {}
    test("uniform actions", lambda key, seen: jax.random.uniform(key, (len(seen), 2), minval=-1))
    episodes = WORLD.behave(keys[0], WORLD.starts(keys[1], args.episodes))
    held = episodes[:, : HOLD * DECISIONS].reshape(-1, HOLD, 6)
    test(
        "behavior cloning, mixed episodes",
        clone(keys[2], observe(held[:, 0, :4]), held[..., 4:].mean(1), args),
    )
    decide, curve = learn(keys[3], args)
    test("MEow, from reward", decide)
    expert = jax.jit(lambda key: demonstrations(key, decide, args.shown))(keys[4])
    test(
        f"behavior cloning, {args.shown} episodes of MEow",
        clone(keys[5], expert[:, :4], expert[:, 4:], args),
    )
    imitator, imitated = learn(keys[6], args, expert)
    test(f"CFIL, {args.shown} episodes of MEow, no reward", imitator)
    return rows, jax.device_get((curve, imitated))


def kept(seed, args):
    """What a seed found, from its file where it is there."""
    path = args.out / f"seed_{seed}.npz"
    if not path.exists():
        rows, curves = one_seed(seed, args)
        np.savez(path, curves=np.stack(curves), **rows)
    found = dict(np.load(path))
    return found, found.pop("curves")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of table and picture")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=6000, help="updates of the policy")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--shown", type=int, default=4, help="episodes of the expert")
    parser.add_argument("--bound", type=float, default=30.0, help="of the log-ratio, nats")
    parser.add_argument("--likelihood", type=float, default=0.1, help="weight in the flows' loss")
    parser.add_argument("--noise", type=float, default=0.1, help="on the rows of the flows")
    parser.add_argument("--newest", type=int, default=1600, help="rows that the agent's flow sees")
    parser.add_argument("--short", action="store_true", help="seconds: to see that it runs")
    args = parser.parse_args()
    args.width, args.envs, args.buffer = 64, 16, 1000
    args.cloning, args.episodes, args.test = 2000, 1000, 500
    if args.short:
        args.seeds, args.iterations, args.cloning, args.width = 1, 5, 5, 8
        args.envs, args.buffer, args.episodes, args.test = 4, 4, 10, 8
    args.out.mkdir(parents=True, exist_ok=True)
    made = [kept(seed, args) for seed in range(args.seeds)]
    lines = ["| policy | " + " | ".join(f"seed {i}" for i in range(args.seeds)) + " | mean |"]
    lines.append("|---" * (args.seeds + 2) + "|")
    for name in made[0][0]:
        means = [rows[name].mean() for rows, _ in made]
        lines.append(f"| {name} | {' | '.join(f'{m:.1f}' for m in means)} | {np.mean(means):.1f} |")
    print("\n".join(lines))
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    figure, axis = plt.subplots(figsize=(5, 3))
    window = max(1, args.iterations // 60)
    for seed, (_, curves) in enumerate(made):
        for curve, style, name in zip(curves, ("-", ":"), ("MEow", "CFIL"), strict=True):
            smooth = DECISIONS * np.convolve(curve, np.ones(window) / window, "valid")
            label = name if seed == 0 else None
            axis.plot(smooth, style, color=f"C{seed}", lw=1, label=label)
    axis.set(xlabel="updates", ylabel="return of an episode, with noise")
    axis.legend()
    figure.tight_layout()
    figure.savefig(args.out / "curve.png", dpi=90)


if __name__ == "__main__":
    main()
