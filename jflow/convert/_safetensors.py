"""Files of named tensors: safetensors, read lazily, and written one tensor after another."""

import json
import math
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.checks import check_whole
from jflow._core.files import expand, replace_file, write_atomically

DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
HOW_TO_CONVERT = """with torch and safetensors installed, these lines make a safetensors file of it:
    import sys, torch, safetensors.torch
    file = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
    tensors = file.get("ema", file.get("state_dict", file))
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, "model.safetensors")"""


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of safetensors files by name, each read from disk only where it is used.

    The arrays are read-only views of the mapped files, so that a dict of a large model costs
    nothing until its tensors are copied. bfloat16 and float8 have the types of ml_dtypes, which are
    those of JAX.

    Args:
        path: a safetensors file, which may have been written in several; an index of those,
            `*.index.json`, whose "weight_map" says which tensor lies in which file beside it; or a
            folder that holds one of the two.

    Returns:
        The tensors by name, in the order of the files.

    Raises:
        FileNotFoundError: there is no such file or folder, or a file that the index names is
            missing.
        ValueError: a file is truncated, is no safetensors file, or holds a pickle (.pt, .ckpt),
            which is never read: the message says how to convert it; or a folder holds none, or
            several without an index.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from jflow import convert
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> convert.write_safetensors(path, {"weight": np.ones((2, 3), np.float32)})
        >>> {name: tensor.shape for name, tensor in convert.read_safetensors(path).items()}
        {'weight': (2, 3)}
    """
    path = expand(path)
    if path.is_dir():
        path = file_in(path)
    index = path.with_name(f"{path.name}.index.json")
    if not path.exists() and index.exists():
        path = index
    if not path.exists():
        raise FileNotFoundError(f"read_safetensors: there is no file {path}")
    return _read_index(path) if path.name.endswith(".json") else _read_file(path)


def tensors_of(
    files: str | Path | Mapping[str, np.ndarray], prefix: str = ""
) -> dict[str, np.ndarray]:
    """The tensors that were given or of files, those whose names start with a prefix, without
    it."""
    tensors = files if isinstance(files, Mapping) else read_safetensors(files)
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def read_json(name: str, path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; errors begin with the function that reads it, and name the
    file."""
    if not path.exists():
        raise FileNotFoundError(f"{name}: there is no file {path}: download it too")
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{name}: {path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected {path} to hold an object, got {found!r}")
    return found


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named arrays to one safetensors file, which takes the place of an older one.

    Args:
        path: of the file. It is written whole or not at all.
        tensors: the arrays by name, of numpy or JAX; those of JAX reach the host one by one.
        metadata: strings by name that the file keeps too, or None. Other programs look for
            {"format": "pt"}.

    Raises:
        ValueError: a tensor has a type that the format does not know, such as complex numbers.

    Examples:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from jflow import convert
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> convert.write_safetensors(path, {"weight": jnp.ones(2, jnp.bfloat16)})
        >>> convert.read_safetensors(path)["weight"]
        array([1, 1], dtype=bfloat16)
    """
    shapes = {
        name: jax.ShapeDtypeStruct(np.shape(tensor), np.dtype(_dtype(tensor)))
        for name, tensor in tensors.items()
    }
    write_stream(path, shapes, tensors.items(), metadata)


def write_stream(
    path: str | Path,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Iterable[tuple[str, Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """As `write_safetensors`, with tensors (name, array) that are made as the file is written.

    They come in the order of `shapes`, and are cast to its types.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, like in shapes.items():
        if np.dtype(like.dtype) not in NAMES:
            raise ValueError(
                f"write_safetensors: expected {name!r} of one of the types {', '.join(DTYPES)}, got"
                f" {like.dtype}"
            )
        start, end = end, end + _size(like)
        header[name] = {
            "dtype": NAMES[np.dtype(like.dtype)],
            "shape": list(like.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8 bytes
    with replace_file(path) as part, open(part, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, like), (given, tensor) in zip(shapes.items(), tensors, strict=True):
            array = np.asarray(tensor, like.dtype, order="C")
            if name != given or array.shape != like.shape:
                raise ValueError(
                    f"write_safetensors: expected {name!r} of shape {list(like.shape)}, got "
                    f"{given!r} of shape {list(array.shape)}"
                )
            stream.write(array.reshape(-1).view(np.uint8).data)


def write_shards(
    path: str | Path,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Iterable[tuple[str, Any]],
    metadata: Mapping[str, str] | None,
    max_shard_size: int | None,
) -> None:
    """As `write_stream`; more than max_shard_size bytes go to several files and an index of them.

    What an older call wrote to the same path is not mistaken for the new: its index goes first, and
    the new one is written last.
    """
    path, stream = expand(path), iter(tensors)
    groups = _groups(shapes, max_shard_size)
    index, count = path.with_name(f"{path.name}.index.json"), len(groups)
    names = [f"{path.stem}-{i + 1:05d}-of-{count:05d}{path.suffix}" for i in range(count)]
    if count == 1:
        names = [path.name]
    index.unlink(missing_ok=True)
    for name, group in zip(names, groups, strict=True):
        likes = {key: shapes[key] for key in group}
        write_stream(path.with_name(name), likes, islice(stream, len(group)), metadata)
    if count > 1:
        path.unlink(missing_ok=True)
        where = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        total = sum(_size(like) for like in shapes.values())
        content = {"metadata": {"total_size": total}, "weight_map": where}
        write_atomically(index, json.dumps(content, indent=2).encode())


def _groups(shapes: Mapping[str, jax.ShapeDtypeStruct], most: int | None) -> list[list[str]]:
    """Names in their order, as many together as take `most` bytes at most; one may be larger."""
    if most is None:
        return [list(shapes)]
    check_whole("save", max_shard_size=most)
    groups: list[list[str]] = [[]]
    room = most
    for name, like in shapes.items():
        room -= _size(like)
        if room < 0 and groups[-1]:
            groups.append([])
            room = most - _size(like)
        groups[-1].append(name)
    return groups


def _size(like: jax.ShapeDtypeStruct) -> int:
    return math.prod(like.shape) * np.dtype(like.dtype).itemsize


def _dtype(tensor):
    return tensor.dtype if hasattr(tensor, "dtype") else np.asarray(tensor).dtype


def file_in(folder: Path) -> Path:
    """The index of a folder, or else its only safetensors file: model.safetensors where there are
    variants beside it, such as model.fp16.safetensors."""
    found = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.safetensors"))
    plain = [file for file in found if "." not in file.name.partition(".safetensors")[0]]
    for files in (found, plain):
        if len(files) == 1:
            return files[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise ValueError(
            f"read_safetensors: {folder} holds several models ({names}) and no index that joins "
            "them: give the path of one of the files"
        )
    inner = sorted({file.parent.name for file in folder.glob("*/*.safetensors")})
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    hint = f"; its folders {', '.join(inner)} hold some: give one of them" if inner else ""
    hint += f"; it holds {pickles[0]}: {HOW_TO_CONVERT}" if pickles and not inner else ""
    raise ValueError(f"read_safetensors: {folder} holds no file *.safetensors{hint}")


def read_metadata(path: Path) -> dict[str, str]:
    """The strings that a safetensors file keeps beside its tensors."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length)).get("__metadata__", {})


def _read_index(path: Path) -> dict[str, np.ndarray]:
    try:
        where = json.loads(path.read_bytes())["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"read_safetensors: {path} is no index of safetensors files: expected an object with "
            '"weight_map"'
        ) from error
    shards: dict[str, dict[str, np.ndarray]] = {}
    for name in sorted({file for _, file in where}):
        if Path(name).name != name:
            raise ValueError(f"read_safetensors: {path} names {name!r}, which is not beside it")
        if not (path.parent / name).exists():
            raise FileNotFoundError(
                f"read_safetensors: {path.name} names {name}, which is not in {path.parent}: "
                "download it too"
            )
        shards[name] = _read_file(path.parent / name)
    lost = [name for name, file in where if name not in shards[file]]
    if lost:
        raise ValueError(
            f"read_safetensors: {path.name} promises {lost[0]!r}, and {len(lost) - 1} more, which "
            "are not in the files that it names: they belong to another model, or another version"
        )
    return {name: shards[file][name] for name, file in where}


def _read_file(path: Path) -> dict[str, np.ndarray]:
    size = path.stat().st_size
    with open(path, "rb") as stream:
        start, brace = stream.read(8), stream.read(1)
        # a header of 640 bytes has the length b"\x80\x02...", with which pickles begin too
        pickled = brace != b"{" and start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04"))
        if path.suffix in PICKLES or pickled:
            raise ValueError(
                f"read_safetensors: {path} holds a pickle, which could run any code and is not "
                f"read; {HOW_TO_CONVERT}"
            )
        if start.startswith(b"version "):
            raise ValueError(
                f"read_safetensors: {path} is a pointer of git-lfs, not the file: git lfs pull"
            )
        length = int.from_bytes(start, "little")
        foreign = f"read_safetensors: {path} is no safetensors file"
        if size < 8 or not 2 <= length <= 100_000_000:
            raise ValueError(f"{foreign}: expected the length of a header in its first 8 bytes")
        if size < 8 + length:
            raise ValueError(
                f"read_safetensors: {path} is truncated, or no safetensors file: expected a header "
                f"of {length} bytes, and the file has {size}"
            )
        try:
            header = json.loads(brace + stream.read(length - 1))
            header.pop("__metadata__", None)
            entries = {
                name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{foreign}: expected a header in JSON ({error})") from error
    if not entries:
        return {}
    total = 8 + length + max(end for *_, end in entries.values())
    if size != total:
        cause = "truncated: download it again" if size < total else "not whole: it is longer"
        raise ValueError(f"read_safetensors: {path} is {cause}; expected {total} bytes, got {size}")
    data = np.memmap(path, np.uint8, "r") if size > 8 + length else np.zeros(size, np.uint8)
    tensors = {}
    for name, (kind, shape, first, last) in entries.items():
        if kind not in DTYPES:
            raise ValueError(
                f"read_safetensors: {path}: expected {name!r} of one of the types "
                f"{', '.join(DTYPES)}, got {kind}"
            )
        dtype = np.dtype(DTYPES[kind])
        if first < 0 or last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{foreign}: {name!r} of type {kind} and shape {list(shape)} takes "
                f"{math.prod(shape) * dtype.itemsize} bytes, and has {last - first}"
            )
        raw = np.asarray(data[8 + length + first : 8 + length + last])
        tensors[name] = raw.view(dtype).reshape(shape)
    return tensors
