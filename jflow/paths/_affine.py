"""Affine paths x_t = alpha(t) x1 + sigma(t) x0, and the conversions between what a network may predict on them.

With a, s the values of alpha and sigma at t, primes for d/dt and D = a' s - s' a:

    velocity  u = a' x1 + s' x0        x1 = (s u - s' x) / D        x0 = (a' x - a u) / D
    score     grad log p_t(x) = -E[x0 | x] / s, where x0 is standard normal and independent of x1

The same formulas hold for conditional expectations given x_t = x, which is what trained networks predict. The
conversions take a schedule; the default is the linear path, where D = 1. Each takes the prediction and x [b, *event]
and t [b] (or a scalar), and says at which end it diverges; everywhere else the value and its gradients are finite,
and a number that diverges comes out as inf or NaN at exactly that end, not clipped.

Sources: Lipman, Chen, Ben-Hamu, Nickel, Le, "Flow Matching for Generative Modeling", 2023; Albergo, Boffi,
Vanden-Eijnden, "Stochastic Interpolants: A Unifying Framework for Flows and Diffusions", 2023.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import expand_to
from jflow.types import Array, Path

__all__ = [
    "LINEAR",
    "Schedule",
    "affine",
    "check_ends",
    "linear",
    "score_to_velocity",
    "score_to_noise",
    "score_to_data",
    "velocity_to_score",
    "velocity_to_noise",
    "velocity_to_data",
    "noise_to_score",
    "noise_to_velocity",
    "noise_to_data",
    "data_to_score",
    "data_to_velocity",
    "data_to_noise",
]


class Schedule(NamedTuple):
    """alpha(t), sigma(t): t [b] -> [b], smooth; alpha runs from 0 (or nearly) to 1, sigma from 1 to 0 (or nearly).

    Any such pair will do: derivatives are taken by jvp. `paths.schedules` has the usual ones. time, where it is known in
    closed form: (a, s) [b] -> t [b] with alpha(t) / sigma(t) = a / s; None: whoever needs it finds the root."""

    alpha: Callable[[Array], Array]
    sigma: Callable[[Array], Array]
    time: Callable[[Array, Array], Array] | None = None


LINEAR = Schedule(alpha=lambda t: t, sigma=lambda t: 1 - t, time=lambda a, s: a / (a + s))


def affine(schedule: Schedule, *, tolerance: float = 0.1) -> Path:
    """The path of a schedule: point alpha(t) x1 + sigma(t) x0, target alpha'(t) x1 + sigma'(t) x0; t in [0, 1].

    Errors: ValueError for a schedule that doesn't meet its ends (see `check_ends`), and for times outside [0, 1] where
    they are known, outside jit.
    """
    return _path(check_ends(schedule, tolerance=tolerance))


def check_ends(schedule: Schedule, *, tolerance: float = 0.1) -> Schedule:
    """The schedule, or ValueError unless it runs from noise to data: |alpha / sigma| <= tolerance at t=0 and
    |sigma / alpha| <= tolerance at t=1, with sigma(0), alpha(1) > 0.

    Ratios, so that schedules of any scale pass: variance exploding ones have alpha = 1 throughout. A flow starts from
    sigma(0) x0, and what alpha(0) / sigma(0) leaves of the data there is not in it. Inside jit nothing is checked.
    """
    values = [jnp.asarray(f(jnp.asarray([0.0, 1.0]))) for f in (schedule.alpha, schedule.sigma)]
    for name, value in zip(("alpha", "sigma"), values, strict=True):
        if value.shape != (2,):
            raise ValueError(
                f"Schedule: expected {name} to map t [b] to [b], got shape {list(value.shape)} for [2]"
            )
    if any(isinstance(value, jax.core.Tracer) for value in values):
        return schedule
    (a0, a1), (s0, s1) = (np.asarray(value, np.float64) for value in values)
    if not (s0 > 0 and a1 > 0 and abs(a0) <= tolerance * s0 and abs(s1) <= tolerance * a1):
        raise ValueError(
            f"Schedule: expected noise at t=0 and data at t=1, alpha/sigma = 0 and sigma/alpha = 0 there to within "
            f"{tolerance}, got alpha(0)={a0:.4g}, sigma(0)={s0:.4g}, alpha(1)={a1:.4g}, sigma(1)={s1:.4g}"
        )
    return schedule


def _path(schedule: Schedule) -> Path:
    def point(x0, x1, t, *, key=None):
        a, s, _, _ = _at(schedule, t, x1)
        return a * x1 + s * x0

    def target(x0, x1, t, *, key=None):
        _, _, da, ds = _at(schedule, t, x1)
        return da * x1 + ds * x0

    return Path(point, target)


def linear() -> Path:
    """Rectified flow: point (1 - t) x0 + t x1, target x1 - x0.

    Source: Liu, Gong, Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow", 2023.
    """
    return _path(LINEAR)


def velocity_to_data(v: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """E[x1 | x_t = x] = (s v - s' x) / D; linear: x + (1 - t) v, finite at both ends."""
    a, s, da, ds = _at(schedule, t, x)
    return (s * v - ds * x) / (da * s - ds * a)


def velocity_to_noise(v: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """E[x0 | x_t = x] = (a' x - a v) / D; linear: x - t v, finite at both ends."""
    a, s, da, ds = _at(schedule, t, x)
    return (da * x - a * v) / (da * s - ds * a)


def data_to_velocity(x1: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """v = (D x1 + s' x) / s; linear: (x1 - x) / (1 - t). Diverges where sigma = 0, at t = 1, where the last stage of
    Heun's and other solvers sits: end their grid before, and finish with x1."""
    a, s, da, ds = _at(schedule, t, x)
    return ((da * s - ds * a) * x1 + ds * x) / s


def noise_to_velocity(x0: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """v = (a' x - D x0) / a; linear: (x - x0) / t. Diverges where alpha = 0, at t = 0. Of arrays: a network that predicts
    the noise becomes a velocity by `paths.parameterizations.from_noise`."""
    a, s, da, ds = _at(schedule, t, x)
    return (da * x - (da * s - ds * a) * x0) / a


def data_to_noise(x1: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """E[x0 | x_t = x] = (x - a x1) / s; linear: (x - t x1) / (1 - t). Diverges where sigma = 0, at t = 1."""
    a, s, _, _ = _at(schedule, t, x)
    return (x - a * x1) / s


def noise_to_data(x0: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """E[x1 | x_t = x] = (x - s x0) / a; linear: (x - (1 - t) x0) / t. Diverges where alpha = 0, at t = 0."""
    a, s, _, _ = _at(schedule, t, x)
    return (x - s * x0) / a


def noise_to_score(x0: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """score = -x0 / s; linear: -x0 / (1 - t). Diverges where sigma = 0, at t = 1."""
    return -x0 / _at(schedule, t, x)[1]


def score_to_noise(score: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """E[x0 | x_t = x] = -s score; linear: -(1 - t) score, finite at both ends (where the score is)."""
    return -_at(schedule, t, x)[1] * score


def velocity_to_score(v: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """score = (a v - a' x) / (D s); linear: (t v - x) / (1 - t). Diverges where sigma = 0, at t = 1."""
    return noise_to_score(velocity_to_noise(v, x, t, schedule), x, t, schedule)


def score_to_velocity(score: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """v = (a' x + D s score) / a; linear: (x + (1 - t) score) / t. Diverges where alpha = 0, at t = 0."""
    return noise_to_velocity(score_to_noise(score, x, t, schedule), x, t, schedule)


def data_to_score(x1: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """score = (a x1 - x) / s^2; linear: (t x1 - x) / (1 - t)^2. Diverges where sigma = 0, at t = 1."""
    return noise_to_score(data_to_noise(x1, x, t, schedule), x, t, schedule)


def score_to_data(score: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """E[x1 | x_t = x] = (x + s^2 score) / a; linear: (x + (1 - t)^2 score) / t. Diverges where alpha = 0, at t = 0."""
    return noise_to_data(score_to_noise(score, x, t, schedule), x, t, schedule)


def _at(schedule: Schedule, t: Array, x: Array) -> tuple[Array, Array, Array, Array]:
    """alpha, sigma and their derivatives at t, shaped to multiply x."""
    check_times(t)
    t = jnp.asarray(t, jnp.result_type(x)) if jnp.ndim(t) == 0 else t
    a, s, da, ds = (expand_to(value, x) for value in coefficients(schedule, t))
    return a, s, da, ds


def coefficients(schedule: Schedule, t: Array) -> tuple[Array, Array, Array, Array]:
    """alpha, sigma and their derivatives alpha', sigma' at t, all shaped like t."""
    one = jnp.ones_like(t)
    a, da = jax.jvp(schedule.alpha, (t,), (one,))
    s, ds = jax.jvp(schedule.sigma, (t,), (one,))
    return a, s, da, ds


def check_times(t: Array) -> None:
    """Raise where t is known, outside jit, and leaves [0, 1] by more than rounding."""
    if isinstance(t, jax.core.Tracer) or (isinstance(t, jax.Array) and not t.is_fully_addressable):
        return
    known = np.asarray(t, np.float64)
    if not np.all((known >= -1e-6) & (known <= 1 + 1e-6)):
        raise ValueError(
            f"expected times t in [0, 1], noise at 0 and data at 1, got {known.min()} to {known.max()}"
        )
