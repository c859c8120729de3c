"""Layouts: which published tensor is which leaf of params, as a table that is read both ways."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.linen import init_linen
from jflow.convert._safetensors import tensors_of, write_shards
from jflow.types import Array, Params, PyTree


class Transform(NamedTuple):
    """How the numbers of a published tensor lie in a leaf of params, and back.

    Both functions leave leading axes alone, such as that of the blocks, and act on the last ones.

    Attributes:
        read: (published array of numpy) -> the leaf.
        write: (leaf, of numpy or JAX) -> the published array, the inverse. By methods of arrays
            alone (`swapaxes`, `reshape`, `transpose`, slices), which make views of numpy's, a leaf
            is filled through it, without a second array.
    """

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[Any], Any]


def _same(x):
    return x


def _transposed(x):
    return x.swapaxes(-1, -2)


SAME = Transform(_same, _same)  # biases, gains, tables
LINEAR = Transform(_transposed, _transposed)  # the weight of a torch.nn.Linear, [out, in]


class Weight(NamedTuple):
    """One row of a layout: a leaf of params, and the published tensors that it consists of.

    Attributes:
        keys: the published name; () for a leaf of zeros that is not published; or several, whose
            tensors stand one after another along the first
            axis of what `transform` reads (the outputs of a torch.nn.Linear), as q, k and v do.
            With `blocks`, '{}' in it stands for the number of the block.
        path: of the leaf, with '/' between names: 'blocks/attention/qkv/kernel'.
        transform: how the published numbers lie in the leaf. `SAME` by default, `LINEAR` for the
            kernel of a Dense.
        blocks: the numbers of the blocks along the leaf's first axis, such as range(28); a tuple of
            ranges for as many first axes, and as many '{}'; or None for a leaf that is not stacked.
        parts: the sizes of the tensors of several `keys` in proportion, such as (1, 1, 1, 4); equal
            ones by default.
    """

    keys: str | tuple[str, ...]
    path: str
    transform: Transform = SAME
    blocks: range | tuple[range, ...] | None = None
    parts: tuple[int, ...] | None = None


class Constant(NamedTuple):
    """A published tensor that jflow computes: it is compared with the file, and never loaded.

    Attributes:
        key: the published name. A file may lack it.
        value: (shape of the published tensor) -> (the shape that it has to have, its numbers),
            where the numbers are arrays of numpy in pieces, the raveled tensor one after another,
            so that a large table is never there as a whole.
        shape: of the tensor that is written, or None: it is not written.
    """

    key: str
    value: Callable[[tuple[int, ...]], tuple[tuple[int, ...], Iterable[np.ndarray]]]
    shape: tuple[int, ...] | None = None


class Layout(NamedTuple):
    """The names and shapes under which a network's weights are published, for `load` and `save`.

    Attributes:
        name: for messages, such as 'DiT'.
        weights: a `Weight` for each leaf of params.
        constants: tensors that are compared.
        copies: pairs (copy, original) of names: tensors that are published twice, and have to be
            equal.

    Examples:
        >>> from jflow import convert
        >>> convert.Layout("one Dense", (
        ...     convert.Weight("fc.weight", "dense/kernel", convert.LINEAR),
        ...     convert.Weight("fc.bias", "dense/bias"),
        ... )).weights[1].path
        'dense/bias'
    """

    name: str
    weights: tuple[Weight, ...]
    constants: tuple[Constant, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()


def dense(
    keys: str | tuple[str, ...], path: str, blocks: range | tuple[range, ...] | None = None, **rest
) -> tuple[Weight, Weight]:
    """The two rows of a Dense: `keys` and `path` without '.weight' and '/kernel'."""
    names = (keys,) if isinstance(keys, str) else keys
    of = lambda part: tuple(f"{name}.{part}" for name in names)  # noqa: E731
    return (
        Weight(of("weight"), f"{path}/kernel", LINEAR, blocks, **rest),
        Weight(of("bias"), f"{path}/bias", SAME, blocks, **rest),
    )


def in_one_piece(array: np.ndarray) -> tuple[tuple[int, ...], Iterable[np.ndarray]]:
    """The value of a small `Constant`."""
    return array.shape, (array,)


def shapes_of(net, *inputs) -> PyTree:
    """The shapes of a Linen network's params, without computing them. inputs are shapes too."""
    return jax.eval_shape(partial(init_linen, net), jax.random.key(0), *inputs)


