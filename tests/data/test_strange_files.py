"""What else people bring: years and counts as headers, titles above a table, months by name, codes
longer than float64 counts, markers of missing values, numbers with exponents, and files that are no
tables."""

import datetime
import json
import warnings

import numpy as np
import pandas as pd
import pytest

from jflow import data

N = 60
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 3)).round(2)
NAMES = [f"c{i % 3}" for i in range(N)]


def read(folder, text, **options):
    path = folder / "t.csv"
    path.write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return data.read_table(path, **options)


def lines(*columns, delimiter=","):
    return "".join(delimiter.join(map(str, row)) + "\n" for row in zip(*columns, strict=True))


@pytest.mark.parametrize(
    ("first", "columns", "header"),
    [
        ("country,2020,2021", (NAMES, X[:, 0], X[:, 1]), True),
        ("country,2019,2021", (NAMES, np.arange(N), 3 * np.arange(N)), True),
        ("x,2020", (X[:, 0], X[:, 1]), True),
        ("0,1,2", X.T, True),  # as pandas names the columns of an array
        ("c1,2020,2021", (NAMES, X[:, 0], X[:, 1]), False),
        ("NA,2,3", X.T, False),
        ("Anna,1,2", ([f"n{i}" for i in range(N)], np.arange(N) % 5, np.arange(N) % 7), False),
        ("1,2,3", np.arange(3 * N).reshape(3, N) % 5, False),
        ("0,1", X[:, :2].T, False),  # a time series may begin so
    ],
)
def test_numbers_as_names(tmp_path, first, columns, header):
    table = read(tmp_path, f"{first}\n{lines(*columns)}")
    assert table.header == header and table.rows == N + (not header)
    if header:
        assert table.names == tuple(first.split(","))


def test_a_first_row_that_may_be_names_is_said(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(f"country,12.5,3.1\n{lines(NAMES, X[:, 0], X[:, 1])}")
    with pytest.warns(UserWarning, match="first row is read as data.*'country'.*header=true"):
        table = data.read_table(path)
    assert not table.header


def test_a_title_above_the_table_is_named_and_a_comment_passed_over(tmp_path):
    body = "a;b\n" + lines(X[:, 0], X[:, 1], delimiter=";")
    with pytest.raises(
        ValueError, match="line 1 has 1 field, most lines have 2: .*put # before what stands above"
    ):
        read(tmp_path, f"Report of May, 2024\n\n{body}")
    table = read(tmp_path, f"# Report of May, 2024\n\n{body}")
    assert table.names == ("a", "b") and table.delimiter == ";"
    assert read(tmp_path, body.replace(";", "|")).delimiter == "|"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (json.dumps([{"a": i} for i in range(9)], indent=1).encode(), "JSON.*pandas.read_json"),
        (b'{"a": 1}\n{"a": 2}\n', "JSON.*pandas.read_json"),
        (b"\xef\xbb\xbf<!DOCTYPE html>\n<table></table>", "HTML or XML"),
        (b"\x93NUMPY\x01\x00v\x00", "numpy.load"),
        (b"SQLite format 3\x00", "pandas.read_sql"),
    ],
)
def test_files_that_are_no_tables_say_what_reads_them(tmp_path, raw, said):
    (tmp_path / "t.csv").write_bytes(raw)
    with pytest.raises(ValueError, match=rf"t\.csv is .*{said}"):
        data.read_table(tmp_path / "t.csv")


def back(table, **options):
    """The columns that are found, and their rows; every cell has to come back as it was."""
    schema = data.find_schema(table, **options)
    x = data.encode(schema, table)
    assert data.to_text(schema, data.decode(schema, x)) == [
        list(row) for row in zip(*table.cells, strict=True)
    ]
    return schema, x


