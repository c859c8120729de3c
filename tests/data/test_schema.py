import json

import numpy as np
import pytest

from jflow import data

RNG = np.random.default_rng(0)


def table(tmp_path, columns, header=True):
    names = list(columns)
    lines = [",".join(names)] * header + [
        ",".join(row) for row in zip(*columns.values(), strict=True)
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    return data.read_table(tmp_path / "t.csv", header=header)


def texts(values, form):
    return [format(v, form) for v in values]


@pytest.mark.parametrize(
    ("x", "step", "decimals"),
    [
        (RNG.integers(-5, 50, 300), 1, 0),
        (10 * RNG.integers(0, 50, 300), 10, 0),
        (7 + 10 * RNG.integers(0, 50, 300), 10, 0),  # off zero
        (RNG.integers(0, 500, 300) / 100, 0.01, 2),
        (RNG.integers(0, 500, 300) * 0.05, 0.05, 2),  # 0.15000000000000002 and the like
        (np.cumsum(np.full(200, 0.1)), 0.1, 1),  # rounding adds up
        ((RNG.integers(0, 500, 300) / 10).astype(np.float32), 0.1, 1),  # 0.1 to float32's digits
        (
            np.round((RNG.integers(0, 900, 300) / 100).astype(np.float32).astype(float), 6),
            0.01,
            2,
        ),  # 9.899999
        (RNG.integers(0, 60, 300) / 16, 0.0625, 4),
        (RNG.integers(0, 12, 300) / 3, 1 / 3, None),
        ((RNG.integers(0, 12, 300) - 5.1) / 3.7, 1 / 3.7, None),  # whole numbers, standardized
        (1e6 + RNG.integers(0, 900, 300), 1, 0),
    ],
)
def test_a_lattice_is_found(x, step, decimals):
    found = data.find_lattice(x)
    assert found is not None
    np.testing.assert_allclose(found[0], step, rtol=1e-9)
    assert found[2] == decimals
    k = (np.asarray(x, float) - found[1]) / found[0]
    assert np.abs(k - np.rint(k)).max() < 0.01


@pytest.mark.parametrize(
    "x",
    [
        RNG.normal(size=300),
        RNG.normal(size=300).astype(np.float32),
        np.repeat(RNG.normal(size=150), 2),  # repeats alone make no lattice
        np.round(RNG.normal(size=300), 9),  # finer than a float32 model resolves
        RNG.exponential(size=300) * 1e12,
    ],
)
def test_full_precision_is_no_lattice(x):
    assert data.find_lattice(x) is None


def test_kinds(tmp_path):
    n = 200
    t = table(
        tmp_path,
        {
            "whole": texts(RNG.integers(0, 9, n), "d"),
            "padded": texts(RNG.integers(0, 9, n), ".1f"),
            "steps": texts(RNG.integers(0, 900, n) / 100, ".2f"),
            "real": texts(RNG.normal(size=n), ".17g"),
            "text": list(RNG.choice(["red", "green", ""], n, p=[0.2, 0.7, 0.1])),
            "bool": list(RNG.choice(["True", "False"], n)),
            "spikes": list(RNG.choice(["-0.4471", "2.236067977", "0.31830988618"], n)),
        },
    )
    schema = {c.name: c for c in data.find_schema(t)}
    assert {name: c.kind for name, c in schema.items()} == {
        "whole": "lattice",
        "padded": "lattice",
        "steps": "lattice",
        "real": "continuous",
        "text": "categorical",
        "bool": "categorical",
        "spikes": "categorical",
    }
    assert schema["text"].categories == ("green", "red", "")  # most frequent first
    assert schema["spikes"].categories == (
        "-0.4471",
        "0.31830988618",
        "2.236067977",
    )  # in order of size
    assert [c for c in schema if schema[c].is_mass] == ["whole", "padded", "text", "bool", "spikes"]
    again = [
        data.Column(**{**c, "categories": tuple(c["categories"])})
        for c in json.loads(json.dumps([c._asdict() for c in schema.values()]))
    ]
    assert tuple(again) == tuple(schema.values())
    chosen = data.find_schema(t, categorical=("whole",))[0]
    assert chosen.kind == "categorical" and set(chosen.categories) == set("012345678")


def test_cells_come_back_as_they_were_written(tmp_path):
    n = 300
    t = table(
        tmp_path,
        {
            "whole": texts(RNG.integers(-3, 9, n), "d"),
            "padded": texts(RNG.integers(-3, 9, n), ".1f"),
            "fixed": texts(RNG.integers(-300, 900, n) / 100, ".2f"),
            "shortest": [repr(v / 100) for v in RNG.integers(101, 900, n).tolist()],
            "real": [repr(v) for v in RNG.normal(size=n).tolist()],
            "text": list(RNG.choice(["a b", "c"], n)),
        },
    )
    schema = data.find_schema(t)
    x = data.encode(schema, t)
    original = [list(row) for row in zip(*t.cells, strict=True)]
    assert data.to_text(schema, x) == original
    # and through the noise, at a float32 model's precision
    noisy = data.add_noise(schema, x, np.random.default_rng(1)).astype(np.float32)
    noisy[:, 4] = x[:, 4]
    back = data.decode(schema, noisy)
    back[:, 4] = x[:, 4]  # float32 has lost its digits
    assert data.to_text(schema, back) == original


def test_noise_fills_the_cells_and_nothing_else(tmp_path):
    n = 4000
    t = table(
        tmp_path,
        {
            "tens": texts(10 * RNG.integers(0, 9, n), "d"),
            "text": list(RNG.choice(["a", "b"], n)),
            "real": [repr(v) for v in RNG.normal(size=n).tolist()],
        },
    )
    schema = data.find_schema(t)
    x = data.encode(schema, t)
    u = data.add_noise(schema, x, np.random.default_rng(0)) - x
    assert (u[:, 2] == 0).all()
    for j, width in enumerate((10, 1)):
        assert 0 <= u[:, j].min() and u[:, j].max() < width
        v = np.sort(u[:, j] / width)
        assert np.abs(v - (np.arange(n) + 0.5) / n).max() < 1.95 / np.sqrt(
            n
        )  # passed by chance once in a thousand
    np.testing.assert_allclose(data.log_mass_unit(schema), np.log(10))


def test_decode_stays_in_the_range_of_the_table(tmp_path):
    t = table(
        tmp_path,
        {
            "x": texts(np.arange(2, 50), "d"),
            "c": ["a", "b"] * 24,
            "r": texts(RNG.normal(size=48), ".17g"),
        },
    )
    schema = data.find_schema(t)
    x = data.decode(schema, np.array([[-7.0, -0.5, -1e9], [1e6, 5.0, 1e9], [3.7, 1.2, 0.0]]))
    text = data.to_text(schema, x)
    assert [row[:2] for row in text] == [["2", "a"], ["49", "b"], ["3", "b"]]
    assert x[0, 2] == schema[2].low and x[1, 2] == schema[2].high


@pytest.mark.parametrize(
    ("cell", "what"),
    [
        ("", "a missing value"),
        ("NaN", "a missing value"),
        ("n/a", "a missing value"),
        ("wet", "'wet'"),
        ("inf", "'inf'"),
    ],
)
def test_what_is_no_number_is_named_by_line_and_column(tmp_path, cell, what):
    x = texts(RNG.normal(size=30), ".4f")
    x[6] = x[20] = cell
    t = table(tmp_path, {"id": texts(range(30), "d"), "rain": x})
    with pytest.raises(
        ValueError, match=rf"t\.csv: line 8, column 'rain': {what} where finite .*\(2 such cells"
    ):
        data.find_schema(t)


def test_constant_columns_are_all_named(tmp_path):
    columns = {"a": ["1"] * 5, "b": list("12345"), "c": ["x"] * 5}
    with pytest.raises(ValueError, match="constant columns have no density: 'a', 'c'"):
        data.find_schema(table(tmp_path, columns))
    with pytest.raises(ValueError, match="constant.*'a'"):  # the same number, written two ways
        data.find_schema(table(tmp_path, {"a": ["1", "1.0", "1"], "b": list("123")}))
    with pytest.raises(ValueError, match="column 'a' is empty"):
        data.find_schema(table(tmp_path, {"a": ["", "", "na"], "b": list("123")}))


def test_identifiers_are_refused(tmp_path):
    names = [f"person {i}" for i in range(60)]
    with pytest.raises(ValueError, match="'name' holds 60 different texts in 60 rows"):
        data.find_schema(table(tmp_path, {"name": names, "x": texts(range(60), "d")}))


def test_california_housing_names_its_missing_value(data_dir):
    path = data_dir / "tabular" / "california_housing.csv.gz"
    with pytest.raises(
        ValueError, match=r"line 292, column 'total_bedrooms': a missing value .*\(207 such cells"
    ):
        data.find_schema(data.read_table(path))
    schema = data.find_schema(data.read_table(path, drop=("total_bedrooms",)))
    kinds = {c.name: c.kind for c in schema}
    assert kinds["ocean_proximity"] == "categorical" and kinds["median_income"] == "lattice"


def test_real_tables_come_back_as_they_were_written(data_dir):
    for name in ("adult-test.csv.gz", "winequality-red.csv.gz", "boston_housing.data.gz"):
        t = data.read_table(data_dir / "tabular" / name)
        schema = data.find_schema(t)
        x = data.encode(schema, t)
        back = data.decode(schema, data.add_noise(schema, x, np.random.default_rng(0)))
        np.testing.assert_allclose(back, x, atol=1e-9)
        same = [
            row == list(o)
            for row, o in zip(data.to_text(schema, back), zip(*t.cells, strict=True), strict=True)
        ]
        assert np.mean(same) > 0.99  # red wine holds '2' beside '2.00' in one column, once
