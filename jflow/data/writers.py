"""Files written a chunk of rows at a time, whole or not at all."""

import contextlib
import csv
import math
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from jflow._core.files import replace_file
from jflow.data._splits import Rows, as_arrays, count

__all__ = ["cells", "csv_writer", "npz_writer"]

Write = Callable[[Rows], None]


@contextlib.contextmanager
def npz_writer(path: str | Path, n: int) -> Iterator[Write]:
    """Writes the arrays of an .npz file a chunk of rows at a time, whole or not at all.

    A context manager; memory holds one chunk.

    Args:
        path: Of the file.
        n: How many rows there will be in all.

    Yields:
        write(rows), which appends a dict of arrays.

    Raises:
        ValueError: For objects, for another number of rows, and for chunks that differ in names,
            shapes or types: their bytes would be read as other numbers.
    """
    with replace_file(path) as part, contextlib.ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        forms: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        written = 0

        def write(rows: Rows) -> None:
            nonlocal forms, written
            rows = {key: np.asarray(value) for key, value in as_arrays(rows).items()}
            found = {key: (value.dtype, value.shape[1:]) for key, value in rows.items()}
            if objects := [key for key, value in rows.items() if value.dtype.hasobject]:
                raise ValueError(
                    f"{path}: {objects[0]!r} holds objects; expected numbers, or text as"
                    " numpy's str"
                )
            forms = forms or found
            if found != forms:
                raise ValueError(
                    f"{path}: expected every chunk of rows to hold {forms}, got {found}"
                )
            for key, value in rows.items():
                if key not in files:
                    files[key] = stack.enter_context(open(part.parent / f"{len(files)}.npy", "w+b"))
                    header = np.lib.format.header_data_from_array_1_0(value)
                    header |= {"fortran_order": False, "shape": (n, *value.shape[1:])}
                    np.lib.format.write_array_header_1_0(files[key], header)
                files[key].write(np.ascontiguousarray(value).tobytes())
            written += count(rows)

        yield write
        if written != n:
            raise ValueError(f"{path}: {written} rows came where {n} were announced")
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            for key, file in files.items():
                file.seek(0)
                with archive.open(f"{key}.npy", "w", force_zip64=True) as entry:
                    shutil.copyfileobj(file, entry, 1 << 20)


@contextlib.contextmanager
def csv_writer(path: str | Path) -> Iterator[Callable[..., None]]:
    """Writes a delimited file a chunk of rows at a time, whole or not at all.

    A context manager.

    Args:
        path: Of the file.

    Yields:
        write(rows of cells, delimiter=","), which appends; a header is a row like any other.
    """
    with replace_file(path) as part, open(part, "w", newline="", encoding="utf-8") as file:

        def write(rows: Iterable[Sequence[str]], delimiter: str = ",") -> None:
            csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(rows)

        yield write


def cells(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Arrays as a header and rows of cells.

    Args:
        rows: Arrays [n, *event] that lead with one length.

    Returns:
        (header, rows of cells): a column for each number, named x, or x_0, x_1, ... if there are
        many.
    """
    header, columns = [], []
    for key, value in as_arrays(rows).items():
        value = np.asarray(value)
        flat = value.reshape(
            len(value), math.prod(value.shape[1:])
        )  # -1 is not known where there are no rows
        header += [key] if value.ndim == 1 else [f"{key}_{j}" for j in range(flat.shape[1])]
        columns += [[str(v) for v in flat[:, j]] for j in range(flat.shape[1])]
    return header, [list(row) for row in zip(*columns, strict=True)]
