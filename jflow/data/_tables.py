"""Tables: delimited text, spreadsheets, parquet, DataFrames and arrays, as columns of cells.

Text stays text, so that a column can be written back the way it came; the numbers and times of a
DataFrame stay what they are, so that nothing is rounded."""

import csv
import gzip
import io
import re
import warnings
import zipfile
import zlib
from collections import Counter
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jflow._core.files import expand
from jflow.data._writing import split_moment, split_number

if TYPE_CHECKING:
    import pandas as pd

# How tables write that a value is missing, in lower case. In a column of text the second set is a
# text like any other: "none" answers "how many garages?", and "-" is a grade.
MISSING_TEXT = frozenset(
    ("", "na", "n/a", "nan", "-nan", "null", "<na>", "nat", "#n/a", "#na", "#nv", "n.a.", "?")
)
MISSING = MISSING_TEXT | {
    "none",
    "-",
    "--",
    "\u2013",
    ".",
    "k.a.",
    "k. a.",
    "keine angabe",
    "missing",
}
DELIMITERS = ("\t", ";", ",", "|", None)  # None: runs of blanks


class Table(NamedTuple):
    """A table as columns of cells.

    Attributes:
        names: Of the columns.
        cells: `cells[j][i]` is row i of column j: text (an array of objects), or the numbers or
            times of a DataFrame (float64 with NaN, datetime64 or timedelta64 with NaT).
        lines: `lines[i]` is the line of the file that row i stands on, from 1; the position of a
            row in a DataFrame or an array, from 0.
        header: Whether the table has names of its own.
        path: Of the file, or what the table is.
        delimiter: Of a text file; None for runs of blanks, '' for other tables.
        dtypes: Types of the columns of a DataFrame or an array; None where the cells are those of a
            file.
    """

    names: tuple[str, ...]
    cells: tuple[np.ndarray, ...]
    lines: np.ndarray
    header: bool
    path: str
    delimiter: str | None = ""
    dtypes: tuple[Any, ...] = ()

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


_BOMS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


def _decoded(path: Path, raw: bytes) -> str:
    """The text of a file in UTF-8, in UTF-16 or -32, or, with a warning, in Windows' or ISO's
    Latin letters."""
    encoding = next((name for bom, name in _BOMS if raw.startswith(bom)), None)
    if encoding is None and b"\0" in raw[:1000]:
        zeros = [raw[:1000][i::2].count(0) for i in (0, 1)]
        if max(zeros) < min(len(raw), 1000) / 8 or min(zeros) > max(zeros) / 4:
            raise ValueError(f"{path} is not a text table: it holds bytes of zero")
        encoding = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    try:
        return raw.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        if encoding:
            raise ValueError(
                f"{path} is not a text table in {encoding.upper()}, as which it begins"
                f" ({error.reason} at byte {error.start})"
            ) from error
        bad = raw.count(b"\n", 0, error.start) + 1
    for i, line in enumerate(raw.split(b"\n"), 1):  # letters of two encodings in one file
        if not line.isascii() and _is_utf8(line):
            raise ValueError(
                f"{path} mixes two encodings: line {i} is UTF-8 and line {bad} is not; save it anew"
                " in UTF-8"
            )
    try:
        text, name = raw.decode("cp1252"), "Windows-1252"
    except UnicodeDecodeError:
        text, name = raw.decode("latin-1"), "ISO-8859-1"
    warnings.warn(
        f"{path} is not in UTF-8 (line {bad}); it is read as {name}. If letters come out wrong,"
        " save it in UTF-8",
        stacklevel=5,
    )
    return text


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _unzipped(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error})") from error


