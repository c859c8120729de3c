"""How tables write numbers, dates and times, and what such a text is worth."""

import datetime
import functools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

BLANKS = " \u00a0\u202f"
_SIGN = r"[+\-\u2212]"
_CODES = "EUR|USD|GBP|CHF|JPY|CNY|SEK|NOK|DKK|PLN|CZK|HUF|RON|TRY|RUB|AUD|CAD|NZD|INR|BRL|MXN|ZAR"
_CURRENCY = rf"(?:[A-Z]{{0,3}}[$€£¥₹₽₩₺₪₫฿₴₦]|{_CODES}|Euro|kr\.?|Kč|zł|Ft|Fr\.)"
_NUMBER = re.compile(
    rf"(?P<lead>\(?{_SIGN}?[{BLANKS}]?(?:{_CURRENCY}[{BLANKS}]?)?{_SIGN}?)"
    rf"(?P<core>(?:\d(?:[\d.,'’{BLANKS}]*[\d.,])?|[.,]\d+)(?:[eE][+-]?\d+)?)"
    rf"(?P<tail>(?:[{BLANKS}]?(?:[%‰]|{_CURRENCY}))?[{BLANKS}]?-?\)?)",
    re.ASCII,
)
_SIMPLE = re.compile(r"(-?)((?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)", re.ASCII)
_UNIT = re.compile(rf"(?P<core>\S*\d)[{BLANKS}]?[^\d\s.,;:/()-]{{1,8}}")


class Style(NamedTuple):
    """The marks of a number: the one before its decimals, and the one between its thousands, or
    ''."""

    point: str = "."
    thousands: str = ""


PLAIN = Style()
STYLES = (
    PLAIN,
    Style(","),
    *(Style(point, mark) for mark in ",.'’" + BLANKS for point in ".," if mark != point),
)


class Number(NamedTuple):
    """A number's text in two: `template` with {} for its digits, and the digits with their
    marks."""

    template: str
    core: str


def split_number(text: str) -> Number | None:
    """A text as a number with its sign, currency or percent sign; None where it is none in any
    style."""
    if simple := _SIMPLE.fullmatch(text):  # most numbers; the rest takes ten times as long
        return Number("-{}" if simple[1] else "{}", simple[2])
    found = _NUMBER.fullmatch(text)
    if not found:
        return None
    lead, tail = found["lead"], found["tail"]
    signs = len(re.findall(_SIGN, lead + tail)) + (lead[:1] == "(")
    if signs > 1 or (lead[:1] == "(") != (tail[-1:] == ")"):
        return None
    if sum(bool(re.sub(rf"{_SIGN}|[(){BLANKS}]", "", part)) for part in (lead, tail)) > 1:
        return None  # a currency on both sides
    core = found["core"]
    if not _pattern(PLAIN).fullmatch(core) and not any(
        _pattern(style).fullmatch(core) for style in STYLES
    ):
        return None
    return Number(f"{lead}{{}}{tail}", core)


@functools.cache
def is_negative(template: str) -> bool:
    return bool(re.search(r"[-\u2212(]", template))


@functools.cache
def affix(template: str) -> str:
    """What a template has beside a sign: a currency, a percent sign, or ''."""
    return re.sub(rf"{_SIGN}|[(){{}}{BLANKS}]", "", template)


@functools.cache
def _pattern(style: Style) -> re.Pattern:
    point, mark = map(re.escape, style)
    whole = rf"(?:[1-9]\d{{0,2}}(?:{mark}\d{{3}})+|\d+)" if mark else r"\d+"
    return re.compile(rf"(?:{whole}(?:{point}\d*)?|{point}\d+)(?:[eE][+-]?\d+)?", re.ASCII)


def fits(style: Style, core: str) -> bool:
    """Whether the digits and marks of a number are written in a style."""
    return _pattern(style).fullmatch(core) is not None


def plain(style: Style, core: str) -> str:
    """Digits in a style as Python writes them."""
    if style == PLAIN:
        return core
    return (core.replace(style.thousands, "") if style.thousands else core).replace(
        style.point, "."
    )


