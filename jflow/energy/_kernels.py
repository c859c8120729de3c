"""Kernels of Markov chains that leave a density as it is, many chains at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jflow._core.arrays import expand_to, sum_event
from jflow._core.checks import check_whole
from jflow._core.leapfrog import leapfrog
from jflow._core.numbers import check_number
from jflow.types import NumberOrFunction

__all__ = ["Kernel", "hamiltonian_kernel", "metropolis_kernel"]

Kernel = Callable[..., tuple[Float[Array, "n *event"], Float[Array, " n"]]]
"""A transition (key, log_density, x [n, *event], level) -> (x, accepted [n], each 0 or 1).

It leaves the density of `log_density`, [n, *event] -> [n], as it is; `level` [] is the power of the
target on an annealed path, 1 at the target itself.
"""


def metropolis_kernel(step: NumberOrFunction = 1.0) -> Kernel:
    """A random-walk Metropolis transition: y = x + step e, e ~ N(0, I).

    It accepts y with the probability min(1, p~(y) / p~(x)), and never where p~(y) is 0 or NaN.

    Also known as: Metropolis-Hastings, random walk.

    Args:
        step: The standard deviation of a proposal in each number of x, or a function of the level.

    Returns:
        The kernel, of one evaluation of the density beside that at x.

    Raises:
        ValueError: Unless step is positive.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import energy
        >>> kernel, target = energy.metropolis_kernel(0.5), energy.banana()
        >>> x, accepted = kernel(jax.random.key(0), target.log_density, jnp.zeros((3, 2)), 1)
        >>> x.shape, accepted.shape
        ((3, 2), (3,))
    """
    check_number("metropolis_kernel", "step", step, "> 0", lambda s: s > 0, of="the level")

    def kernel(key, log_density, x, level):
        key_proposal, key_accept = jax.random.split(key)
        scale = step(level) if callable(step) else step
        y = x + scale * jax.random.normal(key_proposal, x.shape, x.dtype)
        return accept(key_accept, x, y, log_density(y) - log_density(x))

    return kernel


def hamiltonian_kernel(step: NumberOrFunction = 0.1, num_steps: int = 5) -> Kernel:
    """A transition along a leapfrog trajectory from a momentum drawn anew.

    Also known as: Hamiltonian Monte Carlo, HMC, hybrid Monte Carlo.

    It accepts the end with the probability min(1, exp(H(start) - H(end))), H = |momentum|^2 / 2 -
    log p~(x), and never where H is NaN.

    Args:
        step: The size of a leapfrog step, or a function of the level.
        num_steps: The number of them.

    Returns:
        The kernel, of num_steps + 1 gradients and one evaluation more of the density.

    Raises:
        ValueError: Unless step is positive and num_steps at least 1.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import energy
        >>> kernel, target = energy.hamiltonian_kernel(0.1, 3), energy.banana()
        >>> x, accepted = kernel(jax.random.key(0), target.log_density, jnp.zeros((3, 2)), 1)
        >>> x.shape, accepted.shape
        ((3, 2), (3,))

    References:
        Neal, *MCMC Using Hamiltonian Dynamics*, 2012, arXiv:1206.1901.
    """
    check_number("hamiltonian_kernel", "step", step, "> 0", lambda s: s > 0, of="the level")
    check_whole("hamiltonian_kernel", num_steps=num_steps)

    def kernel(key, log_density, x, level):
        key_momentum, key_accept = jax.random.split(key)
        size = step(level) if callable(step) else step
        start = jax.random.normal(key_momentum, x.shape, x.dtype)
        y, end, value = leapfrog("hamiltonian_kernel", log_density, x, start, size, num_steps)
        kinetic = 0.5 * sum_event(jnp.square(start) - jnp.square(end))
        return accept(key_accept, x, y, value - log_density(x) + kinetic)

    return kernel


def accept(key, x, y, log_ratio):
    """y with probability min(1, exp(log_ratio)), where that is a number, and x otherwise."""
    uniform = jax.random.uniform(key, log_ratio.shape, log_ratio.dtype)
    accepted = jnp.log(uniform) < log_ratio
    return jnp.where(expand_to(accepted, x), y, x), accepted.astype(log_ratio.dtype)
