import numpy as np
import pytest

from jflow import data

ROWS = {"x": np.arange(20).reshape(10, 2), "cond": np.arange(10)}


def first(iterator, n):
    return [next(iterator) for _ in range(n)]


def test_an_epoch_gives_every_row_once_and_drops_the_rest():
    epoch = first(data.batches(ROWS, 3, seed=1), 3)
    seen = np.concatenate([b["cond"] for b in epoch])
    assert len(np.unique(seen)) == 9
    for b in epoch:
        np.testing.assert_array_equal(b["x"][:, 0], 2 * b["cond"])  # rows stay together
    orders = [
        np.concatenate([b["cond"] for b in first(it, 5)])
        for it in [data.batches(ROWS, 2, seed=1)]
        for _ in "ab"
    ]
    assert not np.array_equal(*orders)  # a fresh permutation each epoch
    np.testing.assert_array_equal(np.sort(orders[1]), np.arange(10))


def test_batch_p_is_a_function_of_seed_and_p():
    def noisy(rows, rng):
        return {**rows, "u": rng.random(len(rows["x"]))}

    straight = first(data.batches(ROWS, 4, seed=7, transform=noisy), 9)
    for p in (8, 0, 5, 3):
        it = data.batches(ROWS, 4, seed=7, transform=noisy)
        it.seek(p)
        again = next(it)
        assert it.position == p + 1
        for key in ("x", "cond", "u"):
            np.testing.assert_array_equal(again[key], straight[p][key])
    other = next(data.batches(ROWS, 4, seed=8, transform=noisy))
    assert not np.array_equal(other["u"], straight[0]["u"])
    noise = np.concatenate([b["u"] for b in straight])
    assert len(np.unique(noise)) == len(noise)  # no batch repeats another's noise


def test_noise_is_not_the_stream_of_the_permutation():
    it = data.batches(
        ROWS, 10, seed=3, transform=lambda rows, rng: {"drawn": rng.permutation(10), **rows}
    )
    for b in first(it, 3):
        assert not np.array_equal(b["drawn"], b["cond"])


@pytest.mark.parametrize(
    ("rows", "batch", "message"),
    [
        (ROWS, 11, "batch of 11 is larger than the data: 10 rows"),
        (ROWS, 0, "batch=0"),
        ({"x": np.zeros((0, 2))}, 1, "no rows"),
        ({"x": np.zeros((3, 2)), "cond": np.zeros(4)}, 1, "'x' 3, 'cond' 4"),
        ({}, 1, "no arrays"),
    ],
)
def test_errors(rows, batch, message):
    with pytest.raises(ValueError, match=message):
        data.batches(rows, batch)


def test_bad_positions_and_seeds():
    with pytest.raises(ValueError, match="-1"):
        data.batches(ROWS, 2).seek(-1)
    with pytest.raises(ValueError, match="seed"):
        data.batches(ROWS, 2, seed=-1)


def test_shares_are_the_parts_of_every_batch():
    shares = [data.batches(ROWS, 6, seed=4, share=(i, 3)) for i in range(3)]
    whole = data.batches(ROWS, 6, seed=4)
    for _ in range(3):
        parts = [next(it)["cond"] for it in shares]
        assert [len(part) for part in parts] == [2, 2, 2]
        np.testing.assert_array_equal(np.concatenate(parts), next(whole)["cond"])


def test_shares_draw_noise_of_their_own_and_the_first_that_of_the_whole():
    def noise(rows, rng):
        return {"u": rng.random(2)}

    drawn = [next(data.batches(ROWS, 4, transform=noise, share=(i, 2)))["u"] for i in range(2)]
    assert not np.intersect1d(*drawn).size
    np.testing.assert_array_equal(drawn[0], next(data.batches(ROWS, 4, transform=noise))["u"])


@pytest.mark.parametrize("share", [(0, 3), (2, 2), (-1, 2)])
def test_bad_shares(share):
    with pytest.raises(ValueError, match=r"n dividing batch=4"):
        data.batches(ROWS, 4, share=share)


def test_one_seed_gives_each_purpose_numbers_of_its_own():
    """`data.split` draws from the plain stream of its seed; what else the same seed is given to
    does not."""
    n, plain = 64, lambda: np.random.default_rng(5)
    parts = data.split({"x": np.arange(n)}, test=0.5, seed=5)
    assert sorted(parts.test["x"]) in [sorted(half) for half in np.split(plain().permutation(n), 2)]
    batches = data.batches(
        {"x": np.arange(n)}, n, seed=5, transform=lambda rows, rng: {**rows, "u": rng.random(n)}
    )
    first, second = next(batches), next(batches)
    assert not np.array_equal(first["x"], plain().permutation(n))
    assert not np.array_equal(
        second["x"], np.random.default_rng((5, 1)).permutation(n)
    )  # the noise of a table's rows
    assert not np.array_equal(first["u"], plain().random(n))
    assert not np.array_equal(data.moons(n, 5)["cond"], plain().integers(0, 2, n))
    assert not np.array_equal(data.eight_gaussians(n, 5)["cond"], plain().integers(0, 8, n))
