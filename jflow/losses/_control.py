"""Control by flows: the soft Bellman residual of a policy, and imitation by a ratio of flows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow._core.batch import mean_of_rows, read_batch
from jflow._core.checks import (
    check_batch,
    check_cond,
    check_noun,
    check_params,
    check_rows,
    check_same_shape,
    check_weights,
    frozen_entry,
)
from jflow._core.keys import split_key
from jflow.flows import SoftPolicy
from jflow.types import Array, Distribution, Flow, Key, Loss, Params

__all__ = ["coupled_flows", "coupled_log_ratio", "soft_bellman"]


def soft_bellman(policy: SoftPolicy, discount: float = 0.99) -> Loss:
    """The squared soft Bellman residual of an energy-based flow policy.

        (Q(s, a) - r - discount (1 - done) V_ema(s'))^2

    With `flows.soft_policy` it is all of maximum-entropy reinforcement learning: the V of the
    target needs no samples of the policy, which needs no step of its own. The target is that of
    the averaged params, frozen['ema'] (`ema` of `train.make_step`).

    Also known as: MEow loss, soft Q-learning, maximum-entropy reinforcement learning.

    Args:
        policy: The `flows.soft_policy`, whose params the loss takes.
        discount: The weight of the next value, in [0, 1].

    Returns:
        A loss of the batch {'x' actions [b, *event], 'cond' states [b, ...], 'next' the states
        after them [b, ...], 'reward' [b], optionally 'done' [b], 1 where the episode ended, and
        'weight' [b]}. The metrics are 'action_value' and 'target', in units of reward.

    Raises:
        TypeError: At construction for what is no `SoftPolicy`.
        ValueError: At construction for a discount that is not in [0, 1]; at trace time for a batch
            without the entries above or with others, for rows that don't match, and without 'ema'
            in frozen.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, distributions, flows, losses
        >>> linear = bijectors.amortized(bijectors.affine((1,)))
        >>> policy = flows.soft_policy(bijectors.chain(), linear, distributions.normal((1,)), 0.5)
        >>> rows = {"x": jnp.zeros((4, 1)), "cond": jnp.ones((4, 2)), "next": jnp.ones((4, 2))}
        >>> params = policy.init(jax.random.key(0), rows["x"], rows["cond"])
        >>> batch = {**rows, "reward": jnp.zeros(4)}
        >>> loss = losses.soft_bellman(policy)
        >>> round(float(loss(params, None, batch, {"ema": params})[0]), 3)  # (log(2 pi) / 4)^2
        0.211

    References:
        Chao, Feng, Sun, Lee, See, Lee, *Maximum Entropy Reinforcement Learning via Energy-Based
            Normalizing Flow*, 2024, arXiv:2405.13629.
    """
    check_noun("soft_bellman", policy, SoftPolicy)
    if not 0 <= discount <= 1:
        raise ValueError(f"soft_bellman: expected a discount in [0, 1], got {discount}")

    def loss(params, key, batch, frozen=None):
        _need("soft_bellman", batch, "cond", "next", "reward")
        names = ("x", "cond", "next", "reward", "done", "weight")
        x, cond, after, reward, done, weight = read_batch("soft_bellman", batch, names)
        n = x.shape[0]
        reward = check_rows("soft_bellman", "'reward'", reward, n)
        goes_on = 1.0 if done is None else 1 - check_rows("soft_bellman", "'done'", done, n)
        after = check_cond("soft_bellman", after, n)
        later = policy.value(frozen_entry("soft_bellman", frozen, "ema"), after)
        target = jax.lax.stop_gradient(reward + discount * goes_on * later)
        q = policy.action_value(params, x, cond)
        return mean_of_rows(jnp.square(q - target), weight), {
            "action_value": mean_of_rows(q, weight),
            "target": mean_of_rows(target, weight),
        }

    return loss


def coupled_log_ratio(
    agent: Flow | Distribution, expert: Flow | Distribution, bound: float = 10.0
) -> Callable[..., Array]:
    """How much likelier rows are under the agent's flow than under the expert's, within a bound.

        ratio(x) = bound tanh((log p_agent(x) - log p_expert(x)) / bound)

    Minus it is the reward of imitation: what the expert does and the agent does not yet. See
    `coupled_flows`.

    Args:
        agent: The flow of what the agent does, such as (state, action) side by side.
        expert: The flow of what the expert does.
        bound: The largest size, in nats, positive.

    Returns:
        A function (params, x, *, key=None) -> [b], nats, with params {'agent', 'expert'}.

    Raises:
        TypeError: For what has no log_prob.
        ValueError: For a bound that is not positive.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, losses
        >>> narrow = distributions.scaled(distributions.normal((1,)), 0.5)
        >>> ratio = losses.coupled_log_ratio(narrow, distributions.normal((1,)))
        >>> round(float(ratio({"agent": {}, "expert": {}}, jnp.zeros((1, 1)))[0]), 3)  # log 2
        0.692

    References:
        Freund, Sarafian, Kraus, *A Coupled Flow Approach to Imitation Learning*, 2023,
            arXiv:2305.00303; the form of the bound is ours.
    """
    check_noun("coupled_log_ratio", agent, Flow, Distribution)
    check_noun("coupled_log_ratio", expert, Flow, Distribution)
    if not bound > 0:
        raise ValueError(f"coupled_log_ratio: expected bound > 0, got {bound}")

    def ratio(params: Params, x: Array, *, key: Key | None = None) -> Array:
        p, q = _log_probs("coupled_log_ratio", agent, expert, params, x, key)
        return bound * jnp.tanh((p - q) / bound)

    return ratio


def coupled_flows(
    agent: Flow | Distribution,
    expert: Flow | Distribution,
    *,
    bound: float = 10.0,
    likelihood: float = 1.0,
) -> Loss:
    """Two flows that are trained for the ratio of their densities, for imitation learning.

        -(mean ratio(x) - log mean exp ratio(x_expert))
            - likelihood (mean log p_agent(x) + mean log p_expert(x_expert)),

    with the ratio of `coupled_log_ratio`, at the agent's rows x and the expert's. The first line
    is minus the Donsker-Varadhan bound of KL(agent, expert), whose best ratio is that of the
    densities: each flow is also right where the other one's rows are, which likelihood alone does
    not ask for. Then the agent learns with the reward -ratio(x), and the flows go on.

    Also known as: CFIL, coupled flow imitation learning, Donsker-Varadhan bound.

    Args:
        agent: The flow of the agent's rows.
        expert: The flow of the expert's rows.
        bound: The largest size of the ratio, in nats.
        likelihood: The weight of the two likelihoods, at least 0.

    Returns:
        A loss of the batch {'x' [b, *event], the agent's rows, 'expert' [b, *event], optionally
        'weight' [b], of both}, with params {'agent', 'expert'}. The metric 'kl' is the bound, in
        nats.

    Raises:
        TypeError: At construction for what has no log_prob.
        ValueError: At construction for a bound that is not positive or a negative likelihood; at
            trace time for a batch without 'x' or 'expert', with other entries, or of shapes that
            don't match.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, losses
        >>> normal = distributions.normal((1,))
        >>> loss = losses.coupled_flows(normal, normal, likelihood=0.0)
        >>> batch = {"x": jnp.zeros((4, 1)), "expert": jnp.ones((4, 1))}
        >>> value, metrics = loss({"agent": {}, "expert": {}}, None, batch)
        >>> float(metrics["kl"])
        0.0

    References:
        Freund, Sarafian, Kraus, *A Coupled Flow Approach to Imitation Learning*, 2023,
            arXiv:2305.00303.
        Donsker, Varadhan, *Asymptotic evaluation of certain Markov process expectations for large
            time, IV*, 1983.
    """
    check_weights("coupled_flows", likelihood=likelihood)
    coupled_log_ratio(agent, expert, bound)  # its checks

    def loss(params, key, batch, frozen=None):
        _need("coupled_flows", batch, "expert")
        x, other, weight = read_batch("coupled_flows", batch, ("x", "expert", "weight"))
        check_same_shape("coupled_flows", "'expert'", other, x)
        key_x, key_other = split_key(key, 2)
        at_x = _log_probs("coupled_flows", agent, expert, params, x, key_x)
        at_other = _log_probs("coupled_flows", agent, expert, params, other, key_other)
        ratio, ratio_other = (bound * jnp.tanh((p - q) / bound) for p, q in (at_x, at_other))
        largest = jax.lax.stop_gradient(jnp.max(ratio_other, initial=-bound))
        mean_exp = mean_of_rows(jnp.exp(ratio_other - largest), weight)
        kl = mean_of_rows(ratio, weight) - jnp.log(mean_exp) - largest
        fit = mean_of_rows(at_x[0], weight) + mean_of_rows(at_other[1], weight)
        return -kl - likelihood * fit, {"kl": kl}

    return loss


def _log_probs(name, agent, expert, params, x, key):
    check_params(name, params, "agent", "expert")
    keys = split_key(key, 2)
    return tuple(
        check_rows(name, "log_prob", flow.log_prob(params[who], x, key=own), len(x))
        for who, flow, own in zip(("agent", "expert"), (agent, expert), keys, strict=True)
    )


def _need(name, batch, *entries):
    check_batch(name, batch)
    if missing := [entry for entry in entries if batch.get(entry) is None]:
        raise ValueError(f"{name}: expected {missing} in batch, got the keys {sorted(batch)}")
