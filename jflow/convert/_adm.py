"""Published weights of ADM, the U-Net of guided diffusion and torchcfm, for `nets.ADM`."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.levels import count_heads, level_widths
from jflow.convert._layouts import (
    SAME,
    Layout,
    Transform,
    Weight,
    count_blocks,
    dense,
    load,
    shapes_of,
)
from jflow.convert._parts import norm, shape_of
from jflow.convert._safetensors import tensors_of
from jflow.nets import ADM
from jflow.types import Params

CONV = Transform(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))


def adm(
    files: str | Path | Mapping[str, np.ndarray],
    *,
    num_heads: int | None = None,
    head_width: int | None = None,
    heads_first: bool = True,
    prefix: str = "",
    dtype: Any = None,
    sharding: Any = None,
) -> tuple[ADM, Params]:
    """A `nets.ADM` and its params from published weights of guided diffusion, or of torchcfm.

    The sizes come from the shapes; the heads and their order do not, so that the options of the
    published training run are repeated here. The network reads time as it was published
    (time_scale=1). ADM predicts noise at times 0 to 999, of which 0 is data; where it predicts
    variances too (twice as many channels out as in) the first half is kept, the noise. Networks of
    torchcfm are velocities at t in [0, 1] as they are. Published tables of labels have no null
    label: jflow's has a last row of zeros for it, which no training has seen. Upsamplers, which
    read a small image beside x, are loaded as networks of twice the channels. No published file was
    opened when this was written: the names are those of the authors' code.

    Args:
        files: what `read_safetensors` takes, or the tensors that it returned.
        num_heads: the number of attention heads, where head_width is None: 4 for 128 x 128 pixels.
        head_width: the channels of a head, 64 in the other networks of guided diffusion (there
            `num_head_channels`).
        heads_first: whether the queries, keys and values of a head lie together in the file, or the
            queries of all heads do. The second, in the authors' code `use_new_attention_order`, is
            that of the network for 64 x 64 pixels.
        prefix: of the names; see `load`.
        dtype: of the params; see `load`.
        sharding: where the params go; see `load`.

    Returns:
        The network, which `net.clone(remat=True)` and the like change, and its params.

    Raises:
        ValueError: the weights are not those of such a network: what is missing, unknown or of
            another shape is named; or neither num_heads nor head_width is given, or both.

    Examples:
        >>> import jflow
        >>> from jflow import convert
        >>> file = "256x256_diffusion.safetensors"
        >>> net, params = convert.adm(file, head_width=64)  # doctest: +SKIP
        >>> field = jflow.field(net)  # doctest: +SKIP
        >>> noise = field.apply(params, x, t, labels)  # doctest: +SKIP

    References:
        Dhariwal, Nichol, *Diffusion Models Beat GANs on Image Synthesis*, 2021, arXiv:2105.05233.
    """
    if (num_heads is None) == (head_width is None):
        raise ValueError(
            "adm: expected either num_heads or head_width, which the shapes do not tell, got "
            f"num_heads={num_heads} and head_width={head_width}"
        )
    tensors = tensors_of(files)
    shape = partial(shape_of, "adm", "ADM", tensors)

    def has(key):
        return prefix + key in tensors

    channels = shape(prefix + "time_embed.0.weight", 2)[1]
    stem = shape(prefix + "input_blocks.0.0.weight", 4)
    head = shape(prefix + "out.2.weight", 4)
    blocks = count_blocks(tensors, prefix + "output_blocks.")
    after = [f"output_blocks.{i}.{j}." for i in range(blocks) for j in (1, 2)]
    grown = [has(f"{key}in_layers.0.weight") for key in after]
    levels = 1 + sum(grown) + sum(has(f"{key}conv.weight") for key in after)
    num_blocks = max(1, blocks // levels - 1)
    first = [1 + i * (num_blocks + 1) for i in range(levels)]
    widths = [shape(f"{prefix}input_blocks.{i}.0.out_layers.3.weight", 4)[0] for i in first]
    modulation = shape(prefix + "input_blocks.1.0.emb_layers.1.weight", 2)[0]
    classes = shape(prefix + "label_emb.weight", 2)[0] if has("label_emb.weight") else None
    net = ADM(
        channels=channels,
        multipliers=tuple(w // channels if w % channels == 0 else w / channels for w in widths),
        num_blocks=num_blocks,
        attention=tuple(has(f"input_blocks.{i}.1.norm.weight") for i in first),
        num_heads=num_heads or 1,
        head_width=head_width,
        scale_shift=modulation == 2 * widths[0],
        resample_blocks=any(grown),
        num_classes=classes,
        time_scale=1.0,
    )
    like = shapes_of(net, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in _inputs(net, stem[1])))
    layout = adm_layout(net, stem[1], out_channels=head[0], heads_first=heads_first)
    return net, load(tensors, layout, like, prefix=prefix, dtype=dtype, sharding=sharding)


def adm_layout(
    net: ADM, channels: int, *, out_channels: int | None = None, heads_first: bool = True
) -> Layout:
    """The names of the weights of ADM in the files of guided diffusion and torchcfm.

    Args:
        net: the network.
        channels: of the images.
        out_channels: of the published network; None is as many as `channels`, twice as many mean
            variances, which are left out when read and zeros when written.
        heads_first: as in `adm`.

    Returns:
        The layout, for `load` and `save`.

    Raises:
        ValueError: out_channels is neither of the two.

    Examples:
        >>> from jflow import convert, nets
        >>> convert.adm_layout(nets.ADM(), 3).weights[0].keys
        ('time_embed.0.weight',)

    References:
        Dhariwal, Nichol, *Diffusion Models Beat GANs on Image Synthesis*, 2021, arXiv:2105.05233.
    """
    if out_channels not in (None, channels, 2 * channels):
        raise ValueError(
            f"adm_layout: expected {channels} or {2 * channels} channels out, got {out_channels}"
        )
    rows = [*dense("time_embed.0", "embed/time_in"), *dense("time_embed.2", "embed/time_out")]
    if net.num_classes is not None:
        rows.append(Weight("label_emb.weight", "embed/cond_0/embedding", WITHOUT_NULL))
    rows += conv("input_blocks.0.0", "stem")
    widths = level_widths(net.channels, net.multipliers)
    wide = before = widths[0]  # the channels that a block gets
    skips = [before]

    def block(key, path, into, out):
        rows.extend(norm(f"{key}.in_layers.0", f"{path}/in_norm"))
        rows.extend(conv(f"{key}.in_layers.2", f"{path}/in"))
        rows.extend(dense(f"{key}.emb_layers.1", f"{path}/modulation"))
        rows.extend(norm(f"{key}.out_layers.0", f"{path}/out_norm"))
        rows.extend(conv(f"{key}.out_layers.3", f"{path}/out"))
        if into != out:
            rows.extend(conv(f"{key}.skip_connection", f"{path}/skip"))

    def attention(key, path, width):
        rows.extend(norm(f"{key}.norm", f"{path}/norm"))
        kernel, bias = _qkv(count_heads(width, net.num_heads, net.head_width), heads_first)
        rows.append(Weight(f"{key}.qkv.weight", f"{path}/attention/qkv/kernel", kernel))
        rows.append(Weight(f"{key}.qkv.bias", f"{path}/attention/qkv/bias", bias))
        rows.append(Weight(f"{key}.proj_out.weight", f"{path}/attention/out/kernel", SITES))
        rows.append(Weight(f"{key}.proj_out.bias", f"{path}/attention/out/bias"))

    number = 1
    for i, width in enumerate(widths):
        for j in range(net.num_blocks):
            block(f"input_blocks.{number}.0", f"down_{i}_{j}", wide, width)
            if net.attention[i]:
                attention(f"input_blocks.{number}.1", f"down_{i}_{j}_attention", width)
            wide, number = width, number + 1
            skips.append(width)
        if i < len(widths) - 1:
            if net.resample_blocks:
                block(f"input_blocks.{number}.0", f"shrink_{i}", width, width)
            else:
                rows += conv(f"input_blocks.{number}.0.op", f"shrink_{i}")
            number += 1
            skips.append(width)
    block("middle_block.0", "middle_0", wide, wide)
    attention("middle_block.1", "middle_attention", wide)
    block("middle_block.2", "middle_1", wide, wide)
    number = 0
    for i, width in reversed(list(enumerate(widths))):
        for j in range(net.num_blocks + 1):
            key = f"output_blocks.{number}"
            block(f"{key}.0", f"up_{i}_{j}", wide + skips.pop(), width)
            if net.attention[i]:
                attention(f"{key}.1", f"up_{i}_{j}_attention", width)
            wide, number = width, number + 1
        if i:
            key = f"output_blocks.{number - 1}.{1 + net.attention[i]}"
            if net.resample_blocks:
                block(key, f"grow_{i}", width, width)
            else:
                rows += conv(f"{key}.conv", f"grow_{i}")
    rows += norm("out.0", "norm")
    both = out_channels == 2 * channels
    rows += conv("out.2", "head", FIRST_HALF) if both else conv("out.2", "head")
    return Layout("ADM", tuple(rows))


def conv(key: str, path: str, outputs: Transform | None = None) -> tuple[Weight, Weight]:
    """The two rows of a convolution; `outputs` acts on the first axis, that of the outputs."""
    kernel = CONV
    if outputs is not None:
        kernel = Transform(
            lambda w: CONV.read(outputs.read(w)), lambda w: outputs.write(CONV.write(w))
        )
    return (
        Weight(f"{key}.weight", f"{path}/kernel", kernel),
        Weight(f"{key}.bias", f"{path}/bias", outputs or SAME),
    )


def _with_zeros(w):
    return jnp.concatenate([jnp.asarray(w), jnp.zeros_like(w)])


# Of a convolution over the tokens, [out, in, 1].
SITES = Transform(lambda w: w[:, :, 0].T, lambda w: w.T[:, :, None])
FIRST_HALF = Transform(lambda w: w[: w.shape[0] // 2], _with_zeros)
# A copy in `write`, since a view would leave the row of the null label unwritten.
WITHOUT_NULL = Transform(
    lambda w: np.concatenate([w, np.zeros_like(w[:1])]), lambda w: w[:-1].copy()
)


def _inputs(net: ADM, channels: int) -> list[tuple[int, ...]]:
    side = 2 ** (len(net.multipliers) - 1)
    return [(1, side, side, channels), (1,)]


def _qkv(heads: int, heads_first: bool) -> tuple[Transform, Transform]:
    """Queries, keys and values, of which jflow has the queries of all heads first."""
    if not heads_first:
        return SITES, SAME

    def swapped(w, first, second):  # the outputs [first, second, size] as [second, first, size]
        return w.reshape(first, second, -1, *w.shape[1:]).swapaxes(0, 1).reshape(w.shape)

    return (
        Transform(
            lambda w: SITES.read(swapped(w, heads, 3)), lambda w: swapped(SITES.write(w), 3, heads)
        ),
        Transform(lambda b: swapped(b, heads, 3), lambda b: swapped(b, 3, heads)),
    )
