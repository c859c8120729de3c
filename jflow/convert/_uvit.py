"""Published weights of U-ViT, for `nets.UViT`."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow.convert._adm import conv
from jflow.convert._layouts import (
    LINEAR,
    Layout,
    Transform,
    Weight,
    count_blocks,
    dense,
    load,
    shapes_of,
)
from jflow.convert._parts import heads_of, norm, patch_kernel, shape_of
from jflow.convert._safetensors import tensors_of
from jflow.nets import UViT
from jflow.types import Params

HEADS = {512: 8, 768: 12, 1024: 16, 1152: 16}  # of the published widths


def uvit(
    files: str | Path | Mapping[str, np.ndarray],
    image_size: tuple[int, int],
    *,
    num_heads: int | None = None,
    prefix: str = "",
    dtype: Any = None,
    sharding: Any = None,
) -> tuple[UViT, Params]:
    """A `nets.UViT` and its params from the published weights of U-ViT.

    The sizes come from the shapes. The network reads time and predicts noise as it was published
    (time_scale=1), at times 0 to 999, of which 0 is data. The last row of a table of labels is the
    null label; weights without one have a class there. No published file was opened when this was
    written: the names are those of the authors' code.

    Args:
        files: what `read_safetensors` takes, or the tensors that it returned.
        image_size: the height and width of x, in pixels or sites of latents, for which the
            positions were learned.
        num_heads: the number of attention heads, which the shapes do not tell. None for the
            published widths 512, 768, 1024 and 1152.
        prefix: of the names; see `load`.
        dtype: of the params; see `load`.
        sharding: where the params go; see `load`.

    Returns:
        The network, which `net.clone(remat=True)` and the like change, and its params.

    Raises:
        ValueError: the weights are not those of a U-ViT: what is missing, unknown or of another
            shape is named; or num_heads is needed.

    Examples:
        >>> import jflow
        >>> from jflow import convert
        >>> net, params = convert.uvit("imagenet256_uvit.safetensors", (32, 32))  # doctest: +SKIP
        >>> field = jflow.field(net)  # doctest: +SKIP
        >>> noise = field.apply(params, latents, t, labels)  # doctest: +SKIP

    References:
        Bao et al., *All are Worth Words: A ViT Backbone for Diffusion Models*, 2022,
            arXiv:2209.12152.
    """
    tensors = tensors_of(files)
    of = partial(shape_of, "uvit", "U-ViT", tensors)
    width, channels, patch, _ = of(prefix + "patch_embed.proj.weight", 4)
    labels = prefix + "label_emb.weight" in tensors
    net = UViT(
        patch_size=patch,
        width=width,
        num_layers=2 * count_blocks(tensors, prefix + "in_blocks."),
        num_heads=heads_of("uvit", num_heads, width, HEADS),
        mlp_ratio=of(prefix + "mid_block.mlp.fc1.weight", 2)[0] // width,
        num_classes=of(prefix + "label_emb.weight", 2)[0] - 1 if labels else None,
        conv=prefix + "final_layer.weight" in tensors,
        time_scale=1.0,
    )
    x, t = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, *image_size, channels), (1,)))
    like = shapes_of(net, x, t)
    layout = uvit_layout(net)
    return net, load(tensors, layout, like, prefix=prefix, dtype=dtype, sharding=sharding)


def uvit_layout(net: UViT) -> Layout:
    """The names of the weights of U-ViT in the files of its authors.

    Args:
        net: the network.

    Returns:
        The layout, for `load` and `save`.

    Examples:
        >>> from jflow import convert, nets
        >>> convert.uvit_layout(nets.UViT()).weights[0].keys
        'patch_embed.proj.weight'

    References:
        Bao et al., *All are Worth Words: A ViT Backbone for Diffusion Models*, 2022,
            arXiv:2209.12152.
    """
    half = range(net.num_layers // 2)
    positions = Transform(lambda w: w[0], lambda w: w[None])
    rows = [
        Weight("patch_embed.proj.weight", "patches/kernel", patch_kernel(net.patch_size)),
        Weight("patch_embed.proj.bias", "patches/bias"),
        Weight("pos_embed", "positions", positions),
        *norm("norm", "norm"),
        *dense("decoder_pred", "head"),
    ]
    if net.num_classes is not None:
        rows.append(Weight("label_emb.weight", "labels/embedding"))
    if net.conv:
        rows += conv("final_layer", "conv")
    for path, of, blocks in (
        ("in_blocks", "in_blocks.{}.", half),
        ("mid_block", "mid_block.", None),
        ("out_blocks", "out_blocks.{}.", half),
    ):
        rows += norm(f"{of}norm1", f"{path}/attention_norm", blocks)
        rows.append(Weight(f"{of}attn.qkv.weight", f"{path}/qkv/kernel", LINEAR, blocks))
        rows += dense(f"{of}attn.proj", f"{path}/out", blocks)
        rows += norm(f"{of}norm2", f"{path}/mlp_norm", blocks)
        rows += dense(f"{of}mlp.fc1", f"{path}/mlp_in", blocks)
        rows += dense(f"{of}mlp.fc2", f"{path}/mlp_out", blocks)
    rows += dense("out_blocks.{}.skip_linear", "out_blocks/skip", half)
    return Layout("U-ViT", tuple(rows))
