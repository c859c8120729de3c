"""Every coupling's pairs, and those that pair each row once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled_again
from scipy.optimize import linear_sum_assignment

from jflow import couplings, data, losses, types
from jflow.couplings import _plans
from jflow.train import data_mesh, data_sharding

KEY = jax.random.key(0)
PERMUTATIONS = {
    "independent": couplings.independent(),
    "exact": couplings.optimal_transport(),
    "stable": couplings.stable_matching(),
    "sinkhorn": couplings.sinkhorn(),
    "likeliest": couplings.sinkhorn(0.01, draw=couplings.most_likely_permutation),
    "exact in class": couplings.optimal_transport(couplings.within_class()),
    "sinkhorn in class": couplings.sinkhorn(0.02, couplings.within_class()),
    "stable in class": couplings.stable_matching(couplings.within_class()),
    "near": couplings.optimal_transport(couplings.near_condition()),
}
OTHERS = {
    "partial": couplings.partial_optimal_transport(0.7),
    "unbalanced": couplings.unbalanced(),
    "with replacement": couplings.sinkhorn(draw=couplings.sample_with_replacement),
}


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


def test_independent_keeps_rows():
    x = jnp.zeros((5, 2))
    i, j = couplings.independent()(KEY, x, x, jnp.arange(5))
    np.testing.assert_array_equal(i, np.arange(5))
    np.testing.assert_array_equal(j, np.arange(5))
    assert isinstance(i, np.ndarray)  # known while tracing: no rows move


@pytest.mark.parametrize("name", PERMUTATIONS)
def test_permutations_keep_both_marginals(name):
    """Every row of both sides exactly once; the same under jit, where values are not known."""
    x0, x1, label = eight_to_moons()
    pair = PERMUTATIONS[name]
    i, j = pair(KEY, x0, x1, label)
    np.testing.assert_array_equal(np.sort(i), np.arange(48))
    np.testing.assert_array_equal(np.sort(j), np.arange(48))
    jitted = jax.jit(pair)(KEY, x0, x1, label)
    if name == "near":  # a weight found by halving: float32 may end it one half earlier
        cost = couplings.near_condition()(x0, x1, label)
        assert total(cost, *jitted) == pytest.approx(total(cost, i, j), rel=1e-4)
    else:
        np.testing.assert_array_equal(
            jitted[0][np.argsort(jitted[1])], np.asarray(i)[np.argsort(j)]
        )
    if "class" in name:
        np.testing.assert_array_equal(label[i], label[j])


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


@pytest.mark.parametrize(
    "name", ["exact in class", "sinkhorn in class", "likeliest", "sinkhorn", "near", "unbalanced"]
)
def test_an_offset_changes_no_pairs(name):
    """Multiples of 1/64 moved by 2^10 are the same numbers in float32, so that the pairs are the
    same too; for `unbalanced`, which leaves out rows that are far, both sides move."""
    x0, x1, label = eight_to_moons()
    x0, x1 = jnp.round(64 * x0) / 64, jnp.round(64 * x1) / 64
    cond = x1[:, :1] if name == "near" else label
    pair = jax.jit(
        (PERMUTATIONS | OTHERS)[name]
        if name != "near"
        else couplings.optimal_transport(couplings.near_condition(weight=2.0))
    )
    plain, moved = (
        pair(KEY, x0, x1, cond),
        pair(KEY, x0 + 1024 * (name == "unbalanced"), x1 + 1024, cond),
    )
    np.testing.assert_array_equal(plain, moved)


def test_an_outlier_leaves_sinkhorn_the_others():
    """Epsilon counts in what half of the pairs cost, not in a mean that one row of 64 decides."""
    x0, x1 = moved_and_with_outliers()["outlier"]
    cost = squared(x0, x1)[:, 1:]
    for draw in (couplings.sample_permutation, couplings.most_likely_permutation):
        i, j = couplings.sinkhorn(draw=draw)(KEY, x0, x1)
        kept = np.asarray(j) > 0
        assert total(cost, i[kept], j[kept] - 1) / 63 < 0.25 * cost.mean()


EVERY = (
    PERMUTATIONS
    | OTHERS
    | {"semidiscrete": lambda *args: couplings.semidiscrete(jnp.zeros(6, jnp.float32))(*args)}
)


@pytest.mark.parametrize("name", EVERY)
def test_types_stay_as_they_are(name):
    """Under strict promotion nothing is promoted, and under x64 no float64 comes into what float32
    rows compute. bfloat16 rows have costs in float32."""
    for dtype in (jnp.float32, jnp.bfloat16):
        rows = jax.ShapeDtypeStruct((6, 2), dtype)
        labels = jax.ShapeDtypeStruct((6,), jnp.int32)
        with jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
            traced, shapes = jax.make_jaxpr(EVERY[name], return_shape=True)(KEY, rows, rows, labels)
        assert not re.search(r"f64\[\d", str(traced))  # Python's own numbers are scalars f64[]
        assert all(
            jnp.issubdtype(index.dtype, jnp.integer) and index.shape == (6,) for index in shapes
        )


def test_numbers_of_numpy_are_options_like_any_other():
    number = np.float64(0.1)
    rows, labels = (
        jax.ShapeDtypeStruct((4, 4, 4, 1), jnp.float32),
        jax.ShapeDtypeStruct((4,), jnp.int32),
    )
    pairs = [
        couplings.sinkhorn(number),
        couplings.unbalanced(number, number),
        couplings.partial_optimal_transport(number),
        couplings.optimal_transport(couplings.near_condition(weight=number)),
        couplings.optimal_transport(couplings.near_condition(ratio=number)),
        couplings.stable_matching(couplings.cosine),
    ]
    with jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
        for pair in pairs:
            assert not re.search(r"f64\[\d", str(jax.make_jaxpr(pair)(KEY, rows, rows, labels)))
        for source in (
            couplings.corrupted(couplings.block_means(2), number),
            couplings.inpainting(couplings.tiles(2, number)),
        ):
            found, _ = jax.eval_shape(source, KEY, rows, labels)
            assert found.dtype == jnp.float32


@pytest.mark.parametrize(
    "pair",
    [
        couplings.optimal_transport(),
        couplings.optimal_transport(couplings.within_class()),
        couplings.optimal_transport(
            couplings.near_condition(condition=lambda labels: labels[:, None].astype(jnp.float32))
        ),
        couplings.partial_optimal_transport(0.5),
        couplings.sinkhorn(),
        couplings.stable_matching(),
        couplings.unbalanced(),
    ],
    ids=["exact", "within_class", "near_condition", "partial", "sinkhorn", "stable", "unbalanced"],
)
def test_without_jit_a_second_call_compiles_nothing(pair):
    x0, x1 = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 2)), jnp.float32)
    assert not compiled_again(pair=lambda: pair(jax.random.key(0), x0, x1, jnp.arange(6) % 3))


@pytest.mark.parametrize("name", [name for name in PERMUTATIONS | OTHERS])
def test_no_rows_make_no_pairs(name):
    none = jnp.zeros((0, 2))
    assert [
        index.shape for index in (PERMUTATIONS | OTHERS)[name](KEY, none, none, jnp.zeros(0, int))
    ] == [(0,), (0,)]


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


def recorder():
    seen = {}

    def apply(params, x, t, cond=None, *, key=None):
        jax.debug.callback(
            lambda *values: seen.update(zip(("x", "cond"), map(np.asarray, values), strict=True)),
            x,
            cond,
        )
        return jnp.zeros_like(x)

    return types.Velocity(lambda *args: {}, apply), seen


@pytest.mark.parametrize("name", PERMUTATIONS | OTHERS)
def test_labels_follow_in_the_jitted_loss(name):
    """At t = 1 the network sees x[j] and cond[j]: each point still has its own label."""
    coupling = (PERMUTATIONS | OTHERS)[name]
    x0, x1, label = eight_to_moons(32)
    velocity, seen = recorder()
    loss = losses.chain(
        couplings.pair(coupling), losses.flow_matching(velocity, time=lambda key, n: jnp.ones(n))
    )
    value, _ = jax.jit(loss)({}, KEY, {"x": x1, "x0": x0, "cond": label})
    jax.effects_barrier()
    rows = {
        tuple(row): c
        for row, c in zip(np.asarray(x1).round(4).tolist(), label.tolist(), strict=True)
    }
    assert [rows[tuple(row)] for row in seen["x"].round(4).tolist()] == seen["cond"].tolist()
    assert np.isfinite(value)


@pytest.mark.parametrize("name", PERMUTATIONS | OTHERS)
def test_no_gradient_goes_through(name):
    """The pairs are constants, also where the source depends on what is trained."""
    coupling = (PERMUTATIONS | OTHERS)[name]
    x0, x1, label = eight_to_moons(16)

    def objective(scale):
        i, j = coupling(KEY, scale * x0, x1, label)
        return jnp.sum((scale * x0[i] - x1[j]) ** 2), (i, j)

    grad, (i, j) = jax.jit(jax.grad(objective, has_aux=True))(1.0)
    assert grad == pytest.approx(float(np.sum(2 * (x0[i] - x1[j]) * x0[i])), rel=1e-4)


@pytest.mark.parametrize("name", ["exact", "stable", "sinkhorn", "exact in class"])
def test_vmap_is_a_loop(name):
    pair = PERMUTATIONS[name]
    x0, x1, label = (jnp.stack([a, a[::-1]]) for a in eight_to_moons(16))
    keys = jax.random.split(KEY, 2)
    i, _ = jax.jit(jax.vmap(lambda *args: jax.tree.map(jnp.asarray, pair(*args))))(
        keys, x0, x1, label
    )
    for k in range(2):
        np.testing.assert_array_equal(i[k], pair(keys[k], x0[k], x1[k], label[k])[0])


def test_on_a_mesh_the_whole_batch_is_paired():
    """One device here: that sharded inputs compile and pair as plain ones.
    tests/couplings/test_couplings_mesh.py has four."""
    x0, x1, label = eight_to_moons(16)
    placed = jax.device_put((x0, x1, label), data_sharding(data_mesh()))
    for name in ("exact", "sinkhorn", "stable"):
        i, _ = jax.jit(PERMUTATIONS[name])(KEY, *placed)
        np.testing.assert_array_equal(i, PERMUTATIONS[name](KEY, x0, x1, label)[0])


def test_errors():
    x0, x1, label = eight_to_moons(8)
    for pair in [
        p for p in (PERMUTATIONS | OTHERS).values() if p is not PERMUTATIONS["independent"]
    ]:
        with pytest.raises(
            ValueError, match=r"as many source rows as data rows, got shapes \[7, 2\] and \[8, 2\]"
        ):
            jax.jit(pair)(KEY, x0[:7], x1, label)
        with pytest.raises(ValueError, match="cost of source row 3 with data row . is NaN"):
            pair(KEY, x0.at[3].set(jnp.nan), x1, label)
    for pair in (
        couplings.optimal_transport(couplings.within_class()),
        couplings.optimal_transport(couplings.near_condition()),
    ):
        with pytest.raises(
            ValueError, match=r"expected cond .* to be an array \[8, ...\], got NoneType"
        ):
            pair(KEY, x0, x1)
    with pytest.raises(ValueError, match=r"costs of shape \[8, 8\], got \[8\]"):
        couplings.optimal_transport(lambda x0, x1, cond: jnp.zeros(8))(KEY, x0, x1)
    with pytest.raises(ValueError, match="source row 0 has no pair of finite cost"):
        couplings.stable_matching(lambda x0, x1, cond: jnp.full((8, 8), jnp.inf))(KEY, x0, x1)
    for pair in (
        couplings.sinkhorn(),
        couplings.partial_optimal_transport(0.5),
        couplings.unbalanced(),
    ):
        with pytest.raises(ValueError, match="needs a key"):
            pair(None, x0, x1)
    for build, said in [
        (lambda: couplings.partial_optimal_transport(0.0), r"fraction in \(0, 1\], got 0.0"),
        (lambda: couplings.sinkhorn(-1.0), "epsilon > 0, got -1.0"),
        (
            lambda: couplings.sinkhorn(iterations=0),
            "iterations to be a whole number of at least 1, got 0",
        ),
        (lambda: couplings.unbalanced(slack=0), "slack > 0, got 0"),
        (lambda: couplings.near_condition(ratio=2), r"ratio in \(0, 1\], got 2"),
        (lambda: couplings.near_condition(weight=-1.0), "weight >= 0 or None, got -1.0"),
    ]:
        with pytest.raises(ValueError, match=said):
            build()


@pytest.mark.parametrize("name", ["exact", "stable", "sinkhorn", "likeliest", "unbalanced"])
def test_costs_that_are_not_numbers_pair_in_order_inside_jit(name):
    x0, x1, label = eight_to_moons(16)
    i, j = jax.jit((PERMUTATIONS | OTHERS)[name])(KEY, x0.at[3].set(jnp.nan), x1, label)
    np.testing.assert_array_equal(i, np.arange(16))
    np.testing.assert_array_equal(j, np.arange(16))
