"""The causal transformer of TarFlow as its authors publish its weights."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow._core.conditions import label_of, refuse_parts, with_label
from jflow.nets._attention import dot_product_attention, per_token
from jflow.nets._normalization import LayerNorm, Norm, Norms, joined, normed, placed
from jflow.nets._scanned import scanned
from jflow.nets._vit import check_width
from jflow.types import Array, Cond

_NORM = partial(LayerNorm, epsilon=1e-5)


class TarFlowTransformer(nn.Module):
    """The transformer of a TarFlow block in its published form, for `bijectors.causal_block`.

    `module(x [b, n, d], cond=None) -> raw [b, n, d * size]`, where raw[:, i] depends on x[:, :i]
    and raw[:, 0] is zero. It differs from `CausalTransformer` in what published weights need: no
    slot for a token of zeros, norms with an epsilon of 1e-5, none behind the last layer, the exact
    GELU, and a table of classes whose mean stands for no class.

    Attributes:
        size: the count of raw numbers for each number of x.
        width: of the tokens inside.
        num_layers: the number of attention layers.
        num_heads: the number of attention heads, which divides the width.
        mlp_ratio: the hidden width of the MLP of a layer, in widths.
        num_classes: the number of classes where cond has integer labels [b]. Index num_classes, and
            cond=None, are the mean of all classes.
        remat: whether each layer is computed again in the backward pass, which saves memory.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.
        norm: a function that makes the normalizations, such as `RMSNorm`, or a `Norms`, which says
            where they stand, such as `peri_norm()`; of each token by itself.

    Raises:
        ValueError: num_heads does not divide the width, num_layers is below 1, or the norm takes
            means over a batch.
        TypeError: norm is no function that makes a module, and no `Norms`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.TarFlowTransformer(width=8, num_layers=1, num_heads=1)
        >>> x = jnp.zeros((1, 4, 3))
        >>> jax.eval_shape(lambda key: net.init_with_output(key, x)[0], jax.random.key(0)).shape
        (1, 4, 6)

    References:
        Zhai et al., *Normalizing Flows are Capable Generative Models*, 2024, arXiv:2412.06329.
    """

    size: int = 2
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    mlp_ratio: int = 4
    num_classes: int | None = None
    remat: bool = False
    dtype: Any = None
    norm: Norm | Norms = _NORM

    def __post_init__(self):
        placed("TarFlowTransformer", self.norm, per_token=True)
        check_width("TarFlowTransformer", self.width, self.num_heads, self.num_layers)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Array, cond: Cond = None, temperature: Array | None = None, cache=None, first=0
    ):
        """One parallel pass, or some slots with a cache; see `CausalTransformer`.

        Args:
            x: the tokens, [b, n, d]; with a cache the tokens before the slots.
            cond: None, or labels [b].
            temperature: what the attention scores of each row are divided by, [b]; None is 1.
            cache: None, or keys and values from `empty_cache`.
            first: the first slot, with a cache.

        Returns:
            raw [b, n, d * size]; with a cache (raw [b, m, d * size] of those slots, cache).
        """
        if x.ndim != 3:
            raise ValueError(
                f"TarFlowTransformer: expected x of shape [b, n, d], got {list(x.shape)}"
            )
        b, m, d = x.shape
        n = m if cache is None else cache[0].shape[2]
        slots = first + jnp.arange(m)
        if cache is None:
            x = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))  # slot i reads token i - 1

        positions = self.param("positions", nn.initializers.normal(0.01), (n, self.width))
        if positions.shape[0] != n:
            raise ValueError(
                f"TarFlowTransformer: expected {positions.shape[0]} tokens, as at init, got {n}"
            )
        h = per_token(nn.Dense(self.width, dtype=self.dtype, name="tokens"), x)
        h = h + jnp.take(positions, slots - 1, axis=0, mode="clip").astype(h.dtype)[None]
        label = self._label(cond, b)
        if label is not None:
            classes = self.param(
                "classes", nn.initializers.normal(0.01), (self.num_classes, self.width)
            )
            classes = jnp.concatenate([classes, classes.mean(0, keepdims=True)])
            h = h + jnp.take(classes, label, axis=0)[:, None].astype(h.dtype)
        norms = placed("TarFlowTransformer", self.norm, per_token=True)
        h = normed(norms.first, h, self.dtype, "first_norm").astype(h.dtype)
        layers = scanned(
            TarFlowLayer, self.num_layers, self.remat, in_axes=(0, nn.broadcast, nn.broadcast)
        )
        h, cache = layers(self.num_heads, self.mlp_ratio, self.dtype, norms, name="layers")(
            h, cache, slots, temperature
        )
        head = nn.Dense(d * self.size, kernel_init=nn.initializers.zeros, name="head")
        raw = per_token(head, h.astype(float_dtype(h)))  # in the params' precision
        raw = jnp.where((slots == 0)[None, :, None], 0, raw)
        return raw if cache is None else (raw, cache)

    def _label(self, cond: Cond, b: int) -> Array | None:
        refuse_parts("TarFlowTransformer", cond, ("label",))
        label = label_of(with_label("TarFlowTransformer", cond, b, self.num_classes))
        if label is None:
            return None
        label = jnp.asarray(label)
        if self.num_classes is None or not jnp.issubdtype(label.dtype, jnp.integer):
            raise ValueError(
                "TarFlowTransformer: expected integer labels [b], and num_classes, got "
                f"{label.dtype} of shape {list(label.shape)} and num_classes={self.num_classes}"
            )
        return label

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


class TarFlowLayer(nn.Module):
    """Pre-norm attention and MLP on h [b, m, width], the slots `slots`, of which none sees slot 0.

    With a cache attention is over all slots up to each.
    """

    num_heads: int
    mlp_ratio: int
    dtype: Any
    norms: Norms

    @nn.compact
    def __call__(self, h: Array, cache, slots: Array, temperature: Array | None):
        b, m, width = h.shape
        norms, norm = self.norms, partial(normed, dtype=self.dtype)
        dense = partial(nn.Dense, dtype=self.dtype)
        qkv = per_token(dense(3 * width, name="qkv"), norm(norms.pre, h, name="norm_attention"))
        q, k, v = jnp.moveaxis(qkv.reshape(b, m, 3, self.num_heads, -1), 2, 0)
        q = norm(norms.queries_keys, q, name="q_norm")
        k = norm(norms.queries_keys, k, name="k_norm")
        keys = slots
        if cache is not None:
            k, v = cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slots[0], axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
            keys = jnp.arange(k.shape[1])
        if temperature is not None:
            q = q / temperature.astype(q.dtype)[:, None, None, None]
        seen = (keys[None, :] <= slots[:, None]) & (keys[None, :] > 0)
        y = dot_product_attention(q, k, v, mask=seen[None, None])
        y = norm(norms.heads, y, name="head_norm").reshape(b, m, width)
        y = norm(
            norms.after_attention, per_token(dense(width, name="out"), y), name="attention_after"
        )
        h = joined(norms, h, y, None, self.dtype, "attention_join")
        y = norm(norms.pre, h, name="norm_mlp")
        y = nn.gelu(per_token(dense(self.mlp_ratio * width, name="mlp_in"), y), approximate=False)
        y = norm(norms.hidden, y, name="hidden_norm")
        y = norm(norms.after_mlp, per_token(dense(width, name="mlp_out"), y), name="mlp_after")
        return joined(norms, h, y, None, self.dtype, "mlp_join"), cache
