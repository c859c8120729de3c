"""A causal network of tokens that come after a text, and what can be read off it."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jflow._core.checks import check_cond, check_whole, like_rows
from jflow._core.linen import check_linen
from jflow.nets._attention import per_token
from jflow.types import Array, Cond

__all__ = ["Contrasted", "OfText", "WithText", "embed_symbols"]


class WithText(nn.Module):
    """A causal network of tokens that come after a text, both in one sequence.

    `module(x [b, n, d], cond=text [b, length]) -> h [b, n, k]`, where h_i depends on the text and
    on the tokens before i. The symbols have a table and the tokens a linear map, both to `width`
    numbers, and the network sees the sequence of length + n of them. `OfText` is its other half,
    the law of the text. A shorter text is padded by a symbol of its own, which then ends it.

    Values cannot be seen while tracing: the h of a row with a symbol outside of the vocabulary are
    NaN, and so is what is made of them.

    Attributes:
        net: a causal network, `net(x [b, m, width]) -> [b, m, k]`, such as `CausalTransformer(
            features=k)`; a cache serves it where it has one.
        vocabulary: the number of symbols.
        length: the number of symbols of a text.
        width: the count of numbers of a symbol, and of a token, where the network meets them.

    Raises:
        TypeError: net is not a Linen module.
        ValueError: a size is below 1; or at the call, cond is not integers [b, length].

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.WithText(nets.CausalLSTM(features=3, width=4), 5, length=2, width=4)
        >>> x, text = jnp.zeros((1, 4, 2)), jnp.array([[0, 4]])
        >>> run = lambda key: net.init_with_output(key, x, text)[0]
        >>> jax.eval_shape(run, jax.random.key(0)).shape
        (1, 4, 3)

    References:
        Tschannen, Pinto, Kolesnikov, *JetFormer: An Autoregressive Generative Model of Raw Images
            and Text*, 2024, arXiv:2411.19722.
    """

    net: nn.Module
    vocabulary: int
    length: int
    width: int = 64

    def __post_init__(self):
        check_linen("WithText", "net", self.net)
        sizes = {"vocabulary": self.vocabulary, "length": self.length, "width": self.width}
        check_whole("WithText", **sizes)
        super().__post_init__()

    def setup(self):
        self.symbols = nn.Embed(
            self.vocabulary, self.width, embedding_init=nn.initializers.normal(1.0)
        )
        self.tokens = nn.Dense(self.width)

    def __call__(self, x: Array, cond: Cond = None, cache=None, first=0):
        """One parallel pass, or some slots with a cache.

        Args:
            x: the tokens, [b, n, d]; with a cache the tokens before the slots.
            cond: the text, integers [b, length].
            cache: None, or a cache from `empty_cache`.
            first: the first slot, with a cache.

        Returns:
            [b, n, k]; with a cache ([b, m, k] of those slots, cache).
        """
        text = embed_symbols(
            "WithText", self.symbols, check_cond("WithText", cond, x.shape[0]), self.length
        )
        tokens = per_token(self.tokens, x)
        text = text.astype(tokens.dtype)
        if cache is None:
            return self.net(jnp.concatenate([text, tokens], axis=1))[:, self.length :]

        def read(module, cache):  # the slots of the text, each of which sees the symbol before
            return module.net(jnp.roll(text, 1, axis=1), None, cache=cache, first=0)[1]

        cache = nn.cond(jnp.equal(first, 0), read, lambda module, cache: cache, self, cache)
        slots = first + jnp.arange(x.shape[1])
        before = jnp.where((slots == 0)[None, :, None], text[:, -1:], tokens)
        return self.net(before, None, cache=cache, first=first + self.length)

    def text(self, text: Array) -> Array:
        """What the network says of each symbol of a text from those before it.

        Args:
            text: whole numbers [b, m].

        Returns:
            h [b, m, k].
        """
        text = text.astype(jnp.int32)
        return self.net(embed_symbols("WithText", self.symbols, text, text.shape[1]))

    def empty_cache(self, x: Array, rows: int):
        """A cache that holds no slot yet.

        Args:
            x: an event of the right size, [b, n, d], whose values are not read.
            rows: how many rows the cache is for.

        Returns:
            The empty cache of the network, None where it has none.
        """
        if not hasattr(self.net, "empty_cache"):
            return None
        like = jnp.zeros_like(x, shape=(1, self.length + x.shape[1], self.width))
        return self.net.empty_cache(like, rows)


class OfText(nn.Module):
    """The causal network of the text of a `WithText`, with its params.

    `module(text [b, m]) -> h [b, m, k]`. With it `distributions.causal(OfText(net),
    distributions.categorical(K))` is the law of the text, and what `WithText` is in the law of the
    tokens after it: log p(text) + log p(tokens | text) is the joint one.

    Attributes:
        whole: the network of both.

    Raises:
        TypeError: whole is not a `WithText`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.WithText(nets.CausalLSTM(features=3, width=4), 5, length=2, width=4)
        >>> text = jnp.array([[0, 4]])
        >>> params = net.init(jax.random.key(0), jnp.zeros((1, 4, 2)), text)
        >>> nets.OfText(net).apply(params, text).shape
        (1, 2, 3)
    """

    whole: WithText

    def __post_init__(self):
        if not isinstance(self.whole, WithText):
            raise TypeError(
                f"OfText: expected whole to be a WithText, got {type(self.whole).__name__}"
            )
        super().__post_init__()

    def setup(self):
        nn.share_scope(self, self.whole)

    def __call__(self, x: Array, cond: Cond = None) -> Array:
        """One parallel pass.

        Args:
            x: the text, integers [b, m].
            cond: None.

        Returns:
            h [b, m, k].
        """
        if cond is not None:
            raise ValueError("OfText: expected no cond, got one")
        return self.whole.text(x)


class Contrasted(nn.Module):
    """A causal network that sees its condition and none, for guidance: h given cond, h given null.

    `module(x [b, n, d], cond) -> [b, n, 2 k]` with the params of the network, in one pass over 2 b
    rows. `distributions.contrasted` reads both halves.

    Attributes:
        network: a causal network with k numbers a slot; a cache serves it where it has one.
        null: one row of cond without the batch axis, that of `losses.drop_cond`.

    Raises:
        TypeError: network is not a Linen module.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.WithText(nets.CausalLSTM(features=3, width=4), 5, length=2, width=4)
        >>> x, text = jnp.zeros((1, 4, 2)), jnp.array([[0, 4]])
        >>> params = net.init(jax.random.key(0), x, text)
        >>> nets.Contrasted(net, (4, 4)).apply(params, x, text).shape
        (1, 4, 6)
    """

    network: nn.Module
    null: Any

    def __post_init__(self):
        check_linen("Contrasted", "network", self.network)
        super().__post_init__()

    def setup(self):
        nn.share_scope(self, self.network)

    def __call__(self, x: Array, cond: Cond = None, cache=None, first=0):
        """One parallel pass, or some slots with a cache.

        Args:
            x: the tokens, [b, n, d]; with a cache the tokens before the slots.
            cond: as the network takes it.
            cache: None, or a cache from `empty_cache`.
            first: the first slot, with a cache.

        Returns:
            [b, n, 2 k]; with a cache ([b, m, 2 k] of those slots, cache).
        """
        cond = jnp.asarray(check_cond("Contrasted", cond, x.shape[0]))
        null = like_rows("Contrasted", np.asarray(self.null), cond)
        x, cond = jnp.concatenate([x, x]), jnp.concatenate([cond, null])
        if cache is None:
            return jnp.concatenate(jnp.split(self.network(x, cond), 2), axis=-1)
        h, cache = self.network(x, cond, cache=cache, first=first)
        return jnp.concatenate(jnp.split(h, 2), axis=-1), cache

    def empty_cache(self, x: Array, rows: int):
        """A cache that holds no slot yet.

        Args:
            x: an event of the right size, [b, n, d], whose values are not read.
            rows: how many rows the cache is for.

        Returns:
            The empty cache of the network for twice the rows, None where it has none.
        """
        return (
            self.network.empty_cache(x, 2 * rows) if hasattr(self.network, "empty_cache") else None
        )


def embed_symbols(name: str, table: nn.Embed, text: Cond, length: int) -> Array:
    """The rows [b, length, width] of a table, NaN for a symbol that is not in it."""
    shape, dtype = tuple(getattr(text, "shape", ())), getattr(text, "dtype", None)
    integers = dtype is not None and jnp.issubdtype(dtype, jnp.integer)
    if shape[1:] != (length,) or not integers:
        given = type(text).__name__ if dtype is None else f"{dtype} {list(shape)}"
        raise ValueError(f"{name}: expected a text, integers [b, {length}], got {given}")
    inside = (text >= 0) & (text < table.num_embeddings)
    rows = table(jnp.where(inside, text, jnp.zeros_like(text)))
    return jnp.where(inside[..., None], rows, jnp.nan)
