"""Squeezes, wavelets, checkerboards and parts: the order of pixels, and what is refused."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors as bj

PIXELS = np.arange(2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)


def squeezed(factor, z=PIXELS):
    return np.asarray(bj.squeeze(factor).forward({}, jnp.asarray(z))[0])


def test_squeeze_holds_a_block_row_by_row():
    x = squeezed(2)
    assert x.shape == (2, 2, 2, 12)
    for i in range(2):
        for j in range(2):
            block = [PIXELS[1, 2 * i + di, 2 * j + dj] for di in range(2) for dj in range(2)]
            np.testing.assert_array_equal(x[1, i, j], np.concatenate(block))
    np.testing.assert_array_equal(x[0, 0, 1, ::3], [6, 9, 18, 21])  # golden


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_squeeze_comes_back(factor):
    x = squeezed(factor)
    again, log_det = bj.squeeze(factor).inverse({}, jnp.asarray(x))
    np.testing.assert_array_equal(again, PIXELS)
    np.testing.assert_array_equal(log_det, 0)


def test_haar_is_four_orthonormal_filters(x64):
    """By convolution with the outer products of (1, 1)/sqrt 2 and (1, -1)/sqrt 2 at stride 2."""
    z = np.random.default_rng(0).normal(size=(2, 4, 6, 3))
    x, _ = bj.haar().forward({}, jnp.asarray(z))
    low, high = np.array([1, 1]) / np.sqrt(2), np.array([1, -1]) / np.sqrt(2)
    bands = [
        np.outer(rows, columns)
        for rows, columns in ((low, low), (low, high), (high, low), (high, high))
    ]
    kernel = jnp.asarray(np.stack(bands, -1)[:, :, None])
    for c in range(3):
        expected = jax.lax.conv_general_dilated(
            jnp.asarray(z[..., c : c + 1]),
            kernel,
            (2, 2),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        np.testing.assert_allclose(x[..., c::3], expected, atol=1e-13)
    np.testing.assert_allclose(jnp.sum(x**2), np.sum(z**2), rtol=1e-13)


@pytest.mark.parametrize("name, layer", [("haar", bj.haar()), ("squeeze", bj.squeeze())])
def test_haar_is_freias_and_squeeze_is_nflows(name, layer, x64):
    """Of peers/make_image_fixtures.py, up to the order of channels, which there run by color
    first."""
    with np.load(Path(__file__).parents[1] / "peers" / "images.npz") as peers:
        x, expected = peers["x"], peers[name]
        np.testing.assert_array_equal(peers["haar_log_det"], 0)
    y, _ = layer.forward({}, jnp.asarray(x.transpose(0, 2, 3, 1)))
    expected = expected.reshape(2, 3, 4, 2, 3).transpose(0, 3, 4, 2, 1).reshape(2, 2, 3, 12)
    np.testing.assert_allclose(y, expected, atol=1e-14)


def test_checkerboard_halves_are_the_two_colors():
    x, _ = bj.checkerboard().forward({}, jnp.asarray(PIXELS))
    color = np.indices((4, 4)).sum(0) % 2
    for half, parity in ((x[..., :3], 0), (x[..., 3:], 1)):
        np.testing.assert_array_equal(half.reshape(2, 8, 3), PIXELS[:, color == parity])


@pytest.mark.parametrize("part", [slice(1, 3), slice(-2, None), slice(None, 2), slice(2, 3)])
def test_on_part_touches_its_part_alone(part):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 4)), jnp.float32)
    layer = bj.on_part(bj.affine((2, len(range(*part.indices(4))))), part)
    params = jax.tree.map(lambda p: p + 0.5, layer.init(jax.random.key(0), x))
    y, log_det = layer.forward(params, x)
    expected = np.array(x)
    expected[..., part] = expected[..., part] * np.exp(0.5) + 0.5
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(log_det, 0.5 * 2 * len(range(*part.indices(4))), rtol=1e-6)


def test_on_part_initializes_from_its_part():
    """A data-dependent layer sees the numbers that it will act on."""
    x = jnp.asarray(
        np.random.default_rng(0).normal(size=(64, 3, 4)) * [1, 2, 3, 4] + 5, jnp.float32
    )
    layer = bj.on_part(bj.actnorm(2), slice(1, 3))
    z, _ = layer.inverse(layer.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(jnp.std(z[..., 1:3], axis=(0, 1)), 1, atol=1e-5)
    np.testing.assert_array_equal(z[..., ::3], x[..., ::3])


def test_what_does_not_divide_is_an_error():
    odd = jnp.ones((2, 3, 4, 1))
    with pytest.raises(
        ValueError, match=r"squeeze: .* H divisible by 2 and W by 2, got x of shape \[2, 3, 4, 1\]"
    ):
        bj.squeeze().forward({}, odd)
    with pytest.raises(
        ValueError, match=r"squeeze: .* C divisible by 4, got x of shape \[2, 3, 4, 1\]"
    ):
        bj.squeeze().inverse({}, odd)
    with pytest.raises(ValueError, match="haar: .* H divisible by 2"):
        bj.haar().forward({}, odd)
    with pytest.raises(ValueError, match="haar: .* C divisible by 4"):
        bj.haar().inverse({}, odd)
    with pytest.raises(ValueError, match=r"even W, got \[2, 4, 3, 1\]"):
        bj.checkerboard().forward({}, jnp.ones((2, 4, 3, 1)))
    with pytest.raises(ValueError, match=r"2 C\], got x of shape \[2, 3, 4, 1\]"):
        bj.checkerboard().inverse({}, odd)
    with pytest.raises(ValueError, match="factor to be a whole number of at least 1, got 0"):
        bj.squeeze(0)


@pytest.mark.parametrize("part", [slice(2, 5), slice(3, 3), slice(-5, None), slice(4, None)])
def test_a_part_that_is_not_there_is_an_error(part):
    layer = bj.on_part(bj.reverse(), part)
    for call in (lambda x: layer.init(jax.random.key(0), x), lambda x: layer.forward({}, x)):
        with pytest.raises(ValueError, match=r"on_part: expected .* got \[2, 4\]"):
            call(jnp.ones((2, 4)))


def test_a_part_must_keep_its_shape():
    with pytest.raises(ValueError, match=r"keep the shape \[1, 2, 2, 4\], got \[1, 1, 1, 16\]"):
        bj.on_part(bj.squeeze(), slice(0, 4)).forward({}, jnp.ones((1, 2, 2, 6)))
    for part in (2, slice(0, 4, 2)):
        with pytest.raises(TypeError, match="slice without a step"):
            bj.on_part(bj.reverse(), part)
