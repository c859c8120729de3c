"""Batches made ready in the background, while the device works on the one before."""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import jax

from jflow._core.checks import check_whole
from jflow.data._placement import place
from jflow.types import PyTree


class Prefetch:
    """What `prefetch` returns: an iterator with `position`, `seek(position)` and `close()`."""

    def __init__(
        self, batches: Iterator[PyTree], size: int, sharding: jax.sharding.Sharding | None
    ):
        self._source: Any = batches  # position and seek are optional
        self._size, self._sharding = size, sharding
        self._position = getattr(batches, "position", 0)
        self._ready: queue.Queue | None = None
        self._ended: BaseException | None = None
        self._stop: weakref.finalize | None = None

    @property
    def position(self) -> int:
        """That of the source when it had given what this iterator has given; what is only fetched
        does not count."""
        return self._position

    def __iter__(self) -> Iterator[PyTree]:
        return self

    def __next__(self) -> PyTree:
        if self._ended is not None:
            raise self._ended
        ready = self._start() if self._ready is None else self._ready
        batch, position, error = ready.get()
        if error is not None:
            self._ended = error
            raise error
        self._position = self._position + 1 if position is None else position
        return batch

    def seek(self, position: int) -> None:
        """Go to where the source has this position; what was fetched is dropped."""
        self._end()
        self._source.seek(position)
        self._position, self._ended = position, None

    def close(self) -> None:
        """End the thread, and set a source that can seek back to `position`: nothing is lost. A
        next() starts again."""
        self._end()
        if hasattr(self._source, "seek"):
            self._source.seek(self._position)

    def _start(self) -> queue.Queue:
        ready: queue.Queue = queue.Queue(self._size)
        self._ready, stop = ready, threading.Event()
        # The thread must not hold on to this object: when it is forgotten, the thread ends.
        args = (self._source, self._sharding, ready, stop)
        thread = threading.Thread(target=_fetch, args=args, daemon=True, name="jflow-prefetch")
        self._stop = weakref.finalize(self, _join, thread, stop)
        thread.start()
        return ready

    def _end(self) -> None:
        if self._stop is not None:
            self._stop()
        self._ready = self._stop = None


def _fetch(source, sharding, ready: queue.Queue, stop: threading.Event) -> None:
    item: tuple[PyTree, Any, BaseException | None]
    error: BaseException | None = None
    while error is None and not stop.is_set():
        try:
            item = (place(next(source), sharding), getattr(source, "position", None), None)
        except BaseException as caught:  # StopIteration, too: the consumer's next() is to raise it
            item, error = (None, None, caught), caught
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.05)
                break
            except queue.Full:
                pass


def _join(thread: threading.Thread, stop: threading.Event) -> None:
    stop.set()
    if thread is not threading.current_thread():  # the garbage collector may run there
        thread.join()


def prefetch(
    batches: Iterator[PyTree], size: int = 2, sharding: jax.sharding.Sharding | None = None
) -> Prefetch:
    """The same batches on the device, some of them made ahead by a thread.

    It pays where a batch takes the host a while (a transform, a disk) and an accelerator does the
    training; where XLA computes on the same cores there is little to gain. `.position` counts what
    was given, not what was fetched, and `.seek(position)` goes anywhere, so that a resumed run
    neither loses nor repeats a batch.

    Args:
        batches: An iterator of batches; nobody else may touch it meanwhile. What it raises is
            raised by the next() whose batch it would have been.
        size: Up to size + 1 batches are made ahead.
        sharding: How a batch is laid out, see `data.place`.

    Returns:
        An iterator with `position`, `seek(position)` and `close()`.

    Raises:
        ValueError: For a size below 1.
    """
    check_whole("prefetch", size=size)
    return Prefetch(batches, size, sharding)
