"""Rollouts of a policy, forwards from the initial state and backwards from finished objects."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.arrays import expand_to
from jflow._core.checks import check_cond, check_draws, check_whole, count_rows, need_key
from jflow._core.numbers import check_number
from jflow._core.times import traced
from jflow.gflownets._rows import in_chunks, in_rows
from jflow.gflownets._types import Environment, Policy, PolicyOutput, Trajectories
from jflow.types import Array, Cond, Key, NumberOrFunction, Params, PyTree

__all__ = ["TrajectoryTerms", "backward_rollout", "evaluate", "log_prob", "rollout", "rollouts"]


def rollout(
    environment: Environment,
    policy: Policy,
    params: Params,
    key: Key,
    n: int,
    cond: Cond = None,
    *,
    epsilon: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
) -> Trajectories:
    """Draw trajectories of the forward policy, in one scan over the horizon.

    An action is drawn from  (1 - epsilon) P(a | s)^(1 / temperature) / c + epsilon / #{a allowed}.
    Call it under `jax.jit`, where n is static. The network is asked in the rows that have not
    ended, put together to n, n / 4, n / 16 ... of them, and compiled for each of these numbers.

    Args:
        environment: what the policy acts in.
        policy: the policy.
        params: its params.
        key: of the draws.
        n: how many trajectories.
        cond: what the policy is conditioned on, n rows, or one for all.
        epsilon: the share of uniform actions, in [0, 1], exploration; it may be traced.
        temperature: above 1 it flattens the policy, below 1 it sharpens it; it may be traced.

    Returns:
        Trajectories: n of them.

    Raises:
        ValueError: epsilon or temperature is out of range, or n is below 1.

    Examples:
        >>> import jax
        >>> from jflow import gflownets
        >>> grid = gflownets.hypergrid(2, 4)
        >>> policy = gflownets.mlp_policy(grid, (8,))
        >>> params = policy.init(jax.random.key(0))
        >>> made = gflownets.rollout(grid, policy, params, jax.random.key(1), 5)
        >>> made.action.shape, made.terminal["position"].shape
        ((5, 7), (5, 2))
    """
    n, cond = check_draws("rollout", key, n, cond)
    _check_exploration("rollout", epsilon, temperature)

    def one(state, key):
        log_p = lambda rows: policy.apply(params, *rows).log_forward  # noqa: E731
        mask = environment.forward_mask(state)
        action, valid = _draw(key, log_p, (state, cond), mask, epsilon, temperature)
        undo = jnp.where(valid, environment.backward_action(state, action), 0)
        after = _select(valid, environment.step(state, action), state)
        return after, (state, action, undo, valid)

    keys = jax.random.split(key, environment.horizon)
    last, (states, action, undo, valid) = jax.lax.scan(one, environment.reset(n), keys)
    states = jax.tree.map(lambda s, e: jnp.concatenate([s, e[None]]), states, last)
    rows = lambda a: jnp.swapaxes(a, 0, 1)  # noqa: E731
    finished = ~jnp.any(environment.forward_mask(last), axis=-1)
    log_reward = _where_finished(finished, environment.log_reward(last))
    return Trajectories(
        jax.tree.map(rows, states), rows(action), rows(undo), rows(valid), log_reward
    )


def backward_rollout(
    environment: Environment,
    policy: Policy,
    params: Params,
    key: Key,
    terminal: PyTree,
    cond: Cond = None,
    *,
    epsilon: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
) -> Trajectories:
    """Draw trajectories that end in given objects, by the backward policy.

    They are what a replay buffer, a data set or a local search trains with, and are in the order of
    time like those of `rollout`. A row that does not arrive at the initial state within the
    horizon, an object that cannot be reached, has a log-reward of NaN.

    Args:
        environment: what the policy acts in.
        policy: the policy.
        params: its params.
        key: of the draws.
        terminal: n terminal states.
        cond: what the policy is conditioned on, n rows, or one for all.
        epsilon: the share of uniform backward actions; see `rollout`.
        temperature: of the backward policy; see `rollout`.

    Returns:
        Trajectories: one for each object.

    Raises:
        ValueError: epsilon or temperature is out of range.
    """
    key = need_key("backward_rollout", key)
    terminal = jax.tree.map(jnp.asarray, terminal)
    cond = check_cond("backward_rollout", cond, count_rows("backward_rollout", terminal))
    _check_exploration("backward_rollout", epsilon, temperature)

    def one(state, key):
        log_p = lambda rows: policy.apply(params, *rows).log_backward  # noqa: E731
        mask = environment.backward_mask(state)
        undo, valid = _draw(key, log_p, (state, cond), mask, epsilon, temperature)
        action = jnp.where(valid, environment.forward_action(state, undo), 0)
        before = _select(valid, environment.back(state, undo), state)
        return before, (state, action, undo, valid)

    keys = jax.random.split(key, environment.horizon)
    first, (states, action, undo, valid) = jax.lax.scan(one, terminal, keys)
    states = jax.tree.map(lambda s, e: jnp.concatenate([s, e[None]]), states, first)
    length = jnp.sum(valid, axis=0)  # reversed: step t of a row of L steps is number L - 1 - t
    reverse = lambda a, at: jax.vmap(lambda a, at: a[at], (1, 0))(a, at)  # noqa: E731
    at = length[:, None] - jnp.arange(environment.horizon + 1)[None]
    steps = jnp.maximum(at[:, 1:], 0)
    arrived = ~jnp.any(environment.backward_mask(first), axis=-1)
    finished = ~jnp.any(environment.forward_mask(terminal), axis=-1)
    return Trajectories(
        jax.tree.map(lambda s: reverse(s, jnp.maximum(at, 0)), states),
        jnp.where(at[:, :-1] > 0, reverse(action, steps), 0),
        jnp.where(at[:, :-1] > 0, reverse(undo, steps), 0),
        at[:, :-1] > 0,
        _where_finished(arrived & finished, environment.log_reward(terminal)),
    )


def rollouts(
    environment: Environment,
    policy: Policy,
    n: int,
    *,
    epsilon: NumberOrFunction = 0.0,
    temperature: float = 1.0,
    conds: Callable[[Key, int], Cond] | None = None,
) -> Callable:
    """Trajectories of the policy that is trained, as the batches of `train.fit`.

    Also known as: on-policy training; off-policy with epsilon > 0.

    Args:
        environment: what the policy acts in.
        policy: the policy.
        n: trajectories of a batch.
        epsilon: the share of uniform actions, a number in [0, 1], or a function of the number of
            updates.
        temperature: of the policy; see `rollout`.
        conds: (key, n) -> a condition of n rows; None: no condition.

    Returns:
        A callable (state, key) -> batch, jitted, a batch of the losses of GFlowNets. Outside of
        another jit it raises a ValueError for a log-reward that is not finite, of a reward that is
        negative or 0.

    Raises:
        ValueError: n is below 1, or a number is out of range.

    Examples:
        >>> import jax
        >>> import optax
        >>> from jflow import gflownets, losses, train
        >>> grid = gflownets.hypergrid(2, 3)
        >>> policy = gflownets.mlp_policy(grid, (8,))
        >>> params, optimizer = policy.init(jax.random.key(0)), optax.adam(1e-2)
        >>> state = train.init_state(params, optimizer, jax.random.key(1))
        >>> step = jax.jit(train.make_step(losses.trajectory_balance(policy), optimizer))
        >>> batch = gflownets.rollouts(grid, policy, 4)(state, jax.random.key(2))
        >>> state, metrics = step(state, batch)
        >>> sorted(batch)
        ['action', 'backward_action', 'log_reward', 'states', 'valid']
    """
    check_whole("rollouts", n=n)
    check_number(
        "rollouts",
        "epsilon",
        epsilon,
        "in [0, 1]",
        lambda e: 0 <= e <= 1,
        of="the number of updates",
    )
    _check_exploration("rollouts", 0.0, temperature)

    @jax.jit
    def walk(params, step, key):
        cond_key, walk_key = jax.random.split(key)
        cond = None if conds is None else conds(cond_key, n)
        share = epsilon(step) if callable(epsilon) else epsilon
        made = rollout(
            environment, policy, params, walk_key, n, cond, epsilon=share, temperature=temperature
        )
        return made._asdict() | ({} if cond is None else {"cond": cond})

    def batches(state, key):
        return check_rewards("rollouts", walk(state.params, state.step, key), state)

    return batches


def check_rewards(name: str, batch: dict, state) -> dict:
    """The batch, whose log-rewards are finite; outside jit, where it waits for them."""
    log_reward = batch["log_reward"]
    if not traced(log_reward) and log_reward.is_fully_addressable:
        bad = np.flatnonzero(~np.isfinite(np.asarray(log_reward)))
        if bad.size:
            raise ValueError(
                f"{name}: expected rewards above 0, finite log-rewards, got a log-reward of"
                f" {np.asarray(log_reward)[bad[0]]} at update {int(state.step)}, row {bad[0]}"
            )
    return batch


class TrajectoryTerms(NamedTuple):
    """What the objectives are made of, nats; 0 in steps that do not exist.

    Attributes:
        log_forward: [n, T], log P_F(s_{t+1} | s_t).
        log_backward: [n, T], log P_B(s_t | s_{t+1}).
        log_flow: [n, T + 1], log F(s_t), the log-reward from the terminal state on.
        output: all that the policy says of the states, arrays [n, T + 1, ...].
    """

    log_forward: Float[Array, "n T"]
    log_backward: Float[Array, "n T"]
    log_flow: Float[Array, "n T+1"]
    output: PolicyOutput


def evaluate(
    policy: Policy,
    params: Params,
    trajectories: Trajectories,
    cond: Cond = None,
    *,
    key: Key | None = None,
) -> TrajectoryTerms:
    """The log-probabilities and flows of a policy along trajectories, whoever drew them.

    Of 1024 places or more, the network is asked in chunks of those that trajectories visit, and a
    gradient evaluates a chunk once more rather than keep it.

    Args:
        policy: the policy.
        params: its params.
        trajectories: n of them.
        cond: what the policy is conditioned on, n rows, or one for all.
        key: switches dropout on.

    Returns:
        TrajectoryTerms: what the objectives are made of.
    """
    states, action, undo, valid, log_reward = trajectories
    n, steps = valid.shape
    flat = lambda a: a.reshape(n * (steps + 1), *a.shape[2:])  # noqa: E731
    cond = jax.tree.map(lambda c: jnp.repeat(c, steps + 1, axis=0), check_cond("evaluate", cond, n))
    visited = jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True).reshape(-1)
    ask = lambda rows, key: policy.apply(params, *rows, key=key)  # noqa: E731
    made = in_chunks(ask, visited, (jax.tree.map(flat, states), cond), key)
    output = PolicyOutput(*(a.reshape(n, steps + 1, *a.shape[1:]) for a in made))
    forward, backward, log_flow = output
    pick = lambda a, at: jnp.take_along_axis(a, at[..., None], axis=-1)[..., 0]  # noqa: E731
    exists = jnp.concatenate([valid, jnp.zeros_like(valid[:, :1])], axis=1)
    return TrajectoryTerms(
        jnp.where(valid, pick(forward[:, :-1], action), 0),
        jnp.where(valid, pick(backward[:, 1:], undo), 0),
        jnp.where(exists, log_flow, log_reward[:, None].astype(log_flow.dtype)),
        output,
    )


def log_prob(
    environment: Environment,
    policy: Policy,
    params: Params,
    key: Key,
    terminal: PyTree,
    cond: Cond = None,
    *,
    draws: int = 16,
) -> Float[Array, " n"]:
    """An estimate of the log-probability that the policy makes given objects.

        log of the mean over trajectories tau ~ P_B(. | x) of  P_F(tau) / P_B(tau | x)

    The mean has no bias; its log is too low, the less the more draws. For small environments
    `exact_distribution` has no error.

    Args:
        environment: what the policy acts in.
        policy: the policy.
        params: its params.
        key: of the trajectories.
        terminal: n terminal states.
        cond: what the policy is conditioned on, n rows, or one for all.
        draws: trajectories for each object.

    Returns:
        [n], nats; NaN where an object cannot be reached.

    References:
        Zhang, Malkin, Liu, Volokhova, Courville, Bengio, *Generative Flow Networks for Discrete
            Probabilistic Modeling*, 2022, arXiv:2202.01361.
    """
    check_whole("log_prob", draws=draws)

    def one(_, key):
        made = backward_rollout(environment, policy, params, key, terminal, cond)
        terms = evaluate(policy, params, made, cond)
        ratio = jnp.sum(terms.log_forward - terms.log_backward, axis=1)
        return None, jnp.where(jnp.isnan(made.log_reward), jnp.nan, ratio)

    ratios = jax.lax.scan(one, None, jax.random.split(need_key("log_prob", key), draws))[1]
    return jax.nn.logsumexp(ratios, axis=0) - jnp.log(draws)


def _draw(key, log_p, rows, mask, epsilon, temperature):
    """(an action [n], 0 where there is none; whether there is one [n]).

    log_p, rows -> [m, A], is asked in the rows that have an action, and not at all where none has.
    """
    valid = jnp.any(mask, axis=-1)

    def draw():
        nowhere = jnp.where(valid, -jnp.inf, 0)[:, None]
        logits = jnp.where(mask, in_rows(log_p, valid, rows) / temperature, nowhere)
        if traced(epsilon) or epsilon > 0:
            uniform = mask / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
            logits = jnp.log((1 - epsilon) * jax.nn.softmax(logits, axis=-1) + epsilon * uniform)
        return jnp.where(valid, jax.random.categorical(key, logits), 0).astype(jnp.int32)

    return jax.lax.cond(jnp.any(valid), draw, lambda: jnp.zeros_like(valid, jnp.int32)), valid


def _select(valid, chosen, other):
    """`chosen` in the rows that are valid, in the types of `other`."""
    return jax.tree.map(
        lambda a, b: jnp.where(expand_to(valid, b), a, b).astype(b.dtype), chosen, other
    )


def _where_finished(finished, log_reward):
    return jnp.where(finished, log_reward, jnp.nan)


def _check_exploration(name, epsilon, temperature) -> None:
    if not traced(epsilon) and not 0 <= epsilon <= 1:
        raise ValueError(f"{name}: expected epsilon in [0, 1], got {epsilon}")
    if not traced(temperature) and not 0 < temperature < np.inf:
        raise ValueError(f"{name}: expected a finite temperature > 0, got {temperature}")
