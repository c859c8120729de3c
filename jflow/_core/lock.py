"""One run in a workdir at a time."""

import contextlib
import os
import socket
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TextIO

from jflow._core import processes
from jflow._core.files import try_lock

FILE = "run.lock"
# The workdirs that the caller holds: another thread is another run.
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Within, no other run enters `workdir`, which is made if need be. Whoever holds it may enter
    again.

    The lock is the system's, on the open file WORKDIR/run.lock, and ends with the process, however
    that ends. Of several processes the main one holds it for all. Raises ValueError on each of
    them, with the pid and the machine of the run that is there. Where the system has no locks, a
    warning says so.
    """
    workdir = workdir.resolve()
    if workdir in _held.get():
        yield
        return
    with contextlib.ExitStack() as stack:
        fault = None
        if processes.is_main():
            try:
                stack.enter_context(_locked(workdir))
            except (ValueError, OSError) as error:
                fault = error
        said = processes.from_main(fault and str(fault))
        if said is not None:
            raise fault or ValueError(said)
        workdir.mkdir(parents=True, exist_ok=True)  # on a machine whose disk is another one
        token = _held.set(_held.get() | {workdir})
        try:
            yield
        finally:
            _held.reset(token)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _open(folder / FILE):
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    (folder / FILE).unlink()  # while it is locked: nobody else's is deleted
    finally:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing was written


def _open(file: Path) -> TextIO:
    """The file, open and locked, with this process's pid and machine in it."""
    while True:
        stream = open(file, "a+")
        try:
            if not _lock(stream, file.parent):
                return stream
            if file.exists() and os.path.samestat(os.stat(file), os.fstat(stream.fileno())):
                with contextlib.suppress(OSError):  # a full disk: the run will say so itself
                    stream.truncate(0)
                    stream.write(f"pid {os.getpid()} on {socket.gethostname()}")
                    stream.flush()
                return stream
        except BaseException:
            stream.close()
            raise
        stream.close()  # it was deleted by the run before, between the two calls


def _lock(stream: TextIO, folder: Path) -> bool:
    """Whether the file is locked now; False where the system has no locks."""
    try:
        locked = try_lock(stream)
    except OSError as error:
        warnings.warn(
            f"cannot lock {folder} ({error}): take care that no second run writes there",
            stacklevel=2,
        )
        return False
    if not locked:
        stream.seek(0)
        who = stream.read().strip() or "of unknown pid"
        raise ValueError(
            f"workdir {folder} is in use by another run ({who}): wait for it, end it, or take"
            " another workdir"
        )
    return True
