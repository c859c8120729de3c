from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, stats

from jflow import times

PEER = np.load(Path(__file__).parent / "peers" / "paths.npz")
N = 4096
# the false-alarm rate of each Kolmogorov-Smirnov test, were the seed not fixed
ALARM = 1e-3


def u_shaped_cdf(t, a=4.0):
    """The integral of e^(a t) + e^(a (1 - t)), over that from 0 to 1."""
    return (np.expm1(a * t) + np.exp(a) - np.exp(a * (1 - t))) / (2 * np.expm1(a))


def mode_cdf(scale):
    """u of t by bisection of the paper's formula, in the paper's time 1 - t."""
    paper = lambda u: 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)  # noqa: E731
    return np.vectorize(lambda t: optimize.brentq(lambda u: (1 - paper(u)) - t, 0, 1))


cosmap_cdf = lambda t: 2 / np.pi * np.arctan2(t, 1 - t)  # noqa: E731
LAWS = {
    "mode": (times.mode, mode_cdf(1.29)),
    "mode at the ends": (lambda **kwargs: times.mode(-0.8, **kwargs), mode_cdf(-0.8)),
    "cosmap": (times.cosmap, cosmap_cdf),
    "u_shaped": (times.u_shaped, u_shaped_cdf),
    "logit_normal": (
        lambda **kwargs: times.logit_normal(0.5, 0.8, **kwargs),
        lambda t: stats.norm(0.5, 0.8).cdf(np.log(t / (1 - t))),
    ),
}


@pytest.mark.parametrize(
    ("time", "cdf"),
    [
        (times.uniform(), stats.uniform().cdf),
        (times.uniform(0.2, 0.7), stats.uniform(0.2, 0.5).cdf),
        (times.logit_normal(), lambda t: stats.norm().cdf(np.log(t / (1 - t)))),
        (times.logit_normal(1.0, 0.5), lambda t: stats.norm(1.0, 0.5).cdf(np.log(t / (1 - t)))),
    ],
    ids=["uniform", "part", "logit", "shifted"],
)
def test_times_follow_their_law(time, cdf):
    t = np.asarray(time(jax.random.key(0), N))
    assert t.shape == (N,) and t.min() >= 0 and t.max() <= 1
    assert stats.kstest(t.astype(np.float64), cdf).pvalue > ALARM


@pytest.mark.parametrize("law", LAWS)
def test_laws_from_quantiles(law):
    make, cdf = LAWS[law]
    for time in (make(), make(draws=times.antithetic()), make(draws=times.low_discrepancy())):
        t = np.asarray(time(jax.random.key(3), N), np.float64)
        assert t.shape == (N,) and t.min() >= 0 and t.max() <= 1
        # dependent draws lie closer to their law than independent ones
        assert stats.kstest(t, cdf).pvalue > ALARM
    ends = make(draws=lambda key, n: jnp.linspace(0, 1, n))(None, 11)
    assert np.all(np.diff(ends) > 0) and abs(ends[0]) < 1e-6 and abs(ends[-1] - 1) < 1e-6


def test_densities_as_the_papers_write_them():
    t = np.linspace(0.01, 0.99, 20)
    h = 1e-6
    slope = (cosmap_cdf(t + h) - cosmap_cdf(t - h)) / (2 * h)
    np.testing.assert_allclose(slope, 2 / (np.pi - 2 * np.pi * t + 2 * np.pi * t**2), rtol=1e-6)
    total = integrate.quad(lambda t: np.exp(4 * t) + np.exp(4 * (1 - t)), 0, 1)[0]
    slope = (u_shaped_cdf(t + h) - u_shaped_cdf(t - h)) / (2 * h)
    np.testing.assert_allclose(slope, (np.exp(4 * t) + np.exp(4 * (1 - t))) / total, rtol=1e-6)


