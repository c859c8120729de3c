"""ADM, the U-Net of guided diffusion, and what it shares with other published U-Nets."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from jflow._core.checks import check_whole
from jflow._core.levels import count_heads, level_widths
from jflow.nets._attention import SelfAttention, dot_product_attention
from jflow.nets._embed import TimeCondEmbed, check_time, need_part, read_cond
from jflow.types import Array, Cond

_zeros = nn.initializers.zeros

Resample = Literal["up", "down"] | None


class ADM(nn.Module):
    """ADM: the U-Net of guided diffusion, and of torchcfm, as a velocity network on images.

    `module(x [b, H, W, C], t [b], cond=None, r=None) -> shaped like x`, zero at initialization.
    Level i works on H / 2**i x W / 2**i with channels * multipliers[i] channels: `num_blocks`
    residual blocks on the way down and one more on the way up, each followed by self-attention
    where attention[i]; between the two are two blocks with attention. Whatever the way down wrote,
    the stem and the smaller images too, is read on the way up, beside the channels of a block.
    Blocks are not scanned: on the way up each reads another number of channels, and XLA's gradients
    of convolutions in a loop are slow on CPU.

    The published networks predict noise at times from 0, the data, to 999, those of torchcfm the
    velocity at t in [0, 1]; both have time_scale=1. `channels, multipliers, num_blocks` are 192,
    (1, 2, 3, 4), 3 for 64 x 64 pixels, 256, (1, 1, 2, 3, 4), 2 for 128, 256, (1, 1, 2, 2, 4, 4), 2
    for 256 and 256, (0.5, 1, 1, 2, 2, 4, 4), 2 for 512, with attention at 32, 16 and 8 pixels and
    64 channels a head, except for the second, which has 4 heads.

    Attributes:
        channels: of the first level, before its multiplier.
        multipliers: of the channels, one a level.
        num_blocks: the number of residual blocks of a level on the way down, at least 1.
        attention: whether the blocks of a level are followed by self-attention, one a level.
        num_heads: the number of attention heads, where head_width is None.
        head_width: the channels of a head, of which there are as many as a level has room for.
        scale_shift: whether time and cond scale and shift what the second norm of a block returns,
            or are added in front of it. The norm has groups of one channel where there are no more
            than 32, and undoes what is added.
        resample_blocks: whether the sizes of images change inside residual blocks, by means and
            repetition, or in convolutions of their own.
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
        ValueError: 2**(levels - 1) does not divide H and W, head_width the channels of a level with
            attention, `attention` and `multipliers` differ in length, or x has other channels than
            the params.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.ADM(8, num_classes=10)
        >>> x, t, y = jnp.ones((1, 4, 6, 3)), jnp.zeros(1), jnp.array([2])
        >>> params = jax.eval_shape(net.init, jax.random.key(0), x, t, y)
        >>> jax.eval_shape(net.apply, params, x, t, y).shape
        (1, 4, 6, 3)

    References:
        Dhariwal, Nichol, *Diffusion Models Beat GANs on Image Synthesis*, 2021, arXiv:2105.05233.
    """

    channels: int = 64
    multipliers: Sequence[float] = (1, 2)
    num_blocks: int = 1
    attention: Sequence[bool] = (False, True)
    num_heads: int = 1
    head_width: int | None = None
    scale_shift: bool = True
    resample_blocks: bool = True
    num_classes: int | None = None
    time_scale: float = 100.0
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = None
    attention_fn: Callable[..., Array] = dot_product_attention

    def __post_init__(self):
        check_levels("ADM", self.multipliers, self.attention, self.channels, self.num_blocks)
        check_whole("ADM", num_heads=self.num_heads)
        widths = level_widths(self.channels, self.multipliers)
        for width in {w for w, a in zip(widths, self.attention, strict=True) if a} | {widths[-1]}:
            heads = count_heads(width, self.num_heads, self.head_width)
            if heads < 1 or width % (heads if self.head_width is None else self.head_width):
                raise ValueError(
                    f"ADM: expected num_heads={self.num_heads}, or head_width={self.head_width} "
                    f"where it is given, to divide the {width} channels of a level with attention"
                )
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
        h, c = enter(self, x, t, cond, r, features=self.channels)
        make = nn.remat(ADMBlock) if self.remat else ADMBlock
        make_attention = nn.remat(SiteAttention) if self.remat else SiteAttention

        def block(h, width, name, resample=None):
            options = self.scale_shift, resample, self.dropout, self.dtype
            return make(width, *options, name=name)(h, c)

        def attend(h, name):
            heads = count_heads(h.shape[-1], self.num_heads, self.head_width)
            options = _groups(h.shape[-1]), 1e-5, self.dtype, self.attention_fn
            return h + make_attention(heads, *options, name=name)(h)

        def resize(h, name, how):
            width, stride = h.shape[-1], 2 if how == "down" else 1
            if self.resample_blocks:
                return block(h, width, name, how)
            h = resampled(h, "up") if how == "up" else h
            pad = ((1, 1), (1, 1))
            return nn.Conv(width, (3, 3), stride, pad, dtype=self.dtype, name=name)(h)

        def after_up(i, j):
            return f"up_{i}_{j}_attention"

        h = down_and_up(self, h, block, attend, resize, after_up)
        h = nn.silu(group_norm(_groups(h.shape[-1]), 1e-5, self.dtype, "norm")(h))
        return nn.Conv(x.shape[-1], (3, 3), kernel_init=_zeros, name="head")(h).astype(x.dtype)


class ADMBlock(nn.Module):
    """A residual block from h [b, H, W, C] to `width` channels, modulated by c [b, F]."""

    width: int
    scale_shift: bool
    resample: Resample
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, h: Array, c: Array) -> Array:
        width, dtype = self.width, self.dtype
        y = nn.silu(group_norm(_groups(h.shape[-1]), 1e-5, dtype, "in_norm")(h))
        h, y = resampled(h, self.resample), resampled(y, self.resample)
        y = nn.Conv(width, (3, 3), dtype=dtype, name="in")(y)
        modulation = nn.Dense((1 + self.scale_shift) * width, dtype=dtype, name="modulation")
        m = modulation(c)[:, None, None]
        norm = group_norm(_groups(width), 1e-5, dtype, "out_norm")
        if self.scale_shift:
            scale, shift = jnp.split(m, 2, -1)
            y = norm(y) * (1 + scale) + shift
        else:
            y = norm(y + m)
        y = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(nn.silu(y))
        y = nn.Conv(width, (3, 3), kernel_init=_zeros, dtype=dtype, name="out")(y)
        if h.shape[-1] != width:
            h = nn.Conv(width, (1, 1), dtype=dtype, name="skip")(h)
        return h + y


class SiteAttention(nn.Module):
    """What self-attention among the sites of h [b, H, W, C] adds to it, zero at initialization."""

    num_heads: int
    groups: int
    epsilon: float
    dtype: Any
    attention_fn: Callable[..., Array] = dot_product_attention

    @nn.compact
    def __call__(self, h: Array) -> Array:
        y = group_norm(self.groups, self.epsilon, self.dtype, "norm")(h)
        attention = SelfAttention(
            self.num_heads,
            out_init=_zeros,
            dtype=self.dtype,
            attention_fn=self.attention_fn,
            name="attention",
        )
        return attention(y.reshape(h.shape[0], -1, h.shape[-1])).reshape(h.shape)


def down_and_up(
    module: Any,
    h: Array,
    block: Callable[[Array, int, str], Array],
    attend: Callable[[Array, str], Array],
    resize: Callable[[Array, str, Resample], Array],
    after_up: Callable[[int, int], str | None],
) -> Array:
    """The last features of a U-Net from the first, in which every block on the way up reads what
    one on the way down wrote.

    `block(h, width, name)`, `attend(h, name)` and `resize(h, name, how)` apply a module of that
    name; `after_up(i, j)` names the attention behind block j of level i on the way up.
    """
    skips, widths = [h], level_widths(module.channels, module.multipliers)
    for i, width in enumerate(widths):
        for j in range(module.num_blocks):
            h = block(h, width, f"down_{i}_{j}")
            if module.attention[i]:
                h = attend(h, f"down_{i}_{j}_attention")
            skips.append(h)
        if i < len(widths) - 1:
            h = resize(h, f"shrink_{i}", "down")
            skips.append(h)
    h = block(h, h.shape[-1], "middle_0")
    h = attend(h, "middle_attention")
    h = block(h, h.shape[-1], "middle_1")
    for i, width in reversed(list(enumerate(widths))):
        for j in range(module.num_blocks + 1):
            h = block(jnp.concatenate([h, skips.pop()], axis=-1), width, f"up_{i}_{j}")
            if module.attention[i] and (name := after_up(i, j)):
                h = attend(h, name)
        if i:
            h = resize(h, f"grow_{i}", "up")
    return h


def enter(
    module: Any,
    x: Array,
    t: Array,
    cond: Cond,
    r: Array | None,
    *,
    features: int,
    max_period: float = 10_000.0,
) -> tuple[Array, Array]:
    """(the first features, the embedding of time and cond after its nonlinearity) of a U-Net.

    To be called inside a compact method. What is aligned with x goes in through weights that start
    at zero.
    """
    name, levels, params = type(module).__name__, len(module.multipliers), module.variables
    params = params.get("params", {})
    factor = 2 ** (levels - 1)
    if x.ndim != 4 or x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(
            f"{name}: expected x of shape [b, H, W, C], H and W divisible by {factor} for {levels} "
            f"levels, got {list(x.shape)}"
        )
    if "stem" in params and (made := params["stem"]["kernel"].shape[2]) != x.shape[-1]:
        raise ValueError(
            f"{name}: expected x of {made} channels, for which its params are, got {list(x.shape)}"
        )
    check_time(name, x, t, r)
    cond, parts = read_cond(name, cond, x, ("label", "vector", "aligned"))
    width, dtype = level_widths(module.channels, module.multipliers)[0], module.dtype
    h = nn.Conv(width, (3, 3), dtype=dtype, name="stem")(x)
    if parts.aligned is None:
        need_part(module, "aligned", "aligned", params)
    else:
        beside = nn.Conv(
            width, (3, 3), use_bias=False, kernel_init=_zeros, dtype=dtype, name="aligned"
        )
        h = h + beside(parts.aligned.astype(x.dtype)).astype(h.dtype)
    embed = TimeCondEmbed(
        4 * module.channels,
        module.num_classes,
        features,
        module.time_scale,
        dtype,
        max_period,
        name="embed",
    )
    return h, nn.silu(embed(t, cond, r)).astype(h.dtype)


def check_attention(name: str, multipliers: Sequence[float], attention: Sequence[bool]) -> None:
    """Raise unless both have an entry for each level."""
    if len(attention) != len(multipliers) or not multipliers:
        raise ValueError(
            f"{name}: expected one entry of attention for each of multipliers, got attention="
            f"{tuple(attention)}, multipliers={tuple(multipliers)}"
        )


def check_levels(
    name: str,
    multipliers: Sequence[float],
    attention: Sequence[bool],
    channels: int,
    num_blocks: int,
) -> None:
    """Raise for levels that no U-Net can have."""
    check_attention(name, multipliers, attention)
    check_whole(name, num_blocks=num_blocks, channels=channels)
    if channels % 2 or min(channels * m for m in multipliers) < 1:
        raise ValueError(
            f"{name}: expected an even number of channels and at least one in each level, got "
            f"channels={channels}, multipliers={tuple(multipliers)}"
        )


def resampled(h: Array, how: Resample) -> Array:
    """h [b, H, W, C] at twice the height and width, or at half, by repetition or means."""
    if how == "up":
        return h.repeat(2, axis=1).repeat(2, axis=2)
    if how == "down":
        b, height, width, channels = h.shape
        return h.reshape(b, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
    return h


def group_norm(groups: int, epsilon: float, dtype, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(groups, epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def _groups(channels: int) -> int:
    """32, as published, or fewer, where 32 does not divide the channels."""
    return math.gcd(32, channels)
