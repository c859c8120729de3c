"""TokenDiT: the transformer of DiT on tokens, some of which may be padding."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jflow.nets._attention import check_attention, dot_product_attention, per_token
from jflow.nets._dit import check_blocks, transformed, with_aligned
from jflow.nets._embed import TimeCondEmbed, check_time, read_cond
from jflow.nets._hyper_connections import Residual
from jflow.nets._normalization import LayerNorm, Norm, Norms, placed
from jflow.nets._vit import check_width
from jflow.types import Array, Cond, Condition


def sinusoidal_positions(n: int, width: int) -> np.ndarray:
    """A fixed table of positions: sines and cosines of 0 ... n - 1 at geometric frequencies.

        sin(i w_k), cos(i w_k),      w_k = 10000^(-2 k / width),  k = 0 ... width / 2 - 1

    Args:
        n: the number of tokens.
        width: the count of numbers for each, even.

    Returns:
        The table [n, width], the sines first.

    Raises:
        ValueError: width is odd.

    Examples:
        >>> from jflow import nets
        >>> nets.sinusoidal_positions(2, 4).round(2).tolist()
        [[0.0, 0.0, 1.0, 1.0], [0.84, 0.01, 0.54, 1.0]]

    References:
        Vaswani et al., *Attention Is All You Need*, 2017, arXiv:1706.03762 (there sines and cosines
            alternate).
    """
    if width % 2:
        raise ValueError(f"sinusoidal_positions: expected an even width, got {width}")
    angles = np.outer(np.arange(n), 10_000.0 ** (-np.arange(0, width, 2) / width))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


class LearnedPositions(nn.Module):
    """A table of positions among the params of a network: `module(n, width) -> [n, width]`.

    It is for `TokenDiT(positions=...)`, and fits as many tokens as it was made for.

    Attributes:
        std: the standard deviation of the normal that it starts from.

    Examples:
        >>> from jflow import nets
        >>> net = nets.TokenDiT(positions=nets.LearnedPositions())
    """

    std: float = 0.02

    @nn.compact
    def __call__(self, n: int, width: int) -> Array:
        """The table.

        Args:
            n: the number of tokens.
            width: the count of numbers for each.

        Returns:
            The table [n, width].
        """
        return self.param("table", nn.initializers.normal(self.std), (n, width))


class TokenDiT(nn.Module):
    """The transformer of DiT on tokens, as a velocity network, zero at initialization.

    `module(x [b, n, d], t [b], cond=None, r=None) -> shaped like x`. A linear map makes tokens of
    width numbers, to which positions are added; the adaLN-zero blocks are those of `DiT`, scanned.
    The time may be one for each token, t [b, n].

    Of a `types.Condition` the label and the vector modulate the blocks; what is aligned with x, [b,
    n, k], is added to each token; the context is read by a cross-attention in each block. The
    weights that read the last two start at zero. With `valid` [b, n] a token is attended to only
    where it exists: what stands in the padding, in x, in aligned and in times of each token,
    changes nothing for the others, NaN neither, and the velocity there is 0.

    Attributes:
        width: of the tokens.
        num_layers: the number of blocks.
        num_heads: the number of attention heads, which divides the width.
        mlp_ratio: the hidden width of the MLP of a block, in widths.
        num_classes: the number of classes where cond has integer labels [b]. Index num_classes is
            the null label, which cond=None then means too.
        positions: a function (n, width) -> table [n, width] that is added to the tokens, such as
            `sinusoidal_positions` or `LearnedPositions()`. None adds none: then the network treats
            the tokens as a set, unless attention_fn is a `rotary_attention`. Positions that differ
            from row to row, such as coordinates [b, n, c], are features in cond.aligned
            (`time_features`).
        time_scale: the largest angular frequency of the features of time, in radians per unit of t;
            see `time_features`.
        dropout: the rate; a key, or a 'dropout' stream, switches it on.
        remat: whether each block is computed again in the backward pass, which saves memory.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.
        attention_fn: a function `attention_fn(q, k, v)`, or with mask=[b, n] where cond has valid;
            see `SelfAttention`.
        norm: a function that makes the normalizations, such as `RMSNorm`, or a `Norms`, which says
            where they stand, such as `peri_norm()`. Those in front of a branch have no weights.
        mlp: a Linen module (tokens [b, n, width]) -> tokens in the place of the MLP of each block,
            with params for each, such as `MixtureOfExperts(8)`, `ProductKeyExperts()` or
            `ParameterAttention(512)`. None is two dense layers, of mlp_ratio.
        residual: `HyperConnections()` or `LadderResidual()`, in the place of `h + branch(h)`. None
            is that.
        shared: whether attention and MLP are the same in all blocks, which then have their
            modulations, and what else there is, of their own; with a `MixtureOfExperts` it is
            WideNet.

    Raises:
        TypeError: mlp is no Linen module, or residual none of these.
        ValueError: num_heads does not divide the width, num_layers is below 1, x is not [b, n, d],
            or t or a part of cond does not fit it.
        TypeError: norm is neither, or attention_fn is no function.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> from jflow.types import Condition
        >>> net = nets.TokenDiT(width=8, num_layers=1, num_heads=1)
        >>> x, t = jnp.ones((1, 3, 2)), jnp.zeros(1)
        >>> cond = Condition(valid=jnp.array([[True, True, False]]))  # the last one is padding
        >>> run = lambda key: net.init_with_output(key, x, t, cond)[0]
        >>> jax.eval_shape(run, jax.random.key(0)).shape
        (1, 3, 2)

    References:
        Peebles, Xie, *Scalable Diffusion Models with Transformers*, 2023, arXiv:2212.09748, for the
            blocks. Tokens, positions, and padding are ours.
        Chen, Martí Monsó, Du, Simchowitz, Tedrake, Sitzmann, *Diffusion Forcing: Next-token
            Prediction Meets Full-Sequence Diffusion*, 2024, arXiv:2407.01392, for a time of each
            token.
        Xue, Shi, Wei, Lou, Liu, You, *Go Wider Instead of Deeper*, 2021, arXiv:2107.11817, for
            shared blocks.
    """

    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_ratio: int = 4
    num_classes: int | None = None
    positions: Callable[[int, int], Any] | None = sinusoidal_positions
    time_scale: float = 100.0
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = None
    attention_fn: Callable[..., Array] = dot_product_attention
    norm: Norm | Norms = LayerNorm
    mlp: nn.Module | None = None
    residual: Residual | None = None
    shared: bool = False

    def __post_init__(self):
        check_width("TokenDiT", self.width, self.num_heads, self.num_layers)
        check_attention("TokenDiT", self.attention_fn)
        check_blocks(
            "TokenDiT",
            self.mlp,
            self.residual,
            placed("TokenDiT", self.norm, per_token=self.shared),
        )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None, r: Array | None = None) -> Array:
        """Predict the velocity.

        Args:
            x: the tokens, [b, n, d].
            t: the times, [b], or [b, n] along the tokens.
            cond: None, integer labels [b], floats [b, k], a pytree of them, or a `types.Condition`.
            r: the times that a flow map goes to, shaped like t; None for a velocity. The network
                reads r - t.

        Returns:
            The velocity, with the shape and type of x, 0 at tokens that are not valid.
        """
        if x.ndim != 3:
            raise ValueError(f"TokenDiT: expected x of shape [b, n, d], got {list(x.shape)}")
        _, n, d = x.shape
        check_time("TokenDiT", x, t, r, n)
        cond, parts = read_cond("TokenDiT", cond, x, Condition._fields)
        valid, aligned = parts.valid, parts.aligned
        existing = lambda a: a if valid is None else _existing(valid, a)  # noqa: E731

        h = per_token(nn.Dense(self.width, dtype=self.dtype, name="tokens"), existing(x))
        h = with_aligned(
            self, h, None if aligned is None else existing(aligned.astype(x.dtype)), self.dtype
        )
        if self.positions is not None:
            h = h + _table(self.positions, n, self.width, h.dtype)[None]
        if t.ndim == 2:
            t, r = existing(t), None if r is None else existing(r)
        embed = TimeCondEmbed(
            self.width, self.num_classes, time_scale=self.time_scale, dtype=self.dtype, name="embed"
        )
        c = nn.silu(embed(t, cond, r)).astype(h.dtype)  # the scan's carry keeps one type
        return existing(transformed(self, h, c, parts, d)).astype(x.dtype)


def _existing(valid: Array, a: Array) -> Array:
    """a [b, n, ...], 0 where there is no token."""
    return jnp.where(valid.reshape(valid.shape + (1,) * (a.ndim - 2)), a, jnp.zeros_like(a))


def _table(positions: Callable[[int, int], Any], n: int, width: int, dtype) -> Array:
    """The table of positions, checked."""
    table = jnp.asarray(positions(n, width), dtype)
    if table.shape != (n, width):
        raise ValueError(
            f"TokenDiT: expected positions to return a table [{n}, {width}], got"
            f" {list(table.shape)}"
        )
    return table
