"""MMDiT and Flux: texts, guidance, depth; published sizes and outputs are in tests/convert."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import equations

import jflow
from jflow import nets, train
from jflow._core.linen import apply_linen, init_linen
from jflow.types import Condition

NETS = {
    "MMDiT": lambda **options: nets.MMDiT(2, 16, 3, 2, dual_layers=1, qk_norm=True, **options),
    "Flux": lambda **options: nets.Flux(2, 16, 1, 1, 2, rope_axes=(2, 2, 4), **options),
}
every_net = pytest.mark.parametrize("make", NETS.values(), ids=NETS.keys())


def inputs(b=2, n=5):
    rng = np.random.default_rng(0)
    x, context, vector = (
        rng.normal(size=(b, *shape)).astype(np.float32) for shape in ((4, 6, 2), (n, 7), (3,))
    )
    return x, np.linspace(0.2, 0.7, b, dtype=np.float32), Condition(context=context, vector=vector)


def random_params(net, *args):
    shapes = jax.eval_shape(net.init, jax.random.key(0), *args)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: (0.25 * rng.standard_normal(p.shape)).astype(p.dtype), shapes)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: nets.MMDiT(2, 16, n, 2, dual_layers=n - 2, qk_norm=True),
        lambda n: nets.MMDiT(2, 16, n, 2, remat=True),
        lambda n: nets.Flux(2, 16, n, 2 * n, 2, rope_axes=(2, 2, 4)),
    ],
    ids=["MMDiT", "MMDiT with remat", "Flux"],
)
def test_the_program_does_not_grow_with_depth(make):
    x, t, cond = inputs()

    def size(depth):
        net = make(depth)
        params = jax.eval_shape(lambda: net.init(jax.random.key(0), x, t, cond))
        return equations(jax.grad(lambda p: jnp.sum(net.apply(p, x, t, cond))), params)

    assert size(24) == size(4) > 100


@every_net
def test_masked_tokens_are_tokens_left_out(make):
    """And tokens of the text have no order; four rows of one image and text show it."""
    x, t, cond = jax.tree.map(lambda a: np.repeat(a[:1], 4, axis=0), inputs())
    params = random_params(make(), x, t, cond)
    context = cond.context.copy()
    context[1] = context[1, [3, 0, 4, 1, 2]]
    context[2, 3:] = np.nan
    context[3, 3:] += 5.0
    masked = cond._replace(context=context, mask=np.arange(5) < np.array([[5, 5, 3, 3]]).T)
    short = cond._replace(context=cond.context[:, :3])

    @jax.jit
    def run(params):
        chunked = make(attention_fn=nets.chunked_attention(4))
        apply = lambda net, cond: apply_linen(net, params, x, t, cond)  # noqa: E731
        return apply(make(), masked), apply(make(), short), apply(chunked, masked)

    out, left_out, chunked = jax.device_get(run(params))
    np.testing.assert_allclose(out[1], out[0], atol=1e-4)
    np.testing.assert_allclose(out[2:], left_out[2:], atol=1e-4)
    assert np.max(np.abs(out[2] - out[0])) > 1e-2
    np.testing.assert_allclose(chunked, out, atol=1e-4)


@every_net
def test_a_flow_map_starts_as_its_velocity(make):
    x, t, cond = inputs()
    velocity, flow_map = jflow.velocity(make()), jflow.flow_map(make())

    @jax.jit
    def run(key, params):
        student = train.warm_start(flow_map.init(key, x, t, t, cond), params)
        return flow_map.apply(student, x, t, t + 0.2, cond), velocity.apply(params, x, t, cond)

    found, expected = run(jax.random.key(0), random_params(make(), x, t, cond))
    np.testing.assert_array_equal(found, expected)


def test_remat_changes_nothing():
    x, t, cond = inputs()
    make = partial(nets.MMDiT, 2, 16, 2, 2)
    params = random_params(make(), x, t, cond)

    def gradient(params, remat):
        net = make(remat=remat)
        return jax.grad(lambda p: jnp.sum(net.apply({"params": p}, x, t, cond)))(params)

    plain, again = (jax.jit(gradient, static_argnums=1)(params, remat) for remat in (False, True))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)  # float32, reordered


def test_guidance_is_a_number_of_the_network():
    x, t, cond = inputs()
    net = NETS["Flux"](guidance=3.5)
    params = random_params(net, x, t, cond)
    out, other = (
        np.asarray(jax.jit(net.clone(guidance=scale).apply)({"params": params}, x, t, cond))
        for scale in (3.5, 1.0)
    )
    assert np.min(np.max(np.abs(out - other), axis=(1, 2, 3))) > 1e-3
    with pytest.raises(ValueError, match="Flux: expected a guidance.* got None"):
        jax.eval_shape(partial(apply_linen, net.clone(guidance=None)), params, x, t, cond)


def test_bad_inputs():
    x, t, cond = inputs()
    for name, make in NETS.items():
        net = make()
        params = random_params(net, x, t, cond)

        def fails(message, x=x, cond=cond, net=net, params=params, name=name):
            with pytest.raises(ValueError, match=f"{name}: {message}"):
                jax.eval_shape(partial(apply_linen, net), params, x, t, cond)

        fails(r"expected x of shape \[b, H, W, C\], H and W divisible by 2", x=x[:, :3])
        fails(r"expected patches of 8 numbers.* patch_size=2 and 1 channels, 4", x=x[..., :1])
        fails(
            r"expected patches of 8 numbers.* patch_size=1 and 2 channels, 2",
            net=net.clone(patch_size=1),
        )
        fails(r"expected cond.context, got None", cond=None)
        fails(r"expected cond.context, got \['vector'\]", cond=cond.vector)
        fails(r"expected cond.vector, got \['context'\]", cond=Condition(context=cond.context))
        fails(
            r"expected cond.context of 7 numbers.*\[2, 5, 6\]",
            cond=cond._replace(context=cond.context[..., :6]),
        )
        fails(
            r"expected cond.vector of 3 numbers.*\[2, 2\]",
            cond=cond._replace(vector=cond.vector[:, :2]),
        )
        fails(r"takes no cond.label", cond=cond._replace(label=jnp.zeros(2, int)))
    with pytest.raises(ValueError, match=r"at most grid_size=2 rows .*, got 2 and 3"):
        net = NETS["MMDiT"](grid_size=2)
        jax.eval_shape(partial(apply_linen, net), params, x, t, cond)
    with pytest.raises(ValueError, match=r"attention_fn to return \[2, 11, 2, 8\], got \[2, 11"):
        net = NETS["MMDiT"](attention_fn=lambda q, k, v: v[..., 0])
        jax.eval_shape(partial(init_linen, net), jax.random.key(0), x, t, cond)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nets.MMDiT(width=10, num_heads=2),
        lambda: nets.MMDiT(width=16, num_heads=3),
        lambda: nets.MMDiT(num_layers=1),
        lambda: nets.MMDiT(num_layers=4, dual_layers=4),
        lambda: nets.Flux(width=16, num_heads=3),
        lambda: nets.Flux(width=16, num_heads=2, rope_axes=(2, 2, 2)),
        lambda: nets.Flux(width=16, num_heads=2, rope_axes=(2, 3, 3)),
        lambda: nets.Flux(num_single_layers=0),
    ],
)
def test_bad_options_fail_at_construction(make):
    with pytest.raises(ValueError, match="expected"):
        make()
