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

from jflow._util import expand_to
from jflow.types import Array, Path

__all__ = [
    "LINEAR",
    "Schedule",
    "affine",
    "linear",
    "score_to_velocity",
    "score_to_x0",
    "score_to_x1",
    "velocity_to_score",
    "velocity_to_x0",
    "velocity_to_x1",
    "x0_to_score",
    "x0_to_velocity",
    "x0_to_x1",
    "x1_to_score",
    "x1_to_velocity",
    "x1_to_x0",
]


class Schedule(NamedTuple):
    """alpha(t), sigma(t): t [b] -> [b], smooth; alpha runs from 0 (or nearly) to 1, sigma from 1 to 0 (or nearly)."""

    alpha: Callable[[Array], Array]
    sigma: Callable[[Array], Array]


LINEAR = Schedule(alpha=lambda t: t, sigma=lambda t: 1 - t)


def affine(schedule: Schedule) -> Path:
    """The path of a schedule: point alpha(t) x1 + sigma(t) x0, target alpha'(t) x1 + sigma'(t) x0."""

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
    return affine(LINEAR)


def velocity_to_x1(v: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """E[x1 | x_t = x] = (s v - s' x) / D; linear: x + (1 - t) v, finite at both ends."""
    a, s, da, ds = _at(schedule, t, x)
    return (s * v - ds * x) / (da * s - ds * a)


def velocity_to_x0(v: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """E[x0 | x_t = x] = (a' x - a v) / D; linear: x - t v, finite at both ends."""
    a, s, da, ds = _at(schedule, t, x)
    return (da * x - a * v) / (da * s - ds * a)


def x1_to_velocity(x1: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """v = (D x1 + s' x) / s; linear: (x1 - x) / (1 - t). Diverges where sigma = 0, at t = 1, where the last stage of
    Heun's and other solvers sits: end their grid before, and finish with x1."""
    a, s, da, ds = _at(schedule, t, x)
    return ((da * s - ds * a) * x1 + ds * x) / s


def x0_to_velocity(x0: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """v = (a' x - D x0) / a; linear: (x - x0) / t. Diverges where alpha = 0, at t = 0."""
    a, s, da, ds = _at(schedule, t, x)
    return (da * x - (da * s - ds * a) * x0) / a


def x1_to_x0(x1: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """E[x0 | x_t = x] = (x - a x1) / s; linear: (x - t x1) / (1 - t). Diverges where sigma = 0, at t = 1."""
    a, s, _, _ = _at(schedule, t, x)
    return (x - a * x1) / s


def x0_to_x1(x0: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """E[x1 | x_t = x] = (x - s x0) / a; linear: (x - (1 - t) x0) / t. Diverges where alpha = 0, at t = 0."""
    a, s, _, _ = _at(schedule, t, x)
    return (x - s * x0) / a


def x0_to_score(x0: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """score = -x0 / s; linear: -x0 / (1 - t). Diverges where sigma = 0, at t = 1."""
    return -x0 / _at(schedule, t, x)[1]


def score_to_x0(score: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """E[x0 | x_t = x] = -s score; linear: -(1 - t) score, finite at both ends (where the score is)."""
    return -_at(schedule, t, x)[1] * score


def velocity_to_score(v: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """score = (a v - a' x) / (D s); linear: (t v - x) / (1 - t). Diverges where sigma = 0, at t = 1."""
    return x0_to_score(velocity_to_x0(v, x, t, schedule), x, t, schedule)


def score_to_velocity(score: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """v = (a' x + D s score) / a; linear: (x + (1 - t) score) / t. Diverges where alpha = 0, at t = 0."""
    return x0_to_velocity(score_to_x0(score, x, t, schedule), x, t, schedule)


def x1_to_score(x1: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """score = (a x1 - x) / s^2; linear: (t x1 - x) / (1 - t)^2. Diverges where sigma = 0, at t = 1."""
    return x0_to_score(x1_to_x0(x1, x, t, schedule), x, t, schedule)


def score_to_x1(score: Array, x: Array, t: Array, schedule: Schedule = LINEAR) -> Array:
    """E[x1 | x_t = x] = (x + s^2 score) / a; linear: (x + (1 - t)^2 score) / t. Diverges where alpha = 0, at t = 0."""
    return x0_to_x1(score_to_x0(score, x, t, schedule), x, t, schedule)


def _at(schedule: Schedule, t: Array, x: Array) -> tuple[Array, Array, Array, Array]:
    """alpha, sigma and their derivatives at t, shaped to multiply x."""
    t = jnp.asarray(t, jnp.result_type(x)) if jnp.ndim(t) == 0 else t
    one = jnp.ones_like(t)
    a, da = jax.jvp(schedule.alpha, (t,), (one,))
    s, ds = jax.jvp(schedule.sigma, (t,), (one,))
    return expand_to(a, x), expand_to(s, x), expand_to(da, x), expand_to(ds, x)
