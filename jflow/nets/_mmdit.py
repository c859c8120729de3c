"""MMDiT: the tokens of an image and of a text, in two streams that attend to each other."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jflow._core.arrays import float_dtype, patchify, unpatchify
from jflow._core.checks import check_whole
from jflow._core.conditions import as_condition, read_parts
from jflow._core.positions import centered_positions
from jflow.nets._attention import (
    attend,
    check_attention,
    dot_product_attention,
    merged,
    per_token,
    rotated,
    split_heads,
)
from jflow.nets._dit import modulation
from jflow.nets._embed import check_time, time_features
from jflow.nets._normalization import (
    LayerNorm,
    Norm,
    Norms,
    RMSNorm,
    normed,
    placed,
)
from jflow.nets._scanned import scanned
from jflow.types import Array, Cond

_xavier = nn.initializers.xavier_uniform()
_zeros = nn.initializers.zeros


class MMDiT(nn.Module):
    """MMDiT: the transformer of Stable Diffusion 3 and 3.5 on an image and a text, as a velocity.

    `module(x [b, H, W, C], t [b], cond, r=None) -> shaped like x`, with `cond =
    Condition(context=[b, n, k] tokens of the text, vector=[b, m] pooled text)`. Patches and text
    are two streams of tokens with weights of their own, joined in every attention; the last block
    reads the text and leaves it. Blocks of one kind are scanned, and zero at initialization as in
    DiT.

    The published sizes have a width of 64 num_layers and num_layers heads: 24 layers in SD3-medium,
    24 with qk_norm, dual_layers=13 and grid_size=384 in SD3.5-medium, 38 with qk_norm in
    SD3.5-large. Their x are latents of 16 channels, their text 4096 and 2048 numbers,
    time_scale=1000. They predict noise - data at sigma = 1 - t: `paths.from_noise_time(field(net))`
    is their velocity.

    Attributes:
        patch_size: the side of a patch, in pixels.
        width: of the tokens.
        num_layers: the number of blocks, the last included; at least 2.
        num_heads: the number of attention heads, which divides the width.
        dual_layers: the number of blocks, from the first, that have a second attention, among the
            tokens of the image alone; below num_layers.
        qk_norm: whether queries and keys are divided by their root mean square and scaled.
        mlp_ratio: the hidden width of the MLP of a block, in widths.
        grid_size: the side, in patches, of the square grid of positions; an image lies at its
            center.
        grid_step: the distance of neighboring positions, in radians of the highest frequency.
        time_scale: the largest angular frequency of the features of time, in radians per unit of t;
            see `time_features`.
        remat: whether each block is computed again in the backward pass, which saves memory.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params. Means, variances and softmax are in float32.
        attention_fn: a function `attention_fn(q, k, v)`; see `SelfAttention`. Where cond has a mask
            it is called with mask=[b, m] bool, the keys that are seen.
        norm: a function that makes the normalizations, such as `RMSNorm`, or a `Norms`, which says
            where they stand, such as `peri_norm()`; its queries_keys come before qk_norm. Those in
            front of a branch have no weights.

    Raises:
        ValueError: patch_size does not divide H and W, num_heads the width, or 4 the width; the
            image is larger than the grid; cond lacks its context or its vector; x, context or
            vector have other sizes than the params.
        TypeError: norm is neither, or attention_fn is no function.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> from jflow.types import Condition
        >>> net = nets.MMDiT(width=8, num_layers=2, num_heads=1)
        >>> x, t = jnp.ones((1, 4, 6, 3)), jnp.zeros(1)
        >>> text = Condition(context=jnp.ones((1, 5, 4)), vector=jnp.ones((1, 2)))
        >>> params = jax.eval_shape(net.init, jax.random.key(0), x, t, text)
        >>> jax.eval_shape(net.apply, params, x, t, text).shape
        (1, 4, 6, 3)

    References:
        Esser et al., *Scaling Rectified Flow Transformers for High-Resolution Image Synthesis*,
            2024, arXiv:2403.03206.
    """

    patch_size: int = 2
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    dual_layers: int = 0
    qk_norm: bool = False
    mlp_ratio: int = 4
    grid_size: int = 192
    grid_step: float = 1 / 3
    time_scale: float = 100.0
    remat: bool = False
    dtype: Any = None
    attention_fn: Callable[..., Array] = dot_product_attention
    norm: Norm | Norms = LayerNorm

    def __post_init__(self):
        check_attention("MMDiT", self.attention_fn)
        placed("MMDiT", self.norm)
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(
                f"MMDiT: expected a width divisible by 4 and by num_heads={self.num_heads}, got "
                f"{self.width}"
            )
        check_whole("MMDiT", num_layers=self.num_layers, patch_size=self.patch_size)
        if self.num_layers < 2 or not 0 <= self.dual_layers < self.num_layers:
            raise ValueError(
                "MMDiT: expected at least 2 layers, of which fewer are dual, got num_layers="
                f"{self.num_layers} and dual_layers={self.dual_layers}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None, r: Array | None = None) -> Array:
        """Predict the velocity.

        Args:
            x: the images, or latents, [b, H, W, C].
            t: the times, [b].
            cond: `Condition(context=[b, n, k], vector=[b, m])`, with a mask [b, n] of the tokens
                that count or without.
            r: the times that a flow map goes to, [b]; None for a velocity. The network reads r - t.

        Returns:
            The velocity, with the shape and type of x.
        """
        p = self.patch_size
        h, text, c, mask = enter(self, x, t, cond, r)
        rows, columns = x.shape[1] // p, x.shape[2] // p
        if max(rows, columns) > self.grid_size:
            raise ValueError(
                f"MMDiT: expected at most grid_size={self.grid_size} rows and columns of patches, "
                f"got {rows} and {columns}"
            )

        positions = centered_positions(rows, columns, self.grid_size, self.grid_step, self.width)
        h = h + jnp.asarray(positions, h.dtype)[None]

        norms = placed("MMDiT", self.norm)
        if self.qk_norm and norms.queries_keys is None:
            norms = norms._replace(queries_keys=RMSNorm)
        options = self.num_heads, self.mlp_ratio, self.dtype, norms, self.attention_fn
        carry = first_normed(norms, h, text, self.dtype)
        if self.dual_layers:
            dual = scanned(JointBlock, self.dual_layers, self.remat)
            carry, _ = dual(*options, dual=True, name="dual_blocks")(carry, c, mask)
        if plain := self.num_layers - 1 - self.dual_layers:
            blocks = scanned(JointBlock, plain, self.remat)
            carry, _ = blocks(*options, name="blocks")(carry, c, mask)
        last = nn.remat(JointBlock) if self.remat else JointBlock
        (h, _), _ = last(*options, last=True, name="last_block")(carry, c, mask)
        return leave(normed(norms.pre, h, self.dtype, "norm", False), c, x, p, self.dtype)


class JointBlock(nn.Module):
    """One block on (image [b, n, width], context [b, m, width]), modulated by c [b, width].

    It is the identity at initialization. `turns`, cosines and sines [m + n, size / 2], turn queries
    and keys.
    """

    num_heads: int
    mlp_ratio: int
    dtype: Any
    norms: Norms
    attention_fn: Callable[..., Array] = dot_product_attention
    dual: bool = False
    last: bool = False

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Array],
        c: Array,
        mask: Array | None = None,
        turns: tuple[Array, Array] | None = None,
    ) -> tuple[tuple[Array, Array], None]:
        image, context = carry
        m = context.shape[1]
        options = self.num_heads, self.mlp_ratio, self.dtype, self.norms
        stream = partial(Stream, c.shape[-1], *options)
        of_image = stream(dual=self.dual, name="image")
        of_context = stream(last=self.last, name="context")

        image_heads, image_rest = of_image.enter(image, c)
        context_heads, context_rest = of_context.enter(context, c)
        q, k, v = (
            jnp.concatenate(pair, axis=1) for pair in zip(context_heads, image_heads, strict=True)
        )
        if turns is not None:
            q, k = rotated(q, turns), rotated(k, turns)
        y = attend(self.attention_fn, q, k, v, whole_mask(mask, image.shape[1]))

        image = of_image.leave(image, y[:, m:], image_rest, self.attention_fn)
        if not self.last:
            context = of_context.leave(context, y[:, :m], context_rest, self.attention_fn)
        return (image, context), None


class Stream(nn.Module):
    """What one kind of tokens has for itself in a joint block, before and after the attention.

    With `dual` it has a second attention, among its own tokens; the `last` has nothing after the
    attention.
    """

    width: int
    num_heads: int
    mlp_ratio: int
    dtype: Any
    norms: Norms
    dual: bool = False
    last: bool = False

    def setup(self):
        dense = partial(nn.Dense, kernel_init=_xavier, dtype=self.dtype)
        self.chunks = 2 if self.last else 9 if self.dual else 6
        self.modulation = nn.Dense(self.chunks * self.width, kernel_init=_zeros, dtype=self.dtype)
        norms = self.norms
        norm = lambda make, **options: make and make(dtype=self.dtype, **options)  # noqa: E731
        self.attention_norm = norm(norms.pre, affine=False)
        self.heads = Heads(self.num_heads, norms.queries_keys, self.dtype)
        if self.dual:
            self.own_heads = Heads(self.num_heads, norms.queries_keys, self.dtype)
            self.own_head_norm = norm(norms.heads)
            self.own_out, self.own_after = dense(self.width), norm(norms.after_attention)
            self.own_join = norm(norms.join)
        if not self.last:
            self.head_norm = norm(norms.heads)
            self.out, self.attention_after = dense(self.width), norm(norms.after_attention)
            self.attention_join, self.mlp_join = norm(norms.join), norm(norms.join)
            self.mlp_norm, self.hidden_norm = norm(norms.pre, affine=False), norm(norms.hidden)
            self.mlp_in, self.mlp_out = dense(self.mlp_ratio * self.width), dense(self.width)
            self.mlp_after = norm(norms.after_mlp)

    def enter(self, h, c):
        """(q, k, v) of the joint attention, and what `leave` needs."""
        shift, scale, *rest = jnp.split(self.modulation(c)[:, None], self.chunks, -1)
        y = self.attention_norm(h)
        return self.heads(y * (1 + scale) + shift), (y, rest)

    def leave(self, h, attended, rest, attention_fn):
        """The tokens after the attention and the MLP."""
        y, (gate, shift, scale, mlp_gate, *own) = rest
        attended = per_token(self.out, merged(_maybe(self.head_norm, attended)))
        h = _joined(self.attention_join, h, _maybe(self.attention_after, attended), gate)
        if self.dual:
            own_shift, own_scale, own_gate = own
            attended = attend(attention_fn, *self.own_heads(y * (1 + own_scale) + own_shift))
            attended = per_token(self.own_out, merged(_maybe(self.own_head_norm, attended)))
            h = _joined(self.own_join, h, _maybe(self.own_after, attended), own_gate)
        y = self.mlp_norm(h) * (1 + scale) + shift
        inner = lambda y: _maybe(self.hidden_norm, nn.gelu(self.mlp_in(y)))  # noqa: E731
        y = _maybe(self.mlp_after, per_token(lambda y: self.mlp_out(inner(y)), y))
        return _joined(self.mlp_join, h, y, mlp_gate)


def _maybe(norm, y):
    return y if norm is None else norm(y)


def _joined(join, h, branch, gate):
    return h + gate * branch if join is None else join(h, branch, gate)


class Heads(nn.Module):
    """Queries, keys and values [b, n, heads, size] of tokens [b, n, width]."""

    num_heads: int
    qk_norm: Norm | None
    dtype: Any

    @nn.compact
    def __call__(self, h: Array) -> tuple[Array, Array, Array]:
        qkv = nn.Dense(3 * h.shape[-1], kernel_init=_xavier, dtype=self.dtype, name="qkv")
        q, k, v = split_heads(per_token(qkv, h), self.num_heads)
        q = normed(self.qk_norm, q, self.dtype, "q_norm")
        return q, normed(self.qk_norm, k, self.dtype, "k_norm"), v


class TextEmbed(nn.Module):
    """The embedding of time, of a pooled text, of a guidance scale, and of r - t, as one vector.

    What r adds is zero at initialization, as in `TimeCondEmbed`.
    """

    width: int
    time_scale: float
    guidance: float | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, t: Array, vector: Array, r: Array | None = None) -> Array:
        h = self._mlp(self._features(t), "time") + self._mlp(vector, "vector")
        if self.guidance is not None:
            guidance = jnp.full_like(t, self.guidance, dtype=float_dtype(t))
            h = h + self._mlp(self._features(guidance), "guidance")
        if r is not None:
            h = h + self._mlp(self._features(r - t), "gap", _zeros)
        return h

    def _features(self, t: Array) -> Array:
        return time_features(t, 256, scale=self.time_scale)

    def _mlp(self, h: Array, name: str, out_init=nn.linear.default_kernel_init) -> Array:
        h = nn.silu(nn.Dense(self.width, dtype=self.dtype, name=f"{name}_in")(h))
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=out_init, name=f"{name}_out")(h)


def enter(
    module: Any, x: Array, t: Array, cond: Cond, r: Array | None, guidance: float | None = None
) -> tuple[Array, Array, Array, Array | None]:
    """(the tokens of the image, those of the text, the embedding of time and of the pooled text
    after its nonlinearity, the mask of the text), checked.

    To be called inside a compact method.
    """
    name, p = type(module).__name__, module.patch_size
    check_image(module, x, p)
    check_time(name, x, t, r)
    context, vector, mask = text_parts(module, x, cond)
    dense = partial(nn.Dense, module.width, kernel_init=_xavier, dtype=module.dtype)
    h = per_token(dense(name="patches"), patchify(x, p))
    text = per_token(dense(name="context"), context).astype(h.dtype)
    embed = TextEmbed(module.width, module.time_scale, guidance, module.dtype, name="embed")
    c = nn.silu(embed(t, vector, r)).astype(h.dtype)  # the scan's carry keeps one type
    return h, text, c, mask


def leave(h: Array, c: Array, x: Array, p: int, dtype) -> Array:
    """Normed tokens h, modulated by c, as an image shaped like x.

    To be called inside a compact method.
    """
    shift, scale = modulation(c, 2, dtype)
    h = h * (1 + scale) + shift
    head = nn.Dense(
        p * p * x.shape[-1], kernel_init=_zeros, name="head"
    )  # in the params' precision
    return unpatchify(per_token(head, h), x.shape[1] // p, x.shape[2] // p, p).astype(x.dtype)


def first_normed(norms: Norms, h: Array, text: Array, dtype: Any) -> tuple[Array, Array]:
    """The tokens of the image and of the text in front of the first block.

    To be called inside a compact method.
    """
    image = normed(norms.first, h, dtype, "first_norm").astype(h.dtype)
    return image, normed(norms.first, text, dtype, "first_context_norm").astype(h.dtype)


def whole_mask(mask: Array | None, n: int) -> Array | None:
    """The mask [b, m] of the context before n tokens that all count, [b, m + n]."""
    if mask is None:
        return None
    return jnp.pad(mask, ((0, 0), (0, n)), constant_values=True)


def check_image(module: nn.Module, x: Array, p: int) -> None:
    """Raise unless x is [b, H, W, C] in whole patches of the size that the params are for."""
    name = type(module).__name__
    if x.ndim != 4 or x.shape[1] % p or x.shape[2] % p:
        raise ValueError(
            f"{name}: expected x of shape [b, H, W, C], H and W divisible by {p}, got "
            f"{list(x.shape)}"
        )
    made = inputs_of(module, "patches")
    if made is not None and made != p * p * x.shape[-1]:
        raise ValueError(
            f"{name}: expected patches of {made} numbers, for which its params are, got "
            f"patch_size={p} and {x.shape[-1]} channels, {p * p * x.shape[-1]} numbers"
        )


def text_parts(module: nn.Module, x: Array, cond: Cond) -> tuple[Array, Array, Array | None]:
    """(context, vector, mask) of a cond; raise where one is missing or is not as the params are."""
    name = type(module).__name__
    parts = read_parts(name, as_condition(name, cond), x, ("context", "vector", "mask"))
    for part, kernel in (("context", ("context",)), ("vector", ("embed", "vector_in"))):
        value, made = getattr(parts, part), inputs_of(module, *kernel)
        if value is None:
            have = [part for part, value in parts._asdict().items() if value is not None]
            raise ValueError(
                f"{name}: expected cond.{part}, got {have or None}: "
                "Condition(context=[b, n, k], vector=[b, m])"
            )
        if made not in (None, value.shape[-1]):
            raise ValueError(
                f"{name}: expected cond.{part} of {made} numbers, for which its params are, got "
                f"{list(value.shape)}"
            )
    context, mask = parts.context, parts.mask
    if mask is not None:  # padding may hold anything, NaN too
        context = jnp.where(mask[..., None], context, jnp.zeros_like(context))
    return context, parts.vector, mask


def inputs_of(module: nn.Module, *path: str) -> int | None:
    """How many inputs the kernel at a path of the params has; None before they are made."""
    params: Any = module.variables.get("params", {})
    for name in (*path, "kernel"):
        params = params.get(name)
        if params is None:
            return None
    return params.shape[0]
