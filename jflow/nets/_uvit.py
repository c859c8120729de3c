"""U-ViT: a transformer on the tokens of time, label and patches, with the skips of a U-Net."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jflow._core.arrays import patchify, unpatchify
from jflow._core.checks import check_whole
from jflow._core.conditions import as_condition, read_parts
from jflow.nets._attention import (
    attend,
    check_attention,
    dot_product_attention,
    merged,
    per_token,
    split_heads,
)
from jflow.nets._dit import check_blocks, own_copy
from jflow.nets._embed import check_time, time_features
from jflow.nets._mmdit import check_image
from jflow.nets._normalization import LayerNorm, Norm, Norms, joined, normed, placed
from jflow.nets._scanned import scanned
from jflow.types import Array, Cond

_normal = nn.initializers.truncated_normal(0.02)
_zeros = nn.initializers.zeros
_NORM = partial(LayerNorm, epsilon=1e-5)


class UViT(nn.Module):
    """U-ViT: a vision transformer with the long skips of a U-Net, as a velocity network.

    `module(x [b, H, W, C], t [b], cond=None, r=None) -> shaped like x`, zero at initialization.
    Time and label are tokens beside the patches, all with learned positions, so that H and W stay
    those of the params. Each of the blocks of the second half reads what its mirror image in the
    first half wrote. Each half is scanned.

    The published sizes are width, num_layers, num_heads = 512, 12, 8 (S), 768, 16, 12 (M), 1024,
    20, 16 (L) and 1152, 28, 16 with conv=False (H). They predict noise at times from 0, the data,
    to 999, which is time_scale=1.

    Attributes:
        patch_size: the side of a patch, in pixels.
        width: of the tokens, even.
        num_layers: the number of blocks without the one in the middle; even.
        num_heads: the number of attention heads, which divides the width.
        mlp_ratio: the hidden width of the MLP of a block, in widths.
        num_classes: the number of classes where cond has integer labels [b]. Index num_classes is
            the null label, which cond=None then means too.
        conv: whether a convolution of 3 by 3 pixels follows the patches.
        time_scale: the largest angular frequency of the features of time, in radians per unit of t;
            see `time_features`.
        remat: whether each block is computed again in the backward pass, which saves memory.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.
        attention_fn: a function `attention_fn(q, k, v)`; see `SelfAttention`.
        norm: a function that makes the normalizations, such as `RMSNorm`, or a `Norms`, which says
            where they stand, such as `peri_norm()`.
        mlp: a Linen module (tokens [b, n, width]) -> tokens in the place of the MLP of each block,
            such as `MixtureOfExperts(8)`; see `DiT`.

    Raises:
        ValueError: patch_size does not divide H and W, num_heads the width, or 2 the number of
            layers; x has another size than the params.
        TypeError: norm is neither, attention_fn is no function, or mlp is no Linen module.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.UViT(width=8, num_layers=2, num_heads=1, num_classes=10)
        >>> x, t, y = jnp.ones((1, 4, 6, 3)), jnp.zeros(1), jnp.array([2])
        >>> params = jax.eval_shape(net.init, jax.random.key(0), x, t, y)
        >>> jax.eval_shape(net.apply, params, x, t, y).shape
        (1, 4, 6, 3)

    References:
        Bao et al., *All are Worth Words: A ViT Backbone for Diffusion Models*, 2022,
            arXiv:2209.12152.
    """

    patch_size: int = 2
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_ratio: int = 4
    num_classes: int | None = None
    conv: bool = True
    time_scale: float = 100.0
    remat: bool = False
    dtype: Any = None
    attention_fn: Callable[..., Array] = dot_product_attention
    norm: Norm | Norms = _NORM
    mlp: nn.Module | None = None

    def __post_init__(self):
        check_attention("UViT", self.attention_fn)
        check_blocks("UViT", self.mlp, None, placed("UViT", self.norm))
        check_whole("UViT", num_layers=self.num_layers, patch_size=self.patch_size)
        if self.width % self.num_heads or self.width % 2 or self.num_layers % 2:
            raise ValueError(
                f"UViT: expected an even width divisible by num_heads={self.num_heads} and an even "
                f"num_layers, got {self.width} and {self.num_layers}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None, r: Array | None = None) -> Array:
        """Predict the velocity.

        Args:
            x: the images, [b, H, W, C].
            t: the times, [b].
            cond: None, or integer labels [b], where num_classes is set.
            r: the times that a flow map goes to, [b]; None for a velocity. The network reads r - t.

        Returns:
            The velocity, with the shape and type of x.
        """
        p = self.patch_size
        check_image(self, x, p)
        b, height, width, channels = x.shape
        check_time("UViT", x, t, r)
        dense = partial(nn.Dense, kernel_init=_normal, dtype=self.dtype)

        h = per_token(dense(self.width, name="patches"), patchify(x, p))
        time = time_features(t, self.width, scale=self.time_scale)
        if r is not None:
            gap = nn.Dense(self.width, kernel_init=_zeros, dtype=self.dtype, name="gap")
            time = time + gap(time_features(r - t, self.width, scale=self.time_scale))
        extra = [time.astype(h.dtype)]
        takes = () if self.num_classes is None else ("label",)
        label = read_parts("UViT", as_condition("UViT", cond), x, takes).label
        if self.num_classes is not None:
            if label is None:
                label = jnp.full((b,), self.num_classes)
            rows = self.num_classes + 1
            labels = nn.Embed(rows, self.width, embedding_init=_normal, name="labels")
            extra.insert(0, labels(label).astype(h.dtype))
        h = jnp.concatenate([token[:, None] for token in extra] + [h], axis=1)
        made = self.variables.get("params", {}).get("positions")
        if made is not None and made.shape[0] != h.shape[1]:
            raise ValueError(
                f"UViT: expected x of {made.shape[0] - len(extra)} patches, for which its params "
                f"are, got {list(x.shape)}, of {h.shape[1] - len(extra)}"
            )
        positions = self.param("positions", _normal, (h.shape[1], self.width))
        h = h + positions.astype(h.dtype)[None]

        norms = placed("UViT", self.norm)
        h = normed(norms.first, h, self.dtype, "first_norm").astype(h.dtype)

        def blocks(kind, name):
            options = self.num_heads, self.mlp_ratio, self.dtype, self.attention_fn, norms
            return kind(*options, own_copy(self.mlp, self.dtype), name=name)

        h, skips = blocks(self._scanned(nn.broadcast), "in_blocks")(h, None)
        h, _ = blocks(nn.remat(UViTBlock) if self.remat else UViTBlock, "mid_block")(h, None)
        h, _ = blocks(self._scanned(0), "out_blocks")(h, skips[::-1])

        h = normed(norms.pre, h, self.dtype, "norm")[:, len(extra) :]
        init = _normal if self.conv else _zeros
        h = per_token(nn.Dense(p * p * channels, kernel_init=init, name="head"), h)
        h = unpatchify(h, height // p, width // p, p)
        if self.conv:
            h = nn.Conv(channels, (3, 3), kernel_init=_zeros, name="conv")(h)
        return h.astype(x.dtype)

    def _scanned(self, skip_axis):
        return scanned(UViTBlock, self.num_layers // 2, self.remat, in_axes=skip_axis)


class UViTBlock(nn.Module):
    """One block on tokens h [b, n, width], joined first with those of a skip where there is one.

    It returns its result twice: to go on with, and for a skip.
    """

    num_heads: int
    mlp_ratio: int
    dtype: Any
    attention_fn: Callable[..., Array] = dot_product_attention
    norms: Norms = Norms(_NORM)
    mlp: nn.Module | None = None

    @nn.compact
    def __call__(self, h: Array, skip: Array | None) -> tuple[Array, Array]:
        width = h.shape[-1]
        dense = partial(nn.Dense, kernel_init=_normal, dtype=self.dtype)
        norms, norm = self.norms, partial(normed, dtype=self.dtype)
        if skip is not None:
            h = per_token(dense(width, name="skip"), jnp.concatenate([h, skip], axis=-1))
            if norms.join is not None:  # the skip's map leads off the sphere, or from mean zero
                h = norm(norms.first, h, name="skip_norm").astype(h.dtype)
        qkv = dense(3 * width, use_bias=False, name="qkv")
        y = per_token(qkv, norm(norms.pre, h, name="attention_norm"))
        q, k, v = split_heads(y, self.num_heads)
        q = norm(norms.queries_keys, q, name="q_norm")
        k = norm(norms.queries_keys, k, name="k_norm")
        y = norm(norms.heads, attend(self.attention_fn, q, k, v), name="head_norm")
        y = per_token(dense(width, name="out"), merged(y))
        y = norm(norms.after_attention, y, name="attention_after")
        h = joined(norms, h, y, None, self.dtype, "attention_join")
        y = norm(norms.pre, h, name="mlp_norm")
        if self.mlp is None:
            enter = dense(self.mlp_ratio * width, name="mlp_in")
            leave = dense(width, name="mlp_out")
            gelu = partial(nn.gelu, approximate=False)
            inner = lambda y: norm(norms.hidden, gelu(enter(y)), name="hidden_norm")  # noqa: E731
            y = per_token(lambda y: leave(inner(y)), y)
        else:
            y = self.mlp(y).astype(h.dtype)
        y = norm(norms.after_mlp, y, name="mlp_after")
        h = joined(norms, h, y, None, self.dtype, "mlp_join")
        return h, h
