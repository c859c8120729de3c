"""Schedules alpha(t), sigma(t) of affine paths x_t = alpha(t) x1 + sigma(t) x0.

Noise is at t=0 and data at t=1; the table has alpha, sigma at both.

                        t = 0             t = 1
    linear              0, 1              1, 0
    polynomial          0, 1              1, 0           slope at t = 0: 0 or infinite
    optimal_transport   0, 1              1, sigma_min
    cosine              0, scale          1, 0
    linear_vp           0, 1              1, 0           sigma' = -infinity at t = 1
    vp                  0.0066, 1         1, 0           sigma' = -infinity at t = 1
    ve, edm             1, sigma_max      1, sigma_min   the flow starts from sigma_max x0
    unit_variance(ve)   1 / sigma_max, 1  1, sigma_min   (both nearly)

The slope of `polynomial` at t = 0 is 0 for power > 1 and infinite for power < 1. alpha(0) of `vp`
depends on beta_min and beta_max. Where a slope vanishes or is infinite, the functions take t at
most one machine epsilon from that end: values, slopes and the conversions of `paths` are then
finite in every type, and conversions that have a limit there are near it.

The papers on diffusion run time from data to noise: their t is 1 - t here.
"""

import math

import jax
import jax.numpy as jnp

from jflow._core.times import Times, linear_between, partition
from jflow.paths._affine import LINEAR, Schedule
from jflow.types import Array

__all__ = [
    "cosine",
    "edm",
    "linear",
    "linear_vp",
    "optimal_transport",
    "piecewise",
    "polynomial",
    "unit_variance",
    "ve",
    "vp",
]


def linear() -> Schedule:
    """The schedule of rectified flow: alpha = t, sigma = 1 - t.

    Every slope is finite.

    Returns:
        Schedule: `paths.LINEAR`.

    References:
        Liu, Gong, Liu, *Flow Straight and Fast: Learning to Generate and Transfer Data with
            Rectified Flow*, 2023, arXiv:2209.03003.
    """
    return LINEAR


def polynomial(power: float) -> Schedule:
    """The linear path at another pace: alpha = t^power, sigma = 1 - t^power.

    Args:
        power: above 0; above 1 the path is slow near noise.

    Returns:
        Schedule: alpha, sigma and the time of a ratio.

    Raises:
        ValueError: power is not finite and above 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> schedule, t = paths.schedules.polynomial(2.0), jnp.array([0.5])
        >>> schedule.alpha(t).tolist(), schedule.sigma(t).tolist()
        ([0.25], [0.75])
    """
    _check("polynomial", power=power)
    power = float(power)  # numbers of numpy's would bring float64 along, here and below
    if power == 1:
        return LINEAR
    alpha = lambda t: inside(t, start=True) ** power  # noqa: E731
    return Schedule(alpha, lambda t: 1 - alpha(t), lambda a, s: (a / (a + s)) ** (1 / power))


def optimal_transport(sigma_min: float = 1e-5) -> Schedule:
    """The schedule of flow matching: the data keep a noise of standard deviation sigma_min.

        alpha = t,      sigma = 1 - (1 - sigma_min) t

    Args:
        sigma_min: the standard deviation of the noise that is left at t=1, in [0, 1).

    Returns:
        Schedule: alpha, sigma and the time of a ratio.

    Raises:
        ValueError: sigma_min is outside [0, 1).

    References:
        Lipman, Chen, Ben-Hamu, Nickel, Le, *Flow Matching for Generative Modeling*, 2023,
            arXiv:2210.02747 (its OT path).
    """
    if not 0 <= sigma_min < 1:
        raise ValueError(
            f"schedules.optimal_transport: expected 0 <= sigma_min < 1, got {sigma_min}"
        )
    sigma_min = float(sigma_min)
    lost = 1 - sigma_min
    # sigma as (1 - t) + sigma_min t keeps its digits near t = 1
    return Schedule(lambda t: t, lambda t: (1 - t) + sigma_min * t, lambda a, s: a / (s + lost * a))


