"""Autoencoders between images and latents: AutoencoderKL, the noun, and its form in tiles."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jflow._core.checks import check_key, check_noun, check_whole
from jflow._core.linen import apply_linen, check_linen, init_linen
from jflow._core.nouns import compiled
from jflow.nets._adm import SiteAttention, group_norm, resampled
from jflow.nets._attention import dot_product_attention
from jflow.types import Array, Params

LOG_VARIANCE = -30.0, 20.0  # as published


class Autoencoder(NamedTuple):
    """A map from images to latents and back, as pure functions of params.

    `autoencoder` makes one of a network, `tiled` one that works in tiles, `convert.autoencoder_kl`
    one of published weights. Latents have the shift and the scale that generative models are
    trained with: their numbers have a standard deviation of about one.

    Attributes:
        init: (key, images) -> params.
        encode: (params, images [b, H, W, c] in [-1, 1], *, key=None) -> latents [b, h, w, k], of
            the same type. Without a key they are the mean of the posterior, with one a draw.
        decode: (params, latents [b, h, w, k]) -> images [b, H, W, c], of the same type.
        net: the network that it was made of, which layouts are made for; None where there is none.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> halved = nets.Autoencoder(
        ...     init=lambda key, images: {},
        ...     encode=lambda params, images, *, key=None: images[:, ::2, ::2],
        ...     decode=lambda params, latents: latents.repeat(2, 1).repeat(2, 2),
        ... )
        >>> halved.decode({}, halved.encode({}, jnp.ones((1, 4, 6, 3)))).shape
        (1, 4, 6, 3)
    """

    init: Callable[..., Params]
    encode: Callable[..., Array]
    decode: Callable[..., Array]
    net: nn.Module | None = None


class AutoencoderKL(nn.Module):
    """AutoencoderKL: the convolutional autoencoder of Stable Diffusion and FLUX.1.

    `module.encode(x [b, H, W, channels]) -> (mean, log_variance)`, the Gaussian posterior of the
    latents, each [b, H / f, W / f, latent_channels] with f = 2**(len(widths) - 1), and
    `module.decode(z) -> [b, H, W, channels]`; images are in [-1, 1]. The module itself encodes and
    decodes the mean, for `init`. `autoencoder(module)` makes functions of params of it.

    Level i has widths[i] channels and works on H / 2**i x W / 2**i: `num_blocks` residual blocks on
    the way down, one more on the way up; at the smallest size are two more blocks with attention of
    one head between them. The defaults are those of Stable Diffusion; SD3 and FLUX.1 have
    latent_channels=16 and quant_convs=False.

    Attributes:
        channels: of the images.
        latent_channels: of the latents.
        widths: the channels of the levels, from the size of the image to the smallest.
        num_blocks: the number of residual blocks of a level on the way down, at least 1.
        attention: whether there is attention at the smallest size.
        quant_convs: whether a linear map of each site follows the encoder, and another one precedes
            the decoder.
        groups: of the group norms; fewer, where they do not divide the channels of a level.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params. Means, variances and softmax, and the last
            convolutions, are in float32.
        attention_fn: a function `attention_fn(q, k, v)`; see `SelfAttention`. The default's memory
            grows with the square of the number of sites; `chunked_attention()` is linear in it.

    Raises:
        ValueError: widths, num_blocks, groups or the channels are no positive whole numbers; at the
            call, f does not divide H and W, or the channels are others.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.AutoencoderKL(widths=(8, 16), num_blocks=1)
        >>> x = jnp.ones((1, 4, 6, 3))
        >>> params = jax.eval_shape(net.init, jax.random.key(0), x)
        >>> mean, log_variance = jax.eval_shape(
        ...     lambda params, x: net.apply(params, x, method="encode"), params, x
        ... )
        >>> mean.shape
        (1, 2, 3, 4)

    References:
        Rombach, Blattmann, Lorenz, Esser, Ommer, *High-Resolution Image Synthesis with Latent
            Diffusion Models*, 2021, arXiv:2112.10752.
    """

    channels: int = 3
    latent_channels: int = 4
    widths: Sequence[int] = (128, 256, 512, 512)
    num_blocks: int = 2
    attention: bool = True
    quant_convs: bool = True
    groups: int = 32
    dtype: Any = None
    attention_fn: Callable[..., Array] = dot_product_attention

    def __post_init__(self):
        sizes = ("channels", "latent_channels", "num_blocks", "groups")
        check_whole("AutoencoderKL", **{name: getattr(self, name) for name in sizes})
        if not self.widths:
            raise ValueError("AutoencoderKL: expected widths, one for each level, got none")
        for width in self.widths:
            check_whole("AutoencoderKL", widths=width)
        super().__post_init__()

    def setup(self):
        shape = tuple(self.widths), self.num_blocks, self.attention, self.groups
        computation = self.dtype, self.attention_fn
        self.encoder = _Encoder(2 * self.latent_channels, *shape, *computation)
        self.decoder = _Decoder(self.channels, *shape, *computation)
        if self.quant_convs:
            self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1))
            self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

    def encode(self, x: Array) -> tuple[Array, Array]:
        """Compute the posterior of the latents.

        Args:
            x: images in [-1, 1], [b, H, W, channels].

        Returns:
            The mean and the logarithm of the variance, each [b, H / f, W / f, latent_channels], in
            float32 or better. The logarithm lies in [-30, 20].
        """
        factor = 2 ** (len(self.widths) - 1)
        if x.ndim != 4 or x.shape[-1] != self.channels:
            raise ValueError(
                f"AutoencoderKL: expected images [b, H, W, {self.channels}], got {list(x.shape)}"
            )
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"AutoencoderKL: expected {factor} to divide the height and width of images, got "
                f"{list(x.shape)}: crop, pad or resize them"
            )
        moments = self.encoder(x)
        if self.quant_convs:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE)

    def decode(self, z: Array) -> Array:
        """Compute the images of latents.

        Args:
            z: the latents, [b, h, w, latent_channels].

        Returns:
            The images, [b, f h, f w, channels], in float32 or better. Nothing keeps them in
            [-1, 1].
        """
        if z.ndim != 4 or z.shape[-1] != self.latent_channels:
            raise ValueError(
                f"AutoencoderKL: expected latents [b, h, w, {self.latent_channels}], got "
                f"{list(z.shape)}"
            )
        return self.decoder(self.post_quant_conv(z) if self.quant_convs else z)

    def __call__(self, x: Array) -> Array:
        """Encode images [b, H, W, channels] and decode the mean, [b, H, W, channels]."""
        return self.decode(self.encode(x)[0])


class _Encoder(nn.Module):
    """Images [b, H, W, c] to [b, H / f, W / f, features]."""

    features: int
    widths: tuple[int, ...]
    num_blocks: int
    attention: bool
    groups: int
    dtype: Any
    attention_fn: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = nn.Conv(self.widths[0], (3, 3), dtype=self.dtype, name="stem")(x)
        for i, width in enumerate(self.widths):
            for j in range(self.num_blocks):
                h = _Block(width, self.groups, self.dtype, name=f"down_{i}_{j}")(h)
            if i < len(self.widths) - 1:
                after = (0, 1), (0, 1)  # padded below and on the right alone, as published
                conv = nn.Conv(width, (3, 3), 2, after, dtype=self.dtype, name=f"shrink_{i}")
                h = conv(h)
        return _head(self, _middle(self, h))


class _Decoder(nn.Module):
    """Latents [b, h, w, k] to [b, f h, f w, features]."""

    features: int
    widths: tuple[int, ...]
    num_blocks: int
    attention: bool
    groups: int
    dtype: Any
    attention_fn: Callable[..., Array]

    @nn.compact
    def __call__(self, z: Array) -> Array:
        h = nn.Conv(self.widths[-1], (3, 3), dtype=self.dtype, name="stem")(z)
        h = _middle(self, h)
        for i, width in reversed(list(enumerate(self.widths))):
            for j in range(self.num_blocks + 1):
                h = _Block(width, self.groups, self.dtype, name=f"up_{i}_{j}")(h)
            if i:
                conv = nn.Conv(width, (3, 3), dtype=self.dtype, name=f"grow_{i}")
                h = conv(resampled(h, "up"))
        return _head(self, h)


class _Block(nn.Module):
    """A residual block from h [b, H, W, c] to `width` channels."""

    width: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, h: Array) -> Array:
        y = h
        for name in ("in", "out"):
            y = nn.silu(_norm(self, y, f"{name}_norm")(y))
            y = nn.Conv(self.width, (3, 3), dtype=self.dtype, name=name)(y)
        if h.shape[-1] != self.width:
            h = nn.Conv(self.width, (1, 1), dtype=self.dtype, name="skip")(h)
        return h + y


def _norm(module, h: Array, name: str) -> nn.GroupNorm:
    return group_norm(math.gcd(module.groups, h.shape[-1]), 1e-6, module.dtype, name)


def _middle(module: _Encoder | _Decoder, h: Array) -> Array:
    """The blocks at the smallest size. To be called inside a compact method, as `_head` is."""
    width, groups, dtype = h.shape[-1], module.groups, module.dtype
    h = _Block(width, groups, dtype, name="middle_0")(h)
    if module.attention:
        options = math.gcd(groups, width), 1e-6, dtype, module.attention_fn
        h = h + SiteAttention(1, *options, name="middle_attention")(h)
    return _Block(width, groups, dtype, name="middle_1")(h)


def _head(module: _Encoder | _Decoder, h: Array) -> Array:
    return nn.Conv(module.features, (3, 3), name="head")(nn.silu(_norm(module, h, "norm")(h)))


def autoencoder(net: nn.Module, *, scale: ArrayLike = 1.0, shift: ArrayLike = 0.0) -> Autoencoder:
    """Lift a network that encodes and decodes into an `Autoencoder`, with the scale of its latents.

    encode returns (z - shift) * scale, where z is the mean of the posterior, or with a key a draw
    mean + exp(log_variance / 2) * noise; decode is net.decode(latents / scale + shift). With
    scale = 1 / std and shift = mean of the z of a training set its latents have mean 0 and standard
    deviation 1.

    Args:
        net: a Linen module with the methods `encode(x) -> (mean, log_variance)` and `decode(z)`,
            such as `AutoencoderKL()`; the module itself goes through both.
        scale: a number, or one for each latent channel, [k]. Published ones are 0.18215 for Stable
            Diffusion 1 and 2, 1.5305 for SD3, 0.3611 for FLUX.1.
        shift: likewise: 0, 0.0609, 0.1159.

    Returns:
        Autoencoder: its params are those of the net. Its functions raise a ValueError for images or
        latents of integers.

    Raises:
        TypeError: net is not an instance of a Linen module, or has no such methods.
        ValueError: scale is 0, or scale or shift is not finite.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> both = nets.autoencoder(nets.AutoencoderKL(widths=(8, 8), num_blocks=1), scale=0.5)
        >>> x = jnp.zeros((1, 8, 8, 3))
        >>> params = jax.eval_shape(both.init, jax.random.key(0), x)
        >>> jax.eval_shape(both.encode, params, x).shape
        (1, 4, 4, 4)
    """
    check_linen("autoencoder", "net", net)
    name = type(net).__name__
    missing = [method for method in ("encode", "decode") if not hasattr(net, method)]
    if missing:
        raise TypeError(
            f"autoencoder: expected net to have the methods 'encode' and 'decode', got {name} "
            f"without {missing}"
        )
    scale, shift = (np.atleast_1d(value) for value in (scale, shift))
    if scale.ndim > 1 or shift.ndim > 1:
        raise ValueError(
            "autoencoder: expected a number or one for each channel, [k], for scale and shift, got "
            f"the shapes {list(scale.shape)} and {list(shift.shape)}"
        )
    if not (np.isfinite(scale).all() and np.isfinite(shift).all() and np.all(scale != 0)):
        raise ValueError(
            f"autoencoder: expected a finite scale other than 0 and a finite shift, got "
            f"scale={scale.tolist()} and shift={shift.tolist()}"
        )

    def init(key, images):
        _check_float(name, "images", images)
        return init_linen(net, key, images)

    def encode(params, images, *, key=None):
        _check_float(name, "images", images)
        z, log_variance = apply_linen(net, params, images, method="encode")
        if key is not None:
            check_key(name, key)
            z = z + jnp.exp(0.5 * log_variance) * jax.random.normal(key, z.shape, z.dtype)
        return ((z - _like(shift, z)) * _like(scale, z)).astype(images.dtype)

    def decode(params, latents):
        _check_float(name, "latents", latents)
        z = latents / _like(scale, latents) + _like(shift, latents)
        return apply_linen(net, params, z, method="decode").astype(latents.dtype)

    return compiled(Autoencoder(init, encode, decode))._replace(net=net)


def tiled(autoencoder: Autoencoder, tile: int, overlap: int) -> Autoencoder:
    """The same autoencoder, one tile of the image after another, in the memory of a tile.

    Tiles are squares of tile x tile latent sites that overlap by `overlap` of them; the last ones
    of a row and a column are moved inwards, so that all have one size, and a tile larger than the
    latents is as large as they are. In overlaps, tiles are blended with weights that rise linearly
    from their edges and sum to one. With a key, the draws of each tile are blended so that the
    variance is the mean of the tiles' variances.

    What a site that lies in one tile alone gets is what this tile alone gives. A network that reads
    no farther than `overlap` sites gives there what it gives for the whole image; `AutoencoderKL`
    does not quite, since its norms and its attention see the whole of what they are given. With a
    tile as large as the latents nothing changes.

    Args:
        autoencoder: what encodes and decodes a tile.
        tile: the side of a tile in latent sites, such as 64 (512 pixels, where a site has 8 x 8).
        overlap: of neighboring tiles, in latent sites, below `tile`, such as 16.

    Returns:
        Autoencoder: with the same params.

    Raises:
        TypeError: autoencoder is no `Autoencoder`.
        ValueError: tile is below 1, or overlap is not in [0, tile).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> doubled = nets.Autoencoder(
        ...     init=lambda key, images: {},
        ...     encode=lambda params, images, *, key=None: images[:, ::2, ::2],
        ...     decode=lambda params, latents: latents.repeat(2, 1).repeat(2, 2),
        ... )
        >>> z = jnp.arange(5.0).reshape(1, 5, 1, 1)
        >>> nets.tiled(doubled, tile=2, overlap=1).decode({}, z)[0, :, 0, 0].tolist()
        [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0]
    """
    check_noun("tiled", autoencoder, Autoencoder)
    check_whole("tiled", tile=tile)
    check_whole("tiled", 0, overlap=overlap)
    if overlap >= tile:
        raise ValueError(
            f"tiled: expected an overlap below tile={tile}, got {overlap}: each tile has to reach "
            "beyond the one before it"
        )

    def encode(params, images, *, key=None):
        latents = jax.eval_shape(autoencoder.encode, params, images)
        if tile >= max(latents.shape[1:3]):
            return autoencoder.encode(params, images, key=key)

        def part(x, weights, key):
            mean = autoencoder.encode(params, x)
            if key is None:
                return mean * weights
            noise = autoencoder.encode(params, x, key=key) - mean
            return mean * weights + noise * jnp.sqrt(weights)

        return _blended(part, images, latents, tile, overlap, key)

    def decode(params, latents):
        images = jax.eval_shape(autoencoder.decode, params, latents)
        if tile >= max(latents.shape[1:3]):
            return autoencoder.decode(params, latents)

        def part(z, weights, _):
            return autoencoder.decode(params, z) * weights

        return _blended(part, latents, images, tile, overlap)

    return compiled(Autoencoder(autoencoder.init, encode, decode))._replace(net=autoencoder.net)


def _blended(
    part: Callable[..., Array], x: Array, out: Any, tile: int, overlap: int, key=None
) -> Array:
    """The sum over tiles of part(tile of x, weights [1, H, W, 1], key), shaped and typed like out.

    One of x and out is the latents, in whose sites tile and overlap count; the other one is the
    images.
    """
    axes = []
    for size_in, size_out in zip(x.shape[1:3], out.shape[1:3], strict=True):
        size = min(size_in, size_out)
        side, scales = min(tile, size), (size_in // size, size_out // size)
        axes.append((side, *scales, *_windows(size, side, overlap, scales[1])))
    numbers = np.indices([len(starts) for *_, starts, _ in axes]).reshape(2, -1)
    places = [starts[n] for n, (*_, starts, _) in zip(numbers, axes, strict=True)]
    windows = [jnp.asarray(w[n], x.dtype) for n, (*_, w) in zip(numbers, axes, strict=True)]
    keys = None if key is None else jax.random.split(key, len(places[0]))

    def corner(start, which):
        return (0, *(s * axis[which] for s, axis in zip(start, axes, strict=True)), 0)

    def sides(array, which):
        return (array.shape[0], *(axis[0] * axis[which] for axis in axes), array.shape[-1])

    evaluate = jax.checkpoint(part, prevent_cse=False)  # the backward pass holds one tile too

    def add(total, inputs):
        start, (down, across), key = inputs
        piece = jax.lax.dynamic_slice(x, corner(start, 1), sides(x, 1))
        found = evaluate(piece, jnp.outer(down, across)[None, ..., None], key)
        there = corner(start, 2)
        old = jax.lax.dynamic_slice(total, there, sides(out, 2))
        return jax.lax.dynamic_update_slice(total, old + found.astype(total.dtype), there), None

    zeros = jnp.zeros_like(x, out.dtype, shape=out.shape)
    return jax.lax.scan(add, zeros, (places, windows, keys))[0]


def _windows(size: int, tile: int, overlap: int, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """(where the tiles of an axis begin [n], their weights [n, tile * scale], which sum to one)."""
    count = 1 + math.ceil((size - tile) / (tile - overlap)) if size > tile else 1
    starts = np.minimum(np.arange(count) * (tile - overlap), size - tile)
    places = np.arange(tile * scale) + 0.5
    ramp = np.minimum(np.minimum(places, places[::-1]) / max(overlap * scale, 0.5), 1)
    slices = [slice(s * scale, (s + tile) * scale) for s in starts]
    total = np.zeros(size * scale)
    for where in slices:
        total[where] += ramp
    return starts, np.stack([ramp / total[where] for where in slices])


def _check_float(name: str, what: str, x: Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name}: expected {what} of floats, got {x.dtype}: images lie in [-1, 1], such as "
            "x / 127.5 - 1"
        )


def _like(value: np.ndarray, x: Array) -> Array:
    """A number, or one for each channel, as an array that broadcasts to x [b, h, w, k]."""
    if value.size not in (1, x.shape[-1]):
        raise ValueError(
            f"autoencoder: expected scale and shift to be numbers, or one for each of the "
            f"{x.shape[-1]} channels of the latents, got {value.size}"
        )
    return jnp.asarray(value, x.dtype)[None, None, None]
