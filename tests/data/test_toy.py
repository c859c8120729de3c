import numpy as np

from jflow import data


def test_moons():
    rows = data.moons(4000, 0, noise=0.0)
    x, cond = rows["x"], rows["cond"]
    assert x.shape == (4000, 2) and x.dtype == np.float32 and set(cond) == {0, 1}
    center = np.where(cond[:, None] == 0, [0.0, 0.0], [1.0, 0.5])
    np.testing.assert_allclose(np.linalg.norm(x - center, axis=1), 1, atol=1e-6)  # float32
    assert (x[cond == 0][:, 1] >= 0).all() and (x[cond == 1][:, 1] <= 0.5).all()


def test_eight_gaussians():
    rows = data.eight_gaussians(16000, 0)
    centers = np.stack([rows["x"][rows["cond"] == k].mean(0) for k in range(8)])
    angle = np.arange(8) * np.pi / 4
    # means of 2000 rows of standard deviation 0.32: 0.007, five of them
    np.testing.assert_allclose(centers, 5 * np.stack([np.cos(angle), np.sin(angle)], 1), atol=0.035)
    spread = np.concatenate([rows["x"][rows["cond"] == k] - centers[k] for k in range(8)])
    np.testing.assert_allclose(spread.var(), 0.1, rtol=0.05)  # relative standard deviation 0.8%


def test_checkerboard():
    x = data.checkerboard(8000, 0)["x"]
    square = np.floor((x + 4) / 2).astype(int)
    assert ((square[:, 0] + square[:, 1]) % 2 == 0).all()
    counts = np.bincount(4 * square[:, 0] + square[:, 1], minlength=16).reshape(4, 4)
    assert (counts > 0).sum() == 8
    np.testing.assert_allclose(counts[counts > 0], 1000, atol=150)  # standard deviation 30


def test_seeds():
    for draw in (data.moons, data.eight_gaussians, data.checkerboard):
        np.testing.assert_array_equal(draw(10, 1)["x"], draw(10, 1)["x"])
        assert not np.array_equal(draw(10, 1)["x"], draw(10, 2)["x"])
