"""Rearrangements of images [b, H, W, C]: space into channels.

Couplings can then split the image, and convolutions see further.
"""

import jax.numpy as jnp

from jflow._core.arrays import float_dtype, space_to_depth, zero_log_det
from jflow._core.checks import check_whole
from jflow._core.nouns import no_params
from jflow.types import Array, Bijector

__all__ = ["checkerboard", "haar", "squeeze"]

_HAAR = [
    [0.5, 0.5, 0.5, 0.5],
    [0.5, -0.5, 0.5, -0.5],
    [0.5, 0.5, -0.5, -0.5],
    [0.5, -0.5, -0.5, 0.5],
]  # its own inverse


def squeeze(factor: int = 2) -> Bijector:
    """Turn blocks of pixels into channels (space to depth).

    The source side is [b, H, W, C], the data side [b, H/f, W/f, f^2 C] with f = factor:

        x[b, i, j, (f di + dj) C + c] = z[b, f i + di, f j + dj, c],    log_det = 0.

    The order of channels is that of TensorFlow's space_to_depth. A multi-scale flow is written in
    the direction data -> noise, where `squeeze` comes first, and inverted as a whole:
    chain(squeeze(), ..., invert(squeeze())) keeps the shape of the image.

    Also known as: space to depth, pixel unshuffle.

    Args:
        factor: f, the side of a block, which divides H and W.

    Returns:
        Bijector: the map, without params.

    Raises:
        ValueError: factor is below 1, or a size of the image is not divisible by it.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijectors.squeeze().forward({}, jnp.zeros((1, 4, 4, 3)))[0].shape
        (1, 2, 2, 12)

    References:
        Dinh, Sohl-Dickstein, Bengio, *Density Estimation Using Real NVP*, 2016, arXiv:1605.08803.
    """
    check_whole("squeeze", factor=factor)
    return Bijector(
        no_params,
        lambda params, z, cond=None, *, key=None: (
            space_to_depth("squeeze", z, factor, factor),
            zero_log_det(z),
        ),
        lambda params, x, cond=None, *, key=None: (
            _depth_to_space("squeeze", x, factor),
            zero_log_det(x),
        ),
    )


def haar() -> Bijector:
    """Turn 2 x 2 blocks of pixels into channels by orthonormal Haar wavelets.

    The source side is [b, H, W, C], the data side [b, H/2, W/2, 4 C]. Of a block ((p, q), (r, s))
    the data side holds

        (p + q + r + s)/2, (p - q + r - s)/2, (p + q - r - s)/2, (p - q - r + s)/2,

    each for all C: the average first, so that `on_part` can go on with it. log_det = 0.

    Also known as: wavelet downsampling.

    Returns:
        Bijector: the map, without params.

    Raises:
        ValueError: H or W is odd, or the channels of the data side are not divisible by 4.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijectors.haar().forward({}, jnp.ones((1, 2, 2, 1)))[0].tolist()
        [[[[2.0, 0.0, 0.0, 0.0]]]]

    References:
        Ardizzone, Lüth, Kruse, Rother, Köthe,
            *Guided Image Generation with Conditional Invertible Neural Networks*, 2019,
            arXiv:1907.02392.
    """

    def mix(blocks):
        parts = blocks.reshape(*blocks.shape[:-1], 4, blocks.shape[-1] // 4).astype(
            float_dtype(blocks)
        )
        mixed = jnp.stack(
            [sum(_HAAR[i][j] * parts[..., j, :] for j in range(4)) for i in range(4)], axis=-2
        )
        return mixed.reshape(blocks.shape).astype(blocks.dtype)

    def forward(params, z, cond=None, *, key=None):
        return mix(space_to_depth("haar", z, 2, 2)), zero_log_det(z)

    def inverse(params, x, cond=None, *, key=None):
        _check_channels("haar", x, 2)
        return _depth_to_space("haar", mix(x), 2), zero_log_det(x)

    return Bijector(no_params, forward, inverse)


def checkerboard() -> Bijector:
    """Turn the two colors of a checkerboard into channels, so that one color can steer the other.

    The source side is [b, H, W, C], the data side [b, H, W/2, 2 C], which `coupling(..., split=C)`
    splits. x[b, i, k, :C] is the pixel of z in row i and columns 2k, 2k+1 with an even sum of row
    and column, x[b, i, k, C:] the odd one. log_det = 0.

    Returns:
        Bijector: the map, without params.

    Raises:
        ValueError: W is odd, or the data side has an odd number of channels.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> z = jnp.arange(4.0).reshape(1, 2, 2, 1)
        >>> bijectors.checkerboard().forward({}, z)[0][0, :, 0].tolist()
        [[0.0, 1.0], [3.0, 2.0]]

    References:
        Dinh, Sohl-Dickstein, Bengio, *Density Estimation Using Real NVP*, 2016, arXiv:1605.08803.
    """

    def swap(pairs):
        """In every second row."""
        odd = (jnp.arange(pairs.shape[1]) % 2 == 1).reshape(1, -1, 1, 1, 1)
        return jnp.where(odd, jnp.flip(pairs, axis=3), pairs)

    def forward(params, z, cond=None, *, key=None):
        if z.ndim != 4 or z.shape[2] % 2:
            raise ValueError(
                f"checkerboard: expected an image [b, H, W, C] with an even W, got {list(z.shape)}"
            )
        b, h, w, c = z.shape
        return swap(z.reshape(b, h, w // 2, 2, c)).reshape(b, h, w // 2, 2 * c), zero_log_det(z)

    def inverse(params, x, cond=None, *, key=None):
        if x.ndim != 4 or x.shape[3] % 2:
            raise ValueError(
                f"checkerboard: expected [b, H, W/2, 2 C], got x of shape {list(x.shape)}"
            )
        b, h, w, c = x.shape
        return swap(x.reshape(b, h, w, 2, c // 2)).reshape(b, h, 2 * w, c // 2), zero_log_det(x)

    return Bijector(no_params, forward, inverse)


def _check_channels(name: str, x: Array, factor: int) -> None:
    """Raise unless x is an image whose channels hold blocks of f x f pixels."""
    if x.ndim != 4 or x.shape[3] % factor**2:
        raise ValueError(
            f"{name}: expected an image [b, H, W, C] with C divisible by {factor**2}, got x of "
            f"shape {list(x.shape)}"
        )


def _depth_to_space(name: str, x: Array, factor: int) -> Array:
    _check_channels(name, x, factor)
    b, h, w, c = x.shape
    blocks = x.reshape(b, h, w, factor, factor, c // factor**2)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, c // factor**2)
