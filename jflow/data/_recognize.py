"""What a column of a table is, by its cells; and what makes a column one that has no density."""

import hashlib
import re
import shlex
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from jflow._core.arrays import numpy_mean_and_std
from jflow.data._schema import Column, Texts, distinct, microseconds, number_texts, plain_texts
from jflow.data._tables import MISSING, MISSING_TEXT, Table, is_kept
from jflow.data._writing import (
    DAY,
    PLAIN,
    SECOND,
    Number,
    Style,
    affix,
    candidates,
    fits,
    has_unit,
    is_clocked,
    is_negative,
    order_of,
    pattern_of,
    plain,
    read_moment,
    split_moment,
    split_month,
    split_number,
)

LEAST = 10  # rows from which on a column is judged by how its values repeat
_MAIL = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+")
_UUID = re.compile(r"\{?[0-9a-f]{8}(-?[0-9a-f]{4}){3}-?[0-9a-f]{12}\}?", re.I)
_DATED = re.compile(  # a date with a word in it, and maybe a weekday before it
    r"([^\W\d]+\W+)?(\d{1,2}\W+[^\W\d]{3,}|[^\W\d]{3,}\W+\d{1,2})\W+((19|20)\d\d|\d\d:\d\d)\b"
)


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
        x: [n]; NaN is passed over.

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
    x = x[~np.isnan(x)]
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


def _share(flags: Sequence[bool], counts: np.ndarray) -> float:
    """The share of rows whose text is flagged, of all that the counts count."""
    return float(np.dot(np.asarray(flags, bool), counts) / max(counts.sum(), 1))


class _Form(NamedTuple):
    """How a column writes its numbers: the most and the fewest digits after the point (most None
    where exponents occur), the most significant digits, and `Column`'s width."""

    most: int | None
    fewest: int
    digits: int
    width: int


def _form(texts: Sequence[str]) -> _Form:
    """Of numbers as Python writes them. ValueError where they are filled up with zeros to different
    lengths: as numbers 007 and 07 are one, as codes they are not."""
    lower = [text.lower() for text in texts]
    digits = max(1, max(len(c.partition("e")[0].lstrip("+-0.").replace(".", "")) for c in lower))
    if any("e" in c for c in lower):
        return _Form(None, 0, digits, 0)
    pieces = [c.partition(".") for c in lower]
    after = [len(rest) for _, _, rest in pieces]
    # with its sign: that is how C and Python count a width
    whole = [c for c, _, _ in pieces]
    padded = [
        i for i, c in enumerate(whole) if len(c.lstrip("+-")) > 1 and c.lstrip("+-")[0] == "0"
    ]
    width = len(whole[padded[0]]) if padded else 0
    for i in padded or ():
        if len(whole[i]) != width:
            raise ValueError(
                f"{texts[i]!r} and {texts[padded[0]]!r} are filled up with zeros to different"
                " lengths: take the column as categories (categorical=...)"
            )
    if width and min(map(len, whole)) < width:
        short = min(texts, key=len)
        raise ValueError(
            f"{short!r} and {texts[padded[0]]!r} are filled up with zeros to different lengths:"
            " take the column as categories (categorical=...)"
        )
    return _Form(max(after), min(after), digits, width)


def _cell(table: Table, found: Texts, bad: Sequence[bool] | np.ndarray, what: str) -> str:
    """'line 8 holds 'wet' ... (2 such cells)', of the first row whose text is flagged."""
    rows = np.flatnonzero(np.asarray(bad, bool)[found.of_row])
    more = f" ({len(rows)} such cells)" if len(rows) > 1 else ""
    row = "row" if table.dtypes else "line"
    text = found.texts[found.of_row[rows[0]]]
    return f"{row} {table.lines[rows[0]]} holds {text!r}, {what}{more}"


def _type_of(table: Table, j: int) -> dict[str, Any]:
    """`Column`'s dtype, levels and ordered."""
    dtype = table.dtypes[j] if table.dtypes else None
    if dtype is None:
        return {}
    if str(dtype) != "category":
        return {"dtype": str(dtype)}
    levels = dtype.categories.tolist()
    plain = all(isinstance(level, str | int | float | bool) for level in levels)
    levels = levels if plain else [str(level) for level in levels]
    return {"dtype": "category", "levels": tuple(levels), "ordered": bool(dtype.ordered)}