def cosine(scale: float = 1.0) -> Schedule:
    """The trigonometric schedule: alpha = sin(pi t / 2), sigma = scale cos(pi t / 2).

    Every slope is finite. With scale 1 it is the trigonometric interpolant of the first paper; with
    scale the standard deviation of the data, that of the second (TrigFlow).

    Args:
        scale: the factor of sigma, above 0.

    Returns:
        Schedule: alpha, sigma and the time of a ratio.

    Raises:
        ValueError: scale is not finite and above 0.

    Examples:
        >>> from jflow import paths
        >>> schedule = paths.schedules.cosine()
        >>> round(float(schedule.alpha(1 / 3)), 3), round(float(schedule.sigma(1 / 3)), 3)
        (0.5, 0.866)

    References:
        Albergo, Boffi, Vanden-Eijnden, *Stochastic Interpolants: A Unifying Framework for Flows and
            Diffusions*, 2023, arXiv:2303.08797.
        Lu, Song, *Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models*, 2024,
            arXiv:2410.11081.
    """
    _check("cosine", scale=scale)
    scale = float(scale)
    quarter = math.pi / 2
    return Schedule(
        lambda t: jnp.sin(quarter * t),
        lambda t: scale * jnp.sin(quarter * (1 - t)),  # exactly 0 at t = 1, unlike the cosine
        lambda a, s: jnp.arctan2(scale * a, s) / quarter,
    )


def linear_vp() -> Schedule:
    """A variance preserving schedule with linear signal: alpha = t, sigma = sqrt(1 - t^2).

    The variance of standardized data is 1 throughout.

    Returns:
        Schedule: alpha, sigma and the time of a ratio.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> round(float(paths.schedules.linear_vp().sigma(jnp.array(0.6))), 3)
        0.8
    """

    def sigma(t):
        t = inside(t, end=True)
        return jnp.sqrt((1 - t) * (1 + t))

    return Schedule(lambda t: t, sigma, lambda a, s: a / jnp.hypot(a, s))


def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """The variance preserving schedule of score-based models.

        alpha = exp(-B / 2),      sigma = sqrt(1 - exp(-B))
        B = r beta_min + r^2 (beta_max - beta_min) / 2,      r = 1 - t

    alpha(0) = exp(-(beta_min + beta_max) / 4), 0.0066 by default: the ends are met up to that.

    Args:
        beta_min: the rate of the noise at data, above 0.
        beta_max: the rate of the noise at t=0, above 0.

    Returns:
        Schedule: alpha, sigma and the time of a ratio.

    Raises:
        ValueError: beta_min or beta_max is not finite and above 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from jflow import paths
        >>> print(np.asarray(paths.schedules.vp().alpha(jnp.array([0.0, 1.0]))).round(4))
        [0.0066 1.    ]

    References:
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, *Score-Based Generative Modeling through
            Stochastic Differential Equations*, 2021, arXiv:2011.13456 (its variance preserving
            SDE).
    """
    _check("vp", beta_min=beta_min, beta_max=beta_max)
    beta_min, beta_max = float(beta_min), float(beta_max)
    growth = beta_max - beta_min

    def integral(t):
        r = 1 - t
        return r * (beta_min + r * growth / 2)

    def time(a, s):
        total = 2 * (jnp.log(jnp.hypot(a, s)) - jnp.log(jnp.maximum(a, jnp.finfo(a.dtype).tiny)))
        return 1 - 2 * total / (
            beta_min + jnp.sqrt(jnp.maximum(beta_min**2 + 2 * growth * total, 0))
        )

    return Schedule(
        lambda t: jnp.exp(-integral(t) / 2),
        lambda t: jnp.sqrt(-jnp.expm1(-integral(inside(t, end=True)))),
        time,
    )


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Schedule:
    """The variance exploding schedule of score-based models: noise is added to the data.

        alpha = 1,      sigma = sigma_max^(1 - t) sigma_min^t

    The data stay as they are. The flow starts from sigma_max x0 (see `unit_variance`).

    Args:
        sigma_min: the standard deviation of the noise at t=1, above 0.
        sigma_max: the standard deviation of the noise at t=0, above sigma_min.

    Returns:
        Schedule: alpha, sigma and the time of a ratio.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max.

    References:
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, *Score-Based Generative Modeling through
            Stochastic Differential Equations*, 2021, arXiv:2011.13456 (its variance exploding SDE).
    """
    _check_noise("ve", sigma_min, sigma_max)
    low, high = math.log(sigma_min), math.log(sigma_max)
    sigma = lambda t: jnp.exp((1 - t) * high + t * low)  # noqa: E731
    return Schedule(jnp.ones_like, sigma, lambda a, s: (high - _log_ratio(s, a)) / (high - low))


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Schedule:
    """The schedule in which equal steps of t are the noise levels of EDM's grid.

        alpha = 1,      sigma = ((1 - t) sigma_max^(1/rho) + t sigma_min^(1/rho))^rho

    The flow starts from sigma_max x0 (see `unit_variance`).

    Args:
        sigma_min: the standard deviation of the noise at t=1, above 0.
        sigma_max: the standard deviation of the noise at t=0, above sigma_min.
        rho: the exponent, above 0; the larger, the smaller the steps near data.

    Returns:
        Schedule: alpha, sigma and the time of a ratio.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max and rho > 0.

    References:
        Karras, Aittala, Aila, Laine, *Elucidating the Design Space of Diffusion-Based Generative
            Models*, 2022, arXiv:2206.00364.
    """
    _check_noise("edm", sigma_min, sigma_max)
    _check("edm", rho=rho)
    sigma_min, sigma_max, rho = float(sigma_min), float(sigma_max), float(rho)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)

    def time(a, s):
        return (high - jnp.exp(_log_ratio(s, a) / rho)) / (high - low)

    return Schedule(jnp.ones_like, lambda t: ((1 - t) * high + t * low) ** rho, time)


