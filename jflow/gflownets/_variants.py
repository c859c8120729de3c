"""Policies made of policies: given outcomes, chance moves, and flows that are known beforehand."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jflow._core.checks import check_noun, check_rows, check_same_shape, check_whole, count_rows
from jflow.gflownets._rollout import backward_rollout, rollout
from jflow.gflownets._types import Environment, Policy, PolicyOutput
from jflow.types import Array, Key, PyTree

__all__ = ["outcome_policy", "outcome_rollouts", "prefix_log_flow", "with_chance"]


def outcome_rollouts(
    environment: Environment, policy: Policy, n: int, outcomes: Callable[[Key, int], PyTree]
) -> Callable:
    """Trajectories of a policy that is told where to end, as the batches of `train.fit`.

    Half of them are drawn backwards from outcomes, the successes, half forwards by the policy that
    is given another one. The condition is the observation of the outcome, and the reward 1 where
    the trajectory ends in it and 0 elsewhere. It is what `losses.outcome_conditioned` learns from,
    without a reward.

    Args:
        environment: what the policy acts in.
        policy: a policy whose condition is an observation [n, *event].
        n: trajectories of a batch, an even number.
        outcomes: (key, n) -> n terminal states.

    Returns:
        A callable (state, key) -> batch, jitted.

    Raises:
        TypeError: for what is no `Environment` or `Policy`.
        ValueError: n is not an even number of at least 2.
    """
    check_noun("outcome_rollouts", environment, Environment)
    check_noun("outcome_rollouts", policy, Policy)
    check_whole("outcome_rollouts", 2, n=n)
    if n % 2:
        raise ValueError(f"outcome_rollouts: expected an even n, got {n}")

    @jax.jit
    def walk(params, key):
        outcome_key, back_key, draw_key = jax.random.split(key, 3)
        wanted = outcomes(outcome_key, n)
        first, second = (jax.tree.map(lambda s, at=at: s[at::2], wanted) for at in (0, 1))
        cond = environment.observe(first), environment.observe(second)
        back = backward_rollout(environment, policy, params, back_key, first, cond[0])
        drawn = rollout(environment, policy, params, draw_key, n // 2, cond[1])
        same = jax.tree.map(
            lambda a, b: jnp.all((a == b).reshape(n // 2, -1), axis=1), drawn.terminal, second
        )
        reached = jnp.all(jnp.stack(jax.tree.leaves(same)), axis=0)
        zero = jnp.zeros_like(back.log_reward)
        back = back._replace(log_reward=zero)
        drawn = drawn._replace(log_reward=jnp.where(reached, zero, -jnp.inf))
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), back, drawn)
        return both._asdict() | {"cond": jnp.concatenate(cond)}

    return lambda state, key: walk(state.params, key)


def outcome_policy(
    environment: Environment,
    policy: Policy,
    outcomes: PyTree,
    log_reward: Float[ArrayLike, " K"],
) -> Policy:
    """The policy for a reward, out of one that can end in any outcome it is told.

        F(s) P_F(s' | s) = sum_y R(y) F(s | y) P_F(s' | s, y)

    over all outcomes y. Where the conditional flows are exact this is exact, for any reward,
    without training. It evaluates the conditional policy K times; `losses.outcome_marginalization`
    trains a policy that does not have to.

    Also known as: the converted policy of an OC-GFN.

    Args:
        environment: what the policy acts in.
        policy: trained by `losses.outcome_conditioned`.
        outcomes: the K terminal states that have a reward, arrays [K, ...].
        log_reward: [K], nats.

    Returns:
        Policy: a policy without condition, with the params of `policy`.

    Raises:
        TypeError: for what is no `Environment` or `Policy`.
        ValueError: log_reward is not [K].

    References:
        Pan, Jain, Madan, Bengio, *Pre-Training and Fine-Tuning Generative Flow Networks*, 2023,
            arXiv:2310.03419.
    """
    check_noun("outcome_policy", environment, Environment)
    check_noun("outcome_policy", policy, Policy)
    outcomes = jax.tree.map(jnp.asarray, outcomes)
    count = count_rows("outcome_policy", outcomes)
    reward = check_rows("outcome_policy", "log_reward", jnp.asarray(log_reward), count)

    def apply(params, state, cond=None, *, key=None):
        n = jax.tree.leaves(state)[0].shape[0]
        each = jax.tree.map(lambda s: jnp.repeat(s, count, axis=0), state)
        seen = environment.observe(outcomes)
        told = jnp.tile(seen, (n, *(1 for _ in seen.shape[1:])))
        made = policy.apply(params, each, told, key=key)
        split = lambda a: a.reshape(n, count, *a.shape[1:])  # noqa: E731
        weight = (split(made.log_flow) + reward[None])[..., None]
        edges = jax.nn.logsumexp(split(made.log_forward) + weight, axis=1)
        total = jax.nn.logsumexp(weight, axis=1)
        back = jax.nn.logsumexp(split(made.log_backward) + weight - total[:, None], axis=1)
        flow = jax.nn.logsumexp(edges, axis=1)
        some = jnp.any(environment.forward_mask(state), axis=1)
        forward = jnp.where(some[:, None], edges - jnp.where(some, flow, 0)[:, None], -jnp.inf)
        return PolicyOutput(forward, back, jnp.where(some, flow, 0))

    return Policy(policy.init, apply)


def with_chance(policy: Policy, chance: Callable[[PyTree], Array]) -> Policy:
    """A policy in a world where some moves are drawn by chance, or by somebody else.

    A state of the environment is either the policy's turn or chance's, as in a game against dice:
    what the policy does and what then happens are two steps.

    Also known as: stochastic environment, chance nodes, a move of nature.

    Args:
        policy: the policy.
        chance: state -> [n, A], the log-probabilities of the actions where chance moves, nats, and
            all -inf where it is the policy's turn or the end.

    Returns:
        Policy: which moves as chance does where that has the turn, with the params of `policy`.

    Raises:
        TypeError: for what is no `Policy`.
    """
    check_noun("with_chance", policy, Policy)

    def apply(params, state, cond=None, *, key=None):
        made = policy.apply(params, state, cond, key=key)
        drawn = check_same_shape("with_chance", "chance", chance(state), made.log_forward)
        turn = jnp.any(drawn > -jnp.inf, axis=1, keepdims=True)
        forward = jnp.where(turn, drawn.astype(made.log_forward.dtype), made.log_forward)
        return made._replace(log_forward=forward)

    return Policy(policy.init, apply)


def prefix_log_flow(
    items: Int[ArrayLike, "K length"], log_reward: Float[ArrayLike, " K"]
) -> Callable[[Int[Array, "n length"]], Float[Array, " n"]]:
    """The flow through every prefix of a list of items: the sum of the rewards of what it begins.

        log F(s) = log sum of R(x) over the items x that begin with s,    -inf where none does

    The states are those of `sequences`. Titles, words or molecules that are listed beforehand have
    one way to be written, so that their flows are known and need not be learned. The prefix may be
    weighted for one user by other rewards.

    Args:
        items: tokens [K, length]; shorter items are filled up with a token that ends them.
        log_reward: [K], nats, such as the logs of how often an item was chosen.

    Returns:
        state [n, length], -1 where there is no token yet -> [n], nats. The cost is n K length.

    Raises:
        ValueError: the shapes do not fit, or an item is listed twice.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from jflow import gflownets
        >>> items, reward = np.array([[0, 1], [0, 2], [1, 1]]), np.array([1.0, 2.0, 3.0])
        >>> flow = gflownets.prefix_log_flow(items, np.log(reward))
        >>> log_flow = flow(jnp.array([[-1, -1], [0, -1], [0, 2], [2, -1]]))
        >>> [round(float(a), 3) for a in jnp.exp(log_flow)]
        [6.0, 3.0, 2.0, 0.0]

    References:
        Gao, Gao, Fan, Yuan, Shi, He, *Process-Supervised LLM Recommenders via Flow-guided Tuning*,
            2025, arXiv:2503.07377.
    """
    listed = np.asarray(items)
    if listed.ndim != 2 or not len(listed):
        raise ValueError(
            f"prefix_log_flow: expected items of shape [K, length], got {list(listed.shape)}"
        )
    if len(np.unique(listed, axis=0)) != len(listed):
        raise ValueError("prefix_log_flow: expected different items, got one that is listed twice")
    reward = check_rows("prefix_log_flow", "log_reward", jnp.asarray(log_reward), len(listed))

    def log_flow(state):
        begins = (state[:, None] == listed[None]) | (state[:, None] < 0)
        fits = jnp.all(begins, axis=-1)
        return jax.nn.logsumexp(jnp.where(fits, reward[None], -jnp.inf), axis=1)

    return log_flow
