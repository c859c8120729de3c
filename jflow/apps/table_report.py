"""What `jflow fit` writes: a report beside a Gaussian, log-densities of the table's rows, and
synthetic rows."""

import json
import math
from pathlib import Path

import jax
import numpy as np

from jflow import data
from jflow._core.files import expand, replace_file
from jflow.apps import tables
from jflow.apps.sampling import samples
from jflow.apps.tables import Prepared
from jflow.data import Column
from jflow.data.writers import csv_writer
from jflow.metrics import gaussian_log_prob, log_mean_exp


def compare(flow_nats: np.ndarray, gaussian_nats: np.ndarray) -> dict[str, float | None]:
    """Mean log-likelihoods of the same rows, and their paired difference with its error."""
    difference = flow_nats - gaussian_nats
    error = (
        float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else None
    )
    return {
        "flow": float(flow_nats.mean()),
        "gaussian": float(gaussian_nats.mean()),
        "difference": float(difference.mean()),
        "standard_error": error,
    }


def write_results(
    loaded, prepared: Prepared, folder: str | Path, *, draws: int = 16, seed: int = 0
) -> dict:
    """Judge a fitted model and write report.json, log_density.csv, synthetic.csv and, with
    matplotlib, marginals.png.

    The report's test log-likelihoods are of the flow and of a full-covariance Gaussian fitted on
    the training part, both on the test rows with the one fixed noise; once of all of them, and once
    of those that do not also stand in the training part (None where all do). log_density.csv has a
    line for every row of the table; it averages `draws` noises in probability.
    """
    folder, schema, pre = expand(folder), prepared.schema, loaded.preprocess
    compiled = tables.log_prob(loaded.model)

    def density(x):
        rows = pre.apply({"x": x})
        return compiled(loaded.params, rows["x"]) + pre.log_det(rows)

    train, test = (prepared.rows(part)["x"] for part in (tables.TRAIN, tables.TEST))
    gaussian = gaussian_log_prob(train, test) + data.log_mass_unit(schema)
    flow, seen = density(test), prepared.test_rows_in_train()

    rng = np.random.default_rng((seed, 2))
    noisy = (data.add_noise(schema, prepared.encoded, rng) for _ in range(draws))
    nats = log_mean_exp(np.stack([density(x) for x in noisy]))
    with csv_writer(folder / "log_density.csv") as write:
        write([["line", "part", "log_density"]])
        write(
            [
                [str(i), p, f"{v:.6g}"]
                for i, p, v in zip(prepared.table.lines, prepared.part, nats, strict=True)
            ]
        )

    n = prepared.table.rows
    x = np.concatenate([rows["x"] for rows in samples(loaded, jax.random.key(seed), n, batch=4096)])
    header, text = tables.as_text(pre.state, x)
    with csv_writer(folder / "synthetic.csv") as write:
        write([header] if header else [])
        write(text)
    draw_marginals(folder / "marginals.png", schema, prepared.encoded, x)

    report = {
        "table": prepared.table.path,
        "rows": n,
        "parts": {
            p: int((prepared.part == p).sum()) for p in (tables.TRAIN, tables.VALID, tables.TEST)
        },
        "test_rows_in_train": int(seen.sum()),
        "test_log_likelihood": compare(flow, gaussian),
        "test_log_likelihood_of_rows_not_in_train": (
            None if seen.all() else compare(flow[~seen], gaussian[~seen])
        ),
        "units": (
            "nats per row; density per unit of the columns counted as density, mass of those"
            " counted as mass"
        ),
        "dequantization": (
            "one fixed uniform noise as wide as each column's step, the same for both models"
        ),
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
        edges = np.linspace(column.low, column.high, 41)
        if column.step:  # whole cells to a bin, or the lattice would show as a comb
            width = column.step * math.ceil((column.high - column.low) / column.step / 40)
            edges = np.arange(column.low, column.high + 1.5 * width, width) - column.step / 2
        for values, style in (
            (real, {"alpha": 0.4, "label": "table"}),
            (synthetic, {"histtype": "step", "label": "flow"}),
        ):
            ax.hist(values[:, j], edges, density=True, **style)
        ax.set_title(column.name, fontsize=8)
        ax.tick_params(labelsize=6)
        ax.set_yticks([])
    axes[0].legend(fontsize=6)
    with replace_file(path) as part:
        figure.savefig(part, dpi=110)
