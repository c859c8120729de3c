"""Rollouts and training of a GFlowNet on the hypergrid 8 x 8 x 8, beside torchgfn.

    python benchmarks/gflownets.py --gfn-python PYTHON
    python benchmarks/gflownets.py --short

Rollouts are those of a policy at initialization, a perceptron of two layers of 256, without
gradients. Printed are trajectories per CPU second, medians over turns of 256 trajectories or more:
CPU time of all cores, since other programs may share them; torch has one thread. With `--updates`
both are then trained by trajectory balance at one budget, of 16 trajectories an update and with the
same learning rates, and the total variation between what they draw and the rewards, exact for both,
is printed with the CPU seconds. PYTHON is that of an environment with torchgfn, see
peers/torch_gflownets.py.
"""

import argparse
import time

import jax
import optax
from clocks import interleaved, medians, peer

from jflow import gflownets, losses, train

ENVIRONMENT = gflownets.hypergrid(3, 8)
POLICY = gflownets.mlp_policy(ENVIRONMENT, (256, 256))


def rollouts_of(rows, times):
    """() -> the trajectories of the last of so many rollouts, each one program."""
    params = POLICY.init(jax.random.key(0))
    run = jax.jit(lambda params, key: gflownets.rollout(ENVIRONMENT, POLICY, params, key, rows))
    key = jax.random.key(1)
    jax.block_until_ready(run(params, key))
    return lambda: [jax.block_until_ready(run(params, key)) for _ in range(times)][-1]


def trained(updates, rows):
    """[CPU seconds with compilation, the total variation to the rewards]."""
    start = time.process_time()
    optimizer = optax.partition(
        {"net": optax.adam(optax.cosine_decay_schedule(2e-3, updates)), "log_z": optax.adam(0.1)},
        {"net": "net", "log_z": "log_z"},
    )
    step = train.make_step(losses.trajectory_balance(POLICY), optimizer)
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
    parser.add_argument("--updates", type=int, default=0, help="of trajectory balance; 0: none")
    parser.add_argument("--gfn-python", help="Python of an environment with torchgfn")
    parser.add_argument("--short", action="store_true", help="one rollout of 16, for CI")
    args = parser.parse_args()
    if args.short:
        args.rows, args.repeats = [16], 2
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, trajectories per CPU second")
    with peer(args.gfn_python, "torch_gflownets.py") as ask:
        for rows in args.rows:
            times = max(1, 256 // rows)
            calls = {"jflow": rollouts_of(rows, times)}
            if ask:
                calls["torchgfn"] = lambda rows=rows, times=times: ask(
                    {"rollout": rows, "times": times}
                )
            seconds = medians(interleaved(calls, args.repeats, "cpu"))
            rates = {name: rows * times / median for name, median in seconds.items()}
            ratio = f"  ratio {rates['jflow'] / rates['torchgfn']:.1f}" if ask else ""
            print(f"{rows:6d}  " + "  ".join(f"{k} {r:.0f}" for k, r in rates.items()) + ratio)
        if args.updates:
            found = {"jflow": trained(args.updates, 16)}
            if ask:
                found["torchgfn"] = ask({"train": args.updates, "rows": 16})
            for name, (seconds, variation) in found.items():
                print(f"{name}: {args.updates} updates, {seconds:.1f} s, TV {variation:.4f}")


if __name__ == "__main__":
    main()
