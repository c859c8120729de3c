import numpy as np
import pytest
from scipy.linalg import sqrtm

from jflow import metrics


def exact(mean, covariance, n, seed=0):
    """n rows whose sample mean and covariance are the given ones, to rounding."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x = x - x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T).reshape(len(mean), -1))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def textbook(x, y):
    """The formula as FID scripts write it: the root of the product of covariances by scipy."""
    cx, cy = np.cov(x.T), np.cov(y.T)
    return (
        ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx + cy) - 2 * np.trace(sqrtm(cx @ cy)).real
    )


def covariance(d, seed):
    a = np.random.default_rng(seed).normal(size=(d, d))
    return a @ a.T + 0.1 * np.eye(d)


def test_against_scipy():
    x, y = (
        exact(np.zeros(6), covariance(6, 1), 50),
        exact(np.arange(6.0), covariance(6, 2), 70, seed=1),
    )
    np.testing.assert_allclose(metrics.frechet_distance(x, y), textbook(x, y), rtol=1e-9)
    np.testing.assert_allclose(metrics.frechet_distance(y, x), textbook(x, y), rtol=1e-9)


def test_closed_forms():
    """One dimension: (m - n)^2 + (s - t)^2. Commuting covariances: |m - n|^2 + sum of (s_i - t_i)^2
    over the axes."""
    x, y = exact([1.0], np.array([[4.0]]), 20), exact([-2.0], np.array([[0.25]]), 30, seed=1)
    assert metrics.frechet_distance(x, y) == pytest.approx(9 + 1.5**2, rel=1e-12)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    s, t = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 0.5])
    x = exact(np.zeros(3), turn * s[None] ** 2 @ turn.T, 40)
    y = exact(np.ones(3), turn * t[None] ** 2 @ turn.T, 40, seed=1)
    assert metrics.frechet_distance(x, y) == pytest.approx(3 + 1 + 0 + 2.5**2, rel=1e-12)


def test_singular_covariances():
    """20 rows of 64 features: equal sets are at 0, and a shift and a stretch at what they are in
    closed form."""
    x = np.random.default_rng(0).normal(size=(20, 64))
    scale = np.trace(np.cov(x.T))
    assert metrics.frechet_distance(x, x[::-1]) < 1e-12 * scale
    stretched = (
        x.mean(0) + 3 * (x - x.mean(0)) + 0.5
    )  # covariance 9 C: tr(C + 9 C - 2 * 3 C) = 4 tr C
    np.testing.assert_allclose(
        metrics.frechet_distance(x, stretched), 64 * 0.25 + 4 * scale, rtol=1e-7
    )
    flat = np.concatenate(
        [x[:, :3], np.zeros((20, 61))], 1
    )  # orthogonal subspaces: the root vanishes
    other = np.concatenate([np.zeros((20, 3)), x[:, 3:]], 1)
    expected = ((flat.mean(0) - other.mean(0)) ** 2).sum() + np.trace(
        np.cov(flat.T) + np.cov(other.T)
    )
    np.testing.assert_allclose(metrics.frechet_distance(flat, other), expected, rtol=1e-12)


def test_chunks_give_what_the_whole_gives():
    """Also far from the origin, where sums of squares would lose all digits, and for chunks of one
    row."""
    x = np.random.default_rng(0).normal(size=(60, 4)) + 1e6
    found = None
    for chunk in np.split(x, [1, 2, 17, 50]):
        found = metrics.moments(chunk, found)
    assert found.n == 60
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-15)
    np.testing.assert_allclose(
        found.scatter / 59, np.cov(x.T), rtol=1e-7, atol=1e-9
    )  # 1e6 squared times 1e-16
    assert metrics.frechet_between(found, metrics.moments(x)) < 1e-7


def test_bias_of_finite_sets_falls_with_their_size():
    """Two sets of n from N(0, I) in d dimensions. The means differ by 2 d / n in the mean, the
    roots of the covariances, to first order half the covariances' difference, by 2 d (d + 1) / (4
    n): together d (d + 5) / (2 n)."""
    rng, d = np.random.default_rng(0), 8
    for n in (200, 800):
        draws = [
            metrics.frechet_distance(rng.normal(size=(n, d)), rng.normal(size=(n, d)))
            for _ in range(20)
        ]
        # 20 draws, each with a relative deviation of about 0.2: 4 standard errors
        assert np.mean(draws) == pytest.approx(d * (d + 5) / (2 * n), rel=0.2)


def test_bad_features():
    x = np.zeros((3, 2))
    with pytest.raises(ValueError, match="row 1 holds NaN"):
        metrics.frechet_distance(x, np.array([[0, 0], [np.nan, 0]]))
    with pytest.raises(ValueError, match="at least 2 rows, got 1 and 3"):
        metrics.frechet_distance(x[:1], x)
    with pytest.raises(ValueError, match="2 and 3 dimensions"):
        metrics.frechet_distance(x, np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"\[n, d\].*\[3, 2, 2\]"):
        metrics.frechet_distance(np.zeros((3, 2, 2)), x)
    with pytest.raises(ValueError, match=r"\[n, 2\] as before, got \[3, 4\]"):
        metrics.moments(np.zeros((3, 4)), metrics.moments(x))
