"""The report on a model of a table as a page to read: its figures, and one HTML file."""

import base64
import html
import io
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jflow import data
from jflow._core.files import replace_file
from jflow.data import Column

__all__ = ["draw_figures", "write_html"]

SHOWN_COLUMNS = 40  # that get a picture: those farthest from the test rows
SHOWN_PAIRS = 6  # columns of the pair plots
SHOWN_ASSOCIATIONS = 30  # columns of the matrices in pictures
SHOWN_ROWS = 20_000  # of each table in a picture
REAL, MODEL = "#3b6ea5", "#d9772b"
EXTRA = 'pip install "jflow-models[tables]"'


class _Bins(NamedTuple):
    """A column cut into bins: `index` of values [n] -> [n], -1 where missing; ticks at bins."""

    size: int
    index: Any
    ticks: tuple[float, ...]
    labels: tuple[str, ...]


def _short(text: str, length: int = 16) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _category_bins(column: Column, real: np.ndarray, most: int) -> _Bins:
    codes, counts = np.unique(real[~np.isnan(real)].astype(int), return_counts=True)
    first = codes[np.argsort(-counts, kind="stable")][:most]
    texts = dict(enumerate(column.categories))
    labels = [_short(texts.get(int(code), str(code)) or "(empty)") for code in first]
    labels += ["(others)"]

    def index(x):
        which = np.where(x[:, None] == first, np.arange(len(first)), -1).max(1, initial=-1)
        return np.where(np.isnan(x), -1, np.where(which < 0, len(first), which))

    # Others get a bar only where there are some, by the schema.
    count = len(first) + (len(column.categories) > len(first) or not len(first))
    return _Bins(count, index, tuple(range(count)), tuple(labels[:count]))


def _number_bins(column: Column, real: np.ndarray, most: int) -> _Bins:
    from matplotlib.ticker import MaxNLocator

    real = real[~np.isnan(real)]
    low, high = np.quantile(real, [0.005, 0.995]) if len(real) else (0.0, 1.0)
    if low == high and len(real):
        low, high = real.min(), real.max()
    if column.step and high - low < 1e6 * column.step:
        width = column.step * max(1, np.ceil((high - low + column.step) / column.step / most))
        start, count = (
            low - column.step / 2,
            int(np.ceil((high - low + column.step) / width - 0.01)),
        )
    else:
        width, start, count = (high - low) / most or 1.0, low, most
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(start, start + count * width)
    ticks = [t for t in ticks if start <= t <= start + count * width]

    def index(x):
        with np.errstate(invalid="ignore"):
            which = np.clip(np.floor((x - start) / width), 0, count - 1)
        return np.where(np.isnan(x), -1, which).astype(int)

    return _Bins(
        count,
        index,
        tuple((t - start) / width - 0.5 for t in ticks),
        tuple(_tick(column, t) for t in ticks),
    )


def _tick(column: Column, value: float) -> str:
    """A number on an axis, a date as the table writes it."""
    if not getattr(column, "time", ""):
        from matplotlib.ticker import EngFormatter

        large = 1e4 <= abs(value) < 1e15
        return EngFormatter(sep="")(value) if large else f"{value:.4g}"
    on = column.origin + column.step * np.round((value - column.origin) / column.step)
    return _short(data.to_text((column,), np.array([[on]]))[0][0])


def _bins(column: Column, real: np.ndarray, most_categories: int, most_bins: int) -> _Bins:
    if column.kind == "categorical":
        return _category_bins(column, real, most_categories)
    return _number_bins(column, real, most_bins)


def _shares(bins: _Bins, x: np.ndarray) -> np.ndarray:
    """[size], of the values that are not missing."""
    index = bins.index(x)
    counts = np.bincount(index[index >= 0], minlength=bins.size)
    return counts / max(counts.sum(), 1)


