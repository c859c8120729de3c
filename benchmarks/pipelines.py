"""Pipelines: what a stage holds, beside one device, and how long devices wait in each schedule.

    python benchmarks/pipelines.py [--out PICTURE.png] [--short]

Memory is XLA's own account of one training step of a DiT on four fake CPU devices, for the same
batch of 64 rows. Waits are played by `jflow.train.schedules`, with backward passes twice as long as
forward passes. It takes a minute on two cores.
"""

import argparse
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=4"
)

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import jflow
from jflow import losses, nets, train
from jflow.train import schedules

STAGES, ROWS = 4, 64
HALF = {"forward": 0.5, "backward": 1}  # ticks: a pass through half of a device's layers
COLORS = {"forward": "tab:blue", "backward": "tab:green", "inputs": "tab:green"}
COLORS |= {"weights": "tab:olive", "frozen": "tab:gray"}


def velocity(remat: bool, num_layers: int):
    return jflow.velocity(
        nets.DiT(
            width=32, num_layers=num_layers, num_heads=2, patch_size=1, num_classes=3, remat=remat
        )
    )


def step_memory(network, mesh=None) -> tuple[float, float]:
    """MiB of the state and of the largest use of memory on a device, in one training step."""
    x, labels = jnp.ones((ROWS, 4, 4, 1)), jnp.arange(ROWS) % 3
    optimizer, batch = optax.adam(1e-3), {"x": x, "cond": labels}

    def start():
        params = network.init(jax.random.key(0), x, jnp.zeros(ROWS), labels)
        return train.init_state(params, optimizer, jax.random.key(1))

    if mesh is None:
        state = jax.jit(start)()
    else:
        state = train.init_sharded(start, mesh, [("blocks/", train.stages()), (".*", P())])
        batch = jax.device_put(batch, train.replicated(mesh))
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = train.make_step(losses.flow_matching(network), optimizer)
    step = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
    memory = step.lower(state, batch).compile().memory_analysis()
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    return train.bytes_per_device(state) / 2**20, peak / 2**20


def memory_table(num_layers: int) -> None:
    print("MiB a device          state    step   of one device")
    mesh = train.make_mesh({"stage": STAGES}, jax.devices()[:STAGES])
    for remat in (False, True):
        network = velocity(remat, num_layers)
        state, one = step_memory(network)
        kind = "layers rematerialized" if remat else "all activations kept"
        print(f"{kind}\n  one device         {state:7.2f} {one:7.2f}   1.00")
        for m in (8, 16):
            piped = train.pipelined(network, mesh, microbatches=m, remat=False)
            state, peak = step_memory(piped, mesh)
            print(f"  {m:2d} microbatches    {state:7.2f} {peak:7.2f}   {peak / one:.2f}")
    piped = train.pipelined(velocity(False, num_layers), mesh, microbatches=16)
    state, peak = step_memory(piped, mesh)
    print(f"stages rematerialized\n  16 microbatches    {state:7.2f} {peak:7.2f}")


def ways(m: int) -> dict[str, schedules.Timeline]:
    gpipe = schedules.gpipe(STAGES, m)
    flushed = schedules.one_forward_one_backward(STAGES, m)
    played = {
        "GPipe": schedules.play(gpipe),
        "1F1B": schedules.play(flushed),
        "circular, 2 rounds": schedules.play(schedules.interleaved(STAGES, m, 2), HALF),
        "2BP of GPipe": schedules.play(schedules.split_backward(gpipe)),
        "2BP of 1F1B": schedules.play(schedules.split_backward(flushed)),
    }
    tasks = [1.0] * (3 * m)
    return {**played, "1F1B, frozen encoders": schedules.fill_bubbles(played["1F1B"], tasks)}


def wait_table() -> None:
    print(f"\nshare of time that {STAGES} devices wait, and activations held by the first")
    print("microbatches             " + "".join(f"{m:>14d}" for m in (4, 8, 16)))
    columns = [ways(m) for m in (4, 8, 16)]
    for name in columns[0]:
        cells = [f"{c[name].idle:8.1%} {c[name].held[0]:5d}" for c in columns]
        print(f"{name:25s}" + "".join(cells))


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    timelines = ways(6)
    figure, axes = plt.subplots(
        len(timelines), 1, figsize=(9, 9), sharex=True, layout="constrained"
    )
    for axis, (name, timeline) in zip(axes, timelines.items(), strict=True):
        for device, worked in enumerate(timeline.busy):
            for begin, end, op in worked:
                axis.barh(device, end - begin, left=begin, color=COLORS[op.kind], edgecolor="white")
                if op.kind in ("forward", "backward"):
                    axis.text((begin + end) / 2, device, op.microbatch, ha="center", va="center")
        axis.set(title=f"{name}: {timeline.idle:.1%} idle", yticks=range(STAGES))
        axis.invert_yaxis()
    axes[-1].set_xlabel("ticks")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    figure.legend(handles, COLORS, loc="outside lower center", ncols=len(COLORS))
    figure.savefig(path, dpi=80)
    print(f"\nwrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where to draw the schedules")
    parser.add_argument("--short", action="store_true", help="a network of 4 layers")
    options = parser.parse_args()
    wait_table()
    memory_table(STAGES if options.short else 16)
    if options.out:
        draw(options.out)


if __name__ == "__main__":
    main()
