"""Denoising by the score of a density."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow.types import Array, Cond, Distribution, Flow, Params

__all__ = ["denoise"]


def denoise(
    flow: Flow | Distribution,
    params: Params,
    y: Float[Array, "b *event"],
    std: float,
    cond: Cond = None,
) -> Float[Array, "b *event"]:
    """The mean of the clean data given noisy data, by the score of the density of the noisy data.

    For y = x + std eps, with eps standard normal and `flow` the density of y, Tweedie's formula
    gives

        E[x | y] = y + std^2 grad log p(y),

    exact where the density is. It takes one gradient of log_prob.

    Args:
        flow: the density of noisy data, such as a flow trained on `losses.noised(std)`.
        params: its params.
        y: noisy data, [b, *event], such as samples of the flow.
        std: the standard deviation of the noise, in the units of the data, at least 0.
        cond: the condition of the flow, [b, ...].

    Returns:
        E[x | y], [b, *event].

    Raises:
        ValueError: std is negative.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, guidance
        >>> y = jnp.array([[2.0]])  # standard normal in all: half of the variance is noise
        >>> x = guidance.denoise(distributions.normal((1,)), {}, y, 0.5**0.5)
        >>> round(float(x[0, 0]), 4)
        1.0

    References:
        Efron, *Tweedie's Formula and Selection Bias*, 2011.
        Zhai et al., *Normalizing Flows are Capable Generative Models*, 2024, arXiv:2412.06329.
    """
    if not std >= 0:
        raise ValueError(f"denoise: expected std >= 0, got {std}")
    score = jax.grad(lambda y: jnp.sum(flow.log_prob(params, y, cond)))(y)
    return (y + std**2 * score).astype(y.dtype)
