"""Ten files such as people have, and the same with what goes wrong in them: every column's kind,
and every cell back as it was written."""

import datetime
import warnings

import numpy as np
import pandas as pd
import pytest

from jflow import data

N = 120
DAYS = [datetime.date(2024, 1, 15) + datetime.timedelta(days=d) for d in range(200)]


def rng(seed):
    return np.random.default_rng(seed)


def write(path, columns, *, delimiter=",", encoding="utf-8", quote=True):
    def cell(text):
        return f'"{text}"' if quote and delimiter in text else text

    rows = [list(columns), *zip(*columns.values(), strict=True)]
    text = "".join(delimiter.join(map(cell, row)) + "\n" for row in rows)
    path.write_bytes(text.encode(encoding))
    return path


def days(draw, form, n=N):
    return [DAYS[k].strftime(form) for k in draw.integers(0, len(DAYS), n)]


def blanked(draw, cells, text, share=0.1):
    gone = draw.random(len(cells)) < share
    return [text if lost else cell for lost, cell in zip(gone, cells, strict=True)]


def german(v, decimals=2):
    return f"{v:,.{decimals}f}".translate(str.maketrans(",.", ".,"))


def german_spreadsheet(folder, **broken):
    """An export of a German spreadsheet: semicolons, decimal commas, Windows' letters."""
    draw = rng(0)
    columns = {
        "Datum": days(draw, "%d.%m.%Y"),
        "Filiale": list(draw.choice(["Köln", "Düren", "Bonn"], N)),
        "Umsatz": [german(v) for v in draw.normal(2000, 900, N)],
        "Menge": [german(v, 0) for v in draw.gamma(1, 1500, N)],
        "Rabatt": [german(v, 1) + " %" for v in draw.uniform(0, 30, N)],
        "Preis": [german(v) + " €" for v in draw.gamma(2, 700, N)],
        "bezahlt": list(draw.choice(["ja", "nein"], N)),
    } | broken
    return write(folder / "umsatz.csv", columns, delimiter=";", encoding="cp1252")


def survey(folder, **broken):
    """A survey: answers as text, yes or no, and much that was left blank."""
    draw = rng(1)
    scale = ["strongly disagree", "disagree", "neutral", "agree", "strongly agree"]
    columns = {
        "Age": blanked(draw, [str(v) for v in draw.integers(18, 90, N)], ""),
        "Q1": blanked(draw, list(draw.choice(scale, N)), ""),
        "Q2": blanked(draw, list(draw.choice(scale, N, p=[0.02, 0.08, 0.3, 0.4, 0.2])), ""),
        "Smoker": blanked(draw, list(draw.choice(["Yes", "No"], N)), ""),
        "Newsletter": list(draw.choice(["1", "0"], N)),
        "Minutes": blanked(draw, [f"{v:.1f}" for v in draw.gamma(3, 4, N)], ""),
    } | broken
    return write(folder / "survey.csv", columns)


def sensor_log(folder, **broken):
    """A sensor that writes every ten minutes, when it does."""
    draw = rng(2)
    start = datetime.datetime(2024, 3, 1)
    ticks = np.flatnonzero(draw.random(2 * N) < 0.8)[:N]
    columns = {
        "timestamp": [
            (start + datetime.timedelta(minutes=int(10 * k))).isoformat() + "Z" for k in ticks
        ],
        "temperature": blanked(draw, [f"{v:.2f}" for v in draw.normal(4, 6, N)], "NaN"),
        "pressure": [f"{v:.1f}" for v in draw.normal(1013, 8, N)],
        "rain": [repr(v) for v in np.maximum(draw.normal(-1, 2, N), 0).round(15).tolist()],
        "status": list(draw.choice(["OK", "LOW_BATTERY", "ERR"], N, p=[0.8, 0.15, 0.05])),
        "received": [
            (start + datetime.timedelta(seconds=float(600 * k + s))).isoformat(" ", "milliseconds")
            for k, s in zip(ticks, draw.uniform(0, 60, N), strict=True)
        ],
    } | broken
    return write(folder / "log.csv", columns)


