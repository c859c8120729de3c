"""What the columns of a table are, and their way to real numbers and back.

Three kinds. 'continuous': a number of full precision. 'lattice': numbers origin + k step, such as
integers, or measurements in steps of 0.01. 'categorical': text, coded 0, 1, 2, ... from the most
frequent category down.

A flow that narrows its spikes on a lattice gains log-likelihood without bound. So a lattice value v
becomes v + step u and a code k becomes k + u, with u uniform on [0, 1): each cell holds the mass of
its value, P(v) = integral of the density over [v, v + step), and log P(v) >= E_u log(step density(v
+ step u)). Averaging several draws of u in probability tightens the bound.
"""

import warnings
from decimal import Decimal
from typing import NamedTuple

import numpy as np

from jflow._core.arrays import numpy_mean_and_std
from jflow.data._tables import MISSING, Table, is_kept, numbers


class Column(NamedTuple):
    """One column of a table: what kind of number it holds, and how it is written.

    JSON by `_asdict`, back by `Column(**d)`.

    Attributes:
        name: Of the column.
        kind: 'continuous', 'lattice' or 'categorical'.
        step: The width of a cell, 0 where continuous, 1 for codes.
        origin: A point of the lattice.
        decimals: Digits after the point that the table writes at most; None: `digits` significant
            ones.
        padding: Digits after the point that the table writes at least.
        digits: Significant digits, 0 for as many as float64 needs to be read back.
        low: The least value in the table.
        high: The largest value in the table.
        categories: The text of each code.
        width: Characters before the point to which the table fills up with zeros.
        plus: Whether it writes positive numbers with a sign.
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
    plus: bool = False

    @property
    def is_mass(self) -> bool:
        """Whether its probabilities count as mass: categories and whole numbers. Else as density
        per unit."""
        return self.kind == "categorical" or (self.kind == "lattice" and self.decimals == 0)


def _near_integers(m: np.ndarray, ulps: float) -> bool:
    return bool(np.all(np.abs(m - np.rint(m)) <= np.minimum(ulps * np.abs(m), 0.01)))


def find_lattice(x: np.ndarray) -> tuple[float, float, int | None] | None:
    """The coarsest lattice that holds all numbers of a column, or None.

    Decimal lattices come first: the fewest decimals that hold x to a few float64 ulps, else (up to
    7 decimals) to float32 ulps; the step is the greatest common divisor of the differences. Then,
    where values repeat, any lattice of at most 10,000 points, such as thirds, or integers that were
    standardized; its decimals are None. A step below 1e-6 of x's standard deviation counts as none:
    a float32 model cannot resolve it. So does a lattice that is off by 1e-3 of it, or whose float32
    ulps would make two numbers one: ulps of an offset may be all that x varies by.

    Args:
        x: [n].

    Returns:
        (step, origin, decimals), or None.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> step, origin, decimals = data.find_lattice(np.array([1.5, 2.0, 3.5, 2.5]))
        >>> step, decimals
        (0.5, 1)
    """
    x = np.asarray(x, np.float64)
    std = numpy_mean_and_std(x, 0)[1][0]
    floor, exact = 1e-6 * std, True
    for ulps, most in (
        (8 * float(np.finfo(np.float64).eps), 12),
        (2 * float(np.finfo(np.float32).eps), 7),
    ):
        for decimals in range(most + 1):
            m = x * 10.0**decimals
            if np.abs(m).max() >= 2**52:
                break
            if _near_integers(m, ulps):
                k = np.unique(np.rint(m).astype(np.int64))
                off = np.abs(np.rint(m) / 10.0**decimals - x).max()
                if off > 1e-3 * std or not (exact or len(k) == len(np.unique(x))):
                    continue
                g = int(np.gcd.reduce(np.diff(k))) if len(k) > 1 else 1
                step = g / 10**decimals
                if step >= floor:
                    return step, float(k[0] / 10**decimals), decimals
                break
        exact = False
    u = np.unique(x)
    if 4 <= len(u) < len(x):
        step = _common_step(np.diff(u), 1e-5 * (u[-1] - u[0]))
        k = np.rint((u - u[0]) / step)
        step = (u[-1] - u[0]) / k[-1]
        if step >= 1e-4 * (u[-1] - u[0]) and np.abs((u - u[0]) / step - k).max() < 0.01:
            return float(step), float(u[0]), None
    return None


def _common_step(gaps: np.ndarray, tolerance: float) -> float:
    """Euclid's greatest common divisor of real gaps; remainders below `tolerance` are zero."""
    step = gaps.min()
    for a in np.unique(gaps):
        b = step
        while b > tolerance:
            step, b, a = b, abs(a - b * np.rint(a / b)), b
    return float(step)


