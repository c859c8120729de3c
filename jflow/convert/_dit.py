"""Published weights of DiT and SiT, for `nets.DiT`."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.positions import table_rows
from jflow.convert._layouts import (
    Constant,
    Layout,
    Transform,
    Weight,
    count_blocks,
    dense,
    load,
    shapes_of,
)
from jflow.convert._parts import heads_of, patch_kernel, shape_of
from jflow.convert._safetensors import tensors_of
from jflow.nets import DiT, LightningDiT
from jflow.types import Params

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the published widths


def dit(
    files: str | Path | Mapping[str, np.ndarray],
    *,
    num_heads: int | None = None,
    prefix: str = "",
    dtype: Any = None,
    sharding: Any = None,
) -> tuple[DiT, Params]:
    """A `nets.DiT` and its params from the published weights of SiT or DiT.

    The sizes come from the shapes; both the authors' layout and that of diffusers are read. The
    network reads time as it was published (time_scale=1): SiT is a velocity x1 - x0 as it is, t in
    [0, 1]; DiT predicts noise at integer times 0 to 999, of which 0 is data. Of networks with
    learned variances (twice as many channels out as in) the first half is kept, the prediction.
    No published file was opened when this was written: the names are those of the authors' code.

    Args:
        files: what `read_safetensors` takes, or the tensors that it returned.
        num_heads: the number of attention heads, which the shapes do not tell. None for the
            published widths 384, 768, 1024 and 1152.
        prefix: of the names; see `load`.
        dtype: of the params; see `load`.
        sharding: where the params go; see `load`.

    Returns:
        The network, which `net.clone(remat=True)` and the like change, and its params.

    Raises:
        ValueError: the weights are not those of a DiT: what is missing, unknown or of another shape
            is named; or num_heads is needed.

    Examples:
        >>> from jflow import convert, nets
        >>> net, params = convert.dit("SiT-XL-2-256.safetensors")  # doctest: +SKIP
        >>> velocity = nets.velocity(net)  # doctest: +SKIP
        >>> velocity.apply(params, x, t, labels)  # doctest: +SKIP

    References:
        Peebles, Xie, *Scalable Diffusion Models with Transformers*, 2023, arXiv:2212.09748.
        Ma, Goldstein, Albergo, Boffi, Vanden-Eijnden, Xie, *SiT: Exploring Flow and Diffusion-based
            Generative Models with Scalable Interpolant Transformers*, 2024, arXiv:2401.08740.
    """
    tensors = tensors_of(files)
    theirs = f"{prefix}pos_embed.proj.weight" in tensors  # of diffusers
    names = (
        ("pos_embed.proj.weight", DIFFUSERS_TABLE, "proj_out_2.weight", "ff.net.0.proj.weight")
        if theirs
        else ("x_embedder.proj.weight", TABLE, "final_layer.linear.weight", "mlp.fc1.weight")
    )
    blocks = "transformer_blocks." if theirs else "blocks."
    of_patches, table, of_head, inner = (
        shape_of("dit", "DiT or SiT", tensors, prefix + name, ndim)
        for name, ndim in zip((*names[:3], f"{blocks}0.{names[3]}"), (4, 2, 2, 2), strict=True)
    )
    width, channels, patch, _ = of_patches
    net = DiT(
        patch_size=patch,
        width=width,
        num_layers=count_blocks(tensors, prefix + blocks),
        num_heads=heads_of("dit", num_heads, width, HEADS),
        mlp_ratio=inner[0] // width,
        num_classes=table[0] - 1,
        time_scale=1.0,
    )
    layout = (dit_diffusers_layout if theirs else dit_layout)(
        net, channels, out_channels=of_head[0] // patch**2
    )
    return net, load(
        tensors, layout, like_image(net, channels), prefix=prefix, dtype=dtype, sharding=sharding
    )


def dit_layout(
    net: DiT, channels: int, *, out_channels: int | None = None, image_size: int | None = None
) -> Layout:
    """The names of the weights of DiT and SiT in the files of their authors.

    Args:
        net: the network, with num_classes.
        channels: of the images.
        out_channels: of the published network; None is as many as `channels`, twice as many mean
            learned variances, which are left out when read and zeros when written.
        image_size: the side of the images, in pixels, for which the table of positions is written
            by `save`, or None: the file goes without it.

    Returns:
        The layout, for `load` and `save`.

    Raises:
        ValueError: the network has no num_classes, or out_channels is neither of the two.

    Examples:
        >>> from jflow import convert, nets
        >>> layout = convert.dit_layout(nets.DiT(num_classes=10), 4)
        >>> layout.weights[0].keys, layout.weights[0].path
        (('x_embedder.proj.weight',), 'patches/kernel')

    References:
        Peebles, Xie, *Scalable Diffusion Models with Transformers*, 2023, arXiv:2212.09748.
    """
    blocks = range(net.num_layers)
    side = None if image_size is None else image_size // net.patch_size
    shape = None if side is None else (1, side * side, net.width)
    return Layout(
        "DiT",
        (
            *patches("x_embedder.proj", net),
            *dense("t_embedder.mlp.0", "embed/time_in"),
            *dense("t_embedder.mlp.2", "embed/time_out"),
            Weight(TABLE, LABELS),
            *dense("blocks.{}.attn.qkv", "blocks/attention/qkv", blocks),
            *dense("blocks.{}.attn.proj", "blocks/attention/out", blocks),
            *dense("blocks.{}.mlp.fc1", "blocks/in", blocks),
            *dense("blocks.{}.mlp.fc2", "blocks/out", blocks),
            *dense("blocks.{}.adaLN_modulation.1", "blocks/modulation", blocks),
            *dense("final_layer.adaLN_modulation.1", "modulation"),
            *head("final_layer.linear", net, channels, out_channels),
        ),
        (Constant("pos_embed", partial(square_positions, width=net.width), shape),),
    )


def dit_diffusers_layout(net: DiT, channels: int, *, out_channels: int | None = None) -> Layout:
    """The names of the weights of DiT in the files of diffusers.

    The embeddings of time and label stand in every block there, as equal copies. (In diffusers
    itself the frequencies of time differ slightly from those that the weights were trained with.)

    Args:
        net: the network, with num_classes.
        channels: of the images.
        out_channels: as in `dit_layout`.

    Returns:
        The layout, for `load` and `save`.

    Raises:
        ValueError: the network has no num_classes, or out_channels is neither of the two.

    Examples:
        >>> from jflow import convert, nets
        >>> layout = convert.dit_diffusers_layout(nets.DiT(num_classes=10), 4)
        >>> layout.weights[0].keys, layout.weights[0].path
        (('pos_embed.proj.weight',), 'patches/kernel')

    References:
        Peebles, Xie, *Scalable Diffusion Models with Transformers*, 2023, arXiv:2212.09748.
    """
    blocks = range(net.num_layers)
    of = "transformer_blocks.{}."
    embed = "norm1.emb.timestep_embedder.linear_"
    embeddings = (
        *(f"{embed}{i}.{part}" for i in (1, 2) for part in ("weight", "bias")),
        "norm1.emb.class_embedder.embedding_table.weight",
    )
    return Layout(
        "DiT of diffusers",
        (
            *patches("pos_embed.proj", net),
            *dense(f"transformer_blocks.0.{embed}1", "embed/time_in"),
            *dense(f"transformer_blocks.0.{embed}2", "embed/time_out"),
            Weight(DIFFUSERS_TABLE, LABELS),
            *dense(tuple(f"{of}attn1.to_{part}" for part in "qkv"), "blocks/attention/qkv", blocks),
            *dense(f"{of}attn1.to_out.0", "blocks/attention/out", blocks),
            *dense(f"{of}ff.net.0.proj", "blocks/in", blocks),
            *dense(f"{of}ff.net.2", "blocks/out", blocks),
            *dense(f"{of}norm1.linear", "blocks/modulation", blocks),
            *dense("proj_out_1", "modulation"),
            *head("proj_out_2", net, channels, out_channels),
        ),
        copies=tuple(
            (of.format(i) + name, of.format(0) + name) for i in blocks[1:] for name in embeddings
        ),
    )


TABLE = "y_embedder.embedding_table.weight"
DIFFUSERS_TABLE = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
LABELS = "embed/cond_0/embedding"


def like_image(net: DiT | LightningDiT, channels: int):
    x = jax.ShapeDtypeStruct((1, net.patch_size, net.patch_size, channels), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    return shapes_of(net, x, t)


def patches(key: str, net: DiT | LightningDiT) -> tuple[Weight, Weight]:
    """The two rows of a convolution of patches."""
    return (
        Weight((f"{key}.weight",), "patches/kernel", patch_kernel(net.patch_size)),
        Weight((f"{key}.bias",), "patches/bias"),
    )


def head(
    key: str, net: DiT | LightningDiT, channels: int, out_channels: int | None
) -> tuple[Weight, Weight]:
    """The last linear map, of whose channels [p, p, out_channels] the first are the prediction."""
    out_channels = out_channels or channels
    if net.num_classes is None or out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"a layout of {type(net).__name__}: expected a network with num_classes, and {channels}"
            f" or {2 * channels} channels out, got num_classes={net.num_classes} and {out_channels}"
        )
    if out_channels == channels:
        return dense(key, "head")
    p = net.patch_size

    def read(w):  # [p p out_channels, ...]
        rest = w.shape[1:]
        return w.reshape(p, p, -1, *rest)[:, :, :channels].reshape(-1, *rest).T

    def write(leaf):
        last = leaf.T.reshape(p, p, channels, *leaf.shape[:-1])
        zeros = jnp.zeros_like(last)
        return jnp.concatenate([last, zeros], 2).reshape(-1, *leaf.shape[:-1])

    both = Transform(read, write)
    return Weight(f"{key}.weight", "head/kernel", both), Weight(f"{key}.bias", "head/bias", both)


def square_positions(shape: tuple[int, ...], *, width: int):
    """The table [1, side^2, width] of a square image, as it was published: sines and cosines of the
    column, then of the row."""
    side = round(shape[1] ** 0.5) if len(shape) == 3 else 1
    angles = np.outer(np.arange(side), 10_000.0 ** (-np.arange(width // 4) / (width // 4)))
    one = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return (1, side * side, width), table_rows(one, one)
