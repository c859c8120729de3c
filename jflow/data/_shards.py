"""Rows that a model generates, in shards on disk: each whole or absent, and the same bytes wherever
a run was stopped.

A folder holds `shard-00000.npz`, ... and `manifest.json`, which says what they are made of. The
i-th batch of rows is drawn with the key fold_in(key, i) alone, so that no shard depends on another,
nor on when it was written or by whom.
"""

import json
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jflow._core.checks import check_whole
from jflow._core.files import expand, write_atomically
from jflow.data._splits import Rows, count
from jflow.data.writers import npz_writer
from jflow.types import Key

__all__ = ["Draw", "read_shards", "write_shards"]

Draw = Callable[[Key, int], Rows]
"""(key, n) -> {'name': array [n, ...]}"""


def write_shards(
    folder: str | Path,
    draw: Draw,
    n: int,
    *,
    key: Key,
    batch: int = 1024,
    shard: int = 65536,
    about: Mapping[str, Any] | None = None,
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> None:
    """Writes rows that a function draws to a folder, in files that are each whole or absent.

    Memory holds one batch. Run again after a kill it keeps the whole shards and writes the others:
    the same bytes as a run that never stopped. bfloat16 is written as float32.

    Args:
        folder: Where the shards go; made if it is not there.
        draw: (key, batch) -> rows, a dict of arrays that lead with batch. The i-th batch is drawn
            with fold_in(key, i) alone.
        n: How many rows.
        key: Of the draws.
        batch: Rows that are drawn at once.
        shard: Rows in a file, a multiple of batch.
        about: JSON that names what made the rows; it is kept in the manifest with n, batch, shard
            and key, and a folder made otherwise is refused.
        share: (i, workers) writes each workers-th shard from the i-th on, for several processes
            that write to one folder.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: For a folder of other options (naming them), for counts below 1 and a shard that
            is not a multiple of batch.
        FloatingPointError: For rows that are not finite; it names the shard, which is not written.
    """
    shard = min(shard, -(-n // batch) * batch) if n > 0 and batch > 0 else shard
    _check(n, batch, shard, share)
    folder = expand(folder)
    folder.mkdir(parents=True, exist_ok=True)
    impl = str(jax.random.key_impl(key))
    manifest = {
        "n": n,
        "batch": batch,
        "shard": shard,
        "key": [impl, jax.random.key_data(key).tolist()],
    }
    _claim(
        folder, json.loads(json.dumps({**manifest, "about": dict(about or {})}, default=_number))
    )
    mine = list(_sizes(n, shard).items())[share[0] :: share[1]]
    with tqdm(total=sum(rows for _, rows in mine), unit="row", disable=not progress) as bar:
        for i, (name, rows) in enumerate(mine):
            first = (share[0] + i * share[1]) * (shard // batch)
            if _whole(folder / name, rows):
                bar.update(rows)
            else:
                _write(folder / name, draw, rows, key, batch, first, bar)


def read_shards(*folders: str | Path) -> dict[str, "Joined"]:
    """Rows of one or more folders of shards, end to end and mapped from disk.

    For `data.batches`, `data.take` and `data.split`. Values have len, shape, dtype and [index]
    (which reads), and np.asarray loads them whole.

    Args:
        *folders: Folders that `write_shards` or `generate_reflow_pairs` filled.

    Returns:
        The rows, {name: array [n, *event]}.

    Raises:
        FileNotFoundError: For a folder without manifest or with shards still to be written, which
            it names.
        ValueError: For folders whose rows differ in names, shapes or types.
    """
    if not folders:
        raise ValueError("read_shards: expected at least one folder")
    parts: dict[str, list[np.ndarray]] = {}
    for folder in map(expand, folders):
        manifest = _manifest(folder)
        if manifest is None:
            raise FileNotFoundError(f"{folder} has no manifest.json: no shards were written there")
        sizes = _sizes(manifest["n"], manifest["shard"])
        missing = [name for name, rows in sizes.items() if not _whole(folder / name, rows)]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of {len(sizes)} shards ({missing[0]}): finish"
                " writing"
            )
        for name in sizes:
            arrays = _mapped(folder / name)
            if parts and set(arrays) != set(parts):
                raise ValueError(
                    f"{folder / name}: expected the arrays {sorted(parts)}, got {sorted(arrays)}"
                )
            for key, value in arrays.items():
                parts.setdefault(key, []).append(value)
    return {key: Joined(key, arrays) for key, arrays in parts.items()}


class Joined:
    """Arrays [n_i, *event] as one [sum n_i, *event] that is read where it is indexed, along the
    first axis."""

    by_position = True  # see `as_array` of the splits

    def __init__(self, name: str, parts: list[np.ndarray]):
        forms = {(part.shape[1:], part.dtype) for part in parts}
        if len(forms) > 1:
            raise ValueError(
                f"shards of {name!r} differ in shape or type: {sorted(map(str, forms))}"
            )
        self._parts, self._starts = parts, np.cumsum([0] + [len(part) for part in parts])
        self.shape, self.dtype = (int(self._starts[-1]), *parts[0].shape[1:]), parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> np.ndarray:
        index = np.arange(len(self))[index]
        if index.ndim != 1:
            return self[np.reshape(index, -1)].reshape(*index.shape, *self.shape[1:])
        out = np.empty((len(index), *self.shape[1:]), self.dtype)
        where = np.searchsorted(self._starts, index, side="right") - 1
        for p in np.unique(where):
            out[where == p] = self._parts[p][index[where == p] - self._starts[p]]
        return out

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def _sizes(n: int, shard: int) -> dict[str, int]:
    """The rows of every shard, by the name of its file."""
    return {
        f"shard-{i:05d}.npz": min(shard, n - start) for i, start in enumerate(range(0, n, shard))
    }


def _write(path: Path, draw: Draw, n: int, key: Key, batch: int, first: int, bar) -> None:
    with npz_writer(path, n) as write:
        for i, start in enumerate(range(0, n, batch)):
            rows = jax.tree.map(np.asarray, dict(draw(jax.random.fold_in(key, first + i), batch)))
            if count(rows) != batch:
                raise ValueError(
                    f"expected draw(key, {batch}) to give {batch} rows, got {count(rows)}"
                )
            # every batch is drawn whole: one program
            rows = {name: _plain(rows[name][: n - start]) for name in sorted(rows)}
            _check_finite(path, rows)
            write(rows)
            bar.update(len(next(iter(rows.values()))))


def _plain(value: np.ndarray) -> np.ndarray:
    """value, in float32 where numpy's files don't know the type (bfloat16)."""
    return (
        value.astype(np.float32)
        if value.dtype.kind == "V" and jnp.issubdtype(value.dtype, jnp.floating)
        else value
    )


def _check_finite(path: Path, rows: Rows) -> None:
    for name, value in rows.items():
        if np.issubdtype(value.dtype, np.floating):
            bad = np.sum(~np.isfinite(value).reshape(len(value), -1).all(axis=1))
            if bad:
                raise FloatingPointError(
                    f"{path}: {bad} of {len(value)} rows of {name!r} are not finite"
                )


def _claim(folder: Path, manifest: dict) -> None:
    """Write the manifest, or compare with the one that is there."""
    found = _manifest(folder)
    if found is None:
        if any(folder.glob("shard-*.npz")):
            raise ValueError(
                f"{folder} holds shards without a manifest.json: give another folder, or empty it"
            )
        return write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    before, now = ({**m, **m["about"]} for m in (found, manifest))
    changed = [k for k in {**before, **now} if k != "about" and before.get(k) != now.get(k)]
    if changed:
        said = "; ".join(f"{k} was {before.get(k)}, is {now.get(k)}" for k in changed)
        raise ValueError(
            f"the shards in {folder} were made otherwise: {said}. Give another folder, or empty it"
        )


def _number(value):
    """What JSON can say of numpy's and jax's numbers and arrays; TypeError for anything else."""
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"about: expected what JSON can say, got a {type(value).__name__}: {value!r}")


def _manifest(folder: Path) -> dict | None:
    file = folder / "manifest.json"
    try:
        return json.loads(file.read_bytes()) if file.is_file() else None
    except ValueError as error:
        raise ValueError(f"{file} is damaged: expected JSON ({error})") from error


def _whole(path: Path, n: int) -> bool:
    """Whether a shard is there, to its end, with n rows."""
    try:
        return count(_mapped(path)) == n
    except (OSError, ValueError, struct.error, zipfile.BadZipFile):
        return False


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an uncompressed .npz file, mapped from disk (np.load would read them)."""
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for entry in archive.infolist():
            file.seek(
                entry.header_offset + 26
            )  # the local header: 30 bytes, the name, the extra field
            file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            name = entry.filename.removesuffix(".npy")
            arrays[name] = np.memmap(path, dtype, "r", offset=file.tell(), shape=shape)
    return arrays


def _check(n, batch, shard, share):
    check_whole("write_shards", n=n, batch=batch, shard=shard)
    if shard % batch:
        raise ValueError(
            f"write_shards: expected shard to be a multiple of batch={batch}, got {shard}"
        )
    if not 0 <= share[0] < share[1]:
        raise ValueError(
            f"write_shards: expected share=(i, workers) with 0 <= i < workers, got {share}"
        )
