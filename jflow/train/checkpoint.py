"""Checkpoints on orbax: whole, or not there.

A checkpoint is WORKDIR/checkpoints/<step>/ with two orbax trees, `params` (params and their
average, readable without a template) and `rest` (the other leaves of the state, by name), and
`manifest.json`. The manifest is written last and lists the size and CRC-32 of every file: a
checkpoint without one was never finished, one that disagrees with it is damaged.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jflow._core import processes
from jflow._core.files import expand, system_error, write_atomically
from jflow.train._state import TrainState
from jflow.types import Params, PyTree

__all__ = [
    "Checkpoint",
    "discard",
    "latest",
    "restore",
    "restore_extra",
    "restore_params",
    "save",
    "steps",
]


class Checkpoint(NamedTuple):
    """What `restore` returns.

    Attributes:
        step: How many updates had been made.
        state: The state after them.
        position: The position in the data.
        extra: The caller's own JSON.
    """

    step: int
    state: TrainState
    position: Any
    extra: dict


def save(
    workdir: str | os.PathLike,
    step: int,
    state: TrainState,
    position: Any = None,
    extra: Mapping[str, Any] | None = None,
    *,
    max_to_keep: int | None = 3,
) -> Path:
    """Writes the checkpoint of a step, whole or not at all.

    Several processes call it together, on one file system: each writes the parts of the arrays that
    it holds first copies of, process 0 the manifest.

    Args:
        workdir: The checkpoint is workdir/checkpoints/<step>/.
        step: How many updates have been made.
        state: What is saved.
        position: The position in the data, JSON; numpy arrays become lists.
        extra: The caller's own JSON.
        max_to_keep: Afterwards all but so many of the newest are deleted; None: all stay.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: When it cannot be written (a full disk): nothing half-written stays, and the
            checkpoints before it are untouched.
    """
    path = _folder(workdir) / f"{step:08d}"
    head = {"step": step, "position": position, "extra": dict(extra or {}), "leaves": _forms(state)}
    text = json.dumps(head, default=_plain)  # before anything is written, since it may refuse
    params, rest = _parts(state)
    main = processes.is_main()
    try:
        if main:
            _discard(path)
            path.mkdir(parents=True)
        with _orbax() as orbax:
            orbax.save(path / "params", args=ocp.args.PyTreeSave(params))
            orbax.save(path / "rest", args=ocp.args.PyTreeSave(rest))
        if main:
            write_atomically(
                path / "manifest.json",
                json.dumps({**json.loads(text), "files": _files(path)}).encode(),
            )
    except Exception as error:
        _discard(path)
        before = latest(workdir)
        said = (
            "there is none before it"
            if before is None
            else f"the newest whole one is of step {before}"
        )
        raise OSError(f"cannot write checkpoint {path}: {_line(error)}; {said}") from error
    processes.wait_for_all(f"jflow: {path} is written")
    if main:
        for old in sorted(path.parent.iterdir()):
            if old.is_dir() and old.name[:8].isdigit() and not (old / "manifest.json").is_file():
                _discard(old)  # left by a run that was killed while saving
        for outdated in (
            [] if max_to_keep is None else [s for s in steps(workdir) if s <= step][:-max_to_keep]
        ):
            discard(workdir, outdated)
    processes.wait_for_all(f"jflow: checkpoints before {path} are deleted")
    return path


def discard(workdir: str | os.PathLike, step: int) -> None:
    """Deletes the checkpoint of a step, if there is one.

    Args:
        workdir: Of the run.
        step: Of the checkpoint.
    """
    _discard(_folder(workdir) / f"{step:08d}")


def steps(workdir: str | os.PathLike) -> list[int]:
    """The steps of all finished checkpoints, damaged ones too.

    Args:
        workdir: Of the run.

    Returns:
        The steps, in order.
    """
    found = _folder(workdir).glob("*/manifest.json")
    return sorted(int(file.parent.name) for file in found if file.parent.name.isdigit())


def latest(workdir: str | os.PathLike) -> int | None:
    """The step of the newest readable checkpoint, or None.

    Damaged ones are named in a warning and passed over.

    Args:
        workdir: Of the run.

    Returns:
        The step.
    """
    try:
        return _open(workdir, None)[1]["step"]
    except FileNotFoundError:
        return None


def restore(
    workdir: str | os.PathLike, template: TrainState, step: int | None = None
) -> Checkpoint:
    """The checkpoint of a step, or the newest readable one, as a state.

    A damaged newest one is named in a warning and passed over.

    Args:
        workdir: Of the run.
        template: A state, or its shapes, whose structure, types and shardings the restored one has.
        step: Of the checkpoint; None takes the newest that can be read.

    Returns:
        The state, the position in the data and the caller's own JSON.

    Raises:
        FileNotFoundError: When none can be read.
        ValueError: When that of `step` is damaged, or one is of another model, naming the first
            leaf that differs.
    """
    path, manifest = _open_together(workdir, step)
    expected, found = _forms(template), manifest["leaves"]
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"checkpoint {path} is of another model: {name} is {found.get(name, 'missing')}"
                f" there, {expected.get(name, 'missing')} here"
            )
    parts = _parts(template)
    params, rest = (
        _read(path / name, part) for name, part in zip(("params", "rest"), parts, strict=True)
    )
    nothing = jax.tree.map(lambda _: None, template)
    leaves = {**_named(nothing._replace(params=params["params"], ema=params["ema"])), **rest}
    state = jax.tree_util.tree_map_with_path(
        lambda where, like: _as(leaves[_name(where)], like), template
    )
    return Checkpoint(manifest["step"], state, manifest["position"], manifest["extra"])


def restore_params(workdir: str | os.PathLike, step: int | None = None, ema: bool = True) -> Params:
    """The params of a checkpoint as nested dicts on the default device, without a template.

    Args:
        workdir: Of the run.
        step: Of the checkpoint; None takes the newest that can be read.
        ema: Whether to take the averaged ones, where the run kept an average.

    Returns:
        The params.

    Raises:
        FileNotFoundError: When none can be read.
        ValueError: When that of `step` is damaged.
    """
    tree = _read(_open(workdir, step)[0] / "params")
    return jax.tree.map(
        jnp.asarray, tree["ema"] if ema and tree["ema"] is not None else tree["params"]
    )


def restore_extra(workdir: str | os.PathLike, step: int | None = None) -> dict:
    """The caller's own JSON that was saved with a checkpoint.

    Args:
        workdir: Of the run.
        step: Of the checkpoint; None takes the newest that can be read.

    Returns:
        The JSON.

    Raises:
        FileNotFoundError: When none can be read.
        ValueError: When that of `step` is damaged.
    """
    return _open(workdir, step)[1]["extra"]


def _folder(workdir) -> Path:
    return expand(workdir).absolute() / "checkpoints"


def _open(workdir, step: int | None) -> tuple[Path, dict]:
    """The folder and the manifest of a whole checkpoint: that of `step`, or the newest."""
    there = steps(workdir)
    if not there:
        raise FileNotFoundError(f"there is no checkpoint in {workdir}")
    if step is not None and step not in there:
        raise FileNotFoundError(
            f"there is no checkpoint of step {step} in {workdir}, only of {there}"
        )
    for candidate in reversed(there) if step is None else [step]:
        path = _folder(workdir) / f"{candidate:08d}"
        fault = _fault(path)
        if fault is None:
            return path, json.loads((path / "manifest.json").read_bytes())
        if step is not None:
            raise ValueError(f"checkpoint {path} is damaged: {fault}")
        _warn_once(f"checkpoint {path} is damaged and passed over: {fault}")
    raise FileNotFoundError(
        f"there is no readable checkpoint in {workdir}: those of steps {there} are damaged"
    )


_said: set[str] = set()


def _warn_once(message: str) -> None:
    """Once in a process, and in the main one of several. (Python's own count starts anew when any
    filter changes.)"""
    if message not in _said and not (jax.distributed.is_initialized() and jax.process_index()):
        _said.add(message)
        warnings.warn(message, stacklevel=4)


def _open_together(workdir, step: int | None) -> tuple[Path, dict]:
    """`_open`, decided by process 0 for all: it alone reads every byte to see whether they are
    whole."""
    if jax.process_count() == 1:
        return _open(workdir, step)
    found = error = None
    if processes.is_main():
        try:
            found = _open(workdir, step)[1]["step"]
        except (FileNotFoundError, ValueError) as caught:
            error = (isinstance(caught, ValueError), str(caught))
    found, error = processes.from_main((found, error))
    if error is not None:
        raise (ValueError if error[0] else FileNotFoundError)(error[1])
    path = _folder(workdir) / f"{found:08d}"
    return path, json.loads((path / "manifest.json").read_bytes())


def _fault(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        listed = manifest["files"]
        if not {"step", "position", "extra", "leaves"} <= manifest.keys():
            return "manifest.json is incomplete"
    except (OSError, ValueError, KeyError, TypeError):
        return "manifest.json is unreadable"
    for name, (size, crc) in listed.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
        if _crc(file) != crc:
            return f"{name} has changed"
    return None


def _files(path: Path) -> dict[str, tuple[int, int]]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): (file.stat().st_size, _crc(file)) for file in files}


def _crc(file: Path) -> int:
    crc = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _discard(path: Path) -> None:
    """Delete a checkpoint, its manifest first: what is left of it at any moment is not taken for
    one."""
    (path / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _is_key(x) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _as(leaf, like):
    return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like)) if _is_key(like) else leaf


def _name(path) -> str:
    return jax.tree_util.keystr(path).lstrip(".")


def _named(tree: PyTree) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _forms(state: TrainState) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _named(state).items()}


def _parts(state: TrainState) -> tuple[dict, dict]:
    """The two trees that orbax sees: nested params, and the other leaves flat: any optimizer's
    state will do."""
    plain = jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, state)
    return {"params": plain.params, "ema": plain.ema}, _named(plain._replace(params=None, ema=None))


def _read(path: Path, like: PyTree | None = None) -> PyTree:
    """An orbax tree: placed as `like`, or as numpy arrays wherever it was written."""
    with _orbax() as orbax:
        if like is None:
            saved = orbax.metadata(path).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            return orbax.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        placed = ocp.checkpoint_utils.construct_restore_args(like)
        return orbax.restore(path, args=ocp.args.PyTreeRestore(item=like, restore_args=placed))


@contextlib.contextmanager
def _orbax():
    """A synchronous orbax checkpointer without its messages: what fails is raised, and need not be
    logged as well."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
            yield orbax
    finally:
        log.setLevel(level)


def _plain(x):
    if isinstance(x, np.ndarray | np.generic | jax.Array):
        return np.asarray(x).tolist()
    raise TypeError(
        f"a checkpoint's position and extra must be JSON, got {type(x).__name__}: {x!r}"
    )


def _line(error: BaseException) -> str:
    """One line: the system's own words, also where an error holds or quotes them."""
    if (cause := system_error(error)) is not None and cause.errno is not None:
        return os.strerror(cause.errno)
    number = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore
    return (
        os.strerror(int(number[1]))
        if number
        else (str(error).splitlines() or [type(error).__name__])[0]
    )
