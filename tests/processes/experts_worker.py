"""Eight fake devices: experts over an axis of a mesh, and the same on one device."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jflow
from jflow import losses, nets, train

RNG = np.random.default_rng(0)
BATCH = {"x": RNG.normal(size=(4, 4, 4, 1)).astype(np.float32)}
MESH = train.make_mesh({"data": 2, "expert": 4})
RULES = (
    ("experts/.*kernel$", P("expert", None, None)),
    ("experts/.*bias$", P("expert", None)),
)


def network(experts, router):
    return nets.DiT(
        width=8, num_layers=2, num_heads=2, mlp=nets.MixtureOfExperts(experts, router, ratio=2)
    )


def difference(router):
    """The largest differences of loss, metrics and gradient; the bytes of experts on a device."""
    net = nets.routed(network(8, router))
    params = jax.jit(net.init)(jax.random.key(0), BATCH["x"], jnp.zeros(4))
    params = jax.tree.map(
        lambda p: p + 0.2 * np.random.default_rng(p.size).normal(size=p.shape).astype(p.dtype),
        params,
    )
    loss = jax.jit(jax.value_and_grad(losses.balanced_matching(net), has_aux=True))
    one = jax.device_get(loss(params, jax.random.key(1), BATCH))
    spread = train.shard(params, MESH, RULES)
    rows = jax.device_put(BATCH, train.data_sharding(MESH, "data"))
    many = loss(spread, jax.random.key(1), rows)
    sizes = jax.tree.map(lambda a: np.abs(a).max(), one)
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, jax.device_get(many))
    experts = lambda tree: tree["blocks"]["mlp"]["experts"]  # noqa: E731
    return {
        "relative": max(
            float(d / max(s, 1e-3))
            for d, s in zip(jax.tree.leaves(differences), jax.tree.leaves(sizes), strict=True)
        ),
        "loss": float(one[0][0]),
        "bytes": train.bytes_per_device(experts(spread)),
        "bytes_of_all": train.bytes_per_device(experts(params)),
    }


def refused():
    """What is said of experts that do not divide."""
    velocity = jflow.velocity(network(6, nets.routers.top_k(1)))
    params = jax.eval_shape(velocity.init, jax.random.key(0), BATCH["x"], jnp.zeros(4))
    try:
        train.shardings(params, MESH, RULES)
    except ValueError as error:
        return str(error)
    return None


if __name__ == "__main__":
    seen = {
        "devices": jax.device_count(),
        "limited": difference(nets.routers.limited(2, capacity=1.0)),
        "refused": refused(),
    }
    print(json.dumps(seen))
