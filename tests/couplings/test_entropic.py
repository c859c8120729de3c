"""Entropic plans against POT's, and what is drawn from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import couplings
from jflow.couplings import _plans

ot = pytest.importorskip("ot")
N = 24


def costs(n=N, seed=0, d=2):
    k0, k1 = jax.random.split(jax.random.key(seed))
    return couplings.squared_euclidean(
        jax.random.normal(k0, (n, d)), 1 + 0.5 * jax.random.normal(k1, (n, d))
    )


def captured(coupling, cost):
    """The plan that a coupling draws from, as it hands it to `draw`."""
    seen = {}

    def draw(key, log_plan):
        seen["plan"] = np.exp(np.asarray(log_plan, np.float64))
        return jnp.arange(N), jnp.arange(N)

    x = jnp.zeros((N, 1), cost.dtype)
    coupling(draw=draw, cost=lambda x0, x1, cond: cost)(jax.random.key(0), x, x)
    return seen["plan"]


@pytest.mark.parametrize("epsilon", [0.2, 1.0])
def test_plan_is_pots(epsilon, x64):
    cost = costs().astype(jnp.float64)
    plan = captured(
        lambda **o: couplings.sinkhorn(epsilon, relative=False, iterations=2000, **o), cost
    )
    uniform = np.full(N, 1 / N)
    expected = ot.sinkhorn(
        uniform,
        uniform,
        np.asarray(cost),
        epsilon,
        method="sinkhorn_log",
        stopThr=1e-12,
        numItermax=5000,
    )
    np.testing.assert_allclose(plan / N, expected, atol=1e-8 / N)
    unit = float(_plans.scale(cost))
    relative = captured(lambda **o: couplings.sinkhorn(epsilon / unit, iterations=2000, **o), cost)
    np.testing.assert_allclose(relative, plan, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("epsilon", "slack"), [(0.1, 1.0), (0.5, 0.3)])
def test_unbalanced_plan_is_pots(epsilon, slack, x64):
    cost = costs().astype(jnp.float64)
    plan = captured(
        lambda **o: couplings.unbalanced(epsilon, slack, relative=False, iterations=2000, **o), cost
    )
    uniform = np.full(N, 1 / N)
    expected = ot.unbalanced.sinkhorn_unbalanced(
        uniform,
        uniform,
        np.asarray(cost),
        epsilon,
        slack,
        reg_type="kl",
        stopThr=1e-13,
        numItermax=5000,
    )
    np.testing.assert_allclose(plan / N**2, expected, rtol=1e-6, atol=1e-14)


def test_small_epsilon_neither_overflows_nor_loses_its_marginals():
    """1e-4 of the mean cost: exp(-cost / epsilon) itself is 0 in float32. Rows are exact to
    rounding."""
    cost = costs(64, d=8)
    f, g = jax.jit(_plans.entropic_potentials)(cost, 1e-4 * jnp.mean(cost), _plans.scale(cost))
    plan = np.exp(
        (np.asarray(f)[:, None] + np.asarray(g)[None] - np.asarray(cost))
        / (1e-4 * float(jnp.mean(cost)))
    )
    # 1e-4 of relative epsilon turns float32's 1e-7 of a cost into 1e-3 of an entry
    np.testing.assert_allclose(plan.sum(1), 1, atol=2e-2)
    assert np.isfinite(plan).all()


def test_forbidden_pairs_have_no_mass():
    cost = jnp.where(
        jnp.equal(jnp.arange(N)[:, None] % 3, jnp.arange(N)[None] % 3), costs(), jnp.inf
    )
    plan = captured(lambda **o: couplings.sinkhorn(0.1, **o), cost)
    assert np.isfinite(plan).all() and plan[~np.isfinite(cost)].max() == 0
    np.testing.assert_allclose(plan.sum(0), 1, atol=1e-3)


def test_costs_along_epsilon():
    """A permutation costs no less than the optimum, and at most a few per cent more than the plan
    it leans to."""
    k0, k1 = jax.random.split(jax.random.key(0))
    angle = jax.random.randint(k0, (256,), 0, 8) * jnp.pi / 4
    x0 = 5 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1) + 0.3 * jax.random.normal(k0, (256, 2))
    x1 = jax.random.normal(k1, (256, 2))
    cost = np.asarray(couplings.squared_euclidean(x0, x1))

    def mean(coupling):
        i, j = jax.jit(coupling)(jax.random.key(1), x0, x1)
        return cost[np.asarray(i), np.asarray(j)].mean()

    best = mean(couplings.optimal_transport())
    for epsilon in (0.01, 0.05):
        size = epsilon * cost.mean()
        f, g = (
            np.asarray(a)
            for a in jax.jit(_plans.entropic_potentials)(
                jnp.asarray(cost), size, _plans.scale(jnp.asarray(cost))
            )
        )
        plan = np.exp((f[:, None] + g[None] - cost) / size)
        expected = (plan * cost).sum() / plan.sum()
        assert best < mean(couplings.sinkhorn(epsilon)) < 1.08 * expected
        assert mean(
            couplings.sinkhorn(epsilon, draw=couplings.sample_with_replacement)
        ) == pytest.approx(expected, rel=0.1)
        assert (
            best
            <= mean(couplings.sinkhorn(epsilon, draw=couplings.most_likely_permutation))
            < 1.05 * best
        )
    assert (
        mean(couplings.sinkhorn(50.0)) > 0.9 * cost.mean()
    )  # the independent pairs are the other end


def test_draws_with_replacement_follow_the_plan():
    """Counts over 4000 batches of 3 pairs: 4 standard errors of a frequency."""
    plan = np.asarray([[0.3, 0.1, 0.0], [0.05, 0.2, 0.05], [0.0, 0.1, 0.2]])
    keys = jax.random.split(jax.random.key(0), 4000)
    i, j = jax.jit(jax.vmap(lambda k: couplings.sample_with_replacement(k, jnp.log(3.0 * plan))))(
        keys
    )
    seen = np.bincount(3 * np.ravel(i) + np.ravel(j), minlength=9).reshape(3, 3) / i.size
    assert np.all(np.abs(seen - plan) <= 4 * np.sqrt(plan / i.size))


def test_permutations_of_a_plan_of_two():
    """Of two rows there are two permutations, and the plan [[p, 1-p], [1-p, p]] says how likely
    each is. Greedy on Gumbel noise takes the diagonal when the best of the four is on it: the two
    pairs' maxima compare as p to 1 - p."""
    plan = jnp.asarray([[0.8, 0.2], [0.2, 0.8]])
    keys = jax.random.split(jax.random.key(0), 4000)
    i, j = jax.jit(
        jax.vmap(lambda k: tuple(map(jnp.asarray, couplings.sample_permutation(k, jnp.log(plan)))))
    )(keys)
    np.testing.assert_allclose(np.mean(i[:, 0] == j[:, 0]), 0.8, atol=4 * np.sqrt(0.16 / 4000))