def candidates(cores: Sequence[str]) -> list[Style]:
    """The styles in which all of the numbers can be read, of those whose marks occur."""
    if all(core.isdigit() for core in cores):
        return [PLAIN]
    marks = {c for c in set("".join(cores)) if not c.isalnum() and c not in "+-"}
    if not marks:
        return [PLAIN]
    both = "." if "." in marks or "," not in marks else ","
    return [
        style
        for style in STYLES
        if (style.thousands in marks if style.thousands else True)
        and (style.point in marks or (style.thousands and style.point == _other(style, both)))
        and all(map(_pattern(style).fullmatch, cores))
    ]


def _other(style: Style, point: str) -> str:
    """The point of a style whose numbers have no decimals: `point`, if the thousands do not take
    it."""
    return point if style.thousands != point else {".": ",", ",": "."}[point]


def dress(text: str, style: Style, positive: str, negative: str) -> str:
    """A number in Python's writing, such as -1234.5, in that of a table."""
    minus, digits = text[:1] == "-", text.lstrip("+-")
    if style.thousands:
        whole, point, rest = digits.partition(".")
        groups = [whole[max(i - 3, 0) : i] for i in range(len(whole), 0, -3)]
        digits = style.thousands.join(reversed(groups)) + point.replace(".", style.point) + rest
    elif style.point != ".":
        digits = digits.replace(".", style.point)
    template = negative if minus else positive
    if not minus and text[:1] != "+":
        template = template.replace("+", "")
    return template.replace("{}", digits)


def has_unit(text: str) -> bool:
    """Whether a text is a number with something behind it, such as '12 kg'."""
    found = _UNIT.fullmatch(text)
    return found is not None and split_number(found["core"]) is not None


# Dates and times. A pattern has strftime's codes, with %-d for a day without a leading zero and %^b
# for a month in capitals; a fraction of a second stands behind %S and is no part of it, and a zone
# is written out. A pattern without a day is of months, which are counted as days are elsewhere.

