"""Columns of a table as codes and numbers near a standard normal: what a model of mixed rows reads.

A category is a code. A numeric column has a code for each value of a probability of its own, such
as no rain or a missing value, and its other numbers go through a monotone map that carries their
distribution to a standard normal nearly.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri

from jflow.data._recognize import spikes
from jflow.data._schema import Column, log_mass_unit, steps

MOST_VALUES = 32  # so many distinct values of a lattice all get codes
MOST_SPIKES = 256
LEAST_ROWS = 10  # of a value with a code
NEAR = 5  # cells to each side with which a spike of a lattice is compared


class Marginal(NamedTuple):
    """What the rows of a table say of one column.

    JSON by `_asdict`, back by `Marginal(**d)`.

    Attributes:
        values: The values that have codes, in the order of the codes from 0: the codes of a
            category themselves, else numbers in increasing order, and NaN last where values are
            missing.
        number: Whether the column holds other numbers too; their code is len(values).
        knots: Numbers, increasing.
        normal: What the map to a standard normal makes of the knots; it is linear between and
            beyond them.
        low: The least number in the table.
        high: The largest, with the width of its cell.
    """

    values: tuple[float, ...]
    number: bool = False
    knots: tuple[float, ...] = ()
    normal: tuple[float, ...] = ()
    low: float = 0.0
    high: float = 0.0


def find_marginals(schema: tuple[Column, ...], x: np.ndarray) -> tuple[Marginal, ...]:
    """Find what each column's codes and numbers are.

    Of a lattice of at most 32 distinct values all have codes; else those of at least 10 rows that
    stand alone (at most 2 of the 10 cells around them are in the table) or stand out (5 times as
    often as the mean of those). Of a continuous column those that `spikes` names.

    Args:
        schema: From `find_schema`.
        x: Encoded training rows, [n, columns]; NaN where missing.

    Returns:
        A `Marginal` for each column.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> rain = np.where(np.arange(100) % 2, 0.0, np.arange(100) / 7)[:, None]
        >>> data.find_marginals((data.Column("rain", "continuous"),), rain)[0].values
        (0.0,)
    """
    return tuple(_marginal(column, x[:, j]) for j, column in enumerate(schema))


def _marginal(column: Column, x: np.ndarray) -> Marginal:
    if column.kind == "categorical":
        return Marginal(tuple(float(k) for k in range(len(column.categories))))
    known = x[~np.isnan(x)]
    values = _spikes(column, known)
    rest = known[~np.isin(known, values)]
    rest = np.sort(rest if len(rest) >= LEAST_ROWS else known)
    if column.step:  # the middle of each cell's rows, so that the map is of the spread cells
        rest = rest + column.step * (np.arange(len(rest)) * 0.6180339887498949 % 1.0)
    outer = ndtri(1 - 0.5 / len(rest))
    z = np.linspace(-outer, outer, int(np.clip(len(rest) // 50, 2, 64)) + 1)
    knots = np.quantile(rest, ndtr(z))
    apart = knots - np.maximum.accumulate(np.r_[-np.inf, knots[:-1]]) > 1e-9 * np.ptp(knots)
    knots, z = knots[apart], z[apart]
    if len(knots) < 2:
        knots, z = (
            knots[0] + (column.step or max(1.0, abs(knots[0]))) * np.arange(2.0),
            np.arange(2.0),
        )
    codes = (*np.sort(values).tolist(), *([np.nan] if len(known) < len(x) else []))
    low, high = float(known.min()), float(known.max() + column.step)
    return Marginal(codes, True, tuple(knots.tolist()), tuple(z.tolist()), low, high)


def _spikes(column: Column, x: np.ndarray) -> np.ndarray:
    if not column.step:
        return spikes(x)[:MOST_SPIKES]
    values, counts = np.unique(x, return_counts=True)
    if len(values) <= MOST_VALUES:
        return values
    cells = np.rint((values - column.origin) / column.step)
    around = []
    for offset in (*range(-NEAR, 0), *range(1, NEAR + 1)):
        there = np.minimum(np.searchsorted(cells, cells + offset), len(cells) - 1)
        around.append(np.where(cells[there] == cells + offset, counts[there], 0))
    there = np.array(around) > 0
    alone = there.sum(0) <= 2
    typical = np.sum(around, axis=0) / np.maximum(there.sum(0), 1)
    spike = (counts >= LEAST_ROWS) & (alone | (counts >= 5 * typical))
    most = np.argsort(-counts * spike, kind="stable")[: min(MOST_SPIKES, spike.sum())]
    return values[np.sort(most)]


def to_codes_and_numbers(
    schema: tuple[Column, ...],
    marginals: tuple[Marginal, ...],
    x: np.ndarray,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Encoded rows as codes and numbers near a standard normal.

    Args:
        schema: From `find_schema`.
        marginals: From `find_marginals`.
        x: Encoded rows, [n, columns]; NaN where missing.
        rng: A numpy generator, which spreads the numbers of a lattice over their cells.

    Returns:
        {'x': float32 [n, columns] the numbers, 0 beside another code; 'code': int32 [n, columns]}.
        A missing value in a column that had none has the code -1, as a category has that is none of
        the codes.
    """
    noise = steps(schema) * rng.random(x.shape)
    code, z = np.empty(x.shape, np.int32), np.zeros(x.shape, np.float32)
    for j, marginal in enumerate(marginals):
        values, v = np.array(marginal.values), x[:, j]
        missing, finite = np.isnan(v), values[~np.isnan(values)]
        place = np.minimum(np.searchsorted(finite, v), max(len(finite) - 1, 0))
        found = finite[place] == v if len(finite) else np.zeros(len(v), bool)
        other = len(values) if marginal.number else -1
        code[:, j] = np.where(found, place, other)
        code[missing, j] = len(finite) if len(finite) < len(values) else -1
        if marginal.number:
            number = ~found & ~missing
            z[number, j] = to_normal(marginal, v[number] + noise[number, j])
    return {"x": z, "code": code}


