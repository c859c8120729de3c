import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import oracles, paths
from jflow.paths import schedules

PEER = np.load(Path(__file__).parents[1] / "peers" / "paths.npz")
SCHEDULES = {
    "linear": schedules.linear(),
    "polynomial": schedules.polynomial(2.5),
    "root": schedules.polynomial(0.5),
    "optimal_transport": schedules.optimal_transport(1e-2),
    "cosine": schedules.cosine(),
    "trigonometric": schedules.cosine(0.5),
    "linear_vp": schedules.linear_vp(),
    "vp": schedules.vp(),
    "ve": schedules.ve(),
    "edm": schedules.edm(),
    "unit_edm": schedules.unit_variance(schedules.edm()),
}
# alpha, sigma at t=0, then at t=1
ENDS = {
    "optimal_transport": (0, 1, 1, 1e-2),
    "trigonometric": (0, 0.5, 1, 0),
    "vp": (np.exp(-(0.1 + 20) / 4), np.sqrt(-np.expm1(-(0.1 + 20) / 2)), 1, 0),
    "ve": (1, 50, 1, 0.01),
    "edm": (1, 80, 1, 0.002),
    "unit_edm": (
        1 / np.hypot(1, 80),
        80 / np.hypot(1, 80),
        1 / np.hypot(1, 0.002),
        0.002 / np.hypot(1, 0.002),
    ),
}
KINDS = ("velocity", "data", "noise", "score")
CONVERSIONS = [f"{a}_to_{b}" for a in KINDS for b in KINDS if a != b]
every = pytest.mark.parametrize("name", SCHEDULES)


def predictions(schedule, x, t):
    """The four predictions for data N(1.5, 0.4^2), from the oracle's velocity and score and the
    definition of each."""
    oracle = oracles.gaussian([1.5] * 3, 0.4**2, schedule)
    a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    gain = a * 0.4**2 / (a**2 * 0.4**2 + s**2)
    return {
        "velocity": oracle.velocity(x, t),
        "data": 1.5 + gain * (x - a * 1.5),
        "noise": -s * oracle.score(x, t),
        "score": oracle.score(x, t),
    }


def draw(schedule, dtype, low, high, n=64):
    """x spread as x_t is, at times in [low, high]."""
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    t = jax.random.uniform(k2, (n,), dtype, low, high)
    x1 = 1.5 + 0.4 * jax.random.normal(k1, (n, 3), dtype)
    return schedule.alpha(t)[:, None] * x1 + schedule.sigma(t)[:, None] * jax.random.normal(
        k3, (n, 3), dtype
    ), t


@every
def test_conversions_in_float64(name, x64):
    # 1e-10, with room for t near the ends, where noise and data are lost to 1e-3 of their size and
    # more
    x, t = draw(SCHEDULES[name], jnp.float64, 0.01, 0.99)
    truth = predictions(SCHEDULES[name], x, t)
    for conversion in CONVERSIONS:
        source, target = conversion.split("_to_")
        given = getattr(paths, conversion)(truth[source], x, t, SCHEDULES[name])
        scale = max(1, float(jnp.abs(truth[target]).max()))
        np.testing.assert_allclose(
            given, truth[target], rtol=1e-10, atol=1e-10 * scale, err_msg=conversion
        )


