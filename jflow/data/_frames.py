"""Encoded rows as a DataFrame of the types that the table had."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jflow.data._schema import Column, write_column
from jflow.data._tables import numbers
from jflow.data._writing import DAY, SECOND, is_clocked, is_dated, is_monthly, is_zoned

if TYPE_CHECKING:
    import pandas as pd


def to_frame(schema: tuple[Column, ...], x: np.ndarray) -> "pd.DataFrame":
    """Encoded rows as a DataFrame of the types that the table had.

    The columns of a DataFrame or of an array come back in their types. Those of a file come back as
    what they hold: numbers, dates as datetime64, true and false as booleans, and text. What is
    missing is pandas' own missing value, and whole numbers with missing ones are of type Int64.

    Args:
        schema: From `find_schema`.
        x: Encoded rows, [n, columns].

    Returns:
        A DataFrame of n rows.

    Examples:
        >>> import pandas as pd
        >>> from jflow import data
        >>> day = pd.to_datetime(["2024-03-01", "2024-03-04", None])
        >>> frame = pd.DataFrame({"day": day, "sold": [3, 5, 4]})
        >>> table = data.read_table(frame)
        >>> schema = data.find_schema(table)
        >>> data.to_frame(schema, data.encode(schema, table)).equals(frame)
        True
    """
    import pandas as pd

    series = {
        column.name: _series(column, np.asarray(x[:, j], np.float64))
        for j, column in enumerate(schema)
    }
    return pd.DataFrame(series)


def _series(column: Column, x: np.ndarray) -> "pd.Series":
    """Encoded numbers [n] of one column in the type that the table had."""
    import pandas as pd

    dtype = column.dtype
    if column.kind == "categorical":
        return _category_series(column, x)
    missing = np.isnan(x)
    if dtype in ("object", "str", "string") or dtype.startswith("string"):
        return _text_series(write_column(column, x), missing, dtype)
    if column.time and re.match(r"u?int|float", dtype.lower()):  # such as 20241231
        worth = numbers(np.array(write_column(column, x), object))
        return _number_series(np.where(missing, np.nan, worth), dtype, True)
    if column.time and is_monthly(column.time):
        texts = _text_series(write_column(column, x), missing, "")
        return texts.astype(dtype) if dtype else texts
    if column.time:
        if not is_dated(column.time) and not dtype:
            return _text_series(write_column(column, x), missing, "")
        unit = SECOND if is_clocked(column.time) else DAY * SECOND
        reach = 9e15 if "[ns" in dtype else 9e18  # what int64 holds of nanoseconds, in microseconds
        micro = np.rint(np.clip(np.where(missing, 0, x) * unit, -reach, reach)).astype(np.int64)
        moments = micro.astype("datetime64[us]")
        moments[missing] = np.datetime64("NaT", "us")
        finest = ("s", "ms", "us")[-(-min(column.decimals or 0, 6) // 3)]
        times = pd.Series(moments if dtype else moments.astype(f"datetime64[{finest}]"))
        zoned = "," in dtype or (not dtype and is_zoned(column.time))
        if zoned:
            times = times.dt.tz_localize("UTC")
        return times.astype(dtype) if dtype else times
    if dtype.startswith("timedelta"):
        spans = np.rint(np.where(missing, 0, x) * SECOND).astype("timedelta64[us]")
        spans[missing] = np.timedelta64("NaT", "us")
        return pd.Series(spans).astype(dtype)
    return _number_series(x, dtype, column.decimals == 0)


def _number_series(x: np.ndarray, dtype: str, whole: bool) -> "pd.Series":
    """Numbers [n] in pandas' type; '' for int64 where they are whole, Int64 if some are missing."""
    import pandas as pd

    missing = np.isnan(x)
    whole = whole and bool(np.abs(x[~missing]).max(initial=0) < 2**63)
    kind = dtype or (("Int64" if missing.any() else "int64") if whole else "float64")
    if "int" in kind.lower():
        found = re.search(r"u?int\d+", kind.lower())
        most = np.iinfo(found[0] if found else "int64")
        whole_x = np.rint(np.clip(np.where(missing, 0, x), most.min, most.max))
        array = pd.array(whole_x.astype(most.dtype)).astype(kind) if missing.any() else None
        if array is None:
            return pd.Series(whole_x.astype(most.dtype)).astype(kind)
        array[missing] = pd.NA
        return pd.Series(array)
    series = pd.Series(x).astype(kind)
    return series.mask(missing) if missing.any() else series


def _text_series(texts: Sequence[str], missing: np.ndarray, dtype: str) -> "pd.Series":
    import pandas as pd

    values = np.array(texts, object)
    values[missing] = None if dtype == "object" else np.nan
    if dtype == "object":
        return pd.Series(values, dtype=object)
    if dtype.startswith("string"):
        return pd.Series(values).astype(dtype)
    return pd.Series(values) if not missing.all() else pd.Series(values, dtype=object)


def _category_series(column: Column, x: np.ndarray) -> "pd.Series":
    import pandas as pd

    dtype, codes = column.dtype, np.clip(np.nan_to_num(x), 0, None).astype(int)
    texts = np.array(column.categories, object)[codes]
    missing = np.isnan(x) | (texts == column.missing if column.missing is not None else False)
    if dtype == "category":
        levels = list(column.levels or ())
        place = {str(level).strip(): k for k, level in enumerate(levels)}
        index = [-1 if m else place[t] for m, t in zip(missing, texts, strict=True)]
        return pd.Series(pd.Categorical.from_codes(index, levels, ordered=column.ordered))
    known = [text for text in column.categories if text != column.missing]
    boolean = {text.lower() for text in known} <= {"true", "false"}
    if "bool" in dtype or (boolean and not dtype):
        flags = pd.array([text.lower() == "true" for text in texts], dtype="boolean")
        flags[missing] = pd.NA
        return pd.Series(flags).astype(dtype or ("boolean" if missing.any() else "bool"))
    worth = numbers(np.array(known, object))
    coded = any(re.match(r"[+-]?0\d", text) for text in known)
    if np.abs(worth).max(initial=0) > 2**53 and (not dtype or "int" in dtype.lower()):
        if not dtype:
            return _text_series(texts.tolist(), missing, dtype)
        exact = [pd.NA if m else int(t) for m, t in zip(missing, texts, strict=True)]
        return pd.Series(exact, dtype=dtype)
    numeric = not np.isnan(worth).any() and not coded and dtype == ""
    if numeric or re.match(r"u?int|float|Int|UInt|Float", dtype):
        values = numbers(texts)
        values[missing] = np.nan
        whole = bool((worth == np.rint(worth)).all()) and not any("." in text for text in known)
        return _number_series(values, dtype, whole)
    return _text_series(texts.tolist(), missing, dtype)
