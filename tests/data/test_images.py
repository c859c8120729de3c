import gzip
import io
import struct

import numpy as np
import pytest
from PIL import Image

from jflow import data


def test_digits():
    splits = data.digits()
    assert splits.train["x"].shape == (1437, 8, 8, 1) and splits.test["x"].shape == (360, 8, 8, 1)
    assert splits.train["x"].dtype == np.uint8 and splits.train["x"].max() == 16
    assert splits.valid is None
    share = np.bincount(splits.test["cond"]) / np.bincount(
        np.concatenate([s["cond"] for s in (splits.train, splits.test)])
    )
    np.testing.assert_allclose(share, 360 / 1797, atol=0.006)  # one row in a class of 174
    # The split is fixed: a change would make old checkpoints see their test rows in training.
    assert splits.test["cond"][:12].tolist() == GOLDEN
    np.testing.assert_array_equal(splits.test["x"], data.digits().test["x"])


GOLDEN = [5, 9, 2, 4, 6, 7, 9, 3, 4, 6, 8, 5]


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


@pytest.fixture
def tiny():
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (7, 5, 4), dtype=np.uint8),
        "y_train": rng.integers(0, 10, 7, dtype=np.uint8),
        "x_test": rng.integers(0, 256, (3, 5, 4), dtype=np.uint8),
        "y_test": rng.integers(0, 10, 3, dtype=np.uint8),
    }


def check(splits, tiny):
    np.testing.assert_array_equal(splits.train["x"], tiny["x_train"][..., None])
    np.testing.assert_array_equal(splits.test["x"], tiny["x_test"][..., None])
    np.testing.assert_array_equal(splits.train["cond"], tiny["y_train"])
    assert splits.test["cond"].dtype == np.int32


def test_mnist_npz(tmp_path, tiny):
    np.savez(tmp_path / "set.npz", **tiny)
    check(data.mnist(tmp_path / "set.npz"), tiny)


NAMES = {
    "train-images-idx3-ubyte": "x_train",
    "train-labels-idx1-ubyte": "y_train",
    "t10k-images-idx3-ubyte": "x_test",
    "t10k-labels-idx1-ubyte": "y_test",
}


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_idx(tmp_path, tiny, zipped):
    for name, key in NAMES.items():
        raw = idx(tiny[key])
        path = tmp_path / (name + ".gz" if zipped else name)
        path.write_bytes(gzip.compress(raw) if zipped else raw)
    check(data.mnist(tmp_path), tiny)
    check(data.mnist(path), tiny)  # one of the files stands for its folder


def test_mnist_errors_name_the_file(tmp_path, tiny):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.mnist(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        data.mnist(tmp_path)
    np.savez(tmp_path / "part.npz", x_train=tiny["x_train"])
    with pytest.raises(ValueError, match=r"part\.npz.*y_train, x_test, y_test"):
        data.mnist(tmp_path / "part.npz")
    np.savez(tmp_path / "short.npz", **{**tiny, "y_train": tiny["y_train"][1:]})
    with pytest.raises(ValueError, match=r"short\.npz: 7 images but labels of shape \[6\]"):
        data.mnist(tmp_path / "short.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "part.npz").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cut\.npz"):
        data.mnist(tmp_path / "cut.npz")
    for name, key in NAMES.items():
        (tmp_path / name).write_bytes(idx(tiny[key])[:-1])
    with pytest.raises(
        ValueError, match=r"train-images-idx3-ubyte: expected \[7, 5, 4\] bytes, found 139"
    ):
        data.mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"hello world")
    with pytest.raises(ValueError, match="not an idx file"):
        data.mnist(tmp_path)


def test_cifar_sheets(tmp_path):
    rng = np.random.default_rng(0)
    sheets = [rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8) for _ in range(11)]
    for i, sheet in enumerate(sheets):  # sheet 10 comes after sheet 2; alpha is dropped
        pixels = sheet.reshape(6, 1024, 3)
        pixels = (
            np.concatenate([pixels, np.full((6, 1024, 1), 255, np.uint8)], -1) if i % 2 else pixels
        )
        Image.fromarray(pixels).save(tmp_path / f"cifar10_batch_{i}.png")
    labels = np.arange(66) % 3
    np.save(tmp_path / "labels.npy", labels)
    splits = data.cifar_sheets(tmp_path, test=12)
    assert splits.train["x"].shape == (54, 32, 32, 3) and np.bincount(
        splits.test["cond"]
    ).tolist() == [4, 4, 4]
    images = np.concatenate(sheets)
    for part in (splits.train, splits.test):
        index = [int(np.flatnonzero((images == x).all((1, 2, 3)))[0]) for x in part["x"]]
        np.testing.assert_array_equal(labels[index], part["cond"])
        assert index == sorted(index)


