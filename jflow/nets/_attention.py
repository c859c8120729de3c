"""Attention in several forms of one signature, and self-attention, which takes any of them."""

import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_whole, described
from jflow.nets._normalization import Norm, normed
from jflow.types import Array

Attention = Callable[..., Array]  # (q, k, v, *, mask=None)


def dot_product_attention(
    q: Float[Array, "b n heads size"],
    k: Float[Array, "b m heads size"],
    v: Float[Array, "b m heads size"],
    *,
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, "b n heads size"]:
    """Softmax attention for each head: softmax(q k^T / sqrt(size)) v.

    It is written out, because fused kernels have no forward mode and `jax.nn.dot_product_attention`
    rounds float64 scores to float32. The softmax is in float32 or better. Its memory grows with the
    square of the tokens; `chunked_attention` has the same results without that.

    Args:
        q: the queries, [b, n, heads, size].
        k: the keys, [b, m, heads, size].
        v: the values, [b, m, heads, size].
        mask: the keys that are seen, bool [b, m] (or [1, m]); or, by each query and head, an array
            of four axes that broadcasts to [b, heads, n, m], such as
            `jnp.tri(n, dtype=bool)[None, None]` for causal attention. None: all. A query that sees
            no key gets zeros.

    Returns:
        The weighted means of the values, shaped like q.

    Raises:
        ValueError: mask is not bool, or does not have one of these shapes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> q, k = jnp.zeros((1, 1, 1, 2)), jnp.ones((1, 2, 1, 2))
        >>> v = jnp.array([[[[1.0, 0.0]], [[3.0, 0.0]]]])
        >>> nets.dot_product_attention(q, k, v).ravel()  # equal scores: the mean
        Array([2., 0.], dtype=float32)
        >>> nets.dot_product_attention(q, k, v, mask=jnp.array([[False, True]])).ravel()
        Array([3., 0.], dtype=float32)

    References:
        Vaswani et al., *Attention Is All You Need*, 2017, arXiv:1706.03762.
    """
    scores = (
        jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=float_dtype(q))
        * q.shape[-1] ** -0.5
    )
    if mask is None:
        weights = jax.nn.softmax(scores)
    else:
        mask = _four_axes("dot_product_attention", mask, q, k)
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)  # finite: no NaN
        weights = jnp.where(mask, jax.nn.softmax(scores), 0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)


