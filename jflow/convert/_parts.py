"""What the loaders and layouts of several networks have in common."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jflow.convert._layouts import Transform, Weight, some


def shape_of(
    loader: str, model: str, tensors: Mapping[str, Any], name: str, ndim: int
) -> tuple[int, ...]:
    """The shape of a tensor from which the sizes of the network follow."""
    shape = np.shape(tensors.get(name, 0))
    if len(shape) == ndim:
        return shape
    longer = next((key for key in tensors if key.endswith("." + name)), None)
    if name in tensors:
        given = f"one of shape {list(shape)}"
    elif longer:
        given = f"{longer!r}: give prefix={longer.removesuffix(name)!r}"
    else:
        given = f"{len(tensors)} others: {some(list(tensors)) or 'none'}"
    raise ValueError(
        f"{loader}: expected the weights of {model} with a tensor {name!r} of {ndim} axes, got "
        f"{given}"
    )


def heads_of(loader: str, num_heads: int | None, width: int, known: Mapping[int, int]) -> int:
    """num_heads, or that of a published width."""
    if num_heads is None and width not in known:
        raise ValueError(
            f"{loader}: expected num_heads, which the shapes of a network of width {width} do not "
            f"tell; it is known for the published widths {list(known)}"
        )
    return num_heads or known[width]


def norm(
    key: str, path: str, blocks: range | tuple[range, ...] | None = None
) -> tuple[Weight, Weight]:
    """The two rows of a norm with a scale and a bias."""
    return (
        Weight(f"{key}.weight", f"{path}/scale", blocks=blocks),
        Weight(f"{key}.bias", f"{path}/bias", blocks=blocks),
    )


def patch_kernel(p: int) -> Transform:
    """A convolution [D, C, p, p] of patches as the kernel [p p C, D] of a Dense."""
    return Transform(
        lambda w: w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0]),
        lambda w: w.reshape(p, p, -1, w.shape[-1]).transpose(3, 2, 0, 1),
    )
