"""What a run leaves for its reader: metrics.jsonl, TensorBoard's files and pictures."""

import contextlib
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jflow._core.files import write_atomically

Row = dict[str, Any]


class Recorder:
    """Keeps the rows of metrics, one a logged step, and appends them to WORKDIR/metrics.jsonl
    (None: memory alone).

    With writes=False, for all processes but one, nothing is written.

    Starting at `step` drops the rows past it, so that after a resume no step stands twice. Numbers
    that are not finite are written as null, since JSON has none. Where tensorboardX is installed,
    WORKDIR/tensorboard gets the rows too.
    """

    def __init__(self, workdir: Path | None, step: int, writes: bool = True):
        self.rows: list[Row] = []
        self._workdir, self._board = workdir if writes else None, None
        if workdir is None:
            return
        self._file = workdir / "metrics.jsonl"
        if self._file.exists():
            self.rows = [
                row
                for row in map(_parse, self._file.read_bytes().splitlines())
                if row and row["step"] <= step
            ]
            if writes:
                write_atomically(self._file, "".join(map(_line, self.rows)).encode())
        if not writes:
            return
        with contextlib.suppress(ImportError):
            self._board = _Board(workdir / "tensorboard", step)

    def write(self, row: Row) -> None:
        self.rows.append(row)
        if self._workdir is None:
            return
        try:
            with open(self._file, "a") as file:
                file.write(_line(row))
            if self._board is not None:
                self._board.write(row)
        except OSError as error:
            raise self._unwritten(error) from error

    def close(self) -> None:
        try:
            if self._board is not None:
                self._board.close()
        except OSError as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: OSError) -> OSError:
        return OSError(error.errno, f"cannot write metrics to {self._workdir}: {error.strerror}")

    def picture(self, step: int, image) -> None:
        """Save a PIL image or an array [h, w], [h, w, 3] or [h, w, 4], uint8 or floats in [0, 1],
        as a PNG."""
        if self._workdir is None:
            return
        folder = self._workdir / "pictures"
        folder.mkdir(exist_ok=True)
        content = io.BytesIO()
        _image(image).save(content, format="PNG")
        write_atomically(folder / f"step_{step:08d}.png", content.getvalue())


def _image(image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    image = np.asarray(image)
    if not (image.ndim == 2 or image.ndim == 3 and image.shape[2] in (3, 4)):
        raise ValueError(
            "picture: expected an image [h, w], [h, w, 3] or [h, w, 4], got shape"
            f" {list(image.shape)}"
        )
    if image.dtype != np.uint8:
        image = np.round(255 * np.clip(np.nan_to_num(image), 0, 1)).astype(np.uint8)
    return Image.fromarray(image)


def _line(row: Row) -> str:
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def _parse(line: bytes) -> Row | None:
    """A row, or None for a line that a kill cut short."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


class _Board:
    """The same rows for TensorBoard, by its plain event writer: the usual SummaryWriter hands rows
    to a thread, which a full disk leaves hanging."""

    def __init__(self, folder: Path, step: int):
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        folder.mkdir(exist_ok=True)
        self._event, self._scalar = event_pb2.Event, summary.scalar
        self._writer = event_file_writer.EventsWriter(str(folder / "events"), f".from_{step:08d}")
        # Readers drop what an earlier run wrote from this step on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(
            self._event(wall_time=time.time(), step=step + 1, session_log=start)
        )

    def write(self, row: Row) -> None:
        for name in sorted(row.keys() - {"step", "time"}):
            value = self._scalar(name, row[name])
            self._writer.write_event(
                self._event(wall_time=time.time(), step=row["step"], summary=value)
            )
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
