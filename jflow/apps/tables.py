"""A model for a user's own table: its rows, their preprocessing, and the experiment that trains
it. See `jflow.apps.tabular` and `jflow fit`."""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jflow import data, flows, losses
from jflow._core.files import expand
from jflow._core.lock import hold
from jflow._core.seeds import generator
from jflow.apps import Experiment
from jflow.apps._experiment import claim, sources_of
from jflow.data import Column, Marginal, Preprocess, Splits, Table
from jflow.flows import AnyOrder, MixedRows, Within
from jflow.train import checkpoint, init_state

LEAST_ROWS = 10
TRAIN, VALID, TEST = "train", "valid", "test"
ORDER_ROWS, ORDER_CODES = 20_000, 32  # what the order of the columns is found from
RANDOM = 0.25  # of the rows of an update are in random orders of the columns
VALID_ROWS = 2048  # that an evaluation scores, repeated where there are fewer


class Prepared(NamedTuple):
    """A table ready to be fitted: its encoded rows [n, d] (NaN where missing), each row's part, and
    how many rows were left out for a missing value."""

    table: Table
    schema: tuple[Column, ...]
    encoded: np.ndarray
    part: np.ndarray
    dropped: int = 0

    def rows(self, part: str) -> dict[str, np.ndarray]:
        return {"x": self.encoded[self.part == part]}

    def test_rows_in_train(self) -> np.ndarray:
        """bool [test rows]: which of them also stand in the training part."""
        group, _ = identical_rows(self.encoded)
        return np.isin(group[self.part == TEST], group[self.part == TRAIN])


def prepare(
    table: Any,
    *,
    columns: tuple[str, ...] | None = None,
    drop: tuple[str, ...] = (),
    categorical: tuple[str, ...] = (),
    numeric: tuple[str, ...] = (),
    decimal: str | None = None,
    day_first: bool | None = None,
    header: bool | None = None,
    missing: tuple[str, ...] = (),
    drop_missing: bool = False,
    group_repeated: bool = False,
    seed: int = 0,
) -> Prepared:
    """Read a path, a DataFrame or an array, find the kinds of columns, and cut all rows at random
    80 / 10 / 10 by `seed`.

    Repeated rows are kept: how often a row stands in a table is part of what is to be learned, and
    a table without its repeats has another distribution.
    drop_missing: whether rows with a missing value are left out; else a missing value is a value
    like any other.
    group_repeated: whether identical rows (the table's own repeats) all go to one part, drawn at
    random, so that no test row was seen in training. ValueError where that would change the
    distribution of the columns in the parts, see `grouped_parts`. Other errors name the file, and
    the line and column where there is one.
    """
    table = data.read_table(table, header=header, columns=columns, drop=drop, missing=missing)
    dropped = 0
    if drop_missing:
        whole = ~np.any(data.missing_cells(table), axis=1)
        dropped, table = int((~whole).sum()), data.take_rows(table, np.flatnonzero(whole))
    n = table.rows
    if n < LEAST_ROWS:
        of = f" without a missing value, of {n + dropped}" if dropped else ""
        many = "1 sample (one row)" if n == 1 else f"{n} rows"
        raise ValueError(
            f"{table.path}: the table has {many}{of}; a fit needs at least {LEAST_ROWS}"
        )
    schema = data.find_schema(
        table, categorical=categorical, numeric=numeric, decimal=decimal, day_first=day_first
    )
    encoded = data.encode(schema, table)
    if group_repeated:
        part = grouped_parts(table.path, encoded, seed)
    else:
        part = np.full(n, TRAIN, dtype=object)
        parts = data.split({"i": np.arange(n)}, valid=0.1, test=0.1, seed=seed)
        for name, rows in ((VALID, parts.valid), (TEST, parts.test)):
            if rows is not None:
                part[rows["i"]] = name
    return Prepared(table, schema, encoded, part, dropped)


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


def digest(path: str | Path) -> str:
    """A fingerprint of the bytes of a file, so that a run is not resumed on another table."""
    return hashlib.sha256(expand(path).read_bytes()).hexdigest()[:16]


def digest_rows(prepared: Prepared) -> str:
    """A fingerprint of encoded rows, for a table that is no file."""
    return hashlib.sha256(np.ascontiguousarray(prepared.encoded).tobytes()).hexdigest()[:16]


