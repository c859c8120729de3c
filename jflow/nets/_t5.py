"""The encoder of T5."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_whole
from jflow.nets._attention import per_token
from jflow.nets._clip import TextFeatures, check_ids
from jflow.nets._scanned import scanned
from jflow.types import Array

_lecun = nn.initializers.lecun_normal()


class T5Encoder(nn.Module):
    """The encoder of T5 v1.1: a transformer over the ids of a prompt's tokens that sees them all.

    `module(ids [b, n], mask=None) -> TextFeatures`, without `pooled`. Blocks are pre-norm, with RMS
    norms and no biases; scores are q . k, not divided by sqrt(head_width), plus a number for each
    head and bucket of distances, which all blocks share; the MLP is gelu(x W) * (x V), with the
    GELU of tanh. The defaults are the sizes of T5-XXL. Ids beyond the vocabulary cannot be seen
    while tracing: the features come out NaN.

    Attributes:
        vocab_size: the number of ids.
        width: of the tokens.
        num_layers: the number of blocks.
        num_heads: the number of attention heads.
        head_width: of an attention head; num_heads * head_width need not be the width.
        mlp_width: the hidden width of the MLP of a block.
        num_buckets: how many distances are told apart, half of them to either side; half of these
            are single distances, the others grow geometrically.
        max_distance: from which on all distances are one.
        epsilon: of the norms.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the params. float16 overflows in T5-XXL.

    Raises:
        ValueError: a size is below 1, or num_buckets is not a multiple of 4, or max_distance is not
            above a quarter of it.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.T5Encoder(
        ...     vocab_size=9, width=8, num_layers=1, num_heads=2, head_width=3, mlp_width=16
        ... )
        >>> ids = jnp.zeros((2, 5), jnp.int32)
        >>> out = jax.eval_shape(lambda key: net.init_with_output(key, ids)[0], jax.random.key(0))
        >>> out.tokens.shape, out.pooled
        ((2, 5, 8), None)

    References:
        Raffel et al., *Exploring the Limits of Transfer Learning with a Unified Text-to-Text
            Transformer*, 2019, arXiv:1910.10683.
        Shazeer, *GLU Variants Improve Transformer*, 2020, arXiv:2002.05202, for the gated MLP.
    """

    vocab_size: int = 32128
    width: int = 4096
    num_layers: int = 24
    num_heads: int = 64
    head_width: int = 64
    mlp_width: int = 10240
    num_buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
    dtype: Any = None

    def __post_init__(self):
        check_whole(
            "T5Encoder",
            vocab_size=self.vocab_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            head_width=self.head_width,
        )
        if self.num_buckets % 4 or not self.max_distance > self.num_buckets // 4 > 0:
            raise ValueError(
                "T5Encoder: expected num_buckets to be a multiple of 4 and max_distance above a "
                f"quarter of it, got num_buckets={self.num_buckets} and "
                f"max_distance={self.max_distance}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"] | None = None
    ) -> TextFeatures:
        """Encode prompts.

        Args:
            ids: of the tokens, [b, n].
            mask: the tokens that are seen, bool [b, n], which padding is not. None: all, as SD3 and
                Flux do it.

        Returns:
            The features, without `pooled`.

        Raises:
            ValueError: ids are not integers [b, n], or the mask is not bool of their shape.
        """
        check_ids("T5Encoder", ids)
        if mask is not None and (mask.shape != ids.shape or mask.dtype != bool):
            raise ValueError(
                f"T5Encoder: expected a bool mask of shape {list(ids.shape)}, as the ids, got "
                f"{mask.dtype} of shape {list(mask.shape)}"
            )
        n = ids.shape[1]
        h = nn.Embed(
            self.vocab_size,
            self.width,
            embedding_init=nn.initializers.normal(1.0),
            dtype=self.dtype,
            name="embed",
        )(ids)
        table = self.param(
            "distances",
            nn.initializers.normal(self.width**-0.5),
            (self.num_buckets, self.num_heads),
        )
        where = buckets(n, self.num_buckets, self.max_distance)
        bias = table.astype(float_dtype(h))[where].transpose(2, 0, 1)[None]  # [1, heads, n, n]
        if mask is not None:
            bias = jnp.where(mask[:, None, None], bias, jnp.finfo(bias.dtype).min)
        blocks = scanned(T5Block, self.num_layers)
        options = (self.num_heads, self.head_width, self.mlp_width, self.epsilon, self.dtype)
        (h, before), _ = blocks(*options, name="blocks")((h, h), bias)
        return TextFeatures(_norm(self.epsilon, self.dtype, "norm")(h), before)


class T5Block(nn.Module):
    """Pre-norm attention and MLP on h [b, n, width]; the carry keeps what it was given."""

    num_heads: int
    head_width: int
    mlp_width: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], bias: Array):
        given, _ = carry
        b, n, width = given.shape

        def linear(size: int, name: str, x: Array, init=_lecun) -> Array:
            of = nn.Dense(size, use_bias=False, kernel_init=init, dtype=self.dtype, name=name)
            return per_token(of, x)

        inner = self.num_heads * self.head_width
        y = _norm(self.epsilon, self.dtype, "norm_attention")(given)
        qkv = linear(3 * inner, "qkv", y, _qkv_init(self.head_width))
        q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, self.num_heads, self.head_width), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=bias.dtype) + bias
        weights = jax.nn.softmax(scores).astype(v.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, n, inner)
        h = given + linear(width, "out", y)
        y = _norm(self.epsilon, self.dtype, "norm_mlp")(h)
        gate, y = jnp.split(linear(2 * self.mlp_width, "mlp_in", y), 2, -1)
        y = jax.nn.gelu(gate, approximate=True) * y
        return (h + linear(width, "mlp_out", y), given), None


def buckets(n: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket [n, n] of the distance from each query to each key: keys behind the query in the
    second half; in each half the distances 0 to half of it, then ever longer stretches of them."""
    distance = np.arange(n)[None] - np.arange(n)[:, None]
    side = num_buckets // 2
    exact = side // 2
    far = np.maximum(np.abs(distance), exact).astype(np.float32) / exact  # as published, float32
    grown = np.log(far) / np.float32(math.log(max_distance / exact)) * np.float32(side - exact)
    grown = np.minimum(exact + grown.astype(np.int32), side - 1)
    near = np.where(np.abs(distance) < exact, np.abs(distance), grown)
    return near + side * (distance > 0)


def _norm(epsilon: float, dtype, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=epsilon, dtype=dtype, name=name)


def _qkv_init(head_width: int):
    """Queries begin smaller by sqrt(head_width), in place of scores that are divided by it."""

    def init(key, shape, dtype=jnp.float32):
        kernel = _lecun(key, shape, dtype)
        inner = shape[-1] // 3
        return kernel.at[..., :inner].multiply(head_width**-0.5)

    return init
