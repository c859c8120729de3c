"""What the columns of a table are, and their way to real numbers and back.

Three kinds. 'continuous': a number of full precision. 'lattice': numbers origin + k step, such as
integers, measurements in steps of 0.01, dates or times. 'categorical': text, coded 0, 1, 2, ...
from the most frequent category down. A missing number is NaN, a missing text a category.

A flow that narrows its spikes on a lattice gains log-likelihood without bound. So a lattice value v
becomes v + step u and a code k becomes k + u, with u uniform on [0, 1): each cell holds the mass of
its value, P(v) = integral of the density over [v, v + step), and log P(v) >= E_u log(step density(v
+ step u)). Averaging several draws of u in probability tightens the bound.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jflow._core.hints import hint
from jflow.data._tables import MISSING, MISSING_TEXT, Table, is_kept, numbers
from jflow.data._writing import (
    DAY,
    PLAIN,
    SECOND,
    Style,
    affix,
    dress,
    fits,
    is_clocked,
    is_dated,
    is_monthly,
    is_negative,
    plain,
    read_moment,
    split_number,
    write_moments,
)


class Column(NamedTuple):
    """One column of a table: what kind of number it holds, and how it is written.

    JSON by `_asdict`, back by `Column(**d)`.

    Attributes:
        name: Of the column.
        kind: 'continuous', 'lattice' or 'categorical'.
        step: The width of a cell, 0 where continuous, 1 for codes.
        origin: A point of the lattice.
        decimals: Digits after the point that the table writes at most; None: `digits` significant
            ones. Of times, digits of a fraction of a second.
        padding: Digits after the point that the table writes at least.
        digits: Significant digits, 0 for as many as float64 needs to be read back.
        low: The least value in the table.
        high: The largest value in the table.
        categories: The text of each code.
        width: Characters before the point to which the table fills up with zeros.
        missing: What the table writes where a value is missing; None where none is. Of text, one of
            the categories.
        point: The mark before the decimals.
        thousands: The mark between thousands, or ''.
        positive: How a positive number is written, with {} for its digits: '{}', '+{}', '{} %'.
        negative: How a negative number is written: '-{}', '({})', '-{} €'.
        time: How a date or a time is written, in strftime's codes ('%-d' without a leading zero,
            '%^b' in capitals, the zone written out), such as '%d.%m.%Y'; '' where the column holds
            numbers. Dates count days since 1970-01-01, dates with a time of day seconds since then
            (in UTC where there is a zone), times of day seconds since midnight, months without a
            day months since 1970-01.
        dtype: The type of the column of a DataFrame or an array, as pandas names it; '' for a file.
        levels: The categories of pandas' type 'category', in its order; None for other types.
        ordered: Whether pandas orders these categories.
        exponent: 'e' or 'E' where every number has an exponent, with `padding` digits after the
            point; else ''.
    """

    name: str
    kind: str
    step: float = 0.0
    origin: float = 0.0
    decimals: int | None = None
    padding: int = 0
    digits: int = 0
    low: float = 0.0
    high: float = 0.0
    categories: tuple[str, ...] = ()
    width: int = 0
    missing: str | None = None
    point: str = "."
    thousands: str = ""
    positive: str = "{}"
    negative: str = "-{}"
    time: str = ""
    dtype: str = ""
    levels: tuple | None = None
    ordered: bool = False
    exponent: str = ""

    @property
    def is_mass(self) -> bool:
        """Whether its probabilities count as mass: categories and whole numbers. Else as density
        per unit."""
        return self.kind == "categorical" or (self.kind == "lattice" and self.decimals == 0)


class Texts(NamedTuple):
    """The distinct texts of a column, which of them each row holds [n], and how many rows hold
    each."""

    texts: list[str]
    of_row: np.ndarray
    counts: np.ndarray


def distinct(cells: np.ndarray) -> Texts:
    rows = cells.tolist()
    codes = {text: k for k, text in enumerate(dict.fromkeys(rows))}
    index = np.fromiter((codes[text] for text in rows), np.int64, len(rows))
    return Texts(list(codes), index, np.bincount(index, minlength=len(codes)))


def number_texts(x: np.ndarray) -> np.ndarray:
    """Numbers [n] as cells of text, whole ones without a point if all are; '' for NaN."""
    known = x[~np.isnan(x)]
    whole = bool((known == np.rint(known)).all())
    write: Callable[[float], str] = "{:.0f}".format if whole else repr
    return np.array(["" if v != v else write(v) for v in x.tolist()], object)


def microseconds(cells: np.ndarray) -> np.ndarray:
    """datetime64 or timedelta64 as whole microseconds [n]; 0 where missing."""
    missing = np.isnat(cells)
    kind = cells.dtype.kind
    coarse = cells.astype(f"{kind}8[us]")
    if (coarse.astype(cells.dtype) != cells)[~missing].any():
        raise ValueError(
            "holds times finer than a microsecond, which float64 does not hold: round them"
        )
    return np.where(missing, 0, coarse.astype(np.int64))


def _where(table: Table, j: int, i: int) -> str:
    row = "row" if table.dtypes else "line"
    return f"{table.path}: {row} {table.lines[i]}, column {table.names[j] or j + 1!r}"


def _columns_of(schema: tuple[Column, ...], table: Table) -> list[int]:
    """Where the columns of a schema stand in a table: by name, or by place where the table has no
    names."""
    absent = [column.name for column in schema if column.name not in table.names]
    if not absent:
        return [table.names.index(column.name) for column in schema]
    if not table.header and len(schema) == len(table.cells):
        return list(range(len(schema)))
    if not table.header:
        raise ValueError(
            f"{table.path}: expected the {len(schema)} columns of the schema, got"
            f" {len(table.cells)}"
        )
    raise ValueError(
        f"{table.path} has no column {absent[0]!r}: {hint(absent[0], table.names)}the table has"
        f" {', '.join(map(repr, table.names))}"
    )


def encode(schema: tuple[Column, ...], table: Table, *, allow_unknown: bool = False) -> np.ndarray:
    """A table as numbers: numbers as they are, categories as their codes.

    Dates become days and times seconds, see `Column`.

    Args:
        schema: From `find_schema`.
        table: This table or another one that has its columns, in any order.
        allow_unknown: Whether a cell that the columns cannot hold becomes NaN, instead of an error.

    Returns:
        float64 [n, columns], numbers snapped to their lattice, NaN where a number is missing.

    Raises:
        ValueError: For a column that is not there; for a cell that is no finite number, is off the
            lattice, is an unknown category, is missing where the column has no missing values, or
            has more digits than float64 holds, naming line and column.

    Examples:
        >>> import pandas as pd
        >>> from jflow import data
        >>> frame = pd.DataFrame({"day": ["02.01.1970", "04.01.1970"], "color": ["red", None]})
        >>> table = data.read_table(frame)
        >>> schema = data.find_schema(table)
        >>> data.encode(schema, table).tolist()
        [[1.0, 0.0], [3.0, 1.0]]
    """
    places = _columns_of(schema, table)
    columns = zip(schema, places, strict=True)
    return np.stack([_encoded(column, table, j, allow_unknown) for column, j in columns], 1)


def _encoded(column: Column, table: Table, j: int, allow_unknown: bool) -> np.ndarray:
    """One column of a table as numbers [n]."""
    cells = table.cells[j]
    if column.time and cells.dtype.kind not in "OmM":
        cells = number_texts(cells)  # such as 20241231

    def refuse(bad: np.ndarray, what: str) -> None:
        if bad.any() and not allow_unknown:
            i = int(np.argmax(bad))
            more = f" ({bad.sum()} such cells in this column)" if bad.sum() > 1 else ""
            cell = repr(cells[i]) if isinstance(cells[i], str) else str(cells[i])
            raise ValueError(f"{_where(table, j, i)}: {cell} {what}{more}")

    if column.kind == "categorical":
        x = _codes(column, cells)
        refuse(np.isnan(x), "is none of the column's categories")
        return x
    if cells.dtype.kind == "O":
        found = distinct(cells)
        absent = np.array([text.lower() in MISSING for text in found.texts], bool)
        worth = [
            np.nan if m else _worth(column, text)
            for m, text in zip(absent, found.texts, strict=True)
        ]
        for reason in dict.fromkeys(w for w in worth if isinstance(w, str)):
            refuse(np.array([w == reason for w in worth], bool)[found.of_row], reason)
        worth = [np.nan if isinstance(w, str) else w for w in worth]
        x, missing = np.array(worth, np.float64)[found.of_row], absent[found.of_row]
    elif cells.dtype.kind in "mM":
        if (cells.dtype.kind == "M") != bool(column.time):
            raise ValueError(
                f"{table.path}: column {column.name!r} holds {cells.dtype}; expected"
                f" {'dates or times' if column.time else 'numbers'}"
            )
        missing = np.isnat(cells)
        if is_monthly(column.time):
            cells = cells.astype("datetime64[M]").astype(np.int64).astype("datetime64[D]")
        unit = DAY * SECOND if column.time and not is_clocked(column.time) else SECOND
        x = np.where(missing, np.nan, microseconds(cells) / unit)
    else:
        x, missing = cells, np.isnan(cells)
    if column.missing is None:
        refuse(missing, "is missing, and the column of the schema has no missing values")
    refuse(np.isinf(x), "is no finite number")
    if column.kind == "lattice":
        k = (x - column.origin) / column.step
        off = np.abs(k - np.rint(k)) > np.maximum(0.02, _rounding(column, x))
        refuse(off, f"is not on the column's steps of {column.step:g}")
        x = np.where(off, np.nan, _at(column, np.rint(k)))
    return np.where(np.isinf(x), np.nan, x)


def _worth(column: Column, text: str) -> float | str:
    """What a text is worth in a column of numbers or times; or what is wrong with it."""
    if column.time:
        read = read_moment(column.time, text)
        unit = SECOND if is_clocked(column.time) else DAY * SECOND
        return read if isinstance(read, str) else read / unit
    part, style = split_number(text), Style(column.point, column.thousands)
    if part is None or not fits(style, part.core):
        return "is no number written like the column's"
    if affix(part.template) not in ("", affix(column.positive)):
        return "is written in another unit than the column"
    digits = plain(style, part.core)
    if not is_kept(digits):
        return "has more digits than float64 holds: round it"
    return -float(digits) if is_negative(part.template) else float(digits)


def _rounding(column: Column, x: np.ndarray) -> np.ndarray:
    """By how much of a cell float64 may have moved numbers [n], a quarter at most: microseconds
    since 1970 are the extreme."""
    return np.minimum(np.spacing(np.abs(x)) / column.step, 0.25)


def _at(column: Column, k: np.ndarray) -> np.ndarray:
    """The points k of a column's lattice, in the float64 nearest to their decimals."""
    v = column.origin + column.step * k
    return v if column.decimals is None else np.round(v, column.decimals)


