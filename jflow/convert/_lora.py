"""LoRAs of SD3 and FLUX.1 as peft, diffusers and kohya's scripts write them, in and out.

The names were compared with diffusers and peft on random weights; no published file was opened.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jflow import adapters
from jflow._core.files import expand
from jflow.convert._layouts import (
    SAME,
    Layout,
    Transform,
    Weight,
    _blocks,
    _leaves,
    _pieces,
    _published,
    _weights,
    some,
)
from jflow.convert._mmdit import (
    flux_diffusers_layout,
    flux_layout,
    mmdit_diffusers_layout,
    mmdit_layout,
)
from jflow.convert._safetensors import (
    file_in,
    read_json,
    read_metadata,
    read_safetensors,
    write_safetensors,
)
from jflow.nets import Flux, MMDiT
from jflow.types import Adapter, Params, PyTree

PREFIXES = ("base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.")
KOHYA = "lora_unet_"  # dots of the names became underscores
PART = re.compile(r"\.(lora_A|lora_B|lora_down|lora_up|down|up)(\.default)?\.weight$")
DOWN = ("lora_A", "lora_down", "down")
XLABS = re.compile(r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora([12])$")
XLABS_SINGLE = re.compile(r"single_blocks\.(\d+)\.processor\.(qkv|proj)_lora$")
METADATA = "lora_adapter_metadata"


def lora(
    file: str | Path,
    net: MMDiT | Flux | Layout,
    base: PyTree,
    *,
    prefix: str = "",
    dtype: Any = None,
) -> tuple[Adapter, Params]:
    """A LoRA as peft, diffusers, kohya's scripts or x-labs saved it, as an adapter of a base.

    Each module m of the file has two matrices, and the base W of that module becomes

        W + (alpha / rank) B A

    where alpha is the file's, in '<m>.alpha' or in the configuration of peft (the metadata of the
    file, or adapter_config.json beside it), and is the rank where there is none. It is multiplied
    into B. Names of modules are those of the published layouts of the network, fused or split, with
    dots or underscores. Where jflow has several modules in one kernel (q, k and v), their ranks add
    up, unless the file has the same A for them, as kohya's fused ones do; blocks that the file
    leaves out have zeros.

    Args:
        file: a safetensors file, or a folder that holds one.
        net: the network, `nets.MMDiT` or `nets.Flux`; or a layout of another one, of which linear
            modules are read.
        base: the params of the network, or their shapes. Only shapes are read: nothing is copied.
        prefix: tensors whose names do not start with it are left alone, such as those of text
            encoders beside 'transformer.' or 'lora_unet_'. By default all tensors have to be used.
        dtype: of the matrices; None is that of the file, for float16 float32.

    Returns:
        The adapter, `adapters.lora`, and its params, {'A': [..., in, rank], 'B': [..., rank, out]}
        at the path of each kernel that the file changes: `adapters.merge(base, adapter, params)`,
        or the params {'base': base, 'adapter': params} of `adapters.wrap(velocity, adapter)`.

    Raises:
        ValueError: tensors that are no pair of matrices, or have no module in this network, are
            named: a LoRA that loads and does nothing is an error. So are matrices of other shapes
            (a LoRA for another base, a Control LoRA that widens the input), a rank larger than the
            layer, and tensors of several types. DoRA and LoRAs of biases are not supported.
        TypeError: net is no such network or layout.

    Examples:
        >>> import jflow
        >>> from jflow import adapters, convert
        >>> net, base = convert.flux("flux1-dev.safetensors")  # doctest: +SKIP
        >>> adapter, params = convert.lora("style.safetensors", net, base)  # doctest: +SKIP
        >>> velocity = adapters.wrap(jflow.velocity(net), adapter)  # doctest: +SKIP
        >>> velocity.apply({"base": base, "adapter": params}, x, t, cond)  # doctest: +SKIP

    References:
        Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, *LoRA: Low-Rank Adaptation of Large
            Language Models*, 2021, arXiv:2106.09685.
    """
    layouts = _layouts_of(net)
    tensors, config = _read(file, prefix)
    leaves, _ = _leaves(base)
    places: dict[str, _Place] = {}
    for layout in layouts:
        _weights(layout, leaves)
        places |= _places(layout, leaves)
    pairs = _pairs(tensors, config)
    found = _placed(pairs, places, layouts[0].name)
    stored = pairs[0].down.dtype
    dtype = dtype or (np.dtype(np.float32) if stored == np.float16 else stored)
    by_path: dict[str, list[tuple[_Place, _Pair]]] = {}
    for place, pair in found:
        by_path.setdefault(place.row.path, []).append((place, pair))
    matrices = {path: _leaf(own, leaves[path].shape, dtype) for path, own in by_path.items()}
    rank = max(a.shape[-1] for a, _ in matrices.values())
    params = {path: {"A": jnp.asarray(a), "B": jnp.asarray(b)} for path, (a, b) in matrices.items()}
    return adapters.lora(rank, where=tuple(params)), unflatten_dict(params, sep="/")


def save_lora(
    file: str | Path,
    net: MMDiT | Flux | Layout,
    params: Params,
    *,
    scale: float = 1.0,
    prefix: str = "transformer.",
    dtype: Any = None,
) -> None:
    """Write a LoRA as a safetensors file that diffusers, and others who read its names, load.

    Args:
        file: its path; diffusers looks for 'pytorch_lora_weights.safetensors' in a folder.
        net: the network, whose modules get diffusers' names; or a layout with other names.
        params: of `adapters.lora`, {'A', 'B'} at the paths of kernels.
        scale: alpha / rank of the LoRA; it is multiplied into B, so that no reader can miss it.
        prefix: what each name begins with: 'transformer.' for pipelines of diffusers,
            'base_model.model.' for peft.
        dtype: of the tensors; None is that of the params.

    Raises:
        ValueError: params that are no such pair, or have no linear module in this network, or are
            of chosen layers only.
        TypeError: net is no such network or layout.

    Examples:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from jflow import convert
        >>> layout = convert.Layout("one Dense", (
        ...     convert.Weight("fc.weight", "kernel", convert.LINEAR),
        ... ))
        >>> path = tempfile.mkdtemp() + "/lora.safetensors"
        >>> params = {"kernel": {"A": jnp.ones((3, 1)), "B": jnp.ones((1, 2))}}
        >>> convert.save_lora(path, layout, params, scale=0.5)
        >>> {n: x.shape for n, x in convert.read_safetensors(path).items()}
        {'transformer.fc.lora_A.weight': (1, 3), 'transformer.fc.lora_B.weight': (2, 1)}
        >>> base = {"kernel": jnp.zeros((3, 2))}
        >>> adapter, again = convert.lora(path, layout, base)
        >>> again["kernel"]["B"]
        Array([[0.5, 0.5]], dtype=float32)
    """
    layout = _layouts_of(net)[0]
    matrices: dict[str, dict[str, np.ndarray]] = {}
    for path, matrix in _leaves(params)[0].items():
        kernel, _, name = path.rpartition("/")
        matrices.setdefault(kernel, {})[name] = np.asarray(matrix)
    rows = {row.path: row for row, _ in _rows(layout)}
    unknown = [path for path in matrices if path not in rows]
    if unknown or not matrices:
        raise ValueError(
            f"save_lora: expected params at the kernels of {layout.name}, got "
            f"{some(unknown) or 'none'}"
        )
    for path, own in matrices.items():
        depth = [len(numbers) for numbers in _blocks(rows[path])]
        shapes = {name: list(x.shape) for name, x in own.items()}
        a, b = shapes.get("A", []), shapes.get("B", [])
        leads = a[:-2] == b[:-2] == depth
        if set(own) != {"A", "B"} or not leads or a[-1] != b[-2]:
            raise ValueError(
                f"save_lora: expected {path!r} of 'A' {[*depth, 'in', 'rank']} and 'B' "
                f"{[*depth, 'rank', 'out']}, got {shapes}: the params of a LoRA of all layers"
            )
    tensors = {}
    for module, down, up in _published_pairs(layout, matrices):
        tensors[f"{prefix}{module}.lora_A.weight"] = down
        up = up if scale == 1 else (up.astype(np.float32) * scale).astype(up.dtype)
        tensors[f"{prefix}{module}.lora_B.weight"] = up
    if dtype is not None:
        tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    write_safetensors(file, tensors, {"format": "pt"})


class _Pair(NamedTuple):
    """The two matrices of one module of a file: W + scale up down."""

    module: str  # as the file has it
    down: np.ndarray  # [rank, in], or [rank, C, p, p]
    up: np.ndarray  # [out, rank]
    scale: float


class _Place(NamedTuple):
    """Where the weight of a published module lies in the params."""

    row: Weight  # of the kernel
    outputs: Transform  # the order of the outputs, which is that of the bias
    block: tuple[int, ...]
    piece: slice  # of the outputs
    shape: tuple[int, ...]  # as published


def _rows(layout: Layout) -> Iterator[tuple[Weight, Transform]]:
    """The rows of the kernels, each with the transform of its bias."""
    rows = {row.path: row for row in layout.weights}
    for path, row in rows.items():
        if path.rpartition("/")[2] == "kernel":
            bias = rows.get(path.removesuffix("kernel") + "bias")
            yield row, SAME if bias is None else bias.transform


def _places(layout: Layout, leaves: Mapping[str, Any]) -> dict[str, _Place]:
    """The published modules by name."""
    found = {}
    for row, outputs in _rows(layout):
        depth = len(_blocks(row))
        shapes = _published(row, leaves[row.path])
        for (key, place), (_, shape) in zip(_pieces(row, leaves[row.path]), shapes, strict=True):
            piece = place[depth] if isinstance(place[depth], slice) else slice(None)
            found[key.removesuffix(".weight")] = _Place(row, outputs, place[:depth], piece, shape)
    return found


def _pairs(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> list[_Pair]:
    """The pairs of a file, in its order; raise with the names of all tensors that are in none."""
    halves: dict[str, dict[bool, str]] = {}
    alphas, unknown = {}, []
    for name in tensors:
        if found := PART.search(name):
            halves.setdefault(name[: found.start()], {})[found[1] in DOWN] = name
        elif name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = name
        else:
            unknown.append(name)
    unknown += [name for module, name in alphas.items() if module not in halves]
    if unknown:
        hints = {
            "dora": "; it is a DoRA, whose magnitudes are not supported",
            "magnitude": "; it is a DoRA, whose magnitudes are not supported",
            "norm": "; a Control LoRA, which changes norms and widens its input, is not supported",
            "lora_B.bias": "; a LoRA of biases is not supported",
        }
        hint = next((h for part, h in hints.items() if any(part in n for n in unknown)), "")
        raise ValueError(f"lora: expected pairs of matrices, got also {some(unknown)}{hint}")
    lonely = [name for pair in halves.values() if len(pair) == 1 for name in pair.values()]
    if lonely or not halves:
        raise ValueError(
            "lora: expected pairs of matrices such as 'transformer.proj_out.lora_A.weight' and "
            f"'transformer.proj_out.lora_B.weight', got {some(lonely) or 'none'}"
        )
    _check_types({name: tensors[name] for pair in halves.values() for name in pair.values()})
    pairs = []
    for module, pair in halves.items():
        down, up = tensors[pair[True]], tensors[pair[False]]
        if (
            down.ndim not in (2, 4)
            or up.ndim < 2
            or up.shape[1:] != (len(down), *[1] * (up.ndim - 2))
        ):
            raise ValueError(
                f"lora: expected {pair[True]!r} [rank, inputs] and {pair[False]!r} [outputs, rank],"
                f" got {list(down.shape)} and {list(up.shape)}"
            )
        alpha = tensors[alphas[module]] if module in alphas else None
        scale = _scale(module, len(down), config) if alpha is None else float(alpha) / len(down)
        pairs += _split(_Pair(module, down, up.reshape(up.shape[:2]), scale))
    return pairs


def _split(pair: _Pair) -> list[_Pair]:
    """The pair; or, of x-labs' single blocks, one for each of q, k and v, whose kernel has more
    outputs than these."""
    found = XLABS_SINGLE.search(pair.module)
    if found is None or found[2] != "qkv" or len(pair.up) % 3:
        return [pair]
    start = f"{pair.module[: found.start()]}single_transformer_blocks.{found[1]}.attn.to_"
    parts = zip("qkv", np.split(pair.up, 3), strict=True)
    return [pair._replace(module=start + name, up=up) for name, up in parts]


def _check_types(tensors: Mapping[str, np.ndarray]) -> None:
    types = {tensor.dtype: name for name, tensor in tensors.items()}
    if len(types) > 1:
        given = ", ".join(f"{name!r} is {dtype}" for dtype, name in types.items())
        raise ValueError(f"lora: expected tensors of one type, got several: {given}")


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """The scale of a module by a configuration of peft, 1 without one."""
    if "lora_alpha" not in config:
        return 1.0
    if config.get("use_dora"):
        raise ValueError("lora: expected a LoRA, got a DoRA, whose magnitudes are not supported")
    patterns = config.get("alpha_pattern") or {}
    matches = (a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = next(matches, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _module(name: str) -> str:
    """The name of a module without what stands in front of it, x-labs' as the original's."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    if found := XLABS.match(name):
        stream = {"1": "img", "2": "txt"}[found[3]]
        return f"{found[1]}.{stream}_attn.{found[2]}"
    if (found := XLABS_SINGLE.match(name)) and found[2] == "proj":
        return f"single_blocks.{found[1]}.linear2"
    return name


