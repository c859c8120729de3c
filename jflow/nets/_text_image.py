"""One transformer over a text and the tokens of an image: symbols in order, tokens that flow."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jflow._core.checks import check_cond, check_whole
from jflow.nets._attention import dot_product_attention, per_token
from jflow.nets._dit import transformed
from jflow.nets._embed import TimeCondEmbed, check_time
from jflow.nets._vit import check_width
from jflow.nets._with_text import embed_symbols
from jflow.types import Array, Cond, Condition

__all__ = ["ImageToText", "TextImageTransformer", "TextToImage"]


class TextImageTransformer(nn.Module):
    """One transformer over a text and the tokens of an image, in either order.

    `module(text [b, m], image [b, n, d], t [b], text_first) -> (h [b, m + 1, width], velocity [b,
    n, d])`. The sequence is a start, the symbols of the text, and the tokens of the image, with
    learned positions. Slot i of the text sees the start and the symbols before i, so that h_i
    says what comes next; the tokens of the image see one another. What comes first is seen by what
    comes second: where the text is first, the image sees all of it, and the text is as it would be
    alone; where the image is first, it is the other way round. The blocks are those of `DiT`, with
    time t at the tokens of the image and 1 at the text.

    `TextToImage` and `ImageToText` are its two uses, with the same params: a velocity of images
    given a text, which `losses.flow_matching` trains, and the causal network of a text given an
    image, for `distributions.causal` and cross-entropy.

    Attributes:
        vocabulary: the number of symbols.
        length: the number of symbols of a whole text; padding is a symbol of its own.
        width: of the tokens.
        num_layers: the number of blocks.
        num_heads: the number of attention heads, which divides the width.
        mlp_ratio: the hidden width of the MLP of a block, in widths.
        time_scale: the largest angular frequency of the features of time, in radians per unit of t.
        dropout: the rate; a key, or a 'dropout' stream, switches it on.
        remat: whether each block is computed again in the backward pass, which saves memory.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
        attention_fn: a function `attention_fn(q, k, v, mask=[1, 1, n, n])`.

    Raises:
        ValueError: num_heads does not divide the width, or a size is below 1; or at the call, for
            shapes that do not fit.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.TextImageTransformer(5, length=3, width=8, num_layers=1, num_heads=1)
        >>> text, image = jnp.zeros((1, 3), int), jnp.ones((1, 4, 2))
        >>> run = lambda key: net.init_with_output(key, text, image, jnp.zeros(1), True)[0]
        >>> h, velocity = jax.eval_shape(run, jax.random.key(0))
        >>> h.shape, velocity.shape
        ((1, 4, 8), (1, 4, 2))

    References:
        Ma, Liu, Chen, et al., *JanusFlow: Harmonizing Autoregression and Rectified Flow for Unified
            Multimodal Understanding and Generation*, 2024, arXiv:2411.07975. Its encoders, and its
            time as a token, are not here: time modulates the blocks.
        Xie, Yang, Shou, *Show-o2: Improved Native Unified Multimodal Models*, 2025,
            arXiv:2506.15564, for attention that is causal in the text and full in the image.
    """

    vocabulary: int
    length: int
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_ratio: int = 4
    time_scale: float = 100.0
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = None
    attention_fn: Callable[..., Array] = dot_product_attention

    def __post_init__(self):
        name = "TextImageTransformer"
        check_width(name, self.width, self.num_heads, self.num_layers)
        check_whole(name, vocabulary=self.vocabulary, length=self.length)
        super().__post_init__()

    @nn.compact
    def __call__(self, text: Array, image: Array, t: Array, text_first: bool):
        """One parallel pass.

        Args:
            text: integers [b, m], of at most `length` symbols.
            image: the tokens, [b, n, d].
            t: the times of the image, [b].
            text_first: whether the image sees the text, rather than the text the image.

        Returns:
            (h [b, m + 1, width], what is known of each next symbol; velocity [b, n, d]).
        """
        name = "TextImageTransformer"
        if image.ndim != 3 or text.shape[1] > self.length:
            raise ValueError(
                f"{name}: expected an image [b, n, d] and a text of at most {self.length} symbols,"
                f" got {list(image.shape)} and {list(text.shape)}"
            )
        check_time(name, image, t)
        (b, n, d), m = image.shape, text.shape[1] + 1
        table = nn.Embed(
            self.vocabulary, self.width, embedding_init=nn.initializers.normal(1.0), name="symbols"
        )
        h = per_token(nn.Dense(self.width, name="tokens"), image)
        symbols = embed_symbols(name, table, text, m - 1).astype(h.dtype)
        h = jnp.concatenate([jnp.zeros_like(h, shape=(b, 1, self.width)), symbols, h], axis=1)
        shape = (self.length + 1 + n, self.width)
        positions = self.param("positions", nn.initializers.normal(0.5), shape)
        rows = np.concatenate([np.arange(m), self.length + 1 + np.arange(n)])
        h = (h + positions[rows].astype(h.dtype)[None]).astype(self.dtype or h.dtype)

        at = jnp.concatenate(
            [jnp.ones_like(t, shape=(b, m)), jnp.broadcast_to(t[:, None], (b, n))], axis=1
        )
        embed = TimeCondEmbed(
            self.width, time_scale=self.time_scale, dtype=self.dtype, name="embed"
        )
        c = nn.silu(embed(at)).astype(h.dtype)
        attend = partial(self.attention_fn, mask=_seen(m, n, text_first))
        out = transformed(self, h, c, Condition(), self.width + d, lambda q, k, v: attend(q, k, v))
        return out[:, :m, : self.width], out[:, m:, self.width :].astype(image.dtype)


class TextToImage(nn.Module):
    """The velocity network of an image given a text, with the params of both directions.

    `module(x [b, n, d], t [b], cond=text [b, length]) -> velocity [b, n, d]`.

    Attributes:
        net: the network of both.

    Raises:
        TypeError: net is not a `TextImageTransformer`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jflow
        >>> from jflow import nets
        >>> net = nets.TextImageTransformer(5, length=3, width=8, num_layers=1, num_heads=1)
        >>> velocity = jflow.velocity(nets.TextToImage(net))
        >>> x, t, text = jnp.ones((2, 4, 3)), jnp.zeros(2), jnp.zeros((2, 3), int)
        >>> params = jax.eval_shape(velocity.init, jax.random.key(0), x, t, text)
        >>> jax.eval_shape(velocity.apply, params, x, t, text).shape
        (2, 4, 3)
    """

    net: TextImageTransformer

    def __post_init__(self):
        _check_net("TextToImage", self.net)
        super().__post_init__()

    def setup(self):
        nn.share_scope(self, self.net)

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        """Predict the velocity.

        Args:
            x: the tokens of the image, [b, n, d].
            t: the times, [b].
            cond: the text, integers [b, length].

        Returns:
            The velocity, [b, n, d].
        """
        text = check_cond("TextToImage", cond, x.shape[0])
        shape = getattr(text, "shape", None)
        if shape is None or len(shape) != 2 or shape[1] != self.net.length:
            raise ValueError(
                f"TextToImage: expected cond to be a text, integers [b, {self.net.length}], got"
                f" {None if shape is None else list(shape)}"
            )
        return self.net(text, x, t, True)[1]


class ImageToText(nn.Module):
    """The causal network of a text given an image, with the params of both directions.

    `module(text [b, m], cond=image [b, n, d]) -> h [b, m, width]`, where h_i depends on the image
    and on the symbols before i. `distributions.causal(ImageToText(net),
    distributions.categorical(K))` is the law of the text.

    Attributes:
        net: the network of both.

    Raises:
        TypeError: net is not a `TextImageTransformer`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, nets
        >>> net = nets.TextImageTransformer(5, length=3, width=8, num_layers=1, num_heads=1)
        >>> law = distributions.causal(nets.ImageToText(net), distributions.categorical(5), (3,))
        >>> text, image = jnp.zeros((2, 3), int), jnp.ones((2, 4, 3))
        >>> log_prob = law.log_prob(law.init(jax.random.key(0), text, image), text, image)
        >>> round(float(log_prob[0]), 3)  # -3 log 5, before training
        -4.828
    """

    net: TextImageTransformer

    def __post_init__(self):
        _check_net("ImageToText", self.net)
        super().__post_init__()

    def setup(self):
        nn.share_scope(self, self.net)

    def __call__(self, x: Array, cond: Cond = None) -> Array:
        """One parallel pass.

        Args:
            x: the text, whole numbers [b, m].
            cond: the tokens of the image, [b, n, d].

        Returns:
            h [b, m, width].
        """
        image = check_cond("ImageToText", cond, x.shape[0])
        shape = getattr(image, "shape", None)
        if shape is None or len(shape) != 3:
            raise ValueError(
                "ImageToText: expected cond to be the tokens of an image, [b, n, d], got"
                f" {None if shape is None else list(shape)}"
            )
        image = jnp.asarray(image)
        text = x.astype(jnp.int32)
        h, _ = self.net(text, image, jnp.ones_like(image, shape=image.shape[:1]), False)
        return h[:, :-1]


def _check_net(name: str, net: Any) -> None:
    if not isinstance(net, TextImageTransformer):
        raise TypeError(
            f"{name}: expected net to be a TextImageTransformer, got {type(net).__name__}"
        )


def _seen(m: int, n: int, text_first: bool) -> Array:
    """Which of m slots of text and n of the image each of them sees, [1, 1, m + n, m + n]."""
    seen = np.ones((m + n, m + n), bool)
    seen[:m, :m] = np.tri(m, dtype=bool)
    seen[:m, m:] = not text_first
    seen[m:, :m] = text_first
    return jnp.asarray(seen[None, None])