def count_blocks(tensors: Mapping[str, Any], prefix: str) -> int:
    """How many blocks the names have: `prefix` is followed by the number and a dot."""
    rest = (name.removeprefix(prefix) for name in tensors if name.startswith(prefix))
    return 1 + max((int(n) for n in (r.split(".")[0] for r in rest) if n.isdecimal()), default=-1)


def load(
    files: str | Path | Mapping[str, np.ndarray],
    layout: Layout,
    like: PyTree,
    *,
    prefix: str = "",
    dtype: Any = None,
    sharding: Any = None,
) -> Params:
    """Params from published weights, leaf by leaf.

    All names and shapes are compared before the first number is read. The stacked leaves of scanned
    blocks are filled tensor by tensor in the memory of the host and then handed to the devices, so
    that the host holds no more than one or two leaves beside the params.

    Args:
        files: what `read_safetensors` takes, or the tensors that it returned.
        layout: the names, from a function such as `dit_layout`.
        like: the shapes and types of the params, `jax.eval_shape(velocity.init, key, x, t)`.
        prefix: names that do not start with it belong to other models in the same files, and are
            left alone.
        dtype: of the params, such as jnp.bfloat16. None is the types of `like`, mostly float32.
            float16 overflows in many published models.
        sharding: where the params go: one `jax.sharding.Sharding`, a pytree of them like the
            params, or a function that makes this pytree of `like`, such as
            `partial(train.shardings, mesh=mesh, rules=rules)`. None is the default device.

    Returns:
        The params, with the structure of `like`.

    Raises:
        ValueError: tensors are missing, unknown or of another shape, two copies or a constant
            differ: the message names them; or `layout` does not cover `like`.

    Examples:
        >>> import jax
        >>> import numpy as np
        >>> from jflow import convert
        >>> layout = convert.Layout("one Dense", (
        ...     convert.Weight("fc.weight", "kernel", convert.LINEAR),
        ... ))
        >>> like = {"kernel": jax.ShapeDtypeStruct((3, 2), np.float32)}
        >>> file = {"fc.weight": np.zeros((2, 3), np.float32)}
        >>> convert.load(file, layout, like)["kernel"].shape
        (3, 2)
    """
    tensors = tensors_of(files, prefix)
    leaves, tree = _leaves(like)
    weights = _weights(layout, leaves)
    _check(layout, weights, leaves, tensors)
    placed = sharding(like) if callable(sharding) else sharding
    if placed is None or isinstance(placed, jax.sharding.Sharding):
        shardings = [placed] * len(leaves)
    else:
        shardings = tree.flatten_up_to(placed)
    with ThreadPoolExecutor(4) as pool:
        out = [
            _read(weights[path], leaf, tensors, dtype or leaf.dtype, where, pool)
            for (path, leaf), where in zip(leaves.items(), shardings, strict=True)
        ]
    return tree.unflatten(out)


