import numpy as np
import pytest

from jflow import data


def test_split_cuts_every_row_into_one_part():
    rows = {"x": np.arange(103)}
    splits = data.split(rows, valid=0.1, test=0.2, seed=3)
    assert [len(part["x"]) for part in splits] == [72, 10, 21]
    np.testing.assert_array_equal(
        np.sort(np.concatenate([part["x"] for part in splits])), rows["x"]
    )
    assert not np.array_equal(
        splits.test["x"], data.split(rows, valid=0.1, test=0.2, seed=4).test["x"]
    )
    assert data.split(rows, test=0.2).valid is None


def test_stratified_split_keeps_the_shares_of_classes():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    splits = data.stratified_split({"x": np.arange(100), "cond": labels}, test=25)
    # 12.5, 7.5, 5: the largest remainders share the odd row
    assert np.bincount(splits.test["cond"]).tolist() in ([13, 7, 5], [12, 8, 5])
    assert not set(splits.test["x"]) & set(splits.train["x"])


def test_errors():
    with pytest.raises(ValueError, match="every part needs a row"):
        data.split({"x": np.arange(5)}, valid=0.05)
    with pytest.raises(ValueError, match="test=5"):
        data.stratified_split({"cond": np.arange(5)}, test=5)
