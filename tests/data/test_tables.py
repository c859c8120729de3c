import gzip

import numpy as np
import pandas as pd
import pytest

from jflow import data


def write(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def rows_of(table):
    return [list(row) for row in zip(*table.cells, strict=True)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "x,y\n1,a\n2,b\n"),
        ("a.csv", "\ufeffx,y\r\n1,a\r\n2,b"),
        ("a.csv", "# made by hand\n\nx, y\n1, a\n\n2, b\n"),
        ("a.csv", '"x","y"\n"1","a"\n"2","b"\n'),
        ("a.csv", "x;y\n1;a\n2;b\n"),
        ("a.tsv", "x\ty\n1\ta\n2\tb\n"),
        ("a.txt", "x  y\n 1 a\n 2   b \n"),
        ("a.csv.gz", "x,y\n1,a\n2,b\n"),
    ],
)
def test_delimiters_headers_and_gzip(tmp_path, name, text):
    table = data.read_table(write(tmp_path / name, text))
    assert table.names == ("x", "y") and table.header
    assert rows_of(table) == [["1", "a"], ["2", "b"]]


def test_lines_are_those_of_the_file(tmp_path):
    table = data.read_table(write(tmp_path / "a.csv", "# note\n\nx,y\n\n1,a\n2,b\n"))
    assert table.lines.tolist() == [5, 6]


@pytest.mark.parametrize(
    ("text", "header"),
    [
        ("1,2\n3,4\n", False),
        ("a,b\n3,4\n5,6\n", True),
        ("a,1\nb,2\nc,3\n", False),  # a number in the first line
        ("a,b\na,c\nb,c\n", False),  # text throughout, and 'a' recurs
        ("name,town\nAnn,Bonn\nBob,Rome\n", True),  # text throughout, and no name recurs
    ],
)
def test_a_header_is_found(tmp_path, text, header):
    table = data.read_table(write(tmp_path / "a.csv", text))
    assert table.header is header
    assert table.rows == len(text.splitlines()) - header
    if not header:
        assert table.names == ("column 1", "column 2")
    assert data.read_table(tmp_path / "a.csv", header=False).rows == len(text.splitlines())


def test_columns_are_chosen_in_the_order_given(tmp_path):
    path = write(tmp_path / "a.csv", "x,y,z\n1,2,3\n4,5,6\n")
    assert rows_of(data.read_table(path, columns=("z", "x"))) == [["3", "1"], ["6", "4"]]
    assert data.read_table(path, drop=("y",)).names == ("x", "z")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.csv: the table is empty"),
        ("\n\n# nothing\n", "a.csv: the table is empty"),
        ("x,y\n", "no rows below its header"),
        ("x,y\n1,2\n3\n4,5\n", "a.csv: line 3 has 1 field, line 1 has 2"),
        ("x,y\n1,2\n3,4,5\n", "line 3 has 3 fields"),
    ],
)
def test_broken_tables(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        data.read_table(write(tmp_path / "a.csv", text), header=text.startswith("x") or None)


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.read_table(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match="a folder"):
        data.read_table(tmp_path)
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"x,y\n1,2\n3,4\n" * 1000)[:-12])
    with pytest.raises(ValueError, match=r"cut\.csv\.gz is not a complete gzip"):
        data.read_table(tmp_path / "cut.csv.gz")
    path = write(tmp_path / "a.csv", "x,y\n1,2\n3,4\n")
    with pytest.raises(ValueError, match="no column 'w'; the table has 'x', 'y'"):
        data.read_table(path, columns=("w",))
    with pytest.raises(ValueError, match="no columns are left"):
        data.read_table(path, drop=("x", "y"))


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_encodings_are_recognized(tmp_path, encoding):
    (tmp_path / "a.csv").write_bytes("Größe,y\nklein,1\ngroß,2\n".encode(encoding))
    table = data.read_table(tmp_path / "a.csv")
    assert table.names == ("Größe", "y") and rows_of(table) == [["klein", "1"], ["groß", "2"]]


@pytest.mark.parametrize(("encoding", "name"), [("cp1252", "Windows-1252"), ("latin-1", "8859")])
def test_other_encodings_are_read_with_a_warning(tmp_path, encoding, name):
    price = "\u20ac" if encoding == "cp1252" else "\x81"  # no letter of Windows-1252
    (tmp_path / "a.csv").write_bytes(f"Größe,y\nklein,1\n{price},2\n".encode(encoding))
    with pytest.warns(UserWarning, match=rf"a\.csv is not in UTF-8 \(line 1\).*{name}"):
        table = data.read_table(tmp_path / "a.csv")
    assert table.names == ("Größe", "y") and table.cells[0].tolist() == ["klein", price]


def test_mixed_encodings_and_binary_files_are_refused(tmp_path):
    lines = [b"x,y\n", "ä,1\n".encode(), "ö,2\n".encode("cp1252")]
    (tmp_path / "a.csv").write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=r"mixes two encodings: line 2 is UTF-8 and line 3 is not"):
        data.read_table(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(bytes(range(256)) * 4 + b"\0" * 64)
    with pytest.raises(ValueError, match=r"b\.csv is not a text table: it holds bytes of zero"):
        data.read_table(tmp_path / "b.csv")
    (tmp_path / "c.xls").write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 64)
    with pytest.raises(ValueError, match=r"of the old kind \(.xls\): save it as .xlsx"):
        data.read_table(tmp_path / "c.xls")


def test_names_are_told_apart(tmp_path):
    path = write(tmp_path / "a.csv", "a,a,,a (2),\n1,2,3,4,\n5,6,7,8,\n")
    said = "column 5 has neither a name nor a value.*|'a' names more than one"
    with pytest.warns(UserWarning, match=said):
        table = data.read_table(path)
    assert table.names == ("a", "a (3)", "column 3", "a (2)")
    assert rows_of(table)[0] == ["1", "2", "3", "4"]


def test_a_line_that_names_the_delimiter_is_no_row(tmp_path):
    table = data.read_table(write(tmp_path / "a.csv", "sep=;\nx;y\n1,5;2\n3,5;4\n"))
    assert table.names == ("x", "y") and table.lines.tolist() == [3, 4]


def test_frames_and_arrays_are_tables():
    frame = pd.DataFrame({"x": [1.5, np.nan], 7: ["a", None], ("b", 2): [True, False]})
    table = data.read_table(frame, drop=("b 2",))
    assert table.names == ("x", "7") and table.cells[1].tolist() == ["a", ""]
    assert table.cells[0].dtype == np.float64 and np.isnan(table.cells[0][1])
    assert data.read_table(np.ones((3, 2), np.float32)).names == ("column 1", "column 2")
    for wrong, error, said in [
        (np.ones(3), ValueError, r"shape \(3,\); a single column is x\[:, None\]"),
        (np.ones((3, 2), complex), ValueError, "complex numbers"),
        (np.ones((0, 2)), ValueError, "the array: the table has no rows"),
        ([[1, 2], [3, 4]], TypeError, "got list"),
    ]:
        with pytest.raises(error, match=said):
            data.read_table(wrong)


def test_real_tables_read(data_dir):
    for name, rows, columns, header in [
        ("power_plant.txt.gz", 9568, 5, False),
        ("boston_housing.data.gz", 506, 14, False),
        ("california_housing.csv.gz", 20640, 10, True),
        ("adult-test.csv.gz", 16281, 15, False),
    ]:
        table = data.read_table(data_dir / "tabular" / name)
        assert (table.rows, len(table.names), table.header) == (rows, columns, header)