def save(
    file: str | Path,
    layout: Layout,
    params: Params,
    *,
    prefix: str = "",
    dtype: Any = None,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | None = None,
) -> None:
    """Write params as a safetensors file in a published layout, leaf by leaf.

    Args:
        file: its path, where an older one and its index are replaced.
        layout: the names, from a function such as `dit_layout`.
        params: of the network that the layout was made for.
        prefix: what each name begins with.
        dtype: of the tensors; None is the types of the params.
        metadata: strings by name that the file keeps too.
        max_shard_size: in bytes. Tensors of more than that together go to several files beside
            `file`, which is not written: model-00001-of-00003.safetensors and so on for
            model.safetensors, and an index of them, model.safetensors.index.json, as large models
            are published. None: one file. The host never holds more than a leaf of the params.

    Raises:
        ValueError: `layout` does not cover the params, or max_shard_size is below 1.

    Examples:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from jflow import convert
        >>> layout = convert.Layout("one Dense", (
        ...     convert.Weight("fc.weight", "kernel", convert.LINEAR),
        ... ))
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> convert.save(path, layout, {"kernel": jnp.zeros((3, 2))})
        >>> convert.read_safetensors(path)["fc.weight"].shape
        (2, 3)
    """
    leaves, _ = _leaves(params)
    weights = _weights(layout, leaves)
    shapes, source = {}, {}
    for path, leaf in leaves.items():
        for key, shape in _published(weights[path], leaf):
            shapes[key] = jax.ShapeDtypeStruct(shape, dtype or leaf.dtype)
            source[key] = path
    for copy, original in layout.copies:
        shapes[copy] = shapes[original]
    constants = [(c.key, *c.value(c.shape)) for c in layout.constants if c.shape is not None]
    widest = dtype or jnp.result_type(*leaves.values())
    for key, shape, _ in constants:
        shapes[key] = jax.ShapeDtypeStruct(shape, widest)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for path, leaf in leaves.items():
            yield from _write(weights[path], leaf)
        for copy, original in layout.copies:
            path = source[original]
            yield copy, dict(_write(weights[path], leaves[path]))[original]
        for key, shape, pieces in constants:
            flat = np.concatenate([piece.reshape(-1) for piece in pieces], dtype=np.float32)
            yield key, flat.reshape(shape)

    write_shards(
        file,
        {prefix + key: like for key, like in shapes.items()},
        ((prefix + key, tensor) for key, tensor in tensors()),
        {"format": "pt"} | dict(metadata or {}),
        max_shard_size,
    )


def _leaves(tree: PyTree) -> tuple[dict[str, Any], Any]:
    """The leaves by path, in order, and the structure."""
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found)
    return dict(zip(names, (leaf for _, leaf in found), strict=True)), structure


def _weights(layout: Layout, leaves: Mapping[str, Any]) -> dict[str, Weight]:
    """The rows by path; raise unless they are one for each leaf, with as many blocks as it has."""
    rows = {row.path: row for row in layout.weights}
    if rows.keys() != leaves.keys() or len(rows) != len(layout.weights):
        raise ValueError(
            f"the layout of {layout.name} does not cover these params: without a row are "
            f"{sorted(leaves.keys() - rows.keys())}, without a leaf {sorted(rows.keys() - leaves)}"
        )
    for path, row in rows.items():
        expected = tuple(map(len, _blocks(row)))
        if leaves[path].shape[: len(expected)] != expected:
            raise ValueError(
                f"the layout of {layout.name}: expected {path!r} to lead with {list(expected)} "
                f"blocks, got the shape {list(leaves[path].shape)}"
            )
    return rows


def _blocks(row: Weight) -> tuple[range, ...]:
    if row.blocks is None:
        return ()
    return (row.blocks,) if isinstance(row.blocks, range) else row.blocks


def _keys(row: Weight) -> tuple[str, ...]:
    return (row.keys,) if isinstance(row.keys, str) else row.keys


def _whole(row: Weight, leaf) -> tuple[int, ...]:
    """The published shape of all keys of a row together, blocks in front."""
    return jax.eval_shape(row.transform.write, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)).shape


