"""DDPM++, the U-Net of score-based models with variances that are preserved."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn

from jflow.nets._adm import (
    Resample,
    SiteAttention,
    check_levels,
    down_and_up,
    enter,
    group_norm,
    resampled,
)
from jflow.nets._attention import dot_product_attention
from jflow.types import Array, Cond

_zeros = nn.initializers.zeros


class DDPMpp(nn.Module):
    """DDPM++: the U-Net of score-based generative modeling by SDEs, as a velocity on images.

    `module(x [b, H, W, C], t [b], cond=None, r=None) -> shaped like x`, zero at initialization.
    Level i works on H / 2**i x W / 2**i with channels * multipliers[i] channels: `num_blocks`
    residual blocks on the way down, each followed by self-attention where attention[i], and one
    more on the way up, all followed by one attention. Every sum of a block and its input is divided
    by sqrt(2). Whatever the way down wrote is read on the way up, beside the channels of a block,
    and image sizes change inside residual blocks. Blocks are not scanned, as in `ADM`.

    The published network for CIFAR-10 has channels=128, multipliers=(1, 2, 2, 2), num_blocks=4 and
    attention at 16 pixels. It predicts noise at t in [0, 1], of which 0 is the data, with
    time_scale=999. Its labels, vectors and aligned images are added here.

    Attributes:
        channels: of the first level, before its multiplier.
        multipliers: of the channels, one a level.
        num_blocks: the number of residual blocks of a level on the way down, at least 1.
        attention: whether a level has self-attention, of one head, one a level.
        num_classes: the number of classes where cond has integer labels [b]. Index num_classes is
            the null label, which cond=None then means too.
        time_scale: the largest angular frequency of the features of time, in radians per unit of t;
            see `time_features`.
        dropout: the rate; a key, or a 'dropout' stream, switches it on.
        remat: whether each block is computed again in the backward pass, which saves memory.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params. Means, variances and softmax are in float32.
        attention_fn: a function `attention_fn(q, k, v)`; see `SelfAttention`.

    Raises:
        ValueError: 2**(levels - 1) does not divide H and W, `attention` and `multipliers` differ in
            length, or x has other channels than the params.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.DDPMpp(8)
        >>> x, t = jnp.ones((1, 4, 6, 3)), jnp.zeros(1)
        >>> params = jax.eval_shape(net.init, jax.random.key(0), x, t)
        >>> jax.eval_shape(net.apply, params, x, t).shape
        (1, 4, 6, 3)

    References:
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, *Score-Based Generative Modeling through
            Stochastic Differential Equations*, 2020, arXiv:2011.13456.
    """

    channels: int = 64
    multipliers: Sequence[float] = (1, 2)
    num_blocks: int = 1
    attention: Sequence[bool] = (False, True)
    num_classes: int | None = None
    time_scale: float = 100.0
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = None
    attention_fn: Callable[..., Array] = dot_product_attention

    def __post_init__(self):
        check_levels("DDPMpp", self.multipliers, self.attention, self.channels, self.num_blocks)
        if self.channels < 4:
            raise ValueError(f"DDPMpp: expected at least 4 channels, got {self.channels}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None, r: Array | None = None) -> Array:
        """Predict the velocity.

        Args:
            x: the images, [b, H, W, C].
            t: the times, [b].
            cond: None, integer labels [b], floats [b, k], a pytree of them, or the label, the
                vector and the aligned images [b, H, W, k] of a `types.Condition`.
            r: the times that a flow map goes to, [b]; None for a velocity. The network reads r - t.

        Returns:
            The velocity, with the shape and type of x.
        """
        half = self.channels // 2  # the smallest published frequency is 1 / 10000 of the largest
        period = 10_000.0 ** (half / (half - 1))
        h, c = enter(self, x, t, cond, r, features=self.channels, max_period=period)
        make = nn.remat(DDPMppBlock) if self.remat else DDPMppBlock
        make_attention = nn.remat(SiteAttention) if self.remat else SiteAttention

        def block(h, width, name, resample=None):
            return make(width, resample, self.dropout, self.dtype, name=name)(h, c)

        def attend(h, name):
            options = _groups(h.shape[-1]), 1e-6, self.dtype, self.attention_fn
            return _mean(h, make_attention(1, *options, name=name)(h))

        def resize(h, name, how):
            return block(h, h.shape[-1], name, how)

        def after_up(i, j):
            return f"up_{i}_attention" if j == self.num_blocks else None

        h = down_and_up(self, h, block, attend, resize, after_up)
        h = nn.silu(group_norm(_groups(h.shape[-1]), 1e-6, self.dtype, "norm")(h))
        return nn.Conv(x.shape[-1], (3, 3), kernel_init=_zeros, name="head")(h).astype(x.dtype)


class DDPMppBlock(nn.Module):
    """A residual block from h [b, H, W, C] to `width` channels, to which c [b, F] is added."""

    width: int
    resample: Resample
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, h: Array, c: Array) -> Array:
        width, dtype = self.width, self.dtype
        y = nn.silu(group_norm(_groups(h.shape[-1]), 1e-6, dtype, "in_norm")(h))
        h, y = resampled(h, self.resample), resampled(y, self.resample)
        y = nn.Conv(width, (3, 3), dtype=dtype, name="in")(y)
        y = y + nn.Dense(width, dtype=dtype, name="modulation")(c)[:, None, None]
        y = nn.silu(group_norm(_groups(width), 1e-6, dtype, "out_norm")(y))
        y = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(y)
        y = nn.Conv(width, (3, 3), kernel_init=_zeros, dtype=dtype, name="out")(y)
        if h.shape[-1] != width or self.resample:
            h = nn.Conv(width, (1, 1), dtype=dtype, name="skip")(h)
        return _mean(h, y)


def _mean(h: Array, y: Array) -> Array:
    return (h + y) * math.sqrt(0.5)


def _groups(channels: int) -> int:
    """A quarter of the channels and at most 32, as published, or fewer, where that does not divide
    them."""
    most = max(1, min(channels // 4, 32))
    return next(g for g in range(most, 0, -1) if channels % g == 0)
