"""A flow as a distribution of NumPyro."""

from typing import Any

import jax

from jflow._core.checks import check_noun
from jflow.types import Cond, Distribution, Flow, Params


def to_numpyro(
    flow: Flow | Distribution,
    params: Params,
    cond: Cond = None,
    *,
    support: tuple[Any, Any] | None = None,
) -> Any:
    """A trained flow as a distribution of NumPyro: a prior or a guide in a model of NumPyro's.

    `sample(key, sample_shape)` gives [*sample_shape, *event] and `log_prob(value)` takes that,
    in nats, both under jit and differentiable. The event shape is that of the flow's samples.

    Args:
        flow: The flow, a distribution, or a posterior at an observation (`apps.sbi`'s
            `Posterior.at`).
        params: Its trained params.
        cond: One condition [1, ...] for everything, or None.
        support: The ends (low, high) of the event's support, which NumPyro's samplers map to the
            reals; None is all reals.

    Returns:
        A `numpyro.distributions.Distribution` of an empty batch shape.

    Raises:
        TypeError: For what is no `Flow` or `Distribution`.
        ImportError: Where NumPyro is not installed.

    Examples:
        >>> from jflow import convert, distributions
        >>> box = distributions.uniform((1,), 2.0, 6.0)
        >>> prior = convert.to_numpyro(box, {}, support=(2.0, 6.0))  # doctest: +SKIP
        >>> prior.event_shape  # doctest: +SKIP
        (1,)

    References:
        Phan, Pradhan, Jankowiak, *Composable Effects for Flexible and Accelerated Probabilistic
            Programming in NumPyro*, 2019, arXiv:1912.11554.
    """
    try:
        from numpyro.distributions import Distribution as NumpyroDistribution
        from numpyro.distributions import constraints
    except ImportError as error:
        raise ImportError("to_numpyro needs NumPyro: pip install numpyro") from error
    check_noun("to_numpyro", flow, Flow, Distribution)
    drawn = jax.eval_shape(lambda key: flow.sample(params, key, 1, cond), jax.random.key(0))
    event = drawn.shape[1:]
    reals = constraints.real if support is None else constraints.interval(*support)

    class FlowDistribution(NumpyroDistribution):
        """A flow of jflow."""

        arg_constraints: dict = {}
        pytree_data_fields = ("params", "cond")
        support = constraints.independent(reals, len(event))

        def __init__(self, params, cond=None, *, validate_args=None):
            self.params, self.cond = params, cond
            super().__init__((), event, validate_args=validate_args)

        def sample(self, key, sample_shape=()):
            n = 1
            for size in sample_shape:
                n *= size
            return flow.sample(self.params, key, n, self.cond).reshape(*sample_shape, *event)

        def log_prob(self, value):
            lead = value.shape[: value.ndim - len(event)]
            value = value.reshape(-1, *event)
            return flow.log_prob(self.params, value, self.cond).reshape(lead)

    return FlowDistribution(params, cond)