def _pieces(row: Weight, leaf) -> Iterator[tuple[str, tuple]]:
    """(published name, its place in the array of all)."""
    blocks, keys, whole = _blocks(row), _keys(row), _whole(row, leaf)
    parts = row.parts or (1,) * len(keys)
    total = whole[len(blocks)] if len(whole) > len(blocks) else 1
    ends = [total * sum(parts[: i + 1]) // sum(parts) for i in range(len(parts))]
    for place in itertools.product(*(range(len(numbers)) for numbers in blocks)):
        for key, start, end in zip(keys, [0, *ends], ends, strict=False):
            for numbers, i in zip(blocks, place, strict=True):
                key = key.replace("{}", str(numbers[i]), 1)
            yield key, (*place, *(() if len(keys) == 1 else (slice(start, end),)), ...)


def _published(row: Weight, leaf) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(published name, its shape)."""
    whole = np.broadcast_to(np.int8(0), _whole(row, leaf))
    for name, place in _pieces(row, leaf):
        yield name, whole[place].shape


def _read(row: Weight, leaf, tensors, dtype, sharding, pool: ThreadPoolExecutor) -> Array:
    """The leaf, filled through a view of it in the published form where there is one."""
    found = _aligned(leaf.shape, dtype)
    with jax.debug_nans(False), np.errstate(all="ignore"):  # there are no numbers in it yet
        whole = row.transform.write(found)
    is_view = isinstance(whole, np.ndarray) and np.may_share_memory(whole, found)
    whole = whole if is_view else np.empty(_whole(row, leaf), dtype)
    list(pool.map(lambda piece: _copy(tensors[piece[0]], whole[piece[1]]), _pieces(row, leaf)))
    if not _keys(row):
        found[...] = 0
    elif not is_view:
        found[...] = row.transform.read(whole)
    if sharding is None or jax.process_count() == 1:
        return jax.device_put(found, sharding)
    return jax.make_array_from_callback(found.shape, sharding, lambda index: found[index])


def _aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An empty array that begins at a multiple of 64 bytes, so that a CPU need not copy it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _copy(tensor: np.ndarray, to: np.ndarray) -> None:
    """In stripes, because a transposed copy of all at once would miss the cache at each number."""
    if tensor.dtype == to.dtype:  # numpy copies whole numbers faster
        tensor, to = (x.view(f"u{x.dtype.itemsize}") for x in (tensor, to))
    if tensor.ndim == 0:
        to[...] = tensor
    for start in range(0, tensor.shape[0] if tensor.ndim else 0, 256):
        to[start : start + 256] = tensor[start : start + 256]


def _write(row: Weight, leaf) -> Iterator[tuple[str, np.ndarray]]:
    whole = np.asarray(row.transform.write(jnp.asarray(leaf)))
    for name, place in _pieces(row, leaf):
        yield name, whole[place]


def _check(layout: Layout, weights, leaves, tensors) -> None:
    """Raise with the names of all that is missing, unknown, of another shape, or different."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, leaf in leaves.items():
        expected |= dict(_published(weights[path], leaf))
    for copy, original in layout.copies:
        expected[copy] = expected[original]
    constants = {constant.key for constant in layout.constants}
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected and name not in constants]
    problems = [f"missing: {some(missing)}"] if missing else []
    problems += [f"unknown: {some(unknown)}"] if unknown else []
    misshapen = [
        f"expected {name!r} of shape {list(shape)}, got {list(tensors[name].shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems += [some(misshapen)] if misshapen else []
    if missing and len(missing) == len(expected):
        problems = [
            f"none of its {len(expected)} names is there; expected such as {missing[0]!r}, got "
            f"{some(list(tensors))}: they are of another model, or in another layout, or have a "
            "prefix in front"
        ]
    if problems:
        raise ValueError(f"these are not the weights of this {layout.name}; " + "; ".join(problems))
    for copy, original in layout.copies:
        if not np.array_equal(tensors[copy], tensors[original]):
            raise ValueError(f"{layout.name}: expected {copy!r} to be equal to {original!r}")
    for constant in layout.constants:
        if constant.key in tensors:
            _compare(layout.name, constant, tensors[constant.key])


def _compare(name: str, constant: Constant, tensor: np.ndarray) -> None:
    shape, pieces = constant.value(tensor.shape)
    if shape != tensor.shape:
        raise ValueError(
            f"{name}: expected {constant.key!r} of shape {list(shape)}, got {list(tensor.shape)}"
        )
    flat, end, error, scale = tensor.reshape(-1), 0, np.float32(0), 0.0
    for piece in pieces:
        start, end = end, end + piece.size
        given, piece = (x.astype(np.float32) for x in (flat[start:end], piece.reshape(-1)))
        error = np.maximum(error, np.abs(given - piece).max(initial=0))  # which keeps NaN
        scale = max(scale, float(np.abs(piece).max(initial=0)))
    exact = not jnp.issubdtype(tensor.dtype, jnp.floating)
    eps = 0.0 if exact else float(jnp.finfo(tensor.dtype).eps)
    if not error <= 4 * eps * scale + 1e-6:
        raise ValueError(
            f"{name}: expected {constant.key!r} as jflow computes it, got other numbers, off by up "
            f"to {error:.2g}: the weights were trained with another table"
        )


def some(names: list[str]) -> str:
    """The first of many names, for a message."""
    shown = ", ".join(map(str, names[:6]))
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"
