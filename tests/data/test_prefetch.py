import gc
import queue
import threading

import jax
import numpy as np
import pytest
from subprocesses import LIMIT

from jflow import data

ROWS = {"x": np.arange(40, dtype=np.float32).reshape(20, 2)}


def source(**options):
    return data.batches(ROWS, 4, seed=5, **options)


def first(iterator, n):
    return [np.asarray(next(iterator)["x"]) for _ in range(n)]


def threads():
    """Those that make batches, of all iterators that are open."""
    return {thread for thread in threading.enumerate() if thread.name == "jflow-prefetch"}


@pytest.mark.parametrize("size", [1, 3])
def test_the_same_batches_on_the_device_made_ahead(size):
    plain, ahead = source(), data.prefetch(source(), size)
    batch = next(ahead)
    assert isinstance(batch["x"], jax.Array)
    np.testing.assert_array_equal(batch["x"], next(plain)["x"])
    np.testing.assert_array_equal(first(ahead, 12), first(plain, 12))
    assert ahead.position == 13
    ahead.close()


def test_no_more_than_size_and_one_are_made_ahead(monkeypatch):
    events = queue.SimpleQueue()

    class Announced(queue.Queue):
        def put(self, *args, **kwargs):
            try:
                super().put(*args, **kwargs)
            except queue.Full:
                events.put("full")
                raise

    monkeypatch.setattr(queue, "Queue", Announced)
    ahead = data.prefetch(source(transform=lambda rows, rng: events.put("drawn") or rows), 2)
    assert events.empty()  # nothing before it is asked for
    drawn = 0
    for given in range(1, 5):
        next(ahead)
        drawn += sum(events.get() == "drawn" for _ in range(events.qsize()))
        # Found full twice more, the first time perhaps before next() took one: the thread waits
        # with a batch in its hand.
        for _ in range(2):
            while events.get(timeout=LIMIT) == "drawn":
                drawn += 1
                assert drawn <= given + 3
        assert drawn == given + 3  # two in the queue, one in hand
    ahead.close()


def test_position_counts_what_was_given_and_seek_goes_there():
    ahead = data.prefetch(source())
    first(ahead, 3)
    kept = ahead.position
    expected = first(ahead, 4)
    assert kept == 3 and ahead.position == 7
    ahead.seek(kept)
    np.testing.assert_array_equal(first(ahead, 4), expected)
    other = data.prefetch(source(), 1)  # a fresh one, as after a restart
    other.seek(kept)
    np.testing.assert_array_equal(first(other, 4), expected)
    ahead.close(), other.close()


def test_close_leaves_the_source_where_the_consumer_stands():
    batches, others = source(), threads()
    ahead = data.prefetch(batches)
    first(ahead, 3)
    ahead.close()
    assert batches.position == 3 and threads() <= others
    np.testing.assert_array_equal(next(ahead)["x"], first(source(), 4)[3])  # and it can go on
    ahead.close()
    started = data.prefetch(batches)
    assert started.position == 4


def test_errors_come_with_the_batch_that_they_are_of():
    def fail(rows, rng):
        if rows["x"][0, 0] == third[0, 0]:
            raise RuntimeError("broken row")
        return rows

    third = first(source(), 3)[2]
    ahead = data.prefetch(source(transform=fail), 2)
    first(ahead, 2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken row"):
            next(ahead)
    assert ahead.position == 2
    ahead.seek(0)
    first(ahead, 2)
    ahead.close()
    short = data.prefetch(iter([ROWS, ROWS]))
    assert len(list(short)) == 2 and short.position == 2
    with pytest.raises(StopIteration):
        next(short)


def test_a_forgotten_iterator_ends_its_thread():
    others = threads()
    ahead = data.prefetch(source())
    next(ahead)
    (thread,) = threads() - others
    del ahead
    gc.collect()
    thread.join(LIMIT)
    assert not thread.is_alive()


def test_sharding_and_bad_sizes():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    ahead = data.prefetch(source(), sharding=sharding)
    assert next(ahead)["x"].sharding == sharding
    ahead.close()
    for size in (0, 1.5, True):
        with pytest.raises(ValueError, match="size to be a whole number of at least 1"):
            data.prefetch(source(), size)
