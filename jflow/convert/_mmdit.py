"""Layouts of SD3, SD3.5 and FLUX.1, and loaders that read the sizes of the network from them.

The names are those of the model code of Stability AI, of Black Forest Labs and of diffusers. No
published file of weights was opened: names, shapes and numbers were compared on random weights,
with diffusers and its converters.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.positions import centered_axis, table_rows
from jflow.convert._layouts import (
    LINEAR,
    SAME,
    Constant,
    Layout,
    Transform,
    Weight,
    count_blocks,
    dense,
    load,
    shapes_of,
)
from jflow.convert._parts import patch_kernel, shape_of
from jflow.convert._safetensors import tensors_of
from jflow.nets import Flux, MMDiT
from jflow.types import Condition, Params


class _Attention(NamedTuple):
    """The modules of an attention, and the tensors of its norms."""

    qkv: tuple[str, ...]
    q_norm: str
    k_norm: str
    out: str


class _Stream(NamedTuple):
    """The modules of one stream of a joint block, after the name of the block."""

    modulation: str
    attention: _Attention
    mlp_in: str
    mlp_out: str
    own: _Attention | None = None  # the second attention


class _Names(NamedTuple):
    """The modules of a published layout."""

    block: str
    image: _Stream
    context: _Stream
    patches: str
    text: str
    embed: Mapping[str, tuple[str, str]]
    modulation: str
    head: str
    table: str = ""


def _sd3_stream(block: str) -> _Stream:
    def attention(name):
        of = f"{block}.{name}"
        return _Attention((f"{of}.qkv",), f"{of}.ln_q.weight", f"{of}.ln_k.weight", f"{of}.proj")

    mlp = f"{block}.mlp.fc1", f"{block}.mlp.fc2"
    return _Stream(f"{block}.adaLN_modulation.1", attention("attn"), *mlp, attention("attn2"))


def _flux_stream(stream: str) -> _Stream:
    of = f"{stream}_attn"
    norms = f"{of}.norm.query_norm.scale", f"{of}.norm.key_norm.scale"
    attention = _Attention((f"{of}.qkv",), *norms, f"{of}.proj")
    return _Stream(f"{stream}_mod.lin", attention, f"{stream}_mlp.0", f"{stream}_mlp.2")


def _diffusers_image(name: str) -> _Attention:
    qkv = f"{name}.to_q", f"{name}.to_k", f"{name}.to_v"
    return _Attention(qkv, f"{name}.norm_q.weight", f"{name}.norm_k.weight", f"{name}.to_out.0")


_DIFFUSERS_IMAGE = _Stream(
    "norm1.linear",
    _diffusers_image("attn"),
    "ff.net.0.proj",
    "ff.net.2",
    _diffusers_image("attn2"),
)
_DIFFUSERS_CONTEXT = _Stream(
    "norm1_context.linear",
    _Attention(
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "attn.norm_added_q.weight",
        "attn.norm_added_k.weight",
        "attn.to_add_out",
    ),
    "ff_context.net.0.proj",
    "ff_context.net.2",
)
_SD3 = _Names(
    "joint_blocks.{}.",
    _sd3_stream("x_block"),
    _sd3_stream("context_block"),
    "x_embedder.proj",
    "context_embedder",
    {
        "time": ("t_embedder.mlp.0", "t_embedder.mlp.2"),
        "vector": ("y_embedder.mlp.0", "y_embedder.mlp.2"),
    },
    "final_layer.adaLN_modulation.1",
    "final_layer.linear",
    "pos_embed",
)
_FLUX = _Names(
    "double_blocks.{}.",
    _flux_stream("img"),
    _flux_stream("txt"),
    "img_in",
    "txt_in",
    {
        part: (f"{part}_in.in_layer", f"{part}_in.out_layer")
        for part in ("time", "vector", "guidance")
    },
    "final_layer.adaLN_modulation.1",
    "final_layer.linear",
)
_SD3_DIFFUSERS = _Names(
    "transformer_blocks.{}.",
    _DIFFUSERS_IMAGE,
    _DIFFUSERS_CONTEXT,
    "pos_embed.proj",
    "context_embedder",
    {
        part: (
            f"time_text_embed.{name}_embedder.linear_1",
            f"time_text_embed.{name}_embedder.linear_2",
        )
        for part, name in {"time": "timestep", "vector": "text", "guidance": "guidance"}.items()
    },
    "norm_out.linear",
    "proj_out",
    "pos_embed.pos_embed",
)
_FLUX_DIFFUSERS = _SD3_DIFFUSERS._replace(patches="x_embedder", table="")


def _halves_swapped(w):
    """The two halves of the last axis but one in the other order."""
    return w.reshape(*w.shape[:-2], 2, -1, w.shape[-1])[..., ::-1, :, :].reshape(w.shape)


# (scale, shift) in the published tensor, (shift, scale) in the leaf
SWAPPED_LINEAR = Transform(
    lambda w: _halves_swapped(w).swapaxes(-1, -2), lambda w: _halves_swapped(w.swapaxes(-1, -2))
)
SWAPPED = Transform(
    lambda b: _halves_swapped(b[..., None])[..., 0], lambda b: _halves_swapped(b[..., None])[..., 0]
)


def _packed_in(p: int) -> Transform:
    """A weight [D, C p p] on patches with the channel slowest as a kernel [p p C, D]."""
    conv = patch_kernel(p)
    return Transform(
        lambda w: conv.read(w.reshape(w.shape[0], -1, p, p)),
        lambda w: conv.write(w).reshape(w.shape[-1], -1),
    )


def _packed_out(p: int) -> tuple[Transform, Transform]:
    """A weight [C p p, D] and a bias [C p p] with the channel slowest as those of [p p C]."""

    def last(b):
        return b.reshape(*b.shape[:-1], -1, p * p).swapaxes(-1, -2).reshape(b.shape)

    def first(b):
        return b.reshape(*b.shape[:-1], p * p, -1).swapaxes(-1, -2).reshape(b.shape)

    return (
        Transform(lambda w: last(w.swapaxes(-1, -2)), lambda w: first(w).swapaxes(-1, -2)),
        Transform(last, first),
    )


def mmdit_layout(net: MMDiT) -> Layout:
    """The names of the weights of SD3 and SD3.5 in the files of Stability AI.

    Args:
        net: the network.

    Returns:
        The layout, for `load` and `save`. In a file that holds the other models too the names begin
        with 'model.diffusion_model.', which is the prefix of both.

    Examples:
        >>> from jflow import convert, nets
        >>> convert.mmdit_layout(nets.MMDiT()).weights[0].keys
        ('x_embedder.proj.weight',)
    """
    return _mmdit_layout(net, _SD3)


def mmdit_diffusers_layout(net: MMDiT) -> Layout:
    """The names of the weights of SD3 and SD3.5 in the files of diffusers.

    Args:
        net: the network.

    Returns:
        The layout, for `load` and `save`.

    Examples:
        >>> from jflow import convert, nets
        >>> convert.mmdit_diffusers_layout(nets.MMDiT()).weights[0].keys
        ('pos_embed.proj.weight',)
    """
    return _mmdit_layout(net, _SD3_DIFFUSERS)


def flux_layout(net: Flux) -> Layout:
    """The names of the weights of FLUX.1 in the files of Black Forest Labs.

    Args:
        net: the network; with a guidance it has the weights that read it.

    Returns:
        The layout, for `load` and `save`.

    Examples:
        >>> from jflow import convert, nets
        >>> convert.flux_layout(nets.Flux()).weights[0].keys
        ('img_in.weight',)
    """
    blocks = range(net.num_single_layers)
    return _flux_layout(
        net,
        _FLUX,
        *dense("single_blocks.{}.modulation.lin", "single_blocks/modulation", blocks),
        *dense("single_blocks.{}.linear1", "single_blocks/in", blocks),
        *dense("single_blocks.{}.linear2", "single_blocks/out", blocks),
        *_scales(
            "single_blocks.{}.norm.query_norm.scale",
            "single_blocks.{}.norm.key_norm.scale",
            "single_blocks",
            blocks,
        ),
    )


def flux_diffusers_layout(net: Flux) -> Layout:
    """The names of the weights of FLUX.1 in the files of diffusers.

    Args:
        net: the network; with a guidance it has the weights that read it.

    Returns:
        The layout, for `load` and `save`.

    Examples:
        >>> from jflow import convert, nets
        >>> convert.flux_diffusers_layout(nets.Flux()).weights[0].keys
        ('x_embedder.weight',)
    """
    blocks, of = range(net.num_single_layers), "single_transformer_blocks.{}."
    enter = tuple(f"{of}{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
    return _flux_layout(
        net,
        _FLUX_DIFFUSERS,
        *dense(f"{of}norm.linear", "single_blocks/modulation", blocks),
        *dense(enter, "single_blocks/in", blocks, parts=(1, 1, 1, net.mlp_ratio)),
        *dense(f"{of}proj_out", "single_blocks/out", blocks),
        *_scales(f"{of}attn.norm_q.weight", f"{of}attn.norm_k.weight", "single_blocks", blocks),
    )


def mmdit(
    files: str | Path | Mapping[str, np.ndarray],
    *,
    num_heads: int | None = None,
    prefix: str = "",
    dtype: Any = None,
    sharding: Any = None,
) -> tuple[MMDiT, Params]:
    """A `nets.MMDiT` and its params from the published weights of SD3 or SD3.5.

    The sizes come from the shapes, the distance of positions from their table, which has to be as
    jflow computes it; the layouts of Stability AI and of diffusers are read. The network reads
    sigma and predicts noise - data, as it was published: `paths.from_noise_time(jflow.field(net))`
    is its velocity. No published file was opened when this was written: the names are those of the
    authors' code.

    Args:
        files: what `read_safetensors` takes, or the tensors that it returned.
        num_heads: of the attention. None is that of heads as wide as the norms of queries and keys,
            and without such norms of 64 numbers, as published.
        prefix: of the names, 'model.diffusion_model.' in a file that holds other models too; see
            `load`.
        dtype: of the params; see `load`.
        sharding: where the params go; see `load`.

    Returns:
        The network, which `net.clone(dtype=jnp.bfloat16)` and the like change, and its params.

    Raises:
        ValueError: the weights are not those of SD3 or SD3.5: what is missing, unknown or of
            another shape is named.

    Examples:
        >>> import jflow
        >>> from jflow import convert, paths
        >>> net, params = convert.mmdit("sd3_medium.safetensors")  # doctest: +SKIP
        >>> velocity = paths.from_noise_time(jflow.field(net))  # doctest: +SKIP
        >>> text = Condition(context=tokens, vector=pooled)  # doctest: +SKIP
        >>> velocity.apply(params, latents, t, text)  # doctest: +SKIP

    References:
        Esser et al., *Scaling Rectified Flow Transformers for High-Resolution Image Synthesis*,
            2024, arXiv:2403.03206.
    """
    tensors = tensors_of(files)
    names = _found("mmdit", tensors, prefix, _SD3, _SD3_DIFFUSERS)
    of = partial(shape_of, "mmdit", "SD3 or SD3.5", tensors)
    width, channels, patch, _ = of(f"{prefix}{names.patches}.weight", 4)
    first, image = prefix + names.block.format(0), names.image
    inner, _ = of(f"{first}{image.mlp_in}.weight", 2)
    depth = count_blocks(tensors, prefix + names.block.split("{")[0])
    own = f"{prefix}{names.block}{'' if image.own is None else image.own.out}.weight"
    norm = first + image.attention.q_norm
    size = np.shape(tensors[norm])[0] if norm in tensors else 64
    net = MMDiT(
        patch_size=patch,
        width=width,
        num_layers=depth,
        num_heads=num_heads or width // size,
        dual_layers=sum(own.format(i) in tensors for i in range(depth)),
        qk_norm=norm in tensors,
        mlp_ratio=inner // width,
        time_scale=1000.0,
    )
    net = _with_grid(net, tensors.get(prefix + names.table))
    params = load(
        tensors,
        _mmdit_layout(net, names),
        _like(of, net, channels, prefix, names),
        prefix=prefix,
        dtype=dtype,
        sharding=sharding,
    )
    return net, params


def flux(
    files: str | Path | Mapping[str, np.ndarray],
    *,
    guidance: float = 3.5,
    rope_axes: tuple[int, int, int] | None = None,
    prefix: str = "",
    dtype: Any = None,
    sharding: Any = None,
) -> tuple[Flux, Params]:
    """A `nets.Flux` and its params from the published weights of FLUX.1.

    The sizes come from the shapes; the layouts of Black Forest Labs and of diffusers are read. The
    network reads sigma and predicts noise - data, as it was published:
    `paths.from_noise_time(jflow.field(net))` is its velocity. No published file was opened when
    this was written: the names are those of the authors' code.

    Args:
        files: what `read_safetensors` takes, or the tensors that it returned.
        guidance: the scale that FLUX.1 dev, which is distilled from a guided model, reads; weights
            without that input have none.
        rope_axes: see `nets.Flux`. The shapes do not tell them; None for heads of 128 numbers,
            where they are (16, 56, 56).
        prefix: of the names; see `load`.
        dtype: of the params; see `load`.
        sharding: where the params go; see `load`.

    Returns:
        The network, which `net.clone(guidance=2.0)` and the like change, and its params.

    Raises:
        ValueError: the weights are not those of FLUX.1: what is missing, unknown or of another
            shape is named; or rope_axes are needed.

    Examples:
        >>> import jflow
        >>> from jflow import convert, paths
        >>> net, params = convert.flux("flux1-dev.safetensors")  # doctest: +SKIP
        >>> velocity = paths.from_noise_time(jflow.field(net))  # doctest: +SKIP
        >>> text = Condition(context=tokens, vector=pooled)  # doctest: +SKIP
        >>> velocity.apply(params, latents, t, text)  # doctest: +SKIP

    References:
        Black Forest Labs, *FLUX*, 2024, https://github.com/black-forest-labs/flux.
    """
    tensors = tensors_of(files)
    names = _found("flux", tensors, prefix, _FLUX, _FLUX_DIFFUSERS)
    of = partial(shape_of, "flux", "FLUX.1", tensors)
    width, packed = of(f"{prefix}{names.patches}.weight", 2)
    first = prefix + names.block.format(0)
    inner, _ = of(f"{first}{names.image.mlp_in}.weight", 2)
    (size,) = of(first + names.image.attention.q_norm, 1)
    if rope_axes is None and size != 128:
        raise ValueError(
            f"flux: expected rope_axes, which the shapes of heads of {size} numbers do not tell; "
            "they are known for heads of 128"
        )
    original = names is _FLUX
    single = "single_blocks." if original else "single_transformer_blocks."
    net = Flux(
        patch_size=2,
        width=width,
        num_layers=count_blocks(tensors, prefix + names.block.split("{")[0]),
        num_single_layers=count_blocks(tensors, prefix + single),
        num_heads=width // size,
        mlp_ratio=inner // width,
        rope_axes=rope_axes or (16, 56, 56),
        guidance=guidance if f"{prefix}{names.embed['guidance'][0]}.weight" in tensors else None,
        time_scale=1000.0,
    )
    params = load(
        tensors,
        (flux_layout if original else flux_diffusers_layout)(net),
        _like(of, net, packed // 4, prefix, names),
        prefix=prefix,
        dtype=dtype,
        sharding=sharding,
    )
    return net, params


def _mmdit_layout(net: MMDiT, names: _Names) -> Layout:
    dual, last = net.dual_layers, net.num_layers - 1
    rows = [*_dense(names.patches, "patches", kernel=patch_kernel(net.patch_size))]
    rows += [*_ends(names, ("time", "vector")), *_dense(names.head, "head")]
    for group, blocks in (("dual_blocks", range(dual)), ("blocks", range(dual, last))):
        if blocks:
            dualed = group == "dual_blocks"
            rows += _stream(names.block, names.image, f"{group}/image", blocks, net.qk_norm, dualed)
            rows += _stream(names.block, names.context, f"{group}/context", blocks, net.qk_norm)
    block, swap = names.block.format(last), names is _SD3_DIFFUSERS
    rows += _stream(block, names.image, "last_block/image", None, net.qk_norm)
    rows += _last_context(block, names.context, net.qk_norm, swap)

    def table(shape):
        side = math.isqrt(shape[1]) if len(shape) == 3 else 1
        one = centered_axis(side, side, net.grid_step, net.width)
        return (1, side * side, net.width), table_rows(one, one)

    shape = (1, net.grid_size**2, net.width)
    return Layout("MMDiT", tuple(rows), (Constant(names.table, table, shape),))


def _flux_layout(net: Flux, names: _Names, *single: Weight) -> Layout:
    p, blocks = net.patch_size, range(net.num_layers)
    kernel, bias = _packed_out(p)
    parts = ("time", "vector") if net.guidance is None else ("time", "vector", "guidance")
    return Layout(
        "Flux",
        (
            *_dense(names.patches, "patches", kernel=_packed_in(p)),
            *_ends(names, parts),
            *_dense(names.head, "head", kernel=kernel, bias=bias),
            *_stream(names.block, names.image, "double_blocks/image", blocks, True),
            *_stream(names.block, names.context, "double_blocks/context", blocks, True),
            *single,
        ),
    )


def _dense(
    key: str, path: str, *, kernel: Transform = LINEAR, bias: Transform = SAME
) -> tuple[Weight, Weight]:
    """The two rows of a Dense outside the blocks, of which the numbers lie in another order."""
    return (
        Weight((f"{key}.weight",), f"{path}/kernel", kernel),
        Weight((f"{key}.bias",), f"{path}/bias", bias),
    )


def _scales(q: str, k: str, path: str, blocks: range | None) -> tuple[Weight, Weight]:
    return (
        Weight(q, f"{path}/q_norm/scale", SAME, blocks),
        Weight(k, f"{path}/k_norm/scale", SAME, blocks),
    )


def _ends(names: _Names, parts: Sequence[str]) -> Iterator[Weight]:
    """The rows outside the blocks, without those of the patches and the head."""
    yield from dense(names.text, "context")
    for part in parts:
        enter, leave = names.embed[part]
        yield from dense(enter, f"embed/{part}_in")
        yield from dense(leave, f"embed/{part}_out")
    swap = names is _SD3_DIFFUSERS or names is _FLUX_DIFFUSERS
    yield from _modulation(names.modulation, "modulation", swap)


def _modulation(key: str, path: str, swap: bool) -> tuple[Weight, Weight]:
    """Shift and scale; diffusers has the scale first in norms that nothing follows."""
    return _dense(key, path, kernel=SWAPPED_LINEAR, bias=SWAPPED) if swap else dense(key, path)


def _attention(
    block: str, names: _Attention, path: str, blocks: range | None, qk_norm: bool
) -> Iterator[Weight]:
    """The rows of what makes queries, keys and values, whose names begin with `block`."""
    yield from dense(tuple(block + key for key in names.qkv), f"{path}/qkv", blocks)
    if qk_norm:
        yield from _scales(block + names.q_norm, block + names.k_norm, path, blocks)


def _stream(
    block: str, stream: _Stream, path: str, blocks: range | None, qk_norm: bool, dual: bool = False
) -> Iterator[Weight]:
    """The rows of one stream of joint blocks, whose names begin with `block`."""
    yield from dense(block + stream.modulation, f"{path}/modulation", blocks)
    yield from _attention(block, stream.attention, f"{path}/heads", blocks, qk_norm)
    yield from dense(block + stream.attention.out, f"{path}/out", blocks)
    if dual and stream.own is not None:
        yield from _attention(block, stream.own, f"{path}/own_heads", blocks, qk_norm)
        yield from dense(block + stream.own.out, f"{path}/own_out", blocks)
    yield from dense(block + stream.mlp_in, f"{path}/mlp_in", blocks)
    yield from dense(block + stream.mlp_out, f"{path}/mlp_out", blocks)


def _last_context(block: str, stream: _Stream, qk_norm: bool, swap: bool) -> Iterator[Weight]:
    """The rows of the text in the last block, which nothing follows."""
    path = "last_block/context"
    yield from _modulation(block + stream.modulation, f"{path}/modulation", swap)
    yield from _attention(block, stream.attention, f"{path}/heads", None, qk_norm)


def _found(name: str, tensors: Mapping[str, Any], prefix: str, *known: _Names) -> _Names:
    """The layout of which the patches are there."""
    for names in known:
        if f"{prefix}{names.patches}.weight" in tensors:
            return names
    expected = " or ".join(repr(f"{prefix}{names.patches}.weight") for names in known)
    found = ", ".join(list(tensors)[:6]) or "none"
    raise ValueError(
        f"{name}: expected weights with a tensor {expected}, got {len(tensors)}: {found}; is there"
        " another prefix in front?"
    )


def _like(of: Callable, net: MMDiT | Flux, channels: int, prefix: str, names: _Names):
    """The shapes of the params. of: (the name of a tensor, its number of axes) -> its shape."""
    _, text = of(f"{prefix}{names.text}.weight", 2)
    _, pooled = of(f"{prefix}{names.embed['vector'][0]}.weight", 2)
    p = net.patch_size
    x, t, context, vector = (
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((1, p, p, channels), (1,), (1, 1, text), (1, pooled))
    )
    return shapes_of(net, x, t, Condition(context=context, vector=vector))


def _with_grid(net: MMDiT, table: np.ndarray | None) -> MMDiT:
    """The network on the grid of a published table of positions, [1, side^2, width]."""
    if table is None or table.ndim != 3 or table.shape[1] < 2:
        return net
    side = math.isqrt(table.shape[1])
    sine, cosine = (float(table[0, 1, i]) for i in (0, net.width // 4))
    whole = round(np.arctan2(sine, cosine) * side)  # the grid spans a whole number, as published
    return net.clone(grid_size=side, grid_step=whole / side)
