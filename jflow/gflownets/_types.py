"""The nouns of GFlowNets: environments, policies and trajectories."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Bool, Float, Int

from jflow.types import Array, Params, PyTree

__all__ = ["Environment", "Policy", "PolicyOutput", "Trajectories"]


class Environment(NamedTuple):
    """How objects are built step by step: a directed acyclic graph of states, as pure functions.

    Also known as: a GFlowNet's Markov decision process, a pointed DAG.

    A state is a pytree of arrays [n, ...], integers or truth values, and two states are the same
    where all their arrays are equal. The functions are batched over the n rows and know nothing of
    a policy. The masks say where a trajectory begins and ends: the initial state, one for all, is
    the one without a backward action, and a terminal state, a finished object, is one without a
    forward action. What an action does where its mask is False is never used.

    Forward and backward actions are edges, not states: two actions that lead to the same state are
    two edges, each with a backward action of its own. So `forward_action(step(s, a),
    backward_action(s, a))` is a, and `back(step(s, a), backward_action(s, a))` is s;
    `gflownets.check` tries an environment of your own against all of this.

    Attributes:
        num_actions: A, how many forward actions there are, with the one that stops.
        num_backward_actions: B, how many backward actions there are.
        horizon: T, the most steps of a trajectory.
        reset: n -> n copies of the initial state; n is static.
        step: (state, action [n]) -> the next state.
        back: (state, backward action [n]) -> the state before.
        forward_mask: state -> [n, A] bool, the actions that may follow.
        backward_mask: state -> [n, B] bool, the actions that can have been the last, undone.
        forward_action: (state, backward action [n]) -> [n], the action that leads back to `state`.
        backward_action: (state, action [n]) -> [n], the backward action that leads back to `state`
            from step(state, action).
        observe: state -> x [n, *event], floats, what a network sees.
        log_reward: state -> [n], the log of the reward, nats; -inf for a reward of 0. Of terminal
            states, and of any other that a loss asks about (`losses.forward_looking`).
        stop: the action that ends a trajectory in any state that allows it; None where there is no
            such action. `losses.modified_detailed_balance` needs one.
    """

    num_actions: int
    num_backward_actions: int
    horizon: int
    reset: Callable[[int], PyTree]
    step: Callable[[PyTree, Array], PyTree]
    back: Callable[[PyTree, Array], PyTree]
    forward_mask: Callable[[PyTree], Bool[Array, "n A"]]
    backward_mask: Callable[[PyTree], Bool[Array, "n B"]]
    forward_action: Callable[[PyTree, Array], Int[Array, " n"]]
    backward_action: Callable[[PyTree, Array], Int[Array, " n"]]
    observe: Callable[[PyTree], Float[Array, "n *event"]]
    log_reward: Callable[[PyTree], Float[Array, " n"]]
    stop: int | None = None


class PolicyOutput(NamedTuple):
    """What a policy says of n states.

    Attributes:
        log_forward: [n, A], the log-probabilities of the forward actions, nats, -inf where the mask
            is False; all -inf in a terminal state.
        log_backward: [n, B], those of the backward actions; all -inf in the initial state.
        log_flow: [n], the log of the flow through each state, nats. That of a terminal state is
            not used: it is the reward.
    """

    log_forward: Float[Array, "n A"]
    log_backward: Float[Array, "n B"]
    log_flow: Float[Array, " n"]


class Policy(NamedTuple):
    """What is trained: a forward policy, a backward policy and a flow on the states.

    `gflownets.policy` makes one of a network, `gflownets.mlp_policy` one of a perceptron.

    Attributes:
        init: (key, cond=None) -> params, {'net', 'log_z'}: the network's, and one number, the log
            of the total reward as trajectory balance learns it, nats.
        apply: (params, state, cond=None, *, key=None) -> PolicyOutput. A key switches dropout on.
    """

    init: Callable[..., Params]
    apply: Callable[..., PolicyOutput]


class Trajectories(NamedTuple):
    """Trajectories from the initial state to terminal ones, as `rollout` makes them.

    A row that ends early repeats its terminal state; `valid` says which steps exist. As a batch of
    a loss it is the dict `trajectories._asdict()`, with 'cond' and 'weight' [n] where wanted.

    Attributes:
        states: a state with arrays [n, T + 1, ...].
        action: [n, T], the forward actions.
        backward_action: [n, T], the backward actions that undo them.
        valid: [n, T] bool, which steps exist: the first ones of each row.
        log_reward: [n], of the terminal states, nats.
    """

    states: PyTree
    action: Int[Array, "n T"]
    backward_action: Int[Array, "n T"]
    valid: Bool[Array, "n T"]
    log_reward: Float[Array, " n"]

    @property
    def terminal(self) -> PyTree:
        """The terminal states, arrays [n, ...]."""
        return jax.tree.map(lambda s: s[:, -1], self.states)
