"""What is special to the rational-quadratic splines: conditioning, edges, knots, and three other
implementations."""

from pathlib import Path

import equinox as eqx
import flowjax.bijections
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.bijectors.splines import (
    rational_quadratic,
    rational_quadratic_inverse,
    rational_quadratic_knots,
)

BOUND, BINS = 5.0, 8
SIZE = 3 * BINS - 1
DIRECTIONS = {"forward": rational_quadratic, "inverse": rational_quadratic_inverse}
knots = jax.jit(rational_quadratic_knots, static_argnames="bound")
both = jax.jit(lambda x, raw: (*rational_quadratic(x, raw), *rational_quadratic_inverse(x, raw)))


def saturated(seed, n, dtype=np.float32):
    return (4 * np.random.default_rng(seed).normal(size=(n, SIZE))).astype(dtype)


@pytest.fixture(scope="module")
def peers():
    with np.load(Path(__file__).parents[1] / "peers" / "splines.npz") as arrays:
        return dict(arrays)


def test_round_trip_of_saturated_splines_in_float32():
    """|inverse(forward(x)) - x| < 2e-3 on 20,000 draws for each seed; without caps and edge floors
    it reaches 0.7."""

    @jax.jit
    def worst(x, raw):
        y, _ = rational_quadratic(x, raw)
        return jnp.max(jnp.abs(rational_quadratic_inverse(y, raw)[0] - x))

    for seed in range(5):
        raw = saturated(seed, 20_000)
        x = np.random.default_rng(100 + seed).uniform(-BOUND, BOUND, 20_000).astype(np.float32)
        assert worst(x, raw) < 2e-3
        # a point beside a random knot of each spline, where the slope is at its steepest or
        # flattest
        knot = np.asarray(knots(raw)[0])[np.arange(20_000), np.arange(20_000) % (BINS + 1)]
        assert worst(np.clip(knot + 1e-3 * x, -BOUND, BOUND), raw) < 2e-3


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_nan_at_the_edges_of_saturated_splines(direction):
    edges = np.array([-BOUND, BOUND], np.float32)
    points = np.concatenate(
        [edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, 2 * edges)]
    )
    points = np.concatenate([points, np.array([0, 1e6, -1e6], np.float32)])

    @jax.jit
    def run(x, raw):
        out, pullback = jax.vjp(DIRECTIONS[direction], x, raw)
        return out, pullback(jax.tree.map(jnp.ones_like, out))

    raw = saturated(7, 20_000)
    for point in points:
        assert all(
            jnp.all(jnp.isfinite(value))
            for value in jax.tree.leaves(run(np.full(20_000, point), raw))
        )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_slope_is_one_at_the_edges_from_both_sides(direction, x64):
    edges = np.array([-BOUND, BOUND])
    x = np.concatenate([np.nextafter(edges, -np.inf), np.nextafter(edges, np.inf)])
    raw = np.broadcast_to(saturated(1, 500, np.float64)[:, None], (500, 4, SIZE))
    y, log_slope = jax.jit(DIRECTIONS[direction])(np.broadcast_to(x, (500, 4)), raw)
    np.testing.assert_allclose(y, np.broadcast_to(x, (500, 4)), rtol=1e-13)
    np.testing.assert_allclose(log_slope, 0, atol=1e-8)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_autodiff_at_the_knots_is_the_knot_slope(direction, x64):
    """The clipping that keeps rounding out of the bins must not halve the derivative where a bin
    begins."""
    raw = np.concatenate([np.zeros((1, SIZE)), saturated(2, 30, np.float64)])
    xk, yk, slopes = knots(raw)
    x, slopes = (xk, slopes) if direction == "forward" else (yk, 1 / slopes)
    raw = np.broadcast_to(raw[:, None], (*x.shape, SIZE))
    slope = jax.jit(jax.vmap(jax.grad(lambda x, raw: DIRECTIONS[direction](x, raw)[0])))
    # a knot that rounds into the bin before it, where the slope may be a thousand times another, is
    # 1e-6 off
    np.testing.assert_allclose(
        slope(x.reshape(-1), raw.reshape(-1, SIZE)), slopes.reshape(-1), rtol=1e-5
    )