class Shape(NamedTuple):
    """What a model needs to know of its table: the codes of each column, whether it has numbers,
    the ends of the numbers in the table, in model units, and the order of the columns in its
    density, () in the config of a run from before there was one."""

    codes: tuple[int, ...]
    numbers: tuple[bool, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    order: tuple[int, ...] = ()


def shape_of(marginals: tuple[Marginal, ...], order: tuple[int, ...]) -> Shape:
    def end(marginal, value):
        return float(data.to_normal(marginal, np.array([value]))[0]) if marginal.number else 0.0

    return Shape(
        tuple(len(m.values) for m in marginals),
        tuple(m.number for m in marginals),
        tuple(end(m, m.low) for m in marginals),
        tuple(end(m, m.high) for m in marginals),
        tuple(order),
    )


def find_order(
    schema: tuple[Column, ...], marginals: tuple[Marginal, ...], x: np.ndarray
) -> tuple[int, ...]:
    """The columns, those that the others explain best first.

    A column that the others nearly fix is easy to learn anywhere; one that they say little of, such
    as what a table is meant to predict, is learned far better given all others than as a reason for
    each of them. Explained is the share of variance by a linear regression on the normal scores of
    the other columns, their squares and their codes: of the inverse P of all covariances G, block j
    gives 1 - tr(P_jj^-1) / tr(G_jj). It is found from 20,000 rows at equal distances, since a file
    may be sorted, and of a column of more codes from the 32 most frequent.
    """
    x = x[np.linspace(0, len(x) - 1, min(len(x), ORDER_ROWS)).astype(int)]
    rows = data.to_codes_and_numbers(schema, marginals, x, np.full(x.shape, 0.5))
    features = []
    for j, marginal in enumerate(marginals):
        code, kinds = rows["code"][:, j], len(marginal.values)
        counts = np.bincount(code[(code >= 0) & (code < kinds)], minlength=kinds)
        frequent = np.sort(np.argsort(-counts, kind="stable")[:ORDER_CODES])
        parts = [code[:, None] == frequent]
        if marginal.number:
            z = np.where(code == kinds, np.clip(rows["x"][:, j], -3.0, 3.0), 0.0)
            parts.append(np.stack([z, z**2], 1))
        block = np.concatenate(parts, 1).astype(np.float64)
        features.append(block - block.mean(0))
    ends = np.cumsum([0, *(block.shape[1] for block in features)])
    covariance = np.concatenate(features, 1)
    covariance = covariance.T @ covariance / len(x)
    covariance += np.diag(1e-3 * np.diag(covariance) + 1e-9)  # the codes of a column add up to one
    precision, left = np.linalg.inv(covariance), []
    for start, end in itertools.pairwise(ends):
        rest = np.linalg.inv(precision[start:end, start:end])
        left.append(np.trace(rest) / np.trace(covariance[start:end, start:end]))
    return tuple(int(j) for j in np.argsort(left, kind="stable"))


class Programs(NamedTuple):
    """A model of a shape of tables, and its compiled functions."""

    model: AnyOrder
    init: Callable
    evaluate: Callable
    log_prob: Callable
    sample: Callable


@functools.lru_cache(maxsize=16)
def programs(
    codes: tuple[int, ...],
    numbers: tuple[bool, ...],
    order: tuple[int, ...],
    width: int,
    num_blocks: int,
    bins: int,
) -> Programs:
    """The programs of a shape, kept: fits of a process that share it compile them once."""
    model = flows.any_order(
        codes, numbers, width=width, num_blocks=num_blocks, bins=bins, order=order
    )

    def init(key, batch):
        return model.init(key, MixedRows(batch["code"][:1], batch["x"][:1]))

    return Programs(model, jax.jit(init), evaluate(model), log_prob(model), jax.jit(model.sample))


def within(shape: Shape) -> Within:
    """All codes, and the numbers of the table's range: nothing is drawn beyond what was seen."""
    most = max(k + has for k, has in zip(shape.codes, shape.numbers, strict=True))
    ends = (np.array(end, np.float32) for end in (shape.low, shape.high))
    return Within(np.ones((len(shape.codes), most), bool), *ends)


def experiment(
    load: Callable[[], Prepared],
    shape: Shape,
    *,
    width: int,
    num_blocks: int,
    bins: int,
    dropout: float,
    learning_rate: float,
    weight_decay: float,
    steps: int,
    batch: int,
    eval_every: int,
    patience: int | None,
    ema: float,
    seed: int,
) -> Experiment:
    """The training of a `flows.any_order` model on the rows of a table, by values of the
    config `configs/table.py`."""
    if not shape.order:
        raise ValueError(
            "this model of a table is from before its columns had an order (config.json has no"
            " 'order'), and its density is not the one that would be computed now: fit the table"
            " again into another folder, jflow fit TABLE --out DIR"
        )
    options: dict[str, Any] = {"width": width, "num_blocks": num_blocks, "bins": bins}
    options["order"] = shape.order
    compiled = programs(shape.codes, shape.numbers, **options)
    trained = flows.any_order(shape.codes, shape.numbers, dropout=dropout, **options)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(200, steps), steps + 1, 0.01 * learning_rate
    )
    bounds, d = within(shape), len(shape.codes)

    def sample(params, key, n):
        nothing = MixedRows(np.zeros((n, d), np.int32), np.zeros((n, d), np.float32))
        rows, _ = compiled.sample(params, key, nothing, np.zeros((n, d), bool), bounds)
        return {"x": rows.value, "code": rows.code}

    return Experiment(
        model=compiled.model,
        init=compiled.init,
        loss=losses.any_order_nll(trained, RANDOM),
        optimizer=optax.chain(
            optax.clip_by_global_norm(5.0), optax.adamw(schedule, weight_decay=weight_decay)
        ),
        data=lambda: Splits(*(load().rows(part) for part in (TRAIN, VALID, TEST))),
        preprocess=preprocess(load),
        steps=steps,
        batch=batch,
        seed=seed,
        ema=ema,
        sample=sample,
        evaluate=compiled.evaluate,
        eval_every=eval_every,
        save_every=1000,
        monitor="valid_nll",
        patience=patience,
    )


