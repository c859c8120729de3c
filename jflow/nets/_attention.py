"""Self-attention that has a forward mode, and takes another attention function."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from jflow._core.arrays import float_dtype
from jflow.types import Array


def dot_product_attention(
    q: Float[Array, "b n heads size"],
    k: Float[Array, "b m heads size"],
    v: Float[Array, "b m heads size"],
    *,
    mask: Bool[Array, "b #heads #n m"] | None = None,
) -> Float[Array, "b n heads size"]:
    """Softmax attention for each head: softmax(q k^T / sqrt(size)) v.

    It is written out, because fused kernels have no forward mode and `jax.nn.dot_product_attention`
    rounds float64 scores to float32. The softmax is in float32 or better.

    Args:
        q: the queries, [b, n, heads, size].
        k: the keys, [b, m, heads, size].
        v: the values, [b, m, heads, size].
        mask: which keys count for which query, bool [b, heads or 1, n or 1, m], at least one for
            each; None: all.

    Returns:
        The weighted means of the values, shaped like q.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> q, k = jnp.zeros((1, 1, 1, 2)), jnp.ones((1, 2, 1, 2))
        >>> v = jnp.array([[[[1.0, 0.0]], [[3.0, 0.0]]]])
        >>> nets.dot_product_attention(q, k, v).ravel()  # equal scores: the mean
        Array([2., 0.], dtype=float32)

    References:
        Vaswani et al., *Attention Is All You Need*, 2017, arXiv:1706.03762.
    """
    scores = (
        jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=float_dtype(q))
        * q.shape[-1] ** -0.5
    )
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(v.dtype), v)


class SelfAttention(nn.Module):
    """Full self-attention over tokens: `module(x [b, n, width]) -> [b, n, width]`.

    Scores are divided by sqrt(width / num_heads). It has a forward mode, and takes another
    attention function where that is faster.

    Attributes:
        num_heads: the number of attention heads, which divides the width.
        kernel_init: the initializer of the kernels of queries, keys and values.
        out_init: the initializer of the kernel of the output.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.
        attention_fn: a function `attention_fn(q, k, v)` of three arrays [b, n, heads, size], which
            returns one more. The default has a forward mode and float64; in bfloat16 on a GPU
            `partial(jax.nn.dot_product_attention, implementation="cudnn")` keeps the scores out of
            memory.

    Raises:
        ValueError: num_heads does not divide the width, or attention_fn returns another shape; both
            at the call.

    References:
        Vaswani et al., *Attention Is All You Need*, 2017, arXiv:1706.03762.
    """

    num_heads: int
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    out_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: Any = None
    attention_fn: Callable[..., Array] = dot_product_attention

    @nn.compact
    def __call__(self, x: Float[Array, "b n width"]) -> Float[Array, "b n width"]:
        """Attend.

        Args:
            x: the tokens, [b, n, width].

        Returns:
            The tokens after attention and a linear map, [b, n, width].
        """
        b, n, width = x.shape
        if width % self.num_heads:
            raise ValueError(
                f"SelfAttention: expected num_heads to divide the width {width}, got "
                f"num_heads={self.num_heads}"
            )
        qkv = per_token(
            nn.Dense(3 * width, kernel_init=self.kernel_init, dtype=self.dtype, name="qkv"), x
        )
        q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, self.num_heads, width // self.num_heads), 2, 0)
        y = self.attention_fn(q, k, v)
        if y.shape != q.shape:
            raise ValueError(
                f"SelfAttention: expected attention_fn to return {list(q.shape)}, got "
                f"{list(y.shape)}"
            )
        y = y.reshape(b, n, width)
        return per_token(
            nn.Dense(width, kernel_init=self.out_init, dtype=self.dtype, name="out"), y
        )


def per_token(f: Callable[[Array], Array], x: Array) -> Array:
    """Apply a function of the last axis to x [b, n, F] as one matrix [b n, F].

    The same numbers; on CPU the gradient of the kernel takes 0.4 of the time (XLA transposes the
    operands otherwise).
    """
    y = f(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])
