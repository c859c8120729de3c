"""What the columns of a table are, and their way to real numbers and back.

Three kinds. 'continuous': a number of full precision. 'lattice': numbers origin + k step, such as integers, or
measurements in steps of 0.01. 'categorical': text, coded 0, 1, 2, ... from the most frequent category down.

A flow that narrows its spikes on a lattice gains log-likelihood without bound. So a lattice value v becomes v + step u
and a code k becomes k + u, with u uniform on [0, 1): each cell holds the mass of its value, P(v) = integral of the
density over [v, v + step), and log P(v) >= E_u log(step density(v + step u)). Averaging several draws of u in
probability tightens the bound.
"""

from typing import NamedTuple

import numpy as np

from jflow.data.tables import MISSING, Table, numbers


class Column(NamedTuple):
    """One column. JSON by `_asdict`, back by `Column(**d)`.

    step: width of a cell, 0 where continuous, 1 for codes. origin: a point of the lattice. decimals, padding: digits
    after the point that the table writes at most and at least (None: as many as a float needs, `digits` significant
    ones). low, high: the range in the table. categories: the text of each code.
    """

    name: str
    kind: str
    step: float = 0.0
    origin: float = 0.0
    decimals: int | None = None
    padding: int = 0
    digits: int = 17
    low: float = 0.0
    high: float = 0.0
    categories: tuple[str, ...] = ()

    @property
    def is_mass(self) -> bool:
        """Whether its probabilities count as mass: categories and whole numbers. Else as density per unit."""
        return self.kind == "categorical" or (self.kind == "lattice" and self.decimals == 0)


def _near_integers(m: np.ndarray, ulps: float) -> bool:
    return bool(np.all(np.abs(m - np.rint(m)) <= np.minimum(ulps * np.abs(m), 0.01)))


def find_lattice(x: np.ndarray) -> tuple[float, float, int | None] | None:
    """(step, origin, decimals) of the coarsest lattice that holds every x [n], or None.

    Decimal lattices come first: the fewest decimals that hold x to a few float64 ulps, else (up to 7 decimals) to
    float32 ulps; the step is the greatest common divisor of the differences. Then, where values repeat, any lattice of
    at most 10,000 points, such as thirds, or integers that were standardised; its decimals are None. A step below 1e-6
    of x's standard deviation counts as none: a float32 model cannot resolve it.
    """
    x = np.asarray(x, np.float64)
    floor = 1e-6 * x.std()
    for ulps, most in ((8 * np.finfo(np.float64).eps, 12), (2 * np.finfo(np.float32).eps, 7)):
        for decimals in range(most + 1):
            m = x * 10.0**decimals
            if np.abs(m).max() >= 2**52:
                break
            if _near_integers(m, ulps):
                k = np.unique(np.rint(m).astype(np.int64))
                g = int(np.gcd.reduce(np.diff(k))) if len(k) > 1 else 1
                step = g / 10**decimals
                if step >= floor:
                    return step, float(k[0] / 10**decimals), decimals
                break
    u = np.unique(x)
    if 4 <= len(u) < len(x):
        step = _common_step(np.diff(u), 1e-5 * (u[-1] - u[0]))
        k = np.rint((u - u[0]) / step)
        step = (u[-1] - u[0]) / k[-1]
        if step >= 1e-4 * (u[-1] - u[0]) and np.abs((u - u[0]) / step - k).max() < 0.01:
            return float(step), float(u[0]), None
    return None


def _common_step(gaps: np.ndarray, tolerance: float) -> float:
    """Euclid's greatest common divisor of real gaps, remainders below `tolerance` counted as zero."""
    step = gaps.min()
    for a in np.unique(gaps):
        b = step
        while b > tolerance:
            step, b, a = b, abs(a - b * np.rint(a / b)), b
    return float(step)


def _written(cells: np.ndarray) -> tuple[int | None, int, int]:
    """(most, fewest) digits after the point, and the most significant digits; most is None where exponents occur."""
    plain = [c.lower() for c in cells]
    digits = max(len(c.partition("e")[0].lstrip("+-0.").replace(".", "")) for c in plain)
    if any("e" in c for c in plain):
        return None, 0, max(digits, 1)
    after = [len(c.partition(".")[2]) for c in plain]
    return max(after), min(after), max(digits, 1)


def _where(table: Table, j: int, i: int) -> str:
    return f"{table.path}: line {table.lines[i]}, column {table.names[j] or j + 1!r}"