_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September"),
    *("October", "November", "December"),
)
_NAMES = {  # of the months, by their code; May is short and long
    "%B": _MONTHS,
    "%^B": tuple(name.upper() for name in _MONTHS),
    "%b": tuple(name[:3] for name in _MONTHS),
    "%^b": tuple(name[:3].upper() for name in _MONTHS),
}
_CODE_OF_NAME = {name: code for code, names in _NAMES.items() for name in names}
_ZONE = r"Z|UTC|GMT|[+-]\d{2}(?::?\d{2})?"
_CLOCK = (
    r"(?P<H>\d{1,2}):(?P<M>\d\d)(?::(?P<S>\d\d)(?:(?P<dot>[.,])(?P<f>\d{1,9}))?)?"
    r"(?P<half> ?[AaPp][Mm])?"
)
_CLOCKED = rf"(?:(?P<gap>[T ])?{_CLOCK}(?P<zone> ?(?:{_ZONE}))?)?"
_MOMENT = re.compile(
    r"(?:(?P<a>\d{4}|\d{1,2})(?P<sep>[-./])(?P<b>\d{1,2})(?P=sep)(?P<c>\d{4}|\d{1,2}))?" + _CLOCKED,
    re.ASCII,
)
_DAY, _NAME, _YEAR = r"(?P<a>\d{1,2})", r"(?P<b>[A-Za-z]{3,9})", r"(?P<c>\d{4}|\d\d)"
_WITH_NAMES = {  # forms of a date with a month's name, and how they are put together again
    re.compile(date + _CLOCKED, re.ASCII): frame
    for date, frame in (
        (rf"{_DAY}(?P<one>\. |[-/. ]?){_NAME}(?P<two>,?[-/. ]?){_YEAR}", "{{d}}{one}{b}{two}{{y}}"),
        (rf"{_NAME}(?P<one>[- ]){_DAY}(?P<two>,? |-){_YEAR}", "{b}{one}{{d}}{two}{{y}}"),
    )
}
_COMPACT = re.compile(r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])", re.ASCII)
_MONTHLY = {  # forms of a month without a day, and their patterns; a dot would make it a number
    re.compile(form, re.ASCII): frame
    for form, frame in (
        (r"(?:19|20)\d\d(?P<sep>[-/])(?:0[1-9]|1[0-2])", "%Y{sep}%m"),
        (r"(?:0[1-9]|1[0-2])(?P<sep>[-/])(?:19|20)\d\d", "%m{sep}%Y"),
        (r"(?P<b>[A-Za-z]{3,9})(?P<sep>[- ])(?:19|20)\d\d", "{b}{sep}%Y"),
        (r"(?:19|20)\d\d(?P<sep>[- ])(?P<b>[A-Za-z]{3,9})", "%Y{sep}{b}"),
    )
}
_CODES_OF = {
    "%Y": r"(?P<Y>\d{4})",
    "%y": r"(?P<y>\d{2})",
    "%m": r"(?P<m>\d{1,2})",
    "%-m": r"(?P<m>\d{1,2})",
    **{code: rf"(?P<b>{'|'.join(names)})" for code, names in _NAMES.items()},
    "%d": r"(?P<d>\d{1,2})",
    "%-d": r"(?P<d>\d{1,2})",
    "%H": r"(?P<H>\d{1,2})",
    "%-H": r"(?P<H>\d{1,2})",
    "%I": r"(?P<H>\d{1,2})",
    "%-I": r"(?P<H>\d{1,2})",
    "%p": r"(?P<half>[AaPp][Mm])",
    "%P": r"(?P<half>[AaPp][Mm])",
    "%M": r"(?P<M>\d{2})",
    "%S": r"(?P<S>\d{2})(?:[.,](?P<f>\d{1,9}))?",
}
_CODE = re.compile(r"%[-^]?[A-Za-z]")
DAY = 86_400
SECOND = 1_000_000  # in microseconds


class Moment(NamedTuple):
    """How one date or time is written: what a column's cells have to share."""

    year_first: bool | None  # None without a date
    sep: str  # between the numbers of a date; of one with a month's name the whole, '{d} %b {y}'
    gap: str
    clock: str  # '', 'HM' or 'HMS', and a p where it is am or pm
    zone: bool


def split_moment(text: str) -> tuple[Moment, dict[str, str | None]] | None:
    """A text as a date, a time or both, by the looks of it; None where it is none."""
    if len(text) == 8 and _COMPACT.fullmatch(text):
        whole: dict[str, str | None] = {"a": text[:4], "b": text[4:6], "c": text[6:]}
        return Moment(True, "", "", "", False), whole
    found = _MOMENT.fullmatch(text) if text[:1].isdigit() else None
    if not found:
        return _split_named(text)
    part = found.groupdict()
    dated = part["a"] is not None
    if not dated and part["H"] is None or dated and part["H"] and not part["gap"]:
        return None
    if not dated and (part["gap"] or part["zone"]):
        return None
    year_first = dated and len(part["a"]) == 4
    if dated and (len(part["c"]) > 2 if year_first else len(part["c"]) not in (2, 4)):
        return None
    moment = Moment(
        year_first if dated else None,
        part["sep"] or "",
        part["gap"] or "",
        _clock(part),
        bool(part["zone"]),
    )
    return moment, part


def _split_named(text: str) -> tuple[Moment, dict[str, str | None]] | None:
    """`split_moment` of a date that has the month's name."""
    for form, frame in _WITH_NAMES.items():
        found = form.fullmatch(text)
        if found and (code := _CODE_OF_NAME.get(found["b"])):
            part = found.groupdict()
            if part["H"] and not part["gap"]:
                return None
            sep = frame.format(**{**part, "b": code})
            return Moment(False, sep, part["gap"] or "", _clock(part), bool(part["zone"])), part
    return None


