"""Scanned stacks over 8 devices: inside shard_map a scan's carry must vary as the batch does."""

from subprocesses import run_python

SCRIPT = """
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jflow import bijectors as bj, nets

jax.config.update("jax_numpy_rank_promotion", "raise")
assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng(0)
x, cond = (rng.normal(size=(32, d)).astype(np.float32) for d in (4, 1))
swaps = np.stack([np.roll(np.arange(4), 2)] * 4)


def stack(transformer, **options):
    steps = bj.chain(bj.lu(4), bj.coupling(transformer, nets.MLP((8,), nn.tanh), split=2))
    return bj.scan(lambda p: bj.chain(bj.permute(p), steps), 4, xs=swaps, **options)


affine, spline = bj.univariate.affine(), bj.univariate.rational_quadratic(4)
for transformer, options in [(affine, {}), (spline, {"reversible": 2})]:
    bijector = stack(transformer, **options)
    params = jax.eval_shape(bijector.init, jax.random.key(0), x, cond)
    params = jax.tree.map(lambda p: (0.3 * rng.normal(size=p.shape)).astype(p.dtype), params)

    def loss(params, x, cond):
        z, log_det = bijector.inverse(params, x, cond)
        return jnp.mean(jnp.square(z - 1)) - jnp.mean(log_det)

    def sharded(params, x, cond):
        mean = lambda *args: jax.lax.pmean(loss(*args), "rows")
        return jax.shard_map(mean, mesh=mesh, in_specs=(P(), P("rows"), P("rows")), out_specs=P())(params, x, cond)

    one = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(params, x, cond)
    eight = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1, 2)))(params, x, cond)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4, err_msg=str(options))

# data-dependent init sees the whole batch, however it is laid out
bijector = bj.scan(bj.chain(bj.actnorm(4), bj.lu(4)), 3)
init = jax.jit(lambda x: bijector.init(jax.random.key(0), 3 + 5 * x))
over_mesh = init(jax.device_put(x, NamedSharding(mesh, P("rows"))))
for a, b in zip(jax.tree.leaves(init(x)), jax.tree.leaves(over_mesh), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
print("equal")
"""


def test_scans_run_and_differentiate_under_shard_map():
    assert run_python("-c", SCRIPT, devices=8).stdout.strip() == "equal"
