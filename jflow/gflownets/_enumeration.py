"""Small environments, state by state: exact distributions, and the check of an environment."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.checks import check_noun, check_same_shape, check_whole
from jflow.gflownets._types import Environment, Policy
from jflow.types import Array, Cond, Params, PyTree

__all__ = [
    "Enumeration",
    "check",
    "enumerate_states",
    "exact_distribution",
    "reward_distribution",
    "total_variation",
]


class Enumeration(NamedTuple):
    """All states of an environment that can be reached, N of them, K of them terminal.

    Attributes:
        states: a state with arrays [N, ...] of numpy; the first row is the initial state.
        child: [N, A], the row that each forward action leads to, -1 where there is none.
        terminal: [K], the rows of the terminal states.
        log_reward: [K], of the terminal states, nats.
        horizon: the most steps of a trajectory, as the environment says.
    """

    states: PyTree
    child: np.ndarray
    terminal: np.ndarray
    log_reward: np.ndarray
    horizon: int

    @property
    def terminals(self) -> PyTree:
        """The terminal states, arrays [K, ...]."""
        return jax.tree.map(lambda s: s[self.terminal], self.states)


def enumerate_states(environment: Environment, *, max_states: int = 1_000_000) -> Enumeration:
    """List the states that can be reached, with their edges, on the host.

    Args:
        environment: one that is small enough.
        max_states: where to give up.

    Returns:
        Enumeration: what `exact_distribution` needs.

    Raises:
        ValueError: there are more states than `max_states`.
    """
    check_noun("enumerate_states", environment, Environment)
    check_whole("enumerate_states", max_states=max_states)
    actions = environment.num_actions

    @jax.jit
    def expand(states):  # of a fixed number of rows, so that it is compiled once
        mask, n = environment.forward_mask(states), _rows(states)
        if mask.shape != (n, actions):
            raise ValueError(
                f"enumerate_states: expected a forward_mask of shape [n, {actions}], got"
                f" [n, {mask.shape[-1]}]"
            )
        each = jax.tree.map(lambda s: jnp.repeat(s, actions, axis=0), states)
        return mask, environment.step(each, jnp.tile(jnp.arange(actions), n))

    frontier = jax.device_get(environment.reset(1))
    parts, children, index = [frontier], [], {_bytes(frontier)[0]: 0}
    while _rows(frontier):
        new = []
        for start in range(0, _rows(frontier), _CHUNK):
            n = min(_CHUNK, _rows(frontier) - start)
            rows = start + np.minimum(np.arange(_CHUNK), n - 1)
            mask, after = jax.device_get(expand(_take(frontier, rows)))
            child = np.full((n, actions), -1, np.int32)
            edges = np.flatnonzero(mask[:n])
            after = jax.tree.map(lambda s, edges=edges: s[edges], after)
            fresh = []
            for edge, name in enumerate(_bytes(after)):
                if name not in index:
                    index[name] = len(index)
                    fresh.append(edge)
                child.flat[edges[edge]] = index[name]
            new.append(jax.tree.map(lambda s, fresh=fresh: s[np.array(fresh, int)], after))
            children.append(child)
            if len(index) > max_states:
                raise ValueError(
                    f"enumerate_states: expected at most {max_states} states, got more: raise"
                    " max_states, or estimate with gflownets.log_prob"
                )
        frontier = jax.tree.map(lambda *leaves: np.concatenate(leaves), *new)
        parts.append(frontier)
    states = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    child = np.concatenate(children)
    terminal = np.flatnonzero((child < 0).all(axis=1))
    log_reward = np.asarray(jax.jit(environment.log_reward)(_take(states, terminal)))
    return Enumeration(states, child, terminal, log_reward, environment.horizon)


_CHUNK = 256  # states that are expanded at once


def exact_distribution(
    policy: Policy, params: Params, enumeration: Enumeration, cond: Cond = None
) -> Float[Array, " K"]:
    """The probability that the forward policy ends in each terminal state, without sampling.

    The probability of being in a state is carried along all edges, horizon times. It may be jitted
    with the enumeration closed over.

    Args:
        policy: the policy.
        params: its params.
        enumeration: of the policy's environment.
        cond: what the policy is conditioned on, one row.

    Returns:
        [K], in the order of `enumeration.terminals`.

    Examples:
        >>> import jax
        >>> from jflow import gflownets
        >>> grid = gflownets.hypergrid(1, 2)
        >>> policy = gflownets.mlp_policy(grid, (8,))
        >>> states = gflownets.enumerate_states(grid)
        >>> gflownets.exact_distribution(policy, policy.init(jax.random.key(0)), states).tolist()
        [0.5, 0.5]
    """
    child, terminal = enumeration.child, enumeration.terminal
    inner = np.flatnonzero((child >= 0).any(axis=1))
    states = jax.tree.map(lambda s: jnp.asarray(s[inner]), enumeration.states)
    log_forward = policy.apply(params, states, cond).log_forward
    row, action = np.nonzero(child[inner] >= 0)
    start, end, p = inner[row], child[inner][row, action], jnp.exp(log_forward[row, action])

    def one(carry, _):
        here, ended = carry
        after = jnp.zeros_like(here).at[end].add(here[start] * p)
        return (after, ended + after[terminal]), None

    here = jnp.zeros_like(p, shape=child.shape[0]).at[0].set(1)
    ended = here[terminal]
    return jax.lax.scan(one, (here, ended), length=enumeration.horizon)[0][1]


def reward_distribution(enumeration: Enumeration) -> Float[Array, " K"]:
    """The probabilities of the terminal states in proportion to their rewards, the target.

    Args:
        enumeration: of an environment.

    Returns:
        [K], in the order of `enumeration.terminals`.
    """
    return jax.nn.softmax(jnp.asarray(enumeration.log_reward))


def total_variation(p: Float[ArrayLike, " K"], q: Float[ArrayLike, " K"]) -> Float[Array, ""]:
    """The total variation between two distributions over K objects, sum |p - q| / 2, in [0, 1].

    Papers on GFlowNets that report an L1 distance mean twice this, or its mean over the objects.

    Args:
        p: [K], probabilities.
        q: [K], probabilities.

    Returns:
        A number.

    Raises:
        ValueError: At trace time for shapes that differ.
    """
    p, q = jnp.asarray(p), jnp.asarray(q)
    return jnp.sum(jnp.abs(p - check_same_shape("total_variation", "q", q, p))) / 2


def check(
    environment: Environment, terminals: PyTree = None, *, max_states: int = 1_000_000
) -> Enumeration:
    """Try an environment of your own against what `Environment` promises, state by state.

    Masks, edges and their undoing, the horizon and the rewards are tried in every state that can be
    reached, so that the environment has to be small: try a small one of its kind.

    Args:
        environment: what is tried.
        terminals: objects that have to be reachable, arrays [k, ...]; None: no such question.
        max_states: where to give up.

    Returns:
        Enumeration: the states that were found.

    Raises:
        ValueError: a promise is broken: with the first state that breaks it.
    """
    found = enumerate_states(environment, max_states=max_states)
    child, n = found.child, _rows(found.states)
    row, action = np.nonzero(child >= 0)

    @jax.jit
    def run(states, action, after):
        undo = environment.backward_action(states, action)
        again, before = environment.forward_action(after, undo), environment.back(after, undo)
        return undo, again, before

    before, after = (_take(found.states, at) for at in (row, child[row, action]))
    undo, again, undone = jax.device_get(run(before, jnp.asarray(action), after))
    on_all = jax.jit(
        lambda states: (environment.backward_mask(states), environment.observe(states))
    )
    backward, observed = jax.device_get(on_all(_take(found.states, slice(None))))

    def need(holds, what, row=None):
        bad = np.flatnonzero(~np.asarray(holds))
        if bad.size:
            at = bad[0] if row is None else row[bad[0]]
            raise ValueError(f"check: expected {what}, got the state {_text(found.states, at)}")

    width = environment.num_backward_actions
    if backward.shape != (n, width):
        raise ValueError(
            f"check: expected a backward_mask of shape {[n, width]}, got {list(backward.shape)}"
        )
    initial = ~backward.any(axis=1)
    need(initial == (np.arange(n) == 0), "a backward action in all states but the initial one")
    allowed = (undo >= 0) & (undo < width) & backward[child[row, action], undo % width]
    need(allowed, "a backward_mask that allows the backward_action of every step", row)
    need(again == action, "forward_action to give back the action of every step", row)
    names = zip(_bytes(undone), _bytes(before), strict=True)
    need([one == other for one, other in names], "back to undo every step", row)
    arriving = np.bincount(child[row, action], minlength=n)
    need(arriving == backward.sum(axis=1), "a step for each backward action that is allowed")
    horizon = environment.horizon
    need(_longest(child) <= horizon, f"at most {horizon} steps, the horizon, to every state")
    if observed.shape[0] != n or not np.issubdtype(observed.dtype, np.floating):
        raise ValueError(
            f"check: expected observations of floats [{n}, *event], got {observed.dtype}"
            f" {list(observed.shape)}"
        )
    need(np.isfinite(observed.reshape(n, -1)).all(axis=1), "finite observations")
    need(
        ~np.isnan(found.log_reward) & (found.log_reward < np.inf),
        "rewards that are finite and not negative, log-rewards below infinity",
        found.terminal,
    )
    if terminals is not None:
        known = set(_bytes(found.terminals))
        for at, object_name in enumerate(_bytes(jax.device_get(terminals))):
            if object_name not in known:
                raise ValueError(
                    f"check: expected terminals that can be reached, got {_text(terminals, at)} in"
                    f" row {at}"
                )
    return found


def _longest(child):
    """[N]: the most steps to a state; a circle counts as more than there are states."""
    steps = np.zeros(len(child), int)
    row, action = np.nonzero(child >= 0)
    for _ in range(len(child)):
        longer = steps.copy()
        np.maximum.at(longer, child[row, action], steps[row] + 1)
        if (longer == steps).all():
            return steps
        steps = longer
    return steps


def _rows(states) -> int:
    return jax.tree.leaves(states)[0].shape[0]


def _take(states, rows):
    """Some rows, as arrays of JAX's."""
    return jax.tree.map(lambda s: jnp.asarray(s[rows]), states)


def _bytes(states) -> list[bytes]:
    """A name for each row, equal where the states are."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(states)]
    if not len(leaves[0]):
        return []
    flat = [np.ascontiguousarray(leaf.reshape(len(leaf), -1)).view(np.uint8) for leaf in leaves]
    return [row.tobytes() for row in np.concatenate(flat, axis=1)]


def _text(states, at) -> Any:
    return jax.tree.map(lambda s: np.asarray(s)[at].tolist(), states)