def preprocess(load: Callable[[], Prepared]) -> Preprocess:
    """From encoded rows {'x': float64 [n, d]} to codes and numbers {'x', 'code'} (see
    `data.to_codes_and_numbers`). The state carries the columns of the table and their marginals;
    `undo` floors to their lattices.

    `to_frame` and `as_text` give rows in data units the table's form. log_det counts whole numbers
    and categories as mass (see `data.find_schema`).
    """

    def fit(rows):
        prepared = load()
        return {
            "columns": [column._asdict() for column in prepared.schema],
            "marginals": [m._asdict() for m in data.find_marginals(prepared.schema, rows["x"])],
            "header": prepared.table.header,
            "delimiter": prepared.table.delimiter or ",",  # none of a spreadsheet; blanks
        }

    def apply(state, rows, rng):
        rng = generator("cells", 0) if rng is None else rng
        x, noise = rows["x"], rng.random(rows["x"].shape)
        return data.to_codes_and_numbers(columns_of(state), marginals_of(state), x, noise)

    def undo(state, rows):
        x = data.from_codes_and_numbers(marginals_of(state), rows)
        return {"x": data.decode(columns_of(state), x)}

    def log_det(state, rows):
        return data.log_slopes(columns_of(state), marginals_of(state), rows).sum(1)

    return Preprocess(fit, apply, undo, log_det)


def is_table(state: Any) -> bool:
    """Whether a preprocess state is one of `preprocess`."""
    return isinstance(state, dict) and "columns" in state and "header" in state


def _as_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}


def columns_of(state: Mapping[str, Any]) -> tuple[Column, ...]:
    return tuple(Column(**_as_tuples(column)) for column in state["columns"])


def marginals_of(state: Mapping[str, Any]) -> tuple[Marginal, ...]:
    return tuple(Marginal(**_as_tuples(marginal)) for marginal in state["marginals"])


def as_text(state: Mapping[str, Any], x: np.ndarray) -> tuple[list[str] | None, list[list[str]]]:
    """(header or None, rows of cells) of rows [n, d] in data units, written as the table is."""
    schema = columns_of(state)
    return ([c.name for c in schema] if state["header"] else None), data.to_text(schema, x)