def _is_value(cell: str) -> bool:
    """Whether a cell is a number, a date or a time, and so no name of a column."""
    return _is_number(cell) or split_number(cell) is not None or split_moment(cell) is not None


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
    """The first of tab ; , | blanks that cuts all leading lines into one number, above one, of
    fields; else the mark that cuts most of them so, and the ragged line will be named."""
    head = "\n".join(text.split("\n")[:50])
    best, most = None, 0
    for delimiter in DELIMITERS:
        widths = Counter(len(fields) for _, fields in _records(head, delimiter))
        width, lines = widths.most_common(1)[0] if widths else (1, 0)
        if width > 1 and lines == widths.total():
            return delimiter
        if width > 1 and delimiter and lines > max(most, widths.total() // 2):
            best, most = delimiter, lines
    first = next((line for line in head.split("\n") if line.strip()), "")
    return best or next((d for d in DELIMITERS[:-1] if d and d in first), ",")


def _has_header(records: list[tuple[int, list[str]]]) -> bool:
    """Whether the first record names columns, since it does not fit the columns below.

    It does not fit where a column is mostly numbers below; where all is text, where no name recurs
    in its column. Whole numbers in equal steps, such as years, are names too where the numbers
    below them are of another kind, beside text that does not fit or in a count of the columns.
    """
    first, body = records[0][1], [fields for _, fields in records[1:1001]]
    below = [[fields[j] for fields in body] for j in range(len(first))]
    counts = [j for j, cell in enumerate(first) if _is_value(cell)]
    words = [j for j in range(len(first)) if j not in counts]
    if counts and not _in_steps([first[j] for j in counts]):
        return False
    if not body:
        return not counts
    numeric = {j for j in words if sum(map(_is_value, below[j])) * 2 > len(body)}
    if not counts:
        return bool(numeric) or not any(first[j] in below[j] for j in words)
    years = all(map(_is_year, (first[j] for j in counts)))
    alike = sum(
        cell.isdecimal() and (not years or _is_year(cell)) for j in counts for cell in below[j]
    )
    if 2 * alike >= len(counts) * len(body):
        return False
    names = [j for j in words if first[j].lower() not in MISSING]
    if names:
        return any(j in numeric or first[j] not in below[j] for j in names)
    count = not any(first[j] for j in words) and int(first[counts[0]]) in (0, 1)
    return count and len(first) > 2  # as pandas names columns


def _is_year(cell: str) -> bool:
    return cell.isdecimal() and 1900 <= int(cell) <= 2100


def _in_steps(cells: list[str]) -> bool:
    """Whether cells are whole numbers that rise in equal steps, or one year."""
    if not all(cell.isdecimal() for cell in cells):
        return False
    steps = set(np.diff([int(cell) for cell in cells]).tolist())
    return min(steps) > 0 and len(steps) == 1 if steps else _is_year(cells[0])


def _finds_header(path: Path, records: list[tuple[int, list[str]]]) -> bool:
    """`_has_header`, with a warning where a first row of text and numbers may be names after
    all."""
    found, first = _has_header(records), records[0][1]
    if found or not any(map(_is_value, first)):
        return found
    for j, cell in enumerate(first):
        below = [fields[j] for _, fields in records[1:1001]]
        few = 2 * len(set(below)) <= len(below)
        if few and cell not in below and not _is_value(cell) and cell.lower() not in MISSING:
            warnings.warn(
                f"{path}: the first row is read as data, since it holds numbers, though {cell!r}"
                " stands nowhere below it: header=true says that it names the columns",
                stacklevel=6,
            )
            break
    return found


# What other files begin with, and what makes a table of them.
_OTHERS = (
    (
        rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "an Excel file of the old kind (.xls): save it as .xlsx",
    ),
    (rb"\x93NUMPY", "an array of NumPy: numpy.load reads it"),
    (rb"ARROW1", "an Arrow file: pandas.read_feather reads it"),
    (rb"SQLite format 3", "a database: pandas.read_sql reads a table of it"),
    (rb"%PDF", "a PDF: copy the table into a spreadsheet"),
    (rb"\s*<(!doctype|html|\?xml)", "HTML or XML: pandas.read_html or read_xml reads it"),
    (rb"\s*(\{|\[\s*[\[{])\s*[\"\d\[\]}-]", "JSON: pandas.read_json reads it"),
)


def _refuse_other(path: Path, raw: bytes) -> None:
    for start, what in _OTHERS:
        if re.match(start, raw.removeprefix(_BOMS[0][0]), re.I):
            raise ValueError(f"{path} is {what}")


def _text_table(path: Path, raw: bytes, header: bool | None) -> Table:
    text = _decoded(path, raw).replace("\r\n", "\n").replace("\r", "\n")
    first, _, rest = text.partition("\n")
    said = re.fullmatch(r"\"?sep=(.)\"?", first.strip("\ufeff \n"))  # as Excel says it
    delimiter = said[1] if said else _delimiter(text)
    try:
        records = _records("\n" + rest if said else text, delimiter, strict=True)
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from error
    if not records:
        raise ValueError(f"{path}: the table is empty")
    _refuse_ragged(path, records)
    width = len(records[0][1])
    header = _finds_header(path, records) if header is None else header
    names = tuple(records[0][1]) if header else tuple(f"column {j + 1}" for j in range(width))
    body = records[1:] if header else records
    lines = np.array([line for line, _ in body])
    cells = tuple(np.array([fields[j] for _, fields in body], object) for j in range(width))
    return Table(names, cells, lines, header, str(path), delimiter)


def _refuse_ragged(path: Path, records: list[tuple[int, list[str]]]) -> None:
    first, width = records[0][0], len(records[0][1])
    common, lines = Counter(len(fields) for _, fields in records).most_common(1)[0]
    if common != width and 2 * lines > len(records):
        raise ValueError(
            f"{path}: line {first} has {_fields(width)}, most lines have {common}: name every"
            " column there, quote cells that hold a delimiter, and put # before what stands above"
            " the table"
        )
    for line, fields in records:
        if len(fields) != width:
            raise ValueError(
                f"{path}: line {line} has {_fields(len(fields))}, line {first} has {width}"
            )


def _fields(n: int) -> str:
    return "1 field" if n == 1 else f"{n} fields"


def _optional(what: str, path: Path):
    """pandas, where the package that it reads a kind of file with is installed."""
    import importlib.util

    if importlib.util.find_spec(what) is None:
        raise ImportError(
            f"{path}: reading it takes {what}, which is not installed: pip install"
            " 'jflow-models[tables]'"
        )
    import pandas as pd

    return pd


def _spreadsheet(path: Path, raw: bytes, header: bool | None) -> Table:
    """The first sheet of an Excel file; cells keep Excel's types."""
    pd = _optional("openpyxl", path)
    try:
        with pd.ExcelFile(io.BytesIO(raw), engine="openpyxl") as file:
            sheets = file.sheet_names
            frame = pd.read_excel(
                file, sheet_name=sheets[0], header=None, dtype=object, keep_default_na=False
            )
    except (KeyError, ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not an Excel file that can be read ({error})") from error
    if len(sheets) > 1:
        warnings.warn(
            f"{path} has {len(sheets)} sheets; the first one, {sheets[0]!r}, is read",
            stacklevel=4,
        )
    grid = frame.to_numpy(object)
    filled = np.array([[not _is_blank(v) for v in row] for row in grid], bool).reshape(grid.shape)
    lines = np.flatnonzero(filled.any(1))  # rows that hold anything
    if not len(lines):
        raise ValueError(f"{path}: the table is empty")
    widths = [int(np.flatnonzero(filled[i])[-1]) + 1 for i in lines]
    if max(widths) > widths[0]:
        wide = int(np.argmax(np.array(widths) > widths[0]))
        raise ValueError(
            f"{path}: row {lines[wide] + 1} has {widths[wide]} cells, row {lines[0] + 1} has"
            f" {widths[0]}; the first row names every column: remove what stands above, beside or"
            " below the table"
        )
    grid = grid[lines, : widths[0]]
    if header is None:
        records = [
            (0, ["" if _is_blank(v) else str(v) for v in row]) for row in grid[:1001].tolist()
        ]
        header = _finds_header(path, records) and not any(isinstance(v, bool) for v in grid[0])
    names = (
        tuple("" if _is_blank(v) else str(v).strip() for v in grid[0])
        if header
        else tuple(f"column {j + 1}" for j in range(grid.shape[1]))
    )
    grid, lines = (grid[1:], lines[1:]) if header else (grid, lines)
    cells = tuple(_cells(pd.Series(grid[:, j]))[0] for j in range(grid.shape[1]))
    return Table(names, cells, lines + 1, header, str(path))


def _is_blank(value) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _frame(frame: "pd.DataFrame", path: str, header: bool) -> Table:
    pairs = [_cells(frame.iloc[:, j]) for j in range(frame.shape[1])]
    names = tuple(
        " ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in frame.columns
    )
    cells, dtypes = zip(*pairs, strict=True) if pairs else ((), ())
    return Table(names, tuple(cells), np.arange(len(frame)), header, path, dtypes=tuple(dtypes))


def _cells(column: "pd.Series") -> tuple[np.ndarray, Any]:
    """A column of a DataFrame: its numbers or times, or else its text with '' for what is missing;
    and its type, None where Python's objects were found to be something else."""
    import pandas as pd

    dtype, types = column.dtype, pd.api.types
    if types.is_object_dtype(dtype):
        found = types.infer_dtype(column, skipna=True)
        if found in ("datetime", "datetime64", "date"):
            return _cells(pd.to_datetime(column))[0], None
        if found in ("integer", "floating", "mixed-integer-float"):
            return _cells(pd.to_numeric(column))[0], None
        if found == "boolean":
            return _cells(column.astype("boolean"))[0], None
        return _as_text(column, str), dtype if found in ("string", "empty") else None
    if isinstance(dtype, pd.CategoricalDtype) or types.is_bool_dtype(dtype):
        return _as_text(column, str), dtype
    if types.is_datetime64_any_dtype(dtype):
        zoned = getattr(column.dt, "tz", None) is not None
        naive = column.dt.tz_convert("UTC").dt.tz_localize(None) if zoned else column
        return naive.to_numpy(), dtype
    if types.is_timedelta64_dtype(dtype):
        return column.to_numpy(), dtype
    if types.is_complex_dtype(dtype):
        raise ValueError(
            f"column {column.name!r} holds complex numbers; expected real ones: give the real and"
            " the imaginary part, or the modulus and the phase, as two columns"
        )
    if types.is_numeric_dtype(dtype):
        if types.is_integer_dtype(dtype) and (column.abs() > 2**53).any():
            return _as_text(column, str), dtype  # digits that float64 would lose
        return column.to_numpy(np.float64, na_value=np.nan), dtype
    return _as_text(column, str), dtype


def _as_text(column: "pd.Series", write) -> np.ndarray:
    missing = column.isna().to_numpy(bool)
    values = column.to_numpy(object)
    return np.array(
        ["" if m else write(v).strip() for m, v in zip(missing, values, strict=True)], object
    )


def _array(array: np.ndarray) -> Table:
    import pandas as pd

    if array.dtype.names is None and array.ndim != 2:
        raise ValueError(
            f"expected an array of rows and columns, got one of shape {array.shape}"
            + ("; a single column is x[:, None]" if array.ndim == 1 else "")
        )
    frame = pd.DataFrame(array)
    if array.dtype.names is None:
        frame.columns = pd.Index([f"column {j + 1}" for j in range(array.shape[1])])
    return _frame(frame, "the array", array.dtype.names is not None)


def _named_apart(table: Table) -> Table:
    """Columns without a name are numbered, repeated names are told apart, and columns that have
    neither a name nor a cell are left out; each with a warning."""
    names, said, keep = [], [], []
    for j, (name, cells) in enumerate(zip(table.names, table.cells, strict=True)):
        if not name and cells.dtype == object and not any(cells):
            said.append(f"column {j + 1} has neither a name nor a value and is left out")
            continue
        found = name or f"column {j + 1}"
        if not name:
            said.append(f"column {j + 1} has no name and is called {found!r}")
        k = 2
        while found in names or (found != name and found in table.names):
            found, k = f"{name or f'column {j + 1}'} ({k})", k + 1
        if name and found != name:
            said.append(f"{name!r} names more than one column: column {j + 1} is called {found!r}")
        names.append(found)
        keep.append(j)
    if said:
        warnings.warn(f"{table.path}: {'; '.join(said)}", stacklevel=3)
    return _take_columns(table._replace(names=tuple(table.names)), keep, names)


def _take_columns(table: Table, keep, names) -> Table:
    return table._replace(
        names=tuple(names),
        cells=tuple(table.cells[j] for j in keep),
        dtypes=tuple(table.dtypes[j] for j in keep) if table.dtypes else (),
    )


def read_table(
    source: "str | Path | pd.DataFrame | np.ndarray",
    *,
    header: bool | None = None,
    columns: tuple[str, ...] | None = None,
    drop: tuple[str, ...] = (),
    missing: tuple[str, ...] = (),
) -> Table:
    """Reads a table: csv and its relatives, Excel, parquet, a DataFrame or an array.

    Text files are plain or gzipped. The delimiter, a tab, a semicolon, a comma, a bar or blanks, is
    found in the leading lines. Blank lines, and lines above the table that start with #, are passed
    over. UTF-8 and UTF-16 are recognized; other text is read as Windows-1252 with a warning. Of an
    Excel file the first sheet is read. A column without a name is numbered and a repeated name gets
    a number, 'a' and 'a (2)', both with a warning.

    Args:
        source: The path of a file; a pandas DataFrame, whose index is not read; or an array of rows
            and columns.
        header: Whether the first line of a file is names; None looks, and takes years or a count
            of the columns as names where the numbers below are of another kind. Without one the
            columns are called 'column 1', 'column 2', ...
        columns: Names of the columns to keep, in this order; None keeps all.
        drop: Names of columns to leave out.
        missing: Texts or numbers that stand for a missing value, such as '9999', beside those that
            are known: an empty cell, NA, NaN, null, ?, -, k.A. and relatives.

    Returns:
        The table, as cells.

    Raises:
        ValueError: For an empty table, for lines of unequal length, for a file in two
            encodings and for names that are not there, naming the file and the line; for JSON,
            HTML and other files that are no tables, with what reads them.
        ImportError: For Excel without openpyxl and for parquet without pyarrow, which come with the
            extra `tables`.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> table = data.read_table(np.array([[1.0, 2.0], [3.0, 4.0]]))
        >>> table.names, table.rows
        (('column 1', 'column 2'), 2)
    """
    table = _named_apart(_read(source, header))
    path, names = table.path, table.names
    if not table.rows:
        found = "no rows below its header" if table.header else "no rows"
        raise ValueError(f"{path}: the table has {found}; a density needs some")
    for name in (*(columns or ()), *drop):
        if name not in names:
            raise ValueError(
                f"{path} has no column {name!r}; the table has {', '.join(map(repr, names))}"
            )
        if (columns or ()).count(name) > 1:
            raise ValueError(f"{path}: column {name!r} is asked for more than once")
    keep = [names.index(name) for name in columns] if columns is not None else range(len(names))
    keep = [j for j in keep if names[j] not in drop]
    if not keep:
        raise ValueError(f"{path}: no columns are left")
    table = _take_columns(table, keep, [names[j] for j in keep])
    return table._replace(cells=tuple(_blanked(cells, missing) for cells in table.cells))


def _blanked(cells: np.ndarray, missing: tuple[str, ...]) -> np.ndarray:
    """Cells without those that stand for a missing value."""
    if not missing or cells.dtype.kind in "mM":
        return cells
    texts = [str(text) for text in missing]
    worth = [float(text) for text in texts if _is_number(text)]
    if cells.dtype.kind != "O":
        return np.where(np.isin(cells, worth), np.nan, cells)
    gone = {
        text: text in texts or (_is_number(text) and float(text) in worth)
        for text in set(cells.tolist())
    }
    return np.array(["" if gone[text] else text for text in cells.tolist()], object)


def _read(source, header: bool | None) -> Table:
    if hasattr(source, "iloc"):
        frame = source.to_frame() if source.ndim == 1 else source
        return _frame(frame, "the DataFrame", True)
    if isinstance(source, np.ma.MaskedArray):  # what is masked is missing
        return _array(np.ma.filled(source.astype(object), None))
    if hasattr(source, "__array__"):
        return _array(np.asarray(source))
    if not isinstance(source, str | Path):
        raise TypeError(
            "expected a path, a pandas DataFrame or an array of rows and columns, got"
            f" {type(source).__name__}; pandas.DataFrame makes one of lists and dicts"
        )
    path = expand(source)
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder, not a table")
    if not path.exists():
        raise FileNotFoundError(f"there is no such file: {path}")
    raw = _unzipped(path)
    if raw[:4] == b"PK\x03\x04":
        return _spreadsheet(path, raw, header)
    if raw[:4] == b"PAR1":
        return _frame(_optional("pyarrow", path).read_parquet(io.BytesIO(raw)), str(path), True)
    _refuse_other(path, raw)
    return _text_table(path, raw, header)


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


def missing_cells(table: Table) -> np.ndarray:
    """Which cells of a table are missing.

    Args:
        table: From `read_table`.

    Returns:
        bool [n, columns].
    """
    return np.stack([_missing(cells) for cells in table.cells], 1)


def _missing(cells: np.ndarray) -> np.ndarray:
    if cells.dtype.kind == "O":
        return np.array([text.lower() in MISSING for text in cells], bool)
    return np.isnat(cells) if cells.dtype.kind in "mM" else np.isnan(cells)
