"""Condition encoders: what they must not see, and what they must."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import nets

KEY = jax.random.key(0)


def a_set(b=3, n=5, d=2):
    return np.random.default_rng(0).normal(size=(b, n, d))


def test_a_set_has_no_order(x64):
    net, x = nets.SetEncoder(6, (8,)), a_set()
    params = net.init(KEY, x)
    h = net.apply(params, x)
    assert h.shape == (3, 6)
    order = np.array([3, 0, 4, 1, 2])
    np.testing.assert_allclose(net.apply(params, x[:, order]), h, atol=1e-12)
    changed = net.apply(params, np.concatenate([x[:, :1] + 1, x[:, 1:]], 1))
    assert np.all(np.abs(changed - h).max(1) > 1e-3)


def test_padding_is_ignored_and_the_count_is_not(x64):
    net, x = nets.SetEncoder(6, (8,)), a_set()
    params = net.init(KEY, x)
    present = np.arange(5) < np.array([[3], [5], [0]])
    h = net.apply(params, {"x": x, "mask": present})
    for garbage in (np.nan, np.inf, 1e30):
        padded = np.where(present[..., None], x, garbage)
        np.testing.assert_array_equal(net.apply(params, {"x": padded, "mask": present}), h)
    longer = {
        "x": np.pad(x, ((0, 0), (0, 4), (0, 0))),
        "mask": np.pad(present, ((0, 0), (0, 4))).astype(int),
    }
    np.testing.assert_allclose(net.apply(params, longer), h, atol=1e-12)
    np.testing.assert_allclose(h[0], net.apply(params, x[:1, :3])[0], atol=1e-12)
    np.testing.assert_allclose(h[1], net.apply(params, x)[1], atol=1e-12)
    twice = net.apply(params, np.concatenate([x, x], 1))  # the same mean of twice as many
    assert np.all(np.abs(twice - net.apply(params, x)).max(1) > 1e-3)
    assert np.all(np.isfinite(h))


def test_gradients_of_padded_sets_are_finite():
    net, x = nets.SetEncoder(4, (8,)), a_set().astype(np.float32)
    present = np.arange(5) < np.array([[3], [5], [0]])
    x = np.where(present[..., None], x, np.nan)
    params = net.init(KEY, {"x": x, "mask": present})
    grads = jax.jit(jax.grad(lambda p: jnp.sum(net.apply(p, {"x": x, "mask": present}) ** 2)))(
        params
    )
    assert all(np.all(np.isfinite(g)) and np.any(g != 0) for g in jax.tree.leaves(grads))


def test_set_encoder_names_what_it_expects():
    net, x = nets.SetEncoder(4, (8,)), a_set()
    for cond, message in [
        (x[0], r"x of shape \[b, n, d\].*got \[\[5, 2\]\]"),
        ({"x": x, "mask": np.ones((3, 4))}, r"mask \[b, n\], got \[\[3, 5, 2\], \[3, 4\]\]"),
        ({"x": x}, r"the keys 'x' and 'mask', got \['x'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            net.init(KEY, cond)


def test_image_encoder_sees_every_pixel_of_images_of_any_size():
    net = nets.ImageEncoder(6, (4, 4))
    for shape in ((2, 8, 8, 1), (2, 7, 5, 3)):
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        params = net.init(KEY, x)
        weights = np.random.default_rng(1).normal(size=(2, 6)).astype(np.float32)

        def total(x, params=params, weights=weights):
            h = net.apply(params, x)
            return jnp.sum(weights * h), h

        grad, h = jax.jit(jax.grad(total, has_aux=True))(x)
        assert h.shape == (2, 6) and h.dtype == jnp.float32
        assert np.all(grad != 0)
    with pytest.raises(ValueError, match=r"cond of shape \[b, H, W, C\], got \[2, 7, 5\]"):
        net.init(KEY, x[..., 0])


@pytest.mark.parametrize(
    "net",
    [nets.ImageEncoder(4, (4,), dtype=jnp.bfloat16), nets.SetEncoder(4, (4,), dtype=jnp.bfloat16)],
)
def test_compute_in_bfloat16_keeps_float32_params(net):
    cond = np.ones((2, 4, 4, 1) if isinstance(net, nets.ImageEncoder) else (2, 4, 1), np.float32)
    params = net.init(KEY, cond)
    assert net.apply(params, cond).dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
