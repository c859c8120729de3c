"""One network for all conditionals: what it gives is a distribution, the one it draws from, and
what its loss averages."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jflow import flows, losses
from jflow.flows import MixedRows, Within

CODES, NUMBERS = (3, 0, 2), (False, True, True)  # codes alone, numbers alone, both
GRID = np.linspace(-9.0, 9.0, 361).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return flows.any_order(CODES, NUMBERS, width=16, num_blocks=1, bins=4, order=(2, 0, 1))


@pytest.fixture(scope="module")
def params(model):
    """Away from the initialization, so that columns depend on each other."""
    rows = MixedRows(np.zeros((1, 3), np.int32), np.zeros((1, 3), np.float32))
    params = model.init(jax.random.key(0), rows)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.08 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])


def all_rows():
    """Every row on the grid, and the weight of each: codes count 1, numbers the grid's step."""
    step = GRID[1] - GRID[0]
    rows = [
        (a, 0, c, y, z)
        for a, y in itertools.product(range(3), GRID[::4])
        for c, z in [(0, 0.0), (1, 0.0), *((2, z) for z in GRID[::4])]
    ]
    a, b, c, y, z = (np.array(v) for v in zip(*rows, strict=True))
    code = np.stack([a, b, c], 1).astype(np.int32)
    value = np.stack([0 * y, y, z], 1).astype(np.float32)
    return MixedRows(code, value), 4 * step * np.where(c == 2, 4 * step, 1.0)


def test_the_density_integrates_to_one(model, params):
    rows, weight = all_rows()
    density = np.exp(np.asarray(jax.jit(model.log_prob)(params, rows)))
    assert (density * weight).sum() == pytest.approx(1.0, abs=2e-3)
    given = np.zeros(rows.code.shape, bool)
    given[:, 0] = True  # p(the numbers | the code), for each of three codes
    conditional = np.exp(np.asarray(jax.jit(model.log_prob)(params, rows, given)))
    for code in range(3):
        here = rows.code[:, 0] == code
        assert (conditional * weight)[here].sum() == pytest.approx(1.0, abs=2e-3)


def test_samples_have_the_density(model, params):
    """Chi-square of the codes against sums of the density, and Kolmogorov-Smirnov of a number, in
    all rows and in those where the column that has both codes and numbers is a code, each at a
    false-alarm rate of 1e-4."""
    n = 4000
    empty = MixedRows(np.zeros((n, 3), np.int32), np.zeros((n, 3), np.float32))
    drawn, _ = jax.jit(model.sample)(params, jax.random.key(2), empty, np.zeros((n, 3), bool))
    beside = np.asarray(drawn.value)[np.asarray(drawn.code) != np.array([3, 0, 2])]
    assert not beside.any()  # no number stands beside a code, where later columns would read it
    rows, weight = all_rows()
    density = np.exp(np.asarray(jax.jit(model.log_prob)(params, rows), np.float64)) * weight
    expected = np.array(
        [
            density[(rows.code[:, 0] == a) & (rows.code[:, 2] == c)].sum()
            for a in range(3)
            for c in range(3)
        ]
    )
    pairs = 3 * np.asarray(drawn.code)[:, 0] + np.asarray(drawn.code)[:, 2]
    counts = np.bincount(pairs, minlength=9)
    assert stats.chisquare(counts, n * expected / expected.sum()).pvalue > 1e-4
    for codes in ((0, 1, 2), (0, 1)):  # of the last column
        here = np.isin(rows.code[:, 2], codes)
        y, cell = np.unique(rows.value[here, 1], return_inverse=True)
        mass = np.bincount(cell, density[here])
        below = np.cumsum(mass) - mass / 2  # a cell's mass lies on both sides of its point
        value = np.asarray(drawn.value)[np.isin(np.asarray(drawn.code)[:, 2], codes), 1]
        distribution = np.interp(value, y, below / mass.sum())
        assert stats.kstest(distribution, "uniform").pvalue > 1e-4


def test_observed_cells_stay_and_ranges_are_met(model, params):
    n = 64
    codes = np.ones((3, 3), bool)
    codes[2, 0] = False
    within = Within(
        codes, np.array([0, -0.5, -1.0], np.float32), np.array([0, 0.5, 2.0], np.float32)
    )
    rows = MixedRows(np.full((n, 3), 1, np.int32), np.zeros((n, 3), np.float32))
    observed = np.zeros((n, 3), bool)
    observed[:, 0] = True
    drawn, log_mass = jax.jit(model.sample)(
        params, jax.random.key(3), rows, observed, within, np.array([0, 2, 1])
    )
    code, value = np.asarray(drawn.code), np.asarray(drawn.value)
    assert (code[:, 0] == 1).all() and (np.abs(value[:, 1]) <= 0.5).all()
    assert set(code[:, 2]) <= {1, 2} and (code[:, 2] == 2).any()
    there = value[code[:, 2] == 2, 2]
    assert (there >= -1.0).all() and (there <= 2.0).all()
    # The third column comes second, and is restricted given the observed one alone.
    grid = GRID[(GRID >= -1.0) & (GRID <= 2.0)]
    points = MixedRows(
        np.stack(
            [np.ones(len(grid) + 1), np.zeros(len(grid) + 1), np.r_[1, np.full(len(grid), 2)]], 1
        ).astype(np.int32),
        np.stack([np.zeros(len(grid) + 1), np.zeros(len(grid) + 1), np.r_[0, grid]], 1).astype(
            np.float32
        ),
    )
    rank = np.tile([0, 1, 1], (len(grid) + 1, 1))  # given the first column alone
    density = np.exp(np.asarray(model.conditionals(params, points, rank))[:, 2])
    mass = density[0] + np.trapezoid(density[1:], grid)
    np.testing.assert_allclose(np.exp(np.asarray(log_mass)[:, 2]), mass, rtol=2e-3)
    of_first = model.conditionals(params, rows, np.tile([0, 2, 1], (n, 1)))[:, 0]
    np.testing.assert_allclose(np.asarray(log_mass)[:, 0], of_first, rtol=1e-5)


