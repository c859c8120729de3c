import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jflow import couplings, data

KEY = jax.random.key(0)


def test_on_a_line_the_cells_are_quantiles():
    """N(0, 1) to N sorted points, costs convex: point k draws the sources between the quantiles k /
    N and (k + 1) / N, and neighbors' potentials differ by what makes the border between them
    indifferent."""
    points = jnp.asarray([[3.0], [-1.0], [0.5], [0.0], [-2.0]])
    g, share = couplings.fit_semidiscrete(KEY, points, steps=1500, batch=256)
    np.testing.assert_allclose(share, 1, atol=0.05)
    order = np.argsort(points[:, 0])
    x, borders = np.asarray(points[order, 0]), stats.norm.ppf(np.arange(1, 5) / 5)
    exact = (borders - x[1:]) ** 2 - (borders - x[:-1]) ** 2
    np.testing.assert_allclose(np.diff(np.asarray(g)[order]), exact, atol=0.1)  # 0.03 seen
    x0 = jax.random.normal(jax.random.key(1), (400, 1))
    i, j = jax.jit(couplings.semidiscrete(g))(None, x0, points)
    np.testing.assert_array_equal(i, np.arange(400))
    cell = np.searchsorted(borders, np.asarray(x0)[:, 0])
    assert (
        np.mean(order[cell] == np.asarray(j)) > 0.97
    )  # those close to a border may fall on its other side


def test_an_offset_and_an_outlier_are_not_left_to_be_learned():
    """Points moved by 1e4 have the same cells, whose shares the same steps find; a point at 1e6
    costs the others nothing."""
    points = jnp.asarray([[3.0], [-1.0], [0.5], [0.0], [-2.0]])
    for moved in (points + 1e4, points.at[0].set(1e6)):
        _, share = couplings.fit_semidiscrete(KEY, moved, steps=400, batch=256)
        np.testing.assert_allclose(share[1:], 1, atol=0.3)
    _, share = couplings.fit_semidiscrete(KEY, points + 1e4, steps=400, batch=256)
    np.testing.assert_allclose(share, 1, atol=0.1)


def test_every_row_of_a_data_set_is_drawn_as_often():
    moons = jnp.asarray(data.moons(64, 0)["x"])
    g, share = couplings.fit_semidiscrete(KEY, moons, steps=1500)
    # without potentials many rows are never the nearest; 4 standard errors of a count of 375 * 256
    # / 64 are 0.1
    assert 0.6 < share.min() and share.max() < 1.4 and share.std() < 0.15
    x0 = jax.random.normal(jax.random.key(1), (8192, 2))
    plain = (
        np.bincount(couplings.semidiscrete(jnp.zeros(64))(None, x0, moons)[1], minlength=64) / 128
    )
    assert plain.std() > 0.5
    # and the pairs cost less than independent ones by far, more than in a transport without any
    # constraint
    cost = np.asarray(couplings.squared_euclidean(x0, moons))
    seen = cost[np.arange(8192), couplings.semidiscrete(g)(None, x0, moons)[1]].mean()
    assert cost.min(1).mean() < seen < 0.5 * cost.mean()


def test_errors():
    x = jnp.zeros((4, 2))
    with pytest.raises(
        ValueError, match=r"data set of shape \[5, ...\] .* got \[4, 2\] and \[4, 2\]"
    ):
        couplings.semidiscrete(jnp.zeros(5))(None, x, x)
    with pytest.raises(ValueError, match="steps to be a whole number of at least 4, got 2"):
        couplings.fit_semidiscrete(KEY, x, steps=2)
    with pytest.raises(ValueError, match="steps to be a whole number of at least 4, got 10.5"):
        couplings.fit_semidiscrete(KEY, x, steps=10.5)
    with pytest.raises(ValueError, match="row 1 of data is not finite"):
        couplings.fit_semidiscrete(KEY, x.at[1].set(jnp.nan))
