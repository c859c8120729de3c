"""What a pipeline refuses. Its numbers need several devices: tests/processes."""

import jax
import jax.numpy as jnp
import pytest

import jflow
from jflow import losses, nets, train

MESH = train.make_mesh({"stage": 1}, jax.devices()[:1])
X, T = jnp.ones((4, 4)), jnp.zeros(4)


def run(net, x=X, **options):
    velocity = train.pipelined(jflow.velocity(net), MESH, **{"microbatches": 2, **options})
    params = jax.eval_shape(velocity.init, jax.random.key(0), x, T)
    jax.eval_shape(velocity.apply, params, x, T)


def test_what_does_not_divide_or_is_no_pipeline_is_named():
    mlp = nets.ResidualMLP(width=8, num_blocks=3)
    run(mlp)
    with pytest.raises(ValueError, match="1 stages of 2 groups .* the 3 layers of 'blocks'"):
        run(mlp, rounds=2)
    with pytest.raises(ValueError, match="the 3 microbatches to divide the rows of x, got 4 rows"):
        run(mlp, microbatches=3)
    with pytest.raises(ValueError, match="TimeMLP has none"):
        run(nets.TimeMLP(hidden=(8,)))
    with pytest.raises(ValueError, match="'in_blocks' returns something from each layer"):
        run(nets.UViT(width=8, num_layers=4, num_heads=2, patch_size=2), jnp.ones((4, 4, 4, 1)))


def test_bad_options():
    velocity = jflow.velocity(nets.ResidualMLP(width=8, num_blocks=3))
    with pytest.raises(ValueError, match=r"an axis of the mesh, \['stage'\], got 'depth'"):
        train.pipelined(velocity, MESH, microbatches=2, axis="depth")
    with pytest.raises(ValueError, match="microbatches"):
        train.pipelined(velocity, MESH, microbatches=0)
    with pytest.raises(TypeError, match="expected a Velocity"):
        train.pipelined(losses.flow_matching(velocity), MESH, microbatches=2)
    wide = jax.sharding.AbstractMesh((4,), ("stage",))
    with pytest.raises(ValueError, match="2 rounds expect at least as many microbatches as stages"):
        train.pipelined(velocity, wide, microbatches=2, rounds=2)


def test_a_norm_over_batches_is_refused_and_cond_may_be_named():
    net = nets.DiT(width=8, num_layers=2, num_heads=1, num_classes=3, norm=nets.BatchNorm)
    with pytest.raises(ValueError, match="a norm over batches in 'blocks'"):
        run(net, jnp.ones((4, 4, 4, 1)))
    velocity = jflow.velocity(net.clone(norm=nets.LayerNorm))
    piped = train.pipelined(velocity, MESH, microbatches=2)
    x, cond = jnp.ones((4, 4, 4, 1)), jnp.zeros(4, int)
    params = jax.eval_shape(piped.init, jax.random.key(0), x, T, cond)
    jax.eval_shape(lambda p: piped.apply(p, x, T, cond=cond), params)
