"""A causal transformer over tokens, in two forms that share params.

One is a parallel pass, the other takes steps with a cache of keys.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow._core.attached import HIDDEN
from jflow.nets._attention import per_token
from jflow.nets._vit import CondEmbed, check_width, mlp
from jflow.types import Array, Cond

_normal = nn.initializers.normal(0.02)


class CausalTransformer(nn.Module):
    """A causal transformer: raw numbers for each token from the tokens before it, zero at first.

    `module(x [b, n, d], cond=None) -> raw [b, n, d * size]`, where raw[:, i] depends on x[:, :i].
    Slot i reads token i - 1, and slot 0 a token of zeros, so that its numbers depend on cond alone.
    Pre-norm blocks, scanned over the layers, with learned positions [n, width]. Softmax and head
    are in float32 or better whatever `dtype` is. The vector of cond (`CondEmbed`) is added to every
    token.

    Attributes:
        size: the count of raw numbers for each number of x.
        width: of the tokens inside.
        num_layers: the number of blocks.
        num_heads: the number of attention heads, which divides the width.
        mlp_ratio: the hidden width of the MLP of a block, in widths.
        num_classes: the number of classes where cond has integer labels [b]. Index num_classes is
            the null label, which cond=None then means too.
        remat: whether each block is computed again in the backward pass, which saves memory.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.

    Raises:
        ValueError: num_heads does not divide the width, or num_layers is below 1.

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
    """

    size: int = 2
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    mlp_ratio: int = 4
    num_classes: int | None = None
    remat: bool = False
    dtype: Any = None

    def __post_init__(self):
        check_width("CausalTransformer", self.width, self.num_heads, self.num_layers)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Array, cond: Cond = None, temperature: Array | None = None, cache=None, first=0
    ):
        """One parallel pass, or some slots with a cache.

        Args:
            x: the tokens, [b, n, d]. With a cache: the m tokens *before* the slots first .. first +
                m - 1, [b, m, d], where what stands before slot 0 counts as zeros.
            cond: None, integer labels [b], floats [b, ...], or a pytree of them; see `CondEmbed`.
            temperature: what the attention scores of each row are divided by, [b]; None is 1.
            cache: None, or keys and values from `empty_cache`, which hold those of all earlier
                slots.
            first: the first slot, with a cache.

        Returns:
            raw [b, n, d * size]; with a cache (raw [b, m, d * size] of those slots, cache).
        """
        if x.ndim != 3:
            raise ValueError(
                f"CausalTransformer: expected x of shape [b, n, d], got {list(x.shape)}"
            )
        b, m, d = x.shape
        n = m if cache is None else cache[0].shape[2]
        slots = first + jnp.arange(m)
        if cache is None:
            x = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
        x = jnp.where((slots == 0)[None, :, None], 0, x)

        positions = self.param("positions", _normal, (n, self.width))
        if positions.shape[0] != n:
            raise ValueError(
                f"CausalTransformer: expected {positions.shape[0]} tokens, as at init, got {n}"
            )
        h = per_token(nn.Dense(self.width, dtype=self.dtype, name="tokens"), x)
        h = h + jnp.take(positions, slots, axis=0, mode="clip").astype(h.dtype)[None]
        if (
            c := CondEmbed(self.width, self.num_classes, self.dtype, name="embed")(cond, b)
        ) is not None:
            h = h + c[:, None].astype(h.dtype)
        blocks = nn.scan(
            nn.remat(CausalBlock, prevent_cse=False) if self.remat else CausalBlock,
            variable_axes={"params": 0, HIDDEN: 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=self.num_layers,
        )
        h, cache = blocks(self.num_heads, self.mlp_ratio, self.dtype, name="blocks")(
            h, cache, slots, temperature
        )
        h = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(h)
        head = nn.Dense(
            d * self.size, kernel_init=nn.initializers.zeros, name="head"
        )  # in the params' precision
        raw = per_token(head, h.astype(float_dtype(h)))
        return raw if cache is None else (raw, cache)

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

    With a cache attention is over all slots up to each.
    """

    num_heads: int
    mlp_ratio: int
    dtype: Any

    @nn.compact
    def __call__(self, h: Array, cache, slots: Array, temperature: Array | None):
        b, m, width = h.shape
        size = width // self.num_heads
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(h)
        qkv = per_token(nn.Dense(3 * width, dtype=self.dtype, name="qkv"), y).reshape(
            b, m, 3, self.num_heads, size
        )
        q, k, v = jnp.moveaxis(qkv, 2, 0)
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
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)).astype(v.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, m, width)
        h = h + per_token(nn.Dense(width, dtype=self.dtype, name="out"), y)
        return h + mlp(
            nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(h), self.mlp_ratio, self.dtype
        ), cache
