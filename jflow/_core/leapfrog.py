"""The leapfrog integrator, and a log-density with its gradient: what kernels of Markov chains
share."""

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to
from jflow._core.checks import check_rows


def value_and_slope(name: str, log_density, x):
    """(log p~(x) [b], its gradient [b, *event]); ValueError, in this name, for another shape."""

    def values(x):
        return check_rows(name, "log_density", log_density(x), x.shape[0])

    value, pull = jax.vjp(values, x)
    return value, pull(jnp.ones_like(value))[0].astype(x.dtype)


def leapfrog(name: str, log_density, x, momentum, step, num_steps: int):
    """(x, momentum, log p~(x)) after steps of size `step`, a scalar or [b], of Hamilton's equations
    with unit masses: volume is kept, and turning the momentum runs them back."""
    step = expand_to(step, x) if jnp.ndim(step) else step
    value, slope = value_and_slope(name, log_density, x)

    def advance(carry, _):
        x, momentum, slope, _ = carry
        momentum = momentum + step / 2 * slope
        x = x + step * momentum
        value, slope = value_and_slope(name, log_density, x)
        return (x, momentum + step / 2 * slope, slope, value), None

    (x, momentum, _, value), _ = jax.lax.scan(
        advance, (x, momentum, slope, value), length=num_steps
    )
    return x, momentum, value
