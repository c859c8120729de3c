"""Inception-v3 in the variant that the FID is measured with: images to 2048 features."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow.types import Array

# A branch is a chain of: (name, features, kernel size) or (..., stride), a convolution; a list of
# those, run side by side and concatenated; or a function. Names are those of torchvision's, so that
# published weights find their place.


def _average(h: Array) -> Array:
    return nn.avg_pool(h, (3, 3), padding="SAME", count_include_pad=False)


def _maximum(h: Array) -> Array:
    return nn.max_pool(h, (3, 3), padding="SAME")


def _shrink(h: Array) -> Array:
    return nn.max_pool(h, (3, 3), strides=(2, 2))


def _a(pooled: int):
    return (
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        [_average, ("branch_pool", pooled, 1)],
    )


def _b():
    return (
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
        [_shrink],
    )


def _c(width: int):
    sides = ((7, 1), (1, 7), (7, 1))
    return (
        [("branch1x1", 192, 1)],
        [("branch7x7_1", width, 1), ("branch7x7_2", width, (1, 7)), ("branch7x7_3", 192, (7, 1))],
        [
            ("branch7x7dbl_1", width, 1),
            *((f"branch7x7dbl_{i}", width, side) for i, side in enumerate(sides, 2)),
            ("branch7x7dbl_5", 192, (1, 7)),
        ],
        [_average, ("branch_pool", 192, 1)],
    )


def _d():
    return (
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3, 2),
        ],
        [_shrink],
    )


def _e(pool):
    def fork(name):
        return [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]

    return (
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), fork("branch3x3_2")],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")],
        [pool, ("branch_pool", 192, 1)],
    )


BLOCKS = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": _b(),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _d(),
    "Mixed_7b": _e(_average),
    "Mixed_7c": _e(_maximum),
}


class InceptionFID(nn.Module):
    """Inception-v3 in the variant that the FID is measured with: images to 2048 features.

    `module(x [b, H, W, 3], values in [0, 1]) -> features [b, 2048]`, the average over the last
    feature map ("pool3"). Images are resized to 299 x 299 (bilinear, pixel centers at halves, no
    antialiasing: as pytorch-fid does, whose numbers these features give; other implementations
    resize differently, and their FIDs differ), then scaled to [-1, 1]. Batch norms are folded into
    the convolutions: params are a kernel and a bias for each of the 94, which `convert.inception`
    makes of published weights. No gradient is meant to be taken.

    The variant is that of the TensorFlow graph of 2015-12-05, which pytorch-fid rebuilt: unlike in
    other Inceptions, the 3 x 3 average pools do not count padding, and the last block pools by the
    maximum.

    Attributes:
        resize: whether images are resized; with False they keep their size, of at least 75 x 75.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.

    Raises:
        ValueError: the images have another shape, or values of an integer type, at the call.

    References:
        Szegedy et al., *Rethinking the Inception Architecture for Computer Vision*, 2016,
            arXiv:1512.00567.
        Heusel et al., *GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
            Equilibrium*, 2017, arXiv:1706.08500.
    """

    resize: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Compute the features.

        Args:
            x: the images, [b, H, W, 3], floats in [0, 1]; gray ones are repeated to three channels
                first.

        Returns:
            The features [b, 2048], in float32 or better.
        """
        if x.ndim != 4 or x.shape[-1] != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                "InceptionFID: expected images of shape [b, H, W, 3], floats in [0, 1] (gray ones "
                "repeated to three "
                f"channels), got {x.dtype} {list(x.shape)}"
            )
        if not self.resize and min(x.shape[1:3]) < 75:
            raise ValueError(
                "InceptionFID: expected images of at least 75 x 75 without resize, got "
                f"{list(x.shape)}"
            )
        if self.resize:
            x = jax.image.resize(x, (x.shape[0], 299, 299, 3), "bilinear", antialias=False)
        h = 2 * x - 1
        h = self._conv(h, "Conv2d_1a_3x3", 32, 3, 2)
        h = self._conv(h, "Conv2d_2a_3x3", 32, 3, padding="VALID")
        h = _shrink(self._conv(h, "Conv2d_2b_3x3", 64, 3))
        h = self._conv(h, "Conv2d_3b_1x1", 80, 1)
        h = _shrink(self._conv(h, "Conv2d_4a_3x3", 192, 3, padding="VALID"))
        for name, branches in BLOCKS.items():
            h = jnp.concatenate([self._branch(name, branch, h) for branch in branches], axis=-1)
        return jnp.mean(h, axis=(1, 2), dtype=float_dtype(h))

    def _branch(self, block: str, chain, h: Array) -> Array:
        for part in chain:
            if callable(part):
                h = part(h)
            elif isinstance(part, list):
                h = jnp.concatenate(
                    [self._conv(h, f"{block}.{name}", *size) for name, *size in part], axis=-1
                )
            else:
                name, *size = part
                h = self._conv(h, f"{block}.{name}", *size)
        return h

    def _conv(
        self, h: Array, name: str, features: int, kernel, stride: int = 1, padding: str = ""
    ) -> Array:
        """A convolution and a ReLU; 'SAME' where the stride is 1, 'VALID' where it is 2."""
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = padding or ("SAME" if stride == 1 else "VALID")
        return nn.relu(
            nn.Conv(features, size, (stride, stride), padding, dtype=self.dtype, name=name)(h)
        )
