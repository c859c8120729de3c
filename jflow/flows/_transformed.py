"""`transformed`: any flow behind one more map, such as one onto a bounded support."""

from typing import overload

from jflow._core.checks import check_noun
from jflow._core.keys import split_key
from jflow.flows._flow import elbo_flow, flow
from jflow.types import Bijector, Distribution, ElboFlow, Flow, Transport

__all__ = ["transformed"]


@overload
def transformed(model: Flow, onto: Bijector) -> Flow: ...
@overload
def transformed(model: ElboFlow, onto: Bijector | Transport) -> ElboFlow: ...
@overload
def transformed(model: Flow | ElboFlow, onto: Transport) -> ElboFlow: ...
@overload
def transformed(model: Flow | ElboFlow, onto: Bijector | Transport) -> Flow | ElboFlow: ...
def transformed(model: Flow | ElboFlow, onto: Bijector | Transport) -> Flow | ElboFlow:
    """Any flow behind one more map, such as one onto the support of bounded data.

        log p(x) = log p_model(y) + log |det dy/dx|,    y = inverse(x) of `onto`,

    in nats, [b], and -inf outside the support. `init` maps its batch first, so that what the recipe
    standardizes are the unbounded numbers y. A velocity for `flows.cnf` that is trained by flow
    matching is trained on y, onto.inverse(params['bijector'], x)[0].

    Also known as: transformed distribution, constrained support, bounded data, support.

    Args:
        model: the flow: a recipe, `flow`, `cnf`, or an `ElboFlow`.
        onto: the map, `forward` from what the flow models to the data: one of
            `bijectors.supports`, or any `Bijector` or `Transport`.

    Returns:
        Flow: the flow of x, with params {'bijector', 'base'}, where 'base' holds those of `model`;
            an `ElboFlow` if the model is one or `onto` is a `Transport`, such as
            `bijectors.supports.integers`. `forward` and `inverse` are those of both.

    Raises:
        TypeError: model is not a `Flow` or an `ElboFlow`, or onto not a `Bijector` or a
            `Transport`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import flows
        >>> from jflow.bijectors import supports
        >>> onto = supports.columns(supports.positive(), supports.interval(0, 1))
        >>> model = flows.transformed(flows.real_nvp((2,), depth=2, hidden=(8,)), onto)
        >>> x = jnp.array([[1.0, 0.2], [50.0, 0.5], [7.0, 0.9]])  # incomes and shares
        >>> params = model.init(jax.random.key(0), x)
        >>> bool(jnp.all(model.sample(params, jax.random.key(1), 8) > 0))
        True
        >>> model.log_prob(params, jnp.array([[1.0, 1.5]])).tolist()
        [-inf]
    """
    check_noun("transformed", model, Flow, ElboFlow)
    check_noun("transformed", onto, Bijector, Transport)
    if isinstance(model, Flow) and isinstance(onto, Bijector):
        outer = flow(onto, model)
        return outer._replace(
            sample_and_log_prob=_sample_and_log_prob(model, outer), **_both(model, outer)
        )
    log_prob = model.elbo if isinstance(model, ElboFlow) else model.log_prob
    bound = elbo_flow(onto, Distribution(model.init, log_prob, model.sample))
    return bound._replace(**_both(model, bound))


def _both(model, outer):
    """Both directions of both maps, where those of `outer` end at what `model` models."""

    def forward(params, z, cond=None, *, key=None):
        key_model, key_onto = split_key(key, 2)
        y, log_det = model.forward(params["base"], z, cond, key=key_model)
        x, log_det_onto = outer.forward(params, y, cond, key=key_onto)
        return x, log_det + log_det_onto

    def inverse(params, x, cond=None, *, key=None):
        key_onto, key_model = split_key(key, 2)
        y, log_det_onto = outer.inverse(params, x, cond, key=key_onto)
        z, log_det = model.inverse(params["base"], y, cond, key=key_model)
        return z, log_det + log_det_onto

    return {"forward": forward, "inverse": inverse}


def _sample_and_log_prob(model, outer):
    def sample_and_log_prob(params, key, n, cond=None):
        y, log_prob = model.sample_and_log_prob(params["base"], key, n, cond)
        x, log_det = outer.forward(params, y, cond)
        return x, log_prob - log_det

    return sample_and_log_prob
