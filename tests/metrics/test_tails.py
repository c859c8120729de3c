"""Tail indices: of columns whose index is known, and what cannot be read."""

import numpy as np
import pytest

from jflow import metrics

DRAWS = {  # of 4 light and 4 heavy columns; the index of each
    "normal": (np.inf, lambda rng, n: rng.normal(size=n)),
    "t2": (2.0, lambda rng, n: rng.standard_t(2, n)),
    "uniform": (np.inf, lambda rng, n: rng.random(n)),
    "t3": (3.0, lambda rng, n: 5 + rng.standard_t(3, n)),
    "two modes": (np.inf, lambda rng, n: np.where(rng.random(n) < 0.5, -3, 3) + rng.normal(size=n)),
    "Cauchy": (1.0, lambda rng, n: 100 * rng.standard_cauchy(n)),
    "four times normal": (np.inf, lambda rng, n: 4 * rng.normal(size=n)),
    "Pareto": (2.0, lambda rng, n: rng.pareto(2, n)),
}
INDEX = np.array([index for index, _ in DRAWS.values()])


def rows(n, seed):
    rng = np.random.default_rng(seed)
    return np.stack([draw(rng, n) for _, draw in DRAWS.values()], axis=1)


def test_four_light_and_four_heavy_columns_are_named_and_their_indices_found():
    """5000 rows, two seeds: 8 of 8 named, heavy indices within 30% (Hill's estimate from k rows has
    a standard error of a / sqrt(k), about 5%, and a bias towards heavier tails of about 10% at 3
    degrees of freedom). Neither location, nor scale, nor their order says anything."""
    for seed in (0, 1):
        x = rows(5000, seed)
        found = metrics.tail_index(x)
        np.testing.assert_array_equal(np.isinf(found), np.isinf(INDEX))
        heavy = np.isfinite(INDEX)
        np.testing.assert_allclose(found[heavy], INDEX[heavy], rtol=0.3)
    again = metrics.tail_index(1e-3 * x[:, ::-1] - 7)[::-1]
    np.testing.assert_allclose(again, found, rtol=1e-6)


def test_what_has_no_tail_is_refused():
    for x, shown in (
        (np.zeros((99, 2)), r"\[99, 2\]"),
        (np.zeros(200), r"\[200\]"),
        (np.full((200, 1), np.nan), "not finite"),
        (np.arange(200)[:, None] // 199, "off the median of a column, got 1"),
    ):
        with pytest.raises(ValueError, match=f"tail_index: expected .*{shown}"):
            metrics.tail_index(x)
    with pytest.raises(ValueError, match="bootstraps"):
        metrics.tail_index(np.ones((200, 1)), bootstraps=0)
