"""A causal transformer over tokens, in two forms that share params.

One is a parallel pass, the other takes steps with a cache of keys.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_whole
from jflow.nets._attention import per_token
from jflow.nets._dit import CrossAttention
from jflow.nets._embed import need_part
from jflow.nets._mmdit import rotated
from jflow.nets._normalization import LayerNorm, Norm, Norms, joined, normed, placed
from jflow.nets._scanned import scanned
from jflow.nets._slots import check_tokens, enter, held, leave, read_slots
from jflow.nets._vit import check_width, mlp
from jflow.types import Array, Cond

_PARTS = ("label", "vector", "aligned", "context", "mask", "valid")
_normal = nn.initializers.normal(0.02)


class CausalTransformer(nn.Module):
    """A causal transformer: raw numbers for each token from the tokens before it, zero at first.

    `module(x [b, n, d], cond=None) -> raw [b, n, d * size]`, where raw[:, i] depends on x[:, :i].
    Slot i reads token i - 1, and slot 0 a token of zeros, so that its numbers depend on cond alone.
    Pre-norm blocks, scanned over the layers, with learned positions [n, width] for sequences of at
    most the length at init, or rotary ones for any. Softmax and head are in float32 or better
    whatever `dtype` is.

    Of a `types.Condition` the label and the vector (`CondEmbed`) are added to every token,
    `aligned` [b, n, k] to its own slot, the context is read by a cross-attention behind the
    attention of each block, and tokens that are not `valid` are not attended to. The weights that
    read `aligned` and the context start at zero.

    Attributes:
        size: the count of raw numbers for each number of x, where `features` is None.
        width: of the tokens inside.
        num_layers: the number of blocks.
        num_heads: the number of attention heads, which divides the width.
        mlp_ratio: the hidden width of the MLP of a block, in widths.
        num_classes: the number of classes where cond has integer labels [b]. Index num_classes is
            the null label, which cond=None then means too.
        remat: whether each block is computed again in the backward pass, which saves memory.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.
        features: how many numbers a slot gets, whatever the size of a token; None is `size` for
            each number of x.
        vocabulary: the number of symbols where the tokens are whole numbers, x [b, n], which needs
            `features`; None where they are vectors.
        rotary_period: the ratio that the frequencies of rotary positions fall by, such as 10,000,
            which turn queries and keys in the place of learned positions; None is learned ones.
        norm: a function that makes the normalizations, such as `RMSNorm`, or a `Norms`, which says
            where they stand, such as `peri_norm()`; of each token by itself.

    Raises:
        ValueError: num_heads does not divide the width, a size is below 1, the heads are of an odd
            size under rotary positions, there is a vocabulary without features, or the norm takes
            means over a batch.
        TypeError: norm is no function that makes a module, and no `Norms`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.CausalTransformer(size=2, width=8, num_layers=1, num_heads=1)
        >>> x = jnp.zeros((1, 4, 3))
        >>> jax.eval_shape(lambda key: net.init_with_output(key, x)[0], jax.random.key(0)).shape
        (1, 4, 6)

    References:
        Zhai et al., *Normalizing Flows are Capable Generative Models*, 2024, arXiv:2412.06329,
            whose blocks leave token 0 as it is.
        Su et al., *RoFormer: Enhanced Transformer with Rotary Position Embedding*, 2021,
            arXiv:2104.09864.
    """

    size: int = 2
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    mlp_ratio: int = 4
    num_classes: int | None = None
    remat: bool = False
    dtype: Any = None
    features: int | None = None
    vocabulary: int | None = None
    rotary_period: float | None = None
    norm: Norm | Norms = LayerNorm

    def __post_init__(self):
        name = "CausalTransformer"
        check_width(name, self.width, self.num_heads, self.num_layers)
        placed(name, self.norm, per_token=True)
        check_whole(name, features=self.features or 1, vocabulary=self.vocabulary or 1)
        if self.vocabulary is not None and self.features is None:
            raise ValueError(f"{name}: expected features beside a vocabulary, got features=None")
        if self.rotary_period is not None:
            if not self.rotary_period > 1 or self.width // self.num_heads % 2:
                raise ValueError(
                    f"{name}: expected rotary_period > 1 and an even width / num_heads, got"
                    f" {self.rotary_period} and {self.width // self.num_heads}"
                )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Array, cond: Cond = None, temperature: Array | None = None, cache=None, first=0
    ):
        """One parallel pass, or some slots with a cache.

        Args:
            x: the tokens, [b, n, d], or [b, n] of a vocabulary. With a cache: the m tokens *before*
                the slots first .. first + m - 1, [b, m, d], where what stands before slot 0 counts
                as zeros.
            cond: None, integer labels [b], floats [b, ...], a pytree of them, or a
                `types.Condition`.
            temperature: what the attention scores of each row are divided by, [b]; None is 1.
            cache: None, or keys and values from `empty_cache`, which hold those of all earlier
                slots.
            first: the first slot, with a cache.

        Returns:
            raw [b, n, d * size], or [b, n, features]; with a cache (raw [b, m, ...] of those slots,
            cache).
        """
        _, m = check_tokens(self, x)
        n = m if cache is None else cache[0].shape[2]
        slots = first + jnp.arange(m)
        cond, parts = read_slots("CausalTransformer", x, cond, n, _PARTS)
        h = enter(self, x, cond, parts, slots, cache, first)
        if parts.context is None:
            blocks_made = self.variables.get("params", {}).get("blocks", {})
            need_part(self, "context", "context", blocks_made)
        turns = None
        if self.rotary_period is None:
            h = h + jnp.take(self._positions(n), slots, axis=0, mode="clip").astype(h.dtype)[None]
        else:
            half = self.width // self.num_heads // 2
            rate = self.rotary_period ** (-jnp.arange(half, dtype=float_dtype(h)) / half)
            angles = slots.astype(rate.dtype)[:, None] * rate[None]
            turns = jnp.cos(angles), jnp.sin(angles)
        norms = placed("CausalTransformer", self.norm, per_token=True)
        h = normed(norms.first, h, self.dtype, "first_norm").astype(h.dtype)
        blocks = scanned(CausalBlock, self.num_layers, self.remat, in_axes=(0, *[nn.broadcast] * 6))
        h, cache = blocks(self.num_heads, self.mlp_ratio, self.dtype, norms, name="blocks")(
            h, cache, slots, temperature, held(parts.valid), turns, parts.context, parts.mask
        )
        h = normed(norms.pre, h, self.dtype, "norm")
        size = x.shape[-1] * self.size if self.features is None else self.features
        head = nn.Dense(
            size, kernel_init=nn.initializers.zeros, name="head"
        )  # in the params' precision
        raw = leave(per_token(head, h.astype(float_dtype(h))), parts.valid, first)
        return raw if cache is None else (raw, cache)

    def _positions(self, n: int) -> Array:
        """The learned positions, [n, width] at init and at least as many later."""
        made = self.variables.get("params", {}).get("positions")
        most = n if made is None else made.shape[0]
        if n > most:
            raise ValueError(
                f"CausalTransformer: expected at most {most} tokens, as at init, got {n}:"
                " rotary_period=10_000 is for sequences of any length"
            )
        return self.param("positions", _normal, (most, self.width))

    def empty_cache(self, x: Array, rows: int) -> tuple[Array, Array]:
        """A cache that holds no slot yet.

        Args:
            x: an event of the right size, [b, n, d], whose values are not read.
            rows: how many rows the cache is for.

        Returns:
            Keys and values, each [layers, rows, n, heads, width / heads], of zeros.
        """
        shape = (self.num_layers, rows, x.shape[1], self.num_heads, self.width // self.num_heads)
        zeros = jnp.zeros_like(x, shape=shape, dtype=self.dtype or float_dtype(x))
        return zeros, zeros


class CausalBlock(nn.Module):
    """Pre-norm attention and MLP on h [b, m, width], the slots `slots`.

    With a cache attention is over all slots up to each; never over slots that are not of `counts`
    [b, n]. `turns`, cosines and sines [m, size / 2], turn queries and keys. A context [b, k, c] is
    attended to in between.
    """

    num_heads: int
    mlp_ratio: int
    dtype: Any
    norms: Norms

    @nn.compact
    def __call__(
        self,
        h: Array,
        cache,
        slots: Array,
        temperature: Array | None,
        counts: Array | None = None,
        turns: tuple[Array, Array] | None = None,
        context: Array | None = None,
        mask: Array | None = None,
    ):
        b, m, width = h.shape
        size = width // self.num_heads
        norms, norm = self.norms, partial(normed, dtype=self.dtype)
        y = norm(norms.pre, h, name=None)
        qkv = per_token(nn.Dense(3 * width, dtype=self.dtype, name="qkv"), y).reshape(
            b, m, 3, self.num_heads, size
        )
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        q = norm(norms.queries_keys, q, name="q_norm")
        k = norm(norms.queries_keys, k, name="k_norm")
        if turns is not None:
            q, k = rotated(q, turns), rotated(k, turns)
        keys = slots
        if cache is not None:
            k, v = cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slots[0], axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
            keys = jnp.arange(k.shape[1])
        scores = (
            jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=float_dtype(q)) * size**-0.5
        )
        if temperature is not None:
            scores = scores / temperature.astype(scores.dtype)[:, None, None, None]
        seen = (keys[None, :] <= slots[:, None])[None, None]
        if counts is not None:  # the first slot always counts, so that every query sees a key
            seen = seen & counts[:, None, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)).astype(v.dtype)
        y = norm(norms.heads, jnp.einsum("bhqk,bkhd->bqhd", weights, v), name="head_norm")
        y = per_token(nn.Dense(width, dtype=self.dtype, name="out"), y.reshape(b, m, width))
        y = norm(norms.after_attention, y, name="attention_after")
        h = joined(norms, h, y, None, self.dtype, "attention_join")
        if context is not None:
            attend = CrossAttention(self.num_heads, self.dtype, name="context")
            y = norm(norms.pre, h, name="context_norm")
            h = h + attend(y, context, mask).astype(h.dtype)
        y = mlp(norm(norms.pre, h, name=None), self.mlp_ratio, self.dtype, norms.hidden)
        y = norm(norms.after_mlp, y, name="mlp_after")
        return joined(norms, h, y, None, self.dtype, "mlp_join"), cache
