"""GFlowNets that are told where to end, meet chance and opponents, infer latents, or are taught.

Their batches are those of `losses.trajectory_balance`: trajectories, as `gflownets.rollouts` makes
them.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow._core.batch import mean_of_rows
from jflow._core.checks import (
    check_batch,
    check_noun,
    check_rows,
    check_same_shape,
    frozen_entry,
    take_parts,
)
from jflow._core.keys import split_key
from jflow.gflownets import Environment, Policy
from jflow.losses._gflownets import (
    _checked,
    _log_ratio,
    _mean_square,
    _on_states,
    _read,
    _repeated,
    sub_trajectory_balance,
)
from jflow.types import Array, Cond, Distribution, Loss, Params, PyTree

__all__ = [
    "adversarial_trajectory_balance",
    "expected_detailed_balance",
    "gflownet_em",
    "outcome_conditioned",
    "outcome_marginalization",
    "process_supervision",
]


def outcome_conditioned(policy: Policy, *, floor: float = 1e-3) -> Loss:
    """Pre-training without a reward: a policy learns to end in any outcome that it is told.

    Also known as: OC-GFN, outcome-conditioned GFlowNet, goal-conditioned pre-training.

        (log(c + F(s | y) P_F(s' | s, y)) - log(c + F(s' | y) P_B(s | s')))^2,
        F(x | y) = 1 where x = y, else 0

    Detailed balance with the reward that is 1 at the outcome y and 0 at all others, for which c,
    the floor, keeps the logarithm finite. With a backward policy that does not look at y, F(s | y)
    is the probability that a backward trajectory from y comes through s. `gflownets.outcome_policy`
    turns the result into the policy of any reward.

    Args:
        policy: The policy, whose condition is the outcome. A uniform backward policy is the
            paper's.
        floor: c, above 0. What flows less counts as none.

    Returns:
        A loss of trajectories with 'cond', as `gflownets.outcome_rollouts` makes them, whose
        'log_reward' is 0 where the outcome was reached and -inf elsewhere; a mean over their steps.
        It needs no key; with one, dropout is on. It has no metrics.

    Raises:
        TypeError: At construction for what is no `gflownets.Policy`.
        ValueError: At construction for a floor that is not positive; at trace time for entries of
            the batch that are missing or do not fit.

    References:
        Pan, Jain, Madan, Bengio, *Pre-Training and Fine-Tuning Generative Flow Networks*, 2023,
            arXiv:2310.03419. That failures are learned from by a floor is ours; the paper
            contrasts them with successes.
    """
    name = _checked("outcome_conditioned", policy)
    if not 0 < floor < math.inf:
        raise ValueError(f"{name}: expected a finite floor > 0, got {floor}")
    log_floor = math.log(floor)

    def loss(params, key, batch, frozen=None):
        made, terms, cond, weight = _read(name, policy, params, key, batch)
        out = jnp.logaddexp(terms.log_flow[:, :-1] + terms.log_forward, log_floor)
        into = jnp.logaddexp(terms.log_flow[:, 1:] + terms.log_backward, log_floor)
        return _mean_square(out - into, made.valid, weight), {}

    return loss


def outcome_marginalization(
    environment: Environment,
    policy: Policy,
    teacher: Policy,
    predictor: Distribution,
    outcome: Callable[[PyTree], Array],
) -> Loss:
    """Fine-tuning: the policy of a reward from one that can end anywhere, without a sum over ends.

    Also known as: amortized marginalization of OC-GFN.

        (log F(s) P_F(s' | s) + log Q(y | s') - log R(y) - log F(s | y) P_F(s' | s, y))^2

    where y is where the trajectory ends. For all y that s' leads to this is 0 together, and then
    Q is the law of the outcome given s' and F(s) P_F(s' | s) the sum of
    `gflownets.outcome_policy`: Q plays the part of the sum.

    Args:
        environment: What the policies act in.
        policy: The policy that is trained.
        teacher: The policy of `outcome_conditioned`, whose params are frozen['teacher'].
        predictor: Q, a law of outcomes given the observation of a state as its cond.
        outcome: terminal states -> the outcomes [n, ...] that the predictor takes.

    Returns:
        A loss of trajectories, a mean over their steps, with params {'policy', 'predictor'}. Where
        the batch has a 'cond' it is not for this loss: the teacher's is the end of each row. It
        needs no key; with one, dropout is on. It has no metrics.

    Raises:
        TypeError: At construction for what is no `gflownets.Policy`, `Environment` or
            `Distribution`.
        ValueError: At trace time for entries of the batch or of frozen that are missing or do not
            fit.

    References:
        Pan, Jain, Madan, Bengio, *Pre-Training and Fine-Tuning Generative Flow Networks*, 2023,
            arXiv:2310.03419. That y is the end of the trajectory itself is ours.
    """
    name = _checked("outcome_marginalization", policy)
    _checked(name, teacher)
    check_noun(name, environment, Environment)
    check_noun(name, predictor, Distribution)

    def loss(params, key, batch, frozen=None):
        own_key, teacher_key, predictor_key = split_key(key, 3)
        own, guess = take_parts(name, params, "policy", "predictor")
        check_batch(name, batch)
        made, terms, _, weight = _read(name, policy, own, own_key, {**batch, "cond": None})
        known = frozen_entry(name, frozen)
        told = made._asdict() | {"cond": environment.observe(made.terminal)}
        _, given, _, _ = _read(name, teacher, known, teacher_key, told)
        steps = made.valid.shape[1]
        y = _repeated(outcome(made.terminal), steps)

        def log_q(after):
            return predictor.log_prob(guess, y, environment.observe(after), key=predictor_key)

        after = jax.tree.map(lambda s: s[:, 1:], made.states)
        error = terms.log_flow[:, :-1] + terms.log_forward + _on_states(log_q, after)
        error = error - given.log_flow[:, :-1] - given.log_forward - made.log_reward[:, None]
        return _mean_square(error, made.valid, weight), {}

    return loss


def expected_detailed_balance(
    environment: Environment, policy: Policy, chance: Callable[[PyTree], Array]
) -> Loss:
    """Detailed balance where the world answers by chance: flows are expected flows.

    Also known as: EFlowNet, expected flow network.

        the policy's turn:    (log F(s) + log P_F(s' | s) - log F(s'))^2
        chance's turn:        (log F(s) - log sum_s' p(s' | s) F(s'))^2

    F(x) = R(x) at the end. An action is then chosen in proportion to the reward that may be
    expected after it, at all turns to come. The states form a tree, in which each has one parent
    (P_B = 1), and the law of chance is known; flows exist for any such tree and are unique.

    Args:
        environment: What the policy and chance act in, with a log_reward of terminal states.
        policy: The policy.
        chance: state -> [n, A], the log-probabilities of the actions where chance moves, nats, all
            -inf elsewhere. `gflownets.with_chance(policy, chance)` is the policy to draw
            trajectories with.

    Returns:
        A loss of trajectories, a mean over their steps, those of a row by its weight. It needs no
        key; with one, dropout is on. It has no metrics.

    Raises:
        TypeError: At construction for what is no `gflownets.Policy` or `Environment`.
        ValueError: At trace time for entries of the batch that are missing or do not fit.

    References:
        Jiralerspong, Sun, Vucetic, Zhang, Bengio, Gidel, Malkin, *Expected Flow Networks in
            Stochastic Environments and Two-Player Zero-Sum Games*, 2023, arXiv:2310.02779.
    """
    name = _checked("expected_detailed_balance", policy)
    check_noun(name, environment, Environment)
    width = environment.num_actions

    def loss(params, key, batch, frozen=None):
        own_key, children_key = split_key(key, 2)
        made, terms, cond, weight = _read(name, policy, params, own_key, batch)
        before = jax.tree.map(lambda s: s[:, :-1], made.states)
        drawn = _on_states(chance, before).astype(terms.log_flow.dtype)
        check_same_shape(name, "chance", drawn, terms.output.log_forward[:, :-1])
        turn = jnp.any(drawn > -jnp.inf, axis=-1)

        def child_flows(states):
            """log F of all children [n, A], 0 where there is none."""
            n = turn.size
            mask = environment.forward_mask(states)
            action = jnp.where(mask, jnp.arange(width)[None], jnp.argmax(mask, axis=1)[:, None])
            each = jax.tree.map(lambda s: jnp.repeat(s, width, axis=0), states)
            children = environment.step(each, action.reshape(-1))
            conds = _repeated(cond, made.valid.shape[1] * width)
            flow = policy.apply(params, children, conds, key=children_key).log_flow
            ended = ~jnp.any(environment.forward_mask(children), axis=1)
            reward = environment.log_reward(children).astype(flow.dtype)
            flow = jnp.where(ended, jnp.where(ended, reward, 0), flow).reshape(n, width)
            return jnp.where(mask, flow, 0)

        possible = drawn > -jnp.inf
        expected = jnp.where(possible, drawn + _on_states(child_flows, before), -jnp.inf)
        expected = jax.nn.logsumexp(jnp.where(turn[..., None], expected, 0), axis=-1)
        here, after = terms.log_flow[:, :-1], terms.log_flow[:, 1:]
        error = jnp.where(turn, here - expected, here + terms.log_forward - after)
        return _mean_square(error, made.valid, weight), {}

    return loss


def adversarial_trajectory_balance(
    environment: Environment, policy: Policy, first: Callable[[PyTree], Array]
) -> Loss:
    """Trajectory balance of a game of two players, whose rewards are each other's inverse.

    Also known as: AFlowNet, adversarial flow network, the trajectory balance of branch-adjusted
    flows.

        (log Z + sum over turns of the first player of log(n(s) P(s' | s))
               - sum over turns of the second of log(n(s) P(s' | s)) - log R(x))^2

    n(s) is how many moves there are, and R the reward of the first player; the second has 1 / R.
    At the optimum each move is made in proportion to its flow to the mover: a flow is the mean
    over the mover's moves, and that to the other is its inverse. The states form a tree.

    Args:
        environment: The game, with the log_reward of the first player.
        policy: The policy of both players.
        first: state -> [n] bool, whether the first player moves.

    Returns:
        A loss of trajectories, a mean over them. It needs no key; with one, dropout is on. Its
        metrics are {'log_z'}, the log of the flow to the first player at the start, nats.

    Raises:
        TypeError: At construction for what is no `gflownets.Policy` or `Environment`.
        ValueError: At trace time for entries of the batch that are missing or do not fit.

    References:
        Jiralerspong et al., *Expected Flow Networks in Stochastic Environments and Two-Player
            Zero-Sum Games*, 2023, arXiv:2310.02779.
    """
    name = _checked("adversarial_trajectory_balance", policy)
    check_noun(name, environment, Environment)

    def loss(params, key, batch, frozen=None):
        made, terms, _, weight = _read(name, policy, params, key, batch)
        log_z = params["log_z"].astype(terms.log_flow.dtype)
        before = jax.tree.map(lambda s: s[:, :-1], made.states)
        moves = jnp.sum(_on_states(environment.forward_mask, before), axis=-1)
        gains = terms.log_forward + jnp.log(jnp.maximum(moves, 1)).astype(log_z.dtype)
        sign = jnp.where(_on_states(first, before), 1, -1).astype(log_z.dtype)
        total = jnp.sum(jnp.where(made.valid, sign * gains, 0), axis=1)
        return mean_of_rows((log_z + total - made.log_reward) ** 2, weight), {"log_z": log_z}

    return loss


def gflownet_em(policy: Policy, log_joint: Callable[[Params, PyTree, Cond], Array]) -> Loss:
    """Expectation maximization with a GFlowNet for the posterior of a latent that is built.

    Also known as: GFlowNet-EM.

        E: (log F(s_0 | x) + sum_t (log P_F - log P_B) - log p(x, z))^2
        M: -log p(x, z)

    z is the object at the end of a trajectory that the policy drew given x, p the model, whose
    params have a gradient from M alone and the policy's from E alone. With E at 0 the policy draws
    from p(z | x), F(s_0 | x) is p(x), and the gradient of M is that of -log p(x): with exact steps
    it is EM.

    Args:
        policy: The policy, whose condition is x.
        log_joint: (params of the model, terminal states, x) -> [n], log p(x, z), nats.

    Returns:
        A loss of trajectories with 'cond', as `gflownets.rollouts(..., conds=data)` makes them,
        whose params are those of the policy and, in the same dict, 'model'. 'log_reward' is not
        read. It needs no key; with one, dropout is on. Its metrics are {'balance', 'log_joint'},
        the mean of E and minus that of M.

    Raises:
        TypeError: At construction for what is no `gflownets.Policy`.
        ValueError: At trace time for entries of the batch that are missing or do not fit, and for
            params without 'model'.

    References:
        Hu, Malkin, Jain, Everett, Graikos, Bengio, *GFlowNet-EM for Learning Compositional Latent
            Variable Models*, 2023, arXiv:2302.06576.
    """
    name = _checked("gflownet_em", policy)

    def loss(params, key, batch, frozen=None):
        (model,) = take_parts(name, params, "model")
        made, terms, cond, weight = _read(name, policy, params, key, batch)
        joint = log_joint(model, made.terminal, cond).astype(terms.log_flow.dtype)
        check_rows(name, "log_joint", joint, made.valid.shape[0])
        balance = terms.log_flow[:, 0] + _log_ratio(terms) - jax.lax.stop_gradient(joint)
        error, gain = mean_of_rows(balance**2, weight), mean_of_rows(joint, weight)
        return error - gain, {"balance": error, "log_joint": gain}

    return loss


def process_supervision(
    policy: Policy,
    log_flow: Callable[[PyTree], Array],
    objective: Callable[[Policy], Loss] = sub_trajectory_balance,
) -> Loss:
    """An objective of flows where the flows are known: every step is supervised, no flow learned.

    Also known as: Flower, flow-guided tuning, token-level rewards.

        (log F(s_i) + sum_{i<=t<j} (log P_F - log P_B) - log F(s_j))^2,    F given

    for all parts of a trajectory, as `objective` weights them. With the flows of listed items
    (`gflownets.prefix_log_flow`), the probability of a token becomes the share of the reward that
    lies behind it, F(s') / F(s), and items are drawn in proportion to their rewards. A fine-tuning
    adds it to the likelihood of what was chosen (`losses.sum_losses`).

    Args:
        policy: The policy; its own flow is not used.
        log_flow: state -> [n], nats, finite in all states of the batch.
        objective: policy -> loss, one that reads flows, such as `detailed_balance`.

    Returns:
        The loss of `objective`.

    Raises:
        TypeError: At construction for what is no `gflownets.Policy`.

    References:
        Gao, Gao, Fan, Yuan, Shi, He, *Process-Supervised LLM Recommenders via Flow-guided Tuning*,
            2025, arXiv:2503.07377.
    """
    _checked("process_supervision", policy)

    def apply(params, state, cond=None, *, key=None):
        made = policy.apply(params, state, cond, key=key)
        return made._replace(log_flow=log_flow(state).astype(made.log_flow.dtype))

    return objective(Policy(policy.init, apply))