def chunked_attention(block: int = 512, *, causal: bool = False) -> Attention:
    """Softmax attention a block of queries and keys at a time, with memory linear in the tokens.

    The result is that of `dot_product_attention`, up to the order of sums, in forward and reverse
    mode. Each block of queries goes through the blocks of keys with a running maximum and a running
    sum; the derivative computes the scores again.

    Args:
        block: the number of queries, and of keys, of one block.
        causal: whether query i sees keys 0 to i only, without a mask in memory.

    Returns:
        A function like `dot_product_attention`, for `attention_fn` of the networks.

    Raises:
        ValueError: block is below 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> attention = nets.chunked_attention(block=2)
        >>> q, v = jnp.zeros((1, 3, 1, 1)), jnp.arange(3.0).reshape(1, 3, 1, 1)
        >>> attention(q, q, v).ravel()  # equal scores: the mean
        Array([1., 1., 1.], dtype=float32)

    References:
        Rabe, Staats, *Self-attention Does Not Need O(n^2) Memory*, 2021, arXiv:2112.05682.
    """
    check_whole("chunked_attention", block=block)

    def attention(q, k, v, *, mask=None):
        (b, n, heads, size), m, dtype = q.shape, k.shape[1], float_dtype(q)
        rows, columns = min(block, n), min(block, m)
        lowest = jnp.finfo(dtype).min  # finite: no NaN where nothing is seen
        if mask is not None:
            mask = _four_axes("chunked_attention", mask, q, k)
            mask = _padded(_padded(mask, rows, 2), columns, 3)

        def part(mask, i, length, axis):
            if mask.shape[axis] == 1:
                return mask
            return jax.lax.dynamic_slice_in_dim(mask, i * length, length, axis)

        def seen(i, j):  # broadcasts to [b, heads, rows, columns]
            row = (i * rows + jnp.arange(rows))[None, None, :, None]
            column = (j * columns + jnp.arange(columns))[None, None, None]
            found = column < m
            if causal:
                found = found & (column <= row)
            if mask is not None:
                found = found & part(part(mask, i, rows, 2), j, columns, 3)
            return found

        def of_queries(_, inputs):
            i, q_i = inputs

            def of_keys(carry, inputs):
                peak, total, mean = carry
                j, k_j, v_j = inputs
                valid = seen(i, j)
                scores = jnp.einsum("bqhd,bkhd->bhqk", q_i, k_j, preferred_element_type=dtype)
                scores = jnp.where(valid, scores * size**-0.5, lowest)
                # The result does not depend on what is subtracted, so that it has no derivative.
                high = jnp.maximum(peak, jax.lax.stop_gradient(scores).max(-1))
                weights = jnp.where(valid, jnp.exp(scores - high[..., None]), 0)
                shrink = jnp.exp(peak - high)
                added = jnp.einsum(
                    "bhqk,bkhd->bhqd", weights.astype(v.dtype), v_j, preferred_element_type=dtype
                )
                total = total * shrink + weights.sum(-1)
                return (high, total, mean * shrink[..., None] + added), None

            total = jnp.zeros_like(q_i, dtype, shape=(b, heads, rows))
            mean = jnp.zeros_like(q_i, dtype, shape=(b, heads, rows, v.shape[-1]))
            (_, total, mean), _ = jax.lax.scan(
                jax.checkpoint(of_keys, prevent_cse=False),
                (total + lowest, total, mean),
                (jnp.arange(len(keys)), keys, values),
            )
            y = mean / jnp.where(total > 0, total, 1)[..., None]
            return None, y.astype(v.dtype)

        queries, keys, values = _blocks(q, rows), _blocks(k, columns), _blocks(v, columns)
        _, y = jax.lax.scan(
            jax.checkpoint(of_queries, prevent_cse=False), None, (jnp.arange(len(queries)), queries)
        )  # [blocks, b, heads, rows, size]
        return y.transpose(1, 0, 3, 2, 4).reshape(b, -1, heads, v.shape[-1])[:, :n]

    return attention


def fused_attention(implementation: Literal["xla", "cudnn"] | None = None) -> Attention:
    """JAX's own `jax.nn.dot_product_attention`, which cuDNN runs as one kernel on an NVIDIA GPU.

    What is added to it is the mask of `dot_product_attention`, with zeros for queries that see no
    key. The kernel of cuDNN takes float16 and bfloat16 only and has no forward mode, which losses
    of few-step models and exact likelihoods need.

    Args:
        implementation: "cudnn", "xla", or None, for JAX's choice.

    Returns:
        A function like `dot_product_attention`, for `attention_fn` of the networks.

    Raises:
        ValueError: implementation is another one.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> attention = nets.fused_attention()
        >>> q, v = jnp.zeros((1, 3, 1, 1)), jnp.arange(3.0).reshape(1, 3, 1, 1)
        >>> attention(q, q, v).ravel()  # equal scores: the mean
        Array([1., 1., 1.], dtype=float32)
    """
    if implementation not in ("xla", "cudnn", None):
        raise ValueError(
            f"fused_attention: expected 'xla', 'cudnn' or None, got {implementation!r}"
        )

    def attention(q, k, v, *, mask=None):
        if mask is not None:
            mask = _four_axes("fused_attention", mask, q, k)
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
        if mask is None:
            return y
        some = jnp.any(mask, axis=-1, keepdims=True)  # [b, heads, n, 1], or 1 in their place
        return jnp.where(some.swapaxes(1, 2), y, 0)

    return attention