def test_weights_of_held_and_restricted_columns_lead_to_the_density(model, params):
    """Columns held and restricted in the order of the density: the mean of the weights is the
    density's integral over the condition, and the weighted share of a code its share there, within
    4.5 standard errors."""
    rows, cell = all_rows()
    density = np.exp(np.asarray(jax.jit(model.log_prob)(params, rows), np.float64)) * cell
    held, n, codes = GRID[176], 20_000, np.ones((3, 3), bool)
    codes[2, 0] = False
    meets = (rows.value[:, 1] == held) & (rows.code[:, 2] != 0)
    density = np.where(meets, density, 0.0) / (4 * (GRID[1] - GRID[0]))
    within = Within(codes, np.full(3, -np.inf, np.float32), np.full(3, np.inf, np.float32))
    start = MixedRows(np.zeros((n, 3), np.int32), np.tile([0, held, 0], (n, 1)))
    observed = np.tile([False, True, False], (n, 1))
    drawn, log_mass = jax.jit(model.sample)(
        params, jax.random.key(4), start, observed, within, model.rank
    )
    weight = np.exp(np.asarray(log_mass, np.float64)[:, 1:].sum(1))
    assert abs(weight.mean() - density.sum()) < 4.5 * weight.std() / np.sqrt(n)
    share = density[rows.code[:, 0] == 1].sum() / density.sum()
    off = weight * ((np.asarray(drawn.code)[:, 0] == 1) - share)
    assert abs(off.mean()) < 4.5 * off.std() / np.sqrt(n)


def test_a_column_sees_those_of_lower_rank_alone(model, params):
    """Its conditional changes with each of them, and with no other."""
    rng = np.random.default_rng(0)
    row = MixedRows(np.array([[2, 0, 2]], np.int32), np.array([[0.0, 0.4, -1.0]], np.float32))
    other = MixedRows(np.array([[1, 0, 1]], np.int32), np.array([[0.0, -0.8, 0.0]], np.float32))
    for _ in range(6):
        rank = np.argsort(rng.random((1, 3)))
        before = np.asarray(model.conditionals(params, row, rank))[0]
        for j in range(3):
            here = np.arange(3) == j
            changed = MixedRows(*(np.where(here, b, a) for a, b in zip(row, other, strict=True)))
            after = np.asarray(model.conditionals(params, changed, rank))[0]
            moved = before != after
            np.testing.assert_array_equal(moved[~here], (rank[0] > rank[0, j])[~here])


def test_the_loss_is_the_mean_over_orders(model, params):
    """All orders written out; the mean of many rows within 5 standard errors."""
    row = MixedRows(np.array([[2, 0, 2]], np.int32), np.array([[0.0, 0.4, -1.0]], np.float32))
    orders = np.array(list(itertools.permutations(range(3))))
    six = MixedRows(np.repeat(row.code, 6, 0), np.repeat(row.value, 6, 0))
    nll = -np.asarray(model.conditionals(params, six, orders)).sum(1)
    fixed = [i for i, rank in enumerate(orders) if (rank == model.rank).all()]
    assert model.rank.tolist() == [1, 2, 0]
    n = 20_000
    batch = {"code": np.repeat(row.code, n, 0), "x": np.repeat(row.value, n, 0)}
    for random, expected in ((1.0, nll.mean()), (0.0, nll[fixed].mean())):
        loss = losses.any_order_nll(model, random)
        found = float(jax.jit(loss)(params, jax.random.key(4), batch)[0])
        assert abs(found - expected) < 5 * nll.std() / np.sqrt(n)
    density = np.exp(np.asarray(model.log_prob(params, row)))[0]
    assert density == pytest.approx(np.exp(-nll[fixed]).mean(), rel=1e-4)


def test_the_number_beside_a_code_is_not_read(model, params):
    rows = MixedRows(
        np.array([[0, 0, 1]] * 2, np.int32), np.array([[0, 1, 5], [3, 1, np.nan]], np.float32)
    )
    nats = np.asarray(model.log_prob(params, rows))
    assert np.isfinite(nats).all() and nats[0] == nats[1]
    loss = losses.any_order_nll(model)
    gradient = jax.grad(
        lambda p: loss(p, jax.random.key(0), {"code": rows.code, "x": rows.value})[0]
    )(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("codes", "numbers", "message"),
    [
        ((), (), "same length, at least 1, got 0 and 0"),
        ((1, 2), (True,), "same length"),
        ((1, 0), (True, False), "column 1 has neither codes nor numbers"),
    ],
)
def test_columns_that_are_none(codes, numbers, message):
    with pytest.raises(ValueError, match=message):
        flows.any_order(codes, numbers)


def test_an_order_is_a_permutation():
    with pytest.raises(ValueError, match=r"permutation of 0 to 2, got \[0, 1, 1\]"):
        flows.any_order(CODES, NUMBERS, order=(0, 1, 1))


def test_rows_of_another_shape(model, params):
    with pytest.raises(ValueError, match=r"any_order: expected MixedRows of shape \[b, 3\]"):
        model.log_prob(params, MixedRows(np.zeros((1, 2), np.int32), np.zeros((1, 2))))
    with pytest.raises(ValueError, match="expected 'code' of the shape of 'x'"):
        losses.any_order_nll(model)(params, jax.random.key(0), {"x": jnp.zeros((2, 3))})
    with pytest.raises(ValueError, match="expected random from 0 to 1, got 2"):
        losses.any_order_nll(model, 2)
