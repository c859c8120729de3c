"""Published weights of LightningDiT, for `nets.LightningDiT`."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jflow.convert._dit import TABLE, head, like_image, patches, square_positions
from jflow.convert._layouts import Constant, Layout, Weight, count_blocks, dense, in_one_piece, load
from jflow.convert._parts import heads_of, shape_of
from jflow.convert._safetensors import tensors_of
from jflow.nets import LightningDiT
from jflow.types import Params

HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}  # of the published widths


def lightning_dit(
    files: str | Path | Mapping[str, np.ndarray],
    *,
    num_heads: int | None = None,
    prefix: str = "",
    dtype: Any = None,
    sharding: Any = None,
) -> tuple[LightningDiT, Params]:
    """A `nets.LightningDiT` and its params from the published weights of LightningDiT.

    The sizes, and whether the network norms queries and keys and shifts, come from names and
    shapes. It reads time as it was published (time_scale=1) and is a velocity x1 - x0 as it is, t
    in [0, 1], on latents of VA-VAE that are normalized by channel. Of networks with learned
    variances (twice as many channels out as in) the first half is kept. No published file was
    opened when this was written: the names are those of the authors' code.

    Args:
        files: what `read_safetensors` takes, or the tensors that it returned.
        num_heads: the number of attention heads, which the shapes do not tell. None for the
            published widths 768, 1024, 1152, 1536 and 1792.
        prefix: of the names; see `load`.
        dtype: of the params; see `load`.
        sharding: where the params go; see `load`.

    Returns:
        The network, which `net.clone(remat=True)` and the like change, and its params.

    Raises:
        ValueError: the weights are not those of a LightningDiT: what is missing, unknown or of
            another shape is named; or num_heads is needed.

    Examples:
        >>> from jflow import convert, nets
        >>> net, params = convert.lightning_dit("lightningdit-xl.safetensors")  # doctest: +SKIP
        >>> velocity = nets.velocity(net)  # doctest: +SKIP
        >>> velocity.apply(params, latents, t, labels)  # doctest: +SKIP

    References:
        Yao, Yang, Wang, *Reconstruction vs. Generation: Taming Optimization Dilemma in Latent
            Diffusion Models*, 2025, arXiv:2501.01423.
    """
    tensors = tensors_of(files)
    of = partial(shape_of, "lightning_dit", "LightningDiT", tensors)
    width, channels, patch, _ = of(prefix + "x_embedder.proj.weight", 4)
    hidden = of(prefix + "blocks.0.mlp.w3.weight", 2)[1]
    net = LightningDiT(
        patch_size=patch,
        width=width,
        num_layers=count_blocks(tensors, prefix + "blocks."),
        num_heads=heads_of("lightning_dit", num_heads, width, HEADS),
        mlp_ratio=round(1.5 * hidden / width),
        num_classes=of(prefix + TABLE, 2)[0] - 1,
        qk_norm=prefix + "blocks.0.attn.q_norm.weight" in tensors,
        shift=of(prefix + "blocks.0.adaLN_modulation.1.bias", 1)[0] > 4 * width,
        time_scale=1.0,
    )
    out_channels = of(prefix + "final_layer.linear.weight", 2)[0] // patch**2
    layout = lightning_dit_layout(net, channels, out_channels=out_channels)
    like = like_image(net, channels)
    return net, load(tensors, layout, like, prefix=prefix, dtype=dtype, sharding=sharding)


def lightning_dit_layout(
    net: LightningDiT,
    channels: int,
    *,
    out_channels: int | None = None,
    image_size: int | None = None,
) -> Layout:
    """The names of the weights of LightningDiT in the files of its authors.

    Args:
        net: the network, with num_classes.
        channels: of the latents.
        out_channels: of the published network; None is as many as `channels`, twice as many mean
            learned variances, which are left out when read and zeros when written.
        image_size: the side of the latents, for which the tables of positions are written by
            `save`, or None: the file goes without them.

    Returns:
        The layout, for `load` and `save`.

    Raises:
        ValueError: the network has no num_classes, or out_channels is neither of the two.

    Examples:
        >>> from jflow import convert, nets
        >>> layout = convert.lightning_dit_layout(nets.LightningDiT(num_classes=10), 32)
        >>> layout.weights[0].keys, layout.weights[0].path
        (('x_embedder.proj.weight',), 'patches/kernel')

    References:
        Yao, Yang, Wang, *Reconstruction vs. Generation: Taming Optimization Dilemma in Latent
            Diffusion Models*, 2025, arXiv:2501.01423.
    """
    blocks, size = range(net.num_layers), net.width // net.num_heads
    tokens = None if image_size is None else (image_size // net.patch_size) ** 2
    rope = None if tokens is None else (tokens, size)
    norms = {"norm1": "attention_norm", "norm2": "mlp_norm"}
    if net.qk_norm:
        norms |= {"attn.q_norm": "q_norm", "attn.k_norm": "k_norm"}
    return Layout(
        "LightningDiT",
        (
            *patches("x_embedder.proj", net),
            *dense("t_embedder.mlp.0", "embed/time_in"),
            *dense("t_embedder.mlp.2", "embed/time_out"),
            Weight(TABLE, "embed/cond_0/embedding"),
            *(
                Weight(f"blocks.{{}}.{key}.weight", f"blocks/{path}/scale", blocks=blocks)
                for key, path in norms.items()
            ),
            *dense("blocks.{}.attn.qkv", "blocks/qkv", blocks),
            *dense("blocks.{}.attn.proj", "blocks/attention_out", blocks),
            *dense("blocks.{}.mlp.w12", "blocks/mlp_in", blocks),
            *dense("blocks.{}.mlp.w3", "blocks/mlp_out", blocks),
            *dense("blocks.{}.adaLN_modulation.1", "blocks/modulation", blocks),
            Weight("final_layer.norm_final.weight", "norm/scale"),
            *dense("final_layer.adaLN_modulation.1", "modulation"),
            *head("final_layer.linear", net, channels, out_channels),
        ),
        (
            Constant(
                "pos_embed",
                partial(square_positions, width=net.width),
                None if tokens is None else (1, tokens, net.width),
            ),
            Constant("feat_rope.freqs_cos", partial(_turns, np.cos, size), rope),
            Constant("feat_rope.freqs_sin", partial(_turns, np.sin, size), rope),
        ),
    )


def _turns(f, size: int, shape: tuple[int, ...]):
    """The table [side^2, size] of cosines or sines by which a square turns the pairs of a head: its
    row those of the first half, its column those of the second. Angles are float32, as published.
    """
    side = round(shape[0] ** 0.5) if shape else 1
    frequencies = np.float32(10_000) ** -(
        np.arange(0, size // 2, 2, dtype=np.float32) / (size // 2)
    )
    angles = np.repeat(np.outer(np.arange(side, dtype=np.float32), frequencies), 2, axis=1)
    row, column = np.repeat(angles, side, axis=0), np.tile(angles, (side, 1))
    return in_one_piece(f(np.concatenate([row, column], axis=1)))
