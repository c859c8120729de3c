"""Columns as codes and numbers: which values get codes, and the map of the others."""

import json

import numpy as np
import pytest
from scipy import stats

from jflow import data
from jflow.data import Column, Marginal

REAL = Column("real", "continuous")
CENTS = Column("cents", "lattice", step=0.01, decimals=2)
WHOLE = Column("whole", "lattice", step=1.0, decimals=0)
RNG = np.random.default_rng(0)


def found(column, x):
    return data.find_marginals((column,), np.asarray(x, float)[:, None])[0]


def test_values_that_stand_out_or_alone_get_codes():
    hours = np.r_[np.repeat(40.0, 400), RNG.integers(1, 90, 900)]  # 10 rows of each other value
    assert found(WHOLE, hours).values == (40.0,)
    gains = np.repeat([2174.0, 7298.0, 15024.0, *range(90_000, 90_040)], [30, 40, 20, *[1] * 40])
    assert found(WHOLE, gains).values == (2174.0, 7298.0, 15024.0)
    ratings = RNG.integers(1, 6, 300)
    assert found(WHOLE, ratings).values == (1.0, 2.0, 3.0, 4.0, 5.0)
    # halves among many whole numbers are sparse, and no number of them stands out
    heaped = np.r_[np.repeat(np.arange(0.0, 80.0), 20), np.arange(0.5, 80.0)]
    assert found(WHOLE._replace(step=0.5), heaped).values == ()
    rain = np.r_[np.zeros(50), RNG.exponential(size=50), [np.nan] * 3]
    assert str(found(REAL, rain).values) == "(0.0, nan)" and found(REAL, rain).number
    color = Column("color", "categorical", step=1.0, categories=("red", "blue"))
    assert found(color, [0, 1, 0]) == Marginal((0.0, 1.0))


@pytest.mark.parametrize("column", [REAL, CENTS, WHOLE])
def test_numbers_come_close_to_a_normal_and_back(column):
    """Kolmogorov-Smirnov at a false-alarm rate of 1e-4, on rows that the map was not fitted to."""
    draws = np.exp(2 + 1.5 * RNG.normal(size=(2, 4000)))
    fit, fresh = np.floor(draws / column.step) * column.step if column.step else draws
    if column is WHOLE:
        fit, fresh = fit + 100 * RNG.integers(0, 50, 4000), fresh + 100 * RNG.integers(0, 50, 4000)
    marginal = found(column, fit)
    marginal = Marginal(
        **{
            k: tuple(v) if isinstance(v, list) else v
            for k, v in json.loads(json.dumps(marginal._asdict())).items()
        }
    )
    spread = fresh + column.step * RNG.random(4000)
    z = data.to_normal(marginal, spread)
    assert stats.kstest(z, "norm").pvalue > 1e-4
    np.testing.assert_allclose(data.from_normal(marginal, z), spread, rtol=1e-9)
    far = np.array([-1e6, 1e9])  # beyond the table the map goes on
    np.testing.assert_allclose(data.from_normal(marginal, data.to_normal(marginal, far)), far)
    rows = {"x": z[:, None].astype(np.float32), "code": np.full((4000, 1), len(marginal.values))}
    h = 1e-5 * (1 + np.abs(spread))
    slope = (data.to_normal(marginal, spread + h) - data.to_normal(marginal, spread - h)) / (2 * h)
    gain = data.log_slopes((column,), (marginal,), rows)[:, 0]
    away = np.abs(np.log(slope) - gain) < 1e-3  # but where a knot lies within h
    assert away.mean() > 0.99


def test_codes_weigh_what_their_column_counts_as():
    """A probability, divided by the cell's width where the column counts as density."""
    for column, gain in ((WHOLE, 0.0), (CENTS, -np.log(0.01)), (REAL, 0.0)):
        marginal = Marginal((3.0, np.nan), True, (0.0, 1.0), (0.0, 1.0), 0.0, 1.0)
        rows = {"x": np.zeros((2, 1)), "code": np.array([[0], [1]])}
        gains = data.log_slopes((column,), (marginal,), rows)
        np.testing.assert_allclose(gains, [[gain], [0.0]])


def test_what_was_never_seen_has_no_code():
    x = np.array([[np.nan], [0.5]])
    marginal = found(REAL, RNG.normal(size=50))
    rows = data.to_codes_and_numbers((REAL,), (marginal,), x, np.zeros(x.shape))
    assert rows["code"].tolist() == [[-1], [0]]
    back = data.from_codes_and_numbers((marginal,), {k: v[1:] for k, v in rows.items()})
    np.testing.assert_allclose(back, [[0.5]], rtol=1e-6)


def test_single_values_are_read_as_the_table_writes_them_or_plainly():
    german = Column("preis", "lattice", step=0.01, decimals=2, padding=2, point=",", thousands=".")
    assert data.encode_value(german, "1.234,50") == data.encode_value(german, 1234.5) == 1234.5
    assert data.value_text(german, 1234.5) == "1.234,50"
    day = Column("tag", "lattice", step=1.0, decimals=0, time="%d.%m.%Y")
    assert data.encode_value(day, "02.01.1970") == data.encode_value(day, "1970-01-02") == 1.0
    assert data.value_text(day, 1.0) == "02.01.1970"
    sex = Column("sex", "categorical", step=1.0, high=1.0, categories=("female", "male"))
    assert data.encode_value(sex, "male") == 1.0
    with pytest.raises(ValueError, match="'sex'.*did you mean 'female'.*it has 'female', 'male'"):
        data.encode_value(sex, "femal")
    with pytest.raises(ValueError, match="column 'preis'.*is not on the column's steps"):
        data.encode_value(german, 0.005)
