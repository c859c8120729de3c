"""GFlowNets that draw points: on the torus in a fixed number of moves, on the line until they stop.

    python experiments/continuous_gflownets/run.py --out runs/continuous_gflownets
    python experiments/continuous_gflownets/run.py --out runs/short --short    # seconds, for CI

A density with a known constant is learned from its values alone, by trajectory balance and by
detailed balance. What the policy draws has a density too, which quadrature over the points between
computes: the table has its total variation and Jensen-Shannon divergence from the target, and the
error of log Z. OUT gets table.md and torus.png; README.md beside this file has the results.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jflow import distributions, gflownets, losses, manifolds, nets, train


def torus_log_reward(x):
    """Four ridges of unequal height on two angles."""
    a, b = x[:, 0], x[:, 1]
    return 2.5 * jnp.sin(2 * a) * jnp.cos(b) + jnp.cos(a - b)


def line_log_reward(x):
    """A narrow and a wide mode, 6 apart, times 10."""
    parts = [jnp.log(w) + normal(x[:, 0], m, s) for w, m, s in ((3, -2, 0.3), (7, 4, 1))]
    return jnp.logaddexp(*parts)


def normal(x, mean, std):
    return -0.5 * ((x - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))


def make_torus(width, steps):
    torus = manifolds.torus(2)
    law = distributions.von_mises_mixture((2,), 6, min_std=0.25)
    forward, backward = (
        gflownets.transition(law, nets.MLP((width, width)), torus, steps=steps) for _ in range(2)
    )
    return gflownets.continuous_policy(
        torus, forward, backward, steps=steps, flow=nets.MLP((width, width))
    )


def make_line(width, steps):
    """With a stop after any move; the backward transition is a Brownian bridge."""
    line, net = manifolds.euclidean(1), nets.MLP((width, width), activation=jnp.tanh)
    law = distributions.conditional_mixture((1,), 4, min_std=0.1)
    forward = gflownets.transition(law, net, line, steps=steps)
    return gflownets.continuous_policy(
        line,
        forward,
        gflownets.bridge_transition(2.0, start=(0.0,)),
        steps=steps,
        stop=net,
        flow=net,
    )


def run_updates(loss, policy, batches, key, updates, rate):
    """(the params, the loss and log_z of every update), in one program; log_z learns at a rate of
    its own."""
    init_key, state_key, run_key = jax.random.split(key, 3)
    params = jax.jit(policy.init)(init_key)
    schedule = optax.cosine_decay_schedule(1.0, updates, alpha=0.01)
    scaled = lambda rate: optax.adam(lambda step: rate * schedule(step))  # noqa: E731
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {"net": scaled(rate), "log_z": scaled(5e-2)},
            {name: "log_z" if name == "log_z" else "net" for name in params},
        ),
    )
    step = train.make_step(loss, optimizer)

    @jax.jit
    def run(state, keys):
        return jax.lax.scan(lambda state, key: step(state, batches(state, key)), state, keys)

    state = train.init_state(params, optimizer, state_key)
    state, history = run(state, jax.random.split(run_key, updates))
    return state.params, jax.device_get(history)


def compare(policy, params, log_reward, nodes, weight):
    """(total variation, Jensen-Shannon divergence in nats, exact log Z, the learned density)."""
    nodes = np.asarray(nodes, np.float32)
    log_p = jax.jit(gflownets.terminal_log_density, static_argnums=0)(
        policy, params, nodes, np.float32(np.log(weight))
    )
    p = np.exp(np.asarray(log_p, np.float64)) * weight
    r = np.exp(np.asarray(log_reward(jnp.asarray(nodes)), np.float64)) * weight
    q, m = r / r.sum(), (p + r / r.sum()) / 2
    kl = lambda p: np.sum(p * np.log(np.maximum(p, 1e-300) / m))  # noqa: E731
    return np.abs(p - q).sum() / 2, (kl(p) + kl(q)) / 2, np.log(r.sum()), p / weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of table and picture")
    parser.add_argument("--updates", type=int, default=3000, help="of each row")
    parser.add_argument("--rows", type=int, default=128, help="trajectories of an update")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="moves of a trajectory at most")
    parser.add_argument("--side", type=int, default=48, help="nodes of an angle in the quadrature")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="seconds: to see that it runs")
    args = parser.parse_args()
    if args.short:
        args.updates, args.rows, args.width, args.steps, args.side = 20, 16, 8, 2, 12
    args.out.mkdir(parents=True, exist_ok=True)

    angles = np.linspace(-np.pi, np.pi, args.side + 1)[:-1]
    nodes = np.stack(np.meshgrid(angles, angles, indexing="ij"), -1).reshape(-1, 2)
    points = np.linspace(-12, 12, 16 * args.side + 1)[:, None]
    spaces = {
        "torus": (make_torus, torus_log_reward, nodes, (2 * np.pi / args.side) ** 2, 4e-3),
        "line": (make_line, line_log_reward, points, 24 / (16 * args.side), 2e-3),
    }
    everywhere = lambda key, n: jax.random.uniform(key, (n, 1), minval=-8.0, maxval=8.0)  # noqa: E731
    balances = {
        "trajectory balance": losses.continuous_trajectory_balance,
        "detailed balance": losses.continuous_detailed_balance,
    }
    table = ["| space | objective | trajectories | TV | JS, nats | log Z - exact | CPU s |"]
    table += ["|---|---|---|---|---|---|---|"]
    learned = None
    for space, (make, log_reward, at, weight, rate) in spaces.items():
        policy = make(args.width, args.steps)
        for name, balance in balances.items():
            for drawn in ("its own", "half backward"):
                if args.short and (space == "torus") != (drawn != "its own" and "traj" in name):
                    continue  # one of the torus, and three of the line
                began = time.process_time()
                half = args.rows // 2
                own = gflownets.continuous_rollouts(
                    policy, log_reward, args.rows if drawn == "its own" else half
                )
                draw = manifolds.torus(2).random if space == "torus" else everywhere
                back = gflownets.continuous_rollouts(policy, log_reward, half, backward=draw)

                def both(state, key, own=own, back=back):
                    own_key, back_key = jax.random.split(key)
                    parts = own(state, own_key), back(state, back_key)
                    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *parts)

                params, history = run_updates(
                    balance(policy),
                    policy,
                    own if drawn == "its own" else both,
                    jax.random.key(args.seed),
                    args.updates,
                    rate,
                )
                seconds = time.process_time() - began
                tv, js, log_z, density = compare(policy, params, log_reward, at, weight)
                error = float(params["log_z"]) - log_z
                table.append(
                    f"| {space} | {name} | {drawn} | {tv:.4f} | {js:.5f} | {error:+.4f} |"
                    f" {seconds:.0f} |"
                )
                print(table[-1], f"loss {history['loss'][-100:].mean():.2g}", flush=True)
                if space == "torus" and drawn != "its own" and learned is None:
                    learned = params, density
    (args.out / "table.md").write_text("\n".join(table) + "\n")

    params, density = learned
    policy = make_torus(args.width, args.steps)
    draws = np.asarray(policy.sample(params, jax.random.key(args.seed + 1), 2000)[0][:, -1])
    reward = np.exp(np.asarray(torus_log_reward(jnp.asarray(nodes))))
    reward = reward / (reward.sum() * (2 * np.pi / args.side) ** 2)
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    extent = (-np.pi, np.pi, -np.pi, np.pi)
    for axis, values, title in zip(
        axes, (reward, density), ("reward / Z", "density of the policy"), strict=False
    ):
        axis.imshow(
            values.reshape(args.side, args.side).T,
            origin="lower",
            extent=extent,
            vmin=0,
            vmax=reward.max(),
        )
        axis.set_title(title)
    axes[2].scatter(*draws.T, s=1, c="k")
    axes[2].set(xlim=extent[:2], ylim=extent[2:], aspect="equal", title="2000 draws")
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    figure.savefig(args.out / "torus.png", dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    main()
