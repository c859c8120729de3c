"""The layouts of SD3, SD3.5 and Flux: which tensors make which params of `nets.MMDiT`, `nets.Flux`.

The names are those of the model code of Stability AI, Black Forest Labs and diffusers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]


class Leaf(NamedTuple):
    """A leaf of the params, and the tensors that make it.

    Attributes:
        path: where the leaf is in the params.
        names: for each layer of a stacked leaf, else for one, the names of the tensors that are
            joined along their first axis.
        stacked: whether the leaf has a leading axis of layers.
        read: from the joined tensor of a layer to what the leaf holds of that layer.
        write: its inverse.
    """

    path: tuple[str, ...]
    names: list[tuple[str, ...]]
    stacked: bool
    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


def same(w: np.ndarray) -> np.ndarray:
    return w


def turned(w: np.ndarray) -> np.ndarray:
    """A kernel [inputs, outputs] of a weight [outputs, inputs], and back."""
    return w.T


def swapped(w: np.ndarray) -> np.ndarray:
    """The two halves of the first axis in the other order: (scale, shift) and (shift, scale)."""
    return np.roll(w, w.shape[0] // 2, axis=0)


def conv_kernel(w: np.ndarray) -> np.ndarray:
    """The kernel [p p C, D] on patches of a convolution [D, C, p, p] with steps of p."""
    return w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0])


def conv_weight(w: np.ndarray, p: int) -> np.ndarray:
    """The inverse of `conv_kernel`."""
    return w.reshape(p, p, -1, w.shape[-1]).transpose(3, 2, 0, 1)


def channels_last(w: np.ndarray, p: int) -> np.ndarray:
    """The first axis from (C, p, p), the channel slowest, to (p, p, C)."""
    return (
        w.reshape(-1, p, p, *w.shape[1:]).transpose(1, 2, 0, *range(3, w.ndim + 2)).reshape(w.shape)
    )


def channels_first(w: np.ndarray, p: int) -> np.ndarray:
    """The inverse of `channels_last`."""
    return (
        w.reshape(p, p, -1, *w.shape[1:]).transpose(2, 0, 1, *range(3, w.ndim + 2)).reshape(w.shape)
    )


class Stream(NamedTuple):
    """The modules of one stream of a joint block, as templates of the number of the block."""

    modulation: str
    qkv: tuple[str, ...]
    q_norm: str
    k_norm: str
    out: str
    mlp_in: str
    mlp_out: str
    own: tuple[tuple[str, ...], str, str, str] | None = None  # the second attention's, as above


def _diffusers(context: bool) -> Stream:
    block, end = "transformer_blocks.{}.", "_context" if context else ""
    parts = ("add_q_proj", "add_k_proj", "add_v_proj") if context else ("to_q", "to_k", "to_v")
    added = "norm_added_" if context else "norm_"
    second = tuple(f"{block}attn2.{part}" for part in parts)
    return Stream(
        f"{block}norm1{end}.linear",
        tuple(f"{block}attn.{part}" for part in parts),
        f"{block}attn.{added}q.weight",
        f"{block}attn.{added}k.weight",
        f"{block}attn.to_add_out" if context else f"{block}attn.to_out.0",
        f"{block}ff{end}.net.0.proj",
        f"{block}ff{end}.net.2",
        (
            second,
            f"{block}attn2.norm_q.weight",
            f"{block}attn2.norm_k.weight",
            f"{block}attn2.to_out.0",
        ),
    )


def _sd3(block: str) -> Stream:
    def attention(name):
        prefix = f"joint_blocks.{{}}.{block}.{name}"
        return (
            (f"{prefix}.qkv",),
            f"{prefix}.ln_q.weight",
            f"{prefix}.ln_k.weight",
            f"{prefix}.proj",
        )

    prefix = f"joint_blocks.{{}}.{block}"
    mlp = f"{prefix}.mlp.fc1", f"{prefix}.mlp.fc2"
    return Stream(f"{prefix}.adaLN_modulation.1", *attention("attn"), *mlp, attention("attn2"))


def _flux(stream: str) -> Stream:
    prefix = f"double_blocks.{{}}.{stream}"
    norm = f"{prefix}_attn.norm"
    return Stream(
        f"{prefix}_mod.lin",
        (f"{prefix}_attn.qkv",),
        f"{norm}.query_norm.scale",
        f"{norm}.key_norm.scale",
        f"{prefix}_attn.proj",
        f"{prefix}_mlp.0",
        f"{prefix}_mlp.2",
    )


class Layout(NamedTuple):
    """The names of a published layout; `swaps` says that last modulations are (scale, shift)."""

    image: Stream
    context: Stream
    patches: str
    text: str
    embed: Mapping[str, tuple[str, str]]
    modulation: str
    head: str
    swaps: bool


_DIFFUSERS_EMBED = {
    part: tuple(f"time_text_embed.{name}_embedder.linear_{k}" for k in (1, 2))
    for part, name in {"time": "timestep", "vector": "text", "guidance": "guidance"}.items()
}
SD3 = {
    "original": Layout(
        _sd3("x_block"),
        _sd3("context_block"),
        "x_embedder.proj",
        "context_embedder",
        {
            part: (f"{name}_embedder.mlp.0", f"{name}_embedder.mlp.2")
            for part, name in {"time": "t", "vector": "y"}.items()
        },
        "final_layer.adaLN_modulation.1",
        "final_layer.linear",
        False,
    ),
    "diffusers": Layout(
        _diffusers(False),
        _diffusers(True),
        "pos_embed.proj",
        "context_embedder",
        _DIFFUSERS_EMBED,
        "norm_out.linear",
        "proj_out",
        True,
    ),
}
FLUX = {
    "original": Layout(
        _flux("img"),
        _flux("txt"),
        "img_in",
        "txt_in",
        {
            part: (f"{part}_in.in_layer", f"{part}_in.out_layer")
            for part in ("time", "vector", "guidance")
        },
        "final_layer.adaLN_modulation.1",
        "final_layer.linear",
        False,
    ),
    "diffusers": SD3["diffusers"]._replace(patches="x_embedder"),
}
_SINGLE = {
    "original": (
        "single_blocks.{}.modulation.lin",
        ("single_blocks.{}.linear1",),
        "single_blocks.{}.norm.query_norm.scale",
        "single_blocks.{}.norm.key_norm.scale",
        "single_blocks.{}.linear2",
    ),
    "diffusers": (
        "single_transformer_blocks.{}.norm.linear",
        (
            *(f"single_transformer_blocks.{{}}.attn.to_{part}" for part in "qkv"),
            "single_transformer_blocks.{}.proj_mlp",
        ),
        "single_transformer_blocks.{}.attn.norm_q.weight",
        "single_transformer_blocks.{}.attn.norm_k.weight",
        "single_transformer_blocks.{}.proj_out",
    ),
}

KERNEL = turned, turned
SWAPPED_KERNEL = (lambda w: swapped(w).T), (lambda w: swapped(w.T))


def linear(path, modules, layers, weight=KERNEL, bias=(same, same)) -> Iterator[Leaf]:
    """The leaves of a dense layer; `layers` are numbers of blocks, None where it is in none."""
    for leaf, name, maps in (("kernel", "weight", weight), ("bias", "bias", bias)):
        names = tuple(f"{module}.{name}" for module in modules)
        yield leaf_of((*path, leaf), names, layers, *maps)


def leaf_of(path, names, layers, read=same, write=same) -> Leaf:
    """A leaf of the tensors whose names are templates of the number of a block."""
    each = [None] if layers is None else layers
    named = [tuple(name.format(i) for name in names) for i in each]
    return Leaf(path, named, isinstance(layers, range), read, write)


def stream_leaves(path, stream: Stream, layers, qk_norm, dual=False, last=False, swaps=False):
    """The leaves of one stream of the blocks of these numbers."""
    swap = swaps and last
    yield from linear(
        (*path, "modulation"),
        (stream.modulation,),
        layers,
        *((SWAPPED_KERNEL, (swapped, swapped)) if swap else ()),
    )
    attentions = [("", stream[1:5])] + ([("own_", stream.own)] if dual else [])
    for own, (qkv, q_norm, k_norm, out) in attentions:
        heads = (*path, f"{own}heads")
        yield from linear((*heads, "qkv"), qkv, layers)
        if qk_norm:
            yield leaf_of((*heads, "q_norm", "scale"), (q_norm,), layers)
            yield leaf_of((*heads, "k_norm", "scale"), (k_norm,), layers)
        if not last:
            yield from linear((*path, f"{own}out"), (out,), layers)
    if not last:
        yield from linear((*path, "mlp_in"), (stream.mlp_in,), layers)
        yield from linear((*path, "mlp_out"), (stream.mlp_out,), layers)


def ends(layout: Layout, guidance: bool) -> Iterator[Leaf]:
    """The leaves outside the blocks, without the patches and the head."""
    yield from linear(("context",), (layout.text,), None)
    for part in ("time", "vector") + ("guidance",) * guidance:
        for end, module in zip(("in", "out"), layout.embed[part], strict=True):
            yield from linear(("embed", f"{part}_{end}"), (module,), None)
    swap = (SWAPPED_KERNEL, (swapped, swapped)) if layout.swaps else ()
    yield from linear(("modulation",), (layout.modulation,), None, *swap)


def mmdit_leaves(net, name: str) -> Iterable[Leaf]:
    """The leaves of a `nets.MMDiT` in the layout of this name, 'original' or 'diffusers'."""
    layout, dual, last = SD3[name], net.dual_layers, net.num_layers - 1
    weight = conv_kernel, partial(conv_weight, p=net.patch_size)
    yield from linear(("patches",), (layout.patches,), None, weight)
    yield from ends(layout, False)
    yield from linear(("head",), (layout.head,), None)
    for group, layers in (("dual_blocks", range(dual)), ("blocks", range(dual, last))):
        for part in ("image", "context") if layers else ():
            own = part == "image" and group == "dual_blocks"
            stream = getattr(layout, part)
            yield from stream_leaves((group, part), stream, layers, net.qk_norm, dual=own)
    for part in ("image", "context"):
        yield from stream_leaves(
            ("last_block", part),
            getattr(layout, part),
            [last],
            net.qk_norm,
            last=part == "context",
            swaps=layout.swaps,
        )


def flux_leaves(net, name: str) -> Iterable[Leaf]:
    """The leaves of a `nets.Flux` in the layout of this name, 'original' or 'diffusers'."""
    layout, p = FLUX[name], net.patch_size
    yield from linear(
        ("patches",),
        (layout.patches,),
        None,
        (lambda w: channels_last(w.T, p), lambda w: channels_first(w, p).T),
    )
    yield from ends(layout, net.guidance is not None)
    yield from linear(
        ("head",),
        (layout.head,),
        None,
        (lambda w: channels_last(w, p).T, lambda w: channels_first(w.T, p)),
        (lambda b: channels_last(b, p), lambda b: channels_first(b, p)),
    )
    for part in ("image", "context"):
        yield from stream_leaves(
            ("double_blocks", part), getattr(layout, part), range(net.num_layers), True
        )
    modulation, enter, q_norm, k_norm, out = _SINGLE[name]
    path, layers = ("single_blocks",), range(net.num_single_layers)
    yield from linear((*path, "modulation"), (modulation,), layers)
    yield from linear((*path, "in"), enter, layers)
    yield leaf_of((*path, "q_norm", "scale"), (q_norm,), layers)
    yield leaf_of((*path, "k_norm", "scale"), (k_norm,), layers)
    yield from linear((*path, "out"), (out,), layers)