def shop_orders(folder, **broken):
    """The orders of a shop, without their numbers and notes."""
    draw = rng(3)
    columns = {
        "ordered": [f"{DAYS[k]:%m/%d/%Y}" for k in draw.integers(0, 200, N)],
        "time": [f"{m // 60}:{m % 60:02d}" for m in draw.integers(7 * 60, 22 * 60, N)],
        "sku": [f"{v:05d}" for v in draw.choice([17, 350, 1044, 20031, 99], N)],
        "customer": [str(v) for v in draw.choice([48213377, 91827364, 12938475, 77345190], N)],
        "total": [f"${v:,.2f}" for v in draw.gamma(1, 900, N)],
        "tax": [f"{v:.1f}%" for v in draw.choice([0, 7.5, 19.0], N)],
        "gift": list(draw.choice(["TRUE", "FALSE"], N)),
    } | broken
    return write(folder / "orders.csv", columns)


def ratings(folder, **broken):
    """Ratings, of which many rows are alike."""
    draw = rng(4)
    columns = {
        "user": [f"u{v}" for v in draw.integers(0, 12, N)],
        "film": list(draw.choice(["Alien", "Brazil", "Casablanca", "Diva"], N)),
        "stars": [f"{v / 2:g}" for v in draw.integers(1, 11, N)],
        "date": days(draw, "%Y-%m-%d"),
    } | broken
    return write(folder / "ratings.tsv", columns, delimiter="\t")


def bank_statement(folder, **broken):
    """A bank's list of bookings: signs, thousands, two kinds of dates."""
    draw = rng(5)
    amount = np.append(draw.normal(0, 2500, N - 1), 12345.67)
    columns = {
        "Buchung": [f"{DAYS[k]:%d.%m.%y}" for k in draw.integers(0, 200, N)],
        "Art": list(draw.choice(["Lastschrift", "Überweisung", "Gutschrift"], N)),
        "Betrag": [("+" if v > 0 else "") + german(v) for v in amount],
        "Saldo": [german(v) + " EUR" for v in 4000 + draw.normal(0, 3000, N)],
        "Fremd": [f"{v:,.2f}".replace(",", " ") for v in draw.gamma(1, 3000, N)],
        "Haben": [f"({-v:.2f})" if v < 0 else f"{v:.2f}" for v in draw.normal(0, 50, N).tolist()],
    } | broken
    return write(folder / "konto.csv", columns, delimiter=";")


def patients(folder, **broken):
    """Patients: postcodes with their zeros, a value missing in every way."""
    draw = rng(6)
    columns = {
        "born": [
            f"{1930 + k % 80}-{1 + k % 12:02d}-{1 + k % 28:02d}" for k in draw.integers(0, 9999, N)
        ],
        "plz": list(draw.choice(["01067", "04109", "50667", "99084"], N)),
        "sex": blanked(draw, list(draw.choice(["m", "f"], N)), "NA"),
        "weight": blanked(draw, [f"{v:.1f}" for v in draw.normal(75, 12, N)], "NA"),
        "dose": blanked(draw, [f"{v:.3f}" for v in draw.gamma(2, 3, N)], "n/a"),
        "stage": blanked(draw, list(draw.choice(["I", "II", "III"], N)), "?"),
        "smoker": blanked(draw, list(draw.choice(["0", "1"], N)), "."),
        "crp": blanked(draw, [repr(v) for v in draw.lognormal(1, 2, N).tolist()], "-"),
    } | broken
    return write(folder / "patients.csv", columns)


def excel_file(folder, **broken):
    """A sheet with real dates and booleans, and cells that nobody filled in."""
    pytest.importorskip("openpyxl")
    draw = rng(7)
    frame = pd.DataFrame(
        {
            "Start": pd.to_datetime([str(DAYS[k]) for k in draw.integers(0, 200, N)]),
            "Changed": pd.to_datetime("2024-05-01")
            + pd.to_timedelta(draw.integers(0, 10**5, N), "min"),
            "Active": draw.random(N) < 0.7,
            "Hours": draw.normal(38, 3, N).round(2),
            "Team": draw.choice(["blue", "red", None], N),
            "Leave": np.where(draw.random(N) < 0.1, np.nan, draw.integers(0, 30, N)),
        }
        | broken
    )
    frame.to_excel(folder / "staff.xlsx", index=False)
    return folder / "staff.xlsx"