def _leaf(pairs: list[tuple[_Place, _Pair]], shape: tuple[int, ...], dtype) -> tuple:
    """The matrices a [..., in, rank] and b [..., rank, out] of one leaf.

    Pieces of the outputs that have one and the same `down`, as where a file has q, k and v fused,
    share it; the others stand one after another in the rank, so that b is block-diagonal.
    """
    row, outputs = pairs[0][0].row, pairs[0][0].outputs
    blocks: dict[tuple[int, ...], list[list[tuple[_Place, _Pair]]]] = {}
    for place, pair in pairs:
        groups = blocks.setdefault(place.block, [])
        for group in groups:
            if np.array_equal(group[0][1].down, pair.down):
                group.append((place, pair))
                break
        else:
            groups.append([(place, pair)])
    rank = max(sum(len(group[0][1].down) for group in groups) for groups in blocks.values())
    a = np.zeros((*shape[:-1], rank), dtype)
    b = np.zeros((*shape[:-2], rank, shape[-1]), dtype)
    for block, groups in blocks.items():
        start = 0
        for group in groups:
            down = group[0][1].down
            end = start + len(down)
            inputs = row.transform.read(down) if outputs is SAME else down.T
            at: Any = (*block, slice(None), slice(start, end))
            a[at] = inputs
            for place, pair in group:
                up = pair.up if pair.scale == 1 else pair.up.astype(np.float32) * pair.scale
                at = (*block, slice(start, end), place.piece)
                b[at] = up.T
            start = end
    return a, outputs.read(b)


