"""The text encoder of CLIP."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jflow._core.checks import check_whole
from jflow.nets._attention import SelfAttention, dot_product_attention, per_token
from jflow.nets._scanned import scanned
from jflow.nets._vit import check_width
from jflow.types import Array

_token_init, _position_init = nn.initializers.normal(0.02), nn.initializers.normal(0.01)


class TextFeatures(NamedTuple):
    """What a text encoder makes of prompts.

    Attributes:
        tokens: of the last layer, after the final norm, [b, n, k].
        penultimate: the tokens of the layer before the last one, without a norm, [b, n, k].
        pooled: one vector a prompt, [b, k], or None from an encoder that has none.
    """

    tokens: Array
    penultimate: Array
    pooled: Array | None = None


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The GELU of CLIP-L, x sigmoid(1.702 x), which differs from the exact one by up to 0.02.

    Args:
        x: numbers of any shape.

    Returns:
        An array of the same shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> round(float(nets.quick_gelu(jnp.array(1.0))), 4)
        0.8458

    References:
        Hendrycks, Gimpel, *Gaussian Error Linear Units (GELUs)*, 2016, arXiv:1606.08415.
    """
    return x * jax.nn.sigmoid(1.702 * x)


class CLIPText(nn.Module):
    """The text encoder of CLIP: a causal transformer over the ids of a prompt's tokens.

    `module(ids [b, n]) -> TextFeatures`. The tokens go through pre-norm blocks and a final norm;
    `pooled` is the last layer's token at the first end token of a prompt. With causal attention it
    sees nothing of the padding behind it, so that there is no mask. The defaults are the sizes of
    CLIP-L. Ids beyond the vocabulary, and prompts without an end token, cannot be seen while
    tracing: their features, or pooled features, come out NaN.

    Attributes:
        vocab_size: the number of ids.
        max_length: the greatest number of tokens of a prompt.
        width: of the tokens.
        num_layers: the number of blocks.
        num_heads: the number of attention heads, which divides the width.
        mlp_width: the hidden width of the MLP of a block.
        activation: of the MLPs, `quick_gelu` in CLIP-L, the exact GELU in CLIP-G.
        end_id: the id of the end token; None: the greatest id of a prompt, as the end token is in
            the published vocabulary.
        projection: the width of a last linear map, without bias, of `pooled`; None: there is none.
        epsilon: of the norms.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the params.

    Raises:
        ValueError: num_heads does not divide the width, or a size is below 1.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.CLIPText(vocab_size=9, width=8, num_layers=1, num_heads=1, mlp_width=16)
        >>> ids = jnp.zeros((2, 5), jnp.int32)
        >>> out = jax.eval_shape(lambda key: net.init_with_output(key, ids)[0], jax.random.key(0))
        >>> out.tokens.shape, out.pooled.shape
        ((2, 5, 8), (2, 8))

    References:
        Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*,
            2021, arXiv:2103.00020.
    """

    vocab_size: int = 49408
    max_length: int = 77
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    activation: Callable[[Array], Array] = quick_gelu
    end_id: int | None = 49407
    projection: int | None = None
    epsilon: float = 1e-5
    dtype: Any = None

    def __post_init__(self):
        check_width("CLIPText", self.width, self.num_heads, self.num_layers)
        check_whole("CLIPText", vocab_size=self.vocab_size, max_length=self.max_length)
        super().__post_init__()

    @nn.compact
    def __call__(self, ids: Int[Array, "b n"]) -> TextFeatures:
        """Encode prompts.

        Args:
            ids: of the tokens, [b, n], with n at most max_length.

        Returns:
            The features; `pooled` is [b, width], or [b, projection].

        Raises:
            ValueError: ids are not integers [b, n], or there are too many.
        """
        check_ids("CLIPText", ids)
        n = ids.shape[1]
        if n > self.max_length:
            raise ValueError(
                f"CLIPText: expected at most {self.max_length} tokens, got ids of shape "
                f"{list(ids.shape)}"
            )
        positions = self.param("positions", _position_init, (self.max_length, self.width))
        h = nn.Embed(
            self.vocab_size,
            self.width,
            embedding_init=_token_init,
            dtype=self.dtype,
            name="embed",
        )(ids)
        h = h + positions[:n].astype(h.dtype)[None]
        blocks = scanned(CLIPBlock, self.num_layers)
        options = (self.num_heads, self.mlp_width, self.activation, self.epsilon, self.dtype)
        (h, before), _ = blocks(*options, name="blocks")((h, h), None)
        h = _norm(self.epsilon, self.dtype, "norm")(h)
        return TextFeatures(h, before, self._pooled(ids, h))

    def _pooled(self, ids: Array, h: Array) -> Array:
        is_end = ids == (ids.max(1, keepdims=True) if self.end_id is None else self.end_id)
        pooled = jnp.take_along_axis(h, is_end.argmax(1)[:, None, None], 1)[:, 0]
        pooled = jnp.where(is_end.any(1, keepdims=True), pooled, jnp.nan)
        if self.projection is None:
            return pooled
        return nn.Dense(self.projection, use_bias=False, dtype=self.dtype, name="projection")(
            pooled
        )


class CLIPBlock(nn.Module):
    """Pre-norm causal attention and MLP on h [b, n, width]; the carry keeps what it was given."""

    num_heads: int
    mlp_width: int
    activation: Callable[[Array], Array]
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], _) -> tuple[tuple[Array, Array], None]:
        given, _ = carry
        attention = SelfAttention(
            self.num_heads, dtype=self.dtype, attention_fn=_causal, name="attention"
        )
        h = given + attention(_norm(self.epsilon, self.dtype, "norm_attention")(given))
        y = _norm(self.epsilon, self.dtype, "norm_mlp")(h)
        y = per_token(nn.Dense(self.mlp_width, dtype=self.dtype, name="mlp_in"), y)
        leave = nn.Dense(h.shape[-1], dtype=self.dtype, name="mlp_out")
        return (h + per_token(leave, self.activation(y)), given), None


def check_ids(name: str, ids: Array) -> None:
    """Raise unless ids are integers [b, n]."""
    if jnp.ndim(ids) != 2 or not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
        raise ValueError(
            f"{name}: expected integer ids [b, n], got {jnp.result_type(ids)} of shape "
            f"{list(jnp.shape(ids))}"
        )


def _norm(epsilon: float, dtype, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def _causal(q: Array, k: Array, v: Array) -> Array:
    return dot_product_attention(q, k, v, mask=jnp.tri(q.shape[1], dtype=bool)[None, None])
