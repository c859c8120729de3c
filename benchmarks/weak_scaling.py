"""Weak scaling over 1 to 8 devices: the same rows for each device, in every layout of the state.

    python benchmarks/weak_scaling.py [--model dit] [--short]

One table. For each layout and number of devices: the collectives in the compiled step (one inside a
scan is counted once, and runs once a layer), bytes of the training state (params, Adam's moments,
average) and temporary bytes on one device, the largest relative difference of losses and gradient
norms over three steps from those of one device on the same rows, and the time of a step over that
on one device.

Without accelerators the devices are fake ones on the CPU: they share its cores, so that the time
there says how much work is done in all (its ideal is the number of devices), not how fast a pod
would be. `--short` is a minute on two CPU cores.
"""

import argparse
import os
import re
from collections import Counter


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("spline", "mlp", "dit"), default="dit")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16, help="on each device (default 16)")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--short", action="store_true", help="an mlp of width 64, depth 3 on 1 and 8 devices"
    )
    args = parser.parse_args()
    if args.short:
        args.model, args.width, args.depth, args.devices, args.repeats = "mlp", 64, 3, [1, 8], 3
    return args


def models(args):
    """name -> (init, loss, event shape, rules of tensor sharding)"""
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    import jflow
    from jflow import flows, losses, nets

    columns, rows = P(None, "model"), P("model", None)
    if args.model == "spline":
        flow = flows.neural_spline((64,), depth=args.depth, hidden=(args.width,) * 2)
        rules = (
            ("Dense_0/kernel", columns),
            ("Dense_0/bias", P("model")),
            ("Dense_1/kernel", rows),
        )
        return flow.init, losses.nll(flow), (64,), rules
    if args.model == "mlp":
        net, event = nets.ResidualMLP(width=args.width, num_blocks=args.depth), (64,)
    else:
        net, event = nets.DiT(width=args.width, num_layers=args.depth, num_heads=4), (16, 16, 4)
    velocity = jflow.velocity(net)
    rules = (("/in/kernel", columns), ("/in/bias", P("model")), ("/out/kernel", rows))
    init = lambda key, x: velocity.init(key, x, jnp.zeros(len(x)))  # noqa: E731
    return init, losses.flow_matching(velocity), event, rules


def main():
    args = arguments()
    most = max(args.devices)
    if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={most}".strip()

    import jax
    import numpy as np
    import optax
    from clocks import interleaved, medians

    from jflow import data, train

    init, loss, event, tensor = models(args)
    optimizer = optax.adam(1e-3)
    rng = np.random.default_rng(0)

    def start(rows):
        return train.init_state(
            init(jax.random.key(0), rows[:2]), optimizer, jax.random.key(1), ema=0.999
        )

    def layouts(n):
        data_mesh, tensor_mesh = (
            train.data_mesh(jax.devices()[:n]),
            train.make_mesh({"model": n}, jax.devices()[:n]),
        )
        split = ((".*", train.fsdp()),)
        yield "data", data_mesh, (), loss, train.data_sharding(data_mesh)
        if n > 1:
            yield (
                "fsdp",
                data_mesh,
                split,
                train.gather_params(loss, data_mesh, split),
                train.data_sharding(data_mesh),
            )
            yield "tensor", tensor_mesh, tensor, loss, train.replicated(tensor_mesh)

    def build(n, mesh, rules, loss, rows):
        state = train.shard(start(rows["x"]), mesh, rules)
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = jax.jit(
            train.make_step(loss, optimizer, ema=0.999),
            donate_argnums=0,
            out_shardings=(placed, None),
        )
        return state, step.lower(state, rows).compile()

    def three_steps(state, program, rows):
        metrics_seen = []
        for _ in range(3):
            state, metrics = program(state, rows)
            metrics_seen += [float(metrics["loss"]), float(metrics["grad_norm"])]
        return state, np.asarray(metrics_seen)

    kind = jax.devices()[0].device_kind
    print(
        f"\n{args.model}, width {args.width}, depth {args.depth}, {args.rows} rows a device, on"
        f" {kind} devices\n"
    )
    print("| layout | devices | collectives | state, MiB | temporary, MiB | difference | time |")
    print("|---|---|---|---|---|---|---|")
    base = None
    for n in args.devices:
        x = {"x": rng.normal(size=(n * args.rows, *event)).astype(np.float32)}
        alone = train.data_mesh(jax.devices()[:1])
        place = data.place(x, train.replicated(alone))
        state, program = build(1, alone, (), loss, place)
        _, expected = three_steps(state, program, place)
        for name, mesh, rules, loss_, sharding in layouts(n):
            rows = data.place(x, sharding)
            state, program = build(n, mesh, rules, loss_, rows)
            size = train.bytes_per_device(state)
            state, metrics_seen = three_steps(state, program, rows)
            held = [state]

            def step(program=program, rows=rows, held=held):
                held[0], metrics = program(held[0], rows)
                return metrics

            time = medians(interleaved({"step": step}, args.repeats))["step"]
            base = base or time
            found = collectives(program.as_text())
            said = ", ".join(f"{count} {op}" for op, count in sorted(found.items())) or "none"
            memory = program.memory_analysis()
            temporary = "?" if memory is None else f"{memory.temp_size_in_bytes / 2**20:.1f}"
            off = np.max(np.abs(metrics_seen / expected - 1))
            print(
                f"| {name} | {n} | {said} | {size / 2**20:.2f} | {temporary} | {off:.0e} |"
                f" {time / base:.2f} |",
                flush=True,
            )


def collectives(text):
    """How many of each the compiled program has, an asynchronous pair counted once."""
    names = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return Counter(re.findall(rf"= .*? ({names})(?:-start)?\(", text))


if __name__ == "__main__":
    main()