def _most_frequent(found: Texts, among: frozenset[str]) -> str | None:
    """The most frequent of the texts that say that a value is missing, or None."""
    counts = {
        text: int(n)
        for text, n in zip(found.texts, found.counts, strict=True)
        if text.lower() in among
    }
    return max(counts, key=lambda text: counts[text]) if counts else None


def _key(key: str, *names: str) -> str:
    """key=a,b, as a shell takes it; as a list where a name holds a comma."""
    plain = not any("," in name or name.strip() != name or name[:1] in "([" for name in names)
    return shlex.quote(f"{key}={','.join(names) if plain else list(names)}")


def _mend(found: Texts, bad: np.ndarray) -> str:
    """What to do about cells that are unlike the rest of their column: of few texts, they may stand
    for missing values."""
    texts = [text for text, flag in zip(found.texts, bad, strict=True) if flag]
    few = (
        f"say {_key('missing', *texts)} if it stands for a missing value, "
        if len(texts) <= 3
        else ""
    )
    return f"mend it, {few}"


def _refuse_missing(share: float) -> None:
    if share == 1:
        raise ValueError("is empty")
    if share > 0.95:
        raise ValueError(f"is missing in {share:.1%} of the rows")


def _text_column(name: str, found: Texts, remedy: str = "") -> tuple[Column, np.ndarray]:
    """A column of categories, from the most frequent one down. ValueError where the texts are too
    many, or name the rows; it ends in `remedy`."""
    missing = _most_frequent(found, MISSING_TEXT)
    merged = [str(missing) if t.lower() in MISSING_TEXT else t for t in found.texts]
    counts: Counter[str] = Counter()
    for text, n in zip(merged, found.counts.tolist(), strict=True):
        counts[text] += n
    total = sum(counts.values())
    known = {text: n for text, n in counts.items() if text != missing}
    rows = sum(known.values())
    _refuse_missing((total - rows) / total)
    most = max(known, key=lambda text: known[text])
    if len(known) == 1 and missing is None:
        raise ValueError(f"is constant: {most!r} in every row")
    apart = len(known) == rows >= LEAST
    if apart or len(known) > 20:
        for what, form in (("e-mail addresses", _MAIL), ("UUIDs", _UUID)):
            if all(map(form.fullmatch, known)):
                raise ValueError(f"holds {what}, which name the rows")
    if apart or len(known) > max(20, rows // 2):
        said = f"{len(known)} different texts in {rows} rows"
        if np.mean([has_unit(text) for text in known]) > 0.5:
            raise ValueError(
                f"holds numbers with units, such as {most!r}: write the unit into the header alone"
            )
        if np.mean([_DATED.match(text) is not None for text in known]) > 0.5:
            raise ValueError(
                f"holds dates in a form that is not read, such as {most!r}: write them as"
                " 2024-12-31 or 31 Dec 2024"
            )
        if np.mean([len(text.split()) for text in known]) >= 4:
            raise ValueError(f"is free text: {said}, such as {most[:40]!r}")
        kind = "an identifier that names the rows" if apart else "text of too many categories"
        raise ValueError(f"is {kind}: {said}{remedy}")
    order = sorted(counts, key=lambda text: -counts[text])
    code = {text: k for k, text in enumerate(order)}
    codes = np.array([code[text] for text in merged], np.float64)
    return _categorical(name, order)._replace(missing=missing), codes[found.of_row]


def _categorical(name: str, codes: Sequence[str]) -> Column:
    return Column(name, "categorical", step=1.0, high=len(codes) - 1.0, categories=tuple(codes))


def _values_column(
    name: str, x: np.ndarray, write: Callable[[float], str], missing: str | None
) -> tuple[Column, np.ndarray]:
    """A column of a few numbers as categories in order of size, the missing one last."""
    values = np.unique(x[~np.isnan(x)])
    texts = [write(v) for v in values.tolist()]
    codes = np.searchsorted(values, x).astype(np.float64)
    codes[np.isnan(x)] = len(values)
    return _categorical(name, texts + ([] if missing is None else [missing]))._replace(
        missing=missing
    ), codes


def _as_written(column: Column, most: int | None, texts: Sequence[str], x: np.ndarray) -> Column:
    """The column with the first of decimals, significant digits and float64's own that gives back
    every number it holds. texts: of the values x, as Python writes them."""
    ways = [column._replace(decimals=most)] if most is not None and most <= 12 else []
    for way in (*ways, column):
        if all(
            text == cell or Decimal(text) == Decimal(cell)
            for text, cell in zip(plain_texts(way, x), texts, strict=True)
        ):
            return way
    return column._replace(digits=0)


def spikes(x: np.ndarray) -> np.ndarray:
    """Values that many rows share in a column that is continuous otherwise, such as no rain.

    No density has such a point of mass: the likelihood grows without bound the more a model narrows
    there. Continuous numbers coincide only where whole rows were copied, which is seen in how often
    a typical one stands there: a spike is a value of at least 5 rows and of a thousandth of them,
    and 5 times as frequent as the median value.

    Args:
        x: Numbers of a column [n]; NaN is passed over.

    Returns:
        float64 [spikes], the most frequent first.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> rain = np.append(np.random.default_rng(0).exponential(size=90), np.zeros(10))
        >>> data.spikes(rain).tolist()
        [0.0]
    """
    x = np.asarray(x, np.float64)
    x = x[~np.isnan(x)]
    values, counts = np.unique(x, return_counts=True)
    if not len(values):
        return values
    often = counts >= max(5, len(x) / 1000, 5 * np.median(counts) + 1e-9)
    order = np.argsort(-counts, kind="stable")
    return values[order[often[order]]]


def _refuse_names_of_rows(name: str, x: np.ndarray) -> None:
    """ValueError for whole numbers [n] that count the rows."""
    if len(x) < LEAST or np.isnan(x).any() or (x != np.rint(x)).any():
        return
    low, high, gaps = x.min(), x.max(), np.diff(x)
    if high - low == len(x) - 1 == len(np.unique(x)) - 1 and low in (0, 1):
        raise ValueError(
            f"counts the rows, {low:.0f} to {high:.0f}; {_key('numeric', name)} keeps it"
        )
    if ((gaps > 0).all() or (gaps < 0).all()) and (np.abs(gaps) == 1).mean() >= 0.5:
        raise ValueError(
            f"counts the rows, {x[0]:.0f} to {x[-1]:.0f} in order; {_key('numeric', name)} keeps it"
        )


def _are_codes(x: np.ndarray) -> bool:
    """Whether whole numbers are identifiers by their looks: at least 7 digits, all of one length,
    and spread over more than half of what that length can hold, without a common step."""
    if len(x) < LEAST or (x != np.rint(x)).any() or x.min() < 1e6 or x.max() > 2**53:
        return False
    digits = len(f"{x.max():.0f}")
    k = np.unique(x).astype(np.int64)
    spread = float(k[-1] - k[0]) / 10.0**digits
    return len(f"{x.min():.0f}") == digits and spread > 0.5 and np.gcd.reduce(np.diff(k)) == 1


def _number_column(
    name: str,
    x: np.ndarray,
    found: Texts | None,
    texts: Sequence[str],
    values: np.ndarray,
    missing: str | None,
    forced: str,
) -> tuple[Column, np.ndarray]:
    """A column of the numbers x [n], NaN where missing.

    found: Its cells, None where they are no text. texts and values: Its distinct numbers as Python
    writes them, and their worth; no texts where the cells are none.
    """
    known = x[~np.isnan(x)]
    _refuse_missing(1 - len(known) / len(x))
    distinct = np.unique(known)
    if len(distinct) == 1 and len(known) == len(x):
        raise ValueError(f"is constant: {distinct[0]:g} in every row")

    def write(v: float) -> str:
        """The most frequent text of a value."""
        if found is None:
            return f"{v:.0f}" if (distinct == np.rint(distinct)).all() else repr(v)
        best = np.flatnonzero(by_text == v)
        return found.texts[best[np.argmax(found.counts[best])]]

    if found is not None:
        by_text = np.full(len(found.texts), np.nan)
        by_text[found.of_row] = x
    if forced != "numeric":
        _refuse_names_of_rows(name, x)
        if _are_codes(known):
            if len(distinct) > max(20, len(known) // 2):
                raise ValueError(
                    f"is an identifier: {len(distinct)} different numbers of"
                    f" {len(write(distinct[0]))} digits in {len(known)} rows;"
                    f" {_key('numeric', name)} keeps it"
                )
            return _values_column(name, x, write, missing)
        if len(distinct) == 1 or distinct.tolist() == [0, 1]:
            return _values_column(name, x, write, missing)
    form = _form(texts) if texts else _Form(None, 0, 0, 0)
    column = Column(
        name,
        "continuous",
        padding=form.fewest,
        digits=form.digits,
        low=float(distinct[0]),
        high=float(distinct[-1]),
        width=form.width,
        missing=missing,
    )
    lattice = find_lattice(x)
    column = column._replace(**_exponent(texts, values))
    if column.exponent and lattice is not None:  # the largest number may have no such digits
        digits = np.floor(np.log10(np.abs(known).max())) - column.padding
        lattice = lattice if lattice[0] >= 10.0**digits else None
    if lattice is not None:
        step, origin, decimals = lattice
        return column._replace(kind="lattice", step=step, origin=origin, decimals=decimals), x
    if len(distinct) <= min(20, len(x) // 10) and forced != "numeric":
        return _values_column(name, x, write, missing)  # such as a standardized yes/no
    if texts and not column.exponent:
        column = _as_written(column, form.most, texts, values)
    return column, x


def _exponent(texts: Sequence[str], values: np.ndarray) -> dict[str, Any]:
    """`Column`'s exponent and padding of numbers that all have an exponent and as many digits."""
    for letter in "eE":
        if texts and all(letter in text for text in texts):
            digits = len(texts[0].partition(letter)[0].lstrip("-").partition(".")[2])
            if all(f"{v:.{digits}{letter}}" == t for t, v in zip(texts, values, strict=True)):
                return {"exponent": letter, "padding": digits}
    return {}


def _warn_of_markers(path: str, column: Column, x: np.ndarray) -> None:
    """A warning of numbers such as 9999 or -99 that lie far from all others of a column, since they
    may stand for missing values."""
    values, counts = np.unique(x[~np.isnan(x)], return_counts=True)
    if column.kind == "categorical" or column.time or len(values) < 4:
        return
    inner = {-1: values[-2] - values[0], 0: values[-1] - values[1]}
    for end, spread in inner.items():
        gap = abs(values[end] - values[-2 if end else 1])
        text = f"{values[end]:g}"
        if counts[end] > 1 and gap > spread and re.fullmatch("-?99+", text.replace(".", "")):
            warnings.warn(
                f"{path}: column {column.name!r} has {text} in {counts[end]} rows, far from all"
                f" others: if it stands for a missing value, say missing={text}",
                stacklevel=3,
            )


def _text_numbers(
    table: Table,
    name: str,
    found: Texts,
    known: Sequence[int],
    parts: Sequence[Number | None],
    point: str | None,
    forced: str,
) -> tuple[Column, np.ndarray]:
    """A column of numbers that are written as text; a ValueError names the cells that are none.

    known: Indices of the texts that are not missing; parts: these texts as numbers.
    """
    here = np.zeros(len(found.texts), bool)

    def flagged(flags: Sequence[bool]) -> np.ndarray:
        here[:] = False
        here[list(known)] = flags
        return here

    bad = [part is None for part in parts]
    if any(bad):
        remedy = f"{_mend(found, flagged(bad))}or keep it as text by {_key('categorical', name)}"
        raise ValueError(_cell(table, found, flagged(bad), f"where a number is expected: {remedy}"))
    good = [part for part in parts if part is not None]
    counts = found.counts[list(known)]
    affixes = Counter[str]()
    templates: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    for part, n in zip(good, counts.tolist(), strict=True):
        affixes[affix(part.template)] += n
        templates[is_negative(part.template)][part.template] += n
    most = affixes.most_common(1)[0][0]
    if len(affixes) > 1:
        other = affixes.most_common(2)[1][0] or most
        what = f"written unlike most of the column: {other!r} stands in some of the cells alone"
        raise ValueError(
            _cell(table, found, flagged([affix(p.template) != most for p in good]), what)
        )
    cores = [part.core for part in good]
    style = _style(table, found, flagged, cores, counts, point)
    negative = [is_negative(part.template) for part in good]
    texts = [
        ("-" if minus else "") + plain(style, core)
        for minus, core in zip(negative, cores, strict=True)
    ]
    altered = [not is_kept(text) for text in texts]
    if any(altered):
        if not forced and all(core.isdecimal() for core in cores) and not any(negative):
            return _text_column(name, found)  # longer than float64 counts: codes
        keep = f"round it, or keep it by {_key('categorical', name)}"
        what = f"more digits than float64 holds: {keep}"
        raise ValueError(_cell(table, found, flagged(altered), what))
    values = np.array([float(text) for text in texts])
    if not np.isfinite(values).all():
        what = "which is no finite number"
        raise ValueError(_cell(table, found, flagged(~np.isfinite(values)), what))
    of_text = np.full(len(found.texts), np.nan)
    of_text[list(known)] = values
    column, x = _number_column(
        name,
        of_text[found.of_row],
        found,
        texts,
        values,
        _most_frequent(found, MISSING),
        forced,
    )
    if column.kind == "categorical":
        return column, x
    # A plus sign is the table's own where every number above zero has one.
    above = {p.template for p, v in zip(good, values, strict=True) if v > 0}
    plus = bool(above) and all("+" in template for template in above)
    ups = Counter({t: n for t, n in templates[False].items() if ("+" in t) == plus})
    up = (ups or templates[False] or Counter(["{}"])).most_common(1)[0][0]
    downs = templates[True] or Counter(["-" + up.replace("+", "")])
    if not templates[False]:
        up = re.sub(r"[-\u2212()]", "", downs.most_common(1)[0][0])
    return column._replace(
        point=style.point,
        thousands=style.thousands,
        positive=up,
        negative=downs.most_common(1)[0][0],
    ), x


def _style(
    table: Table,
    found: Texts,
    flagged: Callable[[Sequence[bool]], np.ndarray],
    cores: Sequence[str],
    counts: np.ndarray,
    point: str | None,
) -> Style:
    """The style of a column's numbers. point: The decimal mark of the table's other columns, where
    they show one."""
    styles = candidates(cores)
    if not styles:
        shares = {s: _share([fits(s, core) for core in cores], counts) for s in _SHOWN}
        best = max(shares, key=lambda s: shares[s])
        what = "written in another style than most of the column: decimal marks are mixed"
        raise ValueError(
            _cell(table, found, flagged([not fits(best, core) for core in cores]), what)
        )
    if all(len({plain(style, core) for style in styles}) == 1 for core in cores):
        return next((s for s in styles if s.point == point), styles[0])  # all read the same
    if point is not None:
        return next((s for s in styles if s.point == point), styles[0])
    if styles[0] == PLAIN:
        return PLAIN
    core = next(core for core in cores if not core.isdigit())
    readings = " or ".join(plain(style, core) for style in styles)
    raise ValueError(f"holds {core!r}, which may be {readings}: say decimal=',' or decimal='.'")


_SHOWN = (Style(), Style(","), Style(".", ","), Style(",", "."))


def _time_column(
    table: Table,
    name: str,
    found: Texts,
    known: Sequence[int],
    moments: Sequence[tuple | None],
    day_first: bool | None,
) -> tuple[Column, np.ndarray]:
    """A column of dates, of times or of both; a ValueError names the cells that are none."""
    counts = found.counts[list(known)]
    ways: Counter = Counter()
    for moment, n in zip(moments, counts.tolist(), strict=True):
        if moment is not None:  # May is a month in short and in full
            ways[moment[0]] += n if (moment[1]["b"] or "").lower() != "may" else 0
    way = ways.most_common(1)[0][0]
    parts = [moment[1] for moment in moments if moment is not None and moment[0] == way]
    order = "dm"
    if way.year_first is False:
        order = order_of(parts, way.sep)
        if order == "?" and day_first is not None:
            order = "dm" if day_first else "md"
        elif order == "?":
            cell = found.texts[known[0]]
            raise ValueError(
                f"holds dates such as {cell!r}, in which the day or the month may come first: say"
                " day_first=True or day_first=False"
            )
        elif not order:
            raise ValueError(
                "holds dates with the day first and dates with the month first: write them as"
                " 2024-12-31"
            )
    zones = Counter(part.get("zone") or "" for part in parts)
    zone = zones.most_common(1)[0][0]
    if len(zones) > 1:
        warnings.warn(
            f"{table.path}: column {name!r} has times of {len(zones)} zones,"
            f" {', '.join(map(repr, sorted(zones)))}; they are compared in UTC and written in"
            f" {zone!r}",
            stacklevel=4,
        )
    pattern = pattern_of(way, parts, order, zone)
    stray = [moment is None for moment in moments]
    if any(stray):
        flags = np.zeros(len(found.texts), bool)
        flags[list(known)] = stray
        remedy = _mend(found, flags).removesuffix(", ")
        raise ValueError(
            _cell(table, found, flags, f"where a date or a time is expected: {remedy}")
        )
    read = [read_moment(pattern, found.texts[k]) for k in known]
    wrong = Counter(reason for reason in read if isinstance(reason, str))
    if wrong:
        reason = next(r for r in read if isinstance(r, str))
        flags = np.zeros(len(found.texts), bool)
        flags[list(known)] = [r == reason for r in read]
        raise ValueError(_cell(table, found, flags, f"which {reason}"))
    micro = np.zeros(len(found.texts), np.int64)
    micro[list(known)] = read
    missing = np.ones(len(found.texts), bool)
    missing[list(known)] = False
    fractions = [len(part.get("f") or "") for part in parts]
    dots = Counter(part["dot"] for part in parts if part.get("dot"))
    column, x = _moments(
        name,
        micro[found.of_row],
        missing[found.of_row],
        pattern,
        max(fractions),
        min(fractions),
    )
    return column._replace(
        missing=_most_frequent(found, MISSING),
        point=dots.most_common(1)[0][0] if dots else ".",
    ), x


def _moments(
    name: str, micro: np.ndarray, missing: np.ndarray, pattern: str, most: int, fewest: int
) -> tuple[Column, np.ndarray]:
    """A column of whole microseconds [n]: days where the pattern has no time of day, else
    seconds."""
    _refuse_missing(float(missing.mean()))
    unit = SECOND if is_clocked(pattern) else DAY * SECOND
    k = np.unique(micro[~missing])
    if len(k) == 1:
        where = "where it is not missing" if missing.any() else "in every row"
        raise ValueError(f"is constant: the same time {where}")
    step = int(np.gcd.reduce(np.diff(k)))
    x = np.where(missing, np.nan, micro / unit)
    return Column(
        name,
        "lattice",
        step=step / unit,
        origin=float(k[0] / unit),
        decimals=most,
        padding=fewest,
        low=float(k[0] / unit),
        high=float(k[-1] / unit),
        time=pattern,
    ), x


def _time_cells(name: str, cells: np.ndarray, zoned: bool) -> tuple[Column, np.ndarray]:
    """A column of datetime64, written in the form of ISO 8601."""
    micro, missing = microseconds(cells), np.isnat(cells)
    most = 0 if not (micro % SECOND).any() else 3 if not (micro % 1000).any() else 6
    pattern = "%Y-%m-%d" if not (micro % (DAY * SECOND)).any() else "%Y-%m-%d %H:%M:%S"
    pattern += "Z" if zoned and is_clocked(pattern) else ""
    column, x = _moments(name, micro, missing, pattern, most, most)
    return column._replace(missing="" if missing.any() else None), x


def _column(
    table: Table, j: int, forced: str, point: str | None, day_first: bool | None
) -> tuple[Column, np.ndarray]:
    """What a column is, and its encoded rows [n]; a ValueError says why it cannot be modeled."""
    name, cells = table.names[j], table.cells[j]
    if cells.dtype.kind == "M":
        return _time_cells(name, cells, "," in str(table.dtypes[j]) if table.dtypes else False)
    if cells.dtype.kind != "O":
        x = microseconds(cells) / SECOND if cells.dtype.kind == "m" else cells
        x = np.where(np.isnat(cells), np.nan, x) if cells.dtype.kind == "m" else x
        if np.isinf(x).any():
            i = int(np.argmax(np.isinf(x)))
            raise ValueError(f"row {table.lines[i]} holds {x[i]}, which is no finite number")
        missing = "" if np.isnan(x).any() else None
        if forced == "categorical":
            _refuse_missing(float(np.isnan(x).mean()))
            return _text_column(name, distinct(number_texts(x)))
        whole = x[~np.isnan(x)]
        if not forced and len(whole) and (whole // 1e4 > 1899).all() and (whole < 2.1e7).all():
            found = distinct(number_texts(x))
            days = [text for text in found.texts if text]
            if len(days) > 2 and all(isinstance(read_moment("%Y%m%d", t), int) for t in days):
                known = [k for k, text in enumerate(found.texts) if text]
                moments = [split_moment(found.texts[k]) for k in known]
                return _time_column(table, name, found, known, moments, day_first)
        return _number_column(name, x, None, (), x, missing, forced)
    found = distinct(cells)
    dtype = str(table.dtypes[j]) if table.dtypes else ""
    if forced == "categorical" or dtype == "category" or "bool" in dtype:
        return _text_column(name, found)
    known = [k for k, text in enumerate(found.texts) if text.lower() not in MISSING]
    if not known:
        return _text_column(name, found)
    counts, texts = found.counts[known], [found.texts[k] for k in known]
    if any(split_moment(text) for text in texts[:1000]):
        moments = [split_moment(text) for text in texts]
        compact = any(m is not None and m[0].sep == "" and m[0].year_first for m in moments)
        valid = compact and all(
            m is not None and isinstance(read_moment("%Y%m%d", text), int)
            for m, text in zip(moments, texts, strict=True)
        )
        timed = (
            valid and len(texts) > 2
            if compact
            else _share([m is not None for m in moments], counts) >= 0.5
        )
        if timed and forced != "numeric":
            return _time_column(table, name, found, known, moments, day_first)
    if forced != "numeric" and len(texts) > 2 and all(map(split_month, texts)):
        return _time_column(table, name, found, known, list(map(split_month, texts)), day_first)
    if forced == "numeric" or any(split_number(text) for text in texts[:1000]):
        parts = [split_number(text) for text in texts]
        if forced == "numeric" or _share([part is not None for part in parts], counts) >= 0.5:
            good = [part for part in parts if part is not None]
            coded = all(p.template == "{}" and p.core.isdigit() for p in good) and any(
                p.core[0] == "0" and len(p.core) > 1 for p in good
            )
            if forced == "numeric" or not coded:
                return _text_numbers(table, name, found, known, parts, point, forced)
            return _text_column(name, found, f"; {_key('numeric', name)} takes it as a number")
    return _text_column(name, found)


def _decimal_mark(table: Table) -> str | None:
    """The decimal mark that the columns of text show where they can be read in one way alone; else
    the one that goes with the delimiter, None where that says nothing."""
    marks: Counter[str] = Counter()
    for cells in table.cells:
        if cells.dtype.kind != "O":
            continue
        parts = [
            split_number(text)
            for text in dict.fromkeys(cells[:10_000].tolist())
            if text.lower() not in MISSING
        ]
        good = [part for part in parts if part is not None]
        if 2 * len(good) < len(parts) or not any(set(p.core) & set(".,") for p in good):
            continue
        styles = candidates([part.core for part in good])
        if len(styles) == 1:
            marks[styles[0].point] += 1
    if marks:
        return marks.most_common(1)[0][0]
    return "." if table.delimiter == "," else None


def find_schema(
    table: Table,
    *,
    categorical: tuple[str, ...] = (),
    numeric: tuple[str, ...] = (),
    decimal: str | None = None,
    day_first: bool | None = None,
) -> tuple[Column, ...]:
    """What each column of a table is.

    A column holds dates, times or numbers if at least half of the cells that are not missing do;
    then all of them must. Numbers may have a decimal comma, marks between thousands, a percent sign
    or a currency, the same in every cell; dates may have a month's English name. Whole numbers with
    leading zeros are codes, so text, and so are numbers of 7 digits or more that spread like
    identifiers, and those above 2^53. A column of 0 and 1 alone has two categories. In a column of
    text a missing value is a category like any other. A warning names numbers such as 9999 or -99
    that lie far from all others, see `read_table`'s `missing`.

    Args:
        table: From `read_table`.
        categorical: Names of columns that are taken as categories, numbers or not.
        numeric: Names of columns that are taken as numbers, where they look like codes or count
            the rows.
        decimal: The decimal mark, ',' or '.', where a column's numbers can be read both ways and
            the rest of the table does not show it.
        day_first: Whether dates such as 03/04/2024 have the day first; None looks for a number
            above 12.

    Returns:
        A `Column` for each column.

    Raises:
        ValueError: For columns that have no density or cannot be read, all of them in one message,
            with the reason of each and the remedy: a constant, an empty or a nearly empty column,
            one that repeats or recodes another, text that names its rows or has too many
            categories, and cells that are unlike the rest of their column.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> table = data.read_table(np.array([[1.5, 2.0], [3.0, 4.0], [np.nan, 7.0]]))
        >>> [(column.kind, column.step, column.missing) for column in data.find_schema(table)]
        [('lattice', 1.5, ''), ('lattice', 1.0, None)]
    """
    for chosen in (*categorical, *numeric):
        if chosen not in table.names:
            raise ValueError(
                f"{table.path} has no column {chosen!r}; the table has"
                f" {', '.join(map(repr, table.names))}"
            )
        if chosen in categorical and chosen in numeric:
            raise ValueError(f"{chosen!r} is given as categorical and as numeric")
    if decimal not in (None, ".", ","):
        raise ValueError(f"expected decimal='.' or ',', got {decimal!r}")
    point = decimal or _decimal_mark(table)
    schema, values, findings = [], [], {}
    for j, name in enumerate(table.names):
        forced = "categorical" if name in categorical else "numeric" if name in numeric else ""
        try:
            column, x = _column(table, j, forced, point, day_first)
        except ValueError as error:
            findings[name] = str(error)
            continue
        _warn_of_markers(table.path, column, x)
        schema.append(column._replace(**_type_of(table, j)))
        values.append(x)
    findings |= _repeated(schema, values)
    if findings:
        raise ValueError(_said(table, findings))
    return tuple(schema)


def _said(table: Table, findings: dict[str, str]) -> str:
    """All findings of a table in one message, in the order of its columns."""
    names = [name for name in table.names if name in findings]
    drop = _key("drop", *names)
    if len(names) == 1:
        return f"{table.path}: column {names[0]!r} {findings[names[0]]}; leave it out with {drop}"
    lines = "".join(f"\n  column {name!r} {findings[name]}" for name in names)
    return (
        f"{table.path}: {len(names)} columns cannot be modeled as they are:{lines}\nLeave them out"
        f" with {drop}"
    )


def _repeated(schema: Sequence[Column], values: Sequence[np.ndarray]) -> dict[str, str]:
    """Columns that hold the same as one before them, in its numbers and texts or in others.

    Of numbers of full precision no density is left; steps and categories are modeled all the same,
    with a warning."""
    first: dict[bytes, list[int]] = {}
    found = {}
    for j, (column, x) in enumerate(zip(schema, values, strict=True)):
        if len(x) < LEAST:
            continue
        _, start, inverse, counts = np.unique(
            x, return_index=True, return_inverse=True, return_counts=True
        )
        # Distinct values go with any others, and two sensors may fail or read zero together.
        known = counts[:-1] if np.isnan(x).any() else counts
        repeats = known.sum() - known.max() - (len(known) - 1)
        order = np.argsort(np.argsort(start))  # numbered as they come in the table
        codes = order[inverse.reshape(-1)].astype(np.int32)
        digest = hashlib.sha256(codes.tobytes()).digest()
        for other in first.setdefault(digest, []):
            before = schema[other]
            same = column.categories == before.categories and np.array_equal(
                x, values[other], equal_nan=True
            )
            if same:
                found[column.name] = f"repeats column {before.name!r}"
            elif repeats >= 5:
                found[column.name] = (
                    f"is a recoding of column {before.name!r}: {len(start)} values that go with"
                    f" its {len(start)} one by one"
                )
            if column.name in found:
                if column.kind != "continuous":
                    warnings.warn(
                        f"column {column.name!r} {found.pop(column.name)}; it is modeled like the"
                        f" others, and {_key('drop', column.name)} leaves it out",
                        stacklevel=3,
                    )
                break
        first[digest].append(j)
    return found
