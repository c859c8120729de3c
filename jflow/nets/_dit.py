"""DiT: a transformer on image patches, modulated by time and cond."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import patchify, unpatchify
from jflow._core.attached import HIDDEN, REPORT
from jflow._core.checks import check_whole, described
from jflow._core.linen import check_linen
from jflow.nets._attention import (
    SelfAttention,
    check_attention,
    dot_product_attention,
    merged,
    per_token,
    split_heads,
)
from jflow.nets._embed import TimeCondEmbed, check_time, need_part, read_cond
from jflow.nets._hyper_connections import Residual, branch
from jflow.nets._normalization import LayerNorm, Norm, Norms, joined, normed, placed
from jflow.nets._scanned import scanned
from jflow.types import Array, Cond, Condition

_xavier = nn.initializers.xavier_uniform()
_zeros = nn.initializers.zeros
_SHARED = {"attention", "context", "in", "out", "mlp"}  # of the params of a block


class DiT(nn.Module):
    """DiT: a transformer on the patches of an image, as a velocity network, zero at initialization.

    `module(x [b, H, W, C], t [b], cond=None, r=None) -> shaped like x`. Patches become tokens with
    fixed 2-D sine-cosine positions, those of the column before those of the row; the adaLN-zero
    blocks are scanned. The time may be one for each token, t [b, n] with n = H W / patch_size^2,
    row by row. The published sizes are width, num_layers, num_heads = 384, 12, 6 (S), 768, 12, 12
    (B), 1024, 24, 16 (L) and 1152, 28, 16 (XL). The published DiT reads 1000 integer times, which
    is time_scale=1000 here; SiT, the same network, reads t in [0, 1] itself, which is time_scale=1
    (as LightningDiT does).

    Of a `types.Condition` the label and the vector modulate the blocks, what is aligned with x goes
    in beside it, patch by patch, and the context is read by a cross-attention between the
    self-attention and the MLP of each block. The weights that read the last two start at zero. A
    row whose mask has no valid token is computed as if there were no context.

    Attributes:
        patch_size: the side of a patch, in pixels.
        width: of the tokens.
        num_layers: the number of blocks.
        num_heads: the number of attention heads, which divides the width.
        mlp_ratio: the hidden width of the MLP of a block, in widths.
        num_classes: the number of classes where cond has integer labels [b]. Index num_classes is
            the null label, which cond=None then means too.
        time_scale: the largest angular frequency of the features of time, in radians per unit of t;
            see `time_features`.
        dropout: the rate; a key, or a 'dropout' stream, switches it on.
        remat: whether each block is computed again in the backward pass, which saves memory.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.
        attention_fn: a function `attention_fn(q, k, v)`; see `SelfAttention`.
        norm: a function that makes the normalizations, such as `RMSNorm`, or a `Norms`, which says
            where they stand, such as `peri_norm()`. Those in front of a branch have no weights.
        mlp: a Linen module (tokens [b, n, width]) -> tokens in the place of the MLP of each block,
            with params for each, such as `MixtureOfExperts(8)`, `ProductKeyExperts()` or
            `ParameterAttention(512)`. None is two dense layers, of mlp_ratio.
        residual: `HyperConnections()` or `LadderResidual()`, in the place of `h + branch(h)`. None
            is that.
        shared: whether attention and MLP are the same in all blocks, which then have their
            modulations, and what else there is, of their own; with a `MixtureOfExperts` it is
            WideNet.

    Raises:
        TypeError: mlp is no Linen module, or residual none of these.
        ValueError: patch_size does not divide H and W, num_heads the width, or 4 the width.
        TypeError: norm is neither, or attention_fn is no function.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.DiT(width=8, num_layers=1, num_heads=1)
        >>> x, t = jnp.ones((1, 4, 4, 1)), jnp.zeros(1)
        >>> jax.eval_shape(lambda key: net.init_with_output(key, x, t)[0], jax.random.key(0)).shape
        (1, 4, 4, 1)

    References:
        Peebles, Xie, *Scalable Diffusion Models with Transformers*, 2023, arXiv:2212.09748.
        Chen, Yu, Ge, Yao, Xie, Wu, Wang, Kwok, Luo, Lu, Li, *PixArt-α: Fast Training of Diffusion
            Transformer for Photorealistic Text-to-Image Synthesis*, 2023, arXiv:2310.00426, for the
            place of the cross-attention; the norm before it is ours.
        Chen, Martí Monsó, Du, Simchowitz, Tedrake, Sitzmann, *Diffusion Forcing: Next-token
            Prediction Meets Full-Sequence Diffusion*, 2024, arXiv:2407.01392, for a time of each
            token.
        Xue, Shi, Wei, Lou, Liu, You, *Go Wider Instead of Deeper*, 2021, arXiv:2107.11817, for
            shared blocks.
    """

    patch_size: int = 2
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_ratio: int = 4
    num_classes: int | None = None
    time_scale: float = 100.0
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = None
    attention_fn: Callable[..., Array] = dot_product_attention
    norm: Norm | Norms = LayerNorm
    mlp: nn.Module | None = None
    residual: Residual | None = None
    shared: bool = False

    def __post_init__(self):
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(
                f"DiT: expected a width divisible by 4 and by num_heads={self.num_heads}, got "
                f"{self.width}"
            )
        check_whole("DiT", num_layers=self.num_layers)
        check_attention("DiT", self.attention_fn)
        check_blocks(
            "DiT", self.mlp, self.residual, placed("DiT", self.norm, per_token=self.shared)
        )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None, r: Array | None = None) -> Array:
        """Predict the velocity.

        Args:
            x: the images, [b, H, W, C].
            t: the times, [b], or [b, n] along the tokens.
            cond: None, integer labels [b], floats [b, k], a pytree of them, or a `types.Condition`
                with images [b, H, W, k] that are aligned with x.
            r: the times that a flow map goes to, shaped like t; None for a velocity. The network
                reads r - t.

        Returns:
            The velocity, with the shape and type of x.
        """
        p = self.patch_size
        if x.ndim != 4 or x.shape[1] % p or x.shape[2] % p:
            raise ValueError(
                f"DiT: expected x of shape [b, H, W, C], H and W divisible by {p}, got "
                f"{list(x.shape)}"
            )
        _, height, width, channels = x.shape
        rows, columns = height // p, width // p
        check_time("DiT", x, t, r, rows * columns)
        cond, parts = read_cond("DiT", cond, x, Condition._fields[:-1])  # all but valid

        h = per_token(
            nn.Dense(self.width, kernel_init=_xavier, dtype=self.dtype, name="patches"),
            patchify(x, p),
        )
        aligned = parts.aligned
        h = with_aligned(
            self, h, None if aligned is None else patchify(aligned.astype(x.dtype), p), self.dtype
        )
        h = h + jnp.asarray(sincos_positions(rows, columns, self.width), h.dtype)[None]
        embed = TimeCondEmbed(
            self.width, self.num_classes, time_scale=self.time_scale, dtype=self.dtype, name="embed"
        )
        c = nn.silu(embed(t, cond, r)).astype(h.dtype)  # the scan's carry keeps one type
        h = transformed(self, h, c, parts, p * p * channels)
        return unpatchify(h, rows, columns, p).astype(x.dtype)


def with_aligned(module: nn.Module, h: Array, aligned: Array | None, dtype) -> Array:
    """The tokens h [b, n, width] plus a linear map of what is aligned with them, zero at first.

    To be called inside a compact method of the module.
    """
    if aligned is None:
        need_part(module, "aligned", "aligned", module.variables.get("params", {}))
        return h
    beside = nn.Dense(h.shape[-1], use_bias=False, kernel_init=_zeros, dtype=dtype, name="aligned")
    return h + per_token(beside, aligned).astype(h.dtype)


def transformed(
    module: Any,
    h: Array,
    c: Array,
    parts: Condition,
    outputs: int,
    attention_fn: Callable[..., Array] | None = None,
) -> Array:
    """The tokens h [b, n, width] after the blocks and the head of a module, [b, n, outputs].

    c is as in `DiTBlock`; what is not valid of the tokens is not attended to. To be called inside a
    compact method of the module, whose options are those of `DiT`; another attention_fn takes the
    place of its own.
    """
    if parts.context is None:
        params = module.variables.get("params", {})
        need_part(module, "context", "context", params.get("blocks", params.get("shared", {})))
    norms = placed(type(module).__name__, getattr(module, "norm", LayerNorm))
    h = normed(norms.first, h, module.dtype, "first_norm").astype(h.dtype)
    mlp, residual = (getattr(module, option, None) for option in ("mlp", "residual"))
    options = (
        module.num_heads,
        module.mlp_ratio,
        module.dropout,
        module.dtype,
        attention_fn or module.attention_fn,
        norms,
        own_copy(mlp, module.dtype),
        own_copy(residual, module.dtype),
    )
    args = (c, parts.context, parts.mask, parts.valid)
    if residual is not None:  # copies in all streams
        h = jnp.broadcast_to(h[:, :, None], (*h.shape[:2], residual.streams, h.shape[-1]))
    if getattr(module, "shared", False):
        h = shared_blocks(module, DiTBlock(*options, parent=None), h, *args)
    else:
        blocks = scanned(DiTBlock, module.num_layers, module.remat)
        h, _ = blocks(*options, name="blocks")(h, *args)
    h = h if residual is None else jnp.mean(h, axis=2)

    shift, scale = modulation(c, 2, module.dtype)
    h = normed(norms.pre, h, module.dtype, "norm", affine=False) * (1 + scale) + shift
    return per_token(
        nn.Dense(outputs, kernel_init=_zeros, name="head"), h
    )  # in the params' precision


def shared_blocks(module: Any, block: nn.Module, h: Array, *args) -> Array:
    """The tokens h after the blocks of a module, of which _SHARED have the same params in all.

    Those are under "shared", those that each block has of its own under "stacked", which lead with
    the depth. To be called inside a compact method of the module.
    """

    def part(tree, name):
        return {key: tree[key] for key in tree if (key in _SHARED) == (name == "shared")}

    def init(key, name):
        return part(block.init(key, h, *args)["params"], name)

    def stacked(key):
        return jax.vmap(partial(init, name="stacked"))(jax.random.split(key, module.num_layers))

    if "shared" not in module.variables.get("params", {}):
        module.param("shared", init, "shared")
        module.param("stacked", stacked)
    params = module.variables["params"]  # as they are: Flax would trace their init to compare
    keys = None
    if module.has_rng("dropout"):
        keys = jax.random.split(module.make_rng("dropout"), module.num_layers)
    kinds = [kind for kind in (REPORT, HIDDEN) if module.is_mutable_collection(kind)]

    def apply(h, inputs):
        own, key = inputs
        variables = {"params": {**params["shared"], **own}}
        rngs = None if key is None else {"dropout": key}
        (h, _), said = block.apply(variables, h, *args, rngs=rngs, mutable=kinds)
        return h, said

    apply = jax.checkpoint(apply, prevent_cse=False) if module.remat else apply
    h, said = jax.lax.scan(apply, h, (params["stacked"], keys), length=module.num_layers)
    for kind in said:
        for name in ("shared", "stacked"):
            module.put_variable(kind, name, part(said[kind], name))
    return h


class DiTBlock(nn.Module):
    """One adaLN-zero block on tokens h [b, n, width], modulated by c [b, width] or [b, n, width].

    A context [b, m, k], of which the tokens of mask [b, m] are valid, is attended to in between.
    Tokens of h that are not valid [b, n] are attended to by none. It is the identity at
    initialization.
    """

    num_heads: int
    mlp_ratio: int
    dropout: float
    dtype: Any
    attention_fn: Callable[..., Array] = dot_product_attention
    norms: Norms = Norms()
    mlp: nn.Module | None = None
    residual: Residual | None = None

    @nn.compact
    def __call__(
        self,
        h: Array,
        c: Array,
        context: Array | None = None,
        mask: Array | None = None,
        valid: Array | None = None,
    ) -> tuple[Array, None]:
        width = h.shape[-1]
        dense = partial(nn.Dense, kernel_init=_xavier, dtype=self.dtype)
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(c, 6, self.dtype)

        norms, norm = self.norms, partial(normed, dtype=self.dtype)
        x, add = self._branch("attention", h)
        y = norm(norms.pre, x, name="attention_norm", affine=False) * (1 + scale_a) + shift_a
        y = SelfAttention(
            self.num_heads,
            _xavier,
            _xavier,
            self.dtype,
            self.attention_fn,
            norms.queries_keys,
            norms.heads,
            name="attention",
        )(y, valid)
        h = add(norm(norms.after_attention, drop(y), name="attention_after"), gate_a)
        if context is not None:
            x, add = self._branch("context", h)
            attend = CrossAttention(self.num_heads, self.dtype, name="context")
            y = norm(norms.pre, x, name="context_norm", affine=False)
            h = add(drop(attend(y, context, mask)).astype(h.dtype), None)

        x, add = self._branch("mlp", h)
        y = norm(norms.pre, x, name="mlp_norm", affine=False) * (1 + scale_m) + shift_m
        if self.mlp is None:
            enter, leave = dense(self.mlp_ratio * width, name="in"), dense(width, name="out")
            inner = lambda y: norm(norms.hidden, nn.gelu(enter(y)), name="hidden_norm")  # noqa: E731
            y = per_token(lambda y: leave(drop(inner(y))), y)
        else:
            y = drop(self.mlp(y)).astype(h.dtype)
        return add(norm(norms.after_mlp, y, name="mlp_after"), gate_m), None

    def _branch(self, name: str, h: Array):
        """(what a branch reads of h, the function of its output and gate that adds it to h)."""
        if self.residual is None:
            return h, lambda y, gate: joined(self.norms, h, y, gate, self.dtype, f"{name}_join")
        x, add = branch(self.residual, self, f"{name}_residual", h)
        return x, lambda y, gate: add(y if gate is None else gate * y)


def own_copy(option: Any, dtype) -> Any:
    """A module that was given as an option, for the blocks to own, or None; it computes in this
    dtype where its own is None."""
    if option is None:
        return None
    unset = hasattr(option, "dtype") and option.dtype is None
    return option.clone(parent=None, **({"dtype": dtype} if unset else {}))


def check_blocks(name: str, mlp, residual, norms: Norms) -> None:
    """Raise unless mlp is a Linen module and residual one of its kinds, or None, and the norms
    stand where these leave room for them."""
    if mlp is not None and norms.hidden is not None:
        raise ValueError(f"{name}: a norm inside the MLP has no place in an mlp of your own")
    if residual is not None and norms.join is not None:
        raise ValueError(
            f"{name}: expected a residual or a norm that joins, such as ngpt, not both"
        )
    if mlp is not None:
        check_linen(name, "mlp", mlp)
    if residual is not None and not isinstance(residual, Residual):
        raise TypeError(
            f"{name}: expected residual to be nets.HyperConnections() or LadderResidual(), or None"
            f" for h + branch(h), got {described(residual)}"
        )


class CrossAttention(nn.Module):
    """Attention of tokens h [b, n, width] to a context [b, m, k], zero at initialization.

    mask [b, m] says which tokens of the context are valid; a row without one gets zero.
    """

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, h: Array, context: Array, mask: Array | None) -> Array:
        width = h.shape[-1]
        dense = partial(nn.Dense, kernel_init=_xavier, dtype=self.dtype)
        context = context.astype(h.dtype)
        if mask is not None:  # padding may hold anything, NaN too
            context = jnp.where(mask[..., None], context, jnp.zeros_like(context))
        (q,) = split_heads(per_token(dense(width, name="q"), h), self.num_heads, 1)
        kv = split_heads(per_token(dense(2 * width, name="kv"), context), self.num_heads, 2)
        out = nn.Dense(width, kernel_init=_zeros, dtype=self.dtype, name="out")
        y = per_token(out, merged(dot_product_attention(q, *kv, mask=mask)))
        if mask is None:
            return y
        return jnp.where(jnp.any(mask, axis=1)[:, None, None], y, jnp.zeros_like(y))


def modulation(c: Array, n: int, dtype) -> list[Array]:
    """n linear functions [b, 1, width] of c [b, width], or [b, tokens, width] of one for each
    token, zero at first.

    To be called inside a compact method.
    """
    made = nn.Dense(n * c.shape[-1], kernel_init=_zeros, dtype=dtype, name="modulation")(c)
    return jnp.split(made[:, None] if c.ndim == 2 else made, n, -1)


def sincos_positions(rows: int, columns: int, width: int) -> np.ndarray:
    """Sines and cosines of the column in the first half, of the row in the second, as published.

    The result is [rows columns, width].
    """
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))

    def axis(positions):
        angles = np.outer(positions, frequencies)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.concatenate([axis(column), axis(row)], axis=1)