def test_against_diffusers(x64):
    """diffusers draws the paper's time, noise at 1; cosmap it has as the density (of sigma, where
    the law is the same)."""
    for scale in (1.29, -0.8):
        ours = times.mode(scale, draws=lambda key, n: jnp.asarray(PEER["mode/u"]))(None, 16)
        np.testing.assert_allclose(1 - ours, PEER[f"mode/{scale}"], rtol=1e-12)
    t, h = PEER["t"], 1e-6
    quantile = times.cosmap(draws=lambda key, n: jnp.asarray(cosmap_cdf(t)))(None, len(t))
    np.testing.assert_allclose(quantile, t, rtol=1e-12)
    np.testing.assert_allclose(
        (cosmap_cdf(t + h) - cosmap_cdf(t - h)) / (2 * h), PEER["cosmap/density"], rtol=1e-6
    )


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_antithetic_and_low_discrepancy(n):
    u = np.sort(np.asarray(times.antithetic()(jax.random.key(0), n), np.float64))
    if n % 2 == 0:
        np.testing.assert_allclose(u + u[::-1], 1, atol=1e-6)
    v = np.asarray(times.low_discrepancy()(jax.random.key(0), n), np.float64)
    np.testing.assert_allclose(np.diff(np.sort(v)), 1 / n, rtol=1e-4)
    assert v.min() >= 0 and v.max() <= 1
    if n == 64:  # in no order that a shard or a prefix could see
        assert abs(stats.spearmanr(np.arange(n), v).statistic) < 0.5
    # any one of them is uniform
    keys = jax.random.split(jax.random.key(1), 2000)
    for draw in (times.antithetic(), times.low_discrepancy()):
        first = np.asarray(jax.vmap(lambda key, draw=draw: draw(key, n)[0])(keys), np.float64)
        assert stats.kstest(first, "uniform").pvalue > ALARM


def test_shift():
    t = jnp.linspace(0, 1, 101)
    for factor in (0.3, 1.0, 3.0):
        moved = times.shift(t, factor)
        np.testing.assert_allclose(times.shift(moved, 1 / factor), t, atol=1e-6)
        assert moved[0] == 0 and moved[-1] == 1
        sigma = 1 - t  # as SD3 writes it
        np.testing.assert_allclose(
            1 - moved, factor * sigma / (1 + (factor - 1) * sigma), atol=1e-6
        )
    mu = 0.7  # diffusers' exponential form
    sigma = 1 - t[:-1]
    np.testing.assert_allclose(
        1 - times.shift(t[:-1], np.exp(mu)), np.exp(mu) / (np.exp(mu) + (1 / sigma - 1)), rtol=1e-5
    )
    np.testing.assert_allclose(jax.jit(times.shift)(t, 3.0), times.shift(t, 3.0), rtol=1e-6)
    # a logit-normal shifted by factor is one of mean - log(factor)
    t = np.asarray(
        times.shifted(times.logit_normal(0.2, 0.9), 3.0)(jax.random.key(0), N), np.float64
    )
    assert stats.kstest(np.log(t / (1 - t)), stats.norm(0.2 - np.log(3), 0.9).cdf).pvalue > ALARM
    assert t.mean() < 0.5


def test_a_positive_mean_is_near_data():
    t = times.logit_normal(1.0, 0.5)(jax.random.key(0), N)
    assert t.mean() > 0.65  # t=1 is data; the median is sigmoid(1) = 0.73


def test_errors():
    for low, high in [(0.5, 0.5), (0.6, 0.2), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)]:
        with pytest.raises(ValueError, match="0 <= low < high <= 1"):
            times.uniform(low, high)
    for mean, std in [(0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))]:
        with pytest.raises(ValueError, match="std > 0"):
            times.logit_normal(mean, std)
    for make in (
        lambda: times.mode(2.0),
        lambda: times.mode(-1.1),
        lambda: times.u_shaped(0.0),
        lambda: times.u_shaped(float("inf")),
        lambda: times.shift(0.5, 0.0),
        lambda: times.shifted(times.uniform(), -1.0),
    ):
        with pytest.raises(ValueError, match="times"):
            make()
