"""Paths that a user gives, and what the system says of them. Needs no JAX."""

import os
from pathlib import Path


def expand(path: str | os.PathLike) -> Path:
    """A path whose leading ~ or ~user stands for the home folder, as in a shell.

    Raises ValueError where there is no such user, unless a file of that name is there.
    """
    found = Path(os.path.expanduser(path))
    if str(found).startswith("~") and not found.exists():
        raise ValueError(f"{path}: there is no such home folder; a name that begins with ~ needs its whole path")
    return found


def system_error(error: BaseException | None) -> OSError | None:
    """The system's own error, such as a full disk, that `error` is, that it holds as a group, or that it came from."""
    if error is None or isinstance(error, OSError) and error.errno:
        return error
    parts = (*getattr(error, "exceptions", ()), error.__cause__, error.__context__)
    return next(filter(None, map(system_error, parts)), None)