def as_arrays(state: Mapping[str, Any], x: np.ndarray) -> dict[str, np.ndarray]:
    """An array [n] for each column, by name: int64 for whole numbers that it holds, text for
    categories, else float64 with NaN where missing."""
    arrays: dict[str, np.ndarray] = {}
    for j, column in enumerate(columns_of(state)):
        if column.kind == "categorical":
            value = np.array(column.categories)[x[:, j].astype(int)]
        else:
            whole = column.decimals == 0 and max(abs(column.low), abs(column.high)) < 2**63
            whole = whole and not np.isnan(x[:, j]).any()
            value = x[:, j].astype(np.int64) if whole else x[:, j]
        name = column.name if column.name and column.name not in arrays else f"column {j + 1}"
        arrays[name] = value
    return arrays


def log_prob(model: AnyOrder, *, batch: int = 1024) -> Callable:
    """(params, rows {'x', 'code'}, observed [d] bool) -> [n] nats in float64 of the cells that are
    not observed; -inf for a row with a code -1 (see `data.to_codes_and_numbers`). Rows are padded
    to a power of two, `batch` at most."""
    compiled = jax.jit(model.log_prob)

    def apply(params, rows, observed):
        known, n = (rows["code"] >= 0).all(1), len(rows["code"])
        out = np.empty(n)
        size = min(batch, 1 << (n - 1).bit_length())
        for i in range(0, n, size):
            code, x = (rows[name][i : i + size] for name in ("code", "x"))
            short = ((0, size - len(code)), (0, 0))
            code, x = np.pad(np.maximum(code, 0), short, "edge"), np.pad(x, short, "edge")
            seen = np.broadcast_to(observed, code.shape)
            nats = compiled(params, MixedRows(jnp.asarray(code), jnp.asarray(x)), jnp.asarray(seen))
            out[i : i + size] = np.asarray(nats)[: n - i]
        return np.where(known, out, -np.inf)

    return apply


def evaluate(model: AnyOrder) -> Callable:
    """(params, state, key, splits) -> the negative log-likelihood of validation rows, nats per row,
    in the orders of the training (`losses.any_order_nll`)."""
    loss, pre = losses.any_order_nll(model, RANDOM), preprocess(_no_table)
    score = jax.jit(lambda params, key, batch: loss(params, key, batch)[0])

    def apply(params, state, key, splits):
        if splits.valid is None:
            return {}
        x = splits.valid["x"]
        order = generator("evaluate", 0).permutation(len(x))
        rows = pre.apply(state, {"x": x[np.resize(order, VALID_ROWS)]}, None)
        known = (rows["code"] >= 0).all(1)
        rows["code"] = np.maximum(rows["code"], 0)
        batch = {**rows, "weight": known.astype(np.float32)}
        return {
            "valid_nll": float(score(params, key, batch)) - pre.log_det(state, rows)[known].mean()
        }

    return apply


def _no_table() -> Prepared:
    raise ValueError("there is no table: expected table=PATH, as `jflow fit PATH` sets it")


def write_run(
    folder: Path,
    config: Path,
    values: Mapping[str, Any],
    params: Any,
    state: Mapping[str, Any],
    step: int,
) -> Path:
    """A folder as `apps.run` leaves it: the config, its values and one checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder):
        claim(folder, sources_of(config), dict(values))
        start = init_state(params, optax.identity(), jax.random.key(0))
        checkpoint.save(folder, step, start, extra={"preprocess": state})
    return folder


@functools.lru_cache(maxsize=2)
def _prepared(table: str, fingerprint: str, options: tuple) -> Prepared:
    return prepare(table, **dict(options))


def loader(*, table: str, fingerprint: str, **options: Any):
    """`prepare` of a path by the values of a config, run when first called and then kept.

    fingerprint: of the file this run is for, '' for any; another file is an error."""

    def load() -> Prepared:
        if not table:
            return _no_table()
        found = digest(table)
        if fingerprint and fingerprint != found:
            raise ValueError(f"{table}: the table has changed since this run was started")
        named = {**options, "columns": tuple(options["columns"]) or None}
        return _prepared(table, found, tuple(sorted(named.items())))

    return load


def shape_of_table(load) -> Shape:
    prepared = load()
    x = prepared.rows(TRAIN)["x"]
    marginals = data.find_marginals(prepared.schema, x)
    return shape_of(marginals, find_order(prepared.schema, marginals, x))
