"""Eight fake devices: the same training on one device and laid out in several ways, run by
`devices_worker.py`.

A scanned spline flow (its loss needs no key) and a velocity (its loss draws noise and times).
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import jflow
from jflow import data, flows, losses, nets, train

X = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
FLOW = flows.neural_spline((8,), depth=3, hidden=(32, 32), bins=4, linear=False)
VELOCITY = jflow.velocity(nets.ResidualMLP(width=32, num_blocks=3))
OPTIMIZER = optax.adam(0.01)
DATA, BOTH = train.make_mesh({"data": 8}), train.make_mesh({"data": -1, "model": 4})
FSDP = ((".*", train.fsdp(min_size=64)),)
# Tensor sharding: the first matrix of a pair split by columns, the second by rows.
TENSOR = {
    "flow": (
        ("Dense_0/kernel", P(None, "model")),
        ("Dense_0/bias", P("model")),
        ("Dense_1/kernel", P("model", None)),
    ),
    "velocity": (
        ("/in/kernel", P(None, "model")),
        ("/in/bias", P("model")),
        ("/out/kernel", P("model", None)),
    ),
}


def start(name):
    if name == "flow":
        params = FLOW.init(jax.random.key(0), X)
    else:
        params = VELOCITY.init(jax.random.key(0), X, jnp.zeros(len(X)))
    return train.init_state(params, OPTIMIZER, jax.random.key(1), ema=0.9)


def go(loss, state, sharding, **options):
    """Loss and gradient norm of four steps; bytes of the state on a device, and temporary ones;
    collectives."""
    placed = None if sharding is None else jax.tree.map(lambda x: x.sharding, state)
    step = train.make_step(loss, OPTIMIZER, ema=0.9, **options)
    batches = data.batches({"x": X}, 16, seed=3)
    step = jax.jit(step, donate_argnums=0, out_shardings=None if placed is None else (placed, None))
    rows, size = data.place(next(batches), sharding), train.bytes_per_device(state)
    program = step.lower(state, rows).compile()
    metrics_seen = []
    for _ in range(4):
        state, metrics = program(state, rows)
        metrics_seen += [float(metrics["loss"]), float(metrics["grad_norm"])]
        rows = data.place(next(batches), sharding)
    if placed is not None:
        assert jax.tree.map(lambda x: x.sharding, state) == placed
    gathers = re.findall(r"= f32\[([0-9,]*)\]\S* all-gather(?:-start)?\(", program.as_text())
    return {
        "losses": metrics_seen,
        "bytes": size,
        "temporary": program.memory_analysis().temp_size_in_bytes,
        "gathers": [[int(n) for n in shape.split(",") if n] for shape in gathers],
    }


def layout_checks():
    out = {}
    for name, loss in (("flow", losses.nll(FLOW)), ("velocity", losses.flow_matching(VELOCITY))):
        whole, rows = start(name), train.data_sharding(DATA)
        layouts = {
            "one": (loss, whole, None),
            "fsdp": (train.gather_params(loss, DATA, FSDP), train.shard(whole, DATA, FSDP), rows),
            "tensor": (
                loss,
                train.shard(whole, BOTH, TENSOR[name]),
                train.data_sharding(BOTH, "data"),
            ),
        }
        if name == "flow":
            layouts["data"] = (loss, train.shard(whole, DATA), rows)
            again = train.init_sharded(lambda: start("flow"), DATA, FSDP)
            same = jax.tree.map(lambda a, b: a.sharding == b.sharding, again, layouts["fsdp"][1])
            out["init_placed"] = all(jax.tree.leaves(same))
            pairs = zip(jax.tree.leaves(again.params), jax.tree.leaves(whole.params), strict=True)
            out["init_close"] = all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
            layouts["in_parts"] = layouts["fsdp"]
        for layout, (loss_, state, sharding) in layouts.items():
            options = {"accumulate": 2} if layout == "in_parts" else {}
            out[f"{name}_{layout}"] = go(loss_, jax.tree.map(jnp.copy, state), sharding, **options)
    return out
