"""Paths that a user gives, and what the system says of them. Needs no JAX."""

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module, where there is one


def expand(path: str | os.PathLike) -> Path:
    """A path whose leading ~ or ~user stands for the home folder, as in a shell.

    Raises ValueError where there is no such user, unless a file of that name is there.
    """
    found = Path(os.path.expanduser(path))
    if str(found).startswith("~") and not found.exists():
        raise ValueError(
            f"{path}: there is no such home folder; a name that begins with ~ needs its whole path"
        )
    return found


def system_error(error: BaseException | None) -> OSError | None:
    """The system's own error, such as a full disk, that `error` is, that it holds as a group, or
    that it came from."""
    if error is None or isinstance(error, OSError) and error.errno:
        return error
    parts = (*getattr(error, "exceptions", ()), error.__cause__, error.__context__)
    return next(filter(None, map(system_error, parts)), None)


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yields a path to write to; it takes the place of `path` once the block is done, and is gone
    if the block fails.

    Whenever the process is killed, `path` is as it was or whole. What the process had written by
    then stays beside it, in a folder .NAME.*.part, until `path` is next written. That `path` can be
    written is found out first: its folder must be there, and it must not be a folder itself.
    """
    path = expand(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"cannot write {path}: permission denied")
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(_folder_beside(path))
        except OSError as error:
            raise type(error)(
                f"cannot write {path}: {error.strerror} ({path.absolute().parent})"
            ) from error
        try:
            yield folder / path.name
            os.replace(folder / path.name, path)
        except (OSError, ExceptionGroup) as error:
            cause = error if isinstance(error, OSError) else system_error(error)
            elsewhere = (
                cause is not None
                and cause.filename is not None
                and not str(cause.filename).startswith(str(folder))
            )
            if cause is None or elsewhere or cause.errno is None:
                raise  # not of writing: something else that the block did
            # A full disk, mostly. The number is kept: it tells this from a mistake in the path.
            raise OSError(
                cause.errno, f"cannot write {path}: {cause.strerror or os.strerror(cause.errno)}"
            ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """The whole file, or none: see `replace_file`."""
    with replace_file(path) as part:
        part.write_bytes(content)


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A folder beside `path`, so that a rename from it stays on one disk; deleted after the block.

    The writer holds a lock in it, which ends with the process. A folder whose lock is free was left
    by a process that was killed, and is deleted first.
    """
    parent, prefix = path.absolute().parent, f".{path.name[:50]}."
    for left in parent.glob(f"{glob.escape(prefix)}*.part"):
        with contextlib.suppress(OSError):
            stream, locked = _locked_file(left)
            with stream:
                if locked:
                    shutil.rmtree(left, ignore_errors=True)
            if locked:
                shutil.rmtree(
                    left, ignore_errors=True
                )  # NFS keeps a file's folder while it is open
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=parent))
        try:
            try:
                stream, locked = _locked_file(folder)
            except FileNotFoundError:
                continue
            with stream:
                if locked is False or not folder.exists():
                    continue  # another writer took it for one that was left, before it was locked
                yield folder
                return
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _locked_file(folder: Path) -> tuple[TextIO, bool | None]:
    """The open file that holds the lock of a folder, and whether it is locked now: None where the
    system has no locks."""
    stream = open(folder / ".lock", "a")
    try:
        return stream, try_lock(stream)
    except OSError:
        return stream, None


def try_lock(stream: TextIO) -> bool:
    """Whether an open file is locked now for this process, until it is closed; False where another
    process has it. Raises OSError where the system has no locks."""
    if fcntl is None:
        raise OSError("this platform has no fcntl")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