@pytest.mark.parametrize("form", ["%Y-%m", "%m/%Y", "%b %Y", "%B %Y", "%Y-%b", "%m-%Y"])
def test_months_without_a_day(tmp_path, form):
    """Against pandas' periods, around 1970; in a file, in a DataFrame, and a date for a month."""
    periods = pd.Series(pd.period_range("1968-03", periods=N, freq="M")).sample(frac=1.0)
    cells = [period.strftime(form) for period in periods]
    cells[3] = ""
    (column, _), x = back(read(tmp_path, "month;x\n" + lines(cells, X[:, 0], delimiter=";")))
    assert (column.kind, column.time, column.step, column.missing) == ("lattice", form, 1.0, "")
    wanted = periods.astype("datetime64[ns]").to_numpy().astype("datetime64[M]").astype(float)
    wanted[3] = np.nan
    np.testing.assert_array_equal(x[:, 0], wanted)
    assert data.encode_value(column, pd.Timestamp("1971-02-28")) == 13.0
    with pytest.raises(ValueError, match="does not exist|not written like"):
        data.encode_value(column, "1971-13")
    frame = pd.DataFrame({"month": periods.reset_index(drop=True), "x": X[:, 0]})
    frame.loc[3, "month"] = pd.NaT
    table = data.read_table(frame)
    schema = data.find_schema(table)
    pd.testing.assert_frame_equal(data.to_frame(schema, data.encode(schema, table)), frame)


def test_what_looks_like_months_and_is_none(tmp_path):
    """A month that does not exist, another form in between, and months as names of columns."""
    for odd in ("2024-13", "March"):
        cells = [odd if i == 5 else f"2024-{1 + i % 12:02d}" for i in range(N)]
        schema, _ = back(read(tmp_path, "a;x\n" + lines(cells, X[:, 0], delimiter=";")))
        assert schema[0].kind == "categorical"
    table = read(tmp_path, "2024-01,2024-02,2024-03\n" + lines(*X.T))
    assert table.header and table.names == ("2024-01", "2024-02", "2024-03")


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ("%d-%b-%Y", "%d-%b-%Y"),
        ("%d %B %Y", "%d %B %Y"),
        ("%B %d, %Y", "%B %d, %Y"),
        ("%b %d %Y %I:%M %p", "%b %d %Y %I:%M %p"),
        ("%d%b%Y", "%d%b%Y"),
        ("%d. %b %y", "%d. %b %y"),
        ("%Y-%m-%d %H:%M:%S UTC", "%Y-%m-%d %H:%M:%S UTC"),
    ],
)
def test_months_by_name_and_utc(tmp_path, form, pattern):
    """Against Python's own reading; most days are of May, whose name is the same in both
    lengths."""
    start, minutes = datetime.datetime(2024, 4, 25), RNG.integers(0, 60_000, N)
    moments = [start + datetime.timedelta(minutes=int(m)) for m in minutes]
    for upper in (False, True):
        cells = [m.strftime(form).upper() if upper else m.strftime(form) for m in moments]
        (column, _), x = back(read(tmp_path, "t;x\n" + lines(cells, X[:, 0], delimiter=";")))
        assert column.time.replace("^", "") == pattern
        unit = datetime.timedelta(seconds=1) if ":" in cells[0] else datetime.timedelta(days=1)
        epoch = datetime.datetime(1970, 1, 1)
        expected = [(datetime.datetime.strptime(c, form) - epoch) / unit for c in cells]
        np.testing.assert_array_equal(x[:, 0], expected)


def test_months_in_other_languages_and_durations_get_a_remedy(tmp_path):
    cells = [f"{1 + k % 28}. Dezember {1950 + k}" for k in range(N)]
    with pytest.raises(ValueError, match="dates in a form that is not read.*as 2024-12-31"):
        data.find_schema(read(tmp_path, "t,x\n" + lines(cells, X[:, 0])))
    cells = [f"{k}:{k % 60:02d}:00" for k in range(N)]
    with pytest.raises(ValueError, match="'24:24:00', which is no time of day: write a duration"):
        data.find_schema(read(tmp_path, "t,x\n" + lines(cells, X[:, 0])))


