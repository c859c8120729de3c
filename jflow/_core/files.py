"""Paths that a user gives, and what the system says of them. Needs no JAX."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


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
    """The system's own error, such as a full disk, that `error` is, that it holds as a group, or that it came from."""
    if error is None or isinstance(error, OSError) and error.errno:
        return error
    parts = (*getattr(error, "exceptions", ()), error.__cause__, error.__context__)
    return next(filter(None, map(system_error, parts)), None)


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yields a path to write to; it takes the place of `path` once the block is done, and is gone if the block fails.

    That `path` can be written is found out first: its folder must be there, and it must not be a folder itself.
    """
    path = expand(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"cannot write {path}: permission denied")
    try:
        # A folder beside the target, so that the rename at the end stays on one disk.
        folder = Path(
            tempfile.mkdtemp(
                prefix=f".{path.name[:50]}.", suffix=".part", dir=path.absolute().parent
            )
        )
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
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: Path, content: bytes) -> None:
    """The whole file, or none: a temporary file beside it that takes its name."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
