"""What maps of scans, loops and batches do inside of shard_map and over a mesh of eight fake
devices: python mesh_worker.py FOLDER.

Prints one JSON object: what each of the checks raised, or null.
"""

import json
import sys
import traceback
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jflow import bijectors as bj
from jflow import distributions, flows, nets, train
from jflow.train import checkpoint

jax.config.update("jax_numpy_rank_promotion", "raise")


def make_mesh(n):
    axis = jax.sharding.AxisType.Auto
    return jax.make_mesh((n,), ("rows",), axis_types=(axis,), devices=jax.devices()[:n])


def compare(loss, mesh, params, *rows, key=None):
    """Value and gradients of loss(params, *rows, key), on one device and as the mean over
    shards."""

    def sharded(params, *rows):
        mean = lambda *args: jax.lax.pmean(loss(*args, key), "rows")  # noqa: E731
        specs = (P(), *(P("rows") for _ in rows))
        return jax.shard_map(mean, mesh=mesh, in_specs=specs, out_specs=P())(params, *rows)

    one, several = (
        jax.jit(jax.value_and_grad(f, argnums=tuple(range(1 + len(rows)))))(params, *rows)
        for f in (lambda *args: loss(*args, key), sharded)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(several), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


def residual_maps(folder):
    """Loop carries and probes must vary as the batch does."""
    mesh, rng = make_mesh(2), np.random.default_rng(0)
    # In one dimension a probe of signs has no noise: whatever the shards draw, the series is the
    # exact log-det to 0.6^60.
    series = bj.log_dets.neumann(60)
    mixed = nets.LipschitzMLP((8,), coeff=0.6, orders=(3, 2, 3))
    several = bj.chain(bj.residual(mixed), bj.planar(2), bj.sylvester(2))
    for d, flow, key in [
        (
            1,
            flows.residual_flow((1,), depth=2, hidden=(8,), coeff=0.6, log_det=series),
            jax.random.key(0),
        ),
        (2, flows.flow(several, distributions.normal((2,))), None),
    ]:
        x = rng.normal(size=(8, d)).astype(np.float32)
        shapes = jax.eval_shape(flow.init, jax.random.key(0), x)
        params = jax.tree.map(lambda p: (0.5 * rng.normal(size=p.shape)).astype(p.dtype), shapes)

        def loss(params, x, key, flow=flow):
            again, _ = flow.forward(params, flow.inverse(params, x)[0])
            return -jnp.mean(flow.log_prob(params, x, key=key)) + jnp.mean(jnp.square(again))

        compare(loss, mesh, params, x, key=key)

    # roulette: a loop whose length is drawn, in each shard for itself
    roulette = bj.log_dets.russian_roulette(per_row=True)
    flow = flows.residual_flow((2,), depth=2, hidden=(8,), log_det=roulette)
    params = jax.jit(flow.init)(jax.random.key(0), x)

    def drawn(params, x, key):
        own = jax.random.fold_in(key, jax.lax.axis_index("rows"))
        return flow.log_prob(params, x, key=own)

    rows = jax.shard_map(drawn, mesh=mesh, in_specs=(P(), P("rows"), P()), out_specs=P("rows"))
    np.testing.assert_allclose(
        jax.jit(rows)(params, x, jax.random.key(1)), jax.jit(flow.log_prob)(params, x), atol=1e-5
    )  # g = 0 yet


def scanned_stacks(folder):
    """Inside shard_map a scan's carry must vary as the batch does."""
    mesh, rng = make_mesh(8), np.random.default_rng(0)
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

        def loss(params, x, cond, key, bijector=bijector):
            z, log_det = bijector.inverse(params, x, cond)
            return jnp.mean(jnp.square(z - 1)) - jnp.mean(log_det)

        compare(loss, mesh, params, x, cond)

    # data-dependent init sees the whole batch, however it is laid out
    bijector = bj.scan(bj.chain(bj.actnorm(4), bj.lu(4)), 3)
    init = jax.jit(lambda x: bijector.init(jax.random.key(0), 3 + 5 * x))
    over_mesh = init(jax.device_put(x, NamedSharding(mesh, P("rows"))))
    for a, b in zip(jax.tree.leaves(init(x)), jax.tree.leaves(over_mesh), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def data_dependent_init(folder):
    """It sees the whole batch, and a restored flow keeps its own."""
    mesh, rng = make_mesh(8), np.random.default_rng(0)
    # every device's rows have a mean and a spread of their own
    of_device = np.arange(8).reshape(8, 1, 1, 1, 1)
    x = rng.normal(size=(8, 4, 4, 4, 1)) * (of_device + 1) + of_device
    x = x.reshape(32, 4, 4, 1).astype(np.float32)
    flow = flows.glow((4, 4, 1), scales=2, depth=2, hidden=4)
    init = jax.jit(lambda x: flow.init(jax.random.key(0), x))
    one, eight = init(x), init(jax.device_put(x, NamedSharding(mesh, P("rows"))))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)  # sums over rows in another order
    of_one = init(np.tile(x[:4], (8, 1, 1, 1)))  # it is the batch that decides
    assert not np.allclose(*(jax.tree.leaves(p)[0] for p in (one, of_one)), atol=0.1)

    params = jax.tree.map(lambda p: p + np.float32(0.01), one)  # as if trained
    state = train.init_state(params, optax.adam(1e-3), jax.random.key(1))
    checkpoint.save(folder, 7, state, None, {}, max_to_keep=1)
    fresh = train.init_state(init(100 * x), optax.adam(1e-3), jax.random.key(2))
    restored = checkpoint.restore(folder, fresh).state
    log_prob = jax.jit(flow.log_prob)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(restored.params), strict=True):
        np.testing.assert_array_equal(a, b)
    unseen = 3 * x
    np.testing.assert_array_equal(log_prob(params, unseen), log_prob(restored.params, unseen))


def main(folder):
    assert jax.device_count() == 8
    raised = {}
    for check in (residual_maps, scanned_stacks, data_dependent_init):
        try:
            check(folder)
            raised[check.__name__] = None
        except Exception:
            raised[check.__name__] = traceback.format_exc()[-5000:]
    print(json.dumps(raised))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
