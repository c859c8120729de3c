import csv
import itertools
import json

import numpy as np
import pytest
from scipy import stats

from jflow import cli, data, metrics, tables

SMALL = ["depth=1", "hidden=4,4", "bins=4", "--quiet"]
STILL = ["steps=1", "learning_rate=0.0", *SMALL]  # the flow stays the Gaussian that it starts at


def write(path, columns, header=True):
    lines = [",".join(columns)] * header + [",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
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
        "colour": np.where(z + rng.normal(size=n) > 0, "red", "sky blue").tolist(),
    }


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder with a mixed table, and its fit that stays at the Gaussian."""
    folder = tmp_path_factory.mktemp("fitted")
    columns = mixed()
    columns = {name: [*values, *values[:20]] for name, values in columns.items()}  # 20 repeated rows
    path = write(folder / "table.csv", columns)
    assert cli.main(["fit", str(path), "--out", str(folder / "run"), *STILL]) == 0
    return folder


def test_prepare_sets_repeated_rows_apart_and_splits_the_rest(tmp_path):
    columns = mixed(100)
    columns = {name: [*values, *values[:7]] for name, values in columns.items()}
    prepared = tables.prepare(write(tmp_path / "t.csv", columns))
    assert [int((prepared.part == p).sum()) for p in ("train", "valid", "test", "repeated")] == [80, 10, 10, 7]
    assert (prepared.part[100:] == "repeated").all()
    kept = prepared.encoded[prepared.part != "repeated"]
    assert len(np.unique(kept, axis=0)) == 100
    again = tables.prepare(tmp_path / "t.csv")
    np.testing.assert_array_equal(prepared.noisy, again.noisy)  # one fixed noise
    assert tables.prepare(tmp_path / "t.csv", drop_repeated=False).rows("train")["x"].shape == (85, 4)
    other = tables.prepare(tmp_path / "t.csv", seed=1)
    assert not np.array_equal(other.part, prepared.part)


def test_repeats_of_whole_numbers_and_categories_are_kept(tmp_path):
    """Their frequencies are what is to be learnt: of 4 distinct rows no mass could be told."""
    rng = np.random.default_rng(0)
    columns = {"a": rng.integers(0, 2, 60).tolist(), "b": rng.choice(["x", "y"], 60).tolist()}
    path = write(tmp_path / "t.csv", columns)
    assert not (tables.prepare(path).part == "repeated").any()
    with pytest.raises(ValueError, match="4 distinct rows; a fit needs at least 10"):
        tables.prepare(path, drop_repeated=True)


def test_preprocess_state_is_json_and_fitted_on_training_rows(tmp_path):
    prepared = tables.prepare(write(tmp_path / "t.csv", mixed()))
    pre = tables.preprocess(lambda: prepared)
    train = prepared.rows("train")
    state = json.loads(json.dumps(pre.fit(train)))
    y = pre.apply(state, train, None)
    np.testing.assert_allclose(y["x"].mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(y["x"].std(0), 1, atol=1e-9)
    np.testing.assert_allclose(pre.undo(state, y)["x"], prepared.encoded[prepared.part == "train"], atol=1e-9)
    # real and price count per unit, count and colour (steps of 1) as mass: all have log step 0 but the standardisation
    np.testing.assert_allclose(pre.log_det(state, y), -np.log(train["x"].std(0)).sum(), rtol=1e-12)
    assert tables.is_table(state) and not tables.is_table({"mean": [0.0], "std": [1.0]})


def test_the_report_puts_flow_and_gaussian_in_the_same_units(fitted):
    """A flow that is the Gaussian must be reported equal to it, whatever the columns' scales and kinds."""
    report = json.loads((fitted / "run" / "report.json").read_text())
    scores = report["test_log_likelihood"]
    assert report["rows"] == 320 and report["parts"] == {"train": 240, "valid": 30, "test": 30, "repeated": 20}
    # the flow's covariance has a ridge of 1e-4
    assert scores["flow"] == pytest.approx(scores["gaussian"], abs=2e-3)
    assert [c["counted_as"] for c in report["columns"]] == ["density", "mass", "density", "mass"]


def test_log_density_of_every_row_is_the_gaussians_integral_over_its_cell(fitted):
    prepared = tables.prepare(fitted / "table.csv")
    lines = read(fitted / "run" / "log_density.csv")
    assert lines[0] == ["line", "part", "log_density"]
    assert [int(line[0]) for line in lines[1:]] == list(range(2, 322))
    assert [line[1] for line in lines[1:]] == prepared.part.tolist()
    found = np.array([float(line[2]) for line in lines[1:]])
    # The midpoint rule over each cell, on which a smooth density is exact to 1%: 20 points for colour, 20 for count.
    train = prepared.rows("train")["x"]
    gaussian = stats.multivariate_normal(train.mean(0), np.cov(train.T, bias=True))
    rows = prepared.encoded[:40]
    u = (np.arange(20) + 0.5) / 20
    points = [rows + np.array([0, a, 0.005, b]) for a, b in itertools.product(u, u)]
    expected = metrics.log_mean_exp(np.stack([gaussian.logpdf(p) for p in points]))
    # 16 draws of noise: the density varies over a cell by a factor of about e, so one row errs by 0.1 or so.
    assert np.abs(found[:40] - expected).mean() < 0.1
    assert abs((found[:40] - expected).mean()) < 0.05


