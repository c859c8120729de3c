"""The conditioner MLP and the embeddings of time and cond."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import nets
from jflow._core import linen

init_linen = jax.jit(linen.init_linen, static_argnums=0)
apply_linen = jax.jit(linen.apply_linen, static_argnums=0)


def test_mlp_by_hand():
    x, cond = (
        jax.random.normal(jax.random.key(0), (4, 3)),
        jax.random.normal(jax.random.key(1), (4, 2)),
    )
    net = nets.MLP((8, 5), nn.tanh)
    params = init_linen(net, jax.random.key(2), x, cond)
    first, second = params["Dense_0"], params["Dense_1"]
    h = jnp.tanh(jnp.concatenate([x, cond], 1) @ first["kernel"] + first["bias"][None])
    h = jnp.tanh(h @ second["kernel"] + second["bias"][None])
    np.testing.assert_allclose(
        apply_linen(net, params, x, cond), h, rtol=1e-5, atol=1e-6
    )  # float32 rounding


def test_mlp_flattens_a_pytree_of_conditions():
    x = jax.random.normal(jax.random.key(0), (4, 3))
    a, b = (
        jax.random.normal(jax.random.key(1), (4,)),
        jax.random.normal(jax.random.key(2), (4, 2, 2)),
    )
    net = nets.MLP((8,))
    params = init_linen(net, jax.random.key(3), x, {"a": a, "b": b})
    assert params["Dense_0"]["kernel"].shape == (3 + 1 + 4, 8)
    flat = jnp.concatenate([a[:, None], b.reshape(4, 4)], axis=1)
    np.testing.assert_array_equal(
        apply_linen(net, params, x, {"a": a, "b": b}), apply_linen(net, params, x, flat)
    )


def test_mlp_repeats_cond_over_the_middle_axes():
    x, cond = (
        jax.random.normal(jax.random.key(0), (4, 5, 3)),
        jax.random.normal(jax.random.key(1), (4, 2)),
    )
    net = nets.MLP((8, 6))
    params = init_linen(net, jax.random.key(2), x, cond)
    out = apply_linen(net, params, x, cond)
    assert out.shape == (4, 5, 6)
    np.testing.assert_allclose(
        out[:, 2], apply_linen(net, params, x[:, 2], cond), rtol=1e-5, atol=1e-6
    )  # float32


@pytest.mark.parametrize("cond", [None, jnp.ones((4, 2))], ids=["alone", "cond"])
def test_mlp_of_nothing(cond):
    """No input dimensions: the features depend on cond alone, or are constants that train."""
    x, net = jnp.zeros((4, 0)), nets.MLP((8, 6))
    params = init_linen(net, jax.random.key(0), x, cond)
    assert params["Dense_0"]["kernel"].shape == (1 if cond is None else 2, 8)
    grads = jax.grad(lambda p: jnp.sum(apply_linen(net, p, x, cond)))(params)
    assert apply_linen(net, params, x, cond).shape == (4, 6)
    assert all(jnp.all(jnp.isfinite(g)) and jnp.any(g != 0) for g in jax.tree.leaves(grads))


def test_mlp_refuses_labels_and_short_conditions():
    x = jnp.zeros((4, 3))
    with pytest.raises(ValueError, match=r"cond\['y'\] to be float, got int32: embed labels"):
        init_linen(nets.MLP(), jax.random.key(0), x, {"y": jnp.arange(4)})
    with pytest.raises(ValueError, match=r"cond to lead with 4 rows, got shape \[3, 2\]"):
        init_linen(nets.MLP(), jax.random.key(0), x, jnp.zeros((3, 2)))


def test_mlp_dropout_and_precision(x64):
    x = jax.random.normal(jax.random.key(0), (4, 3), jnp.float64)
    net = nets.MLP((64,), dropout=0.5)
    params = init_linen(net, jax.random.key(1), x)
    out = apply_linen(net, params, x)
    assert (
        out.dtype == jnp.float64
        and apply_linen(nets.MLP((64,), dtype=jnp.bfloat16), params, x).dtype == jnp.bfloat16
    )
    noisy = apply_linen(net, params, x, key=jax.random.key(2))
    kept = noisy != 0
    np.testing.assert_allclose(noisy[kept], 2 * out[kept], rtol=1e-12)  # inverted dropout, float64
    assert jnp.sum(kept) < jnp.sum(out != 0)


def test_time_features_by_hand():
    t = jnp.asarray([0.0, 0.25])
    expected = [
        [np.cos(f * s) for f in (8.0, 0.08)] + [np.sin(f * s) for f in (8.0, 0.08)]
        for s in (0.0, 0.25)
    ]
    np.testing.assert_allclose(
        nets.time_features(t, 4, scale=8.0), expected, rtol=1e-6, atol=1e-7
    )  # float32
    assert nets.time_features(t[:, None], 4, scale=1.0).shape == (2, 1, 4)
    assert nets.time_features(t.astype(jnp.bfloat16), 4, scale=1.0).dtype == jnp.float32
    for dim in (0, 3):
        with pytest.raises(ValueError, match="even dim"):
            nets.time_features(t, dim, scale=1.0)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
def test_time_scale_bounds_the_derivative(scale):
    """|d features / dt| is the norm of the frequencies: the fastest is `scale`, and it is the JVP's
    stiffness."""
    t = jnp.asarray([0.3])
    _, tangent = jax.jvp(lambda t: nets.time_features(t, 64, scale=scale), (t,), (jnp.ones(1),))
    frequencies = scale * 10_000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(
        jnp.linalg.norm(tangent), np.linalg.norm(frequencies), rtol=1e-4
    )  # sin^2 + cos^2 = 1


def test_embedding_sums_its_parts():
    t, y, z = jnp.asarray([0.2, 0.7]), jnp.asarray([1, 3]), jnp.asarray([[1.0, 2.0], [0.0, -1.0]])
    net = nets.TimeCondEmbed(8, num_classes=3)
    params = init_linen(net, jax.random.key(0), t, {"label": y, "vector": z})
    table = params["cond_0"]["embedding"]
    assert table.shape == (4, 8)  # three classes and the null label
    both = apply_linen(net, params, t, {"label": y, "vector": z})
    null = apply_linen(net, params, t, {"label": jnp.asarray([3, 3]), "vector": z})
    np.testing.assert_allclose(
        both - null, table[y] - table[jnp.asarray([3, 3])], rtol=1e-4, atol=1e-6
    )  # float32 sums


def test_embedding_refuses_what_is_no_label():
    t = jnp.zeros(2)
    with pytest.raises(ValueError, match=r"labels of shape \[b\], got \[2, 1\]"):
        init_linen(nets.TimeCondEmbed(8, 3), jax.random.key(0), t, jnp.zeros((2, 1), jnp.int32))
    with pytest.raises(ValueError, match="integer labels or floats, got bool"):
        init_linen(nets.TimeCondEmbed(8, 3), jax.random.key(0), t, jnp.zeros(2, bool))
