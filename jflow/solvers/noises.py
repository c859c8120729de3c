"""How much noise a diffusion exchanges: w(t) = g(t)^2 / 2, t [b] -> [b], for `euler_maruyama`.

Any w >= 0 keeps the marginals; a constant needs no function. Where w is infinite, `sbdm` and `grpo` at t=0, or large
beside sigma^2, the step limits it. Source of all but `grpo`: Ma et al., "SiT", 2024.
"""

from collections.abc import Callable

import jax.numpy as jnp

from jflow.paths import LINEAR, Schedule, coefficients

__all__ = ["decreasing", "grpo", "hump", "of_sigma", "sbdm"]


def of_sigma(scale: float = 1.0, schedule: Schedule = LINEAR) -> Callable:
    """w = scale sigma(t): 0 at data."""
    scale = _check("of_sigma", scale)
    return lambda t: scale * schedule.sigma(t)


def decreasing(scale: float = 1.0) -> Callable:
    """w = (scale cos(pi t) + 1)^2 / 4: from 1 at noise to 0 at data for scale 1."""
    scale = _check("decreasing", scale)
    return lambda t: (scale * jnp.cos(jnp.pi * t) + 1) ** 2 / 4


def hump(scale: float = 1.0) -> Callable:
    """w = scale sin(pi t)^2: 0 at both ends."""
    scale = _check("hump", scale)
    return lambda t: scale * jnp.sin(jnp.pi * t) ** 2


def sbdm(scale: float = 1.0, schedule: Schedule = LINEAR) -> Callable:
    """w = scale sigma^2 d/dt log(alpha / sigma), linear: scale (1 - t) / t: with scale 1 the diffusion whose time reversal
    adds noise to data without looking back; x1 does not depend on x0 then. Infinite at t=0 where alpha = 0."""
    scale = _check("sbdm", scale)

    def w(t):
        a, s, da, ds = coefficients(schedule, t)
        return scale * (s**2 * da / a - s * ds)

    return w


def grpo(scale: float = 0.7, schedule: Schedule = LINEAR) -> Callable:
    """g = scale sqrt(sigma / alpha), so w = scale^2 sigma / (2 alpha); infinite at t=0 where alpha = 0.

    Source: Liu et al., "Flow-GRPO: Training Flow Matching Models via Online RL", 2025 (who cut it off at their second time).
    """
    scale = _check("grpo", scale)
    return lambda t: scale**2 * schedule.sigma(t) / (2 * schedule.alpha(t))


def _check(name, scale):
    if not scale >= 0:
        raise ValueError(f"noises.{name}: expected scale >= 0, got {scale}")
    return float(scale)  # a number of numpy's would bring float64 along