def _together(a: _Bins, b: _Bins, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Shares [size of b, size of a] of the rows in which neither is missing."""
    i, j = a.index(x), b.index(y)
    seen = (i >= 0) & (j >= 0)
    counts = np.bincount(j[seen] * a.size + i[seen], minlength=a.size * b.size)
    return (counts / max(counts.sum(), 1)).reshape(b.size, a.size)


def draw_figures(
    schema: tuple[Column, ...],
    report: Mapping[str, Any],
    real: ArrayLike,
    synthetic: Mapping[str, ArrayLike],
) -> dict[str, dict[str, bytes]]:
    """The pictures of a report.

    Columns, pairs of columns, and matrices of associations, of real rows and of the first model's
    rows. The pair plots are of the 6 columns that say the most of others, in the real rows or in
    how the model differs from them; a number's outermost bins hold all that lies beyond.

    Args:
        schema: One `data.Column` for each of the d columns.
        report: From `table_report.report`.
        real: Encoded rows, [n, d], such as training and test rows together; at most 20,000 are
            drawn.
        synthetic: Encoded rows by the names of the models, as `report` takes them.

    Returns:
        {'columns': {name: PNG}, 'pairs': {'real': PNG, 'model': PNG}, 'associations': {'test': PNG,
        'model': PNG, 'difference': PNG}}; empty without matplotlib.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> from jflow.apps import table_page, table_report
        >>> schema = (data.Column("color", "categorical", step=1.0, categories=("red", "blue")),)
        >>> real = np.array([[0.0], [1.0]] * 10)
        >>> report = table_report.report(schema, real, real, {"flow": real})
        >>> list(table_page.draw_figures(schema, report, real, {"flow": real})["columns"])
        ['color']
    """
    try:
        import matplotlib
    except ImportError:
        return {}
    model = report["models"][0]
    x, y = (
        rows[np.random.default_rng(0).permutation(len(rows))[:SHOWN_ROWS]]
        for rows in (np.asarray(real, np.float64), np.asarray(synthetic[model], np.float64))
    )
    distances = [_distance(c, model) for c in report["columns"]["columns"]]
    farthest = np.argsort(-np.array(distances), kind="stable")[:SHOWN_COLUMNS]
    matrices = report["associations"]["spearman"]["matrices"]
    before, after = (np.array(matrices[name]) for name in ("test", model))
    off = ~np.eye(len(schema), dtype=bool)
    said = (np.where(off, np.abs(before) + np.abs(after - before), 0)).sum(1)
    told = np.sort(np.argsort(-said, kind="stable")[:SHOWN_PAIRS])
    apart = np.where(off, np.abs(after - before), 0).sum(1)
    shown = np.sort(np.argsort(-apart, kind="stable")[:SHOWN_ASSOCIATIONS])
    names = [schema[j].name for j in shown]
    with warnings.catch_warnings(), matplotlib.rc_context({"text.parse_math": False}):
        # A name in a script that the font lacks; the page itself shows it.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figures = {
            "columns": {
                schema[j].name: _column_figure(schema[j], x[:, j], y[:, j], model) for j in farthest
            },
            "pairs": {},
            "associations": {},
        }
        if len(schema) > 1:
            figures["pairs"] = _pair_figures([schema[j] for j in told], x[:, told], y[:, told])
            square = np.ix_(shown, shown)
            difference = (after - before)[square]
            most = max(0.1, np.abs(difference).max())
            figures["associations"] = {
                "test": _matrix_figure(names, before[square], "RdBu_r", 1.0),
                "model": _matrix_figure(names, after[square], "RdBu_r", 1.0),
                "difference": _matrix_figure(names, difference, "PuOr_r", float(most)),
            }
    return figures


def _distance(column: Mapping[str, Any], model: str) -> float:
    """For the order; a column without values is farther than all others."""
    found = column["distances"][model]
    return 2.0 if found is None else found


def _canvas(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, dpi=130, format="png")
    return stream.getvalue()


def _column_figure(column: Column, x: np.ndarray, y: np.ndarray, model: str) -> bytes:
    bins = _bins(column, x, 8, 30)
    real, drawn = _shares(bins, x), _shares(bins, y)
    figure = _canvas(3.2, 2.1)
    ax, at = figure.subplots(), np.arange(bins.size)
    if column.kind == "categorical":
        ax.barh(at - 0.2, 100 * real, 0.4, color=REAL, label="real")
        ax.barh(at + 0.2, 100 * drawn, 0.4, color=MODEL, label=model)
        ax.set_yticks(bins.ticks, bins.labels)
        ax.invert_yaxis()
        ax.set_xlabel("% of rows", fontsize=7)
    else:
        ax.bar(at, 100 * real, 1.0, color=REAL, alpha=0.45, label="real")
        ax.stairs(100 * drawn, np.arange(bins.size + 1) - 0.5, color=MODEL, lw=1.6, label=model)
        ax.set_xticks(bins.ticks, bins.labels)
        ax.set_ylabel("% of rows", fontsize=7)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, frameon=False)
    return _png(figure)


def _pair_figures(columns: list[Column], x: np.ndarray, y: np.ndarray):
    """Real rows and the model's, each below the diagonal of one grid, in the same colors."""
    bins = [_bins(column, x[:, j], 5, 24) for j, column in enumerate(columns)]
    k = len(columns)
    cells = {
        (i, j): [_together(bins[j], bins[i], of[:, j], of[:, i]) for of in (x, y)]
        for i in range(k)
        for j in range(i)
    }
    figures = {}
    for which, (name, rows, color, cmap) in enumerate(
        (("real", x, REAL, "Blues"), ("model", y, MODEL, "Oranges"))
    ):
        figure = _canvas(1.5 + 1.05 * k, 1.3 + 1.05 * k)
        grid = figure.subplots(k, k, squeeze=False)
        for i in range(k):
            for j in range(k):
                ax = grid[i, j]
                if j > i:
                    ax.set_axis_off()
                    continue
                ax.set_xlim(-0.5, bins[j].size - 0.5)
                ax.set_xticks(bins[j].ticks, bins[j].labels, rotation=90)
                if i == j:
                    ax.bar(np.arange(bins[j].size), _shares(bins[j], rows[:, j]), 1.0, color=color)
                    ax.set_yticks([])
                else:
                    top = np.sqrt(max(cells[i, j][0].max(), 1e-9))
                    ax.pcolormesh(
                        np.arange(bins[j].size + 1) - 0.5,
                        np.arange(bins[i].size + 1) - 0.5,
                        np.sqrt(cells[i, j][which]),
                        cmap=cmap,
                        vmin=0,
                        vmax=top,
                    )
                    ax.set_yticks(bins[i].ticks, bins[i].labels)
                ax.tick_params(labelsize=8, length=2)
                if i < k - 1:
                    ax.set_xticklabels([])
                else:
                    ax.set_xlabel(_short(columns[j].name, 18), fontsize=9)
                if j > 0:
                    ax.set_yticklabels([])
                else:
                    ax.set_ylabel(_short(columns[i].name, 18), fontsize=9)
        figures[name] = _png(figure)
    return figures


def _matrix_figure(names: list[str], matrix: np.ndarray, cmap: str, most: float) -> bytes:
    d = len(names)
    figure = _canvas(1.7 + max(0.36 * d, 1.2), 1.2 + max(0.36 * d, 1.2))
    ax = figure.subplots()
    image = ax.imshow(matrix, cmap=cmap, vmin=-most, vmax=most)
    labels = [_short(name, 18) for name in names]
    ax.set_xticks(range(d), labels, rotation=90, fontsize=9)
    ax.set_yticks(range(d), labels, fontsize=9)
    if d <= 16:
        for i in range(d):
            for j in range(d):
                color = "white" if abs(matrix[i, j]) > 0.6 * most else "black"
                text = f"{matrix[i, j]:.2f}".replace("0.", ".").replace("-.00", ".00")
                ax.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, shrink=0.6).ax.tick_params(labelsize=8)
    return _png(figure)


STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2733; margin: 0 auto; max-width: 74rem;
  padding: 1rem; background: #fff; }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-top: 1px solid #dde3ea; padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { max-width: 48rem; }
.note { color: #556372; font-size: .88rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #e6ebf0;
  vertical-align: top; }
th { font-weight: 600; background: #f4f6f9; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; min-width: 8rem; max-width: 22rem;
  overflow-wrap: anywhere; }
td small { display: block; color: #556372; font-size: .8rem; }
td.best { font-weight: 700; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr));
  gap: .8rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1rem; align-items: start; }
figure { margin: 0; }
figcaption { font-size: .88rem; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; display: block; }
@media (max-width: 40rem) { body { padding: .7rem; } table { font-size: .8rem; }
  td, th { padding: .25rem .35rem; } th:first-child, td:first-child { min-width: 7rem; }
  td small { font-size: .72rem; }
  .plots .wide img { max-width: none; width: 34rem; } }
"""


def _text(value: Any) -> str:
    """A number as it is read, a name escaped."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return html.escape(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}%"


def _table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table of cells that are HTML already; a cell that begins with <td is taken whole."""

    def cell(content: str) -> str:
        return content if content.startswith("<td") else f"<td>{content}</td>"

    top = "".join(f"<th>{content}</th>" for content in head)
    body = "".join(f"<tr>{''.join(map(cell, line))}</tr>" for line in lines)
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _image(png: bytes, said: str) -> str:
    source = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{source}" alt="{said}">'


def _figure(png: bytes, caption: str, said: str) -> str:
    """A picture with what stands above it and in its place, both HTML already."""
    return (
        f'<figure><figcaption>{caption}</figcaption><div class="wide">{_image(png, said)}</div>'
        "</figure>"
    )


def _note(part: Mapping[str, Any]) -> str:
    """The direction of a part, and how many rows it is of."""
    rows = _sizes(part["rows"])
    return f"<p>{_text(part['direction'])}</p><p class='note'>Rows compared: {rows}.</p>"


def _sizes(rows: Mapping[str, int]) -> str:
    real = ("train", "test")
    return ", ".join(
        f"{_text(n)} {_name(name) if name in real else 'of ' + html.escape(name)}"
        for name, n in rows.items()
    )


def _name(name: str) -> str:
    return {"train": "training rows", "test": "test rows"}.get(name, html.escape(name))


def _noise(name: str) -> str:
    return "training rows<br>(the noise)" if name == "train" else html.escape(name)


def _glance(report: Mapping[str, Any]) -> str:
    """The page in one table: a line for each number, the best of the models in bold."""
    models = report["models"]
    associations, classifier = report["associations"]["spearman"], report["classifier"]
    nearest, columns = report["nearest_rows"], report["columns"]
    farthest = {
        name: max(
            (c["distances"][name] for c in columns["columns"] if c["distances"][name]), default=0.0
        )
        for name in ("train", *models)
    }
    lines = [
        ("Distance of the columns, mean", "0 is perfect; smaller is better", columns["mean"], 0.0),
        ("Distance of the farthest column", "0 is perfect; smaller is better", farthest, 0.0),
        (
            "Difference of associations, mean",
            "0 is perfect; smaller is better",
            associations["mean_difference"],
            0.0,
        ),
        (
            "AUC of the two-sample classifier",
            "0.5 is perfect; smaller is better",
            classifier["auc"] if classifier else {},
            0.5,
        ),
        (
            "Chance to lie nearer to the training rows than a test row",
            "0.5 is perfect; above: memorized, below: unlike the table",
            {"train": 0.5} | nearest["nearer_than_test"]["of"],
            0.5,
        ),
    ]
    shown = []
    for what, direction, values, perfect in lines:
        known = [abs(values[m] - perfect) for m in models if values.get(m) is not None]
        cells = [_text(values.get("train"))]
        for m in models:
            best = known and values.get(m) is not None and abs(values[m] - perfect) == min(known)
            cells.append(f"<td{' class=best' if best else ''}>{_text(values.get(m))}</td>")
        if any(value is not None for value in values.values()):
            shown.append([f"{what}<small>{direction}</small>", *cells])
    copies = nearest["copies"]["of"]
    shown.append(
        [
            "Exact copies of training rows<small>should not exceed the share of the test rows, in"
            " the first column</small>",
            _percent(copies["test"]),
            *(_percent(copies[m]) for m in models),
        ]
    )
    return _table(["", "real rows<br>(the yardstick)", *map(html.escape, models)], shown)


def _column_section(report: Mapping[str, Any], figures: Mapping[str, Mapping[str, bytes]]) -> str:
    part, model = report["columns"], report["models"][0]
    order = sorted(part["columns"], key=lambda c: -_distance(c, model))
    others = ("train", *report["models"])
    kinds = {"continuous": "number", "lattice": "number in steps", "categorical": "category"}
    lines = [
        [
            f"{_text(c['name'])}<small>{kinds[c['kind']]}, {c['distance']}</small>",
            *(_text(c["distances"][name]) for name in others),
        ]
        for c in order
    ]
    missing = [
        [_text(c["name"]), *map(_percent, c["missing"].values())]
        for c in order
        if any(c["missing"].values())
    ]
    cards = "".join(
        _figure(
            png,
            f"<b>{_text(name)}</b>",
            f"Distribution of {_text(name)}, real rows and {_text(model)}",
        )
        for name, png in figures.get("columns", {}).items()
    )
    return (
        f"<h2>Columns</h2>{_note(part)}"
        + _table(["column", *map(_noise, others)], lines)
        + (
            "<h3>Shares of missing values</h3><p>The share of the test rows is perfect.</p>"
            + _table(["column", *map(_name, ("test", *others))], missing)
            if missing
            else ""
        )
        + (f'<h3>Distributions</h3><div class="cards">{cards}</div>' if cards else "")
    )


def _association_section(report: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    part, models = report["associations"], report["models"]
    names, model = part["names"], models[0]
    if len(names) < 2:
        return ""
    lines = [
        [f"{what}, {of}", *(_text(values[name]) for name in ("train", *models))]
        for what, between in (("values", "pearson"), ("ranks", "spearman"))
        for of, values in (
            ("mean difference", part[between]["mean_difference"]),
            ("largest difference", part[between]["largest_difference"]),
        )
    ]
    matrices = {n: np.array(m) for n, m in part["spearman"]["matrices"].items()}
    apart = np.triu(np.abs(matrices[model] - matrices["test"]), 1)
    worst = [np.unravel_index(k, apart.shape) for k in np.argsort(-apart, axis=None)[:8]]
    pairs = [
        [
            f"{_text(names[i])} and {_text(names[j])}",
            *(_text(float(matrices[n][i, j])) for n in ("test", "train", *models)),
        ]
        for i, j in worst
        if i < j
    ]
    captions = {
        "real": "real rows",
        "test": "test rows",
        "model": _text(model),
        "difference": f"difference: {_text(model)} less test rows",
    }
    plots, grids = (
        "".join(
            _figure(png, f"<b>{captions[name]}</b>", f"{what}: {captions[name]}")
            for name, png in figures.get(part_of, {}).items()
        )
        for part_of, what in (("associations", "Associations"), ("pairs", "Pairs of columns"))
    )
    said = (
        "<h3>Two columns at a time</h3><p>The darker, the more rows, on one scale for real rows and"
        " synthetic ones. The outermost bins hold all that lies beyond.</p>"
        f'<div class="plots">{grids}</div>'
    )
    return (
        f"<h2>Pairs of columns</h2>{_note(part)}"
        + _table(["difference from the test rows", *map(_noise, ("train", *models))], lines)
        + f"<h3>The pairs that {_text(model)} changes the most</h3>"
        + _table(["pair, by ranks", *map(_name, ("test", "train", *models))], pairs)
        + (f'<h3>Associations, by ranks</h3><div class="plots">{plots}</div>' if plots else "")
        + (said if grids else "")
    )


def _classifier_section(report: Mapping[str, Any]) -> str:
    part, models = report["classifier"], report["models"]
    if not part:
        return ""
    aucs = [
        [
            _noise(name).replace("<br>", " "),
            _text(part["auc"][name]),
            f"± {_text(part['standard_error'][name])}",
        ]
        for name in ("train", *models)
    ]
    columns = [
        [
            str(rank + 1),
            *(f"{_text(c['name'])}<small>{_text(c['auc_falls_by'])}</small>" for c in line),
        ]
        for rank, line in enumerate(
            zip(*(part["columns"][name][:8] for name in models), strict=True)
        )
    ]
    return (
        f"<h2>Can a classifier tell them apart?</h2>{_note(part)}"
        + _table(["test rows against", "AUC", "standard error"], aucs)
        + "<h3>The columns that give the synthetic rows away, and by how much</h3>"
        + _table(["rank", *map(_text, models)], columns)
    )


def _nearest_section(report: Mapping[str, Any]) -> str:
    part, models = report["nearest_rows"], report["models"]
    others = ("test", *models)
    quantiles = [
        [f"{_percent(float(q))[:-4]}% of the rows lie nearer than"]
        + [_text(part["quantiles"][name][q]) for name in others]
        for q in part["quantiles"]["test"]
    ]
    chance = part["nearer_than_test"]["of"]
    quantiles.append(
        [
            f"chance to lie nearer than a test row<small>{part['nearer_than_test']['direction']}"
            "</small>",
            _text(0.5),
            *(_text(chance[m]) for m in models),
        ]
    )
    copies = part["copies"]
    quantiles.append(
        [
            f"exact copies<small>{copies['direction']}</small>",
            *(_percent(copies["of"][name]) for name in others),
        ]
    )
    return (
        f"<h2>Privacy: the nearest training row</h2>{_note(part)}"
        + _table(["", *map(_name, others)], quantiles)
        + "<p class='note'>Copies are looked for among all training rows.</p>"
    )


def _likelihood_section(report: Mapping[str, Any]) -> str:
    part = report["likelihoods"]
    known = {name: of for name, of in (part or {}).get("of", {}).items() if of}
    if not known:
        return ""
    last = ("difference", "standard_error")
    models = [name for name in next(iter(known.values())) if name not in last]
    lines = [
        [
            _text(what),
            *(_text(of.get(m)) for m in models),
            f"{_text(of.get('difference'))} ± {_text(of.get('standard_error'))}",
        ]
        for what, of in known.items()
    ]
    head = ["nats per row", *map(_text, models), "difference ± its standard error"]
    return f"<h2>Likelihood</h2><p>{_text(part['direction'])}</p>{_table(head, lines)}"


def write_html(
    path: str | Path,
    report: Mapping[str, Any],
    figures: Mapping[str, Mapping[str, bytes]],
    *,
    title: str = "Synthetic rows beside real ones",
) -> None:
    """Write a report as one HTML file.

    It holds its pictures, has no script, and asks no other host for anything.

    Args:
        path: Of the file.
        report: From `table_report.report`.
        figures: From `draw_figures`; where it is empty, the page says how to get them.
        title: Of the page.

    Examples:
        >>> import tempfile, pathlib
        >>> import numpy as np
        >>> from jflow import data
        >>> from jflow.apps import table_page, table_report
        >>> schema = (data.Column("color", "categorical", step=1.0, categories=("red", "blue")),)
        >>> real = np.array([[0.0], [1.0]] * 10)
        >>> report = table_report.report(schema, real, real, {"flow": real})
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "report.html"
        >>> table_page.write_html(path, report, {})
        >>> "<h1>Synthetic rows beside real ones</h1>" in path.read_text()
        True
    """
    left_out = list(report["left_out"])
    if not figures:
        left_out.append(f"The pictures need matplotlib: {EXTRA}")
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{_sizes(report['rows'])}.</p>",
        *(f"<p class='note'>Left out. {_text(line)}</p>" for line in left_out),
        "<h2>At a glance</h2>",
        _glance(report),
        "<p class='note'>Bold is the best of the models. No model can be expected to come closer"
        " than real rows come to real rows.</p>",
        _likelihood_section(report),
        _column_section(report, figures),
        _association_section(report, figures),
        _classifier_section(report),
        _nearest_section(report),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        + "\n".join(filter(None, body))
        + "</body></html>\n"
    )
    with replace_file(path) as part:
        part.write_text(page, encoding="utf-8")
