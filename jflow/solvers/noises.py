"""How much noise a diffusion exchanges: w(t) = g(t)^2 / 2, t [b] -> [b], for `euler_maruyama`.

Any w >= 0 keeps the marginals; a constant needs no function. Where w is infinite, `sbdm` and `grpo`
at t=0, or large beside sigma^2, the step limits it.

References:
    Ma, Goldstein, Albergo, Boffi, Vanden-Eijnden, Xie, *SiT: Exploring Flow and Diffusion-based
        Generative Models with Scalable Interpolant Transformers*, 2024, arXiv:2401.08740 (all but
        `grpo`).
"""

from collections.abc import Callable

import jax.numpy as jnp

from jflow.paths import LINEAR, Schedule, coefficients

__all__ = ["decreasing", "grpo", "hump", "of_sigma", "sbdm"]


def of_sigma(scale: float = 1.0, schedule: Schedule = LINEAR) -> Callable:
    """Noise in proportion to that of the path: w = scale sigma(t), 0 at data.

    Args:
        scale: the factor, at least 0.
        schedule: the path; the default is the linear one.

    Returns:
        w, a function t [b] -> [b].

    Raises:
        ValueError: scale is negative.
    """
    scale = _check("of_sigma", scale)
    return lambda t: scale * schedule.sigma(t)


def decreasing(scale: float = 1.0) -> Callable:
    """Noise that falls from the source to data: w = (scale cos(pi t) + 1)^2 / 4.

    For scale 1 it goes from 1 at noise to 0 at data.

    Args:
        scale: the factor of the cosine, at least 0.

    Returns:
        w, a function t [b] -> [b].

    Raises:
        ValueError: scale is negative.
    """
    scale = _check("decreasing", scale)
    return lambda t: (scale * jnp.cos(jnp.pi * t) + 1) ** 2 / 4


def hump(scale: float = 1.0) -> Callable:
    """Noise in the middle: w = scale sin(pi t)^2, 0 at both ends.

    Args:
        scale: the factor, at least 0.

    Returns:
        w, a function t [b] -> [b].

    Raises:
        ValueError: scale is negative.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from jflow import solvers
        >>> np.asarray(solvers.noises.hump(2.0)(jnp.array([0.0, 0.25, 0.5]))).round(3).tolist()
        [0.0, 1.0, 2.0]
    """
    scale = _check("hump", scale)
    return lambda t: scale * jnp.sin(jnp.pi * t) ** 2


def sbdm(scale: float = 1.0, schedule: Schedule = LINEAR) -> Callable:
    """The noise of score-based diffusion models: w = scale sigma^2 d/dt log(alpha / sigma).

    On the linear path it is scale (1 - t) / t. With scale 1 it is the diffusion whose time reversal
    adds noise to data without looking back; x1 does not depend on x0 then. It is infinite at t=0
    where alpha = 0.

    Args:
        scale: the factor, at least 0.
        schedule: the path; the default is the linear one.

    Returns:
        w, a function t [b] -> [b].

    Raises:
        ValueError: scale is negative.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from jflow import solvers
        >>> np.asarray(solvers.noises.sbdm()(jnp.array([0.25, 0.5, 1.0]))).round(3).tolist()
        [3.0, 1.0, 0.0]
    """
    scale = _check("sbdm", scale)

    def w(t):
        a, s, da, ds = coefficients(schedule, t)
        return scale * (s**2 * da / a - s * ds)

    return w


def grpo(scale: float = 0.7, schedule: Schedule = LINEAR) -> Callable:
    """The noise of Flow-GRPO: g = scale sqrt(sigma / alpha), so w = scale^2 sigma / (2 alpha).

    It is infinite at t=0 where alpha = 0; the paper cuts it off at its second time.

    Args:
        scale: the factor of g, at least 0.
        schedule: the path; the default is the linear one.

    Returns:
        w, a function t [b] -> [b].

    Raises:
        ValueError: scale is negative.

    References:
        Liu et al., *Flow-GRPO: Training Flow Matching Models via Online RL*, 2025,
            arXiv:2505.05470.
    """
    scale = _check("grpo", scale)
    return lambda t: scale**2 * schedule.sigma(t) / (2 * schedule.alpha(t))


def _check(name, scale):
    if not scale >= 0:
        raise ValueError(f"noises.{name}: expected scale >= 0, got {scale}")
    return float(scale)  # a number of numpy's would bring float64 along
