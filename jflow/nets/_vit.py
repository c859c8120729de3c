"""ViT: a transformer from tokens to features, the conditioner of couplings on patches."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow._core.checks import check_whole
from jflow._core.conditions import with_label
from jflow._core.linen import flatten_event
from jflow.nets._attention import SelfAttention, check_attention, dot_product_attention, per_token
from jflow.nets._embed import need_cond, owner
from jflow.nets._normalization import LayerNorm, Norm, Norms, joined, normed, placed
from jflow.nets._scanned import scanned
from jflow.types import Array, Cond

_normal = nn.initializers.normal(0.02)
_uniform = nn.initializers.lecun_uniform()  # that of Xavier for a square matrix


class ViT(nn.Module):
    """A vision transformer as a conditioner, for couplings of tokens.

    `module(x [b, n, d], cond=None) -> features [b, n, width]`. Pre-norm blocks of full attention,
    scanned over the layers, with learned positions [n, width]. The vector of cond (`CondEmbed`) is
    added to every token. Structure and initialization are those of Jet, whose networks read no
    cond.

    Attributes:
        width: of the tokens.
        num_layers: the number of blocks.
        num_heads: the number of attention heads, which divides the width.
        mlp_ratio: the hidden width of the MLP of a block, in widths.
        num_classes: the number of classes where cond has integer labels [b]. Index num_classes is
            the null label, which cond=None then means too.
        remat: whether each block is computed again in the backward pass, which saves memory.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.
        attention_fn: a function `attention_fn(q, k, v)`; see `SelfAttention`.
        norm: a function that makes the normalizations, such as `RMSNorm`, or a `Norms`, which says
            where they stand, such as `peri_norm()`; of each token by itself.

    Raises:
        ValueError: num_heads does not divide the width, num_layers is below 1, or the norm takes
            means over a batch.
        TypeError: norm is neither, or attention_fn is no function.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net, x = nets.ViT(width=8, num_layers=1, num_heads=1), jnp.zeros((1, 4, 3))
        >>> jax.eval_shape(lambda key: net.init_with_output(key, x)[0], jax.random.key(0)).shape
        (1, 4, 8)

    References:
        Dosovitskiy et al., *An Image is Worth 16x16 Words: Transformers for Image Recognition at
            Scale*, 2021, arXiv:2010.11929.
        Kolesnikov, Pinto, Tschannen, *Jet: A Modern Transformer-Based Normalizing Flow*, 2024,
            arXiv:2412.15129.
    """

    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    mlp_ratio: int = 4
    num_classes: int | None = None
    remat: bool = False
    dtype: Any = None
    attention_fn: Callable[..., Array] = dot_product_attention
    norm: Norm | Norms = LayerNorm

    def __post_init__(self):
        check_width("ViT", self.width, self.num_heads, self.num_layers)
        check_attention("ViT", self.attention_fn)
        placed("ViT", self.norm, per_token=True)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, cond: Cond = None) -> Array:
        """Compute the features.

        Args:
            x: the tokens, [b, n, d].
            cond: None, integer labels [b], floats [b, ...], a pytree of them, or the label and the
                vector of a `types.Condition`; see `CondEmbed`.

        Returns:
            The features [b, n, width].
        """
        if x.ndim != 3:
            raise ValueError(f"ViT: expected x of shape [b, n, d], got {list(x.shape)}")
        h = per_token(nn.Dense(self.width, dtype=self.dtype, name="tokens"), x)
        normal = nn.initializers.normal(self.width**-0.5)
        h = h + self.param("positions", normal, (x.shape[1], self.width)).astype(h.dtype)[None]
        if (
            c := CondEmbed(self.width, self.num_classes, self.dtype, name="embed")(cond, x.shape[0])
        ) is not None:
            h = h + c[:, None].astype(h.dtype)
        blocks = scanned(ViTBlock, self.num_layers, self.remat)
        norms = placed("ViT", self.norm)
        h = normed(norms.first, h, self.dtype, "first_norm").astype(h.dtype)
        options = self.num_heads, self.mlp_ratio, self.dtype, self.attention_fn, norms
        h, _ = blocks(*options, name="blocks")(h, None)
        return normed(norms.pre, h, self.dtype, "norm")


class ViTBlock(nn.Module):
    """Pre-norm attention and MLP on h [b, n, width]."""

    num_heads: int
    mlp_ratio: int
    dtype: Any
    attention_fn: Callable[..., Array]
    norms: Norms

    @nn.compact
    def __call__(self, h: Array, _) -> tuple[Array, None]:
        norms, norm = self.norms, partial(normed, dtype=self.dtype)
        attention = SelfAttention(
            self.num_heads,
            _uniform,
            _uniform,
            self.dtype,
            self.attention_fn,
            norms.queries_keys,
            norms.heads,
            name="attention",
        )
        y = attention(norm(norms.pre, h, name=None))
        y = norm(norms.after_attention, y, name="attention_after")
        h = joined(norms, h, y, None, self.dtype, "attention_join")
        init = {
            "kernel_init": nn.initializers.xavier_uniform(),
            "bias_init": nn.initializers.normal(1e-6),
        }
        y = mlp(norm(norms.pre, h, name=None), self.mlp_ratio, self.dtype, norms.hidden, **init)
        y = norm(norms.after_mlp, y, name="mlp_after")
        return joined(norms, h, y, None, self.dtype, "mlp_join"), None


def layer_norm(dtype, name: str | None = None) -> LayerNorm:
    """`LayerNorm` for what computes in a type of its own."""
    return LayerNorm(dtype=dtype, name=name)


class CondEmbed(nn.Module):
    """The embedding of a condition as one vector a row, or None where there is nothing to embed.

    `module(cond, n) -> [n, width]`, the sum over the leaves of cond. Integer leaves [n] are labels
    and need `num_classes`; each gets a table of num_classes + 1 rows, of which index `num_classes`
    is the null label (for guidance); with `num_classes` set, cond=None means the null label. Float
    leaves [n, ...] are flattened and go through a linear map without bias, so that a cond of zeros
    says as much as None. A label above num_classes cannot be seen while tracing: its rows come out
    NaN.

    Attributes:
        width: of the embedding.
        num_classes: the number of classes where cond has integer labels [b]. Index num_classes is
            the null label, which cond=None then means too.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.

    Raises:
        ValueError: there are labels without `num_classes`, or leaves that are neither floats nor
            integers [n]; at the call.
    """

    width: int
    num_classes: int | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, cond: Cond, n: int) -> Array | None:
        """Embed.

        Args:
            cond: None, integer labels [n], floats [n, ...], a pytree of them, or the label and the
                vector of a `types.Condition`.
            n: the number of rows.

        Returns:
            The embedding [n, width], or None.
        """
        cond = with_label(owner(self), cond, n, self.num_classes)
        need_cond(self, cond)
        leaves = jax.tree_util.tree_leaves_with_path(cond)
        parts = [
            self._leaf(jnp.asarray(leaf), f"cond_{i}", "cond" + jax.tree_util.keystr(path))
            for i, (path, leaf) in enumerate(leaves)
        ]
        return sum(parts[1:], parts[0]) if parts else None

    def _leaf(self, leaf: Array, name: str, where: str) -> Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return nn.Dense(self.width, use_bias=False, dtype=self.dtype, name=name)(
                flatten_event(leaf)
            )
        if not jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.ndim != 1:
            raise ValueError(
                f"{where}: expected floats or integer labels [b], got {leaf.dtype} "
                f"{list(leaf.shape)}"
            )
        if self.num_classes is None:
            raise ValueError(
                f"{where} holds integer labels: the network needs num_classes=..., got None"
            )
        table = nn.Embed(
            self.num_classes + 1, self.width, embedding_init=_normal, dtype=self.dtype, name=name
        )
        return table(leaf)


def mlp(h: Array, ratio: int, dtype, hidden: Norm | None = None, **init) -> Array:
    """Two dense layers [b, n, width] -> [b, n, width] with a GELU between, and a norm behind it.

    To be called inside a compact method. `init` has the initializers of both.
    """
    width = h.shape[-1]
    enter, leave = (
        nn.Dense(ratio * width, dtype=dtype, name="in", **init),
        nn.Dense(width, dtype=dtype, name="leave", **init),
    )
    return per_token(lambda h: leave(normed(hidden, nn.gelu(enter(h)), dtype, "hidden_norm")), h)


def check_width(name: str, width: int, num_heads: int, num_layers: int) -> None:
    """Raise unless num_heads divide the width and there is a layer."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(
            f"{name}: expected a width divisible by num_heads={num_heads}, got {width}"
        )
    check_whole(name, num_layers=num_layers)
