"""Samples of a trained experiment, in the units of its data, and the files they are written to."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from jflow._core.files import expand, replace_file
from jflow.apps import tables
from jflow.data.writers import cells, csv_writer, npz_writer
from jflow.types import Key

__all__ = ["sample_writer", "samples"]


def samples(
    loaded: Any, key: Key, n: int, *, batch: int = 256, **options: Any
) -> Iterator[Mapping[str, np.ndarray]]:
    """Samples of a trained experiment in the units of its data, in chunks: n may exceed memory.

    The i-th chunk uses fold_in(key, i) and every chunk is drawn whole, so that one program serves
    all: the same key, batch and n >= batch give the same first rows.

    Args:
        loaded: From `jflow.load`.
        key: Of the draws.
        n: How many rows in all.
        batch: Rows of a chunk at most.
        **options: For the experiment's `sample` (label, steps, guidance ...).

    Yields:
        Dicts of rows in data units.

    Raises:
        ValueError: For an option that the experiment does not take; it says which it takes.
    """
    sample = loaded.experiment.sample
    if sample is None:
        raise ValueError("this experiment cannot be sampled: its config sets no `sample`")
    if n < 1 or batch < 1:
        raise ValueError(f"expected at least 1 row and a batch of at least 1, got {n} and {batch}")
    known = inspect.signature(sample).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in known):
        allowed = [p.name for p in known][3:]
        for name in options:
            if name not in allowed:
                raise ValueError(
                    f"this model takes no {name}; its options are: {', '.join(allowed) or 'none'}"
                )
    return _chunks(loaded, key, n, min(batch, n), options)


def _chunks(loaded, key, n, batch, options):
    for i, start in enumerate(range(0, n, batch)):
        rows = loaded.experiment.sample(loaded.params, jax.random.fold_in(key, i), batch, **options)
        rows = loaded.preprocess.undo(jax.tree.map(np.asarray, dict(rows)))
        first = sorted(
            rows, key=lambda name: name != "x"
        )  # jit has put the names in alphabetical order
        yield {name: rows[name][: n - start] for name in first}


@contextlib.contextmanager
def sample_writer(path: str | Path, n: int) -> Iterator[Callable]:
    """Writes samples to a picture, to arrays or to a table.

    A context manager. `path` is replaced at the end of the block, and untouched if it fails; that
    it can be written is found out first.

    Args:
        path: Of a file that ends in .png, .npz or .csv.
        n: How many rows there will be in all.

    Yields:
        write(loaded, rows), which appends.

    Raises:
        ValueError: For another ending.
    """
    writers = {".png": _png, ".npz": _npz, ".csv": _csv}
    path = expand(path)
    if path.suffix not in writers:
        raise ValueError(f"expected a file name that ends in {', '.join(writers)}, got {path}")
    with writers[path.suffix](path, n) as write:
        yield write


@contextlib.contextmanager
def _png(path, n):
    with replace_file(path) as part:
        chunks = []

        def write(loaded, rows):
            if loaded.experiment.picture is None:
                raise ValueError("this experiment draws no pictures: write .npz or .csv")
            chunks.append((loaded.experiment.picture, rows))

        yield write
        rows = {name: np.concatenate([chunk[name] for _, chunk in chunks]) for name in chunks[0][1]}
        image = chunks[0][0](rows)
        image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        image.save(part, format="PNG")


@contextlib.contextmanager
def _npz(path, n):
    with npz_writer(path, n) as write:

        def write_rows(loaded, rows):
            state = loaded.preprocess.state
            write(tables.as_arrays(state, rows["x"]) if tables.is_table(state) else rows)

        yield write_rows


@contextlib.contextmanager
def _csv(path, n):
    with csv_writer(path) as write:
        first = True

        def write_rows(loaded, rows):
            nonlocal first
            state = loaded.preprocess.state
            table = tables.is_table(state)
            header, text = tables.as_text(state, rows["x"]) if table else cells(rows)
            delimiter = state["delimiter"] if table else ","
            write([header] if header and first else [], delimiter)
            write(text, delimiter)
            first = False

        yield write_rows