def parquet_file(folder, **broken):
    """A frame with categories and pandas' own missing values."""
    pytest.importorskip("pyarrow")
    draw = rng(8)
    frame = pd.DataFrame(
        {
            "size": pd.Categorical(draw.choice(["S", "M", "L"], N), ["S", "M", "L"], ordered=True),
            "count": pd.array([None, *draw.integers(0, 60, N - 1)], dtype="Int64"),
            "price": draw.lognormal(2, 1, N),
            "sold": pd.to_datetime("2024-01-01") + pd.to_timedelta(draw.integers(0, 99, N), "D"),
            "new": pd.array([None, *(draw.random(N - 1) < 0.5)], dtype="boolean"),
            "ratio": draw.normal(size=N).astype(np.float32),
            "shop": pd.array(draw.choice(["north", "south"], N), dtype="string"),
        }
        | broken
    )
    frame.to_parquet(folder / "stock.parquet")
    return folder / "stock.parquet"


def doubled_headers(folder, **broken):
    """A survey whose tool repeats its headers, leaves one out, and adds a constant."""
    draw = rng(9)
    columns = {"id": [str(k + 1) for k in range(N)]}
    for k in range(4):
        columns[f"score{k}"] = [str(v) for v in draw.integers(1, 8, N)]
    columns |= {"wave": ["2024a"] * N, "": [f"{v:.3f}" for v in draw.normal(size=N)]} | broken
    path = write(folder / "waves.csv", columns)
    header, _, rest = path.read_text().partition("\n")
    for k in range(4):
        header = header.replace(f"score{k}", "score")
    path.write_text(f"{header}\n{rest}")
    return path


def kinds_of(schema):
    """'lattice 0.01' of each column; 'date' and 'time' before the steps of these; 'text' with how
    many categories."""
    found = {}
    for c in schema:
        if c.kind == "categorical":
            found[c.name] = f"text {len(c.categories)}"
        elif c.time:
            found[c.name] = f"{c.time} {c.step:g}"
        else:
            found[c.name] = f"number {c.step:g}"
    return found