def unit_variance(schedule: Schedule) -> Schedule:
    """A schedule scaled so that noise and standardized data have variance 1 throughout.

    alpha and sigma are divided by sqrt(alpha^2 + sigma^2), whatever the scale of the schedule. x_t
    of one path is that of the other divided by the root (see `paths.reschedule`).

    Args:
        schedule: the schedule to scale.

    Returns:
        Schedule: alpha, sigma and the time of a ratio, where `schedule` has one.
    """

    def divided(f):
        return lambda t: f(t) / jnp.hypot(schedule.alpha(t), schedule.sigma(t))

    return Schedule(divided(schedule.alpha), divided(schedule.sigma), schedule.time)


def inside(t: Array, *, start: bool = False, end: bool = False) -> Array:
    """t, at least one machine epsilon from the ends that are named; its derivative is 1."""
    eps = jnp.finfo(jnp.result_type(t)).eps
    return t + jax.lax.stop_gradient(jnp.clip(t, eps if start else 0, 1 - eps if end else 1) - t)


def _log_ratio(s, a):
    return jnp.log(s) - jnp.log(jnp.maximum(a, jnp.finfo(a.dtype).tiny))


def _check(name, **values):
    for what, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"schedules.{name}: expected a finite {what} > 0, got {value}")


def _check_noise(name, sigma_min, sigma_max):
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"schedules.{name}: expected 0 < sigma_min < sigma_max, got "
            f"sigma_min={sigma_min}, sigma_max={sigma_max}"
        )


def piecewise(schedule: Schedule, knots: int | Times) -> Schedule:
    """A schedule that is linear between knots: the path of a flow that is straight in each window.

    It has the values of `schedule` at the knots, and at a knot the slopes are those of the window
    after it. A line goes from alpha_a x1 + sigma_a x0 at t = a to alpha_b x1 + sigma_b x0 at t = b.
    With a state z at t and a prediction eps of the noise the velocity is then (derived)

        ((alpha_b - alpha_a) z + (alpha_a sigma_b - alpha_b sigma_a) eps)
            / ((b - t) alpha_a + (t - a) alpha_b),

    which is that of PeRFlow with lambda = alpha_b / alpha_a and eta = sigma_b - lambda sigma_a.

    Args:
        schedule: the schedule to follow at the knots.
        knots: times [K + 1] that rise strictly from 0 to 1, or the number K of equal windows.

    Returns:
        Schedule: alpha and sigma; the time of a ratio is found as a root.

    Raises:
        ValueError: knots do not rise strictly from 0 to 1, or are no whole number of at least 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> schedule = paths.schedules.piecewise(paths.schedules.polynomial(2.0), 2)
        >>> schedule.alpha(jnp.array([0.25, 0.5, 0.75])).tolist()
        [0.125, 0.25, 0.625]
    """
    knots = partition("piecewise", knots)
    return Schedule(linear_between(schedule.alpha, knots), linear_between(schedule.sigma, knots))
