"""Conditioners for images."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import nets, train
from jflow._core import linen
from jflow._core.linen import init_linen
from jflow.nets._conv import LoopConv, split_cond
from jflow.types import Condition

apply_linen = jax.jit(linen.apply_linen, static_argnums=0)  # op by op is a program each

X = np.random.default_rng(0).normal(size=(3, 4, 6, 2)).astype(np.float32)
IMAGE = np.random.default_rng(1).normal(size=(3, 8, 12, 1)).astype(np.float32)
VECTOR = np.random.default_rng(2).normal(size=(3, 5)).astype(np.float32)
NETS = {
    "GlowNet": nets.GlowNet(8, features=4),
    "GatedAttentionNet": nets.GatedAttentionNet(8, num_blocks=2, num_heads=2),
}


@pytest.mark.parametrize("channels", [2, 7])
def test_loop_conv_is_a_convolution(channels, x64):
    """With nn.Conv's params: more channels than features, and fewer."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4, channels)))
    layer, oracle = LoopConv(3), nn.Conv(3, (3, 3))
    params = jax.tree.map(lambda p: p + 0.1, init_linen(oracle, jax.random.key(0), x))
    assert jax.tree.map(jnp.shape, init_linen(layer, jax.random.key(0), x)) == jax.tree.map(
        jnp.shape, params
    )
    np.testing.assert_allclose(
        apply_linen(layer, params, x), apply_linen(oracle, params, x), atol=1e-12
    )


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    "cond", [None, {"image": IMAGE, "vector": VECTOR}], ids=["none", "image and vector"]
)
def test_features_have_the_pixels_of_x_and_every_parameter_a_gradient(name, cond):
    net = NETS[name]
    width = 4 if name == "GlowNet" else 8

    @jax.jit
    def run(x, cond):
        params = init_linen(net, jax.random.key(0), x, cond)
        features, pullback = jax.vjp(lambda p, c: apply_linen(net, p, x, c), params, cond)
        half = apply_linen(net.clone(dtype=jnp.bfloat16), params, x, cond)
        return params, features, pullback(jnp.cos(features)), half

    params, features, grads, half = run(X, cond)
    assert (
        features.shape == (3, 4, 6, width)
        and features.dtype == jnp.float32
        and half.dtype == jnp.bfloat16
    )
    assert 0.05 < np.std(features) < 2  # neither vanishing nor exploding at init
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.all(np.isfinite(g)) and np.any(g != 0), jax.tree_util.keystr(path)
    for one in (IMAGE, VECTOR):
        alone = lambda one: apply_linen(net, init_linen(net, jax.random.key(0), X, one), X, one)  # noqa: E731
        assert jax.eval_shape(alone, one).shape == features.shape
    if name == "GatedAttentionNet":
        for path, p in jax.tree_util.tree_leaves_with_path(params["blocks"]):
            if path[-1].key == "kernel":
                assert np.any(p[0] != p[1]), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", NETS)
def test_what_is_aligned_starts_without_a_say(name):
    """A trained network goes on as it was, the gradient reaches the new weights, and the image has
    a say then, at any whole multiple of the size of x."""
    net, vector = NETS[name], Condition(vector=VECTOR)
    more = vector._replace(aligned=IMAGE)

    @jax.jit
    def run(x, more):
        trained = init_linen(net, jax.random.key(0), x, vector)
        params = train.warm_start(init_linen(net, jax.random.key(1), x, more), trained)
        features = lambda p: apply_linen(net, p, x, more)  # noqa: E731
        grads = jax.grad(lambda p: jnp.sum(jnp.sin(features(p))))(params)
        moved = jax.tree.map(lambda p, g: p + g, params, grads)
        return params, apply_linen(net, trained, x, vector), features(params), features(moved)

    params, before, after, moved = run(X, more)
    np.testing.assert_array_equal(before, after)
    assert params["aligned"]["kernel"].shape[:3] == (3, 3, 4)
    other = run(X, more._replace(aligned=IMAGE + 1))
    np.testing.assert_array_equal(other[2], after)
    assert np.all(np.max(np.abs(other[3] - moved), axis=(1, 2, 3)) > 1e-3)
    with pytest.raises(ValueError, match=f"{name}: expected cond.aligned, since its params"):
        apply_linen(net, params, X, vector)
    with pytest.raises(
        ValueError, match=rf"{name}: .*aligned to be \[b, 4 f.* got \[3, 8, 13, 1\]"
    ):
        net.init(jax.random.key(0), X, Condition(aligned=jnp.zeros((3, 8, 13, 1))))


