"""Energy-based flow policies: one flow is a policy, its action value and its soft value."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

from jflow._core.arrays import float_dtype
from jflow._core.checks import (
    check_cond,
    check_draws,
    check_key,
    check_noun,
    check_params,
    check_rows,
    count_rows,
)
from jflow._core.linen import apply_linen, check_linen, init_linen
from jflow._core.nouns import base_log_prob, sample_source
from jflow.types import Array, Bijector, Distribution, Params

__all__ = ["SoftPolicy", "soft_policy"]


class SoftPolicy(NamedTuple):
    """The functions of `soft_policy`; the cond is the state, a pytree of [b, ...].

    Attributes:
        init: `init(key, x, cond) -> params` with {'bend', 'linear', 'base', 'shift'}; x actions
            [b, *event].
        log_prob: `log_prob(params, x, cond) -> [b]`, log pi(x given cond), nats.
        sample: `sample(params, key, n, cond) -> [n, *event]`, actions of the policy.
        action_value: `action_value(params, x, cond) -> [b]`, Q, in units of reward.
        value: `value(params, cond) -> [b]`, V, in units of reward.
        push: `push(params, z, cond) -> [b, *event]`, the action of z. z = 0, the mode of a normal
            base, has the action of the largest Q where the bend has a constant log_det.
    """

    init: Callable[..., Params]
    log_prob: Callable[..., Array]
    sample: Callable[..., Array]
    action_value: Callable[..., Array]
    value: Callable[..., Array]
    push: Callable[..., Array]


def soft_policy(
    bend: Bijector,
    linear: Bijector,
    base: Distribution,
    temperature: float,
    shift: nn.Module | None = None,
) -> SoftPolicy:
    """A flow as a policy of maximum-entropy reinforcement learning, with its values.

    An action is x = bend(linear(z)), z from the base, both maps told the state s. The log-det of
    `linear`, which does not depend on z, is the normalizer of an energy:

        Q(s, x) = a (log p_base(z) + log |det d bend^-1 / dx|) + b(s),
        V(s) = -a log |det linear^-1 (s)| + b(s) = a log integral exp(Q(s, x) / a) dx,
        log pi(x given s) = (Q(s, x) - V(s)) / a,

    with the temperature a: actor, critic and soft value are one flow, V is exact without an
    integral or samples, and `losses.soft_bellman` trains all three. The shift b(s) of the rewards
    leaves the policy as it is, and spares the scale of `linear` the size of the returns.

    Actions want a bounded box, by `bijectors.supports.interval(-1, 1)` as the last map of the
    bend: where rewards do not depend on actions, the entropy of the reals has no maximum.

    Also known as: MEow, energy-based normalizing flow policy, EBFlow, soft actor-critic.

    Args:
        bend: a conditional map with any log-det, such as a chain of couplings.
        linear: a conditional map whose log-det depends on the state alone, such as
            `amortized(affine(event))`.
        base: the law of z, such as `distributions.normal`.
        temperature: a, positive, in units of reward per nat.
        shift: a Linen module of the state, a number for each row [b] or [b, 1]; None is 0.

    Returns:
        SoftPolicy: init, log_prob, sample, action_value, value and push.

    Raises:
        TypeError: bend or linear is no `Bijector`, base no `Distribution`, or shift no module.
        ValueError: temperature is not positive; in `init`, the log-det of `linear` depends on z; at
            the call, there is no cond.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, distributions, flows
        >>> linear = bijectors.amortized(bijectors.affine((1,)))
        >>> policy = flows.soft_policy(bijectors.chain(), linear, distributions.normal((1,)), 0.5)
        >>> state, action = jnp.ones((1, 2)), jnp.zeros((1, 1))
        >>> params = policy.init(jax.random.key(0), action, state)
        >>> q, v = policy.action_value(params, action, state), policy.value(params, state)
        >>> bool(jnp.allclose(q - v, 0.5 * policy.log_prob(params, action, state)))
        True

    References:
        Chao, Feng, Sun, Lee, See, Lee, *Maximum Entropy Reinforcement Learning via Energy-Based
            Normalizing Flow*, 2024, arXiv:2405.13629.
    """
    check_noun("soft_policy", bend, Bijector)
    check_noun("soft_policy", linear, Bijector)
    check_noun("soft_policy", base, Distribution)
    if not temperature > 0:
        raise ValueError(f"soft_policy: expected temperature > 0, got {temperature}")
    if shift is not None:
        check_linen("soft_policy", "shift", shift)

    def state(cond, n):
        if cond is None:
            raise ValueError("soft_policy: expected the state as cond, got None")
        return check_cond("soft_policy", cond, n)

    def init(key, x, cond):
        check_key("soft_policy.init", key)
        cond = state(cond, count_rows("soft_policy", x))
        keys = jax.random.split(key, 4)
        params = {"bend": bend.init(keys[0], x, cond)}
        y, _ = bend.inverse(params["bend"], x, cond)
        params["linear"] = linear.init(keys[1], y, cond)

        def normalizer(y):
            return linear.inverse(params["linear"], y, cond)[1]

        jaxpr = jax.make_jaxpr(normalizer)(y).jaxpr
        if any(dce_jaxpr(jaxpr, [True])[1]):
            raise ValueError(
                "soft_policy: expected a linear map, whose log_det does not depend on z, such as"
                " bijectors.amortized(bijectors.affine(event)); the others belong to the bend"
            )
        z, _ = linear.inverse(params["linear"], y, cond)
        shifts = {} if shift is None else init_linen(shift, keys[3], cond)
        return {**params, "base": base.init(keys[2], z, cond), "shift": shifts}

    def shifted(params, value, cond):
        if shift is None:
            return value
        b = apply_linen(shift, params["shift"], cond).astype(value.dtype)
        b = b[:, 0] if b.ndim == 2 and b.shape[1] == 1 else b
        return value + check_rows("soft_policy", "shift", b, len(value))

    def pull(params, x, cond):
        check_params("soft_policy", params, "bend", "linear", "base", "shift")
        cond = state(cond, count_rows("soft_policy", x))
        y, bent = bend.inverse(params["bend"], x, cond)
        z, scaled = linear.inverse(params["linear"], y, cond)
        return base_log_prob("soft_policy", base, params, z, cond, None) + bent, scaled, cond

    def log_prob(params, x, cond):
        energy, scaled, _ = pull(params, x, cond)
        return energy + scaled

    def action_value(params, x, cond):
        energy, _, cond = pull(params, x, cond)
        return shifted(params, temperature * energy, cond)

    def value(params, cond):
        n = count_rows("soft_policy", cond)
        like = [*jax.tree.leaves(params["linear"]), *jax.tree.leaves(cond)][0]
        shape = jax.eval_shape(lambda: base.sample(params["base"], jax.random.key(0), 1)).shape[1:]
        y = jnp.zeros_like(like, shape=(n, *shape), dtype=float_dtype(like))
        return shifted(params, -temperature * linear.inverse(params["linear"], y, cond)[1], cond)

    def push(params, z, cond):
        cond = state(cond, count_rows("soft_policy", z))
        y, _ = linear.forward(params["linear"], z, cond)
        return bend.forward(params["bend"], y, cond)[0]

    def sample(params, key, n, cond):
        n, cond = check_draws("soft_policy.sample", key, n, state(cond, n))
        return push(params, sample_source(base, params, key, n, cond), cond)

    return SoftPolicy(init, log_prob, sample, action_value, value, push)
