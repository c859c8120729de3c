"""Couplings over two devices: the whole batch under jit, each shard's own rows under shard_map."""

from subprocesses import run_python

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from jflow import couplings, train

jax.config.update("jax_numpy_rank_promotion", "raise")
assert jax.device_count() == 2
mesh = train.data_mesh()
k0, k1, key = jax.random.split(jax.random.key(0), 3)
x0, x1 = jax.random.normal(k0, (16, 2)), 1 + jax.random.normal(k1, (16, 2))
label = jnp.arange(16) % 3
placed = jax.device_put((x0, x1, label), train.data_sharding(mesh))
for coupling in (couplings.optimal_transport(couplings.within_class()), couplings.sinkhorn()):
    pair = lambda *args: tuple(map(jnp.asarray, coupling(*args)))
    i, j = jax.jit(pair)(key, *placed)
    whole = pair(key, x0, x1, label)
    np.testing.assert_array_equal(i, whole[0])
    np.testing.assert_array_equal(j, whole[1])
    mapped = {"mesh": mesh, "in_specs": P("data"), "out_specs": P("data")}
    local = jax.jit(jax.shard_map(lambda *rows: pair(key, *rows), **mapped))
    i, j = local(*placed)
    halves = [pair(key, x0[rows], x1[rows], label[rows]) for rows in (slice(8), slice(8, 16))]
    np.testing.assert_array_equal(i, jnp.concatenate([half[0] for half in halves]))
print("fine")
"""


def test_two_devices():
    assert run_python("-c", SCRIPT, devices=2).stdout.strip() == "fine"