def test_synthetic_rows_have_the_tables_form(fitted):
    original, synthetic = read(fitted / "table.csv"), read(fitted / "run" / "synthetic.csv")
    assert synthetic[0] == original[0] and len(synthetic) == len(original)
    real, count, price, colour = zip(*synthetic[1:], strict=True)
    assert set(colour) == {"red", "sky blue"}
    assert all(c.isdigit() for c in count)
    assert all(len(p.partition(".")[2]) == 2 for p in price)
    assert len(set(real)) == 320
    x, y = (np.array([float(v) for v in column]) for column in (real, price))
    truth = np.array([[float(v) for v in row[:3:2]] for row in original[1:]])
    # 320 rows of the Gaussian fit: means to 3/sqrt(320) standard deviations or so, correlation likewise
    for got, want in ((x, truth[:, 0]), (y, truth[:, 1])):
        assert abs(got.mean() - want.mean()) < 0.25 * want.std()
        assert 0.8 < got.std() / want.std() < 1.2
    assert abs(np.corrcoef(x, y)[0, 1] - np.corrcoef(truth.T)[0, 1]) < 0.1


def test_samples_of_a_fit_come_as_rows_and_as_arrays(fitted):
    """Without the table, which may have moved."""
    (fitted / "table.csv").rename(fitted / "moved.csv")
    try:
        for name in ("rows.csv", "rows.npz"):
            assert cli.main(["sample", str(fitted / "run"), "--num", "9", "--out", str(fitted / name), "--batch", "4",
                             "--quiet"]) == 0  # fmt: skip
    finally:
        (fitted / "moved.csv").rename(fitted / "table.csv")
    rows = read(fitted / "rows.csv")
    assert rows[0] == ["real", "count", "price", "colour"] and len(rows) == 10
    with np.load(fitted / "rows.npz") as z:
        assert z["count"].dtype == np.int64 and z["real"].dtype == np.float64
        assert [f"{v:.2f}" for v in z["price"]] == [row[2] for row in rows[1:]]
        assert z["colour"].tolist() == [row[3] for row in rows[1:]]


def test_a_fit_learns_and_resumes(tmp_path, capsys):
    """Two clusters, which no Gaussian is; the second call finds the run complete and writes the same results."""
    rng = np.random.default_rng(0)
    sign = rng.choice([-1, 1], 500)
    columns = {
        "x": [f"{v:.3f}" for v in 4 * sign + rng.normal(size=500)],
        "y": [repr(v) for v in (sign + 0.1 * rng.normal(size=500)).tolist()],
    }
    path = write(tmp_path / "t.csv", columns, header=False)
    command = ["fit", str(path), "--out", str(tmp_path / "run"), "steps=200", "learning_rate=1e-2", *SMALL[:-1]]
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
    np.testing.assert_allclose(prepared.encoded, frame.to_numpy(float), rtol=2.5e-7)  # 9.899999 is 9.9
    assert all(c.kind == "lattice" for c in prepared.schema)
    assert prepared.schema[-1].is_mass  # the class, a whole number
    pre = tables.preprocess(lambda: prepared)
    rows = prepared.rows("train")
    assert np.isfinite(metrics.gaussian_log_prob(rows["x"], prepared.rows("test")["x"])).all()
    y = pre.apply(pre.fit(rows), rows, None)["x"].astype(np.float32)
    back = data.decode(prepared.schema, pre.undo(pre.fit(rows), {"x": y})["x"])
    # float32 moves a value by at most 1e-6 standard deviations: less than these steps, but across a cell's edge at times
    assert np.mean(back == prepared.encoded[prepared.part == "train"]) > 0.98


def test_real_tables_are_prepared(data_dir):
    prepared = tables.prepare(data_dir / "tabular" / "winequality-red.csv.gz")
    assert (prepared.part == "repeated").sum() == 240  # the known count of repeated rows
    prepared = tables.prepare(data_dir / "tabular" / "adult-test.csv.gz")
    assert sum(c.kind == "categorical" for c in prepared.schema) == 9
    with pytest.raises(ValueError, match=r"line 292, column 'total_bedrooms'"):
        tables.prepare(data_dir / "tabular" / "california_housing.csv.gz")
