"""Environments state by state, rollouts against them, and distributions without sampling."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import gflownets

KEY = jax.random.key(0)
TABLE = np.random.default_rng(0).uniform(0.2, 2.0, (2, 2, 2))
CYCLE = np.roll(np.eye(5), 1, axis=1) + np.roll(np.eye(5), -1, axis=1)
ALIGNMENT = ["AACG", "AAGG", "TTGC", "T-GA"]
ENVIRONMENTS = {
    "hypergrid": gflownets.hypergrid(2, 3),
    "sequences": gflownets.sequences(gflownets.reward_table(TABLE), 3, 2),
    "two_ended_sequences": gflownets.two_ended_sequences(gflownets.reward_table(TABLE), 3, 2),
    "any_order_sequences": gflownets.any_order_sequences(gflownets.reward_table(TABLE), 3, 2),
    "bit_sequences": gflownets.bit_sequences([[0, 1, 1, 0], [1, 1, 1, 1]], 2),
    "independent_sets": gflownets.independent_sets(CYCLE),
    "phylogenies": gflownets.phylogenies(ALIGNMENT, temperature=4.0),
}
SIZES = {  # states and objects
    "hypergrid": (18, 9),
    "sequences": (1 + 2 + 4 + 8, 8),
    "two_ended_sequences": (1 + 2 + 4 + 8, 8),
    "any_order_sequences": (27, 8),
    "bit_sequences": (25, 16),
    "independent_sets": (1 + 5 + 5, 5),
    "phylogenies": (1 + 6 + 3 + 12 + 15, 15),
}


def numpy_distribution(states, p):
    """By all paths, one after the other; p [N, A] are the probabilities of the actions."""
    ends = dict.fromkeys(states.terminal.tolist(), 0.0)

    def walk(state, weight):
        if state in ends:
            ends[state] += weight
            return
        for action in np.flatnonzero(states.child[state] >= 0):
            walk(states.child[state, action], weight * p[state, action])

    walk(0, 1.0)
    return np.array([ends[state] for state in states.terminal.tolist()])


@pytest.mark.filterwarnings("error")
def test_states_keep_their_types_under_64_bits(x64):
    """Actions of 64 bits on states of 32, which JAX warns of where they meet in a scatter."""
    for name, environment in ENVIRONMENTS.items():
        if name == "phylogenies":  # its index arrays of 64 bits stay in a cache of JAX
            continue
        state = environment.reset(2)
        action = jax.ShapeDtypeStruct((2,), jnp.int64)
        for move in (environment.step, environment.back):
            assert jax.eval_shape(move, state, action) == jax.eval_shape(lambda s: s, state), name


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_environment_keeps_its_promises_and_rollouts_follow_the_policy(name):
    """Counts are known; the exact distribution is that of all paths in numpy; the frequencies of
    rollouts agree with it by a chi-squared statistic within 6 standard deviations of its mean
    (false alarm below 1e-5, with at most 16 cells); backward rollouts end where they shall."""
    environment, n = ENVIRONMENTS[name], 2000
    states = gflownets.check(environment)
    assert (len(states.child), len(states.terminal)) == SIZES[name]
    policy = gflownets.mlp_policy(environment, (4,))
    draw = np.random.default_rng(1).normal
    params = jax.tree.map(lambda a: np.float32(a + draw(scale=0.5, size=a.shape)), policy.init(KEY))

    @jax.jit
    def run(params):
        keys = jax.random.split(KEY, 3)
        made = gflownets.rollout(environment, policy, params, keys[0], n)
        back = gflownets.backward_rollout(environment, policy, params, keys[1], made.terminal)
        stepped = [replayed(environment, rows) for rows in (made, back)]
        p = jnp.exp(policy.apply(params, states.states).log_forward)
        q = jnp.exp(policy.apply(params, states.states).log_backward)
        ends = states.terminals
        estimate = gflownets.log_prob(environment, policy, params, keys[2], ends, draws=300)
        exact = gflownets.exact_distribution(policy, params, states)
        return made, back, stepped, p, q, estimate, exact

    made, back, stepped, p, q, estimate, exact = jax.device_get(run(params))
    assert all(jax.tree.leaves(jax.tree.map(np.all, stepped)))
    np.testing.assert_allclose(p.sum(1), np.any(states.child >= 0, axis=1), atol=1e-6)
    np.testing.assert_allclose(q.sum(1), np.arange(len(q)) > 0, atol=1e-6)
    # float32 sums of a few products
    np.testing.assert_allclose(exact, numpy_distribution(states, p), atol=1e-6)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)  # noqa: E731
    same(made.terminal, back.terminal)
    same(made.log_reward, back.log_reward)
    np.testing.assert_allclose(
        made.log_reward, environment.log_reward(made.terminal), rtol=1e-6, atol=1e-7
    )
    equal = [
        np.reshape(a[:, None] == b[None], (n, len(b), -1)).all(-1)
        for a, b in zip(*map(jax.tree.leaves, (made.terminal, states.terminals)), strict=True)
    ]
    counts = np.all(equal, axis=0).sum(0)
    freedom = len(counts) - 1
    assert counts.sum() == n
    assert ((counts - n * exact) ** 2 / (n * exact)).sum() < freedom + 6 * np.sqrt(2 * freedom)
    # 300 draws of a ratio whose standard deviation is below its mean: 0.3 is 5 of theirs
    np.testing.assert_allclose(estimate, np.log(exact), atol=0.3)


def replayed(environment, made):
    """Whether the steps lead from state to state, from the first to a terminal one."""
    before = jax.tree.map(lambda s: s[:, :-1], made.states)
    after = jax.tree.map(lambda s: s[:, 1:], made.states)
    flat = lambda tree: jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree)  # noqa: E731
    before, after, valid = flat(before), flat(after), made.valid.reshape(-1)
    action, undo = made.action.reshape(-1), made.backward_action.reshape(-1)
    is_equal = lambda a, b: (a == b).reshape(len(valid), -1).all(1)  # noqa: E731
    stepped = jax.tree.map(is_equal, environment.step(before, action), after)
    undone = jax.tree.map(is_equal, environment.back(after, undo), before)
    repeated = jax.tree.map(is_equal, before, after)
    initial = jax.tree.map(
        lambda s, first: jnp.all(s[:, 0] == jnp.broadcast_to(first, s[:, 0].shape)),
        made.states,
        environment.reset(1),
    )
    return [
        jax.tree.map(lambda a: a | ~valid, (stepped, undone)),
        jax.tree.map(lambda a: a | valid, repeated),
        jnp.take_along_axis(environment.forward_mask(before), action[:, None], 1)[:, 0] | ~valid,
        ~jnp.any(environment.forward_mask(made.terminal), axis=1),
        initial,
        made.valid[:, :-1] | ~made.valid[:, 1:],
    ]


def test_the_network_is_asked_in_the_rows_that_go_on():
    """64 rows, or 16 where no more go on. Each has its own condition, and its actions are those
    that the same keys draw where the network is asked in all rows."""
    environment, n = gflownets.hypergrid(2, 6), 64
    policy = gflownets.mlp_policy(environment, (4,))
    rng, asked = np.random.default_rng(0), []
    cond = rng.normal(size=(n, 1)).astype(np.float32)
    params = jax.tree.map(
        lambda a: rng.normal(size=a.shape).astype(np.float32),
        jax.eval_shape(policy.init, KEY, cond[:1]),
    )

    def apply(params, state, cond=None, *, key=None):
        asked.append(len(cond))
        return policy.apply(params, state, cond)

    @jax.jit
    def run(params, cond):
        watched = gflownets.Policy(policy.init, apply)
        made = gflownets.rollout(environment, watched, params, KEY, n, cond)
        said = jax.vmap(policy.apply, (None, 1, None), 1)(params, made.states, cond)
        keys = jax.random.split(KEY, environment.horizon)
        drawn = jax.vmap(jax.random.categorical, (0, 1), 1)(keys, said.log_forward[:, :-1])
        return made, drawn

    made, drawn = jax.device_get(run(params, cond))
    left = made.valid.sum(0)
    assert sorted(asked) == [16, 64] and 0 < np.sum((0 < left) & (left <= 16)) < 11
    np.testing.assert_array_equal(made.action, np.where(made.valid, drawn, 0))


def test_what_a_policy_says_of_trajectories_is_asked_in_the_states_that_exist():
    """1536 places in three chunks, of which as many are asked as there are states. Terms and
    gradients are those of a network that is asked everywhere."""
    environment, n, asked = gflownets.hypergrid(2, 6), 128, []
    policy = gflownets.mlp_policy(environment, (4,))
    rng = np.random.default_rng(0)
    cond = rng.normal(size=(n, 1)).astype(np.float32)
    shapes = jax.eval_shape(policy.init, KEY, cond[:1])
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)
    weights = rng.normal(size=(n, environment.horizon + 1, 7)).astype(np.float32)

    def watched(params, state, cond=None, *, key=None):
        jax.debug.callback(lambda: asked.append(len(cond)))
        return policy.apply(params, state, cond)

    def everywhere(params, made, cond):
        return jax.vmap(policy.apply, (None, 1, None), 1)(params, made.states, cond)

    def chunks(params, made, cond):
        watching = gflownets.Policy(policy.init, watched)
        return gflownets.evaluate(watching, params, made, cond, key=KEY).output

    def value(params, said, made, cond):
        output = said(params, made, cond)
        each = jnp.concatenate([*output[:2], output.log_flow[..., None]], axis=-1)
        return jnp.sum(jnp.where(jnp.isfinite(each), each, 0) * weights), output

    @jax.jit
    def run(params, cond):
        made = gflownets.rollout(environment, policy, params, KEY, n, cond, epsilon=1.0)
        both = [
            jax.value_and_grad(value, has_aux=True)(params, said, made, cond)
            for said in (chunks, everywhere)
        ]
        return made, both

    made, (ours, plain) = jax.device_get(run(params, cond))
    jax.effects_barrier()
    states = made.valid.sum() + n
    assert 0 < states <= 1024 and asked == 2 * -(-states // 512) * [512]  # and in the gradient
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-4), ours, plain)


def test_exploration_is_a_mixture_with_uniform_actions_and_temperature_a_power():
    """First actions of a policy with odds 4 to 1 to 1, frequencies within 5 standard deviations."""
    environment, n = gflownets.hypergrid(2, 3), 4000
    policy = gflownets.mlp_policy(environment, (4,))
    params = jax.device_get(policy.init(KEY))
    params["net"]["Dense_0"]["bias"] = np.log([4.0, 1, 1, 1, 1, 1, 1]).astype(np.float32)

    @jax.jit
    def run(key, epsilon, temperature):
        draws = gflownets.rollout(
            environment, policy, params, key, n, epsilon=epsilon, temperature=temperature
        )
        return jnp.bincount(draws.action[:, 0], length=3)

    for epsilon, temperature, first in (
        (0.0, 1.0, 4 / 6),
        (1.0, 1.0, 1 / 3),
        (0.5, 1.0, 1 / 2),
        (0.0, 0.5, 16 / 18),
    ):
        counts = jax.device_get(run(KEY, epsilon, temperature))
        expected = n * np.array([first, (1 - first) / 2, (1 - first) / 2])
        assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected))


def test_rewards_of_the_papers():
    """8 x 8 x 8: 512 objects of 0.1, 64 in the corners with 0.5 more and 8 modes with 2 more. Bits:
    the distance to the nearest mode, and no difference where there is no bit yet. Sets: those of a
    cycle of 5 have 2 vertices; 3 triangles have 27 (Moon and Moser's bound, attained)."""
    positions = np.array(list(itertools.product(range(8), repeat=3)))
    reward = np.exp(gflownets.hypergrid_log_reward(8)(jnp.asarray(positions)))
    np.testing.assert_allclose(reward.sum(), 512 * 0.1 + 64 * 0.5 + 8 * 2.0, rtol=1e-6)
    u = np.abs(positions / 7 - 0.5)
    modes = ((u > 0.3) & (u < 0.4)).all(1)
    np.testing.assert_allclose(reward[modes], 2.6, rtol=1e-6)

    bits = gflownets.bit_sequences([[0, 1, 1, 0], [1, 1, 1, 1]], 2, sharpness=2.0)
    words = jnp.array([[0b01, 0b10], [0b11, 0b10], [0b00, -1], [-1, -1]])
    assert bits.log_reward(words).tolist() == [0.0, -2.0, -2.0, 0.0]
    blocks = gflownets.bit_modes(7, 24, seed=1).reshape(-1, 8)
    assert {"".join(map(str, block)) for block in blocks} <= {
        "00000000",
        "11111111",
        "11110000",
        "00001111",
        "00111100",
    }
    triangles = gflownets.independent_sets(np.kron(np.eye(3), 1 - np.eye(3)), temperature=0.5)
    found = gflownets.enumerate_states(triangles)
    assert len(found.terminal) == 27 and set(found.log_reward.tolist()) == {6.0}
    uniform = gflownets.reward_distribution(found)
    np.testing.assert_allclose(uniform, 1 / 27, rtol=1e-6)
    assert gflownets.total_variation([0.5, 0.5, 0.0], [0.0, 0.5, 0.5]) == 0.5
    finished = gflownets.reward_table(TABLE)(jnp.array([[0, 1, 0], [0, 1, -1]]))
    np.testing.assert_allclose(finished, [np.log(TABLE[0, 1, 0]), np.nan], rtol=1e-6)


def test_parsimony_is_the_least_number_of_mutations():
    """Over all letters at the nodes and at the unknown leaf, column by column."""
    trees = gflownets.enumerate_states(ENVIRONMENTS["phylogenies"])
    for below, log_reward in zip(trees.terminals, trees.log_reward, strict=True):
        nodes = [frozenset(np.flatnonzero(row)) for row in below if row.any()]
        nodes += [frozenset([leaf]) for leaf in range(4)]
        edges = [
            (node, min((up for up in nodes if node < up), key=len))
            for node in nodes
            if len(node) < 4
        ]
        least = 0
        for column in zip(*ALIGNMENT, strict=True):
            choices = [
                "ACGT" if len(node) > 1 or column[min(node)] == "-" else column[min(node)]
                for node in nodes
            ]
            counts = []
            for letters in itertools.product(*choices):
                at = dict(zip(nodes, letters, strict=True))
                counts.append(sum(at[one] != at[other] for one, other in edges))
            least += min(counts)
        assert log_reward == -least / 4


GRID = ENVIRONMENTS["hypergrid"]
BROKEN = {
    "a backward action in all states but": GRID._replace(
        backward_mask=lambda s: GRID.backward_mask(s).at[:, -1].set(False)
    ),
    "a backward_mask that allows": GRID._replace(
        backward_mask=lambda s: (
            GRID.backward_mask(s) & ((s["position"][:, 1:] < 1) | (jnp.arange(3)[None] != 0))
        )
    ),
    "forward_action to give back": GRID._replace(forward_action=lambda s, a: (a + 1) % 3),
    "back to undo": GRID._replace(back=lambda s, a: s),
    "a step for each backward action": GRID._replace(
        forward_mask=lambda s: (
            GRID.forward_mask(s) & ((s["position"][:, :1] < 1) | (jnp.arange(3)[None] != 1))
        )
    ),
    "at most 2 steps, the horizon": GRID._replace(horizon=2),
    r"a forward_mask of shape \[n, 4\], got \[n, 3\]": GRID._replace(num_actions=4),
    "finite observations": GRID._replace(observe=lambda s: s["position"] / s["position"][:, :1]),
    "observations of floats": GRID._replace(observe=lambda s: s["position"]),
    "rewards that are finite and not negative": GRID._replace(
        log_reward=lambda s: jnp.log(s["position"].sum(1) - 0.5)
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_check_finds_what_is_broken(message):
    with pytest.raises(ValueError, match=f"expected {message}"):
        gflownets.check(BROKEN[message])


def test_objects_that_cannot_be_reached():
    """By name where the states are listed, NaN in the rows of a backward rollout."""
    path = gflownets.independent_sets(np.eye(3, k=1) + np.eye(3, k=-1))
    sets = jnp.array([[True, False, True], [True, True, False]])
    with pytest.raises(ValueError, match=r"got \[True, True, False\] in row 1"):
        gflownets.check(path, sets)
    policy = gflownets.mlp_policy(path, (4,))
    grid = gflownets.mlp_policy(GRID, (4,))

    def log_reward(environment, policy, end):
        params = policy.init(KEY)
        run = jax.jit(lambda end: gflownets.backward_rollout(environment, policy, params, KEY, end))
        return run(end).log_reward

    assert np.isfinite(log_reward(path, policy, sets[:1])).all()
    position, stopped = jnp.array([[1, 1], [0, 1]]), jnp.array([True, False])
    end = {"position": position, "stopped": stopped}
    assert np.isnan(log_reward(GRID, grid, end)).tolist() == [False, True]  # not finished
    end["stopped"] = stopped | True
    assert np.isnan(log_reward(GRID._replace(horizon=2), grid, end)).tolist() == [True, False]


def test_bad_options():
    ones = np.ones((2, 2))
    for make, message in (
        (lambda: gflownets.hypergrid(0, 3), "dimension to be a whole number of at least 1"),
        (lambda: gflownets.hypergrid(2, 1), "side to be a whole number of at least 2"),
        (lambda: gflownets.hypergrid_log_reward(8, r0=0.0), "expected r0 > 0"),
        (lambda: gflownets.hypergrid_log_reward(8, r1=-1.0), "r1 >= 0"),
        (lambda: gflownets.reward_table([[1, 2], [-3, 4]]), r"got -3.0 for the sequence \[1, 0\]"),
        (lambda: gflownets.reward_table([[1, 2], [np.nan, 4]]), "finite rewards >= 0, got nan"),
        (lambda: gflownets.reward_table(0 * ones), "got 0 for every sequence"),
        (lambda: gflownets.reward_table(ones[:1]), r"got \[1, 2\]"),
        (lambda: gflownets.reward_table(ones, exponent=0.0), "finite exponent > 0"),
        (lambda: gflownets.sequences(jnp.sum, 0, 2), "length to be a whole number"),
        (lambda: gflownets.bit_sequences([[0, 2]]), "of 0 and 1"),
        (lambda: gflownets.bit_sequences([[0, 1, 1]], 2), "to divide the 3 bits, got 2"),
        (lambda: gflownets.bit_modes(2, 12), "a multiple of 8, got 12"),
        (lambda: gflownets.independent_sets(ones), "empty diagonal"),
        (lambda: gflownets.independent_sets(np.eye(2, k=1)), "a symmetric adjacency"),
        (lambda: gflownets.independent_sets(np.ones((2, 3))), r"\[V, V\], got \[2, 3\]"),
        (lambda: gflownets.independent_sets(CYCLE, temperature=0.0), "a finite temperature > 0"),
        (lambda: gflownets.phylogenies(["AC", "A"]), r"one length, got 2 of lengths \[1, 2\]"),
        (lambda: gflownets.phylogenies(["A", "C"], temperature=-1.0), "a finite temperature > 0"),
        (lambda: gflownets.rollouts(GRID, None, 2, epsilon=2.0), r"epsilon in \[0, 1\], got 2.0"),
        (lambda: gflownets.rollouts(GRID, None, 0), "n to be a whole number"),
        (lambda: gflownets.enumerate_states(GRID, max_states=5), "at most 5 states, got more"),
        (lambda: gflownets.total_variation([1.0], [0.5, 0.5]), r"shape \[1\], got \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for make in (gflownets.mlp_policy, gflownets.check, lambda e: gflownets.policy(GRID, e)):
        with pytest.raises(TypeError, match="expected"):
            make("hypergrid")
