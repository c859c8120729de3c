"""Maximum likelihood."""

import jax.numpy as jnp

from jflow._core.batch import mean_of_rows, read_batch
from jflow._core.checks import check_noun, check_rows
from jflow.types import Distribution, ElboFlow, Flow, Loss

__all__ = ["negative_elbo", "nll"]


def nll(flow: Flow | Distribution) -> Loss:
    """Negative log-likelihood of a flow or a distribution, -log_prob(x | cond), in nats per row.

    Also known as: maximum likelihood, negative log-likelihood.

    The key goes to `log_prob`: a continuous flow draws its probes from it, dropout uses it, a
    deterministic flow ignores it.

    Args:
        flow: The flow, whose params the loss takes.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'cond', 'weight' [b]}. The mean is
        weighted, sum(w l) / sum(w). It has no metrics.

    Raises:
        TypeError: At construction for what has no log_prob.
        ValueError: At trace time for a batch without 'x', with an unknown key, or with rows that
            don't match.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, losses
        >>> loss = losses.nll(distributions.normal((2,)))
        >>> round(float(loss({}, jax.random.key(0), {"x": jnp.zeros((3, 2))})[0]), 4)  # log(2 pi)
        1.8379
    """

    check_noun("nll", flow, Flow, Distribution)
    kind = jnp.floating if isinstance(flow, Flow) else jnp.number  # symbols have probabilities

    def loss(params, key, batch, frozen=None):
        x, cond, weight = read_batch("nll", batch, ("x", "cond", "weight"), kind)
        log_prob = check_rows(
            "nll", "log_prob", flow.log_prob(params, x, cond, key=key), x.shape[0]
        )
        return mean_of_rows(-log_prob, weight), {}

    return loss


def negative_elbo(flow: ElboFlow) -> Loss:
    """The negative evidence lower bound of a flow, -elbo(x | cond), in nats per row.

    In expectation it is an upper bound of the negative log-likelihood.

    The key draws what the flow's stochastic layers need; over
    `flows.importance_weighted(flow, draws)` the bound is tighter.

    Args:
        flow: The flow, an `ElboFlow`, whose params the loss takes.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'cond', 'weight' [b]}. 'x' holds levels as
        floats where the flow dequantizes. It has no metrics.

    Raises:
        TypeError: At construction for what has no elbo.
        ValueError: At trace time for a batch without 'x', with an unknown key, or with rows that
            don't match.
    """

    check_noun("negative_elbo", flow, ElboFlow)

    def loss(params, key, batch, frozen=None):
        x, cond, weight = read_batch("negative_elbo", batch, ("x", "cond", "weight"))
        elbo = check_rows("negative_elbo", "elbo", flow.elbo(params, x, cond, key=key), x.shape[0])
        return mean_of_rows(-elbo, weight), {}

    return loss
