"""Local search: finished objects are taken apart for a few steps and built anew."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from jflow._core.checks import check_cond, check_noun, check_whole, count_rows, need_key
from jflow.gflownets._rollout import _select, backward_rollout, check_rewards, rollout
from jflow.gflownets._types import Environment, Policy
from jflow.types import Array, Cond, Key, Params, PyTree

__all__ = [
    "LocalSearch",
    "accept_barker",
    "accept_improvement",
    "accept_metropolis",
    "local_search",
    "local_search_rollouts",
]

Accept = Callable[[Array, Array], Array]
"""(log_ratio [n], gain [n]) -> the log-probability [n] to accept; see `local_search`."""


def accept_metropolis(
    log_ratio: Float[Array, " n"], gain: Float[Array, " n"]
) -> Float[Array, " n"]:
    """Metropolis and Hastings' rule, min(1, ratio): it keeps the reward's law and accepts the most.

    Args:
        log_ratio: the log of the ratio of Metropolis and Hastings, [n].
        gain: log R(new) - log R(old), [n]; not used.

    Returns:
        [n], the log-probability to accept.
    """
    return jnp.minimum(log_ratio, 0)


def accept_barker(log_ratio: Float[Array, " n"], gain: Float[Array, " n"]) -> Float[Array, " n"]:
    """Barker's rule, ratio / (1 + ratio): it keeps the reward's law too and accepts less often.

    It is what the code of the paper on local search does.

    Args:
        log_ratio: the log of the ratio of Metropolis and Hastings, [n].
        gain: log R(new) - log R(old), [n]; not used.

    Returns:
        [n], the log-probability to accept.
    """
    return jax.nn.log_sigmoid(log_ratio)


def accept_improvement(
    log_ratio: Float[Array, " n"], gain: Float[Array, " n"]
) -> Float[Array, " n"]:
    """Accept what has a higher reward, and nothing else: a climb, which keeps no law.

    Args:
        log_ratio: the log of the ratio of Metropolis and Hastings, [n]; -inf for a proposal that is
            no object.
        gain: log R(new) - log R(old), [n].

    Returns:
        [n], 0 or -inf.
    """
    return jnp.where((gain > 0) & (log_ratio > -jnp.inf), 0.0, -jnp.inf).astype(gain.dtype)


class LocalSearch(NamedTuple):
    """What a local search found.

    Attributes:
        terminal: the objects, a state with arrays [n, ...].
        log_reward: [n], their log-rewards, nats.
        accepted: [rounds, n] bool, which proposals were accepted.
    """

    terminal: PyTree
    log_reward: Float[Array, " n"]
    accepted: Bool[Array, "rounds n"]


def local_search(
    environment: Environment,
    policy: Policy,
    params: Params,
    key: Key,
    terminal: PyTree,
    cond: Cond = None,
    *,
    back: int,
    least: int | None = None,
    rounds: int = 1,
    accept: Accept = accept_metropolis,
) -> LocalSearch:
    """Improve finished objects by taking them apart for a few steps and building them anew.

        x -> s by k backward actions tau,    s -> x' by m forward actions tau'
        ratio = R(x') P_B(tau' | x') P_F(tau | s) q(m | s)
              / (R(x) P_B(tau | x) P_F(tau' | s) q(k | s))

    where k is drawn uniformly from least ... back, but ends at the initial state, and q is the law
    of the number of steps that lead to s. By `accept_metropolis` and `accept_barker` the chain is
    reversible with respect to the reward, whatever the policy; with a trained policy and one k the
    ratio is 1. A proposal whose way back has probability 0 is refused: where objects differ in
    length, `least` below `back` lets the length change (ours; in the paper k is one number).

    Args:
        environment: what the policy acts in.
        policy: the policy, which takes apart and builds.
        params: its params.
        key: of the draws.
        terminal: n terminal states to begin with.
        cond: what the policy is conditioned on, n rows, or one for all.
        back: the most steps back, at least 1.
        least: the fewest, at most `back`; None: always `back`.
        rounds: how many proposals for each object, one after another.
        accept: (log_ratio [n], gain [n]) -> the log-probability to accept: `accept_metropolis`,
            `accept_barker` or `accept_improvement`.

    Returns:
        LocalSearch: n objects.

    Raises:
        ValueError: back, least or rounds is below 1, or least above back.

    Examples:
        >>> import jax
        >>> from jflow import gflownets
        >>> grid = gflownets.hypergrid(2, 8)
        >>> policy = gflownets.mlp_policy(grid, (8,))
        >>> params = policy.init(jax.random.key(0))
        >>> made = gflownets.rollout(grid, policy, params, jax.random.key(1), 5)
        >>> found = gflownets.local_search(
        ...     grid,
        ...     policy,
        ...     params,
        ...     jax.random.key(2),
        ...     made.terminal,
        ...     back=3,
        ...     least=1,
        ...     rounds=4,
        ...     accept=gflownets.accept_improvement,
        ... )
        >>> bool((found.log_reward >= made.log_reward).all()), found.accepted.shape
        (True, (4, 5))

    References:
        Kim, Yun, Bengio, Zhang, Bengio, Ahn, Park, *Local Search GFlowNets*, 2023,
            arXiv:2310.02710.
        Zhang, Malkin, Liu, Volokhova, Courville, Bengio, *Generative Flow Networks for Discrete
            Probabilistic Modeling*, 2022, arXiv:2202.01361 (the ratio).
    """
    name = "local_search"
    check_noun(name, environment, Environment)
    least = _checked(name, back, least, rounds)
    need_key(name, key)
    terminal = jax.tree.map(jnp.asarray, terminal)
    n = count_rows(name, terminal)
    cond = check_cond(name, cond, n)
    pick = lambda a, at: jnp.take_along_axis(a, at[:, None], axis=1)[:, 0]  # noqa: E731

    exists_back = lambda state: jnp.any(environment.backward_mask(state), axis=-1)  # noqa: E731
    exists_on = lambda state: jnp.any(environment.forward_mask(state), axis=-1)  # noqa: E731

    def draw(key, log_p, exists):
        return jax.random.categorical(key, jnp.where(exists[:, None], log_p, 0), axis=-1)

    def undo(carry, inputs):
        """One action back; `balance` gathers log P_F - log P_B of it."""
        state, said, balance, steps = carry
        goes, key = inputs
        goes = goes & exists_back(state)
        last = draw(key, said.log_backward, goes)
        before = _select(goes, environment.back(state, last), state)
        then = policy.apply(params, before, cond)
        action = jnp.where(goes, environment.forward_action(state, last), 0)
        paid = pick(then.log_forward, action) - pick(said.log_backward, last)
        return (before, then, balance + jnp.where(goes, paid, 0), steps + goes), None

    def redo(carry, key):
        """One action forward; `balance` gathers log P_B - log P_F of it."""
        state, said, balance, steps = carry
        goes = exists_on(state)
        action = draw(key, said.log_forward, goes)
        after = _select(goes, environment.step(state, action), state)
        then = policy.apply(params, after, cond)
        last = jnp.where(goes, environment.backward_action(state, action), 0)
        paid = pick(then.log_backward, last) - pick(said.log_forward, action)
        return (after, then, balance + jnp.where(goes, paid, 0), steps + goes), None

    def log_lengths(steps, initial):
        """The log of q times the number of lengths."""
        ways = jnp.where(initial, back + 1 - jnp.maximum(steps, least), steps >= least)
        return jnp.log(ways.astype(jnp.float32))

    def one(carry, key):
        x, log_reward = carry
        length_key, undo_key, redo_key, accept_key = jax.random.split(key, 4)
        length = jax.random.randint(length_key, (n,), least, back + 1)
        said, none = policy.apply(params, x, cond), jnp.zeros_like(length)
        start = x, said, jnp.zeros_like(said.log_flow), none
        goes = jnp.arange(back)[:, None] < length[None]
        (state, said, balance, steps), _ = jax.lax.scan(
            undo, start, (goes, jax.random.split(undo_key, back))
        )
        (new, _, balance, steps_new), _ = jax.lax.scan(
            redo, (state, said, balance, none), jax.random.split(redo_key, back)
        )
        initial = ~exists_back(state)
        proposed = environment.log_reward(new).astype(log_reward.dtype)
        gain = jnp.where(exists_on(new), -jnp.inf, proposed - log_reward)
        log_ratio = balance + gain + log_lengths(steps_new, initial) - log_lengths(steps, initial)
        log_u = jnp.log1p(-jax.random.uniform(accept_key, (n,), log_reward.dtype))
        accepted = (log_ratio > -jnp.inf) & (log_u <= accept(log_ratio, gain))
        return (_select(accepted, new, x), jnp.where(accepted, proposed, log_reward)), accepted

    start = terminal, environment.log_reward(terminal)
    (x, log_reward), accepted = jax.lax.scan(one, start, jax.random.split(key, rounds))
    return LocalSearch(x, log_reward, accepted)


def local_search_rollouts(
    environment: Environment,
    policy: Policy,
    n: int,
    *,
    back: int,
    least: int | None = None,
    rounds: int = 1,
    accept: Accept = accept_metropolis,
) -> Callable:
    """Trajectories to objects that a local search improved, as the batches of `train.fit`.

    Objects are drawn by the forward policy and searched around; the trajectories that train are
    drawn backwards from what was found.

    Args:
        environment: what the policy acts in.
        policy: the policy.
        n: trajectories of a batch.
        back: the most steps back of a proposal, at least 1.
        least: the fewest; None: always `back`.
        rounds: proposals for each object.
        accept: see `local_search`.

    Returns:
        A callable (state, key) -> batch, jitted, a batch of the losses of GFlowNets.

    Raises:
        ValueError: a number is below 1, or least above back.
    """
    check_whole("local_search_rollouts", n=n)
    _checked("local_search_rollouts", back, least, rounds)

    @jax.jit
    def walk(params, key):
        draw_key, search_key, back_key = jax.random.split(key, 3)
        drawn = rollout(environment, policy, params, draw_key, n).terminal
        found = local_search(
            environment,
            policy,
            params,
            search_key,
            drawn,
            back=back,
            least=least,
            rounds=rounds,
            accept=accept,
        )
        made = backward_rollout(environment, policy, params, back_key, found.terminal)
        return made._asdict()

    return lambda state, key: check_rewards("local_search_rollouts", walk(state.params, key), state)


def _checked(name, back, least, rounds) -> int:
    """The fewest steps back."""
    least = back if least is None else least
    check_whole(name, back=back, rounds=rounds)
    if least not in range(1, back + 1):
        raise ValueError(f"{name}: expected least in 1 ... {back}, got {least}")
    return least
