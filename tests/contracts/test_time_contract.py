"""Every law of times, and of pairs of times, against every promise of `types.Time` and
`types.TimePair`."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled_again
from keys import KEYS, keys_consumed_twice
from scipy import integrate, optimize, stats

from jflow import times

PEER = np.load(Path(__file__).parents[1] / "peers" / "paths.npz")
N = 4096
ALARM = 1e-3  # the false-alarm rate of each comparison with a law, were the seed not fixed
HALF, TWO = np.float64(0.5), np.float64(2.0)  # options are numbers of numpy's as well
UNIFORM = stats.uniform.cdf


class Row(NamedTuple):
    time: Any  # (key, n) -> t or (t, r)
    laws: Any  # of times a distribution function; of pairs {what: (t, r) -> (values, its function)}
    inside: bool = True  # whether no time lies at 0 or 1


def logit_normal_cdf(mean=0.0, std=1.0):
    def cdf(t):
        with np.errstate(divide="ignore"):
            return stats.norm(mean, std).cdf(np.log(t) - np.log1p(-t))

    return cdf


def u_shaped_cdf(t, a=4.0):
    """The integral of e^(a t) + e^(a (1 - t)), over that from 0 to 1."""
    return (np.expm1(a * t) + np.exp(a) - np.exp(a * (1 - t))) / (2 * np.expm1(a))


def mode_cdf(scale):
    """u of t by bisection of the paper's formula, in the paper's time 1 - t, at 1001 times."""
    paper = lambda u: 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)  # noqa: E731
    grid = np.linspace(0, 1, 1001)
    root = lambda t: optimize.brentq(lambda u: (1 - paper(u)) - t, 0, 1)  # noqa: E731
    found = np.asarray([0, *map(root, grid[1:-1]), 1])
    return lambda t: np.interp(t, grid, found)


def cosmap_cdf(t):
    return 2 / np.pi * np.arctan2(t, 1 - t)


def steps_cdf(at, shares):
    """That of numbers `at` with these shares."""
    return lambda t: np.sum(np.asarray(shares) * (np.asarray(t)[..., None] >= at), axis=-1)


def gap(t, r):
    return r - t


TIMES = {
    "antithetic": Row(times.antithetic(), UNIFORM, inside=False),
    "cosmap": Row(times.cosmap(), cosmap_cdf),
    "fixed": Row(times.fixed([0.0, 0.25, 1.0]), steps_cdf([0, 0.25, 1], [1 / 3] * 3), inside=False),
    "from_quantile": Row(times.from_quantile(lambda u: u**2, times.uniform()), np.sqrt, False),
    "logit_normal": Row(times.logit_normal(HALF, np.float64(0.8)), logit_normal_cdf(0.5, 0.8)),
    "logit_normal antithetic": Row(
        times.logit_normal(0.5, 0.8, draws=times.antithetic()), logit_normal_cdf(0.5, 0.8), False
    ),
    "low_discrepancy": Row(times.low_discrepancy(), UNIFORM, inside=False),
    "mode": Row(times.mode(), mode_cdf(1.29)),
    "mode low_discrepancy": Row(times.mode(draws=times.low_discrepancy()), mode_cdf(1.29), False),
    "mode at the ends": Row(times.mode(-HALF), mode_cdf(-0.5), inside=False),
    "sequential": Row(
        times.sequential([0.0, 0.25, 1.0], starts=HALF),
        lambda t: 0.5 * t + steps_cdf([0, 0.25], [0.25, 0.25])(t),
        inside=False,
    ),
    # a logit-normal shifted by a factor is one of mean - log(factor)
    "shifted": Row(
        times.shifted(times.logit_normal(0.2, 0.9), np.float64(3.0)),
        logit_normal_cdf(0.2 - np.log(3), 0.9),
    ),
    "u_shaped": Row(times.u_shaped(), u_shaped_cdf),
    "uniform": Row(times.uniform(), UNIFORM, inside=False),
    "uniform between": Row(
        times.uniform(np.float64(0.2), np.float64(0.7)), stats.uniform(0.2, 0.5).cdf
    ),
}
SHORT = logit_normal_cdf(-0.8, 1.0)
PAIRS = {
    # half of the pairs are one of two draws, the smaller one, t = r
    "pairs": Row(
        times.pairs(equal=HALF),
        {
            "t": lambda t, r: (t, lambda s: 1 - (1 - s) ** 2),
            "r": lambda t, r: (r[r > t], lambda s: s**2),
            "equal": lambda t, r: (1.0 * (t == r), steps_cdf([0, 1], [0.5, 0.5])),
        },
        inside=False,
    ),
    "interval_pairs": Row(
        times.interval_pairs(),
        {
            "r - t": lambda t, r: (gap(t, r), SHORT),
            "t of what is left": lambda t, r: (t / (1 - gap(t, r)), UNIFORM),
        },
        inside=False,
    ),
    "nearby_pairs": Row(
        times.nearby_pairs(HALF),
        {
            "t": lambda t, r: (t, UNIFORM),
            "r - t, where r may be as far": lambda t, r: (
                gap(t, r)[t < 0.5],
                stats.uniform(0, 0.5).cdf,
            ),
        },
        inside=False,
    ),
    "rectified_pairs": Row(
        times.rectified_pairs(equal=HALF),
        {
            "t": lambda t, r: (t, u_shaped_cdf),
            "equal": lambda t, r: (1.0 * (t == r), steps_cdf([0, 1], [0.5, 0.5])),
            # from t >= 0.2 on, the length is a draw as long as r does not end at 1
            "r - t, in its share of what fits": lambda t, r: (
                (SHORT(gap(t, r)) / SHORT(1 - t))[(t >= 0.2) & (r > t) & (r < 1)],
                UNIFORM,
            ),
            "r of early t": lambda t, r: (
                1.0 * (((r <= 0.6) | (r == 1))[t < 0.2]),
                steps_cdf([1], [1]),
            ),
        },
        inside=False,
    ),
}
TABLE = TIMES | PAIRS
EXCUSED = {
    "shift": "a function of times, below",
    "tokens": "times [n, count], below",
    "parts": "a dict of times, below",
}


def test_every_public_name_is_in_the_table():
    assert set(times.__all__) == {name.split()[0] for name in TABLE} | set(EXCUSED)


def follows(values, cdf):
    """Whether values have this distribution function, at 2001 points of [0, 1]."""
    at = np.linspace(0, 1, 2001)
    seen = np.searchsorted(np.sort(values), at, side="right") / len(values)
    return np.max(np.abs(seen - cdf(at))) < stats.kstwo.isf(ALARM, len(values))


@pytest.mark.parametrize("name", TABLE)
def test_draws(name):
    """Float32 in [0, 1], t <= r, of the law, other ones for another key; the same under jit, where
    two calls are one trace, and without, where the second call compiles nothing."""
    row, traces = TABLE[name], []

    @jax.jit
    def draw(key):
        traces.append(1)
        return row.time(key, N)

    drawn, other = draw(KEYS[0]), draw(KEYS[1])
    assert len(traces) == 1
    assert not compiled_again(draw=lambda: row.time(KEYS[0], N))
    leaves = map(jax.tree.leaves, (drawn, row.time(KEYS[0], N), other))
    for one, again, moved in zip(*leaves, strict=True):
        assert one.shape == (N,) and one.dtype == jnp.float32
        assert np.all((one > 0) & (one < 1)) if row.inside else np.all((one >= 0) & (one <= 1))
        np.testing.assert_allclose(again, one, rtol=1e-6, atol=1e-6)
        assert np.mean(np.asarray(one) != moved) > 0.1
    if name in TIMES:
        assert follows(np.asarray(drawn, np.float64), row.laws)
    else:
        t, r = (np.asarray(time, np.float64) for time in drawn)
        assert np.all(t <= r)
        for what, law in row.laws.items():
            assert follows(*law(t, r)), what


@pytest.mark.parametrize("name", TABLE)
def test_types_keys_and_any_number_of_rows(name):
    time = TABLE[name].time
    for x64, dtype in ((False, np.float32), (True, np.float64)):
        with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
            for n in (0, 1, 3):
                shapes = jax.eval_shape(lambda key, n=n: time(key, n), KEYS[0])
                assert {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes)} == {
                    ((n,), np.dtype(dtype))
                }
    assert not keys_consumed_twice(lambda key: time(key, 4), KEYS[0])
    with pytest.raises(TypeError):
        time(None, 4)


def test_bad_options_fail_at_construction():
    nan, inf = float("nan"), float("inf")
    for make, said in [
        *(
            (lambda ends=ends: times.uniform(*ends), "0 <= low < high <= 1, got low=")
            for ends in [(0.5, 0.5), (0.6, 0.2), (-0.1, 1.0), (0.0, 1.1), (nan, 1.0)]
        ),
        *(
            (lambda law=law: times.logit_normal(*law), "a finite mean and std > 0, got mean=")
            for law in [(0.0, 0.0), (0.0, -1.0), (nan, 1.0), (0.0, inf)]
        ),
        (lambda: times.mode(2.0), "times.mode: .*got 2.0"),
        (lambda: times.mode(-1.1), "times.mode: .*got -1.1"),
        (lambda: times.u_shaped(0.0), "times.u_shaped: expected 0 < a < 80, got 0.0"),
        (lambda: times.u_shaped(inf), "times.u_shaped: .*got inf"),
        (lambda: times.shift(0.5, 0.0), "times.shift: .*got 0.0"),
        (lambda: times.shifted(times.uniform(), -1.0), "times.shift: .*got -1.0"),
        (lambda: times.pairs(equal=2.0), r"times.pairs: expected equal in \[0, 1\], got 2.0"),
        (lambda: times.nearby_pairs(0.0), "nearby_pairs: expected 0 < reach <= 1, got 0.0"),
        (lambda: times.rectified_pairs(equal=-1), r"rectified_pairs: expected equal in \[0, 1\]"),
        (lambda: times.rectified_pairs(whole=(0.6, 0.2)), "0 <= a <= b <= 1, got"),
        (lambda: times.fixed([0.5, 1.5]), r"fixed: expected times in \[0, 1\], got \[0.5, 1.5\]"),
        (lambda: times.sequential([0.0, 0.5]), "sequential: expected knots that rise strictly"),
        (lambda: times.sequential(2, starts=2.0), "starts"),
    ]:
        with pytest.raises(ValueError, match=said):
            make()


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


@pytest.mark.parametrize("name", ["logit_normal", "mode", "cosmap", "u_shaped"])
def test_quantiles_rise_from_end_to_end(name):
    ends = getattr(times, name)(draws=lambda key, n: jnp.linspace(0, 1, n))(None, 11)
    assert np.all(np.diff(ends) > 0) and abs(ends[0]) < 1e-6 and abs(ends[-1] - 1) < 1e-6


def test_times_of_tokens_are_independent_draws_of_their_law():
    law = times.tokens(4, times.logit_normal(HALF, np.float64(0.8)))
    drawn = law(KEYS[0], N // 4)
    assert drawn.shape == (N // 4, 4) and drawn.dtype == jnp.float32
    assert follows(np.ravel(drawn), logit_normal_cdf(0.5, 0.8))
    spread = np.abs(np.corrcoef(np.asarray(drawn).T) - np.eye(4))
    assert np.max(spread) < 5 / np.sqrt(N // 4)  # five standard deviations
    assert not keys_consumed_twice(lambda key: law(key, 3), KEYS[0])
    with pytest.raises(ValueError, match="times.tokens: expected count to be a whole number"):
        times.tokens(0)


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c")])
def test_times_of_parts_are_of_four_kinds_by_their_shares(names):
    """Free times are of their law; of the corners the shares are those of the ends."""
    shares = dict(together=HALF, given=0.3, absent=0.1, independent=0.1)
    law = times.parts(names, times.uniform(0.25, 0.75), **shares)
    drawn = jax.jit(lambda key: law(key, N))(KEYS[0])
    assert tuple(sorted(drawn)) == names and all(t.dtype == jnp.float32 for t in drawn.values())
    t = np.stack([np.asarray(drawn[name]) for name in names])
    free = (t > 0) & (t < 1)
    np.testing.assert_array_equal(free | (t == 0) | (t == 1), True)
    assert all(follows(row[at] * 2 - 0.5, UNIFORM) for row, at in zip(t, free, strict=True))
    corner, common = ~free.all(0), (t == t[0]).all(0)
    assert np.all(free.any(0))  # there is something to learn in every row
    near = lambda share, expected, n=N: (  # noqa: E731
        abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / n)
    )
    assert near(corner.mean(), 0.4) and near(common.mean(), 0.5)
    assert near((t[~free] == 1).mean(), 0.75, (~free).sum())
    # the free parts of a corner share one time; each set of them is as frequent
    least, most = np.where(free, t, 1).min(0), np.where(free, t, 0).max(0)
    np.testing.assert_array_equal(least[corner], most[corner])
    sets, counts = np.unique(free[:, corner], axis=1, return_counts=True)
    expected = corner.sum() / (2 ** len(names) - 2)
    assert sets.shape[1] == 2 ** len(names) - 2
    assert np.max(np.abs(counts - expected)) < 5 * np.sqrt(expected)
    if len(names) == 3:  # both ends are in one row, too
        assert np.any((t == 0).any(0) & (t == 1).any(0))
    assert not keys_consumed_twice(lambda key: law(key, 3), KEYS[0])
    for n in (0, 1):
        shapes = jax.eval_shape(lambda key, n=n: law(key, n), KEYS[0])
        assert {(leaf.shape, leaf.dtype) for leaf in shapes.values()} == {((n,), np.dtype("f4"))}


def test_bad_parts_fail_at_construction():
    for make, said in (
        (lambda: times.parts(("a",)), r"two or more different names, got \['a'\]"),
        (lambda: times.parts(("a", "a")), "two or more different names"),
        (lambda: times.parts(("a", "b"), given=0.5), "shares >= 0 with the sum 1, got {'together'"),
        (lambda: times.parts(("a", "b"), given=-0.25, absent=0.75), "shares >= 0 with the sum 1"),
    ):
        with pytest.raises(ValueError, match=f"times.parts: expected {said}"):
            make()
