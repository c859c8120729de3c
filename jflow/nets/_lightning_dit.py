"""LightningDiT: DiT with root-mean-square norms, gated MLPs and rotated queries and keys."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import float_dtype, patchify
from jflow._core.checks import check_whole
from jflow.nets._attention import (
    attend,
    check_attention,
    dot_product_attention,
    merged,
    per_token,
    rotated,
    split_heads,
)
from jflow.nets._dit import check_blocks, modulation, own_copy, sincos_positions
from jflow.nets._embed import TimeCondEmbed, check_time, read_cond
from jflow.nets._flux import rope_angles
from jflow.nets._mmdit import check_image, leave
from jflow.nets._normalization import Norm, Norms, RMSNorm, joined, normed, placed
from jflow.nets._scanned import scanned
from jflow.types import Array, Cond

_xavier = nn.initializers.xavier_uniform()


class LightningDiT(nn.Module):
    """LightningDiT: a DiT with the parts of a modern language model, as a velocity network.

    `module(x [b, H, W, C], t [b], cond=None, r=None) -> shaped like x`, zero at initialization. As
    `DiT`, with root-mean-square norms that have a scale of their own, MLPs (silu(a) * b) W whose a
    and b are linear, and positions twice: the table of sines that is added to the tokens, and
    queries and keys that are turned by their row and column (RoPE). The blocks are scanned. The
    time may be one for each token, t [b, n] with n = H W / patch_size^2, row by row.

    The published sizes are width, num_layers, num_heads = 768, 12, 12 (B), 1024, 24, 16 (L), 1152,
    28, 16 (XL), 1536, 24, 24 (1p0B) and 1792, 28, 28 (1p6B). They read t in [0, 1] itself, which is
    time_scale=1, on latents of 32 channels with patch_size=1.

    Attributes:
        patch_size: the side of a patch, in pixels.
        width: of the tokens.
        num_layers: the number of blocks.
        num_heads: the number of attention heads; the size of a head, width / num_heads, is
            divisible by 4.
        mlp_ratio: two thirds of it are the hidden width of the MLP of a block, in widths.
        num_classes: the number of classes where cond has integer labels [b]. Index num_classes is
            the null label, which cond=None then means too.
        qk_norm: whether queries and keys are divided by their root mean square and scaled.
        shift: whether time and cond shift the tokens of a block, besides scaling them.
        time_scale: the largest angular frequency of the features of time, in radians per unit of t;
            see `time_features`.
        remat: whether each block is computed again in the backward pass, which saves memory.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params. Mean squares, rotations and softmax are in
            float32.
        attention_fn: a function `attention_fn(q, k, v)`; see `SelfAttention`.
        norm: a function that makes the normalizations, such as `LayerNorm`, or a `Norms`, which
            says where they stand, such as `peri_norm()`; its queries_keys come before
            qk_norm.
        mlp: a Linen module (tokens [b, n, width]) -> tokens in the place of the MLP of each block,
            such as `MixtureOfExperts(8)`; see `DiT`.

    Raises:
        ValueError: patch_size does not divide H and W, or 4 num_heads the width; x has other
            patches than the params.
        TypeError: norm is neither, attention_fn is no function, or mlp is no Linen module.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.LightningDiT(width=8, num_layers=1, num_heads=1)
        >>> x, t = jnp.ones((1, 4, 6, 1)), jnp.zeros(1)
        >>> jax.eval_shape(lambda key: net.init_with_output(key, x, t)[0], jax.random.key(0)).shape
        (1, 4, 6, 1)

    References:
        Yao, Yang, Wang, *Reconstruction vs. Generation: Taming Optimization Dilemma in Latent
            Diffusion Models*, 2025, arXiv:2501.01423.
        Su et al., *RoFormer: Enhanced Transformer with Rotary Position Embedding*, 2021,
            arXiv:2104.09864.
    """

    patch_size: int = 1
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_ratio: int = 4
    num_classes: int | None = None
    qk_norm: bool = False
    shift: bool = True
    time_scale: float = 100.0
    remat: bool = False
    dtype: Any = None
    attention_fn: Callable[..., Array] = dot_product_attention
    norm: Norm | Norms = RMSNorm
    mlp: nn.Module | None = None

    def __post_init__(self):
        check_attention("LightningDiT", self.attention_fn)
        check_blocks("LightningDiT", self.mlp, None, placed("LightningDiT", self.norm))
        check_whole(
            "LightningDiT",
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            patch_size=self.patch_size,
        )
        if self.width % (4 * self.num_heads):
            raise ValueError(
                "LightningDiT: expected a width divisible by 4 num_heads="
                f"{4 * self.num_heads}, got {self.width}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None, r: Array | None = None) -> Array:
        """Predict the velocity.

        Args:
            x: the images, or latents, [b, H, W, C].
            t: the times, [b], or [b, n] along the tokens.
            cond: None, integer labels [b], floats [b, k], a pytree of them, or the label and the
                vector of a `types.Condition`.
            r: the times that a flow map goes to, shaped like t; None for a velocity. The network
                reads r - t.

        Returns:
            The velocity, with the shape and type of x.
        """
        p = self.patch_size
        check_image(self, x, p)
        rows, columns = x.shape[1] // p, x.shape[2] // p
        check_time("LightningDiT", x, t, r, rows * columns)
        cond, _ = read_cond("LightningDiT", cond, x, ("label", "vector"))

        dense = partial(nn.Dense, kernel_init=_xavier, dtype=self.dtype)
        h = per_token(dense(self.width, name="patches"), patchify(x, p))
        h = h + jnp.asarray(sincos_positions(rows, columns, self.width), h.dtype)[None]
        embed = TimeCondEmbed(
            self.width, self.num_classes, time_scale=self.time_scale, dtype=self.dtype, name="embed"
        )
        c = nn.silu(embed(t, cond, r)).astype(h.dtype)  # the scan's carry keeps one type
        half = self.width // self.num_heads // 2
        angles = rope_angles(0, rows, columns, (0, half, half))
        turns = tuple(jnp.asarray(f(angles), float_dtype(h)) for f in (np.cos, np.sin))
        norms = placed("LightningDiT", self.norm)
        if self.qk_norm and norms.queries_keys is None:
            norms = norms._replace(queries_keys=RMSNorm)
        h = normed(norms.first, h, self.dtype, "first_norm").astype(h.dtype)
        blocks = scanned(LightningBlock, self.num_layers, self.remat)(
            self.num_heads,
            self.mlp_ratio,
            self.shift,
            self.dtype,
            self.attention_fn,
            norms,
            own_copy(self.mlp, self.dtype),
            name="blocks",
        )
        h, _ = blocks(h, c, turns)

        return leave(normed(norms.pre, h, self.dtype, "norm"), c, x, p, self.dtype)


class LightningBlock(nn.Module):
    """One block on tokens h [b, n, width], modulated by c [b, width] or [b, n, width].

    It is the identity at initialization. `turns`, cosines and sines [n, size / 2], turn queries and
    keys.
    """

    num_heads: int
    mlp_ratio: int
    shift: bool
    dtype: Any
    attention_fn: Callable[..., Array]
    norms: Norms
    mlp: nn.Module | None = None

    @nn.compact
    def __call__(self, h: Array, c: Array, turns: tuple[Array, Array]) -> tuple[Array, None]:
        width = h.shape[-1]
        dense = partial(nn.Dense, kernel_init=_xavier, dtype=self.dtype)
        if self.shift:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(c, 6, self.dtype)
        else:
            scale_a, gate_a, scale_m, gate_m = modulation(c, 4, self.dtype)
            shift_a = shift_m = jnp.zeros_like(scale_a)

        norms, norm = self.norms, partial(normed, dtype=self.dtype)
        y = norm(norms.pre, h, name="attention_norm") * (1 + scale_a) + shift_a
        q, k, v = split_heads(per_token(dense(3 * width, name="qkv"), y), self.num_heads)
        q = norm(norms.queries_keys, q, name="q_norm")
        k = norm(norms.queries_keys, k, name="k_norm")
        y = attend(self.attention_fn, rotated(q, turns), rotated(k, turns), v)
        y = merged(norm(norms.heads, y, name="head_norm"))
        y = per_token(dense(width, name="attention_out"), y)
        y = norm(norms.after_attention, y, name="attention_after")
        h = joined(norms, h, y, gate_a, self.dtype, "attention_join")

        y = norm(norms.pre, h, name="mlp_norm") * (1 + scale_m) + shift_m
        if self.mlp is None:
            hidden = int(2 / 3 * self.mlp_ratio * width)  # rounded as published
            enter, leave = dense(2 * hidden, name="mlp_in"), dense(width, name="mlp_out")

            def gated(y):
                gate, value = jnp.split(enter(y), 2, axis=-1)
                return leave(norm(norms.hidden, nn.silu(gate) * value, name="hidden_norm"))

            y = per_token(gated, y)
        else:
            y = self.mlp(y).astype(h.dtype)
        y = norm(norms.after_mlp, y, name="mlp_after")
        return joined(norms, h, y, gate_m, self.dtype, "mlp_join"), None
