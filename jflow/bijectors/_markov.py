"""Steps of Markov chains as layers: a flow with them is a stochastic normalizing flow.

A layer draws x given z from a kernel K(z, x), and `inverse` draws from the same kernel, started at
x. The contribution of `forward` is log K(x, z) - log K(z, x), so that over a chain of such layers
and bijectors, with the source q0,

    log w = log p~(x) - log q0(z) + sum of the contributions,      E[w] = Z,

whatever the parameters are (`flows.path_sampler`). `forward` and `inverse` are one function.

References:
    Wu, Köhler, Noé, *Stochastic Normalizing Flows*, 2020, arXiv:2002.06707.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, float_dtype, sum_event, zero_log_det
from jflow._core.checks import check_rows, check_side, check_whole, need_key
from jflow._core.leapfrog import leapfrog, value_and_slope
from jflow._core.nouns import compiled
from jflow.types import Array, Transport

__all__ = ["hamiltonian", "langevin", "metropolis"]


def metropolis(
    log_density: Callable[..., Array], step: float = 0.1, *, repeats: int = 1
) -> Transport:
    """Metropolis steps of a random walk towards a density, as one stochastic layer.

    Also known as: random-walk Metropolis, MCMC layer, stochastic normalizing flow.

        y = z + step e,    e ~ N(0, I),    x = y with probability min(1, p~(y) / p~(z)), else z

    The kernel is in detailed balance with p~, so that the contribution of `forward` is log p~(z) -
    log p~(x). The gradient takes the decisions as they fell: their own derivative is left out, as
    in the paper, and a row that rejects its step has none by the step size.

    Args:
        log_density: the unnormalized log p~, x [n, *event] -> [n]; where there is a cond, (x, cond)
            -> [n]. Between the source and the target it is a mixture of the two in the exponent.
        step: the standard deviation of the proposals at first.
        repeats: the number of steps.

    Returns:
        Transport: the layer, with params {'log_step' []}. Both directions need a key.

    Raises:
        ValueError: step is not positive or repeats not a whole number of at least 1, at
            construction; log_density is not [n], or there is no key, at the call.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> layer = bijectors.metropolis(lambda x: -jnp.sum(x**2, -1), 0.5, repeats=3)
        >>> z = jnp.zeros((1, 2))
        >>> params = layer.init(jax.random.key(0), z)
        >>> x, contribution = layer.forward(params, z, key=jax.random.key(1))
        >>> bool(jnp.allclose(contribution, jnp.sum(x**2, -1)))
        True

    References:
        Wu, Köhler, Noé, *Stochastic Normalizing Flows*, 2020, arXiv:2002.06707.
    """

    def advance(density, step, x, value, key):
        key_proposal, key_accept = jax.random.split(key)
        y = x + step * jax.random.normal(key_proposal, x.shape, x.dtype)
        proposed = density(y)
        change = proposed - value
        uniform = jax.random.uniform(key_accept, change.shape, change.dtype)
        accepted = jnp.log(uniform) < change
        y, value = jnp.where(expand_to(accepted, x), y, x), jnp.where(accepted, proposed, value)
        return y, value, jnp.where(accepted, -change, 0)

    return _layer("metropolis", log_density, step, repeats, advance, lambda density, x: density(x))


def langevin(
    log_density: Callable[..., Array], step: float = 0.01, *, repeats: int = 1
) -> Transport:
    """Langevin steps along the gradient of a log-density, as one stochastic layer.

    Also known as: overdamped Langevin dynamics, unadjusted Langevin algorithm, ULA, Brownian
    dynamics.

        x = z + step grad log p~(z) + sqrt(2 step) e,    e ~ N(0, I)

    No step is rejected; R steps take R + 1 gradients. The contribution of `forward` is (|e|^2 -
    |e'|^2) / 2, with the noise e' of the same step from x back to z, e' = (z - x - step grad log
    p~(x)) / sqrt(2 step).

    Args:
        log_density: the unnormalized log p~, x [n, *event] -> [n]; where there is a cond, (x, cond)
            -> [n].
        step: the size of a step at first.
        repeats: the number of steps.

    Returns:
        Transport: the layer, with params {'log_step' []}. Both directions need a key.

    Raises:
        ValueError: step is not positive or repeats not a whole number of at least 1, at
            construction; log_density is not [n], or there is no key, at the call.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> layer = bijectors.langevin(lambda x: -0.5 * jnp.sum(x**2, -1), 0.1)
        >>> z = jnp.ones((4, 2))
        >>> params = layer.init(jax.random.key(0), z)
        >>> x, contribution = layer.forward(params, z, key=jax.random.key(1))
        >>> x.shape, contribution.shape
        ((4, 2), (4,))

    References:
        Wu, Köhler, Noé, *Stochastic Normalizing Flows*, 2020, arXiv:2002.06707.
    """

    def slope_at(density, x):
        return value_and_slope("langevin", density, x)[1]

    def advance(density, step, x, slope, key):
        noise, spread = jax.random.normal(key, x.shape, x.dtype), jnp.sqrt(2 * step)
        y = x + step * slope + spread * noise
        slope = slope_at(density, y)
        back = (x - y - step * slope) / spread
        return y, slope, sum_event(jnp.square(noise) - jnp.square(back)) / 2

    return _layer("langevin", log_density, step, repeats, advance, slope_at)


def hamiltonian(
    log_density: Callable[..., Array],
    step: float = 0.1,
    *,
    num_steps: int = 5,
    repeats: int = 1,
) -> Transport:
    """Hamiltonian trajectories with fresh momenta, as one stochastic layer.

    Also known as: underdamped Langevin dynamics, unadjusted Hamiltonian Monte Carlo.

    A momentum v ~ N(0, I) is drawn, (z, v) goes to (x, v') by leapfrog steps, and v' is forgotten.
    No step is rejected. The contribution of `forward` is (|v|^2 - |v'|^2) / 2, because the same
    steps lead from (x, -v') back to (z, -v).

    Args:
        log_density: the unnormalized log p~, x [n, *event] -> [n]; where there is a cond, (x, cond)
            -> [n].
        step: the size of a leapfrog step at first.
        num_steps: the number of leapfrog steps of a trajectory.
        repeats: the number of trajectories, each with a fresh momentum.

    Returns:
        Transport: the layer, with params {'log_step' []}. Both directions need a key.

    Raises:
        ValueError: step is not positive, or num_steps or repeats not a whole number of at least 1,
            at construction; log_density is not [n], or there is no key, at the call.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> layer = bijectors.hamiltonian(lambda x: -0.5 * jnp.sum(x**2, -1), 0.3, num_steps=3)
        >>> z = jnp.ones((4, 2))
        >>> params = layer.init(jax.random.key(0), z)
        >>> x, contribution = layer.forward(params, z, key=jax.random.key(1))
        >>> change = 0.5 * jnp.sum(x**2 - z**2, -1)  # the energy is nearly kept
        >>> bool(jnp.max(jnp.abs(contribution - change)) < 0.1)
        True

    References:
        Wu, Köhler, Noé, *Stochastic Normalizing Flows*, 2020, arXiv:2002.06707.
    """
    check_whole("hamiltonian", num_steps=num_steps)

    def advance(density, step, x, known, key):
        start = jax.random.normal(key, x.shape, x.dtype)
        y, end, _ = leapfrog("hamiltonian", density, x, start, step, num_steps)
        return y, known, sum_event(jnp.square(start) - jnp.square(end)) / 2

    return _layer("hamiltonian", log_density, step, repeats, advance, lambda density, x: None)


def _layer(name, log_density, step, repeats, advance, evaluate) -> Transport:
    """A layer of `repeats` steps of a kernel, each (density, step, x, known, key) -> (y, known,
    contribution [b]); `known`, at first `evaluate(density, x)`, is what it hands to the next."""
    if isinstance(step, bool) or not step > 0:
        raise ValueError(f"{name}: expected step > 0, got {step!r}")
    check_whole(name, repeats=repeats)

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        return {"log_step": jnp.full_like(x, jnp.log(step), shape=(), dtype=float_dtype(x))}

    def run(params, x, cond=None, *, key=None):
        need_key(name, key)

        def density(x):
            value = log_density(x) if cond is None else log_density(x, cond)
            return check_rows(name, "log_density", value, x.shape[0]).astype(x.dtype)

        def once(carry, key):
            *state, total = carry
            *state, contribution = advance(density, size, *state, key)
            return (*state, total + contribution), None

        wide = x.astype(float_dtype(x))
        size = jnp.exp(params["log_step"]).astype(wide.dtype)
        keys = jax.random.split(key, repeats)
        start = wide, evaluate(density, wide), zero_log_det(wide)
        (y, _, contribution), _ = jax.lax.scan(once, start, keys)
        return y.astype(x.dtype), contribution

    return compiled(Transport(init, run, run))
