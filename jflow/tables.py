"""`jflow fit`: a density for a user's own table."""

import functools
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jflow import data
from jflow.data import Column, Preprocess, Splits, Table
from jflow.data.sinks import csv_sink, replacing
from jflow.metrics import gaussian_log_prob, log_mean_exp

LEAST_ROWS = 10
TRAIN, VALID, TEST, REPEATED = "train", "valid", "test", "repeated"


class Prepared(NamedTuple):
    """A table ready to be fitted: its encoded rows [n, d], the same with the one fixed noise, and the part of each row."""

    table: Table
    schema: tuple[Column, ...]
    encoded: np.ndarray
    noisy: np.ndarray
    part: np.ndarray

    def rows(self, part: str) -> dict[str, np.ndarray]:
        return {"x": self.noisy[self.part == part]}


def prepare(
    path: str | Path,
    *,
    columns: tuple[str, ...] | None = None,
    drop: tuple[str, ...] = (),
    categorical: tuple[str, ...] = (),
    header: bool | None = None,
    drop_repeated: bool | None = None,
    seed: int = 0,
) -> Prepared:
    """Read, find the kinds of columns, dequantize once, set repeated rows apart, and cut 80 / 10 / 10 by `seed`.

    drop_repeated: whether rows that stand in the table before are left out of all three parts, so that no test row was
    seen in training. None: yes, unless every column is a whole number or a category; there, repeats are what the
    masses are made of. Errors name the file, and the line and column where there is one.
    """
    table = data.read_table(path, header=header, columns=columns, drop=drop)
    schema = data.find_schema(table, categorical=categorical)
    encoded = data.encode(schema, table)
    if drop_repeated is None:
        drop_repeated = not all(column.is_mass for column in schema)
    keep = np.arange(len(encoded))
    if drop_repeated:
        keep = np.sort(np.unique(encoded, axis=0, return_index=True)[1])
    if len(keep) < LEAST_ROWS:
        what = "distinct rows" if drop_repeated else "rows"
        raise ValueError(f"{path}: the table has {len(keep)} {what}; a fit needs at least {LEAST_ROWS}")
    part = np.full(len(encoded), REPEATED, dtype=object)
    for name, index in zip((TRAIN, VALID, TEST), data.split({"i": keep}, valid=0.1, test=0.1, seed=seed), strict=True):
        part[index["i"]] = name
    noisy = data.add_noise(schema, encoded, np.random.default_rng((seed, 1)))
    return Prepared(table, schema, encoded, noisy, part)


def names(text: str) -> tuple[str, ...] | None:
    """'a,b' to ('a', 'b'); '' to None."""
    return tuple(name.strip() for name in text.split(",")) if text else None