def test_attention_sees_every_pixel_and_convolutions_their_neighbors():
    """d features[pixel 0] / d x, by which inputs it does not vanish."""

    def reach(net):
        def pixel(x):
            return jnp.sum(apply_linen(net, init_linen(net, jax.random.key(0), X[:1]), x)[0, 0, 0])

        grad = jax.jit(jax.grad(pixel))(X[:1])
        return np.any(grad[0] != 0, axis=-1)

    assert np.all(reach(NETS["GatedAttentionNet"]))
    near = reach(NETS["GlowNet"])  # two 3 x 3 convolutions: a radius of 2
    assert np.all(near[:3, :3]) and not near[3:].any() and not near[:, 3:].any()


def test_dropout_needs_a_key():
    net = nets.GatedAttentionNet(8, num_blocks=1, num_heads=2, dropout=0.5)

    @jax.jit
    def run(x):
        params = init_linen(net, jax.random.key(0), x)
        return [
            apply_linen(net, params, x, key=key)
            for key in (None, None, jax.random.key(1), jax.random.key(2))
        ]

    a, again, b, c = run(X)
    np.testing.assert_array_equal(a, again)
    assert np.any(a != b) and np.any(b != c)


def test_images_of_cond_are_squeezed_to_the_size_of_x():
    x, vector, _ = split_cond("net", {"a": IMAGE, "b": VECTOR, "c": VECTOR[:, 0]}, jnp.asarray(X))
    assert x.shape == (3, 4, 6, 2 + 4) and vector.shape == (3, 6)
    np.testing.assert_array_equal(x[:, 1, 2, 2:], IMAGE[:, 2:4, 4:6, 0].reshape(3, 4))
    x, *_ = split_cond(
        "net", X, jnp.asarray(X[:, :, ::2])
    )  # a color of a checkerboard: half of the columns
    np.testing.assert_array_equal(x[:, 1, 2, 2:], X[:, 1, 4:6].reshape(3, 4))


def test_what_does_not_fit_is_an_error():
    x = jnp.asarray(X)
    with pytest.raises(
        ValueError,
        match=r"\[b, 4 f, 6 g, channels\] for x of shape \[3, 4, 6, 2\], got \[3, 8, 13, 1\]",
    ):
        split_cond("net", np.ones((3, 8, 13, 1), np.float32), x)
    with pytest.raises(ValueError, match="embed labels first"):
        split_cond("net", np.arange(3), x)
    with pytest.raises(ValueError, match="lead with 3 rows"):
        split_cond("net", VECTOR[:2], x)
    for net in (nets.GlowNet(4, 4), nets.GatedAttentionNet(4, 1, 2)):
        with pytest.raises(ValueError, match="expected a vector in cond, as at init, got none"):
            jax.eval_shape(
                lambda net=net: apply_linen(net, init_linen(net, jax.random.key(0), x, VECTOR), x)
            )
    with pytest.raises(ValueError, match="num_blocks to be a whole number of at least 1, got 0"):
        nets.GatedAttentionNet(num_blocks=0)
    with pytest.raises(ValueError, match="heads to divide the width 8"):
        jax.eval_shape(lambda: nets.GatedAttentionNet(8, num_heads=3).init(jax.random.key(0), x))