def test_cifar_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no sheets"):
        data.cifar_sheets(tmp_path)
    Image.fromarray(np.zeros((4, 100, 3), np.uint8)).save(tmp_path / "cifar10_batch_0.png")
    with pytest.raises(ValueError, match=r"cifar10_batch_0\.png.*\[4, 100, 3\]"):
        data.cifar_sheets(tmp_path)
    (tmp_path / "cifar10_batch_0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cifar10_batch_0\.png is not a readable picture"):
        data.cifar_sheets(tmp_path)
    Image.fromarray(np.zeros((4, 1024, 3), np.uint8)).save(tmp_path / "cifar10_batch_0.png")
    with pytest.raises(FileNotFoundError, match=r"labels\.npy"):
        data.cifar_sheets(tmp_path)


def jpegs(images):
    """Images as the bytes of JPEG files laid end to end, and where each begins."""
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    offset = np.cumsum([0, *map(len, files)]).astype(np.uint32)
    return {"jpeg": np.frombuffer(b"".join(files), np.uint8), "offset": offset}


def flat(n):
    """Images of one color each, which JPEG at this quality keeps to a level or two."""
    return np.broadcast_to(
        np.random.default_rng(n).integers(0, 256, (n, 1, 1, 3)), (n, 32, 32, 3)
    ).astype(np.uint8)


def test_cifar_jpegs(tmp_path):
    np.savez(tmp_path / "train.npz", **jpegs(flat(5)), label=np.arange(5, dtype=np.uint8))
    np.savez(tmp_path / "test.npz", **jpegs(flat(3)), label=np.arange(3, dtype=np.uint8))
    splits = data.cifar_jpegs(tmp_path / "train.npz", tmp_path / "test.npz")
    for part, n in ((splits.train, 5), (splits.test, 3)):
        assert part["cond"].tolist() == list(range(n)) and part["x"].dtype == np.uint8
        assert np.abs(part["x"].astype(int) - flat(n)).max() <= 2


def test_jpeg_errors_name_the_file(tmp_path):
    good = {**jpegs(flat(3)), "label": np.arange(3)}

    def message(match, **change):
        np.savez(
            tmp_path / "set.npz", **{k: v for k, v in {**good, **change}.items() if v is not None}
        )
        with pytest.raises(ValueError, match=rf"set\.npz.*{match}"):
            data.cifar_jpegs(tmp_path / "set.npz", tmp_path / "set.npz")

    message("no array offset", offset=None)
    message("offsets that rise from 0", offset=good["offset"][:-1])
    message("image 0 is not a readable picture", jpeg=np.zeros_like(good["jpeg"]))
    message(r"32 x 32, got 16 x 8 at 0", **jpegs(flat(3)[:, :8, :16]))
    message(r"3 images but labels of shape \[2\]", label=np.arange(2))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.cifar_jpegs(tmp_path / "nowhere.npz", tmp_path / "nowhere.npz")


def test_real_mnist(data_dir):
    splits = data.mnist(data_dir / "images" / "mnist.npz")
    assert splits.train["x"].shape == (60000, 28, 28, 1) and splits.test["x"].shape == (
        10000,
        28,
        28,
        1,
    )
    assert splits.train["x"].mean() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert splits.train["x"].std() / 255 == pytest.approx(0.3081, abs=5e-5)


def test_real_fashion_mnist(data_dir):
    splits = data.mnist(data_dir / "images" / "fashion_mnist_8k2k.npz")
    assert splits.train["x"].shape == (8000, 28, 28, 1)
    assert int(splits.train["x"][0].sum()) == 76247


def test_real_cifar(data_dir):
    splits = data.cifar_sheets(data_dir / "images" / "cifar10_lossless")
    assert splits.train["x"].shape == (3600, 32, 32, 3) and len(splits.test["x"]) == 400


def test_real_cifar_jpegs(data_dir):
    """The JPEGs are of other images than the sheets, of the same set: their mean colors agree to a
    level or two."""
    folder = data_dir / "images"
    splits = data.cifar_jpegs(
        folder / "cifar10_jpeg_train6k.npz", folder / "cifar10_jpeg_test1k.npz"
    )
    assert np.bincount(splits.train["cond"]).tolist() == [600] * 10
    assert np.bincount(splits.test["cond"]).tolist() == [100] * 10
    sheets = data.cifar_sheets(folder / "cifar10_lossless").train["x"]
    np.testing.assert_allclose(splits.train["x"].mean((0, 1, 2)), sheets.mean((0, 1, 2)), atol=3)