def tpu_attention(*, causal: bool = False) -> Attention:
    """The flash attention kernel that JAX ships for TPUs; it runs on no other platform.

    Lengths that are no multiple of 128 are padded, and the padding is not seen. It has no forward
    mode. It was lowered for TPUs when this was written, and has not been run on one.

    Args:
        causal: whether query i sees keys 0 to i only.

    Returns:
        A function like `dot_product_attention`, for `attention_fn` of the networks; its mask is
        [b, m] or [1, m].

    Examples:
        >>> from jflow import nets
        >>> net = nets.DiT(attention_fn=nets.tpu_attention())

    References:
        Dao, Fu, Ermon, Rudra, Ré, *FlashAttention: Fast and Memory-Efficient Exact Attention with
            IO-Awareness*, 2022, arXiv:2205.14135.
    """

    def attention(q, k, v, *, mask=None):
        from jax.experimental.pallas.ops.tpu import flash_attention as kernel

        (b, n, _, size), m = q.shape, k.shape[1]
        if mask is not None and (mask.ndim != 2 or mask.dtype != bool):
            raise ValueError(
                f"tpu_attention: expected a mask [b, m] of bool, got {mask.dtype} of shape "
                f"{list(mask.shape)}; chunked_attention takes others"
            )
        if mask is not None:
            mask = jnp.broadcast_to(_four_axes("tpu_attention", mask, q, k)[:, 0, 0], (b, m))
        q, k, v = (_padded(x, 128, 1).swapaxes(1, 2) for x in (q, k, v))
        segments = None
        if mask is not None or m % 128:
            seen = jnp.ones((b, m), bool) if mask is None else mask
            segments = kernel.SegmentIds(
                jnp.ones((b, q.shape[2]), jnp.int32), _padded(seen, 128, 1).astype(jnp.int32)
            )
        y = kernel.flash_attention(
            q, k, v, segment_ids=segments, causal=causal, sm_scale=size**-0.5
        ).swapaxes(1, 2)[:, :n]
        return y if mask is None else jnp.where(mask.any(1)[:, None, None, None], y, 0)

    return attention


def rotary_attention(
    attention_fn: Attention = dot_product_attention, *, base: float = 10_000.0
) -> Attention:
    """Attention that knows how far apart two tokens are: rotary positions around another one.

    Also known as: RoPE, rotary position embedding.

    Pair i of the numbers of a head is turned by the angle position base^(-2 i / size) in the
    queries and the keys, positions 0, 1, 2 ..., so that a score depends on positions by their
    difference. Two numbers of a pair are neighbors.

    Args:
        attention_fn: the attention of the turned queries and keys, such as `chunked_attention()`.
        base: the ratio that the frequencies fall by, above 1.

    Returns:
        A function like `dot_product_attention`, for `attention_fn` of the networks. It raises a
        ValueError for heads of an odd size.

    Raises:
        ValueError: base is not a finite number above 1.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> attention = nets.rotary_attention(nets.chunked_attention())
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 4, 1, 2))
        >>> attention(q, k, v).shape
        (1, 4, 1, 2)
        >>> net = nets.TokenDiT(positions=None, attention_fn=attention)

    References:
        Su, Lu, Pan, Murtadha, Wen, Liu, *RoFormer: Enhanced Transformer with Rotary Position
            Embedding*, 2021, arXiv:2104.09864.
    """
    if not 1 < base < math.inf:
        raise ValueError(f"rotary_attention: expected a finite base > 1, got {base}")

    def turned(x):
        n, size = x.shape[1], x.shape[-1]
        if size % 2:
            raise ValueError(f"rotary_attention: expected heads of an even size, got {size}")
        angles = np.outer(np.arange(n), base ** (-np.arange(0, size, 2) / size))
        return rotated(x, tuple(jnp.asarray(f(angles), float_dtype(x)) for f in (np.cos, np.sin)))

    def attention(q, k, v, *, mask=None):
        rest = {} if mask is None else {"mask": mask}
        return attention_fn(turned(q), turned(k), v, **rest)

    return attention


def rotated(x: Array, turns: tuple[Array, Array]) -> Array:
    """x [b, n, heads, size], whose adjacent pairs of numbers are turned, in float32 or better.

    turns are the cosines and the sines of the angles, [n, size / 2].
    """
    cos, sin = (turn[None, :, None] for turn in turns)
    a, b = jnp.moveaxis(x.astype(cos.dtype).reshape(*x.shape[:-1], -1, 2), -1, 0)
    pairs = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return pairs.reshape(x.shape).astype(x.dtype)


