"""Prior guidance: the latent is scaled before it is carried to data."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float
from scipy.special import chdtri

from jflow._core.arrays import expand_to, sum_event
from jflow.types import Array, Cond, Key, Params

__all__ = ["score_alignment", "to_quantile"]


def to_quantile(z: Float[Array, "b *event"], q: float) -> Float[Array, "b *event"]:
    """Latents moved, each in its direction, to a quantile of the log-density of a standard normal.

    |z|^2 becomes the number that a chi-squared variable of as many degrees as the event has
    dimensions exceeds with probability q: above 1/2 the latent is denser than most draws.
    Temperature, the other way to scale, is plain `c * z`.

    Args:
        z: latents, [b, *event], none of them 0.
        q: the quantile, in (0, 1).

    Returns:
        The scaled latents, [b, *event].

    Raises:
        ValueError: q is outside (0, 1).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance
        >>> z = guidance.to_quantile(jnp.array([[3.0, 4.0]]), 0.5)  # |z|^2 = 2 log 2
        >>> round(float(jnp.sum(z**2)), 4), round(float(z[0, 1] / z[0, 0]), 4)
        (1.3863, 1.3333)

    References:
        Karczewski, Heinonen, Garg, *Devil is in the Details: Density Guidance for Detail-Aware
            Generation with Flow Models*, 2025, arXiv:2502.05807 (there by the norm).
    """
    if not 0 < q < 1:
        raise ValueError(f"to_quantile: expected q in (0, 1), got {q}")
    norm = math.sqrt(chdtri(math.prod(z.shape[1:]), q))
    z = z / jax.lax.stop_gradient(
        jnp.max(jnp.abs(z), axis=tuple(range(1, z.ndim)), keepdims=True)
    )  # squares overflow
    return z * expand_to(norm / jnp.sqrt(sum_event(jnp.square(z))), z).astype(z.dtype)


def score_alignment(
    forward: Callable,
    params: Params,
    z: Float[Array, "b *event"],
    cond: Cond = None,
    *,
    key: Key | None = None,
) -> Float[Array, " b"]:
    """How fast the log-density of a sample rises as its latent shrinks.

        -d/dc log p1(F(c z)) at c = 1      =      |z|^2 + z . grad log_det

    Where this is positive, scaling z down raises the log-density of the sample, as it raises that
    of z: the score alignment of the paper, in which the two scores, one carried to the space of the
    other, have a positive inner product. It takes one reverse derivative through the flow (the
    paper integrates the sensitivity of the score along the ODE instead; the number is the same).

    Args:
        forward: that of a flow over a standard normal, (params, z, cond, *, key) -> (x, log_det).
        params: its params.
        z: latents, [b, *event].
        cond: the condition of the flow, [b, ...].
        key: what `forward` needs for estimates, or None.

    Returns:
        The rate, [b], in nats.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance
        >>> def forward(params, z, cond=None, *, key=None):  # x = 2 z
        ...     return 2 * z, jnp.full(z.shape[0], jnp.log(2.0))
        >>> guidance.score_alignment(forward, {}, jnp.array([[1.0], [3.0]])).tolist()  # |z|^2
        [1.0, 9.0]

    References:
        Karczewski, Heinonen, Garg, *Devil is in the Details: Density Guidance for Detail-Aware
            Generation with Flow Models*, 2025, arXiv:2502.05807 (the form is derived).
    """

    def log_det(z):
        return jnp.sum(forward(params, z, cond, key=key)[1])  # rows do not interact

    return sum_event(jnp.square(z)) + sum_event(z * jax.grad(log_det)(z))
