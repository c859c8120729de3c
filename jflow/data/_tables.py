"""Delimited tables: read as text, so that a column can be written back the way it came."""

import csv
import gzip
import zlib
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jflow._core.files import expand

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "-nan", "#n/a"})
DELIMITERS = ("\t", ";", ",", None)  # None: runs of blanks


class Table(NamedTuple):
    """A delimited table as columns of text.

    Attributes:
        names: Of the columns.
        cells: `cells[j][i]` is row i of column j.
        lines: `lines[i]` is the line of the file that row i stands on, from 1.
        header: Whether the file has a line of names.
        path: Of the file.
    """

    names: tuple[str, ...]
    cells: tuple[np.ndarray, ...]
    lines: np.ndarray
    header: bool
    path: str

    @property
    def rows(self) -> int:
        return len(self.lines)


def numbers(cells: np.ndarray) -> np.ndarray:
    """Text [n] to float64 [n]; what is missing or is not a number becomes NaN."""
    return np.array([float(cell) if _is_number(cell) else np.nan for cell in cells], np.float64)


def is_kept(cell: str) -> bool:
    """Whether float64 holds a finite number digit for digit: it gives `cell` when written with as
    many digits.

    True of every decimal of 15 significant digits within float64's range, of what float64 itself
    was written as, and of whole numbers up to 2^53; false of most numbers of more digits.
    """
    if (len(cell) <= 15 and "e" not in cell.lower()) or repr(
        float(cell)
    ) == cell:  # at once; the rest is slow
        return True
    exact = Decimal(cell)
    digits = Context(prec=max(len(exact.as_tuple().digits), 1), Emax=MAX_EMAX, Emin=MIN_EMIN)
    return digits.create_decimal(Decimal(float(cell))) == exact


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return (
        "_" not in cell and cell.isascii()
    )  # Python reads 1_000 and other scripts' digits as numbers, tables do not


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not a text table in UTF-8 ({error.reason} at byte {error.start})"
        ) from error


def _records(
    text: str, delimiter: str | None, *, strict: bool = False
) -> list[tuple[int, list[str]]]:
    """(line number, fields) of every line that is not blank or, at the top, a comment starting with
    #.

    strict: a quote that is never closed is a csv.Error, where it would else swallow the rows that
    follow it.
    """
    lines = text.split("\n")
    skip = 0
    while skip < len(lines) and (not lines[skip].strip() or lines[skip].lstrip().startswith("#")):
        skip += 1
    if delimiter is None:
        parsed = ((i, line.split()) for i, line in enumerate(lines[skip:], skip + 1))
    else:
        ended = (
            line + "\n" for line in lines[skip:]
        )  # a line that ends inside quotes keeps its end
        reader = csv.reader(ended, delimiter=delimiter, skipinitialspace=True, strict=strict)
        parsed = (
            (reader.line_num + skip, [field.strip() for field in fields]) for fields in reader
        )
    # A line of delimiters alone is a row whose cells are all missing, not a blank line.
    return [(i, fields) for i, fields in parsed if len(fields) > 1 or any(fields)]


def _delimiter(text: str) -> str | None:
    """The first of tab ; , blanks that cuts the leading lines into one number, above one, of
    fields."""
    head = "\n".join(text.split("\n")[:50])
    for delimiter in DELIMITERS:
        widths = {len(fields) for _, fields in _records(head, delimiter)}
        if len(widths) == 1 and widths != {1}:
            return delimiter
    # No clean cut: take what the first line holds, and let the ragged line be named.
    first = next((line for line in head.split("\n") if line.strip()), "")
    return next((d for d in DELIMITERS[:3] if d in first), ",")


def _has_header(records: list[tuple[int, list[str]]]) -> bool:
    """Whether the first record names columns: no number in it, and it does not fit the columns
    below.

    It does not fit where a column is mostly numbers below; where all is text, where no name recurs
    in its column.
    """
    first, body = records[0][1], [fields for _, fields in records[1:1001]]
    if any(_is_number(cell) for cell in first):
        return False
    if not body:
        return True
    numeric = [
        sum(_is_number(fields[j]) for fields in body) * 2 > len(body) for j in range(len(first))
    ]
    return any(numeric) or not any(
        first[j] in {fields[j] for fields in body} for j in range(len(first))
    )


def read_table(
    path: str | Path,
    *,
    header: bool | None = None,
    columns: tuple[str, ...] | None = None,
    drop: tuple[str, ...] = (),
) -> Table:
    """Reads a csv, tsv, semicolon- or blank-separated table, plain or gzipped, in UTF-8.

    The delimiter is found in the leading lines. Blank lines, and lines above the table that start
    with #, are passed over.

    Args:
        path: Of the file.
        header: Whether the first line is names; None looks. Without one the columns are called
            'column 1', 'column 2', ...
        columns: Names of the columns to keep, in this order; None keeps all.
        drop: Names of columns to leave out.

    Returns:
        The table, as text.

    Raises:
        ValueError: For an empty table, for one row, for lines of unequal length and for names that
            are not there, naming the file and the line.
    """
    path = expand(path)
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder, not a table")
    if not path.exists():
        raise FileNotFoundError(f"there is no such file: {path}")
    text = _read_text(path)
    try:
        records = _records(text, _delimiter(text), strict=True)
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from error
    if not records:
        raise ValueError(f"{path}: the table is empty")
    width = len(records[0][1])
    for line, fields in records:
        if len(fields) != width:
            raise ValueError(
                f"{path}: line {line} has {len(fields)} fields, line {records[0][0]} has {width}"
            )
    header = _has_header(records) if header is None else header
    names = tuple(records[0][1]) if header else tuple(f"column {j + 1}" for j in range(width))
    body = records[1:] if header else records
    if len(body) < 2:
        found = "no rows below its header" if not body else "one row"
        raise ValueError(f"{path}: the table has {found}; a density needs at least two")
    for name in (*(columns or ()), *drop):
        if name not in names:
            raise ValueError(
                f"{path} has no column {name!r}; the table has {', '.join(map(repr, names))}"
            )
        if names.count(name) > 1 or (columns or ()).count(name) > 1:
            raise ValueError(
                f"{path}: {name!r} does not name one column: it is there, or asked for, more than"
                " once"
            )
    keep = [names.index(name) for name in columns] if columns is not None else range(width)
    keep = [j for j in keep if names[j] not in drop]
    if not keep:
        raise ValueError(f"{path}: no columns are left")
    lines = np.array([line for line, _ in body])
    cells = [np.array([fields[j] for _, fields in body], dtype=object) for j in keep]
    return Table(tuple(names[j] for j in keep), tuple(cells), lines, header, str(path))


def take_rows(table: Table, index: np.ndarray) -> Table:
    """Some rows of a table.

    Args:
        table: From `read_table`.
        index: Integers or a mask.

    Returns:
        A table of the rows at index.
    """
    return table._replace(
        cells=tuple(cells[index] for cells in table.cells), lines=table.lines[index]
    )
