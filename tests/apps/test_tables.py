import csv
import json

import numpy as np
import pytest

from jflow import data, metrics
from jflow.apps import cli, tables

STILL = ["steps=1", "width=8", "num_blocks=1", "bins=4", "--quiet"]


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
    """A folder with a mixed table, and a fit of one step."""
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
    np.testing.assert_array_equal(prepared.encoded, again.encoded)
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


def test_preprocess_state_is_json_and_goes_back_exactly(tmp_path):
    prepared = tables.prepare(write(tmp_path / "t.csv", mixed()))
    pre = tables.preprocess(lambda: prepared)
    train = prepared.rows("train")
    state = json.loads(json.dumps(pre.fit(train)))
    y = pre.apply(state, train, None)
    assert y["code"].shape == y["x"].shape == train["x"].shape and y["x"].dtype == np.float32
    numbers = y["x"][:, [0, 2]]  # near a standard normal
    assert np.abs(numbers.mean(0)).max() < 0.1 and np.abs(numbers.std(0) - 1).max() < 0.1
    # a lattice comes back exactly but where float32 crossed the edge of a cell
    back = pre.undo(state, y)["x"]
    np.testing.assert_allclose(back[:, 0], train["x"][:, 0], rtol=1e-5, atol=1e-5)
    assert (back[:, [1, 3]] == train["x"][:, [1, 3]]).all()
    assert (back[:, 2] == train["x"][:, 2]).mean() > 0.99
    assert tables.is_table(state) and not tables.is_table({"mean": [0.0], "std": [1.0]})


def test_the_report_counts_its_rows(fitted):
    report = json.loads((fitted / "run" / "report.json").read_text())
    assert report["table_rows"] == 320 and report["parts"] == {
        "train": 256,
        "valid": 32,
        "test": 32,
    }
    assert [c["counted_as"] for c in report["schema"]] == ["density", "mass", "density", "mass"]
    # The mean of all is that of the two kinds, weighted: the Gaussian's, which is known in closed
    # form, of the others.
    prepared = tables.prepare(fitted / "table.csv")
    seen = prepared.test_rows_in_train()
    assert 0 < seen.sum() == report["test_rows_in_train"]
    rng = np.random.default_rng((0, 1))
    noisy = [data.add_noise(prepared.schema, prepared.rows(p)["x"], rng) for p in ("train", "test")]
    gaussian = metrics.gaussian_log_prob(*noisy) + data.log_mass_unit(prepared.schema)
    scores = report["likelihoods"]["of"]
    unseen = scores["test rows that are not in train"]
    assert unseen["gaussian"] == pytest.approx(gaussian[~seen].mean(), abs=1e-9)
    assert scores["test rows"]["gaussian"] == pytest.approx(gaussian.mean(), abs=1e-9)
    assert report["models"] == ["flow", "gaussian", "copula"]
    assert "<h1>table.csv: synthetic rows" in (fitted / "run" / "report.html").read_text()


def test_synthetic_rows_have_the_tables_form(fitted):
    original, synthetic = read(fitted / "table.csv"), read(fitted / "run" / "synthetic.csv")
    assert synthetic[0] == original[0] and len(synthetic) == len(original)
    real, count, price, color = zip(*synthetic[1:], strict=True)
    assert set(color) == {"red", "sky blue"}
    assert all(c.removeprefix("-").isdigit() for c in count)  # nothing is clipped to the table
    assert all(len(p.partition(".")[2]) == 2 for p in price)
    assert len(set(real)) == 320


def test_samples_of_a_fit_come_as_rows_and_as_arrays(fitted):
    """Without the table, which may have moved."""
    (fitted / "table.csv").rename(fitted / "moved.csv")
    sample = ["sample", str(fitted / "run"), "--num", "9", "--quiet", "--out"]
    try:
        for name in ("rows.csv", "rows.npz"):
            assert cli.main([*sample, str(fitted / name)]) == 0
    finally:
        (fitted / "moved.csv").rename(fitted / "table.csv")
    rows = read(fitted / "rows.csv")
    assert rows[0] == ["real", "count", "price", "color"] and len(rows) == 10
    with np.load(fitted / "rows.npz") as z:
        assert z["count"].dtype == np.int64 and z["real"].dtype == np.float64
        assert [f"{v:.2f}" for v in z["price"]] == [row[2] for row in rows[1:]]
        assert z["color"].tolist() == [row[3] for row in rows[1:]]


def test_a_fit_of_another_table_is_not_resumed(tmp_path, capsys):
    path = write(tmp_path / "t.csv", mixed(60), header=False)
    command = ["fit", str(path), "--out", str(tmp_path / "run"), *STILL]
    assert cli.main(command) == 0
    assert len(read(tmp_path / "run" / "synthetic.csv")) == 60  # no header, as in the table
    write(path, mixed())
    assert cli.main(command) == 2
    assert "another config" in capsys.readouterr().err
    assert cli.main([*command, "low=3,4"]) == 2
    assert "'low' is found from the table" in capsys.readouterr().err


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
    state = pre.fit(rows)
    back = pre.undo(state, pre.apply(state, rows, None))["x"]
    # float32 moves a value across a cell's edge at times
    assert np.mean(back == prepared.encoded[prepared.part == "train"]) > 0.98


def test_real_tables_are_prepared(data_dir):
    prepared = tables.prepare(data_dir / "tabular" / "winequality-red.csv.gz")
    assert (
        len(prepared.encoded) - len(np.unique(prepared.encoded, axis=0)) == 240
    )  # the known count of repeated rows
    apart = tables.prepare(data_dir / "tabular" / "winequality-red.csv.gz", group_repeated=True)
    assert prepared.test_rows_in_train().any() and not apart.test_rows_in_train().any()
    adult = data_dir / "tabular" / "adult-test.csv.gz"
    with pytest.warns(match="'column 5' is a recoding of column 'column 4'"):
        prepared = tables.prepare(adult)
    assert sum(c.kind == "categorical" for c in prepared.schema) == 9
    prepared = tables.prepare(data_dir / "tabular" / "california_housing.csv.gz")
    assert np.isnan(prepared.encoded).sum() == 207 and prepared.dropped == 0
    whole = tables.prepare(data_dir / "tabular" / "california_housing.csv.gz", drop_missing=True)
    assert whole.dropped == 207 and not np.isnan(whole.encoded).any()
