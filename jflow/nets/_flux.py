"""Flux: joint blocks of an image and a text, then blocks on both as one row of tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_whole
from jflow.nets._attention import (
    attend,
    check_attention,
    dot_product_attention,
    merged,
    per_token,
    rotated,
    split_heads,
)
from jflow.nets._dit import modulation
from jflow.nets._mmdit import (
    JointBlock,
    enter,
    first_normed,
    inputs_of,
    leave,
    whole_mask,
)
from jflow.nets._normalization import (
    LayerNorm,
    Norm,
    Norms,
    RMSNorm,
    joined,
    normed,
    placed,
)
from jflow.nets._scanned import scanned
from jflow.types import Array, Cond

_xavier = nn.initializers.xavier_uniform()


class Flux(nn.Module):
    """Flux: the transformer of FLUX.1 on an image and a text, as a velocity network.

    `module(x [b, H, W, C], t [b], cond, r=None) -> shaped like x`, with `cond =
    Condition(context=[b, n, k] tokens of the text, vector=[b, m] pooled text)`. The first blocks
    are those of `MMDiT`; the others have one stream, in which attention and MLP read the same
    tokens side by side. Positions turn queries and keys (RoPE). Blocks of one kind are scanned, and
    zero at initialization as in DiT.

    The published size, of FLUX.1 dev and schnell, is width=3072, num_layers=19,
    num_single_layers=38, num_heads=24, rope_axes=(16, 56, 56), time_scale=1000, on latents of 16
    channels and texts of 4096 and 768 numbers. It predicts noise - data at sigma = 1 - t:
    `paths.from_noise_time(field(net))` is its velocity. dev is distilled from a guided model and
    reads the scale that it shall act like: a number of the network, not a part of cond, since one
    sampler has one scale; `net.clone(guidance=2.0)` takes the same params.

    Attributes:
        patch_size: the side of a patch, in pixels.
        width: of the tokens.
        num_layers: the number of blocks with two streams.
        num_single_layers: the number of blocks with one stream.
        num_heads: the number of attention heads, which divides the width.
        mlp_ratio: the hidden width of the MLP of a block, in widths.
        rope_axes: how many numbers of a head are turned by the index of the image (which is 0), by
            its row and by its column: even, of sum width / num_heads.
        guidance: the guidance scale that a guidance-distilled network reads; None is a network
            without such an input.
        time_scale: the largest angular frequency of the features of time, in radians per unit of t,
            and of those of guidance; see `time_features`.
        remat: whether each block is computed again in the backward pass, which saves memory.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params. Means, variances, rotations and softmax are
            in float32.
        attention_fn: a function `attention_fn(q, k, v)`; see `SelfAttention`. Where cond has a mask
            it is called with mask=[b, m] bool, the keys that are seen.
        norm: a function that makes the normalizations, such as `RMSNorm`, or a `Norms`, which says
            where they stand, such as `peri_norm()`; where it says nothing of queries and keys,
            they have an `RMSNorm`. A single block is one branch, with what stands after attention.

    Raises:
        ValueError: patch_size does not divide H and W, or num_heads the width; rope_axes are not
            even or do not add up to the size of a head; cond lacks its context or its vector; x,
            context or vector have other sizes than the params.
        TypeError: norm is neither, or attention_fn is no function.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> from jflow.types import Condition
        >>> net = nets.Flux(width=8, num_heads=1, rope_axes=(2, 4, 2))
        >>> x, t = jnp.ones((1, 4, 6, 3)), jnp.zeros(1)
        >>> text = Condition(context=jnp.ones((1, 5, 4)), vector=jnp.ones((1, 2)))
        >>> params = jax.eval_shape(net.init, jax.random.key(0), x, t, text)
        >>> jax.eval_shape(net.apply, params, x, t, text).shape
        (1, 4, 6, 3)

    References:
        Black Forest Labs, *FLUX*, 2024, https://github.com/black-forest-labs/flux.
        Su et al., *RoFormer: Enhanced Transformer with Rotary Position Embedding*, 2021,
            arXiv:2104.09864.
    """

    patch_size: int = 2
    width: int = 128
    num_layers: int = 2
    num_single_layers: int = 4
    num_heads: int = 4
    mlp_ratio: int = 4
    rope_axes: tuple[int, int, int] = (4, 14, 14)
    guidance: float | None = None
    time_scale: float = 100.0
    remat: bool = False
    dtype: Any = None
    attention_fn: Callable[..., Array] = dot_product_attention
    norm: Norm | Norms = LayerNorm

    def __post_init__(self):
        check_attention("Flux", self.attention_fn)
        placed("Flux", self.norm)
        if self.width % self.num_heads:
            raise ValueError(
                f"Flux: expected a width divisible by num_heads={self.num_heads}, got {self.width}"
            )
        axes, size = tuple(self.rope_axes), self.width // self.num_heads
        if len(axes) != 3 or any(a < 0 or a % 2 for a in axes) or sum(axes) != size:
            raise ValueError(
                f"Flux: expected three even rope_axes of sum width / num_heads = {size}, got {axes}"
            )
        check_whole(
            "Flux",
            num_layers=self.num_layers,
            num_single_layers=self.num_single_layers,
            patch_size=self.patch_size,
        )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None, r: Array | None = None) -> Array:
        """Predict the velocity.

        Args:
            x: the images, or latents, [b, H, W, C].
            t: the times, [b].
            cond: `Condition(context=[b, n, k], vector=[b, m])`, with a mask [b, n] of the tokens
                that count or without.
            r: the times that a flow map goes to, [b]; None for a velocity. The network reads r - t.

        Returns:
            The velocity, with the shape and type of x.
        """
        p = self.patch_size
        if self.guidance is None and inputs_of(self, "embed", "guidance_in") is not None:
            raise ValueError(
                "Flux: expected a guidance, such as net.clone(guidance=3.5), since the params were "
                "made with one, got None"
            )

        h, text, c, mask = enter(self, x, t, cond, r, self.guidance)
        n = text.shape[1]
        angles = rope_angles(n, x.shape[1] // p, x.shape[2] // p, self.rope_axes)
        turns = tuple(jnp.asarray(f(angles), float_dtype(h)) for f in (np.cos, np.sin))

        norms = placed("Flux", self.norm)
        norms = norms._replace(queries_keys=norms.queries_keys or RMSNorm)
        options = self.num_heads, self.mlp_ratio, self.dtype, norms, self.attention_fn
        carry = first_normed(norms, h, text, self.dtype)
        double = scanned(JointBlock, self.num_layers, self.remat)(*options, name="double_blocks")
        (h, text), _ = double(carry, c, mask, turns)
        single = scanned(SingleBlock, self.num_single_layers, self.remat)
        mask = whole_mask(mask, h.shape[1])
        h = jnp.concatenate([text, h], axis=1)
        h, _ = single(*options, name="single_blocks")(h, c, mask, turns)
        h = normed(norms.pre, h[:, n:], self.dtype, "norm", affine=False)
        return leave(h, c, x, p, self.dtype)


class SingleBlock(nn.Module):
    """One block on tokens h [b, n, width], modulated by c [b, width]: attention beside an MLP.

    It is the identity at initialization. `turns`, cosines and sines [n, size / 2], turn queries and
    keys.
    """

    num_heads: int
    mlp_ratio: int
    dtype: Any
    norms: Norms
    attention_fn: Callable[..., Array] = dot_product_attention

    @nn.compact
    def __call__(
        self, h: Array, c: Array, mask: Array | None, turns: tuple[Array, Array]
    ) -> tuple[Array, None]:
        width = h.shape[-1]
        dense = partial(nn.Dense, kernel_init=_xavier, dtype=self.dtype)
        shift, scale, gate = modulation(c, 3, self.dtype)

        norms, norm = self.norms, partial(normed, dtype=self.dtype)
        y = norm(norms.pre, h, name="norm", affine=False) * (1 + scale) + shift
        y = per_token(dense((3 + self.mlp_ratio) * width, name="in"), y)
        qkv, hidden = jnp.split(y, [3 * width], axis=-1)
        q, k, v = split_heads(qkv, self.num_heads)
        q = norm(norms.queries_keys, q, name="q_norm")
        k = norm(norms.queries_keys, k, name="k_norm")
        y = attend(self.attention_fn, rotated(q, turns), rotated(k, turns), v, mask)
        y = merged(norm(norms.heads, y, name="head_norm"))
        hidden = norm(norms.hidden, nn.gelu(hidden), name="hidden_norm")
        y = per_token(dense(width, name="out"), jnp.concatenate([y, hidden], axis=-1))
        y = norm(norms.after_attention, y, name="after")
        return joined(norms, h, y, gate, self.dtype, "join"), None


def rope_angles(n: int, rows: int, columns: int, axes: tuple[int, int, int]) -> np.ndarray:
    """The angles [n + rows columns, sum(axes) / 2] that a position turns the pairs of a head by.

    It is position times 10000^(-i / count) along each axis; the n tokens of the text lie at 0,
    those of the image at (0, row, column).
    """
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = [
        np.outer(position, 10_000.0 ** (-np.arange(size // 2) / max(size // 2, 1)))
        for position, size in zip((0 * row, row, column), axes, strict=True)
    ]
    return np.pad(np.concatenate(angles, axis=1), ((n, 0), (0, 0)))