def read(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return data.read_table(path, **options)


FILES = [
    (
        german_spreadsheet,
        {
            "Datum": "%d.%m.%Y 1",
            "Filiale": "text 3",
            "Umsatz": "number 0.01",
            "Menge": "number 1",
            "Rabatt": "number 0.1",
            "Preis": "number 0.01",
            "bezahlt": "text 2",
        },
    ),
    (
        survey,
        {
            "Age": "number 1",
            "Q1": "text 6",
            "Q2": "text 6",
            "Smoker": "text 3",
            "Newsletter": "text 2",
            "Minutes": "number 0.1",
        },
    ),
    (
        sensor_log,
        {
            "timestamp": "%Y-%m-%dT%H:%M:%SZ 600",
            "temperature": "number 0.01",
            "pressure": "number 0.1",
            "rain": "number 0",
            "status": "text 3",
            "received": "%Y-%m-%d %H:%M:%S 0.001",
        },
    ),
    (
        shop_orders,
        {
            "ordered": "%m/%d/%Y 1",
            "time": "%-H:%M 60",
            "sku": "text 5",
            "customer": "text 4",
            "total": "number 0.01",
            "tax": "number 0.5",
            "gift": "text 2",
        },
    ),
    (ratings, {"user": "text 12", "film": "text 4", "stars": "number 0.5", "date": "%Y-%m-%d 1"}),
    (
        bank_statement,
        {
            "Buchung": "%d.%m.%y 1",
            "Art": "text 3",
            "Betrag": "number 0.01",
            "Saldo": "number 0.01",
            "Fremd": "number 0.01",
            "Haben": "number 0.01",
        },
    ),
    (
        patients,
        {
            "born": "%Y-%m-%d 1",
            "plz": "text 4",
            "sex": "text 3",
            "weight": "number 0.1",
            "dose": "number 0.001",
            "stage": "text 4",
            "smoker": "text 3",
            "crp": "number 0",
        },
    ),
    (
        excel_file,
        {
            "Start": "%Y-%m-%d 1",
            "Changed": "%Y-%m-%d %H:%M:%S 60",
            "Active": "text 2",
            "Hours": "number 0.01",
            "Team": "text 3",
            "Leave": "number 1",
        },
    ),
    (
        parquet_file,
        {
            "size": "text 3",
            "count": "number 1",
            "price": "number 0",
            "sold": "%Y-%m-%d 1",
            "new": "text 3",
            "ratio": "number 0",
            "shop": "text 2",
        },
    ),
    (
        doubled_headers,
        {
            "score": "number 1",
            "score (2)": "number 1",
            "score (3)": "number 1",
            "score (4)": "number 1",
            "column 7": "number 0.001",
        },
    ),
]


@pytest.mark.parametrize(("make", "kinds"), FILES, ids=[make.__name__ for make, _ in FILES])
def test_columns_are_what_people_mean_and_cells_come_back(tmp_path, make, kinds):
    table = read(make(tmp_path), drop=("id", "wave") if make is doubled_headers else ())
    schema = data.find_schema(table)
    assert kinds_of(schema) == kinds
    x = data.encode(schema, table)
    noisy = data.add_noise(schema, x, rng(0))
    back = data.decode(schema, noisy)
    np.testing.assert_array_equal(back, x)
    frame = data.to_frame(schema, x)
    if table.cells[0].dtype == object and not table.dtypes and make is not excel_file:
        assert data.to_text(schema, back) == [list(row) for row in zip(*table.cells, strict=True)]
    else:  # cells that are no text have one when they are written, and are read again from it
        columns = dict(zip(kinds, zip(*data.to_text(schema, x), strict=True), strict=True))
        again = write(tmp_path / "again.csv", columns)
        np.testing.assert_array_equal(data.encode(schema, data.read_table(again)), x)
    np.testing.assert_array_equal(data.encode(schema, data.read_table(frame)), x)


def test_values_are_what_the_cells_say(tmp_path):
    def first(make, name):
        table = read(make(tmp_path))
        j = table.names.index(name)
        schema = data.find_schema(table)
        k = int(np.argmax([len(str(c)) for c in table.cells[j]]))
        return table.cells[j][k], data.encode(schema, table)[k, j]

    cell, value = first(german_spreadsheet, "Preis")
    assert value == float(cell.removesuffix(" €").replace(".", "").replace(",", "."))
    cell, value = first(german_spreadsheet, "Datum")
    day = datetime.datetime.strptime(cell, "%d.%m.%Y").date()
    assert value == (day - datetime.date(1970, 1, 1)).days
    cell, value = first(sensor_log, "timestamp")
    assert value == datetime.datetime.fromisoformat(cell).timestamp()
    cell, value = first(shop_orders, "time")
    assert value == 3600 * int(cell.split(":")[0]) + 60 * int(cell.split(":")[1])
    cell, value = first(bank_statement, "Betrag")
    assert cell == "+12.345,67" and value == 12345.67
    cell, value = first(bank_statement, "Haben")
    assert cell[0] == "(" and value == -float(cell[1:-1])


def test_frames_of_files_have_natural_types(tmp_path):
    def types(make):
        table = read(make(tmp_path))
        schema = data.find_schema(table)
        frame = data.to_frame(schema, data.encode(schema, table))
        return {name: str(dtype) for name, dtype in frame.dtypes.items()}

    text = str(pd.Series(["a"]).dtype)
    assert types(shop_orders) == {
        "ordered": "datetime64[s]",
        "time": text,
        "sku": text,
        "customer": "int64",
        "total": "float64",
        "tax": "float64",
        "gift": "bool",
    }
    assert types(sensor_log) | {"status": ""} == {
        "timestamp": "datetime64[s, UTC]",
        "temperature": "float64",
        "pressure": "float64",
        "rain": "float64",
        "status": "",
        "received": "datetime64[ms]",
    }
    assert types(survey)["Age"] == "Int64" and types(survey)["Newsletter"] == "int64"


def test_findings_of_the_doubled_headers(tmp_path):
    path = doubled_headers(tmp_path)
    with pytest.warns(UserWarning, match="'score' names more than one.*column 7 has no name"):
        table = data.read_table(path)
    with pytest.raises(ValueError) as error:
        data.find_schema(table)
    assert str(error.value).splitlines()[1:] == [
        "  column 'id' counts the rows, 1 to 120; numeric=id keeps it",
        "  column 'wave' is constant: '2024a' in every row",
        "Leave them out with drop=id,wave",
    ]


def with_one(cells, cell, at=7):
    return [cell if i == at else c for i, c in enumerate(cells)]


D = rng(0)
ISO = days(D, "%Y-%m-%d")
COMMA = [german(v) for v in D.normal(2000, 900, N)]
BROKEN = [
    (patients, {"born": with_one(ISO, "2023-02-29")}, "line 9 holds '2023-02-29', which is a date"),
    (patients, {"born": with_one(ISO, "12.03.2024")}, "'12.03.2024', which is not written like"),
    (patients, {"born": with_one(ISO, "spring")}, "'spring', where a date or a time is expected"),
    (
        shop_orders,
        {"ordered": with_one(days(D, "%d/%m/%Y"), "12/31/2024")},
        "the day first and dates with the month first",
    ),
    (
        shop_orders,
        {"ordered": [f"{1 + k % 12:02d}/{1 + k % 7:02d}/2024" for k in range(N)]},
        "day or the month may come first: say day_first=True",
    ),
    (
        shop_orders,
        {"time": with_one([f"{k % 24}:30" for k in range(N)], "25:10")},
        "no time of day",
    ),
    (
        german_spreadsheet,
        {"Umsatz": with_one(COMMA, "12.50")},
        "'12.50', .*decimal marks are mixed",
    ),
    (
        german_spreadsheet,
        {"Rabatt": [german(v, 1) + " %" * (k % 2) for k, v in enumerate(D.normal(9, 2, N))]},
        r"line \d holds '.*stands in some of the cells alone \(60 such cells\)",
    ),
    (
        bank_statement,
        {"Saldo": with_one([f"{v:.2f} EUR" for v in D.normal(9, 2, N)], "7.11 USD")},
        "'7.11 USD', .*'USD' stands in some of the cells alone",
    ),
    (
        survey,
        {"Minutes": with_one([f"{v:.1f}" for v in D.gamma(3, 4, N)], "ten")},
        "'ten', where a",
    ),
    (
        sensor_log,
        {"rain": with_one([repr(v) for v in D.normal(size=N).tolist()], "0.1234567890123456789")},
        "more digits than float64 holds",
    ),
    (
        sensor_log,
        {"received": [f"2024-01-01 10:00:00.{v:09d}" for v in D.integers(0, 10**9, N)]},
        "finer than a microsecond",
    ),
]


@pytest.mark.parametrize(("make", "columns", "said"), BROKEN)
def test_broken_cells_are_named(tmp_path, make, columns, said):
    table = read(make(tmp_path, **columns))
    (name,) = columns
    with pytest.raises(ValueError, match=rf"column '{name}' .*{said}.*drop={name}$"):
        data.find_schema(table)


def test_dates_are_read_as_the_user_says(tmp_path):
    cells = [f"{1 + k % 12:02d}/{1 + k % 7:02d}/2024" for k in range(N)]
    table = read(shop_orders(tmp_path, ordered=cells))
    for day_first, pattern in [(True, "%d/%m/%Y"), (False, "%m/%d/%Y")]:
        schema = data.find_schema(table, day_first=day_first)
        assert schema[0].time == pattern
        rows = data.to_text(schema, data.encode(schema, table))
        assert [row[0] for row in rows] == cells


def test_one_mark_is_read_as_the_rest_of_the_table_or_as_the_user_says(tmp_path):
    """1,234 is a thousand and more, or one and some."""
    draw = rng(3)
    whole = [f"{v:,}" for v in draw.integers(1000, 10**5, N)]
    dots = [c.replace(",", ".") for c in whole]
    real = [f"{v:.2f}" for v in draw.normal(9, 1, N)]
    comma, text = [c.replace(".", ",") for c in real], ["up", "down", "up"] * (N // 3)

    def value(delimiter, columns, **options):
        table = data.read_table(write(tmp_path / "t.csv", columns, delimiter=delimiter))
        schema = data.find_schema(table, **options)
        x = data.encode(schema, table)
        assert data.to_text(schema, x) == [list(row) for row in zip(*table.cells, strict=True)]
        return x[0, 0] / float(whole[0].replace(",", ""))

    assert value(",", {"a": whole, "b": real}) == 1
    assert value(";", {"a": whole, "b": real}) == 1
    assert value(";", {"a": whole, "b": comma}) == 1e-3
    assert value(";", {"a": dots, "b": comma}) == 1
    assert value(",", {"a": dots, "b": real}) == 1e-3
    assert value("\t", {"a": whole, "b": text}, decimal=",") == 1e-3
    with pytest.raises(ValueError, match=r"which may be \d+\.\d+ or \d+: say decimal=','"):
        value("\t", {"a": whole, "b": text})


@pytest.mark.parametrize(
    ("form", "pattern", "step"),
    [
        ("%Y-%m-%d", "%Y-%m-%d", 1),
        ("%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M", 60),
        ("%Y-%m-%dT%H:%M:%S+02:00", "%Y-%m-%dT%H:%M:%S+02:00", 1),
        ("%Y-%m-%d %H:%M:%S.%f", "%Y-%m-%d %H:%M:%S", 1e-6),
        ("%Y%m%d", "%Y%m%d", 1),
        ("%m/%d/%y %I:%M %p", "%m/%d/%y %I:%M %p", 60),
        ("%d-%m-%Y", "%d-%m-%Y", 1),
        ("%H:%M:%S", "%H:%M:%S", 1),
        ("%I:%M%p", "%I:%M%p", 60),
    ],
)
def test_dates_and_times_in_other_forms(tmp_path, form, pattern, step):
    """Against Python's own reading of the same text."""
    unit = 86_400 if "H" not in form and "I" not in form else 1
    span = 10**15 if "Y" in form or "y" in form else 10**11
    micro = rng(0).integers(0, span, N)
    moments = [
        datetime.datetime(2000, 1, 1) + datetime.timedelta(microseconds=int(m)) for m in micro
    ]
    cells = [moment.strftime(form) for moment in moments]
    schema = data.find_schema(read(ratings(tmp_path, date=cells)))
    assert schema[3].time == pattern
    np.testing.assert_allclose(schema[3].step, step)
    table = read(tmp_path / "ratings.tsv")
    x = data.encode(schema, table)
    epoch = datetime.datetime(1970 if span == 10**15 else 1900, 1, 1)
    shift = 7200 if "+02:00" in form else 0
    values = [(datetime.datetime.strptime(c, form) - epoch).total_seconds() - shift for c in cells]
    np.testing.assert_array_equal(x[:, 3], np.array(values) / unit)
    assert [row[3] for row in data.to_text(schema, x)] == cells
    np.testing.assert_array_equal(data.decode(schema, x), x)
    if form == "%Y%m%d":  # as pandas reads it from a file: whole numbers, some of them missing
        for whole in (pd.Series(cells).astype(int), pd.Series([None, *cells[1:]]).astype(float)):
            frame = pd.DataFrame({"date": whole, "y": rng(0).normal(size=N)})
            table = data.read_table(frame)
            days = data.find_schema(table)
            assert days[0].time == pattern
            pd.testing.assert_frame_equal(data.to_frame(days, data.encode(days, table)), frame)


@pytest.mark.parametrize("decimals", [0, 1, 2, 3])
def test_every_way_to_write_a_number_comes_back(decimals):
    styles = [(".", ""), (",", ""), (".", ","), (",", "."), (",", " "), (".", "'"), (",", "\u202f")]
    signs = [
        ("{}", "-{}"),
        ("+{}", "-{}"),
        ("{} €", "-{} €"),
        ("€{}", "€-{}"),
        ("{}%", "-{}%"),
        ("${}", "-${}"),
        ("{}", "({})"),
        ("{}", "{}-"),
        ("CHF {}", "CHF -{}"),
        ("{}", "\u2212{}"),
    ]
    draw = rng(decimals)
    v = np.append(np.round(draw.uniform(0.5, 900, 28), decimals), [1e6, 12345, 1.0, 0.0])
    v *= np.append(draw.choice([-1, 1], 30), [1, 1])
    for point, mark in styles:

        def write(v, template="{}", digits=decimals, point=point, mark=mark):
            text = f"{abs(v):,.{digits}f}".translate({44: mark, 46: point})
            return template.replace("{}", text)

        columns = {
            f"{up}, {down}": [
                write(x, down if x < 0 else up if x else up.replace("+", "")) for x in v
            ]
            for up, down in signs
        }
        other = {"other": [write(x, digits=4) for x in draw.random(len(v))]}
        for name, cells in columns.items():
            table = data.read_table(pd.DataFrame({name: cells} | other))
            schema = data.find_schema(table)
            x = data.encode(schema, table)
            np.testing.assert_array_equal(x[:, 0], v, err_msg=f"{name} {point} {mark}")
            assert [row[0] for row in data.to_text(schema, x)] == cells


def test_times_of_several_zones_are_compared_in_utc(tmp_path):
    cells = [f"2024-03-{1 + k % 28:02d}T12:00:00+0{1 + k % 2}:00" for k in range(N)]
    table = read(sensor_log(tmp_path, timestamp=cells))
    with pytest.warns(UserWarning, match=r"'timestamp' has times of 2 zones.*in '\+01:00'"):
        schema = data.find_schema(table)
    x = data.encode(schema, table)[:, 0]
    assert x.tolist() == [datetime.datetime.fromisoformat(c).timestamp() for c in cells]
    assert data.to_text(schema[:1], x[1:2, None]) == [["2024-03-02T11:00:00+01:00"]]


def test_decoded_times_are_times_wherever_a_model_puts_them(tmp_path):
    table = read(shop_orders(tmp_path))
    schema = data.find_schema(table)
    x = data.encode(schema, table)[:4]
    x[:, 0] += [-30_000.3, 30_000.2, 0.9, -1e7]
    x[:, 1] += [86_400.0, -86_400.0, 59.0, 0]
    text = data.to_text(schema, data.decode(schema, x))
    assert [row[1] for row in text] == table.cells[1][:4].tolist()
    assert text[2][0] == table.cells[0][2] and len(text[0][0]) == 10
    assert len(data.to_frame(schema, data.decode(schema, x))) == 4


def test_a_ragged_sheet_is_refused(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    for rows, said in [
        ([["Report"], ["a", "b"], [1, 2], [3, 4]], r"row 2 has 2 cells, row 1 has 1;.*above"),
        ([["a", "b"], [1, 2], [3, 4, 5]], "row 3 has 3 cells, row 1 has 2"),
        ([], "the table is empty"),
        ([["a", "b"]], "no rows below its header"),
    ]:
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)
        book.save(tmp_path / "t.xlsx")
        with pytest.raises(ValueError, match=rf"t\.xlsx: .*{said}"):
            data.read_table(tmp_path / "t.xlsx")
    book = openpyxl.Workbook()
    for row in [["a", "b"], [1, "x"], [None, None], [3], [5, "NA"]]:
        book.active.append(row)
    book.create_sheet("notes")
    book.save(tmp_path / "t.xlsx")
    with pytest.warns(UserWarning, match="has 2 sheets; the first one, 'Sheet', is read"):
        table = data.read_table(tmp_path / "t.xlsx")
    assert table.lines.tolist() == [2, 4, 5] and table.cells[1].tolist() == ["x", "", "NA"]
    (tmp_path / "t.xlsx").write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(ValueError, match="not an Excel file that can be read"):
        data.read_table(tmp_path / "t.xlsx")


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "t.xlsx").write_bytes(b"PK\x03\x04")
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    for name, package in [("t.xlsx", "openpyxl"), ("t.parquet", "pyarrow")]:
        with pytest.raises(ImportError, match=rf"{name}.*{package}.*jflow-models\[tables\]"):
            data.read_table(tmp_path / name)
