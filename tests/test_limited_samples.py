"""A flow learned from n rows of two modes, from the loss to the samples, against its closed form in
many dimensions."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from jflow import oracles

EXPERIMENT = runpy.run_path(
    str(Path(__file__).parents[1] / "experiments" / "limited_samples" / "run.py")
)
learned, theory, least_squares = (
    EXPERIMENT[name] for name in ("learned", "theory", "least_squares")
)


@pytest.mark.parametrize("noises", [1, 3])
def test_the_closed_form_is_the_least_squares_fit(noises):
    """c and w found by solving the regression, with the signs given, on rows in 100,000
    dimensions."""
    rng = np.random.default_rng(0)
    n, d, t, std, ridge = 5, 100_000, 0.6, 0.3, 0.1
    mu, z, x0 = rng.normal(size=d), rng.normal(size=(n, d)), rng.normal(size=(n, noises, d))
    sign = np.asarray([1, 1, -1, 1, -1])[:, None]
    x1 = sign * mu + std * z
    x = (1 - t) * x0 + t * x1[:, None]
    # w of a given c is a ridge mean of x1 - c x, so the loss is a parabola of c
    mean = lambda rows: (sign * rows).sum(axis=0) / (n + ridge)  # noqa: E731
    flat = x.mean(axis=1)
    dot_xx = np.mean(np.sum(x * x, axis=2), axis=1).sum() - (n + ridge) * mean(flat) @ mean(flat)
    dot_x1 = np.sum(flat * x1) - (n + ridge) * mean(flat) @ mean(x1)
    c, coefficients = least_squares(t, n, noises, std, ridge)
    directions = np.stack([mu, (sign * z).sum(axis=0), (sign * x0.mean(axis=1)).sum(axis=0)])
    found = np.linalg.lstsq(directions.T, mean(x1 - dot_x1 / dot_xx * flat), rcond=None)[0]
    # overlaps of random rows are of size 1 / sqrt(d) = 0.003
    np.testing.assert_allclose(dot_x1 / dot_xx, c, rtol=0.02)
    np.testing.assert_allclose(found, coefficients, rtol=0.02)


def test_many_rows_give_the_exact_velocity():
    """On the side of +mu, and far enough from the other mode, v = (c x + mu (1 - c t) - x) / (1 -
    t)."""
    d = 40
    mu = np.full(d, 1.0)
    oracle = oracles.mixture([0.5, 0.5], np.stack([mu, -mu]), 0.09)
    x = (0.7 * mu + 0.2 * np.random.default_rng(0).normal(size=(4, d))).astype(np.float32)
    for t in (0.4, 0.7, 0.9):
        c, (m, p, q) = least_squares(t, 10**9)
        assert abs(p) < 1e-8 and abs(q) < 1e-8
        np.testing.assert_allclose(
            oracle.velocity(x, t), (c * x + m * mu - x) / (1 - t), rtol=1e-3, atol=1e-3
        )


def test_the_distance_falls_as_one_over_n():
    for noises in (1, 4, float("inf")):
        scaled = [n * theory(n, noises, cells=2000).distance for n in (50, 100, 200, 400)]
        np.testing.assert_allclose(scaled, scaled[-1], rtol=0.01)
        assert theory(400, noises).cosine > 0.9995
    # with fresh noise it is that of the best estimate of mu, N(0, I) beforehand, from n rows with
    # known signs
    for n in (5, 50, 500):
        np.testing.assert_allclose(
            theory(n, float("inf"), cells=2000).distance, 0.09 / (n + 0.09), rtol=0.02
        )


@pytest.mark.parametrize(("n", "noises"), [(8, 1), (4, 3)])
def test_a_trained_flow_has_the_distance_of_the_theory(n, noises):
    """In 1,000 dimensions; random overlaps of rows, of size 1 / sqrt(d) = 3 percent, move the
    distance by a few times that."""
    found, limit = learned(n, 1000, noises, steps=1200), theory(n, noises)
    np.testing.assert_allclose(found.distance, limit.distance, rtol=0.12)
    np.testing.assert_allclose(found.cosine, limit.cosine, atol=0.004)
