import csv
import itertools
import json

import numpy as np
import pytest
from scipy import stats

from jflow import data, metrics
from jflow.apps import cli, tables

SMALL = ["depth=1", "hidden=4,4", "bins=4", "--quiet"]
STILL = ["steps=1", "learning_rate=0.0", *SMALL]  # the flow stays the Gaussian that it starts at


def write(path, columns, header=True):
    lines = [",".join(columns)] * header + [
        ",".join(map(str, row)) for row in zip(*columns.values(), strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def read(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def mixed(n=300, seed=0):
    """Columns of every kind that depend on each other."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n)
    return {
        "real": [repr(v) for v in (3 * z + rng.normal(size=n)).tolist()],
        "count": rng.poisson(np.exp(1 + 0.3 * z)).tolist(),
        "price": [f"{v:.2f}" for v in 20 + 5 * z + rng.normal(size=n)],
        "color": np.where(z + rng.normal(size=n) > 0, "red", "sky blue").tolist(),
    }


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder with a mixed table, and its fit that stays at the Gaussian."""
    folder = tmp_path_factory.mktemp("fitted")
    columns = mixed()
    columns = {
        name: [*values, *values[:20]] for name, values in columns.items()
    }  # 20 repeated rows
    path = write(folder / "table.csv", columns)
    assert cli.main(["fit", str(path), "--out", str(folder / "run"), *STILL]) == 0
    return folder


def test_prepare_keeps_every_row_and_splits_at_random(tmp_path):
    columns = mixed(100)
    columns = {name: [*values, *values[:7]] for name, values in columns.items()}
    prepared = tables.prepare(write(tmp_path / "t.csv", columns))
    assert [int((prepared.part == p).sum()) for p in ("train", "valid", "test")] == [85, 11, 11]
    assert len(prepared.encoded) == 107 and len(np.unique(prepared.encoded, axis=0)) == 100
    again = tables.prepare(tmp_path / "t.csv")
    np.testing.assert_array_equal(prepared.noisy, again.noisy)  # one fixed noise
    other = tables.prepare(tmp_path / "t.csv", seed=1)
    assert not np.array_equal(other.part, prepared.part)


def test_a_rounded_column_is_trained_on_as_it_is_distributed(tmp_path):
    """Its distinct values alone would be spread evenly: an exponential column of mean 1 would get a
    mean of 3 or so."""
    values = np.random.default_rng(0).exponential(size=3000).round(1)
    prepared = tables.prepare(write(tmp_path / "t.csv", {"wait": values.tolist()}))
    train = prepared.encoded[prepared.part == "train"]
    assert len(train) == 2400
    assert abs(train.mean() - values.mean()) < 4 / np.sqrt(
        4 * 3000
    )  # 4 standard deviations of a draw of 80%


def test_identical_rows_go_to_one_part(tmp_path):
    columns = mixed(200)
    columns = {name: [*values, *values[:40], *values[:20]] for name, values in columns.items()}
    path = write(tmp_path / "t.csv", columns)
    assert tables.prepare(path).test_rows_in_train().any()
    for seed in range(3):
        prepared = tables.prepare(path, group_repeated=True, seed=seed)
        parts = [
            {tuple(row) for row in prepared.encoded[prepared.part == p]}
            for p in ("train", "valid", "test")
        ]
        assert sum(map(len, parts)) == 200 == len(set.union(*parts))
        assert not prepared.test_rows_in_train().any()
        assert (
            abs((prepared.part == "train").sum() - 208) <= 4
            and (prepared.part == "test").sum() >= 26
        )
    assert (prepared.part == "train").sum() + (prepared.part != "train").sum() == 260


@pytest.mark.parametrize(
    ("columns", "counts"),
    [
        (
            {"a": [0, 1, 0, 1] * 15, "b": ["x", "y", "y", "x"] * 15},
            "4 distinct rows in 60, and one of them 15 times",
        ),
        ({"a": [*range(900), *[0] * 100]}, "900 distinct rows in 1000, and one of them 101 times"),
        (
            {"a": [v % 80 for v in range(960)]},
            "80 distinct rows in 960, and one of them 12 times",
        ),  # none of them large
    ],
)
def test_grouping_is_refused_where_it_changes_the_columns(tmp_path, columns, counts):
    path = write(tmp_path / "t.csv", columns)
    assert set(tables.prepare(path).part) == {"train", "valid", "test"}
    with pytest.raises(ValueError, match=rf"t\.csv: group_repeated=True would change .*{counts}"):
        tables.prepare(path, group_repeated=True)


def test_preprocess_state_is_json_and_fitted_on_training_rows(tmp_path):
    prepared = tables.prepare(write(tmp_path / "t.csv", mixed()))
    pre = tables.preprocess(lambda: prepared)
    train = prepared.rows("train")
    state = json.loads(json.dumps(pre.fit(train)))
    y = pre.apply(state, train, None)
    np.testing.assert_allclose(y["x"].mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(y["x"].std(0), 1, atol=1e-9)
    np.testing.assert_allclose(
        pre.undo(state, y)["x"], prepared.encoded[prepared.part == "train"], atol=1e-9
    )
    # real and price count per unit, count and color (steps of 1) as mass: all have log step 0 but
    # the standardization
    np.testing.assert_allclose(pre.log_det(state, y), -np.log(train["x"].std(0)).sum(), rtol=1e-12)
    assert tables.is_table(state) and not tables.is_table({"mean": [0.0], "std": [1.0]})


def test_the_report_puts_flow_and_gaussian_in_the_same_units(fitted):
    """A flow that is the Gaussian must be reported equal to it, whatever the columns' scales and
    kinds."""
    report = json.loads((fitted / "run" / "report.json").read_text())
    scores = report["test_log_likelihood"]
    assert report["rows"] == 320 and report["parts"] == {"train": 256, "valid": 32, "test": 32}
    # the flow's covariance has a ridge of 1e-4
    assert scores["flow"] == pytest.approx(scores["gaussian"], abs=2e-3)
    assert [c["counted_as"] for c in report["columns"]] == ["density", "mass", "density", "mass"]


def test_the_report_tells_test_rows_that_stand_in_train_apart(fitted):
    report = json.loads((fitted / "run" / "report.json").read_text())
    lines = read(fitted / "table.csv")[1:]
    part = [line[1] for line in read(fitted / "run" / "log_density.csv")[1:]]
    train = {tuple(row) for row, p in zip(lines, part, strict=True) if p == "train"}
    seen = np.array(
        [tuple(row) in train for row, p in zip(lines, part, strict=True) if p == "test"]
    )
    assert 0 < seen.sum() == report["test_rows_in_train"]
    # The mean of all is that of the two kinds, weighted: the Gaussian's, which is known in closed
    # form, of the others.
    prepared = tables.prepare(fitted / "table.csv")
    gaussian = metrics.gaussian_log_prob(prepared.rows("train")["x"], prepared.rows("test")["x"])
    scores = report["test_log_likelihood_of_rows_not_in_train"]
    assert scores["gaussian"] == pytest.approx(gaussian[~seen].mean(), abs=1e-9)
    assert report["test_log_likelihood"]["gaussian"] == pytest.approx(gaussian.mean(), abs=1e-9)
    assert scores["flow"] == pytest.approx(scores["gaussian"], abs=2e-3)


def test_log_density_of_every_row_is_the_gaussians_integral_over_its_cell(fitted):
    prepared = tables.prepare(fitted / "table.csv")
    lines = read(fitted / "run" / "log_density.csv")
    assert lines[0] == ["line", "part", "log_density"]
    assert [int(line[0]) for line in lines[1:]] == list(range(2, 322))
    assert [line[1] for line in lines[1:]] == prepared.part.tolist()
    found = np.array([float(line[2]) for line in lines[1:]])
    # The midpoint rule over each cell, on which a smooth density is exact to 1%: 20 points for
    # color, 20 for count.
    train = prepared.rows("train")["x"]
    gaussian = stats.multivariate_normal(train.mean(0), np.cov(train.T, bias=True))
    rows = prepared.encoded[:40]
    u = (np.arange(20) + 0.5) / 20
    points = [rows + np.array([0, a, 0.005, b]) for a, b in itertools.product(u, u)]
    expected = metrics.log_mean_exp(np.stack([gaussian.logpdf(p) for p in points]))
    # 16 draws of noise: the density varies over a cell by a factor of about e, so one row errs by
    # 0.1 or so.
    assert np.abs(found[:40] - expected).mean() < 0.1
    assert abs((found[:40] - expected).mean()) < 0.05


def test_synthetic_rows_have_the_tables_form(fitted):
    original, synthetic = read(fitted / "table.csv"), read(fitted / "run" / "synthetic.csv")
    assert synthetic[0] == original[0] and len(synthetic) == len(original)
    real, count, price, color = zip(*synthetic[1:], strict=True)
    assert set(color) == {"red", "sky blue"}
    assert all(c.removeprefix("-").isdigit() for c in count)  # nothing is clipped to the table
    assert all(len(p.partition(".")[2]) == 2 for p in price)
    assert len(set(real)) == 320
    x, y = (np.array([float(v) for v in column]) for column in (real, price))
    truth = np.array([[float(v) for v in row[:3:2]] for row in original[1:]])
    # 320 rows of the Gaussian fit: means to 3/sqrt(320) standard deviations or so, correlation
    # likewise
    for got, want in ((x, truth[:, 0]), (y, truth[:, 1])):
        assert abs(got.mean() - want.mean()) < 0.25 * want.std()
        assert 0.8 < got.std() / want.std() < 1.2
    assert abs(np.corrcoef(x, y)[0, 1] - np.corrcoef(truth.T)[0, 1]) < 0.1


def test_samples_of_a_fit_come_as_rows_and_as_arrays(fitted):
    """Without the table, which may have moved."""
    (fitted / "table.csv").rename(fitted / "moved.csv")
    try:
        for name in ("rows.csv", "rows.npz"):
            assert (
                cli.main(
                    [
                        "sample",
                        str(fitted / "run"),
                        "--num",
                        "9",
                        "--out",
                        str(fitted / name),
                        "--batch",
                        "4",
                        "--quiet",
                    ]
                )
                == 0
            )
    finally:
        (fitted / "moved.csv").rename(fitted / "table.csv")
    rows = read(fitted / "rows.csv")
    assert rows[0] == ["real", "count", "price", "color"] and len(rows) == 10
    with np.load(fitted / "rows.npz") as z:
        assert z["count"].dtype == np.int64 and z["real"].dtype == np.float64
        assert [f"{v:.2f}" for v in z["price"]] == [row[2] for row in rows[1:]]
        assert z["color"].tolist() == [row[3] for row in rows[1:]]


def test_a_fit_learns_and_resumes(tmp_path, capsys):
    """Two clusters, which no Gaussian is; the second call finds the run complete and writes the
    same results."""
    rng = np.random.default_rng(0)
    sign = rng.choice([-1, 1], 500)
    columns = {
        "x": [f"{v:.3f}" for v in 4 * sign + rng.normal(size=500)],
        "y": [repr(v) for v in (sign + 0.1 * rng.normal(size=500)).tolist()],
    }
    path = write(tmp_path / "t.csv", columns, header=False)
    command = [
        "fit",
        str(path),
        "--out",
        str(tmp_path / "run"),
        "steps=200",
        "learning_rate=1e-2",
        *SMALL[:-1],
    ]
    assert cli.main(command) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    # The truth is 1.0 nats better than the Gaussian; the flow need not find all of it in 200 steps.
    assert report["test_log_likelihood"]["difference"] > 0.3
    assert "difference" in capsys.readouterr().out
    assert len(read(tmp_path / "run" / "synthetic.csv")) == 500  # no header, as in the table
    before = (tmp_path / "run" / "synthetic.csv").read_bytes()
    (tmp_path / "run" / "synthetic.csv").unlink()
    assert cli.main(command) == 0
    assert (tmp_path / "run" / "synthetic.csv").read_bytes() == before
    # another table under the same name is not resumed
    write(path, mixed())
    assert cli.main(command) == 2
    assert "another config" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["wine", "breast_cancer"])
def test_tables_of_scikit_learn(tmp_path, name):
    from sklearn import datasets

    frame = getattr(datasets, f"load_{name}")(as_frame=True).frame
    frame.to_csv(tmp_path / "t.csv", index=False)
    prepared = tables.prepare(tmp_path / "t.csv")
    assert prepared.encoded.shape == frame.shape
    np.testing.assert_allclose(
        prepared.encoded, frame.to_numpy(float), rtol=2.5e-7
    )  # 9.899999 is 9.9
    two = [c.name for c in prepared.schema if c.kind == "categorical"]  # 0 and 1 alone
    assert two == (["target"] if name == "breast_cancer" else [])
    assert {c.kind for c in prepared.schema} <= {"lattice", "categorical"}
    assert prepared.schema[-1].is_mass  # the class, a whole number
    pre = tables.preprocess(lambda: prepared)
    rows = prepared.rows("train")
    assert np.isfinite(metrics.gaussian_log_prob(rows["x"], prepared.rows("test")["x"])).all()
    y = pre.apply(pre.fit(rows), rows, None)["x"].astype(np.float32)
    back = data.decode(prepared.schema, pre.undo(pre.fit(rows), {"x": y})["x"])
    # float32 moves a value by at most 1e-6 standard deviations: less than these steps, but across a
    # cell's edge at times
    assert np.mean(back == prepared.encoded[prepared.part == "train"]) > 0.98


def test_real_tables_are_prepared(data_dir):
    prepared = tables.prepare(data_dir / "tabular" / "winequality-red.csv.gz")
    assert (
        len(prepared.encoded) - len(np.unique(prepared.encoded, axis=0)) == 240
    )  # the known count of repeated rows
    apart = tables.prepare(data_dir / "tabular" / "winequality-red.csv.gz", group_repeated=True)
    assert prepared.test_rows_in_train().any() and not apart.test_rows_in_train().any()
    adult = data_dir / "tabular" / "adult-test.csv.gz"
    with pytest.raises(ValueError, match="'column 5' is a recoding of column 'column 4'"):
        tables.prepare(adult)
    prepared = tables.prepare(adult, drop=("column 5",))
    assert sum(c.kind == "categorical" for c in prepared.schema) == 9
    with pytest.raises(ValueError, match=r"line 292, column 'total_bedrooms'"):
        tables.prepare(data_dir / "tabular" / "california_housing.csv.gz")