class _Form(NamedTuple):
    """How a column writes its numbers: the most and the fewest digits after the point (most None
    where exponents occur), the most significant digits, and `Column`'s width and plus."""

    most: int | None
    fewest: int
    digits: int
    width: int
    plus: bool


def _form(table: Table, j: int, x: np.ndarray) -> _Form:
    plain = [cell.lower() for cell in table.cells[j]]
    digits = max(1, max(len(c.partition("e")[0].lstrip("+-0.").replace(".", "")) for c in plain))
    plus = all(c[0] == "+" for c, v in zip(plain, x, strict=True) if v > 0) and any(
        c[0] == "+" for c in plain
    )
    if any("e" in c for c in plain):
        return _Form(None, 0, digits, 0, plus)
    after = [len(c.partition(".")[2]) for c in plain]
    whole = [
        c.partition(".")[0] for c in plain
    ]  # with its sign: that is how C and Python count a width
    padded = [
        i for i, c in enumerate(whole) if len(c.lstrip("+-")) > 1 and c.lstrip("+-")[0] == "0"
    ]
    width = len(whole[padded[0]]) if padded else 0
    for i, c in enumerate(
        whole
    ):  # 007 beside 07 or 7: as numbers they are one, as codes they are not
        if len(c) < width or (i in padded and len(c) > width):
            raise ValueError(
                f"{_where(table, j, i)}: {table.cells[j][i]!r} and {table.cells[j][padded[0]]!r}"
                " are filled up with zeros to different lengths: take the column as categories"
                " (categorical=...) or leave it out (drop=...)"
            )
    return _Form(max(after), min(after), digits, width, plus)


def _where(table: Table, j: int, i: int) -> str:
    return f"{table.path}: line {table.lines[i]}, column {table.names[j] or j + 1!r}"


def _categorical(name: str, cells: np.ndarray, codes: list[str]) -> Column:
    return Column(name, "categorical", step=1.0, high=len(codes) - 1.0, categories=tuple(codes))


def _as_written(column: Column, form: _Form, cells: np.ndarray, x: np.ndarray) -> Column:
    """The column with the first of decimals, significant digits and float64's own that gives back
    every number it holds."""
    ways = (
        [column._replace(decimals=form.most)] if form.most is not None and form.most <= 12 else []
    )
    for way in (*ways, column):
        texts = (_text(way, v) for v in x.tolist())
        if all(
            text == cell or Decimal(text) == Decimal(cell)
            for text, cell in zip(texts, cells, strict=True)
        ):
            return way
    return column._replace(digits=0)


def _check_numbers(table: Table, j: int, x: np.ndarray) -> None:
    """Raise, naming line and column, for a cell of column j that is no finite number or that
    float64 would alter.

    x [n]: the cells as numbers, NaN for those that are none."""

    def refuse(bad: np.ndarray, what: str, expected: str) -> None:
        more = f" ({bad.sum()} such cells in this column)" if bad.sum() > 1 else ""
        raise ValueError(f"{_where(table, j, int(np.argmax(bad)))}: {what} {expected}{more}")

    cells, bad = table.cells[j], ~np.isfinite(x)
    if bad.any():
        cell = cells[np.argmax(bad)]
        what = "a missing value" if cell.lower() in MISSING else repr(cell)
        refuse(bad, what, "where finite numbers are expected")
    altered = np.array([not is_kept(cell) for cell in cells], bool)
    if altered.any():
        expected = (
            "has more digits than float64 holds: round it, take it as a category (categorical=...)"
            " or leave it out"
        )
        refuse(altered, repr(cells[np.argmax(altered)]), f"{expected} (drop=...)")


