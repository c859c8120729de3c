"""Rollouts and training of a GFlowNet on the hypergrid 8 x 8 x 8, beside torchgfn.

    python benchmarks/gflownets.py --gfn-python PYTHON
    python benchmarks/gflownets.py --short

Rollouts are those of a policy at initialization, a perceptron of two layers of 256, without
gradients; an update is a rollout, trajectory balance with its gradients, and Adam, at a rate of 0,
so that all turns do the same. "products" is the floor of a rollout: the matrix products of the
network alone, for as many states as the trajectories leave, in JAX and in torch. Printed are
trajectories per CPU second, medians over turns of 256 trajectories or more: CPU time of all cores,
since other programs may share them; torch has one thread.

With `--updates` both are then trained by each objective at one budget, of 16 trajectories an update
and with the same learning rates, and the total variation between what they draw and the rewards,
exact for both, is printed with the CPU seconds. PYTHON is that of an environment with torchgfn, see
peers/torch_gflownets.py.
"""

import argparse
import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clocks import interleaved, medians, peer

from jflow import gflownets, losses, train

ENVIRONMENT = gflownets.hypergrid(3, 8)
POLICY = gflownets.mlp_policy(ENVIRONMENT, (256, 256))
LENGTH = 4  # the mean length of a trajectory where all actions are equally likely
OBJECTIVES = {
    "trajectory balance": losses.trajectory_balance(POLICY),
    "log-partition variance": losses.log_partition_variance(POLICY),
    "detailed balance": losses.detailed_balance(POLICY),
    "modified detailed balance": losses.modified_detailed_balance(ENVIRONMENT, POLICY),
    "sub-trajectory balance": losses.sub_trajectory_balance(POLICY),
    "flow matching": losses.gfn_flow_matching(ENVIRONMENT, POLICY),
}


def repeated(run, times):
    """() -> the last of so many results of run(key), each one program; compiled at once."""
    key = jax.random.key(1)
    jax.block_until_ready(run(key))
    return lambda: [jax.block_until_ready(run(key)) for _ in range(times)][-1]


def rollout_of(rows):
    """key -> trajectories."""
    params = POLICY.init(jax.random.key(0))
    run = jax.jit(lambda params, key: gflownets.rollout(ENVIRONMENT, POLICY, params, key, rows))
    return lambda key: run(params, key)


def update_of(rows):
    """key -> the state after a rollout, the loss and its gradients, and Adam."""
    optimizer = optax.adam(0.0)
    step = train.make_step(losses.trajectory_balance(POLICY), optimizer)
    batches = gflownets.rollouts(ENVIRONMENT, POLICY, rows)
    state = train.init_state(POLICY.init(jax.random.key(0)), optimizer, jax.random.key(1))
    run = jax.jit(lambda state, key: step(state, batches(state, key))[0])
    return lambda key: run(state, key)


def products_of(rows):
    """key -> the network's logits at `rows` random observations, LENGTH times, one after another:
    as many states as trajectories of this policy leave."""
    net = POLICY.init(jax.random.key(0))["net"]
    layers = [net["MLP_0"][name]["kernel"] for name in ("Dense_0", "Dense_1")]
    head = net["Dense_0"]["kernel"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, len(layers[0]))), jnp.float32)

    @jax.jit
    def run(x):
        def one(x, _):
            logits = jax.nn.relu(jax.nn.relu(x @ layers[0]) @ layers[1]) @ head
            return x + logits[:, :1], logits

        return jax.lax.scan(one, x, length=LENGTH)[1]

    return lambda key: run(x)


def trained(loss, updates, rows):
    """[CPU seconds with compilation, the total variation to the rewards]."""
    start = time.process_time()
    optimizer = optax.partition(
        {"net": optax.adam(optax.cosine_decay_schedule(2e-3, updates)), "log_z": optax.adam(0.1)},
        {"net": "net", "log_z": "log_z"},
    )
    step = train.make_step(loss, optimizer)
    batches = gflownets.rollouts(ENVIRONMENT, POLICY, rows, epsilon=0.05)
    one = lambda state, key: (step(state, batches(state, key))[0], None)  # noqa: E731
    state = train.init_state(POLICY.init(jax.random.key(0)), optimizer, jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), updates)
    run = jax.jit(lambda state, keys: jax.lax.scan(one, state, keys)[0])
    state = jax.block_until_ready(run(state, keys))
    seconds = time.process_time() - start
    states = gflownets.enumerate_states(ENVIRONMENT)
    found = gflownets.exact_distribution(POLICY, state.params, states)
    target = gflownets.reward_distribution(states)
    return [seconds, float(gflownets.total_variation(found, target))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 256, 4096])
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--updates", type=int, default=0, help="of each objective; 0: none")
    parser.add_argument("--gfn-python", help="Python of an environment with torchgfn")
    parser.add_argument("--short", action="store_true", help="16 rows, two turns, for CI")
    args = parser.parse_args()
    if args.short:
        args.rows, args.repeats = [16], 2
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, trajectories per CPU second")
    kinds = {"rollout": rollout_of, "products": products_of, "update": update_of}
    with peer(args.gfn_python, "torch_gflownets.py") as ask:
        for rows, (kind, make) in itertools.product(args.rows, kinds.items()):
            times = max(1, 256 // rows)
            calls = {"jflow": repeated(make(rows), times)}
            if ask:
                request = {kind: rows, "times": times}
                calls["torchgfn"] = functools.partial(ask, request)
            seconds = medians(interleaved(calls, args.repeats, "cpu"))
            rates = {name: rows * times / median for name, median in seconds.items()}
            ratio = f"  ratio {rates['jflow'] / rates['torchgfn']:.1f}" if ask else ""
            found = "  ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
            print(f"{rows:6d}  {kind:8s}  {found}{ratio}", flush=True)
        for objective, loss in OBJECTIVES.items() if args.updates else ():
            found = {"jflow": trained(loss, args.updates, 16)}
            if ask:
                asked = {"objective": objective, "train": args.updates, "rows": 16}
                found["torchgfn"] = ask(asked)
            found = [
                f"{name} TV {tv:.4f} in {seconds:.1f} s" for name, (seconds, tv) in found.items()
            ]
            print(f"{objective}, {args.updates} updates: {', '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
