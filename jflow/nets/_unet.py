"""A small U-Net."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jflow._core.checks import check_whole
from jflow._core.levels import level_widths
from jflow.nets._adm import check_attention, enter
from jflow.nets._attention import SelfAttention
from jflow.types import Array, Cond

_zeros = nn.initializers.zeros


class UNet(nn.Module):
    """A small U-Net as a velocity network on images, zero at initialization.

    `module(x [b, H, W, C], t [b], cond=None, r=None) -> shaped like x`. Level i works on H / 2**i x
    W / 2**i with channels * multipliers[i] channels: `num_blocks` residual blocks on the way down
    and as many on the way up (the last level has one stack), each followed by self-attention where
    attention[i]. Every block down hands its output to its mirror image up. The time, and the label
    and the vector of cond, modulate the norms; what is aligned with x goes in beside it, through
    weights that start at zero.

    Attributes:
        channels: of the first level, before its multiplier.
        multipliers: of the channels, one a level.
        num_blocks: the number of residual blocks of a level, at least 1.
        attention: whether the blocks of a level are followed by self-attention, one a level.
        num_heads: the number of attention heads, which divides the channels of the levels with
            attention.
        num_classes: the number of classes where cond has integer labels [b]. Index num_classes is
            the null label, which cond=None then means too.
        time_scale: the largest angular frequency of the features of time, in radians per unit of t;
            see `time_features`.
        dropout: the rate; a key, or a 'dropout' stream, switches it on.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.

    Raises:
        ValueError: 2**(levels - 1) does not divide H and W, `attention` and `multipliers` differ in
            length, or x has other channels than the params.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.UNet(channels=8)
        >>> x, t = jnp.ones((1, 4, 4, 1)), jnp.zeros(1)
        >>> jax.eval_shape(lambda key: net.init_with_output(key, x, t)[0], jax.random.key(0)).shape
        (1, 4, 4, 1)

    References:
        Ronneberger, Fischer, Brox,
            *U-Net: Convolutional Networks for Biomedical Image Segmentation*, 2015,
            arXiv:1505.04597.
        Ho, Jain, Abbeel, *Denoising Diffusion Probabilistic Models*, 2020, arXiv:2006.11239.
        Dhariwal, Nichol, *Diffusion Models Beat GANs on Image Synthesis*, 2021, arXiv:2105.05233,
            for the modulated norms.
    """

    channels: int = 32
    multipliers: Sequence[int] = (1, 2)
    num_blocks: int = 1
    attention: Sequence[bool] = (False, True)
    num_heads: int = 1
    num_classes: int | None = None
    time_scale: float = 100.0
    dropout: float = 0.0
    dtype: Any = None

    def __post_init__(self):
        check_attention("UNet", self.multipliers, self.attention)
        check_whole("UNet", num_blocks=self.num_blocks)
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
        h, c = enter(self, x, t, cond, r, features=256)
        skips, widths = [], level_widths(self.channels, self.multipliers)
        for i, width in enumerate(widths[1:]):
            h, skip = self._blocks(f"down_{i}", self.attention[i], h, [None] * self.num_blocks, c)
            skips.append(skip)
            h = nn.Conv(width, (2, 2), (2, 2), dtype=self.dtype, name=f"shrink_{i}")(h)
        h, _ = self._blocks("middle", self.attention[-1], h, [None] * self.num_blocks, c)
        for i in reversed(range(len(widths) - 1)):
            h = h.repeat(2, axis=1).repeat(2, axis=2)
            h = nn.Conv(widths[i], (3, 3), dtype=self.dtype, name=f"grow_{i}")(h)
            h, _ = self._blocks(f"up_{i}", self.attention[i], h, skips[i][::-1], c)

        h = nn.silu(group_norm(h.shape[-1], self.dtype)(h))
        return nn.Conv(x.shape[-1], (3, 3), kernel_init=_zeros, name="head")(h).astype(x.dtype)

    def _blocks(self, name: str, attend: bool, h: Array, skips: Sequence[Array | None], c: Array):
        """The blocks of one level, in sequence: (their last output, all their outputs)."""
        # Not scanned: XLA's CPU backend takes gradients of convolutions in a loop body over 30
        # times slower, even in a loop of one turn. There are only a few blocks a level.
        outputs = []
        for i, skip in enumerate(skips):
            h = UNetBlock(
                self.num_heads if attend else 0, self.dropout, self.dtype, name=f"{name}_{i}"
            )(h, skip, c)
            outputs.append(h)
        return h, outputs


class UNetBlock(nn.Module):
    """A residual block on h [b, H, W, C], modulated by c [b, F].

    `skip`, shaped like h, is merged first.
    """

    num_heads: int  # 0 for no attention
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, h: Array, skip: Array | None, c: Array) -> Array:
        channels = h.shape[-1]
        if skip is not None:
            h = nn.Dense(channels, dtype=self.dtype, name="merge")(
                jnp.concatenate([h, skip], axis=-1)
            )
        y = nn.silu(group_norm(channels, self.dtype)(h))
        y = nn.Conv(channels, (3, 3), dtype=self.dtype, name="in")(y)
        shift, scale = jnp.split(
            nn.Dense(2 * channels, dtype=self.dtype, name="modulation")(c)[:, None, None], 2, -1
        )
        y = nn.silu(group_norm(channels, self.dtype)(y) * (1 + scale) + shift)
        y = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(y)
        h = h + nn.Conv(channels, (3, 3), kernel_init=_zeros, dtype=self.dtype, name="out")(y)
        if self.num_heads:
            tokens = group_norm(channels, self.dtype)(h).reshape(
                h.shape[0], h.shape[1] * h.shape[2], channels
            )
            attention = SelfAttention(
                self.num_heads, out_init=_zeros, dtype=self.dtype, name="attention"
            )
            h = h + attention(tokens).reshape(h.shape)
        return h


def group_norm(channels: int, dtype) -> nn.GroupNorm:
    """Eight groups where that divides the channels, else the largest power of two that does."""
    return nn.GroupNorm(math.gcd(8, channels), epsilon=1e-6, use_fast_variance=False, dtype=dtype)
