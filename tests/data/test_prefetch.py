import threading
import time

import jax
import numpy as np
import pytest

from jflow import data

ROWS = {"x": np.arange(40, dtype=np.float32).reshape(20, 2)}


def source(**options):
    return data.batches(ROWS, 4, seed=5, **options)


def first(iterator, n):
    return [np.asarray(next(iterator)["x"]) for _ in range(n)]


def alive():
    return [thread for thread in threading.enumerate() if thread.name == "jflow-prefetch"]


@pytest.mark.parametrize("size", [1, 3])
def test_the_same_batches_on_the_device_made_ahead(size):
    plain, ahead = source(), data.prefetch(source(), size)
    batch = next(ahead)
    assert isinstance(batch["x"], jax.Array)
    np.testing.assert_array_equal(batch["x"], next(plain)["x"])
    np.testing.assert_array_equal(first(ahead, 12), first(plain, 12))
    assert ahead.position == 13
    ahead.close()


def test_no_more_than_size_and_one_are_made_ahead():
    drawn = []
    ahead = data.prefetch(source(transform=lambda rows, rng: drawn.append(1) or rows), 2)
    assert not drawn  # nothing before it is asked for
    next(ahead)
    until = time.monotonic() + 20
    while len(drawn) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(drawn) == 4  # one given, two in the queue, one in hand
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
    batches = source()
    ahead = data.prefetch(batches)
    first(ahead, 3)
    ahead.close()
    assert batches.position == 3 and not alive()
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
    before = len(alive())
    ahead = data.prefetch(source())
    next(ahead)
    assert len(alive()) == before + 1
    del ahead
    until = time.monotonic() + 20
    while len(alive()) > before and time.monotonic() < until:
        time.sleep(0.01)
    assert len(alive()) == before


def test_sharding_and_bad_sizes():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    ahead = data.prefetch(source(), sharding=sharding)
    assert next(ahead)["x"].sharding == sharding
    ahead.close()
    for size in (0, 1.5, True):
        with pytest.raises(ValueError, match="size of at least 1 batch"):
            data.prefetch(source(), size)