def from_codes_and_numbers(
    marginals: tuple[Marginal, ...], rows: Mapping[str, np.ndarray]
) -> np.ndarray:
    """The way back: rows that `decode` floors to their lattices.

    Args:
        marginals: From `find_marginals`.
        rows: {'x', 'code'}, [n, columns] each.

    Returns:
        float64 [n, columns], NaN where missing.
    """
    code = np.asarray(rows["code"])
    x = np.empty(code.shape)
    for j, marginal in enumerate(marginals):
        values = np.array([*marginal.values, 0.0])
        x[:, j] = values[code[:, j]]
        if marginal.number:
            number = code[:, j] == len(marginal.values)
            x[number, j] = from_normal(marginal, np.asarray(rows["x"], np.float64)[number, j])
    return x


def log_slopes(
    schema: tuple[Column, ...], marginals: tuple[Marginal, ...], rows: Mapping[str, np.ndarray]
) -> np.ndarray:
    """What the log-density of each cell gains on its way to the table's units.

    From codes and numbers, that is.

    Args:
        schema: From `find_schema`.
        marginals: From `find_marginals`.
        rows: {'x', 'code'}, as `to_codes_and_numbers` returned them.

    Returns:
        float64 [n, columns], nats. A number gains the log-slope of its map and, where the column
        counts as mass (whole numbers), the log-width of its cell. The code of a number whose column
        counts as density loses the log-width of its cell; a spike of a continuous column stays a
        probability, as a category and a missing value do.
    """
    gains = np.zeros(rows["code"].shape)
    for j, (column, marginal) in enumerate(zip(schema, marginals, strict=True)):
        if not marginal.number:
            continue
        code, z = rows["code"][:, j], np.asarray(rows["x"], np.float64)[:, j]
        of_number = _log_slope(marginal, z) + log_mass_unit((column,))
        of_value = -np.log(column.step) if column.step and not column.is_mass else 0.0
        known = ~np.isnan(np.array([*marginal.values, 0.0]))[code]
        gains[:, j] = np.where(
            code == len(marginal.values), of_number, np.where(known, of_value, 0.0)
        )
    return gains


def _slopes(marginal: Marginal) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(knots, normal, slopes [segments + 2]); beyond the knots the least of the outer three, since
    one gap between two of the last rows says little."""
    knots, normal = np.array(marginal.knots), np.array(marginal.normal)
    inner = np.diff(normal) / np.diff(knots)
    return knots, normal, np.r_[inner[:3].min(), inner, inner[-3:].min()]


def to_normal(marginal: Marginal, x: np.ndarray) -> np.ndarray:
    """The map of a column's numbers to a standard normal nearly.

    Args:
        marginal: Of the column.
        x: [n], numbers.

    Returns:
        [n].
    """
    knots, normal, slopes = _slopes(marginal)
    below, above = np.minimum(x - knots[0], 0.0), np.maximum(x - knots[-1], 0.0)
    return np.interp(x, knots, normal) + slopes[0] * below + slopes[-1] * above


def from_normal(marginal: Marginal, z: np.ndarray) -> np.ndarray:
    """The inverse of `to_normal`.

    Args:
        marginal: Of the column.
        z: [n].

    Returns:
        [n], numbers.
    """
    knots, normal, slopes = _slopes(marginal)
    below, above = np.minimum(z - normal[0], 0.0), np.maximum(z - normal[-1], 0.0)
    return np.interp(z, normal, knots) + below / slopes[0] + above / slopes[-1]


def _log_slope(marginal: Marginal, z: np.ndarray) -> np.ndarray:
    _, normal, slopes = _slopes(marginal)
    return np.log(slopes)[np.searchsorted(normal, z, side="right")]
