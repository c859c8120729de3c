"""ViT: a transformer from tokens to features, the conditioner of couplings on patches."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow._core.checks import check_cond, check_whole
from jflow._core.linen import flatten_event
from jflow.nets._attention import SelfAttention, per_token
from jflow.nets._embed import need_cond
from jflow.types import Array, Cond

_normal = nn.initializers.normal(0.02)


class ViT(nn.Module):
    """A conditioner: module(x [b, n, d], cond=None) -> features [b, n, width].

    Pre-norm blocks of full attention, scanned over `layers` (`remat` recomputes each in the backward pass), with learned
    positions [n, width]. `num_classes` and cond: see `jflow.nets.CondEmbed`. `dtype` is the type of the computation.

    Raises ValueError when num_heads does not divide the width, or num_layers < 1.
    Sources: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021; Kolesnikov et al., "Jet: A Modern
    Transformer-Based Normalizing Flow", 2024.
    """

    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    mlp_ratio: int = 4
    num_classes: int | None = None
    remat: bool = False
    dtype: Any = None

    def __post_init__(self):
        check_width("ViT", self.width, self.num_heads, self.num_layers)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, cond: Cond = None) -> Array:
        if x.ndim != 3:
            raise ValueError(f"ViT: expected x of shape [b, n, d], got {list(x.shape)}")
        h = per_token(nn.Dense(self.width, dtype=self.dtype, name="tokens"), x)
        h = h + self.param("positions", _normal, (x.shape[1], self.width)).astype(h.dtype)[None]
        if (
            c := CondEmbed(self.width, self.num_classes, self.dtype, name="embed")(cond, x.shape[0])
        ) is not None:
            h = h + c[:, None].astype(h.dtype)
        blocks = nn.scan(
            nn.remat(ViTBlock, prevent_cse=False) if self.remat else ViTBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.num_layers,
        )
        h, _ = blocks(self.num_heads, self.mlp_ratio, self.dtype, name="blocks")(h, None)
        return nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(h)


class ViTBlock(nn.Module):
    """Pre-norm attention and MLP on h [b, n, width]."""

    num_heads: int
    mlp_ratio: int
    dtype: Any

    @nn.compact
    def __call__(self, h: Array, _) -> tuple[Array, None]:
        attention = SelfAttention(self.num_heads, dtype=self.dtype, name="attention")
        h = h + attention(nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(h))
        return h + mlp(
            nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(h), self.mlp_ratio, self.dtype
        ), None


class CondEmbed(nn.Module):
    """cond -> [b, width], the sum over its leaves, or None where there is nothing to embed.

    Integer leaves [b] are labels and need `num_classes`; each gets a table of num_classes + 1 rows, of which index
    `num_classes` is the null label (for guidance); with `num_classes` set, cond=None means the null label. Float leaves
    [b, ...] are flattened and go through a linear map without bias, so that a cond of zeros says as much as None. A label
    above num_classes cannot be seen while tracing: its rows come out NaN.
    """

    width: int
    num_classes: int | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, cond: Cond, n: int) -> Array | None:
        if cond is None and self.num_classes is not None:
            cond = jnp.full((n,), self.num_classes, jnp.int32)
        need_cond(self, cond)
        cond = check_cond("CondEmbed", cond, n)
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
                f"{where}: expected floats or integer labels [b], got {leaf.dtype} {list(leaf.shape)}"
            )
        if self.num_classes is None:
            raise ValueError(
                f"{where} holds integer labels: the network needs num_classes=..., got None"
            )
        table = nn.Embed(
            self.num_classes + 1, self.width, embedding_init=_normal, dtype=self.dtype, name=name
        )
        return table(leaf)


def mlp(h: Array, ratio: int, dtype) -> Array:
    """Two dense layers [b, n, width] -> [b, n, width] with a GELU between; to be called inside a compact method."""
    width = h.shape[-1]
    enter, leave = (
        nn.Dense(ratio * width, dtype=dtype, name="in"),
        nn.Dense(width, dtype=dtype, name="leave"),
    )
    return per_token(lambda h: leave(nn.gelu(enter(h))), h)


def check_width(name: str, width: int, num_heads: int, num_layers: int) -> None:
    """Raise unless num_heads divide the width and there is a layer."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(
            f"{name}: expected a width divisible by num_heads={num_heads}, got {width}"
        )
    check_whole(name, num_layers=num_layers)
