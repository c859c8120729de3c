"""Conditioners for images: module(x [b, H, W, C], cond=None) -> features [b, H, W, F]."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.arrays import space_to_depth
from jflow._core.checks import check_whole
from jflow._core.conditions import refuse_parts
from jflow._core.linen import flatten_cond
from jflow.nets._attention import SelfAttention, per_token
from jflow.nets._embed import need_part
from jflow.nets._scanned import scanned
from jflow.types import Array, Cond, Condition


class LoopConv(nn.Module):
    """A 3 x 3 convolution, zero-padded, that is fast inside a scan.

    [b, H, W, C] -> [b, H, W, features], with the same numbers and params as nn.Conv(features, (3,
    3)), as one matrix product: nine shifted copies of the input before it, or, where the input has
    more channels than the output, nine shifted slices of its result after it. XLA's CPU backend
    compiles a convolution in a loop body to a naive one: eight scanned Glow networks of width 64,
    batch 64 on 7 x 7 and 14 x 14 images, value and gradient on two cores, took 216 ms and more with
    nn.Conv in the scan, 74 and 293 ms in this form, 46 and 200 ms with nn.Conv unrolled, whose
    compile time grows with depth.
    """

    features: int
    dtype: Any = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        f = self.features
        kernel = self.param("kernel", self.kernel_init, (3, 3, c, f))
        bias = self.param("bias", nn.initializers.zeros, (f,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        pad = ((0, 0), (1, 1), (1, 1), (0, 0))
        if c <= f:
            x = jnp.pad(x, pad)
            near = jnp.concatenate(
                [x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=-1
            )
            y = per_token(lambda rows: rows @ kernel.reshape(9 * c, f), near)
        else:
            y = per_token(lambda rows: rows @ kernel.transpose(2, 0, 1, 3).reshape(c, 9 * f), x)
            y = jnp.pad(y, pad)
            parts = [
                y[:, i : i + h, j : j + w, f * (3 * i + j) :][..., :f]
                for i in range(3)
                for j in range(3)
            ]
            y = sum(parts[1:], start=parts[0])
        return y + bias.reshape(1, 1, 1, f)


class GlowNet(nn.Module):
    """The coupling network of Glow: 3 x 3, 1 x 1 and 3 x 3 convolutions.

    `module(x [b, H, W, C], cond=None) -> [b, H, W, features]`, for `bijectors.coupling` on images.
    They have `hidden`, `hidden` and `features` channels. With the head of the coupling, which is
    zero at init, the last one is the paper's zero 3 x 3 convolution wherever `features` is at least
    the outputs of the head, but for the activation between. There is no normalization inside.

    Attributes:
        hidden: the channels of the first two convolutions.
        features: the channels of the last one.
        activation: after each convolution.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net, x = nets.GlowNet(hidden=4, features=3), jnp.zeros((1, 4, 4, 2))
        >>> jax.eval_shape(lambda key: net.init_with_output(key, x)[0], jax.random.key(0)).shape
        (1, 4, 4, 3)

    References:
        Kingma, Dhariwal, *Glow: Generative Flow with Invertible 1x1 Convolutions*, 2018,
            arXiv:1807.03039.
    """

    hidden: int = 128
    features: int = 32
    activation: Callable[[Array], Array] = nn.silu
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b H W C"], cond: Cond = None) -> Float[Array, "b H W F"]:
        """Compute the features.

        Args:
            x: the images, [b, H, W, C].
            cond: None, or a pytree of floats: images [b, f H, g W, k], of which blocks of f x g
                pixels become channels, and others [b, ...], which are flattened. Labels are to be
                embedded first. Of a `types.Condition` the vector, and aligned, an image whose
                weights start at zero: a trained network goes on as it was when it gets one.

        Returns:
            The features [b, H, W, features].
        """
        x, vector, aligned = split_cond("GlowNet", cond, x)
        h = LoopConv(self.hidden, self.dtype, name="near")(x) + _beside(self, aligned, self.hidden)
        h = self.activation(h + _everywhere(self, vector, self.hidden))
        h = self.activation(per_token(nn.Dense(self.hidden, dtype=self.dtype, name="pixel"), h))
        return self.activation(LoopConv(self.features, self.dtype, name="far")(h))


class GatedAttentionNet(nn.Module):
    """The coupling network of Flow++: gated convolutions and gated self-attention over all pixels.

    `module(x [b, H, W, C], cond=None) -> [b, H, W, width]`, for `bijectors.coupling` on images.
    After a 3 x 3 convolution to `width` channels, to which a learned position code is added, come
    `num_blocks` scanned blocks; in each, a convolutional and an attention branch do h <-
    LayerNorm(h + a * sigmoid(g)) with (a, g) linear in the branch.

    Attributes:
        width: the number of channels.
        num_blocks: the number of blocks, at least 1.
        num_heads: the number of attention heads, which divides the width.
        dropout: the rate, in the convolutional branches; a key switches it on.
        activation: between the layers.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.

    References:
        Ho, Chen, Srinivas, Duan, Abbeel, *Flow++: Improving Flow-Based Generative Models with
            Variational Dequantization and Architecture Design*, 2019, arXiv:1902.00275.
    """

    width: int = 64
    num_blocks: int = 2
    num_heads: int = 4
    dropout: float = 0.0
    activation: Callable[[Array], Array] = nn.silu
    dtype: Any = None

    def __post_init__(self):
        check_whole("GatedAttentionNet", num_blocks=self.num_blocks)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "b H W C"], cond: Cond = None) -> Float[Array, "b H W F"]:
        """Compute the features.

        Args:
            x: the images, [b, H, W, C].
            cond: None, or a pytree of floats: images [b, f H, g W, k], of which blocks of f x g
                pixels become channels, and others [b, ...], which are flattened and enter every
                block. Labels are to be embedded first. Of a `types.Condition` the vector, and
                aligned, an image whose weights start at zero: a trained network goes on as it was
                when it gets one.

        Returns:
            The features [b, H, W, width].
        """
        x, vector, aligned = split_cond("GatedAttentionNet", cond, x)
        h = LoopConv(self.width, self.dtype, name="stem")(x) + _beside(self, aligned, self.width)
        position = self.param("position", nn.initializers.normal(0.02), (*x.shape[1:3], self.width))
        h = h + position.astype(h.dtype)[None]
        blocks = scanned(_GatedAttentionBlock, self.num_blocks)
        h, _ = blocks(self.num_heads, self.dropout, self.activation, self.dtype, name="blocks")(
            h, vector
        )
        return self.activation(h)


class _GatedAttentionBlock(nn.Module):
    num_heads: int
    dropout: float
    activation: Callable[[Array], Array]
    dtype: Any

    @nn.compact
    def __call__(self, h: Array, vector: Array | None) -> tuple[Array, None]:
        b, height, width, f = h.shape
        y = LoopConv(f, self.dtype, name="near")(self.activation(h))
        y = self.activation(y + _everywhere(self, vector, f))
        y = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(y)
        h = self._add(h, y, "conv")
        y = SelfAttention(self.num_heads, dtype=self.dtype, name="attention")(
            h.reshape(b, height * width, f)
        )
        return self._add(h, y.reshape(h.shape), "attended"), None

    def _add(self, h: Array, y: Array, name: str) -> Array:
        a, gate = jnp.split(
            per_token(nn.Dense(2 * h.shape[-1], dtype=self.dtype, name=f"{name}_gate"), y),
            2,
            axis=-1,
        )
        norm = nn.LayerNorm(dtype=self.dtype, name=f"{name}_norm")
        return norm(h + a * jax.nn.sigmoid(gate)).astype(h.dtype)


def split_cond(name: str, cond: Cond, x: Array) -> tuple[Array, Array | None, Array | None]:
    """(x beside the images of cond, the rest as one vector [b, k] or None, aligned or None).

    A float leaf [b, f H, g W, k] of cond is an image; blocks of f x g of its pixels become
    channels, so that one image serves every level of a multi-scale flow, and either color of a
    checkerboard. Other float leaves are flattened. What is aligned in a `Condition` is made of such
    blocks as well, [b, H, W, f g k], or None.

    Raises:
        ValueError: cond has integer labels, which are to be embedded first, or images of a size
            that does not fit.
    """
    b, h, w, _ = x.shape
    images: list[Array] = []
    vectors: list[Array] = []
    aligned: list[Array] = []
    for part in jax.tree.leaves(cond, is_leaf=lambda part: isinstance(part, Condition)):
        if isinstance(part, Condition):
            # a label has a message of its own
            refuse_parts(name, part, ("label", "vector", "aligned"))
            aligned += [] if part.aligned is None else [part.aligned]
            part = part._replace(aligned=None)
        for leaf in jax.tree.leaves(part):
            (images if jnp.ndim(leaf) == 4 else vectors).append(leaf)
    flatten_cond(name, [*images, *aligned], b)

    def blocks(image, what):
        f, g = (size // own for size, own in zip(image.shape[1:3], (h, w), strict=False))
        if image.ndim != 4 or not f or not g or tuple(image.shape[1:3]) != (f * h, g * w):
            raise ValueError(
                f"{name}: expected {what} to be [b, {h} f, {w} g, channels] for x of "
                f"shape {list(x.shape)}, "
                f"got {list(image.shape)}"
            )
        return space_to_depth(name, image, f, g)

    beside = [blocks(image, "cond.aligned") for image in aligned]
    return (
        jnp.concatenate([x, *(blocks(image, "an image in cond") for image in images)], axis=-1),
        flatten_cond(name, vectors, b),
        jnp.concatenate(beside, axis=-1).astype(x.dtype) if beside else None,
    )


def _beside(module: nn.Module, aligned: Array | None, features: int):
    """A convolution of what is aligned with x, zero at first; 0 without it.

    To be called inside a compact method of `module`.
    """
    if aligned is None:
        need_part(module, "aligned", "aligned", module.variables.get("params", {}))
        return 0.0
    return LoopConv(features, module.dtype, nn.initializers.zeros, name="aligned")(aligned)


def _everywhere(module: nn.Module, vector: Array | None, features: int):
    """A linear image of `vector` [b, k] for every pixel, [b, 1, 1, features]; 0 without one.

    It adds as concatenating k constant channels to the input would, at the cost of one pixel. To be
    called inside a compact method of `module`.
    """
    if vector is not None:
        return nn.Dense(features, use_bias=False, dtype=module.dtype, name="cond")(vector)[
            :, None, None
        ]
    if module.has_variable("params", "cond"):
        raise ValueError(
            f"{type(module).__name__}: expected a vector in cond, as at init, got none"
        )
    return 0.0
