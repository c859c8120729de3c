"""What importance weights say: the constant of a target, and how many draws they are worth."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["effective_sample_size", "estimate_log_z"]


def effective_sample_size(log_weights: Float[Array, " n"]) -> Float[Array, ""]:
    """How many exact draws weighted draws are worth, (sum w)^2 / sum w^2, between 1 and n.

    Also known as: ESS, Kish's effective sample size.

    Over n it is the share that papers on flow samplers report. Draws from the flow alone do not
    show a mode that it misses: the estimate is then too high.

    Args:
        log_weights: log p~(x) - log q(x) at draws from q, nats; a constant changes nothing.

    Returns:
        A number; NaN where all weights are 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import energy
        >>> round(float(energy.effective_sample_size(jnp.log(jnp.array([1.0, 1.0, 0.0])))), 4)
        2.0
    """
    _check("effective_sample_size", log_weights)
    total = jax.nn.logsumexp(log_weights)
    return jnp.exp(2 * total - jax.nn.logsumexp(2 * log_weights))


def estimate_log_z(
    log_weights: Float[Array, " n"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The log of the mean weight, which estimates log Z, and its standard error.

    Also known as: importance sampling estimate of the evidence.

    E_q [p~(x) / q(x)] = Z, where q covers the support of p; by Jensen the log of the mean is below
    log Z on average. The error is that of first order, std(w) / (mean(w) sqrt(n)),
    and NaN for one draw.

    Args:
        log_weights: log p~(x) - log q(x) at draws from q, or the log-weights of
            `annealed_importance_sampling`, nats.

    Returns:
        The pair (log Z, standard error), nats.

    Raises:
        ValueError: log_weights are not [n].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import energy
        >>> log_z, error = energy.estimate_log_z(jnp.full(8, 3.0))
        >>> float(log_z), float(error)
        (3.0, 0.0)
    """
    _check("estimate_log_z", log_weights)
    n = log_weights.shape[0]
    log_z = jax.nn.logsumexp(log_weights) - math.log(n)
    return log_z, jnp.std(jnp.exp(log_weights - log_z), ddof=1) / math.sqrt(n)


def _check(name, log_weights):
    if jnp.ndim(log_weights) != 1 or not log_weights.size:
        raise ValueError(
            f"{name}: expected log_weights of shape [n], got {list(jnp.shape(log_weights))}"
        )
