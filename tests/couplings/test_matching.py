"""Couplings that pair each row once against the definitions of what they find, and costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jflow import couplings, data
from jflow.couplings import _plans

KEY = jax.random.key(0)


def eight_to_moons(n=48, seed=0):
    """Rows of the eight Gaussians, and moons with their labels."""
    moons = data.moons(n, seed + 1, noise=0.2)
    return (
        jnp.asarray(data.eight_gaussians(n, seed)["x"]),
        jnp.asarray(3 * moons["x"] - 1),
        jnp.asarray(moons["cond"]),
    )


def squared(x0, x1):
    """Squared distances in float64, from differences."""
    a, b = (np.asarray(x, np.float64) for x in (x0, x1))
    return ((a[:, None] - b[None]) ** 2).sum(-1)


def total(cost, i, j):
    return float(np.asarray(cost, np.float64)[np.asarray(i), np.asarray(j)].sum())


@pytest.mark.parametrize("n", [1, 2, 33, 256])
def test_exact_has_scipys_optimum(n):
    x0, x1, _ = eight_to_moons(n)
    cost = squared(x0, x1)
    pairs = jax.jit(couplings.optimal_transport())(None, x0, x1)
    # float32 costs of order 10 round at 1e-6: two assignments as close as that are the same to it
    assert total(cost, *pairs) == pytest.approx(total(cost, *linear_sum_assignment(cost)), rel=1e-7)


def moved_and_with_outliers(d=2):
    """Rows whose best pairs float32 costs would not tell: an offset adds 1e8 or 1e10 to each, an
    outlier 1e12 to some."""
    x0, x1 = np.random.default_rng(0).normal(size=(2, 64, d)).astype(np.float32)
    outlier, several, source = x1.copy(), x1.copy(), x0.copy()
    outlier[0, 0], source[[5, 9]] = 1e6, [[-1e6] * d, [3e5] * d]
    several[:3] *= 1e6
    two = [np.where(np.arange(64)[:, None] < 20, 1e5, 0).astype(np.float32) + x for x in (x0, x1)]
    offsets = {f"offset {by}": (x0, x1 + np.float32(by)) for by in (1e4, 1e5)}
    return offsets | {
        "of both": (x0 + np.float32(1e5), x1 - np.float32(1e4)),
        "outlier": (x0, outlier),
        "of the source": (source, x1),
        "of both, and an offset": (source, several + np.float32(1e4)),
        "two clusters": (two[0], two[1][::-1].copy()),
    }


def test_exact_and_partial_of_moved_rows_and_rows_with_outliers():
    exact, some = (
        jax.jit(couplings.optimal_transport()),
        jax.jit(couplings.partial_optimal_transport(0.5)),
    )
    for name, (x0, x1) in moved_and_with_outliers().items():
        cost = squared(x0, x1)
        excess = total(cost, *exact(None, x0, x1)) - total(cost, *linear_sum_assignment(cost))
        assert excess / 64 < 0.01, name
        pairs = np.unique(np.stack(some(KEY, x0, x1)), axis=1)
        excess = total(cost, *pairs) - total(cost, *_plans.assign_some(cost, 32))
        assert excess / 32 < 0.01, name


def test_exact_with_an_outlier_in_many_dimensions():
    """Beyond 64 numbers the costs come from a matrix product."""
    for name in ("offset 10000.0", "outlier"):
        x0, x1 = moved_and_with_outliers(70)[name]
        cost = squared(x0, x1)
        excess = total(cost, *couplings.optimal_transport()(None, x0, x1)) - total(
            cost, *linear_sum_assignment(cost)
        )
        assert excess / 64 < 0.05, name


def test_an_outlier_leaves_sinkhorn_the_others():
    """Epsilon counts in what half of the pairs cost, not in a mean that one row of 64 decides."""
    x0, x1 = moved_and_with_outliers()["outlier"]
    cost = squared(x0, x1)[:, 1:]
    for draw in (couplings.sample_permutation, couplings.most_likely_permutation):
        i, j = couplings.sinkhorn(draw=draw)(KEY, x0, x1)
        kept = np.asarray(j) > 0
        assert total(cost, i[kept], j[kept] - 1) / 63 < 0.25 * cost.mean()


def test_exact_in_many_dimensions_and_bfloat16():
    x0, x1 = (jax.random.normal(k, (32, 4, 4, 3)) for k in jax.random.split(KEY))
    for a, b in ((x0, x1), (x0.astype(jnp.bfloat16), x1.astype(jnp.bfloat16))):
        cost = np.asarray(couplings.squared_euclidean(a, b), np.float64)
        flat = [np.asarray(x, np.float64).reshape(32, -1) for x in (a, b)]
        np.testing.assert_allclose(
            cost, ((flat[0][:, None] - flat[1][None]) ** 2).sum(-1), rtol=1e-5
        )
        assert total(cost, *couplings.optimal_transport()(None, a, b)) == pytest.approx(
            total(cost, *linear_sum_assignment(cost))
        )


def test_exact_sorts_a_line():
    """In one dimension the optimum of a convex cost pairs the ranks."""
    x0, x1 = (jax.random.normal(k, (64, 1)) for k in jax.random.split(KEY))
    i, j = couplings.optimal_transport()(None, x0, 5 + 3 * x1)
    np.testing.assert_array_equal(
        np.argsort(np.argsort(x0[i, 0])), np.argsort(np.argsort(x1[j, 0]))
    )


def test_class_aware_optimum_is_that_of_each_class():
    x0, x1, label = eight_to_moons()
    i, j = couplings.optimal_transport(couplings.within_class())(None, x0, x1, label)
    cost = np.asarray(couplings.squared_euclidean(x0, x1), np.float64)
    parts = [np.flatnonzero(label == c) for c in (0, 1)]
    best = sum(total(cost[np.ix_(p, p)], *linear_sum_assignment(cost[np.ix_(p, p)])) for p in parts)
    assert total(cost, i, j) == pytest.approx(best, rel=1e-12)
    whole = couplings.optimal_transport()(None, x0, x1, label)
    assert np.mean(label[whole[0]] != label[whole[1]]) > 0.2  # the plain one mixes them


def test_source_of_each_class_stays_normal():
    """Class 1 lies to the right. Plain OT gives it the right half of the noise, N(0, 1) cut at 0:
    mean 0.80; the class-aware ones leave it N(0, 1). 64 batches of 32 rows, half of a class: 4
    standard errors of a mean are 0.125."""
    keys = jax.random.split(jax.random.key(3), 64)

    def source_of_class_one(coupling):
        def batch(key):
            k0, k1, k2 = jax.random.split(key, 3)
            label = jnp.arange(32) % 2
            x1 = 4.0 * (2 * label[:, None] - 1) + 0.1 * jax.random.normal(k1, (32, 1))
            x0 = jax.random.normal(k0, (32, 1))
            i, j = coupling(k2, x0, x1, label)
            chosen = (label[j] == 1)[:, None]
            return jnp.sum(jnp.where(chosen, x0[i], 0)) / 16, jnp.sum(
                jnp.where(chosen, x0[i] ** 2, 0)
            ) / 16

        return np.mean(jax.jit(lambda keys: jax.lax.map(batch, keys))(keys), axis=1)

    for coupling in (couplings.optimal_transport, couplings.sinkhorn, couplings.stable_matching):
        aware = coupling(cost=couplings.within_class())
        assert np.all(np.abs(source_of_class_one(aware) - [0, 1]) < [0.125, 0.18])
    # the label is half of the batch: the cut is at the batch's median, not at 0, which costs a
    # little of 0.80
    np.testing.assert_allclose(
        source_of_class_one(couplings.optimal_transport())[0], 0.80, atol=0.06
    )


def test_near_condition_leaves_the_share_of_pairs_it_says():
    x0, x1, _ = eight_to_moons(64)
    cond = x1[:, :1]
    plain = np.asarray(couplings.squared_euclidean(x0, x1))
    for ratio in (0.05, 0.2):
        cost = np.asarray(jax.jit(couplings.near_condition(ratio=ratio))(x0, x1, cond))
        share = np.mean(cost <= np.diagonal(plain)[:, None] * (1 + 1e-6))
        assert share == pytest.approx(ratio, abs=2 / 64**2)  # a pair more or less, and rounding
    by_hand = couplings.near_condition(weight=3.0, distance=couplings.squared_euclidean)(
        x0, x1, cond
    )
    np.testing.assert_allclose(by_hand, plain + 3 * (cond - cond.T) ** 2, rtol=1e-4, atol=1e-3)
    # conditions agree better than in plain OT, and better the smaller the ratio
    gaps = []
    for cost in (
        couplings.near_condition(ratio=0.02),
        couplings.near_condition(ratio=0.2),
        couplings.squared_euclidean,
    ):
        i, j = couplings.optimal_transport(cost)(None, x0, x1, cond)
        gaps.append(float(np.mean((cond[i] - cond[j]) ** 2)))
    assert gaps[0] < 0.7 * gaps[1] and gaps[1] < 0.9 * gaps[2]


def test_near_condition_of_equal_conditions_is_finite():
    x0, x1, label = eight_to_moons(16)
    cost = couplings.near_condition()(x0, x1, label.astype(jnp.float32))
    same = np.equal.outer(np.asarray(label), np.asarray(label))
    assert np.isfinite(cost).all() and cost[~same].min() > cost[same].max()
    i, j = couplings.optimal_transport(couplings.near_condition())(
        None, x0, x1, label.astype(jnp.float32)
    )
    np.testing.assert_array_equal(label[i], label[j])


def test_cosine():
    x = jnp.asarray([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    np.testing.assert_allclose(couplings.cosine(x, x), [[0, 1, 2], [1, 0, 1], [2, 1, 0]], atol=1e-6)


def test_stable_has_no_blocking_pair():
    x0, x1, _ = eight_to_moons(150)
    cost = np.asarray(couplings.squared_euclidean(x0, x1))
    i, j = jax.jit(couplings.stable_matching())(None, x0, x1)
    row = np.empty(150, int)
    row[np.asarray(i)] = np.asarray(j)
    mine = cost[np.arange(150), row]
    theirs = np.empty(150)
    theirs[row] = mine
    assert not ((cost < mine[:, None]) & (cost < theirs[None])).any()


@pytest.mark.parametrize("n", [7, 130])
def test_greedy_takes_the_heaviest_pair_each_time(n):
    """Against the definition, with ties (weights of few values), and past the sizes where the rest
    moves house."""
    rng = np.random.default_rng(n)
    for weight in (rng.normal(size=(n, n)), rng.integers(0, 5, (n, n)).astype(float)):
        found = np.asarray(jax.jit(_plans.greedy)(jnp.asarray(weight, jnp.float32)))
        left, expected = weight.copy(), np.empty(n)
        for k in range(n):
            i, j = np.unravel_index(left.argmax(), left.shape)
            expected[k] = weight[i, j]
            left[i], left[:, j] = -np.inf, -np.inf
        np.testing.assert_array_equal(np.sort(found), np.arange(n))
        np.testing.assert_allclose(np.sort(weight[np.arange(n), found])[::-1], expected, rtol=1e-6)


def test_partial_agrees_with_pot():
    ot = pytest.importorskip("ot")
    x0, x1, _ = eight_to_moons(20)
    cost = np.asarray(couplings.squared_euclidean(x0, x1), np.float64)
    pairs = _plans.assign_some(cost, 14)
    assert all(len(set(rows)) == 14 for rows in pairs)
    plan = ot.partial.partial_wasserstein(np.full(20, 1 / 20), np.full(20, 1 / 20), cost, m=0.7)
    assert total(cost, *pairs) / 20 == pytest.approx((plan * cost).sum(), rel=1e-9)
    i, j = jax.jit(couplings.partial_optimal_transport(0.7))(KEY, x0, x1)
    seen, counts = np.unique(np.stack([i, j]), axis=1, return_counts=True)
    assert (
        {tuple(p) for p in seen.T} == {tuple(p) for p in pairs.T}
        and set(counts) == {1, 2}
        and len(i) == 20
    )


def test_vmap_is_a_loop():
    """The assignment is made on the host, one batch after another."""
    pair = couplings.optimal_transport()
    x0, x1, _ = (jnp.stack([a, a[::-1]]) for a in eight_to_moons(16))
    i, _ = jax.jit(jax.vmap(lambda *args: jax.tree.map(jnp.asarray, pair(None, *args))))(x0, x1)
    for k in range(2):
        np.testing.assert_array_equal(i[k], pair(None, x0[k], x1[k])[0])
