"""What `jflow fit` writes: a report beside a Gaussian, and synthetic rows."""

import json
import math
from pathlib import Path

import numpy as np

from jflow import data
from jflow._core.files import expand, replace_file
from jflow.apps import tables
from jflow.apps.tabular import TabularFlow
from jflow.data import Column
from jflow.data.writers import csv_writer
from jflow.metrics import gaussian_log_prob


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


def write_results(model: TabularFlow, folder: str | Path, *, seed: int = 0) -> dict:
    """Judge a fitted model and write report.json, synthetic.csv and, with matplotlib,
    marginals.png.

    The report's test log-likelihoods are of the model and of a full-covariance Gaussian fitted on
    the training part, the latter with one fixed noise within the cells of lattices and categories;
    once of all test rows, and once of those that do not also stand in the training part (None where
    all do). The Gaussian is left out where values are missing.
    """
    folder, prepared = expand(folder), model.prepared_
    schema, rng = prepared.schema, np.random.default_rng((seed, 1))
    train, test = (prepared.rows(part)["x"] for part in (tables.TRAIN, tables.TEST))
    flow = model.log_prob_encoded(test, np.zeros(len(schema), bool))
    gaussian = None
    if not np.isnan(prepared.encoded).any():
        noisy = (data.add_noise(schema, x, rng) for x in (train, test))
        gaussian = gaussian_log_prob(*noisy) + data.log_mass_unit(schema)
    seen = prepared.test_rows_in_train()

    x = []
    with csv_writer(folder / "synthetic.csv") as write:
        for rows in model.sample_chunks(prepared.table.rows, encoded=True):
            header, text = tables.as_text(model.state_, rows)
            write([header] if header and not x else [])
            write(text)
            x.append(rows)
    draw_marginals(folder / "marginals.png", schema, prepared.encoded, np.concatenate(x))

    report = {
        "table": prepared.table.path,
        "rows": prepared.table.rows,
        "rows_left_out": prepared.dropped,
        "parts": {
            p: int((prepared.part == p).sum()) for p in (tables.TRAIN, tables.VALID, tables.TEST)
        },
        "test_rows_in_train": int(seen.sum()),
        "test_log_likelihood": compare(flow, gaussian),
        "test_log_likelihood_of_rows_not_in_train": (
            None
            if seen.all()
            else compare(flow[~seen], None if gaussian is None else gaussian[~seen])
        ),
        "units": (
            "nats per row; density per unit of the columns counted as density, mass of those"
            " counted as mass"
        ),
        "columns": [
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
    with replace_file(folder / "report.json") as part:
        part.write_text(json.dumps(report, indent=2) + "\n")
    return report


def draw_marginals(
    path: Path, schema: tuple[Column, ...], real: np.ndarray, synthetic: np.ndarray
) -> None:
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
        real_j, drawn_j = (v[~np.isnan(v[:, j]), j] for v in (real, synthetic))
        edges = np.linspace(column.low, column.high, 41)
        if column.step:  # whole cells to a bin, or the lattice would show as a comb
            width = column.step * math.ceil((column.high - column.low) / column.step / 40)
            edges = np.arange(column.low, column.high + 1.5 * width, width) - column.step / 2
        for values, style in (
            (real_j, {"alpha": 0.4, "label": "table"}),
            (drawn_j, {"histtype": "step", "label": "flow"}),
        ):
            ax.hist(values, edges, density=True, **style)
        ax.set_title(column.name, fontsize=8)
        ax.tick_params(labelsize=6)
        ax.set_yticks([])
    axes[0].legend(fontsize=6)
    with replace_file(path) as part:
        figure.savefig(part, dpi=110)
