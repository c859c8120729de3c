"""How good a model of a table is: its synthetic rows and likelihoods beside those of plainer
models; and what `jflow fit` writes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from jflow import data, metrics
from jflow._core.files import replace_file
from jflow._core.seeds import generator
from jflow.apps import table_page, tables
from jflow.apps.baselines import baseline_rows
from jflow.data import Column
from jflow.data.writers import csv_writer

if TYPE_CHECKING:
    from jflow.apps.tabular import TabularFlow

__all__ = ["judge", "report", "write_report"]

COLUMN_ROWS = 50_000  # most rows that distances of columns are of
PAIR_ROWS = 20_000  # of the associations
CLASSIFIER_ROWS = 4_000  # of each of the two tables that the classifier tells apart
QUERY_ROWS = 1_000  # whose nearest training rows are looked for
REFERENCE_ROWS = 50_000  # among which
LEAST_ROWS = 50  # for the classifier
COMMON = 50  # categories told apart in associations; rarer ones are one
QUANTILES = (0.01, 0.05, 0.25, 0.5)
TABLES_EXTRA = 'pip install "jflow-models[tables]"'


def report(
    schema: tuple[Column, ...],
    train: ArrayLike,
    test: ArrayLike,
    synthetic: Mapping[str, ArrayLike],
    *,
    likelihoods: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """How far synthetic rows are from rows that no model has seen, in numbers for JSON.

    Every number stands beside the same number of real rows: the distance of the training rows from
    the test rows is what the noise of sampling alone gives, and a test row's distance to its
    nearest training row is what a row that was not copied has. `columns` holds the distances of
    each column (`metrics.column_distances`), `associations` what columns say of each other
    (`metrics.associations`, on values and on ranks), `classifier` how well gradient-boosted trees
    tell synthetic rows from test rows (`metrics.classifier_test`), and `nearest_rows` how near they
    lie to training rows (`metrics.nearest_gower_distances`). Each part has its `direction`, a
    sentence on what its numbers mean, and its `rows`, how many were drawn for it; at most 50,000
    for columns, 20,000 for associations, 4,000 for the classifier and 1,000 for distances, among
    50,000 training rows, so that the time stays within limits. Without scikit-learn the classifier
    is left out, and `left_out` says so.

    Args:
        schema: One `data.Column` for each of the d columns.
        train: Encoded rows that the models were fitted on, [n, d], NaN where a value is missing.
        test: Encoded rows that they have not seen, [m, d].
        synthetic: Encoded rows of each model, [k, d], by its name, with values that the table can
            hold, as `data.decode` gives them (rounding would hide a copy). The model that the
            report is about comes first; `baselines.baseline_rows` makes two to stand behind it.
        likelihoods: By what they are of, such as 'test rows', the mean log-likelihoods of the
            models in nats per row, with 'difference' and 'standard_error', as `compare` returns
            them; None where there were no such rows.
        seed: Of what is drawn.

    Returns:
        A dictionary of strings, numbers, lists and None, for `json.dumps` and
        `table_page.write_html`.

    Raises:
        ValueError: For rows of another shape, no rows, infinities, or no model.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> from jflow.apps import table_report
        >>> schema = (data.Column("color", "categorical", step=1.0, categories=("red", "blue")),)
        >>> real = np.array([[0.0], [1.0]] * 10)
        >>> found = table_report.report(schema, real, real, {"flow": 0 * real})
        >>> found["columns"]["columns"][0]["distances"]
        {'train': 0.0, 'flow': 0.5}
    """
    models = tuple(synthetic)
    taken = [name for name in ("train", "test") if name in models]
    if not models or taken:
        raise ValueError(
            "report: expected synthetic rows by the names of their models, such as {'flow': rows},"
            f" other than 'train' and 'test', got {list(models)}"
        )
    rows = {
        name: _rows(schema, name, x)
        for name, x in {"train": train, "test": test, **synthetic}.items()
    }
    kinds = np.array([column.kind == "categorical" for column in schema], bool)
    rng = generator("table report", seed)

    def drawn(size: int, *names: str) -> dict[str, np.ndarray]:
        """At most `size` rows of each."""
        return {name: rows[name][rng.permutation(len(rows[name]))[:size]] for name in names}

    # The noise of sampling depends on the number of rows: the same for train and for every model.
    compared = min(len(x) for name, x in rows.items() if name != "test")
    others = ("train", *models)
    columns = drawn(COLUMN_ROWS, "test") | drawn(min(compared, COLUMN_ROWS), *others)
    pairs = drawn(min(compared, len(rows["test"]), PAIR_ROWS), "test", *others)
    told = drawn(min(compared, len(rows["test"]), CLASSIFIER_ROWS), "test", *others)
    classifier, left_out = _classifier(schema, kinds, told, models, seed)
    result = {
        "rows": {name: len(x) for name, x in rows.items()},
        "models": list(models),
        "columns": _columns(schema, kinds, columns, models),
        "associations": _associations(schema, kinds, pairs, models),
        "classifier": classifier,
        "nearest_rows": _nearest(kinds, rows, drawn, models),
        "likelihoods": likelihoods
        and {
            "direction": (
                "Mean log-likelihood of the rows, in nats per row: larger is better, and a"
                " difference is to be read against its standard error."
            ),
            "of": {name: found and dict(found) for name, found in likelihoods.items()},
        },
        "left_out": left_out,
    }
    return result


def _rows(schema: tuple[Column, ...], name: str, x: ArrayLike) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or x.shape[1] != len(schema) or x.size == 0:
        raise ValueError(
            f"report: expected {name!r} to be rows of the {len(schema)} columns of the schema, got"
            f" {list(x.shape)}"
        )
    if np.isinf(x).any():
        column = schema[int(np.isinf(x).any(0).argmax())].name
        raise ValueError(
            f"report: column {column!r} of {name!r} holds an infinity; leave such rows out, and say"
            " how many there were"
        )
    return x


def _number(x: float, digits: int = 4) -> float | None:
    """For JSON, which has no NaN."""
    return None if np.isnan(x) else round(float(x), digits)


def _columns(schema, kinds, rows, models) -> dict[str, Any]:
    test, others = rows["test"], ("train", *models)
    distances = {name: metrics.column_distances(rows[name], test, kinds) for name in others}
    missing = {name: np.isnan(rows[name]).mean(0) for name in ("test", *others)}
    names = {True: "total variation", False: "Kolmogorov-Smirnov"}
    return {
        "direction": (
            "The distance of each column from the same column of the test rows: 0 is perfect, 1 is"
            " the worst, smaller is better. No model can be expected to come closer than the"
            " training rows, whose distance is the noise of sampling. The share of missing values"
            " should be that of the test rows."
        ),
        "rows": {name: len(x) for name, x in rows.items()},
        "mean": {
            name: _number(np.nanmean(d)) if np.isfinite(d).any() else None
            for name, d in distances.items()
        },
        "columns": [
            {
                "name": column.name,
                "kind": column.kind,
                "distance": names[bool(category)],
                "distances": {name: _number(d[j]) for name, d in distances.items()},
                "missing": {name: _number(share[j]) for name, share in missing.items()},
            }
            for j, (column, category) in enumerate(zip(schema, kinds, strict=True))
        ],
    }


def _associations(schema, kinds, rows, models) -> dict[str, Any]:
    """Associations of values ('pearson' between numbers) and of ranks ('spearman')."""
    rows = {name: np.where(kinds, np.minimum(x, COMMON - 1), x) for name, x in rows.items()}
    found: dict[str, Any] = {}
    for between, prepared in (("pearson", lambda x: x), ("spearman", _ranks(kinds))):
        matrices = {name: metrics.associations(prepared(x), kinds) for name, x in rows.items()}
        off = ~np.eye(len(kinds), dtype=bool)
        differences = {
            name: np.abs(matrix - matrices["test"])[off]
            for name, matrix in matrices.items()
            if name != "test"
        }
        found[between] = {
            "mean_difference": {n: _number(d.mean()) for n, d in differences.items() if d.size},
            "largest_difference": {n: _number(d.max()) for n, d in differences.items() if d.size},
            "matrices": {name: matrix.round(4).tolist() for name, matrix in matrices.items()},
        }
    return {
        "direction": (
            "What two columns say of each other: correlation of two numbers, Cramer's V of two"
            " categories, correlation ratio of a number and a category. Of the differences from"
            " the test rows 0 is perfect, smaller is better; those of the training rows are the"
            " noise of sampling."
        ),
        "rows": {name: len(x) for name, x in rows.items()},
        "names": [column.name for column in schema],
        "kinds": [column.kind for column in schema],
        **found,
    }


def _ranks(kinds: np.ndarray):
    """Rows -> rows with ranks for numbers."""
    return lambda x: np.where(kinds, x, rankdata(x, axis=0, nan_policy="omit"))


def _classifier(schema, kinds, rows, models, seed) -> tuple[dict[str, Any] | None, list[str]]:
    test, n = rows["test"], len(rows["test"])
    if n < LEAST_ROWS:
        return None, [
            f"The two-sample classifier needs at least {LEAST_ROWS} test rows, and as many training"
            f" and synthetic ones; there are {n}."
        ]
    try:
        found = {
            name: metrics.classifier_test(test, rows[name], kinds, seed=seed)
            for name in ("train", *models)
        }
    except ImportError:
        return None, [f"The two-sample classifier needs scikit-learn: {TABLES_EXTRA}"]
    order = {name: np.argsort(-found[name].importances, kind="stable") for name in models}
    return {
        "direction": (
            "How well gradient-boosted trees tell synthetic rows from test rows, as the area under"
            " the curve of hits against false alarms (AUC): 0.5 is perfect, 1 means that every"
            " synthetic row gives itself away, smaller is better. A column gives them away by as"
            " much as the AUC falls when that column is shuffled."
        ),
        "rows": {name: len(x) for name, x in rows.items()},
        "auc": {name: _number(of.auc) for name, of in found.items()},
        "standard_error": {name: _number(of.standard_error) for name, of in found.items()},
        "columns": {
            name: [
                {"name": schema[j].name, "auc_falls_by": _number(found[name].importances[j])}
                for j in order[name]
            ]
            for name in models
        },
    }, []


def _nearest(kinds, rows, drawn, models) -> dict[str, Any]:
    reference = drawn(REFERENCE_ROWS, "train")["train"]
    # A copy is looked for among all training rows, whatever is drawn.
    seen = np.unique(_keys(rows["train"]))
    distances, copies, asked = {}, {}, drawn(QUERY_ROWS, "test", *models)
    for name, x in asked.items():
        distances[name] = metrics.nearest_gower_distances(x, reference, kinds)
        copies[name] = _number(np.isin(_keys(rows[name]), seen).mean(), 6)
    test = np.sort(distances["test"])
    nearer = {}
    for name in models:
        sides = [np.searchsorted(test, distances[name], side) for side in ("left", "right")]
        nearer[name] = _number(1 - float(np.mean((sides[0] + sides[1]) / (2 * len(test)))))
    return {
        "direction": (
            "The distance of a row to the nearest training row (0 for a copy; the mean over the"
            " columns of a difference from 0 to 1). Synthetic rows should lie as far from the"
            " training rows as test rows do: nearer means that training rows were memorized, which"
            " gives away whom they are about; much farther means that the rows are unlike the"
            " table."
        ),
        "rows": {name: len(x) for name, x in asked.items()} | {"train": len(reference)},
        "quantiles": {
            name: {f"{q:g}": _number(np.quantile(d, q)) for q in QUANTILES}
            for name, d in distances.items()
        },
        "nearer_than_test": {
            "direction": (
                "The probability that a synthetic row lies nearer to the training rows than a test"
                " row does: 0.5 is perfect; above it rows were memorized, below it they are unlike"
                " the table."
            ),
            "of": nearer,
        },
        "copies": {
            "direction": (
                "The share of rows that are exactly equal to a training row: it should not exceed"
                " the share of the test rows."
            ),
            "of": copies,
        },
    }


def _keys(x: np.ndarray) -> np.ndarray:
    """[n], equal where rows are: their bytes, with one NaN and one 0."""
    rows = np.ascontiguousarray(np.where(np.isnan(x), np.nan, x + 0.0))
    return rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0]


def compare(flow_nats: np.ndarray, gaussian_nats: np.ndarray | None) -> dict[str, float | None]:
    """Mean log-likelihoods of the same rows, and their paired difference with its error; of rows
    that have a density at all."""
    fine = np.isfinite(flow_nats)
    scores: dict[str, float | None] = {
        "flow": float(flow_nats[fine].mean()) if fine.any() else None,
        "rows_without_density": int((~fine).sum()),
    }
    if gaussian_nats is None or not fine.any():
        return scores
    difference = (flow_nats - gaussian_nats)[fine]
    error = (
        float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else None
    )
    return {
        **scores,
        "gaussian": float(gaussian_nats[fine].mean()),
        "difference": float(difference.mean()),
        "standard_error": error,
    }


def judge(model: "TabularFlow", *, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The report of a fitted model on rows that it was not trained on, beside two baselines.

    They are a Gaussian and a copula.

    The test log-likelihoods are of the model and of a full-covariance Gaussian fitted on the
    training part, the latter with one fixed noise within the cells of lattices and categories; once
    of all test rows, and once of those that do not also stand in the training part (None where all
    do). The Gaussian is left out where values are missing.

    Args:
        model: The estimator, as `fit` left it.
        seed: Of what is drawn.

    Returns:
        (the report, for JSON; the encoded synthetic rows of each model, as many as the table has).
    """
    prepared = model.prepared_
    schema, rng = prepared.schema, np.random.default_rng((seed, 1))
    train, test = (prepared.rows(part)["x"] for part in (tables.TRAIN, tables.TEST))
    flow = model.log_prob_encoded(test, np.zeros(len(schema), bool))
    gaussian = None
    if not np.isnan(prepared.encoded).any():
        noisy = (data.add_noise(schema, x, rng) for x in (train, test))
        gaussian = metrics.gaussian_log_prob(*noisy) + data.log_mass_unit(schema)
    seen, n = prepared.test_rows_in_train(), prepared.table.rows
    likelihoods = {
        "test rows": compare(flow, gaussian),
        "test rows that are not in train": None
        if seen.all()
        else compare(flow[~seen], None if gaussian is None else gaussian[~seen]),
    }
    drawn = np.concatenate(list(model.sample_chunks(n, encoded=True)))
    synthetic = {"flow": drawn, **baseline_rows(schema, train, n, seed=seed)}
    found = report(schema, train, test, synthetic, likelihoods=likelihoods, seed=seed)
    about = {
        "table": prepared.table.path,
        "table_rows": n,
        "rows_left_out": prepared.dropped,
        "parts": {
            p: int((prepared.part == p).sum()) for p in (tables.TRAIN, tables.VALID, tables.TEST)
        },
        "test_rows_in_train": int(seen.sum()),
        "units": (
            "nats per row; density per unit of the columns counted as density, mass of those"
            " counted as mass"
        ),
        "schema": [
            {
                "name": c.name,
                "kind": c.kind,
                "step": c.step,
                "counted_as": "mass" if c.is_mass else "density",
                **({"missing": c.missing} if c.missing is not None else {}),
                **({"categories": list(c.categories)} if c.categories else {}),
            }
            for c in schema
        ],
        "step": model.step_,
    }
    return about | found, synthetic


def write_report(model: "TabularFlow", folder: Path) -> dict[str, Any]:
    """Write report.json, report.html and synthetic.csv, and return the report."""
    folder.mkdir(parents=True, exist_ok=True)
    found, synthetic = judge(model)
    schema = model.prepared_.schema
    header, text = tables.as_text(model.state_, synthetic["flow"])
    with csv_writer(folder / "synthetic.csv") as write:
        write([*([header] if header else []), *text], model.state_["delimiter"])
    with replace_file(folder / "report.json") as part:
        part.write_text(json.dumps(found, indent=2) + "\n")
    figures = table_page.draw_figures(schema, found, model.prepared_.encoded, synthetic)
    title = f"{Path(found['table']).name}: synthetic rows beside real ones"
    table_page.write_html(folder / "report.html", found, figures, title=title)
    return found