def split_month(text: str) -> tuple[Moment, dict[str, str | None]] | None:
    """A text as a month of a year, such as 2024-03 or Mar 2024; None where it is none."""
    for form, frame in _MONTHLY.items():
        if found := form.fullmatch(text):
            part = {"b": None} | found.groupdict()
            code = _CODE_OF_NAME.get(part["b"] or "")
            if part["b"] and not code:
                return None
            return Moment(True, frame.format(sep=part["sep"], b=code), "", "", False), part
    return None


def _clock(part: dict[str, str | None]) -> str:
    clock = "HMS" if part["S"] else "HM" if part["H"] else ""
    return clock + ("p" if part["half"] else "")


def order_of(parts: Iterable[dict[str, str | None]], sep: str) -> str:
    """The order of day and month, 'dm' or 'md', in dates that end in the year: by the numbers
    above 12. '' where both orders occur, '?' where each would do; a dotted date has the day first
    if it can, and one with a month's name leaves no doubt."""
    if "%" in sep:
        return "dm"
    first = second = 0
    for part in parts:
        first, second = max(first, int(part["a"] or 0)), max(second, int(part["b"] or 0))
    if first > 12 and second > 12:
        return ""
    if first <= 12 and second <= 12:
        return "dm" if sep == "." else "?"
    return "dm" if first > 12 else "md"


def pattern_of(
    moment: Moment, parts: Sequence[dict[str, str | None]], order: str, zone: str
) -> str:
    """The pattern of a column's dates and times. order: 'dm' or 'md', where the year is last."""

    def code(letter: str, group: str) -> str:
        texts = [part[group] or "" for part in parts]
        bare = any(len(t) == 1 for t in texts) and not any(t[:1] == "0" and t[1:] for t in texts)
        return f"%-{letter}" if bare else f"%{letter}"

    date = ""
    if "%Y" in moment.sep:  # of months
        return moment.sep
    if moment.year_first:
        date = moment.sep.join(("%Y", code("m", "b"), code("d", "c")))
    elif moment.year_first is not None:
        year = "%Y" if len(parts[0]["c"] or "") == 4 else "%y"
        if "%" in moment.sep:
            date = moment.sep.format(d=code("d", "a"), y=year)
        else:
            date = moment.sep.join((code(order[0], "a"), code(order[1], "b"), year))
    clock = ":".join(f"%{letter}" for letter in moment.clock.strip("Hp"))
    half = next((part["half"] for part in parts if part.get("half")), None) or ""
    hour = code("I" if half else "H", "H") + ":" if clock else ""
    if half:  # strftime's %p is AM, and %P am
        clock += half[:-2] + ("%p" if half[-1] == "M" else "%P")
    return date + moment.gap + hour + clock + zone


@functools.cache
def _reader(pattern: str) -> tuple[re.Pattern, int | None]:
    """How to read a pattern, and its zone as seconds ahead of UTC."""
    zone = re.search(rf" ?(?:{_ZONE})$", pattern)
    body = pattern[: zone.start()] if zone else pattern
    pieces, end = [], 0
    for code in _CODE.finditer(body):
        pieces += [re.escape(body[end : code.start()]), _CODES_OF[code[0]]]
        end = code.end()
    if zone:
        pieces.append(rf"(?P<zone> ?(?:{_ZONE}))")
    return re.compile("".join(pieces), re.ASCII), _offset(zone[0]) if zone else None


def _offset(zone: str) -> int:
    digits = zone.strip().replace(":", "")
    if digits.isalpha():  # Z, UTC, GMT
        return 0
    seconds = 3600 * int(digits[1:3]) + 60 * int(digits[3:5] or 0)
    return -seconds if digits[0] == "-" else seconds


def is_dated(pattern: str) -> bool:
    return re.search(r"%[-^]?[mbB]", pattern) is not None


def is_monthly(pattern: str) -> bool:
    return is_dated(pattern) and re.search(r"%-?d", pattern) is None


def is_clocked(pattern: str) -> bool:
    return "%M" in pattern


def is_zoned(pattern: str) -> bool:
    return _reader(pattern)[1] is not None


