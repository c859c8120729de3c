"""Local search against its transition matrix, enumerated by an independent program."""

import itertools

import jax
import numpy as np
import pytest
import scipy.stats
from keys import KEYS, keys_consumed_twice

from jflow import gflownets

N = 3_000
GRID = gflownets.hypergrid(2, 3)  # objects of different lengths, the first one two steps away
POLICY = gflownets.mlp_policy(GRID, (8,))
STATES = gflownets.enumerate_states(GRID)
TERMINAL, CHILD = STATES.terminal, STATES.child


def random_params():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(POLICY.init, KEYS[0])
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


PARAMS = random_params()


def enumerated(accept, least, back):
    """[K, K]: the probability to go from each object to each other in one round, by all ways back
    and forth. backward[s] = [(parent, action, probability)]."""
    said = jax.device_get(jax.jit(POLICY.apply)(PARAMS, STATES.states))
    forward = np.exp(said.log_forward.astype(np.float64))
    backward = {s: [] for s in range(len(CHILD))}
    for parent, action in itertools.product(range(len(CHILD)), range(CHILD.shape[1])):
        child = CHILD[parent, action]
        if child >= 0:  # in this grid the backward action has the number of the action
            p = np.exp(np.float64(said.log_backward[child, action]))
            backward[child].append((parent, action, p))

    def ways_back(s, steps):
        """[(state, steps, P_B, P_F of the way up)]"""
        if steps == 0 or not backward[s]:
            return [(s, 0, 1.0, 1.0)]
        return [
            (end, n + 1, p * below, up * forward[parent, action])
            for parent, action, p in backward[s]
            for end, n, below, up in ways_back(parent, steps - 1)
        ]

    def law(s, n):
        """Of the lengths that are drawn, the share with which n steps lead to s."""
        drawn = range(least, back + 1)
        return np.mean([k >= n if not backward[s] else k == n for k in drawn])

    reward = dict(zip(TERMINAL.tolist(), np.exp(STATES.log_reward.astype(np.float64)), strict=True))
    number = {s: i for i, s in enumerate(TERMINAL.tolist())}
    matrix = np.zeros((len(number), len(number)))
    ways = {(x, n): ways_back(x, n) for x in number for n in range(1, back + 1)}
    exact = {(x, n): [way for way in ways[x, n] if way[1] == n] for x, n in ways}
    for x, other in itertools.product(number, number):
        for n, m in itertools.product(range(1, back + 1), range(1, back + 1)):
            for s, _, down, up in exact[x, n]:
                for end, _, other_down, other_up in exact[other, m]:
                    if end == s and law(s, n) > 0:
                        ratio = reward[other] * other_down * up * law(s, m)
                        ratio /= reward[x] * down * other_up * law(s, n)
                        chance = accept(ratio, reward[other] > reward[x])
                        matrix[number[x], number[other]] += down * law(s, n) * other_up * chance
    return matrix + np.diag(1 - matrix.sum(1))


RULES = {
    "metropolis": (gflownets.accept_metropolis, lambda ratio, better: min(1, ratio)),
    "barker": (gflownets.accept_barker, lambda ratio, better: ratio / (1 + ratio)),
    "improvement": (
        gflownets.accept_improvement,
        lambda ratio, better: float(better and ratio > 0),
    ),
}


@pytest.mark.parametrize("lengths", [(2, 2), (1, 3)])
@pytest.mark.parametrize("name", RULES)
def test_one_round_is_the_enumerated_chain_which_keeps_the_reward(name, lengths):
    """Chi-square of 3,000 rounds from each of 9 objects, false alarm 1 in 1000. The chain is
    reversible, to the rounding of float32 in the policy; a climb is not."""
    accept, rule = RULES[name]
    (least, back), count = lengths, len(TERMINAL)
    matrix = enumerated(rule, least, back)
    target = np.exp(STATES.log_reward.astype(np.float64))
    flow = target[:, None] / target.sum() * matrix
    assert np.allclose(flow, flow.T, atol=1e-7) == (name != "improvement")

    rows = np.repeat(np.arange(count), N)
    start = jax.tree.map(lambda s: s[rows], STATES.terminals)
    found = jax.device_get(
        jax.jit(
            lambda key, start: gflownets.local_search(
                GRID, POLICY, PARAMS, key, start, back=back, least=least, accept=accept
            )
        )(KEYS[0], start)
    )
    at = {tuple(p): i for i, p in enumerate(STATES.terminals["position"].tolist())}
    ends = np.array([at[tuple(p)] for p in found.terminal["position"].tolist()])
    assert np.all(found.terminal["stopped"])
    np.testing.assert_array_equal(found.log_reward, STATES.log_reward[ends])
    assert np.all(found.accepted[0] | (ends == rows))
    seen = np.zeros_like(matrix)
    np.add.at(seen, (rows, ends), 1)
    assert not np.any(seen[matrix < 1e-12])
    likely = matrix * N > 5
    chi2 = np.sum((seen[likely] - N * matrix[likely]) ** 2 / (N * matrix[likely]))
    assert chi2 < scipy.stats.chi2.isf(1e-3, likely.sum() - count)


def test_rollouts_end_in_what_was_found_and_keys_are_consumed_once():
    """A climb over many rounds ends in the best objects."""
    state = type("State", (), {"params": PARAMS})
    climb = gflownets.local_search_rollouts(
        GRID, POLICY, 64, back=4, least=1, rounds=20, accept=gflownets.accept_improvement
    )
    plain = gflownets.rollout(GRID, POLICY, PARAMS, KEYS[0], 64)
    batch = climb(state, KEYS[1])
    best = STATES.log_reward.max()
    assert np.all(batch["log_reward"] == best) and not np.all(plain.log_reward == best)
    assert batch["valid"].shape == (64, GRID.horizon)
    assert not keys_consumed_twice(lambda key: climb(state, key), KEYS[2])


def test_bad_options_are_errors():
    with pytest.raises(ValueError, match="expected back"):
        gflownets.local_search(GRID, POLICY, PARAMS, KEYS[0], STATES.terminals, back=0)
    with pytest.raises(ValueError, match=r"expected least in 1 ... 2, got 3"):
        gflownets.local_search(GRID, POLICY, PARAMS, KEYS[0], STATES.terminals, back=2, least=3)
    with pytest.raises(ValueError, match="expected rounds"):
        gflownets.local_search_rollouts(GRID, POLICY, 4, back=1, rounds=0)
