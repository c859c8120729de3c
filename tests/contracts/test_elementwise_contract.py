"""Every elementwise transformer against every promise of `types.Elementwise`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled_again

from jflow.bijectors import scales, univariate
from jflow.types import Elementwise


class Row(NamedTuple):
    make: Any  # () -> Elementwise
    bound: float = 3.0  # where the interesting points are
    dtypes: tuple[str, ...] = ("float32",)
    period: float | None = None  # of what is one to one on a circle, where it need not rise
    saturation: tuple[float, ...] = (
        1,
        4,
        50,
    )  # deviations of raw; what has no bounds overflows at 50


ALL = ("float32", "bfloat16", "float64")  # for one row of each transformer


TABLE = {
    "affine": Row(univariate.affine, dtypes=ALL),
    "affine of a wide scale": Row(lambda: univariate.affine(8.0)),
    "affine exponential": Row(
        lambda: univariate.affine(scale=scales.exponential), saturation=(1, 4)
    ),
    "affine sigmoid": Row(lambda: univariate.affine(scale=scales.sigmoid()), saturation=(1, 4)),
    "affine softplus": Row(lambda: univariate.affine(scale=scales.softplus())),
    "circular_rational_quadratic": Row(
        univariate.circular_rational_quadratic, bound=np.pi, dtypes=ALL
    ),
    "circular_rational_quadratic of 2 bins": Row(
        lambda: univariate.circular_rational_quadratic(2, 2.0), bound=2.0
    ),
    "circular_shift": Row(univariate.circular_shift, bound=np.pi, period=2 * np.pi),
    "deep_sigmoidal": Row(univariate.deep_sigmoidal, dtypes=ALL),
    "deep_sigmoidal of 1 unit": Row(lambda: univariate.deep_sigmoidal(1, 1)),
    "free_rational_quadratic": Row(univariate.free_rational_quadratic, bound=5.0, dtypes=ALL),
    "free_rational_quadratic of 2 bins": Row(
        lambda: univariate.free_rational_quadratic(2, 2.0), bound=2.0
    ),
    "logistic_mixture": Row(univariate.logistic_mixture, dtypes=ALL),
    "mixed": Row(
        lambda: univariate.mixed(
            univariate.circular_rational_quadratic(4, 2.5), univariate.affine(), True
        )
    ),
    "rational_quadratic": Row(univariate.rational_quadratic, bound=5.0, dtypes=ALL),
    "rational_quadratic of 2 bins": Row(lambda: univariate.rational_quadratic(2, 2.0), bound=2.0),
    "rational_quadratic of 3 bins": Row(lambda: univariate.rational_quadratic(3, 0.7), bound=0.7),
    "shift": Row(univariate.shift, dtypes=ALL),
    "shift_then_scale": Row(univariate.shift_then_scale, dtypes=ALL, saturation=(1, 4)),
    "sinh_arcsinh": Row(univariate.sinh_arcsinh, dtypes=ALL),
    "unconstrained_monotone": Row(univariate.unconstrained_monotone, bound=5.0, dtypes=ALL),
}


def test_every_public_name_is_in_the_table():
    assert set(univariate.__all__) == {name.split()[0] for name in TABLE}


def special_points(bound, dtype):
    """0, the edges, one ulp to either side of them, and far away; in the middle of the edge bins
    too."""
    edges = [np.asarray(e, dtype) for e in (-bound, bound)]
    beside = [np.nextafter(e, np.asarray(to, dtype)) for e in edges for to in (-np.inf, np.inf)]
    points = [0.0, *edges, *beside, 0.97 * bound, -0.97 * bound, 1e6, -1e6]
    return np.stack([np.asarray(p, dtype) for p in points])


def draw_raw(seed, scale, shape, dtype):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


@pytest.mark.parametrize("name", TABLE)
def test_raw_zero_is_the_identity(name):
    bound, bijection = TABLE[name].bound, TABLE[name].make()
    assert isinstance(bijection, Elementwise)
    x = np.concatenate(
        [np.linspace(-1.3 * bound, 1.3 * bound, 521), special_points(bound, np.float32)]
    )
    x = x.astype(np.float32)
    raw = np.zeros((x.size, bijection.size), np.float32)
    for y, log_slope in jax.jit(lambda x: (bijection.forward(x, raw), bijection.inverse(x, raw)))(
        x
    ):
        np.testing.assert_allclose(y, x, rtol=1e-7, atol=1e-6)
        np.testing.assert_allclose(log_slope, 0, atol=1e-6)


@functools.cache
def in_float64(name):
    """On rows of ascending x, each row with its own mild or saturated raw: values, slopes and their
    derivatives."""
    bound, bijection = TABLE[name].bound, TABLE[name].make()
    raws = [
        draw_raw(i, scale, (1, 1, bijection.size), np.float64)
        for i, scale in enumerate((0.3, 1.0, 1.0, 4.0, 4.0))
    ]
    x = np.linspace(-1.5 * bound, 1.5 * bound, 301)
    x = np.unique(np.concatenate([x, special_points(bound, np.float64)[:-2]]))
    raw = np.concatenate([np.broadcast_to(raw, (1, x.size, bijection.size)) for raw in raws])
    x = np.broadcast_to(x, raw.shape[:-1])

    def check(apply, x):
        (y, log_slope), (slope, _) = jax.jvp(lambda x: apply(x, raw), (x,), (jnp.ones_like(x),))
        return {"y": y, "log_slope": log_slope, "slope": slope}

    run = jax.jit(lambda x, y: (check(bijection.forward, x), check(bijection.inverse, y)))
    forward, inverse = run(jnp.asarray(x), jnp.asarray(x))
    undone, redone = run(inverse["y"], forward["y"])
    return x, [
        {**there, "again": back["y"], "back_log_slope": back["log_slope"]}
        for there, back in ((forward, redone), (inverse, undone))
    ]


@pytest.mark.parametrize("name", TABLE)
def test_forward_and_inverse_undo_each_other(name, x64):
    x, directions = in_float64(name)
    for r in directions:
        assert r["y"].dtype == r["log_slope"].dtype == np.float64
        assert r["y"].shape == r["log_slope"].shape == x.shape
        miss, period = r["again"] - x, TABLE[name].period
        if (
            period is not None
        ):  # at the ends of a period rounding decides which of the two comes back
            miss -= period * np.round(miss / period)
        np.testing.assert_allclose(miss, 0, atol=1e-9)
        # the slope of a saturated spline turns sharply: the 1e-12 that a round trip leaves are up
        # to 1e-6 in it
        np.testing.assert_allclose(r["log_slope"], -r["back_log_slope"], atol=1e-6)


@pytest.mark.parametrize("name", TABLE)
def test_log_slope_is_the_derivatives_and_the_map_is_monotone(name, x64):
    x, directions = in_float64(name)
    for r in directions:
        np.testing.assert_allclose(np.exp(r["log_slope"]), r["slope"], rtol=1e-9)
        rise, run = np.diff(r["y"], axis=1), np.diff(x, axis=1)
        if TABLE[name].period is not None:
            continue
        rounding = 2e-15 * np.maximum(
            5, np.abs(r["y"][:, 1:])
        )  # points an ulp apart may meet, a few ulps of y
        assert np.all(rise > -rounding) and np.all(rise[run > 1e-9] > 0)


@pytest.mark.parametrize(
    "name, dtype", [(name, dtype) for name, row in TABLE.items() for dtype in row.dtypes]
)
def test_values_and_gradients_are_finite_at_special_points(name, dtype):
    bound, bijection = TABLE[name].bound, TABLE[name].make()
    with jax.enable_x64(dtype == "float64"):
        x = special_points(bound, np.float32 if dtype == "bfloat16" else dtype)
        raw = [
            draw_raw(i, scale, (12, 1, bijection.size), float)
            for i, scale in enumerate(TABLE[name].saturation)
        ]
        raw = np.concatenate(raw)
        raw = jnp.asarray(np.broadcast_to(raw, (len(raw), x.size, bijection.size)), dtype)
        x = jnp.asarray(np.broadcast_to(x, raw.shape[:-1]), dtype)

        @jax.jit
        def run(x, raw):
            def at(apply):
                out, pullback = jax.vjp(apply, x, raw)
                return out, pullback(jax.tree.map(jnp.ones_like, out))

            return at(bijection.forward), at(bijection.inverse)

        for (y, log_slope), (x_bar, raw_bar) in run(x, raw):
            assert y.dtype == log_slope.dtype == jnp.promote_types(dtype, jnp.float32)
            for value in (y, log_slope, x_bar, raw_bar):
                assert np.all(np.isfinite(np.asarray(value, np.float64)))
            assert np.any(np.asarray(raw_bar, np.float64) != 0)


@functools.cache
def outside_jit(name):
    """The functions of x [3, 2] and raw [3, 2, size], to be called outside jit."""
    bijection, rng = TABLE[name].make(), np.random.default_rng(0)
    x, raw = (
        rng.normal(size=shape).astype(np.float32) for shape in ((3, 2), (3, 2, bijection.size))
    )
    functions = {"forward": bijection.forward, "inverse": bijection.inverse}
    for i, kernel in enumerate(bijection.columns or ()):
        functions[f"column {i}"] = lambda x, raw, kernel=kernel: kernel(x, raw.transpose(2, 0, 1))
    return functions, x, raw


@pytest.mark.parametrize("name", TABLE)
def test_without_jit_a_second_call_compiles_nothing(name):
    functions, x, raw = outside_jit(name)
    with jax.numpy_dtype_promotion("strict"):
        assert not compiled_again(
            **{which: functools.partial(f, x, raw) for which, f in functions.items()}
        )


@pytest.mark.parametrize("name", TABLE)
def test_a_missing_number_stays_missing_and_the_others_what_they_were(name):
    """Under strict promotion of types, which forbids x and raw of different ones alone."""
    functions, x, raw = outside_jit(name)
    missing = x.copy()
    missing[0, 0] = np.nan
    for which, f in functions.items():
        with jax.numpy_dtype_promotion("strict"):
            y, expected = (np.array(f(value, raw)[0]) for value in (missing, x))
        expected[0, 0] = np.nan
        np.testing.assert_array_equal(y, expected, which)


@pytest.mark.parametrize("name", TABLE)
def test_raw_of_a_wrong_shape_is_an_error(name):
    bijection = TABLE[name].make()
    for apply in (bijection.forward, bijection.inverse):
        with pytest.raises((ValueError, TypeError)):
            apply(jnp.ones(3), jnp.ones((4, bijection.size)))


def test_bad_options_fail_at_construction():
    for make in (
        lambda: univariate.affine(0.0),
        lambda: univariate.rational_quadratic(0),
        lambda: univariate.rational_quadratic(7.5),
        lambda: univariate.rational_quadratic(1000),
        lambda: univariate.rational_quadratic(8, -1.0),
        lambda: univariate.free_rational_quadratic(0),
        lambda: univariate.circular_rational_quadratic(8, 0.0),
        lambda: univariate.circular_shift(-1.0),
        lambda: univariate.logistic_mixture(0),
        lambda: univariate.logistic_mixture(2.5),
        lambda: univariate.logistic_mixture(floor=1.0),
        lambda: univariate.deep_sigmoidal(0),
        lambda: univariate.deep_sigmoidal(8, 0),
        lambda: univariate.deep_sigmoidal(2.5),
        lambda: univariate.deep_sigmoidal(floor=-0.1),
        lambda: univariate.unconstrained_monotone(0),
        lambda: univariate.unconstrained_monotone(8, 0),
        lambda: univariate.unconstrained_monotone(8, 30.5),
        lambda: univariate.unconstrained_monotone(bound=0.0),
        lambda: scales.bounded(0.0),
        lambda: scales.sigmoid(1.0),
        lambda: scales.softplus(0.0),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()
