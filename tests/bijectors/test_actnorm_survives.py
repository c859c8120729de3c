"""Data-dependent initialization sees the whole batch over eight devices, and a restored flow keeps
its own."""

from subprocesses import run_python

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec as P
from jflow import flows, train
from jflow.train import checkpoint

assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng(0)
# every device's rows have a mean and a spread of their own
x = (rng.normal(size=(8, 4, 4, 4, 1)) * np.arange(1, 9).reshape(8, 1, 1, 1, 1) + np.arange(8).reshape(8, 1, 1, 1, 1))
x = x.reshape(32, 4, 4, 1).astype(np.float32)
flow = flows.glow((4, 4, 1), scales=2, depth=2, hidden=4)
init = jax.jit(lambda x: flow.init(jax.random.key(0), x))
one, eight = init(x), init(jax.device_put(x, NamedSharding(mesh, P("rows"))))
for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)  # sums over rows in another order
one_row = init(x[:4])
assert not np.allclose(*(jax.tree.leaves(p)[0] for p in (one, one_row)), atol=0.1)  # it is the batch that decides

params = jax.tree.map(lambda p: p + np.float32(0.01), one)  # as if trained
state = train.init_state(params, optax.adam(1e-3), jax.random.key(1))
checkpoint.save(sys.argv[1], 7, state, None, {}, max_to_keep=1)
fresh = train.init_state(init(100 * x), optax.adam(1e-3), jax.random.key(2))
restored = checkpoint.restore(sys.argv[1], fresh).state
log_prob = jax.jit(flow.log_prob)
for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(restored.params), strict=True):
    np.testing.assert_array_equal(a, b)
np.testing.assert_array_equal(log_prob(params, 3 * x), log_prob(restored.params, 3 * x))  # data it never saw
print("equal")
"""


def test_actnorm_survives_eight_devices_and_a_restore(tmp_path):
    assert run_python("-c", SCRIPT, tmp_path, devices=8).stdout.strip() == "equal"