def digest(path: str | Path) -> str:
    """A fingerprint of the file, so that a run is not resumed on another table."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def loader(path: str | Path, fingerprint: str | None = None, **options) -> Callable[[], Prepared]:
    """`prepare(path, **options)`, called when first needed and then kept; another file than `fingerprint` is an error."""

    @functools.cache
    def load() -> Prepared:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        if fingerprint is not None and digest(path) != fingerprint:
            raise ValueError(f"{path}: the table has changed since this run was started")
        return prepare(path, **options)

    return load


def splits(load: Callable[[], Prepared]) -> Callable[[], Splits]:
    """The three parts of a table as rows {'x': float64 [n, d]}: table units, dequantized."""
    return lambda: Splits(*(load().rows(part) for part in (TRAIN, VALID, TEST)))


def preprocess(load: Callable[[], Prepared]) -> Preprocess:
    """Standardisation whose state carries the columns of the table as well; `undo` floors to their lattices.

    Rows in data units are then {'x': float64 [n, d]} of lattice values, codes and continuous numbers; `as_text` and
    `as_arrays` give them the table's form. log_det counts whole numbers and categories as mass (see `data.schema`).
    """
    base = data.standardise()

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
    """(header or None, rows of cells) of rows [n, d] in data units, written the way the table is."""
    schema = columns_of(state)
    return ([c.name for c in schema] if state["header"] else None), data.to_text(schema, x)


def as_arrays(state, x: np.ndarray) -> dict[str, np.ndarray]:
    """An array [n] for each column, by name: int64 for whole numbers, text for categories, else float64."""
    arrays = {}
    for j, column in enumerate(columns_of(state)):
        if column.kind == "categorical":
            value = np.array(column.categories)[x[:, j].astype(int)]
        else:
            value = x[:, j].astype(np.int64) if column.decimals == 0 else x[:, j]
        name = column.name if column.name and column.name not in arrays else f"column {j + 1}"
        arrays[name] = value
    return arrays


def log_prob(flow, *, batch: int = 1024) -> Callable:
    """(params, y [n, d] in model units) -> [n] nats in float64, compiled once: rows are padded to `batch`."""
    compiled = jax.jit(flow.log_prob)

    def apply(params, y):
        out = np.empty(len(y))
        for i in range(0, len(y), batch):
            chunk = np.asarray(y[i : i + batch])
            padded = np.pad(chunk, ((0, batch - len(chunk)), (0, 0)), mode="edge")
            out[i : i + batch] = np.asarray(compiled(params, padded))[: len(chunk)]
        return out

    return apply


def evaluate(flow) -> Callable:
    """(params, state, key, splits) -> nats per row of validation and test rows, densities and masses as in the report."""
    density = log_prob(flow)

    def apply(params, state, key, splits):
        unit = data.log_mass_unit(columns_of(state)) - float(np.log(state["std"]).sum())
        scores = {}
        for name, rows in zip(("valid", "test"), splits[1:], strict=True):
            y = data.standardise().apply(state, rows, None)["x"]
            scores[f"{name}_nll"] = -float(density(params, y).mean()) - unit
        return scores

    return apply


def compare(flow_nats: np.ndarray, gaussian_nats: np.ndarray) -> dict[str, float]:
    """Mean log-likelihoods of the same rows, and their paired difference with its standard error."""
    difference = flow_nats - gaussian_nats
    error = difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else float("nan")
    return {
        "flow": float(flow_nats.mean()),
        "gaussian": float(gaussian_nats.mean()),
        "difference": float(difference.mean()),
        "standard_error": float(error),
    }


def write_results(loaded, prepared: Prepared, folder: str | Path, *, draws: int = 16, seed: int = 0) -> dict:
    """Judge a fitted model and write report.json, log_density.csv, synthetic.csv and, with matplotlib, marginals.png.

    The report's test log-likelihoods are of the flow and of a full-covariance Gaussian fitted on the training part, both
    on the test rows with the one fixed noise. log_density.csv averages `draws` noises in probability, row by row.
    """
    folder, schema, pre = Path(folder), prepared.schema, loaded.preprocess
    compiled = log_prob(loaded.model)

    def density(x):
        rows = pre.apply({"x": x})
        return compiled(loaded.params, rows["x"]) + pre.log_det(rows)

    train, test = (prepared.rows(part)["x"] for part in (TRAIN, TEST))
    gaussian = gaussian_log_prob(train, test) + data.log_mass_unit(schema)
    scores = compare(density(test), gaussian)

    rng = np.random.default_rng((seed, 2))
    nats = [density(data.add_noise(schema, prepared.encoded, rng)) for _ in range(draws)]
    nats = log_mean_exp(np.stack(nats))
    with csv_sink(folder / "log_density.csv", ["line", "part", "log_density"]) as write:
        write([[str(i), p, f"{v:.6g}"] for i, p, v in zip(prepared.table.lines, prepared.part, nats, strict=True)])

    n = prepared.table.rows
    x = np.concatenate(list(sample_rows(loaded, jax.random.key(seed), n, min(n, 4096))))
    header, text = as_text(pre.state, x)
    with csv_sink(folder / "synthetic.csv", header) as write:
        write(text)
    draw_marginals(folder / "marginals.png", schema, prepared.encoded, x)

    report = {
        "table": prepared.table.path,
        "rows": n,
        "parts": {p: int((prepared.part == p).sum()) for p in (TRAIN, VALID, TEST, REPEATED)},
        "test_log_likelihood": scores,
        "units": "nats per row; density per unit of the columns counted as density, mass of those counted as mass",
        "dequantization": "one fixed uniform noise as wide as each column's step, the same for both models",
        "columns": [
            {
                "name": c.name,
                "kind": c.kind,
                "step": c.step,
                "counted_as": "mass" if c.is_mass else "density",
                **({"categories": list(c.categories)} if c.categories else {}),
            }
            for c in schema
        ],
        "step": loaded.step,
    }
    with replacing(folder / "report.json") as part:
        part.write_text(json.dumps(report, indent=2) + "\n")
    return report


def sample_rows(loaded, key, n: int, batch: int, **options):
    """Yields arrays [<= batch, d] of samples in data units, n rows in all."""
    for i, start in enumerate(range(0, n, batch)):
        rows = loaded.experiment.sample(loaded.params, jax.random.fold_in(key, i), batch, **options)
        rows = loaded.preprocess.undo(jax.tree.map(np.asarray, rows))
        yield rows["x"][: n - start]


def draw_marginals(path: Path, schema: tuple[Column, ...], real: np.ndarray, synthetic: np.ndarray) -> None:
    """Histograms of each column, real and synthetic on common bins; nothing without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    shown = range(min(len(schema), 24))
    across = min(len(shown), 4)
    down = -(-len(shown) // across)
    figure = Figure(figsize=(3 * across, 2.2 * down), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.ravel(figure.subplots(down, across, squeeze=False))
    for j, ax in enumerate(axes):
        if j not in shown:
            ax.set_axis_off()
            continue
        column = schema[j]
        whole = column.step and (column.high - column.low) / column.step <= 40
        edges = np.arange(column.low, column.high + 1.5 * column.step, column.step) - column.step / 2 if whole else 40
        edges = np.histogram_bin_edges(real[:, j], edges)
        for values, style in (
            (real, {"alpha": 0.4, "label": "table"}),
            (synthetic, {"histtype": "step", "label": "flow"}),
        ):
            ax.hist(values[:, j], edges, density=True, **style)
        ax.set_title(column.name, fontsize=8)
        ax.tick_params(labelsize=6)
        ax.set_yticks([])
    axes[0].legend(fontsize=6)
    with replacing(path) as part:
        figure.savefig(part, dpi=110)
