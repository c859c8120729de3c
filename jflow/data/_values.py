"""Single values of a column, as a user gives and reads them."""

from typing import Any

import numpy as np

from jflow._core.hints import hint
from jflow.data._schema import Column, encode, to_text
from jflow.data._tables import Table, read_table


def encode_value(column: Column, value: Any) -> float:
    """One value of a column as the number that `encode` makes of it.

    Args:
        column: From `find_schema`.
        value: A number, a date, a category, None or NaN for a missing value; or text, written as
            the table writes it or as Python does.

    Returns:
        The number; NaN for a missing number.

    Raises:
        ValueError: For what the column cannot hold, with the nearest category.

    Examples:
        >>> from jflow import data
        >>> sex = data.Column("sex", "categorical", step=1.0, high=1.0, categories=("F", "M"))
        >>> data.encode_value(sex, "M")
        1.0
    """
    import pandas as pd

    readings = [value]
    if isinstance(value, str) and column.time:
        readings.append(pd.to_datetime(value, errors="coerce"))
    elif isinstance(value, str) and column.kind != "categorical":
        readings.append(pd.to_numeric(value, errors="coerce"))
    elif isinstance(value, bool | np.bool_):
        readings.append(str(value))
    refused = None
    for reading in readings:
        given = isinstance(reading, str) or not pd.isna(reading)
        if not given and reading is not value:
            continue
        try:
            return float(encode((column,), _of_one(column, reading if given else ""))[0, 0])
        except ValueError as error:
            refused = error
    reason = str(refused).partition(f"column {column.name!r}: ")[2] or str(refused)
    if column.kind == "categorical":
        known = ", ".join(map(repr, column.categories[:10]))
        more = f" and {len(column.categories) - 10} more" if len(column.categories) > 10 else ""
        reason += f"; {hint(str(value), column.categories)}it has {known}{more}"
    else:
        reason += f"; the table writes its values as in {value_text(column, column.low)!r}"
    raise ValueError(f"column {column.name!r}: {reason}") from None


def _of_one(column: Column, value: Any) -> Table:
    import pandas as pd

    if isinstance(value, str):
        cells = np.array([value], object)
        return Table((column.name,), (cells,), np.arange(1), True, "the value")
    return read_table(pd.DataFrame({column.name: [value]}))


def value_text(column: Column, x: float) -> str:
    """An encoded number of a column as the table writes it.

    Args:
        column: From `find_schema`.
        x: The number.

    Returns:
        The text.
    """
    return to_text((column,), np.array([[x]]))[0][0]