def _categorical(name: str, cells: np.ndarray, codes: list[str]) -> Column:
    return Column(name, "categorical", step=1.0, high=len(codes) - 1.0, categories=tuple(codes))


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
                f"{table.path}: column {name!r} holds {len(texts)} different texts in {table.rows} rows, like a name "
                f"or a date: leave it out (drop=...)"
            )
        return _categorical(name, cells, [str(t) for t in texts[np.argsort(-counts, kind="stable")]])
    bad = ~(good & np.isfinite(x))
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        what = "a missing value" if missing[i] else f"{cells[i]!r}"
        more = f" ({bad.sum()} such cells in this column)" if bad.sum() > 1 else ""
        raise ValueError(f"{_where(table, j, i)}: {what} where finite numbers are expected{more}")
    most, padding, digits = _written(cells)
    column = Column(name, "continuous", padding=padding, digits=digits, low=float(x.min()), high=float(x.max()))
    lattice = find_lattice(x)
    if lattice is not None:
        step, origin, decimals = lattice
        return column._replace(kind="lattice", step=step, origin=origin, decimals=decimals)
    distinct = np.unique(x)
    if len(distinct) <= min(20, table.rows // 10):  # a few spikes on no lattice, such as a standardised yes/no
        order = {v: k for k, v in enumerate(distinct)}
        texts = [""] * len(order)
        for cell, v in zip(cells, x, strict=True):
            texts[order[v]] = str(cell)
        return _categorical(name, cells, texts)
    return column._replace(decimals=most if most is not None and most <= 12 else None)


def find_schema(table: Table, *, categorical: tuple[str, ...] = ()) -> tuple[Column, ...]:
    """What each column is. Columns named in `categorical` are taken as categories, numbers or not.

    A column is numeric if at least half of the cells that are not missing are numbers; then a missing value, text or an
    infinity in it is an error that names the line and the column. In a column of text a missing value is a category
    like any other. Columns that never change are an error that names them all.
    """
    absent = [name for name in categorical if name not in table.names]
    if absent:
        raise ValueError(f"{table.path}: no column {absent[0]!r}; the table has {', '.join(map(repr, table.names))}")
    constant = [name for name, cells in zip(table.names, table.cells, strict=True) if len(set(cells)) == 1]
    schema = [] if constant else [_column(table, j, name in categorical) for j, name in enumerate(table.names)]
    constant += [c.name for c in schema if c.low == c.high]  # such as 1 and 1.0
    if constant:
        names = ", ".join(map(repr, constant))
        raise ValueError(f"{table.path}: constant columns have no density: {names}; leave them out (drop=...)")
    return tuple(schema)


def encode(schema: tuple[Column, ...], table: Table) -> np.ndarray:
    """float64 [n, columns]: numbers as they are (snapped to their lattice), categories as their codes."""
    columns = []
    for column, cells in zip(schema, table.cells, strict=True):
        if column.kind == "categorical":
            code = {text: k for k, text in enumerate(column.categories)}
            columns.append(np.array([code[c] for c in cells], np.float64))
            continue
        x = numbers(cells)
        if column.kind == "lattice":
            x = column.origin + column.step * np.rint((x - column.origin) / column.step)
        columns.append(x)
    return np.stack(columns, 1)


def steps(schema: tuple[Column, ...]) -> np.ndarray:
    """float64 [columns]: the widths of the cells, 0 where continuous."""
    return np.array([column.step for column in schema])


def add_noise(schema: tuple[Column, ...], x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Encoded [n, columns] spread uniformly over the cells: x + step u. Continuous columns stay."""
    return x + steps(schema) * rng.random(x.shape)


def log_mass_unit(schema: tuple[Column, ...]) -> float:
    """What a log-density per unit of the encoded columns gains, in nats, to count whole numbers and categories as mass."""
    return float(sum(np.log(column.step) for column in schema if column.is_mass))


def decode(schema: tuple[Column, ...], x: np.ndarray) -> np.ndarray:
    """Dequantized [n, columns] to encoded: floored to the lattice, and clipped to the range seen in the table."""
    columns = []
    for j, column in enumerate(schema):
        v = np.asarray(x[:, j], np.float64)
        if column.step:
            # The 1e-6 of a cell makes the lattice's own points, which rounding may have lowered, stay where they are.
            v = column.origin + column.step * np.floor((v - column.origin) / column.step + 1e-6)
        columns.append(np.clip(v, column.low, column.high))
    return np.stack(columns, 1)


def _text(column: Column, v: float) -> str:
    if column.kind == "categorical":
        return column.categories[int(v)]
    if column.decimals is None:
        return repr(v) if column.digits >= 17 else f"{v:.{column.digits}g}"
    whole, point, rest = f"{v:.{max(column.decimals, column.padding)}f}".partition(".")
    rest = rest[: column.padding] + rest[column.padding :].rstrip("0")
    text = f"{whole}.{rest}" if rest else whole
    return text.removeprefix("-") if not text.strip("-0.") else text


def to_text(schema: tuple[Column, ...], x: np.ndarray) -> list[list[str]]:
    """Encoded [n, columns] to rows of cells, written as the table writes them."""
    return [[_text(column, v) for column, v in zip(schema, row, strict=True)] for row in x.tolist()]
