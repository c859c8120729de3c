"""Objectives of GFlowNets: what a policy that draws objects in proportion to their rewards obeys.

All are 0 for exact flows, on whatever trajectories (but for the part of LED that trains its
potential), so that these may be drawn by the policy, by a more curious one, or backwards from given
objects:

    environment = gflownets.hypergrid(3, 8)
    policy = gflownets.mlp_policy(environment)
    batches = gflownets.rollouts(environment, policy, 16, epsilon=0.05)
    state = train.init_state(policy.init(key), optimizer, train_key)
    train.fit(state, train.make_step(losses.trajectory_balance(policy), optimizer), batches, ...)

A batch is a dict of

    'states', 'action', 'backward_action', 'valid', 'log_reward'    see gflownets.Trajectories
    'cond', 'weight' [n]                                            optional

Of 'states' the last is terminal. In formulas F is the flow through a state, with F(x) = R(x) at the
terminal state x, and P_F and P_B are the forward and the backward policy; logarithms are natural.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, filled
from jflow._core.batch import check_keys, mean_of_rows
from jflow._core.checks import check_cond, check_noun, need_key
from jflow._core.keys import split_key
from jflow.gflownets import Environment, Policy, Trajectories, TrajectoryTerms, evaluate
from jflow.types import Array, Field, Key, Loss, Params, PyTree, Velocity

__all__ = [
    "detailed_balance",
    "forward_looking",
    "gfn_flow_matching",
    "learned_energy_decomposition",
    "log_partition_variance",
    "modified_detailed_balance",
    "sub_trajectory_balance",
    "trajectory_balance",
]


def trajectory_balance(policy: Policy) -> Loss:
    """Trajectory balance: whole trajectories, against one learned number, the total reward.

    Also known as: TB.

        (log Z + sum_t log P_F(s_{t+1} | s_t) - log R(x) - sum_t log P_B(s_t | s_{t+1}))^2

    log Z is `params['log_z']`. It wants a learning rate of its own, about 0.1 (`optax.partition`).

    Args:
        policy: The policy.

    Returns:
        A loss of trajectories, a mean over them. It needs no key; with one, dropout is on. Its
        metrics are {'log_z'}.

    Raises:
        TypeError: At construction for what is no `gflownets.Policy`.
        ValueError: At trace time for entries of the batch that are missing or do not fit.

    Examples:
        >>> import jax
        >>> from jflow import gflownets, losses
        >>> grid = gflownets.hypergrid(1, 2, lambda position: 0.0 * position[:, 0])
        >>> policy = gflownets.mlp_policy(grid, (8,))
        >>> params = policy.init(jax.random.key(0)) | {"log_z": jax.numpy.log(2.0)}
        >>> batch = gflownets.rollout(grid, policy, params, jax.random.key(1), 4)._asdict()
        >>> round(float(losses.trajectory_balance(policy)(params, None, batch)[0]), 6)
        0.0

    References:
        Malkin, Jain, Bengio, Sun, Bengio, *Trajectory Balance: Improved Credit Assignment in
            GFlowNets*, 2022, arXiv:2201.13259.
    """
    name = _checked("trajectory_balance", policy)

    def loss(params, key, batch, frozen=None):
        made, terms, cond, weight = _read(name, policy, params, key, batch)
        log_z = params["log_z"].astype(terms.log_flow.dtype)
        error = log_z + _log_ratio(terms) - made.log_reward
        return mean_of_rows(error**2, weight), {"log_z": log_z}

    return loss


def log_partition_variance(policy: Policy) -> Loss:
    """The variance of what trajectory balance says log Z is, so that nothing else has to learn it.

    Also known as: VarGrad, log-variance loss, the log-partition variance loss.

        mean of (z - mean of z)^2,    z = log R(x) + sum_t log P_B - sum_t log P_F

    The means are over the rows of the batch, by their weights, so that rows with different
    conditions, whose total rewards differ, must not share one. The gradient is the same whether or
    not it goes through the inner mean.

    Args:
        policy: The policy.

    Returns:
        A loss of trajectories. It needs no key; with one, dropout is on. Its metrics are {'log_z'},
        the mean of z, a lower bound of log Z on average where the policy drew the rows.

    Raises:
        TypeError: At construction for what is no `gflownets.Policy`.
        ValueError: At trace time for entries of the batch that are missing or do not fit.

    References:
        Richter, Boustati, Nuesken, Ruiz, Akyildiz, *VarGrad: A Low-Variance Gradient Estimator for
            Variational Inference*, 2020, arXiv:2010.10436.
        Zhang, Rainone, Peschl, Bondesan, *Robust Scheduling with GFlowNets*, 2023,
            arXiv:2302.05446.
    """
    name = _checked("log_partition_variance", policy)

    def loss(params, key, batch, frozen=None):
        made, terms, cond, weight = _read(name, policy, params, key, batch)
        z = made.log_reward - _log_ratio(terms)
        mean = mean_of_rows(z, weight)
        return mean_of_rows((z - mean) ** 2, weight), {"log_z": mean}

    return loss


def detailed_balance(policy: Policy) -> Loss:
    """Detailed balance: one step at a time.

    Also known as: DB.

        (log F(s) + log P_F(s' | s) - log F(s') - log P_B(s | s'))^2

    Args:
        policy: The policy. The log of its flow at the initial state is its log Z.

    Returns:
        A loss of trajectories, a mean over their steps, those of a row by its weight. It needs no
        key; with one, dropout is on. It has no metrics.

    Raises:
        TypeError: At construction for what is no `gflownets.Policy`.
        ValueError: At trace time for entries of the batch that are missing or do not fit.

    References:
        Bengio, Lahlou, Deleu, Hu, Tiwari, Bengio, *GFlowNet Foundations*, 2021, arXiv:2111.09266.
    """
    name = _checked("detailed_balance", policy)

    def loss(params, key, batch, frozen=None):
        made, terms, cond, weight = _read(name, policy, params, key, batch)
        return _mean_square(_balance(terms, terms.log_flow), made.valid, weight), {}

    return loss


def sub_trajectory_balance(policy: Policy, *, decay: float = 0.9) -> Loss:
    """Sub-trajectory balance: all parts of a trajectory, the longer ones counting less.

    Also known as: SubTB, SubTB(lambda).

        sum_{i<j} decay^(j-i) (log F(s_i) + sum_{i<=t<j} (log P_F - log P_B) - log F(s_j))^2
        ------------------------------------------------------------------------------------
                                  sum_{i<j} decay^(j-i)

    for each trajectory, 0 <= i < j <= its length. A decay towards 0 is detailed balance, the mean
    over the steps of each trajectory. All T (T + 1) / 2 parts cost a table of T^2 numbers a row:
    the error of a part is u_i - u_j, with u_i = log F(s_i) - sum_{t<i} (log P_F - log P_B).

    Args:
        policy: The policy. The log of its flow at the initial state is its log Z.
        decay: The lambda of the paper, in (0, 1].

    Returns:
        A loss of trajectories, a mean over them. It needs no key; with one, dropout is on. It has
        no metrics.

    Raises:
        TypeError: At construction for what is no `gflownets.Policy`.
        ValueError: At construction for a decay outside (0, 1]; at trace time for entries of the
            batch that are missing or do not fit.

    References:
        Madan, Rector-Brooks, Korablyov, Bengio, Jain, Nica, Bosc, Bengio, Malkin, *Learning
            GFlowNets from Partial Episodes for Improved Convergence and Stability*, 2022,
            arXiv:2209.12782.
    """
    name = _checked("sub_trajectory_balance", policy)
    if not 0 < decay <= 1:
        raise ValueError(f"{name}: expected decay in (0, 1], got {decay}")

    def loss(params, key, batch, frozen=None):
        made, terms, cond, weight = _read(name, policy, params, key, batch)
        steps = jnp.cumsum(terms.log_forward - terms.log_backward, axis=1)
        u = terms.log_flow - jnp.pad(steps, ((0, 0), (1, 0)))
        points = jnp.arange(u.shape[1])
        length = points[None, :] - points[:, None]  # [i, j]
        each = jnp.where(length > 0, jnp.power(decay, length.astype(u.dtype)), 0)
        reached = jnp.pad(made.valid, ((0, 0), (1, 0)), constant_values=True)  # up to the end
        share = each[None] * reached[:, None, :]
        errors = jnp.sum(share * (u[:, :, None] - u[:, None, :]) ** 2, axis=(1, 2))
        return mean_of_rows(errors / jnp.sum(share, axis=(1, 2)), weight), {}

    return loss


def modified_detailed_balance(environment: Environment, policy: Policy) -> Loss:
    """Detailed balance where a trajectory can stop in every state, without a flow to learn.

    Also known as: MDB, detailed balance of DAG-GFlowNet.

        (log R(s) + log P_F(s' | s) + log P_F(stop | s')
         - log R(s') - log P_B(s | s') - log P_F(stop | s))^2

    F(s) P_F(stop | s) is R(s), which gives the flow. Steps that stop are left out.

    Args:
        environment: One with a `stop` that is allowed in every state that is not terminal, whose
            log_reward is that of the object which a stop there makes.
        policy: The policy; the log of its flow has no gradient.

    Returns:
        A loss of trajectories, a mean over their steps, those of a row by its weight. It needs no
        key; with one, dropout is on. It has no metrics.

    Raises:
        TypeError: At construction for what is no `gflownets.Policy` or `Environment`.
        ValueError: At construction for an environment without a stop; at trace time for entries of
            the batch that are missing or do not fit.

    References:
        Deleu, Gois, Emezue, Rankawat, Lacoste-Julien, Bauer, Bengio, *Bayesian Structure Learning
            with Generative Flow Networks*, 2022, arXiv:2202.13903.
    """
    name = _checked("modified_detailed_balance", policy)
    check_noun(name, environment, Environment)
    stop = environment.stop
    if stop is None:
        raise ValueError(f"{name}: expected an environment with a stop action, got stop=None")

    def loss(params, key, batch, frozen=None):
        made, terms, cond, weight = _read(name, policy, params, key, batch)
        log_reward = _on_states(environment.log_reward, made.states)
        stopping = _inner(terms.output.log_forward[:, :, stop], made.valid)
        log_flow = log_reward.astype(stopping.dtype) - stopping
        steps = made.valid & (made.action != stop)
        return _mean_square(_balance(terms, log_flow), steps, weight), {}

    return loss


def forward_looking(
    policy: Policy,
    log_reward: Callable[[PyTree], Array],
    objective: Callable[[Policy], Loss] = detailed_balance,
) -> Loss:
    """An objective of flows where the reward of what is built so far is known, and not learned.

    Also known as: FL-GFN, FL-DB, FL-SubTB.

        log F(s) = log F'(s) + log R(s),    the policy's log_flow is log F'

    R is any positive function of a state that is not terminal; at a terminal state, where F is the
    reward, log F' is 0. It helps where the reward is gathered along the way.

    Args:
        policy: The policy, whose flow is read as F'.
        log_reward: state -> [n], nats, such as the log_reward of an environment that has it for all
            states.
        objective: policy -> loss, `detailed_balance` or `sub_trajectory_balance`, one that reads
            flows.

    Returns:
        The loss of `objective`.

    Raises:
        TypeError: At construction for what is no `gflownets.Policy`.

    References:
        Pan, Malkin, Zhang, Bengio, *Better Training of GFlowNets with Local Credit and Incomplete
            Trajectories*, 2023, arXiv:2302.01687.
    """
    _checked("forward_looking", policy)

    def apply(params, state, cond=None, *, key=None):
        made = policy.apply(params, state, cond, key=key)
        return made._replace(log_flow=made.log_flow + log_reward(state).astype(made.log_flow.dtype))

    return objective(Policy(policy.init, apply))


def learned_energy_decomposition(
    environment: Environment, policy: Policy, potential: Field | Velocity, *, keep: float = 0.9
) -> Loss:
    """Detailed balance with a reward that is spread over the steps by a network that learns it.

    Also known as: LED-GFN.

        (log F'(s) + log P_F(s' | s) - log F'(s') - log P_B(s | s') - sg(p(s, s')))^2, mean of steps
        + ((L / sum_t m_t) sum_t m_t q(s_t, s_{t+1}) - log R(x))^2,    m_t ~ Bernoulli(keep)

    q is the potential of a step, L the length of the trajectory, and p is q with the same number
    added to all steps of a trajectory, so that they add up to log R(x): the optimum is exact
    whatever q is. The policy's log_flow is log F', 0 at terminal states. That some steps are left
    out keeps the potential even along a trajectory. A trajectory of which no step was kept does not
    count in the second part. No gradient of the first part reaches the potential.

    Args:
        environment: What the policy acts in.
        policy: The policy.
        potential: A network of observations with an output [n, A], the potential of each action;
            its time is always 0.
        keep: The probability of a step to be kept, in (0, 1]; the default is ours.

    Returns:
        A loss of trajectories, whose params are those of the policy and, in the same dict,
        'potential'. Its metrics are {'balance', 'decomposition'}, the two parts.

    Raises:
        TypeError: At construction for what is no `gflownets.Policy`, `Environment` or `Field`.
        ValueError: At construction for `keep` outside (0, 1]; at trace time for entries of the
            batch that are missing or do not fit, and without a key.

    References:
        Jang, Kim, Ahn, *Learning Energy Decompositions for Partial Inference of GFlowNets*, 2023,
            arXiv:2310.03301.
    """
    name = _checked("learned_energy_decomposition", policy)
    check_noun(name, environment, Environment)
    check_noun(name, potential, Field, Velocity)
    if not 0 < keep <= 1:
        raise ValueError(f"{name}: expected keep in (0, 1], got {keep}")

    def loss(params, key, batch, frozen=None):
        keep_key, policy_key, potential_key = split_key(need_key(name, key), 3)
        made, terms, cond, weight = _read(name, policy, params, policy_key, batch)

        def potentials(states):
            x = environment.observe(states)
            n = x.shape[0]
            each = _repeated(cond, made.valid.shape[1] + 1)
            t = jnp.zeros_like(x, shape=n)
            q = potential.apply(params["potential"], x, t, each, key=potential_key)
            if q.shape != (n, environment.num_actions):
                raise ValueError(
                    f"{name}: expected a potential of shape {[n, environment.num_actions]}, got"
                    f" {list(q.shape)}"
                )
            return q.astype(terms.log_flow.dtype)

        q = _on_states(potentials, made.states)[:, :-1]
        q = jnp.take_along_axis(q, made.action[..., None], axis=-1)[..., 0]
        q = jnp.where(made.valid, q, 0)
        length = jnp.sum(made.valid, axis=1).astype(q.dtype)
        kept = made.valid & jax.random.bernoulli(keep_key, keep, q.shape)
        count = jnp.sum(kept, axis=1).astype(q.dtype)
        total = length / jnp.maximum(count, 1) * jnp.sum(jnp.where(kept, q, 0), axis=1)
        misfit = jnp.where(count > 0, total - made.log_reward, 0)
        decomposition = mean_of_rows(misfit**2, weight)

        missing = (made.log_reward - jnp.sum(q, axis=1)) / jnp.maximum(length, 1)
        p = jax.lax.stop_gradient(q + missing[:, None])
        learned = _inner(terms.output.log_flow, made.valid)
        balance = _mean_square(_balance(terms, learned) - p, made.valid, weight)
        return balance + decomposition, {"balance": balance, "decomposition": decomposition}

    return loss


def gfn_flow_matching(environment: Environment, policy: Policy) -> Loss:
    """Flow matching of a GFlowNet: what flows into a state flows out of it.

    Also known as: FM; not the `flow_matching` of velocities.

        (log sum_{s -> s'} F(s) P_F(s' | s) - log F(s'))^2    for all states s' but the initial one

    The flow along an edge is that of the policy, F(s) P_F(a | s), so that a network of one logit
    for each edge is one whose log_flow is the log of the sum over them. The policy is evaluated in
    all parents of every state, B times as often as by the other objectives.

    Args:
        environment: What the policy acts in.
        policy: The policy; its backward policy has no gradient.

    Returns:
        A loss of trajectories, a mean over their states, those of a row by its weight. It needs no
        key; with one, dropout is on. It has no metrics.

    Raises:
        TypeError: At construction for what is no `gflownets.Policy` or `Environment`.
        ValueError: At trace time for entries of the batch that are missing or do not fit.

    References:
        Bengio, Jain, Korablyov, Precup, Bengio, *Flow Network based Generative Models for
            Non-Iterative Diverse Candidate Generation*, 2021, arXiv:2106.04399.
    """
    name = _checked("gfn_flow_matching", policy)
    check_noun(name, environment, Environment)
    width = environment.num_backward_actions

    def loss(params, key, batch, frozen=None):
        own_key, parents_key = split_key(key, 2)
        made, terms, cond, weight = _read(name, policy, params, own_key, batch)

        def inflow(states):
            mask = environment.backward_mask(states)
            n, exists = mask.shape[0], mask.reshape(-1)
            after = jax.tree.map(lambda s: jnp.repeat(s, width, axis=0), states)
            undo = jnp.tile(jnp.arange(width), n)
            parents = jax.tree.map(
                lambda a, b: jnp.where(expand_to(exists, b), a, b),
                environment.back(after, undo),
                after,
            )
            each = _repeated(cond, made.valid.shape[1] * width)
            output = policy.apply(params, parents, each, key=parents_key)
            action = jnp.where(exists, environment.forward_action(after, undo), 0)
            log_p = jnp.take_along_axis(output.log_forward, action[:, None], axis=1)[:, 0]
            edges = jnp.where(exists, output.log_flow + log_p, -jnp.inf).reshape(n, width)
            edges = jnp.where(jnp.any(mask, axis=1, keepdims=True), edges, 0)
            return jax.nn.logsumexp(edges, axis=1)

        after = jax.tree.map(lambda s: s[:, 1:], made.states)
        error = _on_states(inflow, after) - terms.log_flow[:, 1:]
        return _mean_square(error, made.valid, weight), {}

    return loss


def _checked(name: str, policy: Policy) -> str:
    check_noun(name, policy, Policy)
    return name


def _read(
    name: str, policy: Policy, params: Params, key: Key | None, batch
) -> tuple[Trajectories, TrajectoryTerms, PyTree, Array | None]:
    """(trajectories, what the policy says of them, cond, weight) of a batch."""
    check_keys(name, batch, (*Trajectories._fields, "cond", "weight"))
    if missing := [entry for entry in Trajectories._fields if batch.get(entry) is None]:
        raise ValueError(
            f"{name}: expected a batch of trajectories, as gflownets.rollouts makes it, got one"
            f" without {missing}"
        )
    given = {entry: jax.tree.map(jnp.asarray, batch[entry]) for entry in Trajectories._fields}
    made, weight = Trajectories(**given), batch.get("weight")
    if made.valid.ndim != 2:
        raise ValueError(f"{name}: expected 'valid' [n, T], got {list(made.valid.shape)}")
    n, steps = made.valid.shape
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = [
        ("action", made.action.shape, (n, steps)),
        ("backward_action", made.backward_action.shape, (n, steps)),
        ("log_reward", made.log_reward.shape, (n,)),
        *(("states", s.shape[:2], (n, steps + 1)) for s in jax.tree.leaves(made.states)),
    ]
    if weight is not None:
        shapes.append(("weight", jnp.shape(weight), (n,)))
    for entry, shape, expected in shapes:
        if shape != expected:
            raise ValueError(
                f"{name}: expected {entry!r} of shape {list(expected)}, got {list(shape)}"
            )
    cond = jax.tree.map(jnp.asarray, check_cond(name, batch.get("cond"), n))
    weight = None if weight is None else jnp.asarray(weight)
    made, cond = filled(None if weight is None else weight != 0, (made, cond))
    terms = evaluate(policy, params, made, cond, key=key)
    made = made._replace(log_reward=made.log_reward.astype(terms.log_flow.dtype))
    return made, terms, cond, weight


def _log_ratio(terms: TrajectoryTerms) -> Array:
    """log P_F - log P_B of whole trajectories [n]."""
    return jnp.sum(terms.log_forward - terms.log_backward, axis=1)


def _balance(terms: TrajectoryTerms, log_flow: Array) -> Array:
    """The error of detailed balance in each step [n, T]."""
    return log_flow[:, :-1] + terms.log_forward - log_flow[:, 1:] - terms.log_backward


def _mean_square(errors: Array, steps: Array, weight: Array | None) -> Array:
    """The mean of errors^2 [n, T] over the steps that count, those of a row by its weight."""
    each = steps.astype(errors.dtype)
    each = each if weight is None else each * weight.astype(errors.dtype)[:, None]
    squares = jnp.where(steps, errors, 0) ** 2
    return mean_of_rows(squares.reshape(-1), each.reshape(-1))


def _inner(values: Array, valid: Array) -> Array:
    """values [n, T + 1] of the states that a step leaves, 0 in the terminal ones."""
    return jnp.where(jnp.pad(valid, ((0, 0), (0, 1))), values, 0)


def _on_states(function, states: PyTree) -> Array:
    """function, of states with arrays [m, ...], on arrays [n, T, ...]: [n, T, ...]."""
    lead = jax.tree.leaves(states)[0].shape[:2]
    values = function(jax.tree.map(lambda s: s.reshape(lead[0] * lead[1], *s.shape[2:]), states))
    return values.reshape(*lead, *values.shape[1:])


def _repeated(cond: PyTree, times: int) -> PyTree:
    """Each row of cond, for so many states."""
    return jax.tree.map(lambda c: jnp.repeat(c, times, axis=0), cond)
