import csv
import signal
import subprocess
import sys

import numpy as np
import pytest
from subprocesses import environment

from jflow._core import files
from jflow.data import writers


def test_npz_grows_by_chunks(tmp_path):
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(10, 2, 3)), np.arange(10, dtype=np.int32)
    names = np.array(["a", "bb"])[label % 2]
    with writers.npz_writer(tmp_path / "a.npz", 10) as write:
        for part in (slice(0, 4), slice(4, 8), slice(8, 10)):
            write({"x": x[part], "label": label[part], "names": names[part]})
    with np.load(tmp_path / "a.npz") as z:
        for key, value in {"x": x, "label": label, "names": names}.items():
            assert z[key].dtype == value.dtype
            np.testing.assert_array_equal(z[key], value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_npz_holds_the_rows_it_announced(tmp_path):
    with (
        pytest.raises(ValueError, match="4 rows came where 5"),
        writers.npz_writer(tmp_path / "a.npz", 5) as write,
    ):
        write({"x": np.zeros(4)})
    assert not list(tmp_path.iterdir())


def test_csv(tmp_path):
    with writers.csv_writer(tmp_path / "a.csv") as write:
        write([["x", "y"]])
        write([["1", "a,b"], ["2", 'c"d']])
    with open(tmp_path / "a.csv", newline="") as file:
        assert list(csv.reader(file)) == [["x", "y"], ["1", "a,b"], ["2", 'c"d']]


def test_cells():
    header, rows = writers.cells(
        {"x": np.array([[1.5, 2.0], [3.0, 4.25]], np.float32), "label": np.array([7, 8])}
    )
    assert header == ["x_0", "x_1", "label"]
    assert rows == [["1.5", "2.0", "7"], ["3.0", "4.25", "8"]]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.replace_file(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with files.replace_file(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_unwritable_paths_are_found_first(tmp_path):
    (tmp_path / "file").write_text("")
    for path, error in [
        (tmp_path, IsADirectoryError),
        (tmp_path / "no" / "a.npz", FileNotFoundError),
        (tmp_path / "file" / "a.npz", NotADirectoryError),
    ]:
        with pytest.raises(error, match="cannot write"), files.replace_file(path):
            pytest.fail("the block was entered")


def test_what_a_killed_writer_left_goes_with_the_next_and_a_living_ones_stays(tmp_path):
    path, killed = tmp_path / "a.txt", tmp_path / ".a.txt.killed.part"
    killed.mkdir()
    (killed / "a.txt").write_text("half")
    code = (
        "import os, signal; from jflow._core.files import replace_file\n"
        f"with replace_file({str(path)!r}) as part:\n"
        "    part.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    for _ in range(2):
        command = [sys.executable, "-c", code]
        assert subprocess.run(command, env=environment()).returncode == -signal.SIGKILL
        (left,) = tmp_path.iterdir()
        assert (left / "a.txt").read_text() == "half" and left != killed
    with files.replace_file(path) as one:
        one.write_text("one")
        with files.replace_file(path) as other:
            other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
