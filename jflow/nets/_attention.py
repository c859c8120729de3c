"""Self-attention that has a forward mode, and takes another attention function where that is faster."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow.types import Array


def dot_product_attention(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T / sqrt(size)) v for each head: q [b, n, heads, size], k and v [b, m, heads, size] -> like q.

    Written out, because fused kernels have no JVP and `jax.nn.dot_product_attention` rounds float64 scores to float32. The
    softmax is in float32 or better.
    """
    scores = (
        jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=float_dtype(q))
        * q.shape[-1] ** -0.5
    )
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(v.dtype), v)


class SelfAttention(nn.Module):
    """Full self-attention over tokens: [b, n, width] -> [b, n, width], scores divided by sqrt(width / heads).

    attention_fn: called as attention_fn(q, k, v), each [b, n, heads, size], as is the result. The default has a forward
        mode and float64; in bfloat16 on a GPU
        `partial(jax.nn.dot_product_attention, implementation="cudnn")` keeps the scores out of memory.

    Raises ValueError when `heads` does not divide the width.
    """

    num_heads: int
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    out_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: Any = None
    attention_fn: Callable[..., Array] = dot_product_attention

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, n, width = x.shape
        if width % self.num_heads:
            raise ValueError(
                f"SelfAttention: expected num_heads to divide the width {width}, got num_heads={self.num_heads}"
            )
        qkv = per_token(
            nn.Dense(3 * width, kernel_init=self.kernel_init, dtype=self.dtype, name="qkv"), x
        )
        q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, self.num_heads, width // self.num_heads), 2, 0)
        y = self.attention_fn(q, k, v)
        if y.shape != q.shape:
            raise ValueError(
                f"SelfAttention: expected attention_fn to return {list(q.shape)}, got {list(y.shape)}"
            )
        y = y.reshape(b, n, width)
        return per_token(
            nn.Dense(width, kernel_init=self.out_init, dtype=self.dtype, name="out"), y
        )


def per_token(f: Callable[[Array], Array], x: Array) -> Array:
    """Apply a function of the last axis to x [b, n, F] as one matrix [b n, F].

    The same numbers; on CPU the gradient of the kernel takes 0.4 of the time (XLA transposes the operands otherwise).
    """
    y = f(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])
