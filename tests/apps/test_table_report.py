import html
import json
import re
import sys

import numpy as np
import pytest

from jflow.apps import baselines, table_page, table_report
from jflow.data import Column

NUMBER = Column("number", "continuous")
COUNT = Column("count", "lattice", step=1.0, decimals=0, high=5.0)
COLOR = Column("color", "categorical", step=1.0, high=1.0, categories=("red", "blue"))


def table(n, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n)
    return np.stack([z, rng.poisson(np.exp(0.5 * z)), z + rng.normal(size=n) > 0], 1)


pytest.importorskip("sklearn")
SCHEMA = (NUMBER, COUNT, COLOR)


ROWS = 600
NOISE = 1.95 * np.sqrt(2 / ROWS)  # Kolmogorov-Smirnov's, passed once in 1000


@pytest.fixture(scope="module")
def judged():
    """A fresh draw as a model, one whose columns are shuffled, and one that gives back rows."""
    train, test = table(ROWS), table(ROWS, 6)
    rng = np.random.default_rng(2)
    copied = table(ROWS, 3)
    copied[::2] = train[rng.permutation(ROWS)[: ROWS // 2]]
    synthetic = {
        "fresh": table(ROWS, 4),
        "shuffled": rng.permuted(table(ROWS, 5), axis=0),
        "copied": copied,
    }
    return table_report.report(SCHEMA, train, test, synthetic)


def test_every_number_has_a_direction_and_the_report_is_json(judged):
    found = judged
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found
    for part in ("columns", "associations", "classifier", "nearest_rows"):
        assert "perfect" in found[part]["direction"] or "should" in found[part]["direction"]
        assert set(found[part]["rows"]) == {"train", "test", "fresh", "shuffled", "copied"}


def test_a_fresh_draw_is_as_good_as_the_training_rows(judged):
    """A false alarm in 1000 of each number: the AUC within 3.3 standard errors, the chance to be
    nearer within 3.3 of its own."""
    found = judged
    for column in found["columns"]["columns"]:
        assert column["distances"]["fresh"] < NOISE
    classifier = found["classifier"]
    for name in ("fresh", "train"):
        assert abs(classifier["auc"][name] - 0.5) < 3.3 * classifier["standard_error"][name]
    nearer = found["nearest_rows"]["nearer_than_test"]["of"]["fresh"]
    assert abs(nearer - 0.5) < 3.3 * np.sqrt((2 * ROWS + 1) / (12 * ROWS**2))
    assert found["nearest_rows"]["copies"]["of"]["fresh"] == 0


def test_shuffled_columns_show_in_pairs_and_not_in_columns(judged):
    found = judged
    for column in found["columns"]["columns"]:
        assert column["distances"]["shuffled"] < NOISE
    for between in ("pearson", "spearman"):
        difference = found["associations"][between]["mean_difference"]
        assert difference["shuffled"] > 3 * max(difference["fresh"], difference["train"])
    assert found["classifier"]["auc"]["shuffled"] > 0.6


def test_copies_are_found(judged):
    found = judged
    nearest = found["nearest_rows"]
    assert nearest["copies"]["of"] == {"test": 0, "fresh": 0, "shuffled": 0, "copied": 0.5}
    assert nearest["nearer_than_test"]["of"]["copied"] > 0.7
    assert nearest["quantiles"]["copied"]["0.25"] == 0 < nearest["quantiles"]["test"]["0.01"]


def test_copies_with_missing_values_count_whatever_the_bits_of_nan_and_zero():
    train = np.array([[np.nan, 0.0], [1.0, 2.0]])
    other = np.array([[-np.nan, -0.0], [1.0, 3.0]])
    found = table_report.report(SCHEMA[:2], train, train, {"flow": other})
    assert found["nearest_rows"]["copies"]["of"] == {"test": 1.0, "flow": 0.5}


def test_associations_of_ranks_and_values_are_symmetric_and_named(judged):
    found = judged
    part = found["associations"]
    assert part["names"] == ["number", "count", "color"]
    values, ranks = (np.array(part[b]["matrices"]["test"]) for b in ("pearson", "spearman"))
    np.testing.assert_array_equal(ranks, ranks.T)
    np.testing.assert_array_equal(np.diag(ranks), 1)
    assert 0.3 < ranks[0, 1] != values[0, 1]


def test_large_tables_are_drawn_from(monkeypatch):
    """As many rows of the training part as of each model: the noise must be theirs."""
    for name in ("COLUMN_ROWS", "PAIR_ROWS", "CLASSIFIER_ROWS", "QUERY_ROWS", "REFERENCE_ROWS"):
        monkeypatch.setattr(table_report, name, 60)
    found = table_report.report(SCHEMA, table(200), table(100, 1), {"flow": table(55, 2)})
    assert found["rows"] == {"train": 200, "test": 100, "flow": 55}
    assert found["columns"]["rows"] == {"test": 60, "train": 55, "flow": 55}
    for part in ("associations", "classifier"):
        assert found[part]["rows"] == {"test": 55, "train": 55, "flow": 55}
    assert found["nearest_rows"]["rows"] == {"test": 60, "flow": 55, "train": 60}


def pages(schema, train, test, synthetic, tmp_path):
    """The report, and the page that it makes."""
    found = table_report.report(schema, train, test, synthetic)
    json.dumps(found, allow_nan=False)
    figures = table_page.draw_figures(schema, found, train, synthetic)
    table_page.write_html(tmp_path / "report.html", found, figures, title="a & <b>")
    return found, (tmp_path / "report.html").read_text()


HOSTILE = "<script>alert('$x_1$')</script> & \"quotes\""


def test_names_are_text_on_the_page(tmp_path):
    """Also where matplotlib would take them for formulas."""
    pytest.importorskip("matplotlib")
    color = COLOR._replace(name=HOSTILE, categories=("$\\frac{$", HOSTILE))
    schema = (NUMBER._replace(name="$_{^"), COUNT, color)
    synthetic = {"<i>flow</i>": table(60, 2)}
    _, page = pages(schema, table(60), table(60, 1), synthetic, tmp_path)
    assert "<script" not in page and "<i>" not in page
    assert "<title>a &amp; &lt;b&gt;</title>" in page
    assert "&lt;script&gt;" in page
    assert page.count("data:image/png;base64,") == 3 + 2 + 3
    assert f'alt="Distribution of {html.escape(HOSTILE)}, real rows' in page
    assert not re.search(r"https?://|src=\"(?!data:)|href=", page)


def test_tables_of_categories_alone(tmp_path):
    schema = (COLOR, COLOR._replace(name="shade", categories=tuple("abcdefghijkl")))
    rng = np.random.default_rng(0)
    rows = [np.stack([rng.integers(0, 2, 80), rng.integers(0, 12, 80)], 1) for _ in range(3)]
    found, page = pages(schema, rows[0], rows[1], {"flow": rows[2]}, tmp_path)
    assert found["columns"]["columns"][1]["distance"] == "total variation"
    assert found["nearest_rows"]["copies"]["of"]["test"] > 0.9  # there are 24 rows to have
    assert "Privacy" in page


def test_one_column_a_constant_model_and_missing_values(tmp_path):
    """A column alone has no pairs; a constant is at the largest distance to its quantiles."""
    train, test = np.arange(100.0)[:, None], np.arange(100.0)[:, None]
    train[::4] = np.nan
    found, page = pages((NUMBER,), train, test, {"flow": 0 * test - 5}, tmp_path)
    (column,) = found["columns"]["columns"]
    assert column["distances"]["flow"] == 1
    assert column["missing"] == {"test": 0, "train": 0.25, "flow": 0}
    assert found["associations"]["pearson"]["mean_difference"] == {}
    assert "25.00%" in page and "Pairs of columns" not in page
    nothing = table_report.report((NUMBER,), train, test, {"flow": np.nan * test})
    assert nothing["columns"]["columns"][0]["distances"]["flow"] is None
    json.dumps(nothing, allow_nan=False)


def test_columns_stand_from_the_farthest_to_the_nearest(tmp_path):
    """One that a model leaves empty is the first."""
    schema = tuple(NUMBER._replace(name=f"column {k}") for k in range(3))
    x = np.random.default_rng(0).normal(size=(40, 3))
    _, page = pages(schema, x, x, {"flow": x + [0, np.nan, 9]}, tmp_path)
    lines = re.findall(r"<td>(column \d)<small>", page)
    assert lines[:3] == ["column 1", "column 2", "column 0"]


def test_ten_rows_are_too_few_for_the_classifier_alone(tmp_path):
    train = table(10)
    synthetic = {"flow": table(10, 2), **baselines.baseline_rows(SCHEMA, train, 10)}
    found, page = pages(SCHEMA, train, table(2, 1), synthetic, tmp_path)
    assert found["classifier"] is None
    assert "needs at least 50 test rows" in found["left_out"][0] and "at least 50" in page
    assert "gaussian" in page and "copula" in page


def test_without_extras_the_page_names_them(tmp_path, monkeypatch):
    for name in ("sklearn.ensemble", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    found, page = pages(SCHEMA, table(60), table(60, 1), {"flow": table(60, 2)}, tmp_path)
    assert found["classifier"] is None and "<img" not in page
    said = "{} pip install &quot;jflow-models[tables]&quot;"
    assert said.format("needs scikit-learn:") in page
    assert said.format("The pictures need matplotlib:") in page


def test_likelihoods_are_shown_with_their_errors(tmp_path):
    compared = table_report.compare(np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.5, 1.0]))
    likelihoods = {"test rows": compared, "rows that are new": None}
    x = table(20)
    found = table_report.report(SCHEMA, x, x, {"flow": x}, likelihoods=likelihoods)
    assert "larger is better" in found["likelihoods"]["direction"]
    assert found["likelihoods"]["of"] == likelihoods
    table_page.write_html(tmp_path / "report.html", found, {})
    page = (tmp_path / "report.html").read_text()
    assert f"{compared['difference']:.4f} ± {compared['standard_error']:.4f}" in page
    assert "rows that are new" not in page


@pytest.mark.parametrize(
    ("synthetic", "said"),
    [
        ({}, "expected synthetic rows by the names of their models"),
        ({"train": table(5)}, "other than 'train' and 'test'"),
        ({"flow": table(5)[:, :2]}, r"'flow' to be rows of the 3 columns.*got \[5, 2\]"),
        ({"flow": table(0)}, r"got \[0, 3\]"),
        ({"flow": table(5) + [0, np.inf, 0]}, "column 'count' of 'flow' holds an infinity"),
    ],
)
def test_other_rows_are_refused(synthetic, said):
    with pytest.raises(ValueError, match=said):
        table_report.report(SCHEMA, table(5), table(5), synthetic)