def _warn_of_spikes(table: Table, name: str, x: np.ndarray) -> None:
    """Warn of values that many rows share in a column x [n] that is continuous otherwise, such as
    no rain.

    Continuous numbers coincide only where whole rows were copied, which is seen in how often a
    typical one stands there: a spike is a value of at least 5 rows and of a thousandth of them, and
    5 times as frequent as the median value.
    """
    values, counts = np.unique(x, return_counts=True)
    spikes = counts >= max(5, len(x) / 1000, 5 * np.median(counts) + 1e-9)
    if spikes.any():
        order = np.argsort(-counts * spikes, kind="stable")[: min(3, spikes.sum())]
        said = ", ".join(
            f"{values[k]:g} in {counts[k]} of {len(x)} rows ({counts[k] / len(x):.1%})"
            for k in order
        )
        more = (
            f" and {spikes.sum() - len(order)} more values like it"
            if spikes.sum() > len(order)
            else ""
        )
        warnings.warn(
            f"{table.path}: column {name!r} is continuous but for {said}{more}. No density has such"
            " a point of mass: the likelihood grows without bound the more a model narrows there,"
            " and says nothing about the fit. Model the rows without it, and its probability"
            " apart",
            stacklevel=2,
        )


def _column(table: Table, j: int, categorical: bool) -> Column:
    name, cells = table.names[j], table.cells[j]
    missing = np.array([c.lower() in MISSING for c in cells])
    x = np.where(missing, np.nan, numbers(cells))
    good = ~np.isnan(x)
    if missing.all():
        raise ValueError(f"{table.path}: column {name!r} is empty")
    if categorical or 2 * good.sum() < (~missing).sum():
        texts, counts = np.unique(cells.astype(str), return_counts=True)
        if len(texts) > max(20, table.rows // 2):
            raise ValueError(
                f"{table.path}: column {name!r} holds {len(texts)} different texts in {table.rows}"
                " rows, like a name or a date: leave it out (drop=...)"
            )
        return _categorical(
            name, cells, [str(t) for t in texts[np.argsort(-counts, kind="stable")]]
        )
    _check_numbers(table, j, x)
    form = _form(table, j, x)
    column = Column(
        name,
        "continuous",
        padding=form.fewest,
        digits=form.digits,
        low=float(x.min()),
        high=float(x.max()),
        width=form.width,
        plus=form.plus,
    )
    lattice = find_lattice(x)
    if lattice is not None:
        step, origin, decimals = lattice
        return column._replace(kind="lattice", step=step, origin=origin, decimals=decimals)
    distinct = np.unique(x)
    if len(distinct) <= min(
        20, table.rows // 10
    ):  # a few spikes on no lattice, such as a standardized yes/no
        order = {v: k for k, v in enumerate(distinct)}
        spikes = [""] * len(order)
        for cell, v in zip(cells, x, strict=True):
            spikes[order[v]] = str(cell)
        return _categorical(name, cells, spikes)
    _warn_of_spikes(table, name, x)
    return _as_written(column, form, cells, x)


def find_schema(table: Table, *, categorical: tuple[str, ...] = ()) -> tuple[Column, ...]:
    """What each column of a table is.

    A column is numeric if at least half of the cells that are not missing are numbers. In a column
    of text a missing value is a category like any other.

    Args:
        table: From `read_table`.
        categorical: Names of columns that are taken as categories, numbers or not.

    Returns:
        A `Column` for each column.

    Raises:
        ValueError: For a missing value, text or an infinity in a numeric column, naming the line
            and the column; for columns that never change, naming them all.
    """
    absent = [name for name in categorical if name not in table.names]
    if absent:
        raise ValueError(
            f"{table.path} has no column {absent[0]!r}; the table has"
            f" {', '.join(map(repr, table.names))}"
        )
    constant = [
        name for name, cells in zip(table.names, table.cells, strict=True) if len(set(cells)) == 1
    ]
    schema = (
        []
        if constant
        else [_column(table, j, name in categorical) for j, name in enumerate(table.names)]
    )
    constant += [c.name for c in schema if c.low == c.high]  # such as 1 and 1.0
    if constant:
        names = ", ".join(map(repr, constant))
        raise ValueError(
            f"{table.path}: constant columns have no density: {names}; leave them out (drop=...)"
        )
    return tuple(schema)


def encode(schema: tuple[Column, ...], table: Table) -> np.ndarray:
    """A table as numbers: numbers as they are, categories as their codes.

    Args:
        schema: From `find_schema`.
        table: This table or another one with the same columns.

    Returns:
        float64 [n, columns], numbers snapped to their lattice.

    Raises:
        ValueError: For a cell that is no finite number, is off the lattice, is an unknown category
            or has more digits than float64 holds, naming line and column.
    """
    if len(schema) != len(table.cells):
        raise ValueError(
            f"{table.path}: expected the {len(schema)} columns of the schema, got"
            f" {len(table.cells)}"
        )
    columns = []
    for j, (column, cells) in enumerate(zip(schema, table.cells, strict=True)):
        x = numbers(cells)
        if column.kind == "categorical":
            x = _codes(column, cells, x)
            unknown = np.isnan(x)
            if unknown.any():
                i = int(np.argmax(unknown))
                raise ValueError(
                    f"{_where(table, j, i)}: {cells[i]!r} is none of the column's categories"
                )
            columns.append(x)
            continue
        _check_numbers(table, j, x)
        if column.kind == "lattice":
            k = (x - column.origin) / column.step
            off = np.abs(k - np.rint(k)) > 0.02
            if off.any():
                i = int(np.argmax(off))
                raise ValueError(
                    f"{_where(table, j, i)}: {cells[i]!r} is not on the column's steps of"
                    f" {column.step:g}"
                )
            x = column.origin + column.step * np.rint(k)
        columns.append(x)
    return np.stack(columns, 1)


def _codes(column: Column, cells: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The code of each cell [n], by its text or else by its number (1.50 where the category is
    1.5); NaN for others."""
    by_text = {text: k for k, text in enumerate(column.categories)}
    by_number = dict(
        zip(numbers(np.array(column.categories, object)).tolist(), by_text.values(), strict=True)
    )
    return np.array(
        [by_text.get(c, by_number.get(v, np.nan)) for c, v in zip(cells, x.tolist(), strict=True)],
        np.float64,
    )


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

    Args:
        schema: From `find_schema`.
        x: [n, columns].

    Returns:
        [n, columns], floored to the lattice, and clipped to the range seen in the table.
    """
    columns = []
    for j, column in enumerate(schema):
        v = np.asarray(x[:, j], np.float64)
        if column.step:
            # The 1e-6 of a cell makes the lattice's own points, which rounding may have lowered,
            # stay where they are.
            v = column.origin + column.step * np.floor((v - column.origin) / column.step + 1e-6)
        columns.append(np.clip(v, column.low, column.high))
    return np.stack(columns, 1)


def _text(column: Column, v: float) -> str:
    if column.kind == "categorical":
        return column.categories[int(v)]
    sign = "+" if column.plus and v > 0 else ""
    if column.decimals is None:
        return sign + (f"{v:.{column.digits}g}" if column.digits else repr(v))
    whole, point, rest = f"{v:.{max(column.decimals, column.padding)}f}".partition(".")
    rest = rest[: column.padding] + rest[column.padding :].rstrip("0")
    whole = whole.removeprefix("-") if not (whole + rest).strip("-0") else whole
    whole = (sign + whole).zfill(column.width)
    return f"{whole}.{rest}" if rest else whole


def to_text(schema: tuple[Column, ...], x: np.ndarray) -> list[list[str]]:
    """Encoded rows as cells of text, written as the table writes them.

    Args:
        schema: From `find_schema`.
        x: Encoded rows, [n, columns].

    Returns:
        n rows of cells.
    """
    return [[_text(column, v) for column, v in zip(schema, row, strict=True)] for row in x.tolist()]
