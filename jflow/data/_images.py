"""Image sets as uint8 rows: {'x': [n, height, width, channels], 'cond': int32 [n], the class}."""

import gzip
import io
import itertools
import struct
import zipfile
from pathlib import Path

import numpy as np

from jflow._core.files import expand
from jflow.data._splits import Splits, stratified_split


def _rows(x: np.ndarray, labels: np.ndarray, source: Path | str) -> dict[str, np.ndarray]:
    """Images [n, h, w] or [n, h, w, c] with labels [n], checked; an error names `source`."""
    x = x[..., None] if x.ndim == 3 else x
    if x.ndim != 4 or x.dtype != np.uint8:
        raise ValueError(
            f"{source}: expected uint8 images [n, h, w] or [n, h, w, c], got {x.dtype}"
            f" {list(x.shape)}"
        )
    if labels.shape != x.shape[:1]:
        raise ValueError(f"{source}: {len(x)} images but labels of shape {list(labels.shape)}")
    return {"x": x, "cond": labels.astype(np.int32)}


def digits(*, test: int = 360, seed: int = 0) -> Splits:
    """Scikit-learn's 1797 handwritten digits, 8 x 8 x 1 with values 0 .. 16.

    Args:
        test: How many rows are cut off for the test, by class.
        seed: Of the cut.

    Returns:
        Splits of uint8 images 'x' and labels 'cond', by default 1437 and 360 rows.

    Raises:
        ImportError: Where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digits() reads them from scikit-learn: pip install 'jflow-models[experiments]'"
        ) from error
    data = load_digits()
    rows = _rows(data.images.astype(np.uint8), data.target, "scikit-learn's digits")
    return stratified_split(rows, test=test, seed=seed)


def _read_idx(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes: magic 0 0 8 rank, then big-endian sizes, then the bytes. May
    be gzipped."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error})") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(
            f"{path} is not an idx file of unsigned bytes (its first bytes are {raw[:4]!r})"
        )
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if body.size != np.prod(shape, dtype=np.int64):
        raise ValueError(
            f"{path}: expected {list(shape)} bytes, found {body.size}: the file is cut short or"
            " damaged"
        )
    return body.reshape(shape)


def _find_idx(folder: Path, kind: str) -> Path:
    stems = [kind, kind.replace("-idx", ".idx")]
    found = [p for stem in stems for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} has no {kind} or {kind}.gz")
    return found[0]


def mnist(path: str | Path) -> Splits:
    """MNIST and sets laid out like it (Fashion-MNIST, KMNIST).

    Args:
        path: An npz file with x_train [n, 28, 28] uint8, y_train [n], x_test, y_test; or a folder
            with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte,
            t10k-labels-idx1-ubyte, each plain or .gz. The path of one of them stands for its
            folder.

    Returns:
        Splits of train and test: uint8 images 'x' [n, 28, 28, 1] and labels 'cond'.

    Raises:
        FileNotFoundError: Where there is no such file.
        ValueError: For files of another form, by name.
    """
    path = expand(path)
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as z:
                missing = [k for k in ("x_train", "y_train", "x_test", "y_test") if k not in z]
                if missing:
                    raise ValueError(
                        f"{path} has no array {', '.join(missing)}; it holds {', '.join(z.files)}"
                    )
                train, test = (
                    _rows(z[f"x_{part}"], z[f"y_{part}"], path) for part in ("train", "test")
                )
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{path} is not a complete npz file ({error})") from error
        return Splits(train, None, test)
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no file or folder {path}")

    def part(name):
        images, labels = (
            _find_idx(folder, f"{name}-images-idx3-ubyte"),
            _find_idx(folder, f"{name}-labels-idx1-ubyte"),
        )
        return _rows(_read_idx(images), _read_idx(labels), images)

    return Splits(part("train"), None, part("t10k"))


def cifar_sheets(folder: str | Path, *, test: int = 400, seed: int = 0) -> Splits:
    """CIFAR-10 as picture sheets: PNG files of 1024 columns whose every row is one 32 x 32 image.

    Sheets are read in the order of the number that ends their names, and alpha is dropped.

    Args:
        folder: Where *.png and labels.npy [n] are.
        test: How many rows are cut off for the test, by class.
        seed: Of the cut.

    Returns:
        Splits of uint8 images 'x' [n, 32, 32, 3] and labels 'cond'.

    Raises:
        FileNotFoundError: Where there are no sheets.
        ValueError: For sheets and labels that do not fit.
    """
    from PIL import Image, UnidentifiedImageError

    folder = expand(folder)
    sheets = [p for p in folder.glob("*.png") if p.stem.rpartition("_")[2].isdigit()]
    if not sheets:
        raise FileNotFoundError(f"{folder} has no sheets such as cifar10_batch_0.png")
    parts = []
    for sheet in sorted(sheets, key=lambda p: int(p.stem.rpartition("_")[2])):
        try:
            pixels = np.asarray(Image.open(sheet))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{sheet} is not a readable picture ({error})") from error
        if pixels.ndim != 3 or pixels.shape[1] != 1024 or pixels.shape[2] not in (3, 4):
            raise ValueError(
                f"{sheet}: expected a picture [n, 1024, 3 or 4], got {list(pixels.shape)}"
            )
        parts.append(pixels[..., :3].reshape(-1, 32, 32, 3))
    labels = folder / "labels.npy"
    if not labels.is_file():
        raise FileNotFoundError(f"there is no file {labels}")
    rows = _rows(np.concatenate(parts), np.load(labels, allow_pickle=False), folder)
    return stratified_split(rows, test=test, seed=seed)


def _read_jpegs(path: Path) -> dict[str, np.ndarray]:
    from PIL import Image, UnidentifiedImageError

    try:
        with np.load(path, allow_pickle=False) as z:
            missing = [k for k in ("jpeg", "offset", "label") if k not in z]
            if missing:
                raise ValueError(
                    f"{path} has no array {', '.join(missing)}; it holds {', '.join(z.files)}"
                )
            files, offset, labels = z["jpeg"].tobytes(), z["offset"].astype(np.int64), z["label"]
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is not a complete npz file ({error})") from error
    if (
        len(offset) < 2
        or offset[0] != 0
        or offset[-1] != len(files)
        or (np.diff(offset) <= 0).any()
    ):
        raise ValueError(
            f"{path}: expected offsets that rise from 0 to the {len(files)} bytes of jpeg"
        )
    x = np.empty((len(offset) - 1, 32, 32, 3), np.uint8)
    for i, (start, end) in enumerate(itertools.pairwise(offset)):
        try:
            image = Image.open(io.BytesIO(files[start:end])).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path}: image {i} is not a readable picture ({error})") from error
        if image.size != (32, 32):
            raise ValueError(
                f"{path}: expected images of 32 x 32, got {image.size[0]} x {image.size[1]} at {i}"
            )
        x[i] = np.asarray(image)
    return _rows(x, labels, path)


def cifar_jpegs(train: str | Path, test: str | Path) -> Splits:
    """CIFAR-10 as JPEG files laid end to end in two npz files.

    JPEG has left marks of its own in the pixels: what is trained on them should be judged against
    them.

    Args:
        train: An npz file with jpeg [bytes] uint8, offset [n + 1] where each file begins and the
            last one ends, and label [n].
        test: The same for the test rows.

    Returns:
        Splits of train and test: uint8 images 'x' [n, 32, 32, 3] and labels 'cond'.

    Raises:
        FileNotFoundError: Where there is no such file.
        ValueError: For files of another form, by name.
    """
    return Splits(_read_jpegs(expand(train)), None, _read_jpegs(expand(test)))
