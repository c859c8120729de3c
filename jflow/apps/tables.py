"""A density for a user's own table: its rows, their preprocessing and the base of its flow. See
`jflow fit`."""

import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import data
from jflow._core.files import expand
from jflow._core.seeds import generator
from jflow.data import Column, Preprocess, Splits, Table

LEAST_ROWS = 10
TRAIN, VALID, TEST = "train", "valid", "test"


class Prepared(NamedTuple):
    """A table ready to be fitted: its encoded rows [n, d], the same with the one fixed noise, and
    each row's part."""

    table: Table
    schema: tuple[Column, ...]
    encoded: np.ndarray
    noisy: np.ndarray
    part: np.ndarray

    def rows(self, part: str) -> dict[str, np.ndarray]:
        return {"x": self.noisy[self.part == part]}

    def test_rows_in_train(self) -> np.ndarray:
        """bool [test rows]: which of them, before the noise, also stand in the training part."""
        group, _ = identical_rows(self.encoded)
        return np.isin(group[self.part == TEST], group[self.part == TRAIN])


def prepare(
    path: str | Path,
    *,
    columns: tuple[str, ...] | None = None,
    drop: tuple[str, ...] = (),
    categorical: tuple[str, ...] = (),
    header: bool | None = None,
    group_repeated: bool = False,
    seed: int = 0,
) -> Prepared:
    """Read, find the kinds of columns, dequantize once, and cut all rows at random 80 / 10 / 10 by
    `seed`.

    Repeated rows are kept: how often a row stands in a table is part of what is to be learned, and
    a table without its repeats has another distribution.
    group_repeated: whether identical rows (the table's own repeats) all go to one part, drawn at
    random, so that no test row was seen in training. ValueError where that would change the
    distribution of the columns in the parts, see
    `grouped_parts`. Other errors name the file, and the line and column where there is one.
    """
    table = data.read_table(path, header=header, columns=columns, drop=drop)
    schema = data.find_schema(table, categorical=categorical)
    encoded = data.encode(schema, table)
    missing = np.isnan(encoded)
    if missing.any():
        i, j = np.argwhere(missing)[np.argsort(np.argwhere(missing)[:, 1], kind="stable")][0]
        raise ValueError(
            f"{path}: line {table.lines[i]}, column {table.names[j]!r}: a missing value where"
            f" numbers are expected ({missing[:, j].sum()} such cells in this column)"
        )
    n = len(encoded)
    if n < LEAST_ROWS:
        raise ValueError(f"{path}: the table has {n} rows; a fit needs at least {LEAST_ROWS}")
    if group_repeated:
        part = grouped_parts(path, encoded, seed)
    else:
        part = np.full(n, TRAIN, dtype=object)
        parts = data.split({"i": np.arange(n)}, valid=0.1, test=0.1, seed=seed)
        for name, rows in ((VALID, parts.valid), (TEST, parts.test)):
            if rows is not None:
                part[rows["i"]] = name
    noisy = data.add_noise(schema, encoded, np.random.default_rng((seed, 1)))
    return Prepared(table, schema, encoded, noisy, part)