def read_moment(pattern: str, text: str) -> int | str:
    """A date or a time as whole microseconds, since 1970 in UTC or since midnight, a month as if
    it were a day; or what is wrong with it."""
    form, _ = _reader(pattern)
    found = form.fullmatch(text)
    if not found:
        return "is not written like the rest of the column"
    part = found.groupdict()
    days = 0
    if is_dated(pattern):
        year = int(part["Y"]) if "Y" in part else (int(part["y"]) + 31) % 100 + 1969
        month = int(part["m"]) if "m" in part else _month(part["b"])
        if is_monthly(pattern):
            if not 1 <= month <= 12:
                return "is a date that does not exist"
            return (12 * (year - 1970) + month - 1) * DAY * SECOND
        try:
            days = datetime.date(year, month, int(part["d"])).toordinal() - 719_163
        except ValueError:
            return "is a date that does not exist"
    if not is_clocked(pattern):
        return days * DAY * SECOND
    hour, minute, second = int(part["H"]), int(part["M"]), int(part.get("S") or 0)
    half = (part.get("half") or "").lower()
    if half and not 1 <= hour <= 12:
        return "is no time of day"
    hour = hour % 12 + 12 * (half == "pm") if half else hour
    if hour > 23 or minute > 59 or second > 59:
        return "is no time of day: write a duration as a number, of hours or seconds"
    fraction = (part.get("f") or "").ljust(6, "0")
    if fraction[6:].strip("0"):
        return "is finer than a microsecond, which float64 does not hold: round it"
    seconds = days * DAY + 3600 * hour + 60 * minute + second
    if part.get("zone"):
        seconds -= _offset(part["zone"])
    return seconds * SECOND + int(fraction[:6])


def _month(name: str) -> int:
    return _NAMES[_CODE_OF_NAME[name]].index(name) + 1


def write_moments(
    pattern: str, microseconds: np.ndarray, most: int, fewest: int, dot: str
) -> list[str]:
    """Whole microseconds [n] as text; a fraction of `most` digits, left out where it is zero if
    `fewest` is 0."""
    _, offset = _reader(pattern)
    local = microseconds + (offset or 0) * SECOND
    days, rest = np.divmod(local, DAY * SECOND)
    second, micro = np.divmod(rest, SECOND)
    dates = days.astype("datetime64[M]" if is_monthly(pattern) else "datetime64[D]")
    months = dates.astype("datetime64[M]")
    values = {
        "d": (dates.astype("datetime64[D]") - months).astype(np.int64) + 1,
        "m": months.astype(np.int64) % 12 + 1,
        "Y": months.astype(np.int64) // 12 + 1970,
        "H": second // 3600,
        "M": second // 60 % 60,
        "S": second % 60,
    }
    values["y"] = values["Y"] % 100
    values["I"] = (values["H"] + 11) % 12 + 1
    late = values["H"] >= 12
    words = {"%p": np.where(late, "PM", "AM"), "%P": np.where(late, "pm", "am")}
    words |= {code: np.array(names)[values["m"] - 1] for code, names in _NAMES.items()}
    template, columns, end = "", [], 0
    for code in _CODE.finditer(pattern):
        letter = code[0][-1]
        if code[0] in words:
            template += pattern[end : code.start()] + "{}"
            columns.append(words[code[0]].tolist())
            end = code.end()
            continue
        width = "" if "-" in code[0] else "04" if letter == "Y" else "02"
        template += pattern[end : code.start()] + f"{{:{width}d}}"
        columns.append(values[letter].tolist())
        if letter == "S" and most:
            template += "{}"
            digits = (f"{dot}{f:06d}".ljust(most + 1, "0")[: most + 1] for f in micro.tolist())
            columns.append(
                list(digits)
                if fewest
                else ["" if not f else d for d, f in zip(digits, micro.tolist(), strict=True)]
            )
        end = code.end()
    template += pattern[end:]
    return [template.format(*row) for row in zip(*columns, strict=True)]
