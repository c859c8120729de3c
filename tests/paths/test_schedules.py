from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import paths
from jflow.paths import schedules

PEER = np.load(Path(__file__).parents[1] / "peers" / "paths.npz")
KINDS = ("velocity", "data", "noise", "score")
CONVERSIONS = [f"{a}_to_{b}" for a in KINDS for b in KINDS if a != b]


@pytest.mark.parametrize("name", ["vp", "linear_vp"])
def test_variance_preserving_velocity_and_score_have_a_limit_at_data(name):
    """sigma' is infinite at t=1, D sigma is not: v = (a' x + D s score) / a is a number there, to
    float32's root of epsilon (1 - t is one epsilon)."""
    schedule = getattr(schedules, name)()
    x, score = jnp.asarray([[0.3, -1.2]]), jnp.asarray([[0.7, 0.4]])
    rate = {"vp": 0.05, "linear_vp": 1.0}[
        name
    ]  # -(sigma^2)' / 2 at t=1; alpha' is the same number in both
    v = paths.score_to_velocity(score, x, jnp.ones(1), schedule)
    np.testing.assert_allclose(v, rate * (x + score), rtol=1e-3)
    np.testing.assert_allclose(paths.velocity_to_data(v, x, jnp.ones(1), schedule), x, atol=1e-3)


@pytest.mark.parametrize("name", ["linear", "polynomial", "vp", "linear_vp", "cosine"])
def test_against_flow_matching(name, x64):
    """Schedules, their slopes and conversions as the package flow_matching computes them."""
    t, x, prediction = (jnp.asarray(PEER[key]) for key in ("t", "x", "prediction"))
    schedule = getattr(schedules, name)(*[2.5] * (name == "polynomial"))
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


def test_scalar_times_are_every_row_s():
    x = jax.random.normal(jax.random.key(0), (4, 3))
    np.testing.assert_array_equal(
        paths.velocity_to_data(x, x, 0.25), paths.velocity_to_data(x, x, jnp.full(4, 0.25))
    )


def test_times_outside_are_refused_where_they_are_known():
    x = jnp.zeros((2, 3))
    for t in (jnp.asarray([0.5, 1.1]), jnp.asarray([-0.1, 0.5]), jnp.asarray([0.5, jnp.nan]), 2.0):
        with pytest.raises(ValueError, match=r"times t in \[0, 1\]"):
            paths.velocity_to_data(x, x, t)
    with pytest.raises(ValueError, match=r"times t in \[0, 1\]"):
        paths.linear().point(x, x, jnp.asarray([0.5, 1.1]))
