"""Published weights of AutoencoderKL, of Stable Diffusion and FLUX.1, for `nets.AutoencoderKL`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jflow._core.files import expand
from jflow.convert._adm import conv
from jflow.convert._layouts import (
    LINEAR,
    SAME,
    Layout,
    Transform,
    Weight,
    count_blocks,
    load,
    shapes_of,
)
from jflow.convert._parts import norm, shape_of
from jflow.convert._safetensors import read_json, tensors_of
from jflow.nets import Autoencoder, AutoencoderKL, autoencoder
from jflow.types import Params

# Of a convolution that sees one site, [out, in, 1, 1].
SITE = Transform(
    lambda w: w[..., 0, 0].swapaxes(-1, -2), lambda w: w.swapaxes(-1, -2)[..., None, None]
)


class _Names(NamedTuple):
    """The names of a layout; '{}' is the number of a level, and of a block in it."""

    down: str
    shrink: str
    up: str
    grow: str
    from_smallest: bool  # whether the levels of the decoder are counted from the smallest size
    middle: tuple[str, str]
    attention: str
    attention_norm: str
    qkv: tuple[str, str, str]
    attention_out: str
    linear: Transform  # how the maps of the attention lie
    skip: str
    norm: str


_ORIGINAL = _Names(
    down="down.{}.block.{}",
    shrink="down.{}.downsample.conv",
    up="up.{}.block.{}",
    grow="up.{}.upsample.conv",
    from_smallest=False,
    middle=("mid.block_1", "mid.block_2"),
    attention="mid.attn_1",
    attention_norm="norm",
    qkv=("q", "k", "v"),
    attention_out="proj_out",
    linear=SITE,
    skip="nin_shortcut",
    norm="norm_out",
)
_DIFFUSERS = _Names(
    down="down_blocks.{}.resnets.{}",
    shrink="down_blocks.{}.downsamplers.0.conv",
    up="up_blocks.{}.resnets.{}",
    grow="up_blocks.{}.upsamplers.0.conv",
    from_smallest=True,
    middle=("mid_block.resnets.0", "mid_block.resnets.1"),
    attention="mid_block.attentions.0",
    attention_norm="group_norm",
    qkv=("to_q", "to_k", "to_v"),
    attention_out="to_out.0",
    linear=LINEAR,
    skip="conv_shortcut",
    norm="conv_norm_out",
)
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_KNOWN = (
    "0.18215 for Stable Diffusion 1 and 2, 0.13025 for SDXL, 1.5305 with shift=0.0609 for SD3, "
    "0.3611 with shift=0.1159 for FLUX.1"
)


def autoencoder_kl(
    files: str | Path | Mapping[str, np.ndarray],
    *,
    net: AutoencoderKL | None = None,
    scale: ArrayLike | None = None,
    shift: ArrayLike | None = None,
    prefix: str = "",
    dtype: Any = None,
    sharding: Any = None,
) -> tuple[Autoencoder, Params]:
    """The autoencoder of Stable Diffusion, SD3 or FLUX.1 and its params from published weights.

    The sizes come from the shapes; the layouts of the authors (latent diffusion and Black Forest
    Labs) and of diffusers are read, with diffusers' older names of the attention too. The scale and
    shift of the latents and the groups of the norms come from the config.json of diffusers in the
    folder, or beside the file. No published file was opened when this was written: the names are
    those of the authors' code.

    Args:
        files: what `read_safetensors` takes, such as the folder `vae` of diffusers, or the tensors
            that it returned.
        net: whose dtype and attention_fn the network has, and its groups where no config.json says
            them; None is `nets.AutoencoderKL()`.
        scale: of the latents, see `nets.autoencoder`: a number, or one for each channel. None is
            that of config.json.
        shift: likewise; None is that of config.json, and 0 where that has none or scale is given.
        prefix: of the names, such as 'first_stage_model.' in a file that holds other models too;
            see `load`.
        dtype: of the params; see `load`.
        sharding: where the params go; see `load`.

    Returns:
        The autoencoder, with the network in its field `net`, and its params.

    Raises:
        ValueError: the weights are not those of such a network: what is missing, unknown or of
            another shape is named; config.json is that of another model; or there is none, and no
            scale is given.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import convert, nets
        >>> net = nets.AutoencoderKL(dtype=jnp.bfloat16, attention_fn=nets.chunked_attention())
        >>> both, params = convert.autoencoder_kl("sd3/vae", net=net)  # doctest: +SKIP
        >>> images = both.decode(params, latents)  # doctest: +SKIP

    References:
        Rombach, Blattmann, Lorenz, Esser, Ommer, *High-Resolution Image Synthesis with Latent
            Diffusion Models*, 2021, arXiv:2112.10752.
    """
    config = {} if isinstance(files, Mapping) else _read_config(expand(files))
    tensors = {_new_name(name): tensor for name, tensor in tensors_of(files, prefix).items()}
    if scale is None:
        scale, given_shift = _scale_and_shift(config)
        shift = given_shift if shift is None else shift
    names, net = _sizes(tensors, net or AutoencoderKL(), config)
    image = jax.ShapeDtypeStruct((1, *2 * (2 ** (len(net.widths) - 1),), net.channels), jnp.float32)
    both = autoencoder(net, scale=scale, shift=0.0 if shift is None else shift)
    like = shapes_of(net, image)
    return both, load(tensors, _layout(net, names), like, dtype=dtype, sharding=sharding)


def autoencoder_kl_layout(net: AutoencoderKL) -> Layout:
    """The names of the weights of AutoencoderKL in the files of latent diffusion and FLUX.1.

    Args:
        net: the network.

    Returns:
        The layout, for `load` and `save`.

    Examples:
        >>> from jflow import convert, nets
        >>> convert.autoencoder_kl_layout(nets.AutoencoderKL()).weights[0].keys
        'encoder.conv_in.weight'
    """
    return _layout(net, _ORIGINAL)


def autoencoder_kl_diffusers_layout(net: AutoencoderKL) -> Layout:
    """The names of the weights of AutoencoderKL in the files of diffusers.

    Args:
        net: the network.

    Returns:
        The layout, for `load` and `save`.

    Examples:
        >>> from jflow import convert, nets
        >>> convert.autoencoder_kl_diffusers_layout(nets.AutoencoderKL()).weights[0].keys
        'encoder.conv_in.weight'
    """
    return _layout(net, _DIFFUSERS)


def _layout(net: AutoencoderKL, names: _Names) -> Layout:
    widths, last = tuple(net.widths), len(net.widths) - 1
    rows = [*_ends("encoder", names)]
    wide = widths[0]  # the channels that a block gets
    for i, width in enumerate(widths):
        for j in range(net.num_blocks):
            key = f"encoder.{names.down.format(i, j)}"
            rows += _block(key, f"encoder/down_{i}_{j}", names, wide != width)
            wide = width
        if i < last:
            rows += conv(f"encoder.{names.shrink.format(i)}", f"encoder/shrink_{i}")
    rows += _middle("encoder", names, net.attention)
    rows += _ends("decoder", names)
    rows += _middle("decoder", names, net.attention)
    for i, width in reversed(list(enumerate(widths))):
        level = last - i if names.from_smallest else i
        for j in range(net.num_blocks + 1):
            key = f"decoder.{names.up.format(level, j)}"
            rows += _block(key, f"decoder/up_{i}_{j}", names, wide != width)
            wide = width
        if i:
            rows += conv(f"decoder.{names.grow.format(level)}", f"decoder/grow_{i}")
    if net.quant_convs:
        rows += [*conv("quant_conv", "quant_conv"), *conv("post_quant_conv", "post_quant_conv")]
    return Layout("AutoencoderKL", tuple(rows))


def _ends(part: str, names: _Names) -> Iterator[Weight]:
    """The rows of the first and the last convolution of the encoder, or the decoder."""
    yield from conv(f"{part}.conv_in", f"{part}/stem")
    yield from norm(f"{part}.{names.norm}", f"{part}/norm")
    yield from conv(f"{part}.conv_out", f"{part}/head")


def _block(key: str, path: str, names: _Names, skip: bool) -> Iterator[Weight]:
    for number, name in ((1, "in"), (2, "out")):
        yield from norm(f"{key}.norm{number}", f"{path}/{name}_norm")
        yield from conv(f"{key}.conv{number}", f"{path}/{name}")
    if skip:
        yield from conv(f"{key}.{names.skip}", f"{path}/skip")


def _middle(part: str, names: _Names, attention: bool) -> Iterator[Weight]:
    for i, key in enumerate(names.middle):
        yield from _block(f"{part}.{key}", f"{part}/middle_{i}", names, False)
    if attention:
        key, path = f"{part}.{names.attention}.", f"{part}/middle_attention"
        yield from norm(key + names.attention_norm, f"{path}/norm")
        for of, name in ((names.qkv, "qkv"), ((names.attention_out,), "out")):
            weights, biases = (tuple(f"{key}{n}.{kind}" for n in of) for kind in ("weight", "bias"))
            yield Weight(weights, f"{path}/attention/{name}/kernel", names.linear)
            yield Weight(biases, f"{path}/attention/{name}/bias", SAME)


def _sizes(
    tensors: Mapping[str, np.ndarray], net: AutoencoderKL, config: Mapping[str, Any]
) -> tuple[_Names, AutoencoderKL]:
    """The layout of the tensors, and the network with their sizes."""
    found = [n for n in (_ORIGINAL, _DIFFUSERS) if f"encoder.{n.norm}.weight" in tensors]
    if not found:
        given = ", ".join(list(tensors)[:6]) or "none"
        raise ValueError(
            f"autoencoder_kl: expected weights with a tensor 'encoder.{_ORIGINAL.norm}.weight' or "
            f"'encoder.{_DIFFUSERS.norm}.weight', got {len(tensors)}: {given}; are they of another "
            "model, or is there another prefix in front?"
        )
    (names,) = found

    def shape(key):
        return shape_of("autoencoder_kl", "AutoencoderKL", tensors, key, 4)

    levels = count_blocks(tensors, f"encoder.{names.down.split('{')[0]}")
    first = f"encoder.{names.down}.conv1.weight"
    return names, net.clone(
        channels=shape("encoder.conv_in.weight")[1],
        latent_channels=shape("decoder.conv_in.weight")[1],
        widths=tuple(shape(first.format(i, 0))[0] for i in range(levels)),
        num_blocks=count_blocks(tensors, f"encoder.{names.down.format(0, '')}"),
        attention=f"encoder.{names.attention}.{names.attention_norm}.weight" in tensors,
        quant_convs="quant_conv.weight" in tensors,
        groups=config.get("norm_num_groups", net.groups),
    )


def _new_name(name: str) -> str:
    """With the names of today's diffusers in the attention."""
    start, mark, rest = name.partition(f"{_DIFFUSERS.attention}.")
    part, dot, kind = rest.rpartition(".")
    return f"{start}{mark}{_OLD.get(part, part)}{dot}{kind}" if mark else name


