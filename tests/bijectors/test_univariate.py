"""What is special to the scales, the free and circular splines, mixed layers and sinh-arcsinh."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors as bj
from jflow import distributions, flows, nets
from jflow.bijectors import scales, splines, univariate

SIZES = {"free": 25, "circular": 24}  # of 8 bins
MAKE = {
    "free": univariate.free_rational_quadratic,
    "circular": univariate.circular_rational_quadratic,
}
ENDS = {"free": splines.FREE, "circular": splines.CIRCULAR}


@pytest.fixture(scope="module")
def peers():
    with np.load(Path(__file__).parents[1] / "peers" / "transformers.npz") as arrays:
        return dict(arrays)


def test_scale_functions_are_what_they_say(x64):
    raw = np.array([-400.0, -2.0, 0.0, 0.7, 400.0])
    expected = {
        scales.bounded(2.0): np.exp(2 * np.tanh(raw / 2)),
        scales.exponential: np.exp(raw),
        scales.sigmoid(): 2 / (1 + np.exp(-raw)),  # Jet's
        scales.sigmoid(3.0): 3 / (1 + 2 * np.exp(-raw)),
        scales.softplus(0.01): 0.01 + np.logaddexp(0, raw + np.log(np.expm1(0.99))),
    }
    for log_scale, scale in expected.items():
        np.testing.assert_allclose(log_scale(raw), np.log(scale), rtol=1e-12, atol=1e-12)
        assert abs(log_scale(jnp.zeros(()))) < 1e-12


def test_affine_takes_a_scale_function(x64):
    x, raw = np.array([1.5]), np.array([[-0.4, 0.3]])
    y, log_slope = univariate.affine(scale=scales.sigmoid()).forward(x, raw)
    scale = 2 / (1 + np.exp(0.4))
    np.testing.assert_allclose([y[0], log_slope[0]], [1.5 * scale + 0.3, np.log(scale)], rtol=1e-12)
    with pytest.raises(TypeError, match="function raw -> log scale, got 'softplus'"):
        univariate.affine(scale="softplus")


def test_the_affine_map_of_jet(x64):
    """(x + b) 2 sigmoid(raw), or another scale; back: y / scale - b."""
    x, raw = np.array([1.5]), np.array([[-0.4, 0.3]])
    for scale, jet in (
        (2 / (1 + np.exp(0.4)), univariate.shift_then_scale()),
        (np.exp(-0.4), univariate.shift_then_scale(scales.exponential)),
    ):
        y, log_slope = jet.forward(x, raw)
        np.testing.assert_allclose([y[0], log_slope[0]], [1.8 * scale, np.log(scale)], rtol=1e-12)
        back, log_slope = jet.inverse(x, raw)
        expected = [1.5 / scale - 0.3, -np.log(scale)]
        np.testing.assert_allclose([back[0], log_slope[0]], expected, rtol=1e-12)
    with pytest.raises(TypeError, match="function raw -> log scale, got 'sigmoid'"):
        univariate.shift_then_scale("sigmoid")


@pytest.mark.parametrize("kind", MAKE)
def test_free_and_circular_splines_equal_nflows_and_normflows(kind, peers, x64):
    """tests/peers/make_transformers_fixtures.py, equal knots, float64; 1e-9 for the saturated
    ones."""
    spline, x = MAKE[kind](8, 5.0), peers["x"]
    raw = np.broadcast_to(peers[f"{kind}_raw"][:, None], (*x.shape, SIZES[kind]))
    for values, prefix in (
        (jax.jit(spline.forward)(x, raw), ""),
        (jax.jit(spline.inverse)(x, raw), "back_"),
    ):
        for value, name in zip(values, ("y", "log_slope"), strict=True):
            np.testing.assert_allclose(
                value, peers[f"{kind}_{prefix}{name}"], atol=1e-9, err_msg=prefix + name
            )


@pytest.mark.parametrize("kind", MAKE)
def test_the_functions_have_the_knots_that_knots_returns(kind, x64):
    spline = MAKE[kind](8, 5.0)
    raw = np.concatenate(
        [scale * np.random.default_rng(0).normal(size=(20, SIZES[kind])) for scale in (1, 4)]
    )
    xk, yk, slopes = splines.rational_quadratic_knots(raw, bound=5.0, ends=ENDS[kind])
    for ends in (xk, yk):
        np.testing.assert_array_equal(ends[:, [0, -1]], np.broadcast_to([-5.0, 5.0], (40, 2)))
    if kind == "circular":
        np.testing.assert_array_equal(slopes[:, 0], slopes[:, -1])
    y, log_slope = jax.jit(spline.forward)(
        xk, np.broadcast_to(raw[:, None], (*xk.shape, raw.shape[-1]))
    )
    np.testing.assert_allclose(y, yk, atol=1e-12)
    # 1e-14 beside a knot of a bin that is 1e-3 wide and bends a thousandfold
    np.testing.assert_allclose(log_slope, np.log(slopes), atol=1e-6)


@pytest.mark.parametrize("kind", MAKE)
def test_round_trip_of_saturated_splines_in_float32(kind):
    """|inverse(forward(x)) - x| < 2e-3 for 20,000 draws in the box, as with identity tails, and
    twice that up to |x| = 9, whose rounding is twice that of 5."""
    spline, rng = MAKE[kind](8, 5.0), np.random.default_rng(0)
    raw = (4 * rng.normal(size=(20_000, SIZES[kind]))).astype(np.float32)
    x = rng.uniform(-9, 9, 20_000).astype(np.float32)
    again = jax.jit(lambda x, raw: spline.inverse(spline.forward(x, raw)[0], raw)[0])(x, raw)
    miss, inside = np.abs(again - x), np.abs(x) < 5
    assert miss[inside].max() < 2e-3 and miss[~inside].max() < 4e-3


def test_free_tails_are_lines_of_the_end_slopes(x64):
    spline = univariate.free_rational_quadratic(8, 5.0)
    raw = np.random.default_rng(1).normal(size=(9, 25))
    slopes = splines.rational_quadratic_knots(raw, ends=splines.FREE)[2]
    side, beyond = (
        np.array([-1, -1, -1, 1, 1, 1])[:, None],
        np.array([0, 0.3, 1e6, 0, 0.3, 1e6])[:, None],
    )
    slope = np.where(side < 0, slopes[:, 0], slopes[:, -1])
    x, raw = np.broadcast_to(side * (5 + beyond), (6, 9)), np.broadcast_to(raw, (6, 9, 25))
    y, log_slope = jax.jit(spline.forward)(x, raw)
    np.testing.assert_allclose(y, side * (5 + slope * beyond), rtol=1e-12)
    np.testing.assert_allclose(log_slope, np.log(slope), atol=1e-12)
    assert np.ptp(slopes[:, 0]) > 0.1 and np.any(slopes[:, 0] != slopes[:, -1])


@pytest.mark.parametrize(
    "make", [univariate.circular_rational_quadratic, lambda: univariate.circular_shift()]
)
def test_circular_maps_commute_with_whole_turns(make, x64):
    circular, rng = make(), np.random.default_rng(2)
    x, raw = rng.uniform(-np.pi, np.pi, 50), rng.normal(size=(50, circular.size))
    y, log_slope = circular.forward(x, raw)
    assert np.all(np.abs(y) <= np.pi)
    for turns in (-2, 1):
        again, again_log_slope = circular.forward(x + 2 * np.pi * turns, raw)
        np.testing.assert_allclose(again, y + 2 * np.pi * turns, atol=1e-12)
        np.testing.assert_allclose(again_log_slope, log_slope, atol=1e-9)


def test_circular_shift_turns(x64):
    x, raw = np.array([3.0, -3.0, 0.0]), np.array([[1.0], [-1.0], [7.0]])
    y, _ = univariate.circular_shift().forward(x, raw)
    np.testing.assert_allclose(y, [4 - 2 * np.pi, 2 * np.pi - 4, 7 - 2 * np.pi], atol=1e-12)


def test_a_circular_flow_is_a_density_of_the_torus(x64):
    """Mass 1 on a grid of 200 x 200 periods' points (the trapezoidal rule of a periodic function;
    kinks leave 1e-3), continuous across the seam, and with mass across it that identity tails could
    not move there."""
    event = (2,)
    layer = bj.chain(
        bj.reverse(),
        bj.coupling(
            univariate.circular_rational_quadratic(4),
            nets.Periodic(nets.MLP((8,), nn.tanh)),
            split=1,
        ),
        bj.coupling(univariate.circular_shift(), nets.Periodic(nets.MLP((8,), nn.tanh)), split=1),
    )
    flow = flows.flow(bj.invert(bj.scan(layer, 3)), distributions.uniform(event, -np.pi, np.pi))
    shapes = jax.eval_shape(flow.init, jax.random.key(0), jnp.zeros((1, 2)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: 0.5 * rng.normal(size=p.shape), shapes)
    log_prob = jax.jit(flow.log_prob)
    axis = (np.arange(200) + 0.5) / 200 * 2 * np.pi - np.pi
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    mass = np.exp(log_prob(params, grid)) * (2 * np.pi / 200) ** 2
    np.testing.assert_allclose(mass.sum(), 1, atol=1e-3)
    assert mass.max() > 3 * mass.min()
    edge, other = np.pi * (1 - 1e-9), rng.uniform(-3, 3, 25)
    for left, right in (
        (np.stack([np.full(25, -edge), other], -1), np.stack([np.full(25, edge), other], -1)),
        (np.stack([other, np.full(25, -edge)], -1), np.stack([other, np.full(25, edge)], -1)),
    ):
        # 2e-9 apart on the torus
        np.testing.assert_allclose(log_prob(params, left), log_prob(params, right), atol=1e-5)


def test_periodic_sees_angles_by_cosine_and_sine_and_the_rest_as_it_is(x64):
    net = nets.Periodic(nets.MLP((8,), nn.tanh), bound=2.0, mask=(True, False))
    x = np.random.default_rng(0).normal(size=(5, 2))
    params = net.init(jax.random.key(0), x)
    assert params["params"]["net"]["Dense_0"]["kernel"].shape == (3, 8)
    y = net.apply(params, x)
    np.testing.assert_allclose(net.apply(params, x + np.array([[4.0, 0.0]])), y, atol=1e-9)
    assert np.all(np.abs(net.apply(params, x + np.array([[0.0, 4.0]])) - y).max(1) > 1e-3)
    with pytest.raises(ValueError, match=r"mask of shape \[3\], got \[2\]"):
        net.init(jax.random.key(0), np.ones((1, 3)))


def test_mixed_is_each_map_in_its_place(x64):
    circular, free = (
        univariate.circular_rational_quadratic(4),
        univariate.free_rational_quadratic(3, 2.0),
    )
    both = univariate.mixed(circular, free, [True, False, True])
    assert both.size == max(circular.size, free.size) == 12
    rng = np.random.default_rng(0)
    x, raw = rng.normal(size=(7, 3)), rng.normal(size=(7, 3, 12))
    for name in ("forward", "inverse"):
        got = jax.jit(getattr(both, name))(x, raw)
        for d, one in enumerate((circular, free, circular)):
            expected = jax.jit(getattr(one, name))(x[:, d], raw[:, d, : one.size])
            for value, other in zip(got, expected, strict=True):
                np.testing.assert_allclose(value[:, d], other, atol=1e-12)
    with pytest.raises(ValueError, match=r"mask of shape \[3\] does not broadcast to \[7, 2\]"):
        both.forward(x[:, :2], raw[:, :2])
    with pytest.raises(TypeError, match="expected a boolean mask, got int"):
        univariate.mixed(circular, free, [1, 0])


def test_sinh_arcsinh_is_its_formula(x64):
    """Raw numbers to d, e, a, b by their bounds; log slopes by d cosh(d asinh x + e) / sqrt(1 +
    x^2)."""
    rng = np.random.default_rng(0)
    x, raw = 3 * rng.normal(size=200), 2 * rng.normal(size=(200, 4))
    d, e, a, b = np.exp(np.tanh(raw[:, 0])), *(3 * np.tanh(raw[:, 1:3] / 3).T), raw[:, 3]
    u = d * np.arcsinh(x) + e
    y, log_slope = univariate.sinh_arcsinh().forward(x, raw)
    np.testing.assert_allclose(y, np.sinh(u) * np.exp(a) + b, rtol=1e-11)
    np.testing.assert_allclose(
        log_slope, np.log(d * np.cosh(u) / np.sqrt(1 + x * x)) + a, atol=1e-11
    )


def test_sinh_arcsinh_keeps_digits_and_turns_tails_into_powers():
    sas = univariate.sinh_arcsinh()
    x = np.array([1e6, -1e6, 3e4, 1e-6], np.float32)
    np.testing.assert_array_equal(sas.forward(x, np.zeros((4, 4), np.float32))[0], x)
    raw = np.broadcast_to(np.array([-0.5, 0.0, 0.0, 0.0], np.float32), (2, 4))
    y = sas.forward(np.array([1e4, 1e6], np.float32), raw)[0]
    d = np.exp(np.tanh(-0.5))
    np.testing.assert_allclose(np.log(y[1] / y[0]) / np.log(100), d, rtol=1e-4)
