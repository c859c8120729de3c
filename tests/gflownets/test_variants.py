"""Variants of GFlowNets at exact solutions, which numpy finds by dynamic programming."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from keys import KEYS, keys_consumed_twice

from jflow import gflownets, losses
from jflow.types import Distribution

LENGTH = 3
RNG = np.random.default_rng(0)
REWARD = RNG.uniform(0.2, 2.0, (2,) * LENGTH)


def log_reward(tokens):
    return jnp.log(jnp.asarray(REWARD))[tuple(tokens.T)]


LEFT = gflownets.sequences(log_reward, LENGTH, 2)
BOTH_ENDS = gflownets.two_ended_sequences(log_reward, LENGTH, 2)
CODES = 3**LENGTH


def code(tokens):
    """A number for each state, a row of tokens or -1."""
    return (tokens + 1) @ 3 ** np.arange(LENGTH)


def told(cond):
    """The code of a state that is told by its observation, one-hot, where none is the last."""
    return code((jnp.argmax(cond, axis=-1) + 1) % 3 - 1)


def tabular(environment):
    """A policy whose params are tables over states, {'forward' [S, A], 'flow' [S]}, or with a
    condition over states and outcomes; its backward policy is uniform."""

    def apply(params, state, cond=None, *, key=None):
        at = (code(state),) if cond is None else (code(state), told(cond))
        backward = environment.backward_mask(state)
        return gflownets.PolicyOutput(
            gflownets.masked_log_softmax(params["forward"][at], environment.forward_mask(state)),
            gflownets.masked_log_softmax(jnp.zeros(backward.shape), backward),
            params["flow"][at],
        )

    return gflownets.Policy(lambda key, cond=None: {}, apply)


def graph(environment):
    """(codes of the states, of the terminal ones, [(state, action, child)] in an order in which
    children come later)."""
    states = gflownets.enumerate_states(environment)
    codes = code(states.states)
    length = np.sum(states.states >= 0, axis=1)
    row, action = np.nonzero(states.child >= 0)
    edges = [(codes[r], a, codes[states.child[r, a]]) for r, a in zip(row, action, strict=True)]
    order = np.argsort(length[row], kind="stable")
    return states, codes, [edges[i] for i in order]


def solved(edges, flow, value):
    """Tables {'forward', 'flow'} of a forward policy in proportion to value(edge)."""
    forward = np.full((CODES, 4), -np.inf)
    for s, a, child in edges:
        forward[s, a] = np.log(value(s, child))
    return {"forward": forward[:, : 1 + max(a for _, a, _ in edges)], "flow": np.log(flow)}


def floored(tables):
    """With -700 for the logarithm of 0, which masks and probabilities of 0 do not see."""
    return jax.tree.map(lambda a: np.maximum(a, -700.0), tables)


def reach(edges, terminal):
    """[S]: the probability that a uniform backward trajectory from an object comes through."""
    parents = np.bincount([child for _, _, child in edges], minlength=CODES)
    p = np.zeros(CODES)
    p[terminal] = 1
    for s, _, child in reversed(edges):
        p[s] += p[child] / parents[child]
    return p, parents


def conditional():
    """The exact tables of an outcome-conditioned policy on a graph with several ways."""
    states, _, edges = graph(BOTH_ENDS)
    tables = {"forward": np.zeros((CODES, CODES, 4)), "flow": np.zeros((CODES, CODES))}
    for y in code(states.terminals):
        p, parents = reach(edges, y)
        with np.errstate(divide="ignore"):
            made = floored(solved(edges, p, lambda s, child, p=p, n=parents: p[child] / n[child]))
        tables["forward"][:, y], tables["flow"][:, y] = made["forward"], made["flow"]
    return states, edges, tables


def test_outcome_conditioned_flows_balance_and_sample_any_reward(x64):
    """Successes and failures alike, to the rounding of float64; the converted policy draws in
    proportion to rewards it never saw; and the loss sees a wrong table."""
    states, _, tables = conditional()
    policy = tabular(BOTH_ENDS)
    loss = losses.outcome_conditioned(policy, floor=1e-4)
    ends = jnp.asarray(states.terminals)
    outcomes = lambda key, n: ends[jax.random.randint(key, (n,), 0, len(ends))]  # noqa: E731
    rollouts = gflownets.outcome_rollouts(BOTH_ENDS, policy, 64, outcomes)
    explored = {**tables, "forward": 0.002 * tables["forward"]}  # to miss what it is told
    batch = rollouts(type("State", (), {"params": jax.tree.map(jnp.asarray, explored)}), KEYS[0])
    wanted = RNG.normal(size=len(ends))
    converted = gflownets.outcome_policy(BOTH_ENDS, policy, states.terminals, wanted)

    @jax.jit
    def run(tables, batch):
        exact = gflownets.exact_distribution(converted, tables, states)
        wrong = {**tables, "forward": 0.9 * tables["forward"]}
        return loss(tables, None, batch)[0], loss(wrong, None, batch)[0], exact

    value, wrong, exact = jax.device_get(run(tables, batch))
    assert 4 < np.sum(batch["log_reward"] == -np.inf) < 32  # failures; and 32 successes at least
    ended = jnp.argmax(batch["cond"], -1) == batch["states"][:, -1]
    np.testing.assert_array_equal(np.all(ended, axis=1), batch["log_reward"] == 0)
    assert value < 1e-20 and wrong > 1e-4
    np.testing.assert_allclose(exact, np.exp(wanted) / np.exp(wanted).sum(), rtol=1e-10)
    assert not keys_consumed_twice(
        lambda key: rollouts(type("State", (), {"params": tables}), key), KEYS[1]
    )


def test_the_amortized_sum_over_outcomes_is_0_at_the_sum_and_its_posterior(x64):
    states, edges, tables = conditional()
    teacher = policy = tabular(BOTH_ENDS)
    ends = code(states.terminals)
    reward = REWARD[tuple(states.terminals.T)]
    given = np.stack([reach(edges, y)[0] for y in ends]) * reward[:, None]  # [Y, S]
    parents = reach(edges, ends[0])[1]
    flow = given.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        own = floored(solved(edges, flow, lambda s, child: flow[child] / parents[child]))
        posterior = np.log(np.nan_to_num(given / flow)).T  # [S, Y]
    place = np.zeros(CODES, int)
    place[ends] = np.arange(len(ends))
    predictor = Distribution(
        None,
        lambda params, y, cond=None, *, key=None: params[told(cond), y],
        None,
    )
    loss = losses.outcome_marginalization(
        BOTH_ENDS, policy, teacher, predictor, lambda s: jnp.asarray(place)[code(s)]
    )
    own = jax.tree.map(jnp.asarray, own)
    batch = gflownets.rollout(BOTH_ENDS, policy, own, KEYS[0], 40)._asdict()
    run = jax.jit(lambda params, batch: loss(params, None, batch, {"teacher": tables})[0])
    params = {"policy": own, "predictor": np.maximum(posterior, -700)}
    assert run(params, batch) < 1e-20
    assert run({**params, "predictor": 0.9 * params["predictor"]}, batch) > 1e-3


def chance_of(tokens):
    """The second token is drawn by chance, 1 with probability 0.3."""
    turn = jnp.sum(tokens >= 0, axis=1) == 1
    return jnp.where(turn[:, None], jnp.log(jnp.array([[0.7, 0.3]])), -jnp.inf)


def test_expected_flows_are_those_of_a_tree_with_chance(x64):
    """By a recursion in numpy; the policy with chance draws objects by the product of all turns."""
    states, _, edges = graph(LEFT)
    flow = np.zeros(CODES)
    flow[code(states.terminals)] = REWARD[tuple(states.terminals.T)]
    length = np.zeros(CODES, int)
    length[code(states.states)] = np.sum(states.states >= 0, axis=1)
    for s, a, child in reversed(edges):
        flow[s] += flow[child] * ((0.7, 0.3)[a] if length[s] == 1 else 1)
    with np.errstate(divide="ignore"):
        tables = floored(solved(edges, flow, lambda s, child: flow[child]))
    policy = tabular(LEFT)
    loss = losses.expected_detailed_balance(LEFT, policy, chance_of)
    playing = gflownets.with_chance(policy, chance_of)

    @jax.jit
    def run(tables):
        batch = gflownets.rollout(LEFT, playing, tables, KEYS[0], 40)._asdict()
        values = [
            loss({**tables, "flow": tables["flow"] + shift}, None, batch)[0]
            for shift in (0.0, 0.1 * np.arange(CODES) / CODES)
        ]
        return values, gflownets.exact_distribution(playing, tables, states)

    (value, wrong), exact = jax.device_get(run(tables))
    assert value < 1e-20 < 1e-6 < wrong
    p = np.exp(tables["forward"])
    p = p / p.sum(1, keepdims=True)
    expected = []
    for x in states.terminals:
        before = [code(np.where(np.arange(LENGTH) < k, x, -1)) for k in range(LENGTH)]
        expected.append(p[before[0], x[0]] * (0.7, 0.3)[x[1]] * p[before[2], x[2]])
    np.testing.assert_allclose(exact, expected, rtol=1e-10)


def test_the_flows_of_a_game_balance_along_its_trajectories(x64):
    """The mover's flow is the mean over the moves, the other's is its inverse, by a recursion."""
    states, _, edges = graph(LEFT)
    mine = np.zeros(CODES)  # the flow to the first player
    mine[code(states.terminals)] = REWARD[tuple(states.terminals.T)]
    length = np.zeros(CODES, int)
    length[code(states.states)] = np.sum(states.states >= 0, axis=1)
    children = {s: [child for t, _, child in edges if t == s] for s, _, _ in edges}
    for s in sorted(children, key=lambda s: -length[s]):
        moved = mine[children[s]]
        mine[s] = moved.mean() if length[s] % 2 == 0 else 1 / (1 / moved).mean()
    value = lambda s, child: mine[child] if length[s] % 2 == 0 else 1 / mine[child]  # noqa: E731
    with np.errstate(divide="ignore"):
        tables = floored(solved(edges, mine, value)) | {
            "log_z": np.log(mine[code(-np.ones(LENGTH, int))])
        }
    policy = tabular(LEFT)
    loss = losses.adversarial_trajectory_balance(
        LEFT, policy, lambda tokens: jnp.sum(tokens >= 0, axis=1) % 2 == 0
    )

    @jax.jit
    def run(tables):
        batch = gflownets.rollout(LEFT, policy, tables, KEYS[0], 40, epsilon=0.5)._asdict()
        other = {**tables, "log_z": tables["log_z"] + 0.1}
        return loss(tables, None, batch)[0], loss(other, None, batch)[0]

    np.testing.assert_allclose(run(tables), [0, 0.01], atol=1e-20, rtol=1e-10)


def test_gflownet_em_with_an_exact_posterior_is_em(x64):
    """Latents of 8 sequences, data of 3 symbols. E is 0, the gradient of the model is that of the
    marginal likelihood, and after one step of EM, in closed form in numpy, M is at its optimum."""
    states, _, edges = graph(LEFT)
    latents, share = states.terminals, np.array([0.2, 0.5, 0.3])  # of the data
    number = np.zeros(CODES, int)
    number[code(latents)] = np.arange(len(latents))
    model = {"prior": RNG.normal(size=8), "symbols": RNG.normal(size=(8, 3))}

    def log_joint(model, latent, x):
        z, symbol = jnp.asarray(number)[code(latent)], jnp.argmax(x, axis=-1)
        prior = jax.nn.log_softmax(model["prior"])[z]
        return prior + jax.nn.log_softmax(model["symbols"], axis=1)[z, symbol]

    softmax = lambda a: np.exp(a) / np.exp(a).sum(-1, keepdims=True)  # noqa: E731
    joint = softmax(model["prior"])[:, None] * softmax(model["symbols"])  # [8, 3]
    tables = {"forward": np.zeros((CODES, 3, 2)), "flow": np.zeros((CODES, 3))}
    for x in range(3):
        flow = np.zeros(CODES)
        flow[code(latents)] = joint[:, x]
        for s, _, child in reversed(edges):
            flow[s] += flow[child]
        with np.errstate(divide="ignore"):
            made = floored(solved(edges, flow, lambda s, child, flow=flow: flow[child]))
        tables["forward"][:, x], tables["flow"][:, x] = made["forward"], made["flow"]

    def apply(params, state, cond=None, *, key=None):
        at = code(state), jnp.argmax(cond, axis=-1)
        return gflownets.PolicyOutput(
            gflownets.masked_log_softmax(params["forward"][at], LEFT.forward_mask(state)),
            jnp.where(LEFT.backward_mask(state), 0.0, -jnp.inf),
            params["flow"][at],
        )

    policy = gflownets.Policy(lambda key, cond=None: {}, apply)
    loss = losses.gflownet_em(policy, log_joint)
    z, x = map(np.array, zip(*itertools.product(range(8), range(3)), strict=True))
    weight = share[x] * (joint / joint.sum(0))[z, x]  # every pair, by its posterior

    @jax.jit
    def run(tables, model, updated):
        ends, cond = jnp.asarray(latents)[z], jax.nn.one_hot(x, 3)
        batch = gflownets.backward_rollout(LEFT, policy, tables, KEYS[0], ends, cond)._asdict()
        batch |= {"cond": cond, "weight": weight}
        (_, metrics), slope = jax.value_and_grad(loss, has_aux=True)(
            {**tables, "model": model}, None, batch
        )
        after = jax.grad(lambda m: loss({**tables, "model": m}, None, batch)[0])(updated)

        def marginal(model):
            each = log_joint(model, jnp.asarray(latents)[z], cond).reshape(8, 3)
            return -jnp.sum(share * jax.nn.logsumexp(each, axis=0))

        return metrics, slope, after, jax.grad(marginal)(model)

    posterior = joint / joint.sum(0) * share  # [8, 3]
    updated = {"prior": np.log(posterior.sum(1)), "symbols": np.log(posterior)}
    metrics, slope, after, expected = jax.device_get(run(tables, model, updated))
    assert metrics["balance"] < 1e-20 and np.isfinite(metrics["log_joint"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), slope["model"], expected
    )
    assert all(np.abs(slope[name]).max() < 1e-9 for name in ("forward", "flow"))
    assert all(np.abs(leaf).max() < 1e-12 for leaf in jax.tree.leaves(after))
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(expected))


def test_process_supervision_with_the_flows_of_listed_items(x64):
    """Six of eight sequences are items. The flows are sums in numpy, the loss is 0 where tokens
    have their shares, and items are then drawn in proportion to their rewards."""
    states, _, edges = graph(LEFT)
    items = states.terminals[[0, 1, 2, 4, 5, 7]]
    reward = RNG.uniform(0.5, 2.0, 6)
    log_flow = gflownets.prefix_log_flow(items, np.log(reward))
    flow = np.zeros(CODES)
    flow[code(items)] = reward
    for s, _, child in reversed(edges):
        flow[s] += flow[child]
    found = np.exp(jax.device_get(log_flow(jnp.asarray(states.states))))
    np.testing.assert_allclose(found, flow[code(states.states)], rtol=1e-12)
    with np.errstate(divide="ignore"):
        tables = floored(solved(edges, np.ones(CODES), lambda s, child: flow[child]))
    policy = tabular(LEFT)
    loss = losses.process_supervision(policy, log_flow)

    @jax.jit
    def run(tables):
        made = gflownets.backward_rollout(LEFT, policy, tables, KEYS[0], jnp.asarray(items))
        batch = made._replace(log_reward=jnp.log(reward))._asdict()
        value = lambda tables: loss(tables, None, batch)[0]  # noqa: E731
        wrong = jax.value_and_grad(value)({**tables, "forward": 0.9 * tables["forward"]})
        return value(tables), wrong, gflownets.exact_distribution(policy, tables, states)

    value, (wrong, slope), exact = jax.device_get(run(tables))
    assert value < 1e-20 and wrong > 1e-4 and np.any(slope["forward"]) and not np.any(slope["flow"])
    listed = np.isin(code(states.terminals), code(items))
    np.testing.assert_allclose(exact[listed], reward / reward.sum(), rtol=1e-10)
    assert np.all(exact[~listed] < 1e-200)


def test_bad_input_is_an_error():
    policy = tabular(LEFT)
    with pytest.raises(ValueError, match="floor > 0, got 0"):
        losses.outcome_conditioned(policy, floor=0.0)
    with pytest.raises(TypeError, match="expected a Policy"):
        losses.gflownet_em(LEFT, lambda *args: 0)
    with pytest.raises(ValueError, match="even n, got 3"):
        gflownets.outcome_rollouts(LEFT, policy, 3, lambda key, n: None)
    with pytest.raises(ValueError, match="listed twice"):
        gflownets.prefix_log_flow([[0, 1], [0, 1]], [0.0, 0.0])
    with pytest.raises(ValueError, match=r"expected items of shape \[K, length\], got \[2\]"):
        gflownets.prefix_log_flow([0, 1], [0.0, 0.0])
    with pytest.raises(ValueError, match="log_reward"):
        gflownets.prefix_log_flow([[0, 1], [1, 1]], [0.0])
    with pytest.raises(ValueError, match="log_reward"):
        gflownets.outcome_policy(LEFT, policy, jnp.zeros((4, 3), int), np.zeros(3))