@every
def test_conversions_in_float32(name):
    """Within 1e-5 of the float64 truth, relative to its largest value; times where the other part
    of x_t is at most some thirty times larger, since 1e-7 of it is what rounding leaves."""
    schedule = SCHEDULES[name]
    low, high = {
        "vp": (0.5, 0.95),
        "ve": (0.45, 0.7),
        "edm": (0.4, 0.7),
        "unit_edm": (0.4, 0.7),
    }.get(name, (0.1, 0.9))
    with jax.enable_x64(True):
        x, t = draw(schedule, jnp.float64, low, high)
        x, t = x.astype(jnp.float32), t.astype(jnp.float32)
        truth = {
            k: np.asarray(v)
            for k, v in predictions(schedule, x.astype(float), t.astype(float)).items()
        }
    for conversion in CONVERSIONS:
        source, target = conversion.split("_to_")
        given = getattr(paths, conversion)(jnp.asarray(truth[source], jnp.float32), x, t, schedule)
        assert given.dtype == jnp.float32
        scale = max(1, np.abs(truth[target]).max())
        np.testing.assert_allclose(
            given, truth[target], rtol=1e-5, atol=1e-5 * scale, err_msg=conversion
        )


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_ends_are_met_and_slopes_finite(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        schedule, ends = SCHEDULES[name], jnp.asarray([0.0, 1.0], dtype)
        found = [schedule.alpha(ends), schedule.sigma(ends)]
        given = np.stack([np.asarray(v, np.float64) for v in found], axis=1).ravel()
        # sigma = sqrt(2 - 2 t) and the like are taken an epsilon from the end: off by its root
        tolerance = 2 * float(jnp.finfo(dtype).eps) ** 0.5
        np.testing.assert_allclose(
            given, ENDS.get(name, (0, 1, 1, 0)), rtol=4 * tolerance, atol=tolerance
        )
        for f in schedule[:2]:
            slope = jax.vmap(jax.grad(f))(ends)
            bend = jax.vmap(jax.grad(jax.grad(f)))(ends)
            assert f(ends).dtype == slope.dtype == dtype
            assert np.all(np.isfinite(slope)) and np.all(np.isfinite(bend))


# name -> conversions that are not finite at t=0, and at t=1
LINEAR_ENDS = (
    {"noise_to_velocity", "noise_to_data", "score_to_velocity", "score_to_data"},
    {"data_to_velocity", "data_to_noise", "noise_to_score", "velocity_to_score", "data_to_score"},
)
DIVERGE = {
    "linear": LINEAR_ENDS,
    "cosine": LINEAR_ENDS,
    "trigonometric": LINEAR_ENDS,
    "optimal_transport": (LINEAR_ENDS[0], set()),
    "linear_vp": (LINEAR_ENDS[0], set()),
    "polynomial": (set(), LINEAR_ENDS[1]),
    "root": (set(), LINEAR_ENDS[1]),
}


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_conversions_at_the_ends_are_finite_or_as_listed(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        x, prediction = jnp.asarray([[0.3, -1.2]], dtype), jnp.asarray([[0.7, 0.4]], dtype)
        for end, diverge in zip((0.0, 1.0), DIVERGE.get(name, (set(), set())), strict=True):
            t = jnp.asarray([end], dtype)
            for conversion in CONVERSIONS:
                convert = functools.partial(
                    getattr(paths, conversion), t=t, schedule=SCHEDULES[name]
                )
                value, pullback = jax.vjp(
                    lambda p, x, convert=convert: convert(p, x), prediction, x
                )
                finite = [
                    bool(jnp.all(jnp.isfinite(a))) for a in (value, *pullback(jnp.ones_like(value)))
                ]
                assert finite[0] != (conversion in diverge), (conversion, end, value)
                if conversion not in diverge:
                    assert all(finite), (conversion, end, finite)


@pytest.mark.parametrize("name", ["vp", "linear_vp"])
def test_variance_preserving_velocity_and_score_have_a_limit_at_data(name):
    """sigma' is infinite at t=1, D sigma is not: v = (a' x + D s score) / a is a number there, to
    float32's root of epsilon (1 - t is one epsilon)."""
    schedule = SCHEDULES[name]
    x, score = jnp.asarray([[0.3, -1.2]]), jnp.asarray([[0.7, 0.4]])
    rate = {"vp": 0.05, "linear_vp": 1.0}[
        name
    ]  # -(sigma^2)' / 2 at t=1; alpha' is the same number in both
    v = paths.score_to_velocity(score, x, jnp.ones(1), schedule)
    np.testing.assert_allclose(v, rate * (x + score), rtol=1e-3)
    np.testing.assert_allclose(paths.velocity_to_data(v, x, jnp.ones(1), schedule), x, atol=1e-3)


@every
def test_the_path_is_that_of_the_schedule(name, x64):
    schedule = SCHEDULES[name]
    path = paths.affine(schedule)
    x0, x1 = jax.random.normal(jax.random.key(0), (2, 20, 3), jnp.float64)
    t = jnp.linspace(0.02, 0.98, 20)
    _, slope = jax.jvp(lambda t: path.point(x0, x1, t), (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(path.target(x0, x1, t), slope, rtol=1e-12)
    h = 1e-6
    by_hand = (path.point(x0, x1, t + h) - path.point(x0, x1, t - h)) / (2 * h)
    np.testing.assert_allclose(slope, by_hand, rtol=1e-6, atol=1e-6)


@every
def test_time_is_the_inverse(name, x64):
    schedule = SCHEDULES[name]
    t = jnp.linspace(0.01, 0.99, 50)
    for scale in (1.0, 3.0):
        np.testing.assert_allclose(
            schedule.time(scale * schedule.alpha(t), scale * schedule.sigma(t)),
            t,
            rtol=1e-11,
            atol=1e-11,
        )


@pytest.mark.parametrize("name", ["linear", "polynomial", "vp", "linear_vp", "cosine"])
def test_against_flow_matching(name, x64):
    """Schedules, their slopes and conversions as the package flow_matching computes them."""
    t, x, prediction = (jnp.asarray(PEER[key]) for key in ("t", "x", "prediction"))
    schedule = SCHEDULES[name]
    (a, da), (s, ds) = (jax.jvp(f, (t,), (jnp.ones_like(t),)) for f in schedule[:2])
    np.testing.assert_allclose(
        jnp.stack([a, s, da, ds]), PEER[f"{name}/at"], rtol=1e-10, atol=1e-12
    )
    for conversion in CONVERSIONS:
        if f"{name}/{conversion}" in PEER:
            given = getattr(paths, conversion)(prediction, x, t, schedule)
            np.testing.assert_allclose(
                given, PEER[f"{name}/{conversion}"], rtol=1e-9, err_msg=conversion
            )


def test_edm_spaces_noise_levels_as_its_grid():
    """t_i = (smax^(1/7) + i / (n-1) (smin^(1/7) - smax^(1/7)))^7: sigma of n = 18, as the paper
    writes it."""
    i = np.arange(18)
    levels = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(schedules.edm().sigma(jnp.linspace(0, 1, 18)), levels, rtol=2e-5)


def test_a_schedule_that_does_not_meet_its_ends():
    backwards = paths.Schedule(lambda t: 1 - t, lambda t: t)
    for schedule in (
        backwards,
        paths.Schedule(lambda t: t, lambda t: 1 - t / 2),
        paths.Schedule(lambda t: 0.5 + t / 2, lambda t: 1 - t),
        paths.Schedule(lambda t: t, lambda t: t - 1),
        paths.Schedule(lambda t: t / 0, lambda t: 1 - t),
        schedules.vp(0.1, 2.0),
        schedules.ve(0.01, 5.0),
    ):
        with pytest.raises(ValueError, match=r"noise at t=0 and data at t=1.*got alpha\(0\)="):
            paths.affine(schedule)
    with pytest.raises(
        ValueError, match=r"alpha to map t \[b\] to \[b\], got shape \[\] for \[2\]"
    ):
        paths.affine(paths.Schedule(lambda t: 1.0, lambda t: 1 - t))
    assert paths.check_ends(schedules.vp(0.1, 2.0), tolerance=0.75)[0](jnp.ones(1)) == 1


def test_times_outside_are_refused_where_they_are_known():
    x = jnp.zeros((2, 3))
    for t in (jnp.asarray([0.5, 1.1]), jnp.asarray([-0.1, 0.5]), jnp.asarray([0.5, jnp.nan]), 2.0):
        with pytest.raises(ValueError, match=r"times t in \[0, 1\]"):
            paths.velocity_to_data(x, x, t)
    with pytest.raises(ValueError, match=r"times t in \[0, 1\]"):
        paths.linear().point(x, x, jnp.asarray([0.5, 1.1]))


def test_bad_options():
    for make in (
        lambda: schedules.polynomial(0),
        lambda: schedules.polynomial(float("nan")),
        lambda: schedules.optimal_transport(1.0),
        lambda: schedules.optimal_transport(-0.1),
        lambda: schedules.cosine(0.0),
        lambda: schedules.vp(0.0, 20.0),
        lambda: schedules.ve(1.0, 0.5),
        lambda: schedules.edm(0.0, 80.0),
        lambda: schedules.edm(rho=-1.0),
    ):
        with pytest.raises(ValueError, match="schedules"):
            make()
