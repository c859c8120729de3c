import numpy as np
import pytest
from scipy import stats

from jflow import metrics


def gaussian_problem(n, num_draws, narrow=1.0, correlation=0.0, seed=0):
    """theta ~ N(0, I) in two dimensions, x = theta + N(0, I): the posterior is N(x / 2, I / 2).

    Its draws, with the standard deviation times `narrow` and a correlation that is not there.
    """
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=(n, 2))
    x = theta + rng.normal(size=(n, 2))
    factor = np.linalg.cholesky([[1, correlation], [correlation, 1]])
    noise = rng.normal(size=(n, num_draws, 2)) @ factor.T
    return theta, x[:, None] / 2 + narrow * np.sqrt(0.5) * noise


def test_an_exact_posterior_is_rejected_as_often_as_the_false_alarm_rate_says():
    """1000 problems of 50 truths at a rate of 0.1. The count is binomial: it is above the bound in
    1 case of 10,000. Ties of a discrete statistic make rejections rarer, here by less than a fifth.
    """
    p = []
    for seed in range(1000):
        theta, draws = gaussian_problem(50, 19, seed=seed)
        one = metrics.sbc_ranks(theta, draws)[:, 0]
        ranks = one if seed % 2 else metrics.tarp_ranks(theta, draws)
        p.append(metrics.uniformity_test(ranks, 19, permutations=199)[1])
    rejected = (np.array(p) <= 0.1).sum()
    assert rejected <= stats.binom.ppf(1 - 1e-4, 1000, 0.1)
    assert rejected >= stats.binom.ppf(1e-4, 1000, 0.08)


@pytest.mark.parametrize("narrow", [0.7, 1.5])
def test_a_wrong_width_is_seen_by_ranks_and_coverage(narrow):
    theta, draws = gaussian_problem(300, 99, narrow)
    ranks = metrics.sbc_ranks(theta, draws)
    assert metrics.uniformity_test(ranks[:, 0], 99)[1] <= 0.001
    assert metrics.uniformity_test(metrics.tarp_ranks(theta, draws), 99)[1] <= 0.001
    away = np.abs(theta - draws.mean(1)).sum(1)
    of_draws = np.abs(draws - draws.mean(1, keepdims=True)).sum(2)
    inside = (of_draws < away[:, None]).sum(1)  # ranks from the center outward
    coverage = metrics.expected_coverage(inside, 99, [0.5])[0]
    assert coverage < 0.45 if narrow < 1 else coverage > 0.6


def test_tarp_sees_a_correlation_that_the_ranks_of_single_parameters_miss():
    theta, draws = gaussian_problem(1000, 99, correlation=0.95)
    ranks = metrics.sbc_ranks(theta, draws)
    single = [metrics.uniformity_test(ranks[:, j], 99)[1] for j in range(2)]
    assert min(single) > 0.01
    assert metrics.uniformity_test(metrics.tarp_ranks(theta, draws), 99)[1] <= 0.001


def test_the_coverage_of_uniform_ranks_is_the_level():
    levels = np.linspace(0, 1, 11)
    covered = metrics.expected_coverage(np.repeat(np.arange(100), 3), 99, levels)
    np.testing.assert_allclose(covered, levels, atol=0.005 + 1e-12)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"theta \[n, d\] and draws \[n, L, d\], got \[3\]"):
        metrics.sbc_ranks(np.zeros(3), np.zeros((3, 4, 1)))
    with pytest.raises(ValueError, match="NaN"):
        metrics.tarp_ranks(np.zeros((2, 1)), np.full((2, 3, 1), np.nan))
    with pytest.raises(ValueError, match=r"references of the shape \[2, 1\]"):
        metrics.tarp_ranks(np.zeros((2, 1)), np.zeros((2, 3, 1)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="from 0 to num_draws=4"):
        metrics.uniformity_test(np.array([0, 5]), 4)
    with pytest.raises(ValueError, match="2 to 5 bins"):
        metrics.uniformity_test(np.array([0, 4]), 4)
    with pytest.raises(ValueError, match=r"levels \[k\] in \[0, 1\]"):
        metrics.expected_coverage(np.array([0]), 4, [1.5])


def test_a_classifier_tells_apart_what_differs_and_nothing_else():
    """One distribution: 400 labels guessed have an accuracy of 0.5 +- 0.025, and the bound at four
    of these is passed in about 1 case of 10,000. A shift by 2: at best Phi(1) = 0.841 +- 0.018. A
    shift by 100 is told without error."""
    pytest.importorskip("sklearn")
    x, y, z = np.random.default_rng(0).normal(size=(3, 200, 1))
    assert abs(metrics.c2st(x, y, folds=2, max_iter=30) - 0.5) < 0.1
    assert abs(metrics.c2st(x, z + 2, folds=2) - 0.841) < 0.06
    assert metrics.c2st(x, z + 100, folds=2) == 1
    with pytest.raises(ValueError, match="equally many rows"):
        metrics.c2st(x, y[:50])