def identical_rows(encoded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(group [n], sizes [groups]): the number of the distinct row that each row is, and how often
    each stands there."""
    _, group, sizes = np.unique(encoded, axis=0, return_inverse=True, return_counts=True)
    return group.reshape(-1), sizes


def grouped_parts(path: str | Path, encoded: np.ndarray, seed: int) -> np.ndarray:
    """The part of each row [n], 80 / 10 / 10 or nearly, with identical rows in one part, drawn at
    random.

    Whole groups make the parts differ more than single rows do. The fraction of a part's rows that
    lie in some set, such as below a threshold in a column, has a standard deviation sqrt(sum of
    sizes^2 / n) times as large, and the largest group is in one part and absent from the others.
    ValueError, with the counts, where that factor exceeds 2, where the largest group has over
    sqrt(n) / 2 rows (the most that a count in n single rows has as its standard deviation), or
    where there are fewer than 10 distinct rows.
    """
    group, sizes = identical_rows(encoded)
    n, distinct, largest = len(encoded), len(sizes), int(sizes.max())
    factor = math.sqrt((sizes.astype(float) ** 2).sum() / n)
    if distinct < LEAST_ROWS or factor > 2 or largest > max(2, math.sqrt(n) / 2):
        raise ValueError(
            f"{path}: group_repeated=True would change the distribution of the columns in the"
            f" parts: the table has {distinct} distinct rows in {n}, and one of them {largest}"
            " times; leave it False, and read the scores of the test rows that do not stand in"
            " train"
        )
    order = np.random.default_rng(seed).permutation(distinct)
    rows = np.concatenate([[0], np.cumsum(sizes[order])])  # that the first k groups hold
    of_group, start = np.full(distinct, TRAIN, dtype=object), 0
    for name in (TEST, VALID):
        end = int(np.searchsorted(rows, rows[start] + max(1, round(0.1 * n))))
        of_group[order[start:end]] = name
        start = end
    return of_group[group]


KEYS = (
    "table",
    "fingerprint",
    "columns",
    "drop",
    "categorical",
    "header",
    "group_repeated",
    "seed",
)


def loader(
    *,
    table: str,
    fingerprint: str,
    columns: str,
    drop: str,
    categorical: str,
    header,
    group_repeated,
    seed: int,
) -> Callable[[], Prepared]:
    """`prepare` by the values of a config (names as 'a,b', '' for none), run when first called and
    then kept.

    fingerprint: of the file this run is for, '' for any; another file is an error.
    """

    def names(text: str) -> tuple[str, ...]:
        return tuple(name.strip() for name in text.split(",")) if text else ()

    def load() -> Prepared:
        found = digest(table)
        if fingerprint and fingerprint != found:
            raise ValueError(f"{table}: the table has changed since this run was started")
        named = names(columns) or None, names(drop), names(categorical)
        return _prepare(table, found, *named, header, group_repeated, seed)

    return load


@functools.lru_cache(maxsize=2)
def _prepare(path, digest, columns, drop, categorical, header, group_repeated, seed):
    options = {"columns": columns, "drop": drop, "categorical": categorical, "header": header}
    return prepare(path, **options, group_repeated=group_repeated, seed=seed)


def digest(path: str | Path) -> str:
    """A fingerprint of the bytes of a file, so that a run is not resumed on another table."""
    return hashlib.sha256(expand(path).read_bytes()).hexdigest()[:16]


def splits(load: Callable[[], Prepared]) -> Callable[[], Splits]:
    """The three parts of a table as rows {'x': float64 [n, d]}: table units, dequantized."""
    return lambda: Splits(*(load().rows(part) for part in (TRAIN, VALID, TEST)))


def preprocess(load: Callable[[], Prepared]) -> Preprocess:
    """Standardization whose state carries the columns of the table as well; `undo` floors to their
    lattices.

    Rows in data units are then {'x': float64 [n, d]} of lattice values, codes and continuous
    numbers; `as_text` and
    `as_arrays` give them the table's form. log_det counts whole numbers and categories as mass (see
    `data.find_schema`).
    """
    base = data.standardize()

    def fit(rows):
        prepared = load()
        columns = [column._asdict() for column in prepared.schema]
        return {**base.fit(rows), "columns": columns, "header": prepared.table.header}

    def undo(state, rows):
        rows = base.undo(state, rows)
        return {**rows, "x": data.decode(columns_of(state), rows["x"])}

    def log_det(state, rows):
        return base.log_det(state, rows) + data.log_mass_unit(columns_of(state))

    return Preprocess(fit, base.apply, undo, log_det)


def is_table(state) -> bool:
    """Whether a preprocess state is one of `preprocess`."""
    return isinstance(state, dict) and "columns" in state and "header" in state


def columns_of(state) -> tuple[Column, ...]:
    return tuple(Column(**{**c, "categories": tuple(c["categories"])}) for c in state["columns"])


def as_text(state, x: np.ndarray) -> tuple[list[str] | None, list[list[str]]]:
    """(header or None, rows of cells) of rows [n, d] in data units, written as the table is."""
    schema = columns_of(state)
    return ([c.name for c in schema] if state["header"] else None), data.to_text(schema, x)


def as_arrays(state, x: np.ndarray) -> dict[str, np.ndarray]:
    """An array [n] for each column, by name: int64 for whole numbers that it holds, text for
    categories, else float64."""
    arrays = {}
    for j, column in enumerate(columns_of(state)):
        if column.kind == "categorical":
            value = np.array(column.categories)[x[:, j].astype(int)]
        else:
            whole = column.decimals == 0 and max(abs(column.low), abs(column.high)) < 2**63
            value = x[:, j].astype(np.int64) if whole else x[:, j]
        name = column.name if column.name and column.name not in arrays else f"column {j + 1}"
        arrays[name] = value
    return arrays


def log_prob(flow, *, batch: int = 1024) -> Callable:
    """(params, y [n, d] in model units) -> [n] nats in float64. Rows are padded to a power of two,
    `batch` at most."""
    compiled = jax.jit(flow.log_prob)

    def apply(params, y):
        out = np.empty(len(y))
        size = min(batch, 1 << (len(y) - 1).bit_length())
        for i in range(0, len(y), size):
            chunk = np.asarray(y[i : i + size])
            padded = np.pad(chunk, ((0, size - len(chunk)), (0, 0)), mode="edge")
            out[i : i + size] = np.asarray(compiled(params, padded))[: len(chunk)]
        return out

    return apply


def evaluate(flow) -> Callable:
    """(params, state, key, splits) -> nats per row of validation and test rows, negated; counted as
    in the report."""
    density = log_prob(flow)

    def apply(params, state, key, splits):
        unit = data.log_mass_unit(columns_of(state)) - float(np.log(state["std"]).sum())
        scores = {}
        for name, rows in zip(("valid", "test"), splits[1:], strict=True):
            y = data.standardize().apply(state, rows, None)["x"]
            scores[f"{name}_nll"] = -float(density(params, y).mean()) - unit
        return scores

    return apply


def init_on_rows(model, load: Callable[[], Prepared], *, most: int = 20_000) -> Callable:
    """(key, batch) -> params, initialized on up to `most` standardized training rows instead of on
    one batch."""

    def init(key, batch):
        rows, base = load().rows(TRAIN), data.standardize()
        x = base.apply(base.fit(rows), rows, None)["x"]
        chosen = generator("init_on_rows", 0).permutation(len(x))[:most]
        return jax.jit(model.init)(key, jnp.asarray(x[chosen]))

    return init