def _read_config(path: Path) -> Mapping[str, Any]:
    """The config.json of diffusers in a folder, or beside a file; {} where there is none."""
    path = (path if path.is_dir() else path.parent) / "config.json"
    if not path.exists():
        return {}
    config = read_json("autoencoder_kl", path)
    model = config.get("_class_name")
    if model != "AutoencoderKL":
        raise ValueError(
            f"autoencoder_kl: expected {path} to be of an AutoencoderKL, got {model!r}; for a file "
            "beside the config.json of another model give read_safetensors(file)"
        )
    if config.get("act_fn", "silu") != "silu":
        raise ValueError(
            f"autoencoder_kl: expected act_fn 'silu' in {path}, got {config['act_fn']!r}"
        )
    return config


def _scale_and_shift(config: Mapping[str, Any]) -> tuple[ArrayLike, ArrayLike]:
    """Of the latents: diffusers has a mean and a standard deviation of each channel in some."""
    if "scaling_factor" not in config:
        raise ValueError(
            "autoencoder_kl: expected scale, which weights alone do not tell, got none, and there "
            f"is no config.json with 'scaling_factor': it is {_KNOWN}"
        )
    scale, shift = config["scaling_factor"], config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return scale, shift
    return scale / np.asarray(std), np.asarray(mean)