def test_codes_longer_than_float64_counts(tmp_path):
    ids = RNG.choice([2**60 + 1, 2**60 + 3], N)
    schema, _ = back(read(tmp_path, "id,x\n" + lines(ids, X[:, 0])))
    assert set(schema[0].categories) == {str(2**60 + 1), str(2**60 + 3)}
    for dtype in ("int64", "uint64", "Int64"):
        frame = pd.DataFrame({"id": pd.array(ids, dtype=dtype), "x": X[:, 0]})
        table = data.read_table(frame)
        schema = data.find_schema(table)
        pd.testing.assert_frame_equal(data.to_frame(schema, data.encode(schema, table)), frame)
    table = read(tmp_path, "my id,x\n" + lines(2**60 + np.arange(N) ** 3, X[:, 0]))
    with pytest.raises(ValueError, match="'my id' is an identifier.*drop=my id'$"):
        data.find_schema(table)


def test_remedies_are_as_a_shell_takes_them(tmp_path):
    table = read(tmp_path, '"last, first";n o\n' + lines(range(N), range(1, N + 1), delimiter=";"))
    with pytest.raises(ValueError) as error:
        data.find_schema(table)
    assert "'numeric=n o' keeps it" in str(error.value)
    assert str(error.value).endswith("\"drop=['last, first', 'n o']\"") or str(
        error.value
    ).endswith("""'drop=['"'"'last, first'"'"', '"'"'n o'"'"']'""")


def test_markers_of_missing_values(tmp_path):
    """9999 among temperatures is said, and taken as missing by choice; 99 among ages is neither."""
    mark = np.arange(N) % 7 == 0
    cells = np.where(mark, "9999", [f"{v:.1f}" for v in X[:, 0]])
    ages = np.r_[99, 99, np.linspace(40, 98, N - 2).round()].astype(int)
    text = "t,age\n" + lines(cells, ages)
    with pytest.warns(UserWarning) as said:
        data.find_schema(read(tmp_path, text))
    assert [str(w.message).partition("t.csv: ")[2] for w in said] == [
        f"column 't' has 9999 in {mark.sum()} rows, far from all others: if it stands for a"
        " missing value, say missing=9999"
    ]
    table = read(tmp_path, text, missing=("9999.0",))
    schema, x = back(table)
    np.testing.assert_array_equal(np.isnan(x[:, 0]), mark)
    assert schema[0].high < 10
    frame = pd.DataFrame({"t": np.where(mark, -99.0, X[:, 0]), "age": ages})
    np.testing.assert_array_equal(
        data.missing_cells(data.read_table(frame, missing=("-99",)))[:, 0], mark
    )


def test_what_a_table_writes_for_nothing_is_asked_for(tmp_path):
    mark = np.arange(N) % 5 == 0
    days = [f"2024-03-{1 + k % 28:02d}" for k in range(N)]
    cells = np.where(mark, "#DIV/0!", X[:, 0].astype(str)), np.where(mark, "open", days)
    text = "x,t\n" + lines(*cells)
    with pytest.raises(ValueError) as error:
        data.find_schema(read(tmp_path, text))
    assert "say 'missing=#DIV/0!' if it stands for a missing value, or keep" in str(error.value)
    assert "say missing=open if it stands for a missing value (12 such" in str(error.value)
    table = read(tmp_path, text, missing=("#DIV/0!", "open"))
    _, x = back(table)
    np.testing.assert_array_equal(np.isnan(x), np.stack([mark, mark], 1))


def test_exponents_come_back(tmp_path):
    """Ten digits of numbers of all sizes are no lattice; whole numbers, as NumPy saves them, are
    one."""
    wide = [f"{v:.4E}" for v in X[:, 0] * 10.0 ** np.arange(-5, 5).repeat(N // 10)]
    whole = [f"{v:.18e}" for v in RNG.integers(-9, 9, N)]
    schema, x = back(read(tmp_path, "a,b\n" + lines(wide, whole)))
    assert [(c.kind, c.step) for c in schema] == [("continuous", 0.0), ("lattice", 1.0)]
    np.testing.assert_array_equal(x, np.array([wide, whole], float).T)


def test_what_is_masked_is_missing():
    masked = np.ma.masked_greater(X, 1.0)
    np.testing.assert_array_equal(data.missing_cells(data.read_table(masked)), X > 1.0)
