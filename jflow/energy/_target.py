"""An unnormalized density, with what is known of it."""

from collections.abc import Callable
from typing import NamedTuple

from jflow.types import Array, Key

__all__ = ["Target"]


class Target(NamedTuple):
    """A density up to its constant: log p(x) = log_density(x) - log Z.

    Also known as: energy function, Boltzmann distribution, unnormalized posterior.

    Args:
        log_density: x [n, *event] -> [n], nats, -inf outside the support. A posterior's is the log
            prior plus the log-likelihood.
        event_shape: the shape of one point.
        log_z: the log of the integral of exp(log_density), nats; None where it is not known.
        sample: (key, n) -> [n, *event], exact draws; None where there are none.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import energy
        >>> target = energy.Target(lambda x: -0.5 * jnp.sum(x**2, -1), (2,), log_z=1.8378771)
        >>> target.log_density(jnp.zeros((1, 2))).tolist()
        [0.0]
    """

    log_density: Callable[[Array], Array]
    event_shape: tuple[int, ...]
    log_z: float | None = None
    sample: Callable[[Key, int], Array] | None = None