def _codes(column: Column, cells: np.ndarray) -> np.ndarray:
    """The code of each cell [n], by its text or else by its number (1.50 where the category is
    1.5); NaN for others."""
    values = numbers(np.array(column.categories, object))
    by_number = dict(zip(values.tolist(), range(len(values)), strict=True))
    missing = np.nan if column.missing is None else float(column.categories.index(column.missing))
    if cells.dtype.kind in "mM":
        return np.full(len(cells), np.nan)
    if cells.dtype.kind != "O":
        return np.array(
            [missing if v != v else by_number.get(v, np.nan) for v in cells.tolist()], np.float64
        )
    found = distinct(cells)
    by_text = {text: k for k, text in enumerate(column.categories)}
    by_case: dict[str, list[int]] = {}
    for text, k in by_text.items():
        by_case.setdefault(text.lower(), []).append(k)

    def code(text: str) -> float:
        if text in by_text:
            return by_text[text]
        if text.lower() in MISSING_TEXT:
            return missing
        value = numbers(np.array([text], object))[0]
        if text[:1] != "0" or not text.isdigit() or text == "0":
            k = by_number.get(value)
            if k is not None and not re.match(r"0\d", column.categories[k]):
                return k
        same = by_case.get(text.lower(), [])
        return same[0] if len(same) == 1 else np.nan  # True where the category is true

    return np.array([code(text) for text in found.texts], np.float64)[found.of_row]


