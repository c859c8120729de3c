"""Residual, planar and Sylvester maps inside shard_map: loop carries and probes must vary as the
batch does."""

from subprocesses import run_python

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from jflow import bijectors as bj, flows, nets

jax.config.update("jax_numpy_rank_promotion", "raise")
mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng(0)
# In one dimension a probe of signs has no noise: whatever the shards draw, the series is the exact
# log-det to 0.6^60.
series = bj.log_dets.neumann(60)
mixed = nets.LipschitzMLP((8,), coeff=0.6, orders=(3, 2, 3))
for d, flow, key in [
    (1, flows.residual_flow((1,), depth=2, hidden=(8,), coeff=0.6, log_det=series), jax.random.key(0)),
    (2, flows.residual_flow((2,), depth=2, net=mixed), None),
    (2, flows.planar((2,), depth=2), None),
    (2, flows.sylvester((2,), depth=2), None),
]:
    x = rng.normal(size=(8, d)).astype(np.float32)
    shapes = jax.eval_shape(flow.init, jax.random.key(0), x)
    params = jax.tree.map(lambda p: (0.5 * rng.normal(size=p.shape)).astype(p.dtype), shapes)

    def loss(params, x, key=None):
        again, _ = flow.forward(params, flow.inverse(params, x)[0])
        return -jnp.mean(flow.log_prob(params, x, key=key)) + jnp.mean(jnp.square(again))

    def sharded(params, x):
        mean = lambda params, x: jax.lax.pmean(loss(params, x, key), "rows")
        return jax.shard_map(mean, mesh=mesh, in_specs=(P(), P("rows")), out_specs=P())(params, x)

    one = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)
    two = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1)))(params, x)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)

# roulette: a loop whose length is drawn, in each shard for itself
flow = flows.residual_flow((2,), depth=2, hidden=(8,), log_det=bj.log_dets.russian_roulette(per_row=True))
params = flow.init(jax.random.key(0), x)
drawn = lambda p, x, key: flow.log_prob(p, x, key=jax.random.fold_in(key, jax.lax.axis_index("rows")))
rows = jax.shard_map(drawn, mesh=mesh, in_specs=(P(), P("rows"), P()), out_specs=P("rows"))
np.testing.assert_allclose(jax.jit(rows)(params, x, jax.random.key(1)), flow.log_prob(params, x), atol=1e-5)  # g = 0 yet
print("equal")
"""


def test_residual_maps_run_and_differentiate_under_shard_map():
    assert run_python("-c", SCRIPT, devices=2).stdout.strip() == "equal"
