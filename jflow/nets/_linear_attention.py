"""Attention that is no softmax over all keys: linear in the tokens, doubly stochastic, in chunks.

All have the signature of `dot_product_attention`, for the `attention_fn` of a backbone, and a
forward mode. Sums over tokens are in float32 or better. No two of them are one function of the same
weights, so that published weights are for the attention they were trained with.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_whole
from jflow.nets._attention import Attention
from jflow.nets._normalization import centered
from jflow.types import Array


def flow_attention(*, causal: bool = False, block: int = 64) -> Attention:
    """Linear attention in which keys compete, as sources of a flow that is conserved.

    Also known as: Flow-Attention, the attention of Flowformer.

        in_i  = f(q_i) . sum_j f(k_j),              out_j  = f(k_j) . sum_i f(q_i),    f = sigmoid
        in'_i = f(q_i) . sum_j f(k_j) / out_j,      out'_j = f(k_j) . sum_i f(q_i) / in_i
        y_i   = sigmoid(in'_i n / m) sum_j f(q_i) . f(k_j) / in_i  m softmax(out')_j  v_j

    The in' of all n queries sum to m, the out' of all m keys to n. Its cost is linear in the
    tokens.

    Args:
        causal: whether query i sees keys 0 to i only. All sums are then over what came before, and
            each is divided by the number of its terms.
        block: the number of tokens of one block of the causal form.

    Returns:
        A function like `dot_product_attention`, for `attention_fn` of the networks; its mask is of
        tokens, [b, n] or [1, n], and takes queries out as well as keys.

    Raises:
        ValueError: block is below 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> q, v = jnp.zeros((1, 3, 1, 1)), jnp.array([0.0, 1.0, 2.0]).reshape(1, 3, 1, 1)
        >>> nets.flow_attention()(q, q, v).ravel().round(3)  # the mean, times sigmoid(1)
        Array([0.731, 0.731, 0.731], dtype=float32)

    References:
        Wu, Wu, Xu, Wang, Long, *Flowformer: Linearizing Transformers with Conservation Flows*,
            2022, arXiv:2202.06258. The mask and the counts of the causal form are ours.
    """
    check_whole("flow_attention", block=block)

    def attention(q, k, v, *, mask=None):
        given, dtype = v.dtype, float_dtype(q)
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        seen = _tokens_seen("flow_attention", mask, q, k)
        f_q, f_k = jax.nn.sigmoid(q) * seen, jax.nn.sigmoid(k) * seen
        if causal:
            _need_square("flow_attention", q, k)
            total = lambda x: jnp.cumsum(x, axis=1)  # noqa: E731
            count = jnp.maximum(total(jnp.broadcast_to(seen, k.shape)[..., :1]), 1)  # [b, m, h, 1]
            n, m = count, count
        else:
            total = lambda x: jnp.sum(x, axis=1, keepdims=True)  # noqa: E731
            m = jnp.maximum(total(jnp.broadcast_to(seen, k.shape)[..., :1]), 1)
            n = m if mask is not None else total(jnp.ones_like(q[..., :1]))

        into, out = _dot(f_q, total(f_k)), _dot(f_k, total(f_q))  # [b, n, h, 1] and [b, m, h, 1]
        into, out = (jnp.where(x > 0, x, 1) for x in (into, out))
        if causal:
            taken = _dot(f_q, total(f_k * (m / out))) / m
            given_out = _dot(f_k, total(f_q * (n / into))) / n
            given_out = jnp.where(seen, given_out, jnp.finfo(dtype).min / 4)
            total_out = jax.lax.cumlogsumexp(given_out, axis=1)
            share = m * jnp.exp(given_out - total_out) * seen
            y = causal_product(f_q / into, f_k, share * v, block)
        else:
            taken = _dot(f_q, total(f_k / out)) * n / m
            given_out = jnp.where(seen, _dot(f_k, total(f_q / into)), jnp.finfo(dtype).min / 4)
            share = m * jax.nn.softmax(given_out, axis=1) * seen
            y = _read(f_q / into, f_k, share * v)
        return (jax.nn.sigmoid(taken) * y).astype(given)

    return attention


def sinkhorn_attention(steps: int = 3) -> Attention:
    """Softmax attention whose weights are normalized over queries too, in turns.

    Also known as: the attention of the Sinkformer, doubly stochastic attention.

        W_0 = exp(q k^T / sqrt(size)),    W <- W / its row sums, W / its column sums, W / its row
        sums, ...

    One step is softmax. After an odd number the rows sum to 1 exactly, and the columns the more
    nearly the more steps. Its cost grows with the square of the tokens; there is no causal form.

    Args:
        steps: the number of normalizations, odd.

    Returns:
        A function like `dot_product_attention`, for `attention_fn` of the networks, of as many
        queries as keys; its mask is of tokens, [b, n] or [1, n], and takes queries out as well.

    Raises:
        ValueError: steps is not an odd whole number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> q, v = jnp.zeros((1, 3, 1, 1)), jnp.arange(3.0).reshape(1, 3, 1, 1)
        >>> nets.sinkhorn_attention()(q, q, v).ravel()  # equal scores: the mean
        Array([1., 1., 1.], dtype=float32)

    References:
        Sander, Ablin, Blondel, Peyré, *Sinkformers: Transformers with Doubly Stochastic Attention*,
            2021, arXiv:2110.11773.
    """
    check_whole("sinkhorn_attention", steps=steps)
    if steps % 2 == 0:
        raise ValueError(f"sinkhorn_attention: expected an odd number of steps, got {steps}")

    def attention(q, k, v, *, mask=None):
        _need_square("sinkhorn_attention", q, k)
        dtype = float_dtype(q)
        seen = _tokens_seen("sinkhorn_attention", mask, q, k)[..., 0, 0]  # [b or 1, n or 1]
        both = (seen[:, :, None] & seen[:, None])[:, None]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=dtype)
        scores = jnp.where(both, scores * q.shape[-1] ** -0.5, jnp.finfo(dtype).min / 4)

        def pair(scores, _):
            for axis in (-1, -2):
                scores = jnp.where(both, jax.nn.log_softmax(scores, axis), scores)
            return scores, None

        scores, _ = jax.lax.scan(pair, scores, None, length=steps // 2)
        weights = jnp.where(both, jax.nn.softmax(scores), 0).astype(v.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    return attention


def transnormer_attention(
    *, causal: bool = False, decay: float = 1.0, block: int = 64
) -> Attention:
    """Linear attention whose result is normalized, in the place of a division by its weights.

    Also known as: NormAttention, the attention of TransNormer.

        y_i = rms_norm(sum_j decay^(i - j) f(q_i) . f(k_j) v_j),    f(x) = elu(x) + 1

    The norm is over the numbers of a head. Its cost is linear in the tokens.

    Args:
        causal: whether query i sees keys 0 to i only.
        decay: what the weight of a key falls by with each token after it, in (0, 1]; of the causal
            form alone.
        block: the number of tokens of one block of the causal form.

    Returns:
        A function like `dot_product_attention`, for `attention_fn` of the networks; its mask is of
        keys, [b, m] or [1, m].

    Raises:
        ValueError: decay is not in (0, 1], or below 1 without causal, or block is below 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> q, v = jnp.zeros((1, 3, 1, 2)), jnp.ones((1, 3, 1, 2))
        >>> nets.transnormer_attention()(q, q, v)[0, 0, 0]
        Array([1., 1.], dtype=float32)

    References:
        Qin, Han, Sun, Li, Kong, Barnes, Zhong, *The Devil in Linear Transformer*, 2022,
            arXiv:2210.10340.
        Qin, Li, Sun, Sun, Shen, Han, Wei, Lv, Luo, Qiao, Zhong, *TransNormerLLM: A Faster and
            Better Large Language Model with Improved TransNormer*, 2023, arXiv:2307.14995, for the
            decay.
    """
    check_whole("transnormer_attention", block=block)
    if not 0 < decay <= 1 or (decay < 1 and not causal):
        raise ValueError(
            "transnormer_attention: expected decay in (0, 1], and 1 unless causal, got"
            f" decay={decay} and causal={causal}"
        )

    def attention(q, k, v, *, mask=None):
        given, dtype = v.dtype, float_dtype(q)
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        f_q = jax.nn.elu(q) + 1
        f_k = (jax.nn.elu(k) + 1) * _keys_seen("transnormer_attention", mask, q, k)
        if causal:
            _need_square("transnormer_attention", q, k)
            y = causal_product(f_q, f_k, v, block, decay)
        else:
            y = _read(f_q, f_k, v)
        return (y * jax.lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6)).astype(given)

    return attention


def galerkin_attention(
    q: Float[Array, "b n heads size"],
    k: Float[Array, "b m heads size"],
    v: Float[Array, "b m heads size"],
    *,
    mask: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b n heads size"]:
    """Attention without a softmax, keys and values being normalized: a Galerkin projection.

        y = q (norm(k)^T norm(v)) / m

    The norms are layer normalizations of each head, without weights. It is an integral over the
    tokens, which doubling every token leaves as it is, and its cost is linear in them.

    Args:
        q: the queries, [b, n, heads, size].
        k: the keys, [b, m, heads, size].
        v: the values, [b, m, heads, size].
        mask: the keys that are seen, bool [b, m] or [1, m]; None: all.

    Returns:
        The result, shaped like q.

    Raises:
        ValueError: mask is another one.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> q = k = v = jnp.array([1.0, -1.0]).reshape(1, 1, 1, 2)
        >>> nets.galerkin_attention(q, k, v).round(2).ravel()
        Array([ 2., -2.], dtype=float32)

    References:
        Cao, *Choose a Transformer: Fourier or Galerkin*, 2021, arXiv:2105.14995. Weights of the
            norms, and their initialization, are left out.
    """
    dtype = float_dtype(q)
    seen = _keys_seen("galerkin_attention", mask, q, k)
    keys = _layer_norm(k.astype(dtype)) * seen
    return (_read(q.astype(dtype), keys, _layer_norm(v.astype(dtype))) / _count(seen, k)).astype(
        v.dtype
    )


def fourier_attention(
    q: Float[Array, "b n heads size"],
    k: Float[Array, "b m heads size"],
    v: Float[Array, "b m heads size"],
    *,
    mask: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b n heads size"]:
    """Attention without a softmax, queries and keys being normalized: an integral transform.

        y = (norm(q) norm(k)^T) v / m

    The norms are layer normalizations of each head, without weights. Read from the right, as here,
    its cost is linear in the tokens.

    Args:
        q: the queries, [b, n, heads, size].
        k: the keys, [b, m, heads, size].
        v: the values, [b, m, heads, size].
        mask: the keys that are seen, bool [b, m] or [1, m]; None: all.

    Returns:
        The result, shaped like q.

    Raises:
        ValueError: mask is another one.

    References:
        Cao, *Choose a Transformer: Fourier or Galerkin*, 2021, arXiv:2105.14995. Weights of the
            norms, and their initialization, are left out.
    """
    dtype = float_dtype(q)
    seen = _keys_seen("fourier_attention", mask, q, k)
    keys = _layer_norm(k.astype(dtype)) * seen
    y = _read(_layer_norm(q.astype(dtype)), keys, v.astype(dtype)) / _count(seen, k)
    return y.astype(v.dtype)


def hybrid_attention(chunk: int, *, decay: float = 1.0) -> Attention:
    """Softmax attention within chunks of tokens, and linear attention to all earlier chunks.

    Also known as: the hybrid linear attention of ARFlow, whose chunks are images of a sequence.

        y = softmax(q k^T / sqrt(size)) v + q S_(c - 1) / sqrt(size),    S_c = g_c S_(c - 1) + k^T v

    where q, k and v are those of chunk c. It is causal over chunks, and the first one has softmax
    attention alone. The cost is linear in the number of chunks.

    Args:
        chunk: the number of tokens of a chunk, which divides the number of tokens.
        decay: g where none is given at the call, in (0, 1].

    Returns:
        A function like `dot_product_attention`, for `attention_fn` of the networks; its mask is of
        keys, [b, m] or [1, m]. It takes `log_decay=` too, the log g [b, chunks, heads] <= 0, such
        as the log-sigmoid of a linear map of each chunk's time and label, over 16.

    Raises:
        ValueError: chunk is below 1, or decay is not in (0, 1].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> q, v = jnp.ones((1, 4, 1, 1)), jnp.array([1.0, 3.0, 0.0, 0.0]).reshape(1, 4, 1, 1)
        >>> nets.hybrid_attention(chunk=2)(q, q, v).ravel()
        Array([2., 2., 4., 4.], dtype=float32)

    References:
        Hui, Zhu, Yang, Zhang, Wang, Zhou, Eshraghian, Xie, *ARFlow: Autoregressive Flow with Hybrid
            Linear Attention*, 2025, arXiv:2501.16085. Norms and gates around it are the network's.
    """
    check_whole("hybrid_attention", chunk=chunk)
    if not 0 < decay <= 1:
        raise ValueError(f"hybrid_attention: expected decay in (0, 1], got {decay}")

    def attention(q, k, v, *, mask=None, log_decay=None):
        _need_square("hybrid_attention", q, k)
        (b, n, heads, size), given, dtype = q.shape, v.dtype, float_dtype(q)
        if n % chunk:
            raise ValueError(f"hybrid_attention: expected chunks of {chunk} tokens, got {n} tokens")
        seen = _keys_seen("hybrid_attention", mask, q, k)
        cut = lambda x: x.reshape(x.shape[0], -1, chunk, *x.shape[2:])  # noqa: E731
        seen = cut(jnp.broadcast_to(seen, (seen.shape[0], n, 1, 1)))
        q, k, v = (cut(x.astype(dtype)) for x in (q, k, v))
        q = q * size**-0.5
        if log_decay is None:
            log_decay = jnp.full_like(q, math.log(decay), shape=(b, n // chunk, heads))
        of_keys = jnp.moveaxis(seen, 2, 4)  # [b or 1, chunks, 1, 1, chunk]
        scores = jnp.einsum("bcqhd,bckhd->bchqk", q, k)
        weights = jax.nn.softmax(jnp.where(of_keys, scores, jnp.finfo(dtype).min))
        inside = jnp.einsum("bchqk,bckhd->bcqhd", jnp.where(of_keys, weights, 0), v)
        written = jnp.einsum("bckhd,bckhe->bchde", k * seen, v)

        def advance(state, inputs):
            log_decay, written = inputs
            return jnp.exp(log_decay)[..., None, None] * state + written, state

        zero = jnp.zeros_like(written[:, 0])
        parts = jnp.moveaxis(log_decay.astype(dtype), 1, 0), jnp.moveaxis(written, 1, 0)
        _, before = jax.lax.scan(advance, zero, parts)
        across = jnp.einsum("bcqhd,bchde->bcqhe", q, jnp.moveaxis(before, 0, 1))
        return (inside + across).reshape(b, n, heads, size).astype(given)

    return attention


def causal_product(q: Array, k: Array, v: Array, block: int, decay: float = 1.0) -> Array:
    """sum over j <= i of decay^(i - j) (q_i . k_j) v_j, of arrays [b, n, heads, size].

    Within a block the products are formed, across blocks the sum of k^T v is carried: linear in n.
    """
    b, n, heads, _ = q.shape
    block = min(block, n)
    extra = -n % block
    cut = lambda x: jnp.moveaxis(  # noqa: E731
        jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))).reshape(b, -1, block, heads, x.shape[-1]),
        1,
        0,
    )
    steps = jnp.arange(block)
    apart = jnp.asarray(steps[:, None] - steps[None], q.dtype)
    falling = jnp.where(apart >= 0, decay ** jnp.maximum(apart, 0), 0)[None, None]  # [.., i, j]
    since = jnp.asarray(decay ** (steps + 1.0), q.dtype)[None, :, None, None]
    until = jnp.asarray(decay ** (block - 1.0 - steps), q.dtype)[None, :, None, None]

    def advance(state, inputs):
        q, k, v = inputs
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * falling
        y = jnp.einsum("bhqk,bkhe->bqhe", scores, v)
        y = y + jnp.einsum("bqhd,bhde->bqhe", q * since, state)
        return decay**block * state + jnp.einsum("bkhd,bkhe->bhde", k * until, v), y

    zero = jnp.zeros_like(k, shape=(b, heads, k.shape[-1], v.shape[-1]))
    _, y = jax.lax.scan(advance, zero, (cut(q), cut(k), cut(v)))
    return jnp.moveaxis(y, 0, 1).reshape(b, n + extra, heads, -1)[:, :n]


def _read(q: Array, k: Array, v: Array) -> Array:
    """q (k^T v), of arrays [b, n, heads, size]."""
    return jnp.einsum("bqhd,bhde->bqhe", q, jnp.einsum("bkhd,bkhe->bhde", k, v))


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=-1, keepdims=True)


def _layer_norm(x: Array) -> Array:
    x = centered(x)
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)


def _count(seen: Array, k: Array) -> Array:
    """How many keys are seen, at least 1, [b or 1, 1, 1, 1]."""
    seen = jnp.broadcast_to(seen, (seen.shape[0], k.shape[1], 1, 1))
    return jnp.maximum(jnp.sum(seen, axis=1, keepdims=True), 1)


def _keys_seen(name: str, mask: Array | None, q: Array, k: Array) -> Array:
    """The mask as [b or 1, m, 1, 1], or [1, 1, 1, 1] where all keys are seen."""
    if mask is None:
        return jnp.ones((1, 1, 1, 1), bool)
    b, m = q.shape[0], k.shape[1]
    if mask.dtype != bool or mask.shape not in ((b, m), (1, m)):
        raise ValueError(
            f"{name}: expected a bool mask [{b}, {m}] or [1, {m}], got {mask.dtype} of shape"
            f" {list(mask.shape)}"
        )
    return mask[..., None, None]


def _tokens_seen(name: str, mask: Array | None, q: Array, k: Array) -> Array:
    """The same where what is masked is neither a query nor a key."""
    if mask is not None:
        _need_square(name, q, k)
    return _keys_seen(name, mask, q, k)


def _need_square(name: str, q: Array, k: Array) -> None:
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"{name}: expected as many queries as keys, got {q.shape[1]} and {k.shape[1]}"
        )