@pytest.mark.parametrize("bins", [2, 3, 8, 32])
def test_knots_fill_the_box_within_floors_and_caps(bins, x64):
    rng = np.random.default_rng(bins)
    raw = np.concatenate([scale * rng.normal(size=(500, 3 * bins - 1)) for scale in (1, 4, 100)])
    xk, yk, slopes = map(np.asarray, knots(raw, bound=BOUND))
    w, h = np.diff(xk), np.diff(yk)
    for ends in (xk, yk):
        np.testing.assert_array_equal(ends[:, [0, -1]], np.broadcast_to([-BOUND, BOUND], (1500, 2)))
    floor = 1e-3 * 2 * BOUND
    assert w.min() > floor * (1 - 1e-9) and h.min() > 0.9 * floor * (1 - 1e-9)
    s = h / w
    assert s[:, [0, -1]].min() > 0.1 * (1 - 1e-9)
    np.testing.assert_array_equal(slopes[:, [0, -1]], 1)
    neighbor = np.minimum(np.c_[np.full(1500, np.inf), s], np.c_[s, np.full(1500, np.inf)])
    assert np.all(slopes <= 10 * neighbor * (1 + 1e-9)) and slopes.min() > 0
    # so the slope inside a bin, at its least s^2 / d, is bounded away from zero
    assert np.all(neighbor**2 / slopes >= neighbor / 10 * (1 - 1e-9))


@pytest.mark.parametrize("library", ["zuko", "nflows"])
def test_equals_zuko_and_nflows_on_equal_knots(library, peers, x64):
    """tests/peers/make_fixtures.py; saturated splines lose digits to their conditioning, the more
    so in nflows."""
    for got, name in zip(knots(peers["raw"]), ("xk", "yk", "slopes"), strict=True):
        np.testing.assert_allclose(got, peers[name], atol=1e-12, rtol=1e-12)
    raw = np.broadcast_to(peers["raw"][:, None], (*peers["x"].shape, SIZE))
    for value, name in zip(
        both(peers["x"], raw), ("y", "log_slope", "back", "back_log_slope"), strict=True
    ):
        np.testing.assert_allclose(value, peers[f"{library}_{name}"], atol=1e-9, err_msg=name)


def test_equals_flowjax_on_equal_knots(x64):
    rng = np.random.default_rng(3)
    raw = np.concatenate([scale * rng.normal(size=(50, SIZE)) for scale in (1, 4)])
    x = rng.uniform(-1.2 * BOUND, 1.2 * BOUND, (100, 40))
    template = flowjax.bijections.RationalQuadraticSpline(knots=BINS, interval=BOUND)
    template = eqx.tree_at(lambda s: (s.x_pos, s.y_pos, s.derivatives), template, (0, 0, 0))

    def theirs(xk, yk, slopes, x):
        spline = eqx.tree_at(
            lambda s: (s.x_pos, s.y_pos, s.derivatives), template, (xk, yk, slopes)
        )
        return *spline.transform_and_log_det(x), *spline.inverse_and_log_det(x)

    over_points = jax.vmap(theirs, in_axes=(None, None, None, 0))
    expected = jax.jit(jax.vmap(over_points))(*knots(raw, bound=BOUND), x)
    raw = np.broadcast_to(raw[:, None], (*x.shape, SIZE))
    for value, other in zip(both(x, raw), expected, strict=True):
        np.testing.assert_allclose(value, other, atol=1e-9)


@pytest.mark.parametrize("apply", DIRECTIONS.values())
def test_errors_name_the_shapes(apply):
    with pytest.raises(
        ValueError, match=r"\[4, '3\*bins - 1'\] for x of shape \[4\], got \[5, 23\]"
    ):
        apply(jnp.ones(4), jnp.ones((5, SIZE)))
    with pytest.raises(ValueError, match=r"3\*bins - 1\], got \[4, 22\]"):
        apply(jnp.ones(4), jnp.ones((4, 22)))
    with pytest.raises(ValueError, match="fewer than 1000 bins"):
        apply(jnp.ones(4), jnp.ones((4, 2999)))
    with pytest.raises(ValueError, match="bound > 0, got -1"):
        apply(jnp.ones(4), jnp.ones((4, SIZE)), bound=-1.0)


def test_the_box_scales_with_its_bound():
    x, raw = np.linspace(-4.9, 4.9, 50).astype(np.float32), saturated(5, 50) / 4
    scaled = jax.jit(rational_quadratic, static_argnames="bound")
    y, log_slope = scaled(x, raw, bound=5.0)
    small, small_log_slope = scaled(x / 5, raw, bound=1.0)
    np.testing.assert_allclose(5 * small, y, atol=1e-5)
    np.testing.assert_allclose(small_log_slope, log_slope, atol=1e-4)
