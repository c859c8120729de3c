"""Autoencoders: the posterior and its scale, types, tiles and their memory, what is refused."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import nets
from jflow._core.linen import init_linen

NET = nets.AutoencoderKL(widths=(8, 16), num_blocks=1, groups=4)
RNG = np.random.default_rng(0)


def drawn(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def params_of(net):
    """Of normal numbers, so that nothing is zero; scales of norms lie around 1."""
    shapes = jax.eval_shape(partial(init_linen, net), jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (path[-1].key == "scale") + 0.2 * drawn(*leaf.shape), shapes
    )


PARAMS = params_of(NET)


def test_draws_scale_and_types():
    """z = mean + std * noise, (z - shift) * scale, and back; bfloat16 inside, the inputs' types
    outside."""
    scale, shift = np.array([0.5, 2.0, 1.0, -3.0]), np.array([0.1, 0.0, -1.0, 2.0])
    both = nets.autoencoder(NET, scale=scale, shift=shift)
    half = nets.autoencoder(NET.clone(dtype=jnp.bfloat16), scale=scale, shift=shift)
    x, key = drawn(2, 4, 6, 3), jax.random.key(1)

    @jax.jit
    def run(params):
        mean, log_variance = NET.apply({"params": params}, x, method="encode")
        latents = both.encode(params, x)
        return {
            "z": mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape),
            "mean": mean,
            "latents": latents,
            "draws": both.encode(params, x, key=jax.random.clone(key)),
            "images": both.decode(params, latents),
            "of the mean": NET.apply({"params": params}, x),
            "bfloat16": half.decode(params, latents),
            "bfloat16 images": half.decode(params, latents.astype(jnp.bfloat16)),
            "bfloat16 latents": half.encode(params, x.astype(jnp.bfloat16)),
        }

    out = jax.device_get(run(PARAMS))
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(out["latents"], (out["mean"] - shift) * scale)
    close(out["draws"], (out["z"] - shift) * scale)
    assert np.abs(out["draws"] - out["latents"]).min() > 1e-6
    close(out["images"], out["of the mean"])
    types = {name: value.dtype for name, value in out.items()}
    assert {name for name, dtype in types.items() if dtype == jnp.bfloat16} == {
        "bfloat16 images",
        "bfloat16 latents",
    }
    size = np.abs(out["images"]).max()
    error = np.abs(out["bfloat16"] - out["images"]).max() / size
    assert 1e-4 < error < 0.03  # it does compute in 8 bits


# A site is 2 x 2 pixels; this one reads no other site.
POINTWISE = nets.Autoencoder(
    init=lambda key, images: {},
    encode=lambda params, images, *, key=None: images[:, ::2, 1::2] ** 2,
    decode=lambda params, z: jnp.sin(z).repeat(2, 1).repeat(2, 2),
)


@pytest.mark.parametrize(
    ("size", "tile", "overlap"),
    [
        ((7, 5), 3, 1),  # 3 + 2 + 2, the last column moved inwards
        ((7, 5), 4, 3),  # up to four tiles along each axis
        ((6, 8), 3, 0),
        ((9, 4), 5, 2),  # larger than the latents along one axis
    ],
    ids=str,
)
def test_weights_of_tiles_sum_to_one(size, tile, overlap):
    tiled = nets.tiled(POINTWISE, tile, overlap)
    z, x = drawn(2, *size, 3), drawn(2, *(2 * n for n in size), 3)
    np.testing.assert_allclose(tiled.decode({}, z), POINTWISE.decode({}, z), rtol=0, atol=1e-6)
    np.testing.assert_allclose(tiled.encode({}, x), POINTWISE.encode({}, x), rtol=0, atol=1e-5)


def test_a_network_that_reads_less_than_the_overlap_is_exact_outside_of_overlaps():
    """A 3 x 3 mean reads one site around each; tiles of 5 sites begin at 0, 3 and 6 of 11, at 0
    and 2 of 7."""

    def decode(params, z):
        return nn.avg_pool(z, (3, 3), padding="SAME").repeat(2, 1).repeat(2, 2)

    z = drawn(1, 11, 7, 2)
    local = nets.tiled(POINTWISE._replace(decode=decode), 5, 2)
    error = np.abs(local.decode({}, z) - decode({}, z)).max((0, 3))
    error = error.reshape(11, 2, 7, 2).max((1, 3))  # of sites
    alone = np.ix_([0, 1, 2, 5, 8, 9, 10], [0, 1, 5, 6])
    assert error[alone].max() < 1e-6
    np.testing.assert_array_equal(np.nonzero(error[:, [0, 1, 5, 6]].max(1) > 1e-3)[0], [3, 4, 6, 7])


def test_tiles_of_a_network():
    """Outside of overlaps a site gets what its tile alone gives, and all of it from one tile."""
    both = nets.autoencoder(NET, scale=0.5)
    z, x = drawn(1, 7, 4, 4), drawn(1, 14, 8, 3)

    @jax.jit
    def run(params, z, x):
        tiled, large = nets.tiled(both, 4, 1), nets.tiled(both, 7, 2)
        alone = both.decode(params, z[:, :4]), both.decode(params, z[:, 3:])
        latents = both.encode(params, x[:, :8]), both.encode(params, x[:, 6:])
        whole = both.decode(params, z), both.encode(params, x)
        one = large.decode(params, z), large.encode(params, x)
        return tiled.decode(params, z), alone, tiled.encode(params, x), latents, whole, one

    images, alone, latents, latents_alone, whole, one = jax.device_get(run(PARAMS, z, x))
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(images[:, :6], alone[0][:, :6])
    close(images[:, 8:], alone[1][:, 2:])
    ramp = np.array([0.75, 0.25])[:, None, None]  # over the two rows of pixels of one site
    close(images[:, 6:8], ramp * alone[0][:, 6:8] + ramp[::-1] * alone[1][:, :2])
    close(latents[:, :3], latents_alone[0][:, :3])
    close(latents[:, 4:], latents_alone[1][:, 1:])
    close(latents[:, 3], (latents_alone[0][:, 3] + latents_alone[1][:, 0]) / 2)
    jax.tree.map(np.testing.assert_array_equal, one, whole)


def test_draws_in_tiles_keep_their_variance():
    """Mean 3 and standard deviation 2 in overlaps as elsewhere; the moments of 128 x 128 draws in
    rows that two tiles share are within five standard errors (1 in 10^6)."""

    def encode(params, images, *, key=None):
        mean = images[:, ::2, ::2]
        return mean if key is None else mean + 2 * jax.random.normal(key, mean.shape)

    noisy = nets.tiled(POINTWISE._replace(encode=encode), 128, 64)
    x = jnp.full((2, 384, 256, 1), 3.0)
    z = noisy.encode({}, x, key=jax.random.key(0))[:, 64:128, :, 0]
    assert z.shape == (2, 64, 128) and z.size == 128**2
    np.testing.assert_allclose(z.mean(), 3, atol=5 * 2 / 128)
    np.testing.assert_allclose(z.var() / 4, 1, atol=5 * np.sqrt(2) / 128)
    np.testing.assert_allclose(noisy.encode({}, x), 3, rtol=1e-6)


def test_the_memory_of_tiles_does_not_grow():
    both = nets.autoencoder(NET.clone(widths=(8, 8)))
    params = params_of(both.net)

    def memory(decode, size):
        z = jax.ShapeDtypeStruct((1, size, size, 4), jnp.float32)
        analysis = jax.jit(decode).lower(params, z).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    tiled = nets.tiled(both, 8, 2).decode
    assert memory(tiled, 64) < 1.1 * memory(tiled, 16)
    assert memory(tiled, 64) < 0.1 * memory(both.decode, 32)


def test_bad_inputs_are_named():
    both = nets.autoencoder(NET)
    x, z, shape = jnp.zeros((1, 4, 6, 3)), jnp.zeros((1, 2, 3, 4)), jax.eval_shape

    def fails(message, function, *args, error=ValueError, **options):
        with pytest.raises(error, match=message):
            function(*args, **options)

    fails(
        r"expected images \[b, H, W, 3\], got \[1, 4, 6, 4\]",
        shape,
        both.encode,
        PARAMS,
        z[:, :, :].repeat(2, 1).repeat(2, 2),
    )
    fails(r"expected images \[b, H, W, 3\], got \[4, 6, 3\]", shape, both.encode, PARAMS, x[0])
    fails(r"expected 2 to divide .* got \[1, 3, 6, 3\]: crop", shape, both.encode, PARAMS, x[:, :3])
    fails(r"latents \[b, h, w, 4\], got \[1, 4, 6, 3\]", shape, both.decode, PARAMS, x)
    fails(
        r"images of floats, got uint8: .* x / 127.5", shape, both.encode, PARAMS, x.astype("uint8")
    )
    fails("key to be one jax.random.key", both.encode, PARAMS, x, key=3, error=TypeError)
    fails("holds them under 'params'", shape, both.decode, {"params": PARAMS}, z)
    other = nets.autoencoder(NET.clone(latent_channels=3))
    fails("do not fit its params", shape, other.decode, PARAMS, x)
    fails("widths, one for each level, got none", nets.AutoencoderKL, widths=())
    fails("groups to be a whole number", nets.AutoencoderKL, groups=0)
    fails(
        "'encode' and 'decode', got Dense without", nets.autoencoder, nn.Dense(2), error=TypeError
    )
    fails("finite scale other than 0", nets.autoencoder, NET, scale=0.0)
    fails(
        r"for each channel, \[k\], .* shapes \[1, 2\]", nets.autoencoder, NET, scale=np.ones((1, 2))
    )
    wrong = nets.autoencoder(NET, shift=np.ones(3))
    fails("each of the 4 channels of the latents, got 3", shape, wrong.decode, PARAMS, z)
    fails("tile to be a whole number", nets.tiled, both, 0, 0)
    fails("an overlap below tile=4, got 4", nets.tiled, both, 4, 4)
    fails("expected an Autoencoder, got an AutoencoderKL", nets.tiled, NET, 4, 1, error=TypeError)
    fails("expected 2 to divide", shape, nets.tiled(both, 1, 0).encode, PARAMS, x[:, :, :5])
