"""DiT: a transformer on image patches, modulated by time and cond."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import patchify, unpatchify
from jflow._core.checks import check_whole
from jflow.nets._attention import SelfAttention, dot_product_attention, per_token
from jflow.nets._embed import TimeCondEmbed, check_time
from jflow.types import Array, Cond

_xavier = nn.initializers.xavier_uniform()
_zeros = nn.initializers.zeros


class DiT(nn.Module):
    """DiT: a transformer on the patches of an image, as a velocity network, zero at initialization.

    `module(x [b, H, W, C], t [b], cond=None, r=None) -> shaped like x`. Patches become tokens with
    fixed 2-D sine-cosine positions; the adaLN-zero blocks are scanned. The published sizes are
    width, num_layers, num_heads = 384, 12, 6 (S), 768, 12, 12 (B), 1024, 24, 16 (L) and 1152, 28,
    16 (XL), at 1000 integer times, which is time_scale=1000 here.

    Attributes:
        patch_size: the side of a patch, in pixels.
        width: of the tokens.
        num_layers: the number of blocks.
        num_heads: the number of attention heads, which divides the width.
        mlp_ratio: the hidden width of the MLP of a block, in widths.
        num_classes: the number of classes where cond has integer labels [b]. Index num_classes is
            the null label, which cond=None then means too.
        time_scale: the largest angular frequency of the features of time, in radians per unit of t;
            see `time_features`.
        dropout: the rate; a key, or a 'dropout' stream, switches it on.
        remat: whether each block is computed again in the backward pass, which saves memory.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.
        attention_fn: a function `attention_fn(q, k, v)`; see `SelfAttention`.

    Raises:
        ValueError: patch_size does not divide H and W, num_heads the width, or 4 the width.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.DiT(width=8, num_layers=1, num_heads=1)
        >>> x, t = jnp.ones((1, 4, 4, 1)), jnp.zeros(1)
        >>> jax.eval_shape(lambda key: net.init_with_output(key, x, t)[0], jax.random.key(0)).shape
        (1, 4, 4, 1)

    References:
        Peebles, Xie, *Scalable Diffusion Models with Transformers*, 2023, arXiv:2212.09748.
    """

    patch_size: int = 2
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_ratio: int = 4
    num_classes: int | None = None
    time_scale: float = 100.0
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = None
    attention_fn: Callable[..., Array] = dot_product_attention

    def __post_init__(self):
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(
                f"DiT: expected a width divisible by 4 and by num_heads={self.num_heads}, got "
                f"{self.width}"
            )
        check_whole("DiT", num_layers=self.num_layers)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None, r: Array | None = None) -> Array:
        """Predict the velocity.

        Args:
            x: the images, [b, H, W, C].
            t: the times, [b].
            cond: None, integer labels [b], floats [b, ...], or a pytree of them; see
                `TimeCondEmbed`.
            r: the times that a flow map goes to, [b]; None for a velocity. The network reads r - t.

        Returns:
            The velocity, with the shape and type of x.
        """
        p = self.patch_size
        if x.ndim != 4 or x.shape[1] % p or x.shape[2] % p:
            raise ValueError(
                f"DiT: expected x of shape [b, H, W, C], H and W divisible by {p}, got "
                f"{list(x.shape)}"
            )
        check_time("DiT", x, t, r)
        _, height, width, channels = x.shape
        rows, columns = height // p, width // p

        h = per_token(
            nn.Dense(self.width, kernel_init=_xavier, dtype=self.dtype, name="patches"),
            patchify(x, p),
        )
        h = h + jnp.asarray(sincos_positions(rows, columns, self.width), h.dtype)[None]
        embed = TimeCondEmbed(
            self.width, self.num_classes, time_scale=self.time_scale, dtype=self.dtype, name="embed"
        )
        c = nn.silu(embed(t, cond, r)).astype(h.dtype)  # the scan's carry keeps one type
        blocks = nn.scan(
            nn.remat(DiTBlock, prevent_cse=False) if self.remat else DiTBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.num_layers,
        )
        h, _ = blocks(
            self.num_heads,
            self.mlp_ratio,
            self.dropout,
            self.dtype,
            self.attention_fn,
            name="blocks",
        )(h, c)

        shift, scale = modulation(c, 2, self.dtype)
        h = layer_norm(self.dtype)(h) * (1 + scale) + shift
        h = per_token(
            nn.Dense(p * p * channels, kernel_init=_zeros, name="head"), h
        )  # in the params' precision
        return unpatchify(h, rows, columns, p).astype(x.dtype)


class DiTBlock(nn.Module):
    """One adaLN-zero block on tokens h [b, n, width], modulated by c [b, width].

    It is the identity at initialization.
    """

    num_heads: int
    mlp_ratio: int
    dropout: float
    dtype: Any
    attention_fn: Callable[..., Array] = dot_product_attention

    @nn.compact
    def __call__(self, h: Array, c: Array) -> tuple[Array, None]:
        width = h.shape[-1]
        dense = partial(nn.Dense, kernel_init=_xavier, dtype=self.dtype)
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(c, 6, self.dtype)

        y = layer_norm(self.dtype)(h) * (1 + scale_a) + shift_a
        y = SelfAttention(
            self.num_heads, _xavier, _xavier, self.dtype, self.attention_fn, name="attention"
        )(y)
        h = h + gate_a * drop(y)

        y = layer_norm(self.dtype)(h) * (1 + scale_m) + shift_m
        enter, leave = dense(self.mlp_ratio * width, name="in"), dense(width, name="out")
        return h + gate_m * per_token(lambda y: leave(drop(nn.gelu(enter(y)))), y), None


def layer_norm(dtype) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=dtype)


def modulation(c: Array, n: int, dtype) -> list[Array]:
    """n linear functions [b, 1, width] of c [b, width], zero at first.

    To be called inside a compact method.
    """
    return jnp.split(
        nn.Dense(n * c.shape[-1], kernel_init=_zeros, dtype=dtype, name="modulation")(c)[:, None],
        n,
        -1,
    )


def sincos_positions(rows: int, columns: int, width: int) -> np.ndarray:
    """Sines and cosines of the row in the first half, of the column in the second.

    The result is [rows columns, width].
    """
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))

    def axis(positions):
        angles = np.outer(positions, frequencies)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.concatenate([axis(row), axis(column)], axis=1)