def _layouts_of(net: MMDiT | Flux | Layout) -> tuple[Layout, ...]:
    """The layouts that a file may have, the one that is written in front."""
    if isinstance(net, MMDiT):
        return mmdit_diffusers_layout(net), mmdit_layout(net)
    if isinstance(net, Flux):
        return flux_diffusers_layout(net), flux_layout(net)
    if isinstance(net, Layout):
        return (net,)
    raise TypeError(f"lora: expected net to be nets.MMDiT, nets.Flux or a Layout, got {net!r}")


def _read(file: str | Path, prefix: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a file whose names start with prefix, and the configuration of peft."""
    file = expand(file)
    tensors = read_safetensors(file)
    folder, path = (file, file_in(file)) if file.is_dir() else (file.parent, file)
    beside = folder / "adapter_config.json"
    config, text = {}, read_metadata(path).get(METADATA)
    if text is not None:
        config = json.loads(text)
    elif path.name == "adapter_model.safetensors" and beside.exists():
        config = read_json("lora", beside)
    return (
        {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)},
        {name.removeprefix("transformer."): value for name, value in config.items()},
    )


def _placed(pairs: list[_Pair], places: Mapping[str, _Place], name: str) -> list[tuple]:
    """(place, pair) of each; raise with the names of those that fit no place."""
    joined = {module.replace(".", "_"): place for module, place in places.items()}
    found, unknown = [], []
    for pair in pairs:
        module = _module(pair.module)
        place = places.get(module, joined.get(module.removeprefix(KOHYA)))
        if place is None:
            unknown.append(pair.module)
        else:
            found.append((place, pair))
    if unknown:
        raise ValueError(
            f"lora: this {name} has no modules of these names: {some(unknown)}; {len(found)} others"
            " are there: the LoRA is for another base, or for text encoders too, which"
            " prefix='transformer.' or prefix='lora_unet_' leaves alone"
        )
    taken: dict[Any, str] = {}
    for place, pair in found:
        inputs, (outputs, *_) = place.shape[1:], place.shape
        rank = len(pair.down)
        if pair.down.shape[1:] != inputs or len(pair.up) != outputs:
            wide = place.row.path == "patches/kernel" and pair.down.shape[1:] != inputs
            raise ValueError(
                f"lora: expected {pair.module!r} from {list(inputs)} to {outputs} numbers, got from"
                f" {list(pair.down.shape[1:])} to {len(pair.up)}: the LoRA is for another base"
                + (", or it is a Control LoRA, which widens the input: not supported" * wide)
            )
        if rank > min(outputs, math.prod(inputs)):
            raise ValueError(
                f"lora: expected {pair.module!r}, from {math.prod(inputs)} to {outputs} numbers, of"
                f" at most the lower rank, got {rank}"
            )
        where = place.row.path, place.block, str(place.piece)
        if where in taken:
            raise ValueError(f"lora: {taken[where]!r} and {pair.module!r} are one module")
        taken[where] = pair.module
    return found


def _published_pairs(layout: Layout, matrices: Mapping[str, Mapping]) -> Iterator[tuple]:
    """(module, down, up) of each piece of each leaf; what a piece has no part in is left out."""
    for row, outputs in _rows(layout):
        if row.path not in matrices:
            continue
        a, b = matrices[row.path]["A"], outputs.write(matrices[row.path]["B"])
        leaf = jax.ShapeDtypeStruct((*a.shape[:-1], b.shape[-1]), a.dtype)
        depth = len(_blocks(row))
        for key, place in _pieces(row, leaf):
            down, up = a[place[:depth]], b[place[:depth]]
            piece = place[depth] if isinstance(place[depth], slice) else slice(None)
            alive = np.any(up != 0, axis=1)
            here = np.any(up[:, piece] != 0, axis=1)
            kept = here | (~alive & np.any(down != 0, axis=0))
            if kept.any():
                down, up = down[:, kept], up[kept, piece]
                down = row.transform.write(down) if outputs is SAME else down.T
                up = up.T.reshape(*up.T.shape, *[1] * (down.ndim - 2))
                yield key.removesuffix(".weight"), down, up