def _four_axes(name: str, mask: Array, q: Array, k: Array) -> Array:
    """A mask [b, m], or of four axes, as one of four that broadcasts to [b, heads, n, m]."""
    (b, n, heads, _), m = q.shape, k.shape[1]
    given = mask
    if mask.ndim == 2:
        mask = mask[:, None, None]
    whole = (b, heads, n, m)
    fits = mask.ndim == 4 and all(s in (1, w) for s, w in zip(mask.shape, whole, strict=True))
    if not fits or mask.dtype != bool:
        raise ValueError(
            f"{name}: expected a bool mask [{b}, {m}], or one of four axes that broadcasts to "
            f"{list(whole)}, got {given.dtype} of shape {list(given.shape)}"
        )
    return mask


def _padded(x: Array, block: int, axis: int) -> Array:
    """x with zeros at the end of an axis, so that block divides it; an axis of 1 stays."""
    extra = -x.shape[axis] % block if x.shape[axis] > 1 or axis == 1 else 0
    widths = [(0, extra if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths) if extra else x


def _blocks(x: Array, block: int) -> Array:
    """x [b, n, ...] as [blocks, b, block, ...]."""
    x = _padded(x, block, 1)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


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
            returns one more; where some tokens are not valid it is called with mask=[b, n] bool,
            the keys that are seen. The default has a forward mode and float64;
            `chunked_attention()` too, in memory linear in the tokens; in bfloat16 on a GPU
            `fused_attention("cudnn")` is faster, on a TPU `tpu_attention()`. `rotary_attention`
            adds positions to any of them.
        qk_norm: a function that makes the normalization of queries and keys, such as `RMSNorm`, or
            None.
        head_norm: the same of what attention_fn returns, [b, n, heads, size], or None.

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
    qk_norm: Norm | None = None
    head_norm: Norm | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n width"], valid: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n width"]:
        """Attend.

        Args:
            x: the tokens, [b, n, width].
            valid: the tokens that are attended to, bool [b, n]; None: all.

        Returns:
            The tokens after attention and a linear map, [b, n, width].
        """
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(
                f"SelfAttention: expected num_heads to divide the width {width}, got "
                f"num_heads={self.num_heads}"
            )
        qkv = nn.Dense(3 * width, kernel_init=self.kernel_init, dtype=self.dtype, name="qkv")
        q, k, v = split_heads(per_token(qkv, x), self.num_heads)
        q = normed(self.qk_norm, q, self.dtype, "q_norm")
        k = normed(self.qk_norm, k, self.dtype, "k_norm")
        y = attend(self.attention_fn, q, k, v, valid)
        y = merged(normed(self.head_norm, y, self.dtype, "head_norm"))
        return per_token(
            nn.Dense(width, kernel_init=self.out_init, dtype=self.dtype, name="out"), y
        )


def check_attention(name: str, attention_fn: Any) -> None:
    """Raise unless attention_fn is a function."""
    if not callable(attention_fn):
        raise TypeError(
            f"{name}: expected attention_fn to be a function of (q, k, v), such as"
            " nets.dot_product_attention, nets.chunked_attention() or nets.flow_attention(), got"
            f" {described(attention_fn)}"
        )


def split_heads(y: Array, num_heads: int, parts: int = 3) -> tuple[Array, ...]:
    """[b, n, parts heads size] -> so many arrays [b, n, heads, size]: queries, keys and values."""
    return tuple(jnp.moveaxis(y.reshape(*y.shape[:2], parts, num_heads, -1), 2, 0))


def merged(y: Array) -> Array:
    """[b, n, heads, size] -> [b, n, heads size]."""
    return y.reshape(*y.shape[:2], -1)


def attend(attention_fn, q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """attention_fn(q, k, v), with a mask [b, m] of the keys where there is one."""
    y = attention_fn(q, k, v) if mask is None else attention_fn(q, k, v, mask=mask)
    if y.shape != q.shape:
        raise ValueError(f"expected attention_fn to return {list(q.shape)}, got {list(y.shape)}")
    return y


def per_token(f: Callable[[Array], Array], x: Array) -> Array:
    """Apply a function of the last axis to x [b, n, F] as one matrix [b n, F].

    The same numbers; on CPU the gradient of the kernel takes 0.4 of the time (XLA transposes the
    operands otherwise).
    """
    y = f(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])
