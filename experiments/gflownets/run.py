"""GFlowNets by eight objectives on four targets whose distributions are known exactly.

    python experiments/gflownets/run.py --data-dir DATA --out runs/gflownets
    python experiments/gflownets/run.py --out runs/short --short    # no data, seconds, for CI

The targets are the hypergrid 8 x 8 x 8 with the published reward, the 65536 sequences of TFBind8
(SIX6) and the 161051 strings of QM9 with 11 blocks and 5 places, both prepended to and appended to,
and the 130 maximal independent sets of a random graph of 20 vertices. Every objective gets the same
trajectories, network and schedule. The error is exact: the total variation between the distribution
of the policy's objects, carried along all edges, and the one in proportion to the rewards. DATA has
discrete/tfbind8_SIX6_REF_R1.npz and discrete/qm9str_reward.npz; README.md beside this file has the
results. OUT gets table.md and curves.png.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot as plt

import jflow
from jflow import gflownets, losses, train

RATE, EPSILON = 2e-3, 0.05


def six6(folder):
    """SIX6 binding of all 8-mers: the E-score between 0 and 1, cubed, as peers have it."""
    score = np.load(folder / "discrete/tfbind8_SIX6_REF_R1.npz")["escore"].reshape((4,) * 8)
    score = (score - score.min()) / (score.max() - score.min())
    table = np.maximum(10 * score**3, 1e-3)
    return gflownets.two_ended_sequences(gflownets.reward_table(table), 8, 4)


def qm9(folder):
    """Strings of 11 blocks, 5 places: the reward of the table, to the power of 5, as peers have
    it."""
    table = np.maximum(np.load(folder / "discrete/qm9str_reward.npz")["reward"], 1e-3)
    table = 100 * (table / table.max()) ** 5
    return gflownets.two_ended_sequences(gflownets.reward_table(table), 5, 11)


def graph(vertices=20, share=0.25):
    """The maximal independent sets of a random graph with this share of all edges."""
    edges = np.triu(np.random.default_rng(0).random((vertices, vertices)) < share, 1)
    return gflownets.independent_sets(edges | edges.T)


def potential(environment, hidden):
    """The network of a learned decomposition."""
    return jflow.field(gflownets.Perceptron(environment.num_actions, hidden))


def objectives(environment, policy, hidden):
    """{name: a loss}; those that need the reward of what is built so far, where there is one."""
    named = {
        "trajectory balance": losses.trajectory_balance(policy),
        "log-partition variance": losses.log_partition_variance(policy),
        "detailed balance": losses.detailed_balance(policy),
        "sub-trajectory balance": losses.sub_trajectory_balance(policy),
        "flow matching": losses.gfn_flow_matching(environment, policy),
        "learned decomposition": losses.learned_energy_decomposition(
            environment, policy, potential(environment, hidden)
        ),
    }
    if environment.stop is not None:
        named["modified detailed balance"] = losses.modified_detailed_balance(environment, policy)
    if np.isfinite(environment.log_reward(environment.reset(1))).all():
        named["forward-looking"] = losses.forward_looking(policy, environment.log_reward)
    return named


def measured(environment, states, policy, loss, hidden, batch, updates, points, seed):
    """(seconds, the total variation at so many points of the training)."""
    net_key, potential_key, state_key, run_key = jax.random.split(jax.random.key(seed), 4)
    x = environment.observe(environment.reset(1))
    params = policy.init(net_key)
    params["potential"] = potential(environment, hidden).init(potential_key, x, jnp.zeros(1))
    schedule = optax.cosine_decay_schedule(RATE, updates)
    optimizer = optax.partition(
        {"networks": optax.adam(schedule), "log_z": optax.adam(0.1)},
        {"net": "networks", "potential": "networks", "log_z": "log_z"},
    )
    step = train.make_step(loss, optimizer)
    batches = gflownets.rollouts(environment, policy, batch, epsilon=EPSILON)
    target = gflownets.reward_distribution(states)

    @jax.jit
    def run(state, keys):
        one = lambda state, key: (step(state, batches(state, key))[0], None)  # noqa: E731
        state, _ = jax.lax.scan(one, state, keys)
        found = gflownets.exact_distribution(policy, state.params, states)
        return state, gflownets.total_variation(found, target)

    state = train.init_state(params, optimizer, state_key)
    keys = jax.random.split(run_key, updates).reshape(points, -1)
    start, errors = time.process_time(), []
    for part in keys:
        state, error = run(state, part)
        errors.append(float(error))
    return time.process_time() - start, errors


def regressed(environment, states, hidden, batch, updates, seed):
    """(seconds, the total variation of a network of the same width that is told the log-rewards of
    as many objects, drawn uniformly): what it can know of them."""
    x = environment.observe(jax.tree.map(jnp.asarray, states.terminals))
    y = jnp.asarray(states.log_reward)
    net = jflow.field(gflownets.Perceptron(1, hidden))
    net_key, run_key = jax.random.split(jax.random.key(seed))
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, updates))

    def read(params, x):
        return net.apply(params, x, jnp.zeros(len(x)))[:, 0]

    def update(carry, key):
        params, memory = carry
        at = jax.random.randint(key, (batch,), 0, len(y))
        grads = jax.grad(lambda params: jnp.mean((read(params, x[at]) - y[at]) ** 2))(params)
        step, memory = optimizer.update(grads, memory)
        return (optax.apply_updates(params, step), memory), None

    @jax.jit
    def run(params, keys):
        (params, _), _ = jax.lax.scan(update, (params, optimizer.init(params)), keys)
        found = jax.nn.softmax(read(params, x))
        return gflownets.total_variation(found, gflownets.reward_distribution(states))

    start = time.process_time()
    params = net.init(net_key, x[:1], jnp.zeros(1))
    error = float(run(params, jax.random.split(run_key, updates)))
    return time.process_time() - start, error


def targets(args):
    """{name: an environment}."""
    if args.short:
        return {"hypergrid 4x4": gflownets.hypergrid(2, 4), "independent sets": graph(8)}
    return {
        "hypergrid 8x8x8": gflownets.hypergrid(3, 8),
        "TFBind8 (SIX6)": six6(args.data_dir),
        "QM9 strings": qm9(args.data_dir),
        "independent sets": graph(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, help="needed without --short")
    parser.add_argument("--updates", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=128, help="the width of two layers")
    parser.add_argument("--batch", type=int, default=16, help="trajectories of an update")
    parser.add_argument("--only", nargs="*", help="objectives")
    parser.add_argument("--targets", nargs="*")
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    if not args.short and args.data_dir is None:
        parser.error("expected --data-dir, or --short")
    hidden, batch = (args.hidden, args.hidden), args.batch
    updates, points = (20, 2) if args.short else (args.updates, 20)
    args.out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 4, figsize=(13, 4), layout="constrained")
    colors = {}  # the same in all panels
    lines = ["| target | objective | total variation | CPU s |", "|---|---|---|---|"]
    for axis, (name, environment) in zip(axes, targets(args).items(), strict=False):
        if args.targets and name not in args.targets:
            continue
        states = gflownets.enumerate_states(environment)
        policy = gflownets.mlp_policy(environment, hidden)
        params, target = policy.init(jax.random.key(0)), gflownets.reward_distribution(states)
        uniform = gflownets.exact_distribution(policy, params, states)
        start = float(gflownets.total_variation(uniform, target))
        lines.append(f"| {name} | none, actions equally likely | {start:.4f} | |")
        seconds, error = regressed(environment, states, hidden, batch, updates, args.seed)
        lines.append(f"| {name} | none, regression of log-rewards | {error:.4f} | {seconds:.0f} |")
        print(*lines[-2:], sep="\n", flush=True)
        for objective, loss in objectives(environment, policy, hidden).items():
            if args.only and objective not in args.only:
                continue
            seconds, errors = measured(
                environment, states, policy, loss, hidden, batch, updates, points, args.seed
            )
            lines.append(f"| {name} | {objective} | {errors[-1]:.4f} | {seconds:.0f} |")
            print(lines[-1], flush=True)
            at = np.arange(points + 1) * updates // points
            color = colors.setdefault(objective, f"C{len(colors)}")
            axis.plot(at, [start, *errors], color=color, label=objective)
        axis.set(title=name, xlabel=f"updates of {batch} trajectories", yscale="log")
    axes[0].set_ylabel("total variation")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    figure.savefig(args.out / "curves.png", dpi=80)


if __name__ == "__main__":
    main()