def steps(schema: tuple[Column, ...]) -> np.ndarray:
    """Widths of the cells of encoded columns.

    Args:
        schema: From `find_schema`.

    Returns:
        float64 [columns], 0 where continuous.
    """
    return np.array([column.step for column in schema])


def add_noise(schema: tuple[Column, ...], x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Encoded rows spread uniformly over their cells: x + step u.

    Args:
        schema: From `find_schema`.
        x: Encoded rows, [n, columns].
        rng: A numpy generator, which draws u in [0, 1).

    Returns:
        [n, columns]; continuous columns stay.
    """
    return x + steps(schema) * rng.random(x.shape)


def log_mass_unit(schema: tuple[Column, ...]) -> float:
    """What a log-density gains when whole numbers and categories count as mass.

    Args:
        schema: From `find_schema`.

    Returns:
        Nats to add to a log-density per unit of the encoded columns.
    """
    return float(sum(np.log(column.step) for column in schema if column.is_mass))


def decode(schema: tuple[Column, ...], x: np.ndarray) -> np.ndarray:
    """Dequantized rows back to encoded ones.

    Nothing is clipped to the range of the table, which would heap up rows at its ends; a model that
    must stay in a range is a matter of its base or its last map.

    Args:
        schema: From `find_schema`.
        x: [n, columns].

    Returns:
        [n, columns], floored to the lattice; codes of categories that are none become the nearest
        one, and times of day wrap around midnight. NaN stays NaN.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> schema = (data.Column("n", "lattice", step=0.5, decimals=1, low=0.0, high=3.0),)
        >>> data.decode(schema, np.array([[1.7], [-0.2], [np.nan]])).tolist()
        [[1.5], [-0.5], [nan]]
    """
    columns = []
    for j, column in enumerate(schema):
        v = np.asarray(x[:, j], np.float64)
        if column.step:
            # The lattice's own points, which rounding may have lowered, stay where they are.
            slack = np.maximum(1e-6, _rounding(column, v))
            v = _at(column, np.floor((v - column.origin) / column.step + slack))
        if column.kind == "categorical":
            v = np.clip(v, 0, len(column.categories) - 1)
        elif column.time and not is_dated(column.time):
            v = v % DAY
        columns.append(v)
    return np.stack(columns, 1)


def plain_texts(column: Column, x: np.ndarray) -> list[str]:
    """Numbers [n] as Python writes them, with the column's digits."""
    sign = "+" if "+" in column.positive else ""
    if column.exponent:
        return [f"{v:{sign}.{column.padding}{column.exponent}}" for v in x.tolist()]
    if column.decimals is None:
        form = f".{column.digits}g"
        texts = [f"{v:{form}}" for v in x.tolist()] if column.digits else map(repr, x.tolist())
        return [sign + t if sign and v > 0 else t for t, v in zip(texts, x.tolist(), strict=True)]
    form, keep, width = f".{max(column.decimals, column.padding)}f", column.padding, column.width

    def write(v: float) -> str:
        whole, _, rest = f"{v:{form}}".partition(".")
        rest = rest[:keep] + rest[keep:].rstrip("0")
        if whole[0] == "-" and not (whole + rest).strip("-0"):
            whole = whole[1:]
        if sign and v > 0:
            whole = sign + whole
        whole = whole.zfill(width) if width else whole
        return f"{whole}.{rest}" if rest else whole

    return [write(v) for v in x.tolist()]


def write_column(column: Column, x: np.ndarray) -> list[str]:
    """Encoded numbers [n] of one column as the table writes them."""
    missing = np.isnan(x)
    if missing.any():
        good = iter(write_column(column, x[~missing]))
        return [column.missing or "" if m else next(good) for m in missing]
    if column.kind == "categorical":
        return [column.categories[k] for k in x.astype(int).tolist()]
    if column.time:
        unit = SECOND if is_clocked(column.time) else DAY * SECOND
        micro = np.rint(x * unit).astype(np.int64)
        return write_moments(column.time, micro, column.decimals or 0, column.padding, column.point)
    texts, style = plain_texts(column, x), Style(column.point, column.thousands)
    if style == PLAIN and column.positive in ("{}", "+{}") and column.negative == "-{}":
        return texts
    return [dress(text, style, column.positive, column.negative) for text in texts]


def to_text(schema: tuple[Column, ...], x: np.ndarray) -> list[list[str]]:
    """Encoded rows as cells of text, written as the table writes them.

    Args:
        schema: From `find_schema`.
        x: Encoded rows, [n, columns].

    Returns:
        n rows of cells.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> euro = {"decimals": 2, "padding": 2, "point": ",", "positive": "{} €"}
        >>> schema = (data.Column("price", "lattice", step=0.01, **euro),)
        >>> data.to_text(schema, np.array([[1.5], [20.0]]))
        [['1,50 €'], ['20,00 €']]
    """
    columns = [
        write_column(column, np.asarray(x[:, j], np.float64)) for j, column in enumerate(schema)
    ]
    return [list(row) for row in zip(*columns, strict=True)]
