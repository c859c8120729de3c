"""Causal networks beside the transformer: an LSTM, and the preceding token beside what any gives.

Each has two forms that share params: a parallel call, and steps with a cache.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_whole
from jflow._core.linen import check_linen
from jflow.nets._attention import per_token
from jflow.nets._scanned import scanned
from jflow.nets._slots import check_tokens, enter, held, leave, preceding, read_slots
from jflow.types import Array, Cond, Condition


class CausalLSTM(nn.Module):
    """A stack of LSTMs over the tokens of a sequence, for `distributions.causal`.

    `module(x [b, n, d], cond=None) -> h [b, n, features]`, where h[:, i] depends on x[:, :i] and on
    cond. Slot i reads token i - 1, slot 0 a token of zeros. Sequences may have any length. The
    layers are scanned. Of cond the label and the vector are added to every token, `aligned` [b, n,
    k] to its own slot, and a slot before which stands padding (`valid`) leaves the state as it is.

    Attributes:
        features: how many numbers a slot gets, by a last linear map; None is the width, without
            one.
        width: of each LSTM.
        num_layers: the number of LSTMs.
        vocabulary: the number of symbols where the tokens are whole numbers, x [b, n]; None where
            they are vectors.
        num_classes: the number of classes where cond has integer labels [b]. Index num_classes is
            the null label, which cond=None then means too.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.

    Raises:
        ValueError: a size is below 1; or x has other axes, or cond parts that are not taken, at the
            call.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.CausalLSTM(features=4, width=8)
        >>> x = jnp.zeros((1, 5, 2))
        >>> h, variables = net.init_with_output(jax.random.key(0), x)
        >>> h.shape
        (1, 5, 4)

    References:
        Hochreiter, Schmidhuber, *Long Short-Term Memory*, Neural Computation 9, 1997.
        Henter, Alexanderson, Beskow, *MoGlow: Probabilistic and Controllable Motion Synthesis Using
            Normalising Flows*, 2020, arXiv:1905.06598, where one conditions a flow of frames.
    """

    features: int | None = None
    width: int = 128
    num_layers: int = 1
    vocabulary: int | None = None
    num_classes: int | None = None
    dtype: Any = None

    def __post_init__(self):
        sizes = {"features": self.features or 1, "vocabulary": self.vocabulary or 1}
        check_whole("CausalLSTM", width=self.width, num_layers=self.num_layers, **sizes)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, cond: Cond = None, cache=None, first=0):
        """One parallel pass, or some slots with a cache.

        Args:
            x: the tokens, [b, n, d], or [b, n] of a vocabulary. With a cache: the m tokens *before*
                the slots first .. first + m - 1, where what stands before slot 0 is not read.
            cond: None, labels [b], floats [b, ...], a pytree of them, or the label, the vector, the
                aligned vectors [b, n, k] and the valid tokens [b, n] of a `types.Condition`.
            cache: None, or a cache from `empty_cache`, after all earlier slots.
            first: the first slot, with a cache.

        Returns:
            h [b, n, features]; with a cache (h [b, m, features] of those slots, cache).
        """
        b, m = check_tokens(self, x)
        cond, parts = _read(self, x, cond, m, cache)
        slots = first + jnp.arange(m)
        h = enter(self, x, cond, parts, slots, cache, first)
        counts = held(parts.valid)
        keeps = None if counts is None else jnp.take(counts, slots, axis=1, mode="clip")
        state = self.empty_cache(h, b) if cache is None else cache
        layers = scanned(LSTMLayer, self.num_layers, in_axes=(0, nn.broadcast))
        h, state = layers(self.width, self.dtype, name="layers")(h, state, keeps)
        h = h.astype(float_dtype(h))
        if self.features is not None:  # in the params' precision
            h = per_token(nn.Dense(self.features, name="head"), h)
        h = leave(h, parts.valid, first)
        return h if cache is None else (h, state)

    def empty_cache(self, x: Array, rows: int) -> tuple[Array, Array]:
        """The state before the first slot.

        Args:
            x: an array whose type is that of the state, unless `dtype` is.
            rows: how many rows the cache is for.

        Returns:
            Cells and outputs, each [layers, rows, width], of zeros.
        """
        shape, dtype = (self.num_layers, rows, self.width), self.dtype or float_dtype(x)
        return jnp.zeros_like(x, shape=shape, dtype=dtype), jnp.zeros_like(
            x, shape=shape, dtype=dtype
        )


class LSTMLayer(nn.Module):
    """An LSTM along h [b, m, width], from the state (cell, output) [b, width] of a cache.

    Where `keeps` [b, m] is not true the state stays as it was.
    """

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, h: Array, state: tuple[Array, Array], keeps: Array | None):
        def step(cell, state, inputs):
            y, keep = inputs
            new, _ = cell(state, y)
            out = new[1]
            if keep is not None:
                new = tuple(jnp.where(keep[:, None], a, b) for a, b in zip(new, state, strict=True))
            return tuple(a.astype(b.dtype) for a, b in zip(new, state, strict=True)), out

        along = partial(
            nn.scan,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        cell = nn.OptimizedLSTMCell(self.width, dtype=self.dtype, name="cell")
        state, y = along(step)(cell, state, (h, keeps))
        return y.astype(h.dtype), state


class WithPrevious(nn.Module):
    """A causal network whose slots hold the preceding token in front: (x_{i-1}, h_i).

    `module(x [b, n, d], cond=None) -> [b, n, d + k]` for a network with k numbers a slot; zeros
    stand before the first token, and where the preceding token is padding. A law that begins at
    the preceding token reads it there (`distributions.around_previous`).

    Attributes:
        net: a causal network, such as `CausalTransformer` or `CausalLSTM`; a cache serves it where
            it has one.

    Raises:
        TypeError: net is not a Linen module.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.WithPrevious(nets.CausalLSTM(features=1, width=4))
        >>> x = jnp.array([[[5.0], [6.0], [7.0]]])
        >>> h, variables = net.init_with_output(jax.random.key(0), x)
        >>> h[0, :, 0].tolist()
        [0.0, 5.0, 6.0]
    """

    net: nn.Module

    def __post_init__(self):
        check_linen("WithPrevious", "net", self.net)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, cond: Cond = None, cache=None, first=0):
        """One parallel pass, or some slots with a cache.

        Args:
            x: the tokens, [b, n, d]; with a cache the tokens before the slots.
            cond: as the network takes it.
            cache: None, or a cache from `empty_cache`.
            first: the first slot, with a cache.

        Returns:
            [b, n, d + k]; with a cache ([b, m, d + k] of those slots, cache).
        """
        valid = cond.valid if isinstance(cond, Condition) else None
        before = preceding(x, first + jnp.arange(x.shape[1]), cache is None, held(valid))
        if cache is None:
            h = self.net(x, cond)
        else:
            h, cache = self.net(x, cond, cache=cache, first=first)
        h = leave(jnp.concatenate([before.astype(h.dtype), h], axis=-1), valid, first)
        return h if cache is None else (h, cache)

    def empty_cache(self, x: Array, rows: int):
        """A cache that holds no slot yet.

        Args:
            x: an event of the right size, [b, n, d], whose values are not read.
            rows: how many rows the cache is for.

        Returns:
            The empty cache of the network, None where it has none.
        """
        return self.net.empty_cache(x, rows) if hasattr(self.net, "empty_cache") else None


def _read(module, x: Array, cond: Cond, m: int, cache) -> tuple[Cond, Condition]:
    """cond, whose parts are checked against the whole length: that of what is given along it."""
    n = m
    if cache is not None and isinstance(cond, Condition):
        lengths = [part.shape[1] for part in (cond.aligned, cond.valid) if part is not None]
        n = lengths[0] if lengths else m
    return read_slots(type(module).__name__, x, cond, n, ("label", "vector", "aligned", "valid"))
