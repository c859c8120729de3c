"""Eight fake devices: networks as pipelines and on one device, run by `devices_worker.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import jflow
from jflow import losses, nets, train
from jflow.types import Condition

MESH = train.make_mesh({"data": 2, "stage": 4})
RULES = [("blocks/", train.stages()), (".*", P())]
ROWS = 8


def drawn(init, *inputs):
    """Params at which no block is the identity, without the initializers' programs."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda p: (0.3 * rng.normal(size=p.shape)).astype(p.dtype), shapes)


def difference(a, b):
    """The largest difference between two trees, over the largest number of the second."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    size = max(float(np.max(np.abs(y))) for y in jax.tree.leaves(b))
    return max(float(np.max(np.abs(x - y))) for x, y in pairs) / size


def same_numbers():
    """Values and gradients, all in one program: of a network with two stacks one after the other,
    tokens of two kinds with a mask, and a table beside the rows, [n, ...] with as many n as rows;
    and of MeanFlow's loss, which takes a derivative forwards through the pipeline."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 4, 4, 1)).astype(np.float32)
    text = Condition(
        context=rng.normal(size=(ROWS, 4, 5)).astype(np.float32),
        mask=np.arange(4) < 1 + np.arange(ROWS)[:, None] % 4,
        vector=rng.normal(size=(ROWS, 4)).astype(np.float32),
    )
    net = nets.Flux(
        width=8, num_layers=4, num_single_layers=4, num_heads=1, patch_size=2, rope_axes=(0, 4, 4)
    )
    inputs = x, np.linspace(0.1, 0.9, ROWS, dtype=np.float32), text
    velocity, flow_map = jflow.velocity(net), jflow.flow_map(nets.ResidualMLP(8, num_blocks=4))
    rows, times = x[:, 0, 0], np.ones(ROWS, np.float32)
    params = {
        "flux": drawn(velocity.init, *inputs),
        "mean_flow": drawn(flow_map.init, rows, times, times),
    }
    values = {
        "flux": [
            lambda p, v=v: jnp.mean(v.apply(p, *inputs) ** 2)
            for v in (velocity, train.pipelined(velocity, MESH, microbatches=4))
        ],
        "mean_flow": [
            lambda p, f=f: losses.mean_flow(f)(p, jax.random.key(1), {"x": rows})[0]
            for f in (flow_map, train.pipelined(flow_map, MESH, microbatches=2, remat=False))
        ],
    }

    @jax.jit
    def both(params):
        return {
            name: [jax.value_and_grad(value)(params[name]) for value in pair]
            for name, pair in values.items()
        }

    found = jax.device_get(both(params))
    return {name: difference(piped, one) for name, (one, piped) in found.items()}


def training():
    """Steps of a state whose layers lie on their stages; the next step on one device goes on from
    it, since the tree is the same. Memory for the same batch, with the same blocks."""
    mesh = train.make_mesh({"stage": 4}, jax.devices()[:4])
    velocity = jflow.velocity(nets.ResidualMLP(width=32, num_blocks=16, expansion=4))
    x, optimizer = jnp.ones((64, 3)) * jnp.linspace(-1, 1, 64)[:, None], optax.adam(1e-2)
    params = drawn(velocity.init, x, jnp.zeros(64))
    start = train.init_state(params, optimizer, jax.random.key(1))
    out = {}
    for name, network, state in (
        ("one", velocity, start),
        ("kept", train.pipelined(velocity, mesh, microbatches=16, remat=False), None),
        ("again", train.pipelined(velocity, mesh, microbatches=16, rounds=2), None),
    ):
        state = train.shard(start, mesh, RULES) if state is None else state
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = jax.jit(
            train.make_step(losses.flow_matching(network), optimizer), out_shardings=(placed, None)
        )
        batch = {"x": x if name == "one" else jax.device_put(x, train.replicated(mesh))}
        program = step.lower(state, batch).compile()
        memory = program.memory_analysis()
        out[f"{name} state"] = train.bytes_per_device(state)
        out[f"{name} peak"] = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        state, _ = program(state, batch)
        state, metrics = program(state, batch)
        out[f"{name} losses"] = [float(metrics["loss"]), float(metrics["grad_norm"])]
        if name == "again":
            state = jax.device_put(jax.device_get(state), jax.devices()[0])
            loss = losses.flow_matching(velocity)
            _, metrics = jax.jit(train.make_step(loss, optimizer))(state, {"x": x})
            out["goes on"] = float(metrics["loss"])
    return out


def drawing():
    """Dropout: rows that are all the same come out differently, and the same for the same key."""
    velocity = jflow.velocity(nets.ResidualMLP(width=16, num_blocks=4, dropout=0.5))
    x, t = np.ones((ROWS, 3), np.float32), np.full(ROWS, 0.5, np.float32)
    params = drawn(velocity.init, x, t)
    piped = jax.jit(train.pipelined(velocity, MESH, microbatches=4).apply)
    first, again, other = (
        np.asarray(piped(params, x, t, key=jax.random.key(seed))) for seed in (1, 1, 2)
    )
    rows = len(np.unique(first.round(6), axis=0))
    return [rows, bool((first == again).all()), bool((first == other).any())]


def pipeline_checks():
    return {
        "same": same_numbers(),
        "training": training(),
        "dropout": drawing(),
    }
