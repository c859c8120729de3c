"""Convolutions of images whose Jacobian is triangular."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import float_dtype, zero_log_det
from jflow._core.checks import check_side, check_whole
from jflow._core.nouns import compiled
from jflow.kernels import masked_conv as kernel
from jflow.types import Bijector

__all__ = ["masked_conv"]


def masked_conv(
    channels: int,
    size: int = 3,
    *,
    corner: Sequence[int] = (0, 0),
    implementation: str | None = None,
) -> Bijector:
    """Convolve an image with a kernel that sees what is above and left of a pixel, invertibly.

    x is the masked convolution of z, plus a shift, for z [b, H, W, C]: a pixel sees itself and
    those above and left of it, in a window of size x size; of itself, channel c sees channels <= c.
    The Jacobian is triangular, log_det = H W sum(log_diagonal), and the map starts at the identity.

    `forward` is a convolution; `inverse` goes over the anti-diagonals of the image, H + W - 1
    steps, as does its gradient (see `kernels.masked_conv`). As it stands, densities take the
    wavefront and sampling is a plain convolution: the layer of Inverse-Flow. `invert` of it is the
    layer of FInC Flow, whose densities are quick and whose samples take the wavefront; two from
    opposite corners, chain(one, reverse(), opposite, reverse()), see all around, in the manner of
    emerging convolutions.

    Nothing bounds the inverse: it is stable where the other taps are small beside the diagonal, and
    grows exponentially along the image where they are not.

    Also known as: FInC convolution, Inverse-Flow, emerging convolution, autoregressive convolution.

    Args:
        channels: C.
        size: the side of the window.
        corner: the corner of the window at which the other pixels lie: (0, 0) is above left, (0, 1)
            above right, (1, 0) below left, (1, 1) below right.
        implementation: of the inverse, 'xla', 'pallas' or None; see `kernels.masked_conv.inverse`.

    Returns:
        Bijector: the map, with params {'kernel', 'log_diagonal', 'shift'}: 'kernel' is
            [size, size, C, C] (in, out), of whose tap for the pixel itself, kernel[-1, -1], the
            strict upper triangle is used; the others are [C].

    Raises:
        ValueError: channels or size is below 1, corner is none of the four, or x is not
            [b, H, W, C].

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijector = bijectors.masked_conv(2, size=2)
        >>> params = bijector.init(jax.random.key(0), jnp.zeros((1, 3, 3, 2)))
        >>> params["log_diagonal"] += 0.5
        >>> float(bijector.forward(params, jnp.zeros((1, 3, 3, 2)))[1][0])  # 9 pixels, 2 channels
        9.0

    References:
        Nagar, Varma, *Parallel Backpropagation for Inverse of a Convolution with Application to
            Normalizing Flows*, 2025, arXiv:2410.14634.
        Kallappa, Nagar, Varma,
            *FInC Flow: Fast and Invertible k x k Convolutions for Normalizing Flows*, 2023,
            arXiv:2301.09266.
        Hoogeboom, van den Berg, Welling, *Emerging Convolutions for Generative Normalizing Flows*,
            2019, arXiv:1901.11137.
    """
    check_whole("masked_conv", channels=channels, size=size)
    if tuple(corner) not in ((0, 0), (0, 1), (1, 0), (1, 1)):
        raise ValueError(
            f"masked_conv: expected corner (0, 0), (0, 1), (1, 0) or (1, 1), got {corner}"
        )
    own_is_upper = np.ones((size, size, channels, channels), bool)
    own_is_upper[-1, -1] = np.triu(own_is_upper[-1, -1], 1)
    flipped = tuple(axis for axis, far in zip((1, 2), corner, strict=True) if far)

    def check(x):
        if x.ndim != 4 or x.shape[-1] != channels:
            raise ValueError(
                f"masked_conv: expected x of shape [b, H, W, {channels}], got {list(x.shape)}"
            )

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        check(x)
        zeros = jnp.zeros_like(x, shape=(size, size, channels, channels), dtype=float_dtype(x))
        return {"kernel": zeros, "log_diagonal": zeros[0, 0, 0], "shift": zeros[0, 0, 0]}

    def taps(params):
        diagonal = jnp.diag(jnp.exp(params["log_diagonal"]))[None, None]
        before = (size - 1, 0)
        return jnp.where(own_is_upper, params["kernel"], 0) + jnp.pad(
            diagonal, (before, before, (0, 0), (0, 0))
        )

    def shift(params):
        return params["shift"].reshape(1, 1, 1, channels)

    def log_det(params, x):
        dtype = float_dtype(x, params["log_diagonal"])
        return zero_log_det(x) + x.shape[1] * x.shape[2] * jnp.sum(
            params["log_diagonal"], dtype=dtype
        )

    def forward(params, z, cond=None, *, key=None):
        check(z)
        x = jnp.flip(kernel.conv(jnp.flip(z, flipped), taps(params)), flipped)
        return (x + shift(params)).astype(z.dtype), log_det(params, z)

    def inverse(params, x, cond=None, *, key=None):
        check(x)
        y = jnp.flip(x - shift(params), flipped)
        z = jnp.flip(kernel.inverse(y, taps(params), implementation=implementation), flipped)
        return z.astype(x.dtype), -log_det(params, x)

    return compiled(Bijector(init, forward, inverse))
