"""Affine paths x_t = alpha(t) x1 + sigma(t) x0, and conversions between predictions on them.

With a, s the values of alpha and sigma at t, primes for d/dt and D = a' s - s' a:

    velocity  u = a' x1 + s' x0        x1 = (s u - s' x) / D        x0 = (a' x - a u) / D
    score     grad log p_t(x) = -E[x0 | x] / s, where x0 is standard normal and independent of x1

The same formulas hold for conditional expectations given x_t = x, which is what trained networks
predict. The conversions take a schedule; the default is the linear path, where D = 1. Each takes
the prediction and x [b, *event] and t [b] (or a scalar), and says at which end it diverges;
everywhere else the value and its gradients are finite, and a number that diverges comes out as inf
or NaN at exactly that end, not clipped.

References:
    Lipman, Chen, Ben-Hamu, Nickel, Le, *Flow Matching for Generative Modeling*, 2023,
        arXiv:2210.02747.
    Albergo, Boffi, Vanden-Eijnden, *Stochastic Interpolants: A Unifying Framework for Flows and
        Diffusions*, 2023, arXiv:2303.08797.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

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
    """The two factors of an affine path x_t = alpha(t) x1 + sigma(t) x0, as functions of time.

    Any smooth pair does in which alpha runs from 0 (or nearly) to 1 and sigma from 1 to 0 (or
    nearly): derivatives are taken by jvp. `paths.schedules` has the usual ones, and `paths.LINEAR`
    is the linear one.

    Attributes:
        alpha: the factor of the data, t [b] -> [b].
        sigma: the factor of the noise, t [b] -> [b].
        time: (a, s) [b] -> t [b] with alpha(t) / sigma(t) = a / s, where it is known in closed
            form. With None, a function that needs it finds the root.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> schedule = paths.Schedule(alpha=lambda t: t**2, sigma=lambda t: 1 - t**2)
        >>> x0, x1 = jnp.array([[0.0]]), jnp.array([[8.0]])
        >>> paths.affine(schedule).point(x0, x1, jnp.array([0.5])).tolist()
        [[2.0]]
    """

    alpha: Callable[[Array], Array]
    sigma: Callable[[Array], Array]
    time: Callable[[Array, Array], Array] | None = None


LINEAR = Schedule(alpha=lambda t: t, sigma=lambda t: 1 - t, time=lambda a, s: a / (a + s))


def affine(schedule: Schedule, *, tolerance: float = 0.1) -> Path:
    """The path of a schedule, for `losses.flow_matching` and the like.

        point   alpha(t) x1 + sigma(t) x0        target   alpha'(t) x1 + sigma'(t) x0

    Args:
        schedule: alpha and sigma.
        tolerance: how far the schedule may be from its ends, see `check_ends`.

    Returns:
        Path: point and target, (x0 [b, *event], x1 [b, *event], t [b], *, key=None) -> [b, *event];
            no key is needed. They raise a ValueError for times outside [0, 1] where these are
            known, outside jit.

    Raises:
        ValueError: the schedule does not meet its ends (see `check_ends`).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> path = paths.affine(paths.schedules.cosine())
        >>> x0, x1, t = jnp.array([[1.0]]), jnp.array([[3.0]]), jnp.array([1.0])
        >>> round(float(path.target(x0, x1, t)[0, 0]), 4)  # -pi / 2 x0
        -1.5708
    """
    return _path(check_ends(schedule, tolerance=tolerance))


def check_ends(schedule: Schedule, *, tolerance: float = 0.1) -> Schedule:
    """A schedule that runs from noise to data, or an error.

    It has to satisfy |alpha / sigma| <= tolerance at t=0 and |sigma / alpha| <= tolerance at t=1,
    with sigma(0), alpha(1) > 0. These are ratios, so that schedules of any scale pass: variance
    exploding ones have alpha = 1 throughout. A flow starts from sigma(0) x0, and what alpha(0) /
    sigma(0) leaves of the data there is not in it. Inside jit nothing is checked.

    Args:
        schedule: alpha and sigma.
        tolerance: the largest ratio at an end.

    Returns:
        Schedule: the schedule, as it is.

    Raises:
        ValueError: alpha or sigma does not map [2] to [2], or the schedule does not meet its ends.
    """
    values = [jnp.asarray(f(jnp.asarray([0.0, 1.0]))) for f in (schedule.alpha, schedule.sigma)]
    for name, value in zip(("alpha", "sigma"), values, strict=True):
        if value.shape != (2,):
            raise ValueError(
                f"Schedule: expected {name} to map t [b] to [b], got shape "
                f"{list(value.shape)} for [2]"
            )
    if any(isinstance(value, jax.core.Tracer) for value in values):
        return schedule
    (a0, a1), (s0, s1) = (np.asarray(value, np.float64) for value in values)
    if not (s0 > 0 and a1 > 0 and abs(a0) <= tolerance * s0 and abs(s1) <= tolerance * a1):
        raise ValueError(
            "Schedule: expected noise at t=0 and data at t=1, alpha/sigma = 0 and "
            "sigma/alpha = 0 there to within "
            f"{tolerance}, got alpha(0)={a0:.4g}, sigma(0)={s0:.4g}, alpha(1)={a1:.4g}, "
            f"sigma(1)={s1:.4g}"
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
    """The path of rectified flow: straight lines at constant speed.

        point   (1 - t) x0 + t x1        target   x1 - x0

    Returns:
        Path: point and target, (x0 [b, *event], x1 [b, *event], t [b], *, key=None) -> [b, *event];
            no key is needed. They raise a ValueError for times outside [0, 1] where these are
            known, outside jit.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> x0, x1, t = jnp.array([[1.0]]), jnp.array([[3.0]]), jnp.array([0.25])
        >>> paths.linear().point(x0, x1, t).tolist(), paths.linear().target(x0, x1, t).tolist()
        ([[1.5]], [[2.0]])

    References:
        Liu, Gong, Liu, *Flow Straight and Fast: Learning to Generate and Transfer Data with
            Rectified Flow*, 2023, arXiv:2209.03003.
    """
    return _path(LINEAR)


def velocity_to_data(
    v: Float[Array, "b *event"],
    x: Float[Array, "b *event"],
    t: ArrayLike,
    schedule: Schedule = LINEAR,
) -> Float[Array, "b *event"]:
    """The data that a velocity predicts at (x, t).

        E[x1 | x_t = x] = (s v - s' x) / D      linear: x + (1 - t) v

    a and s are the values of alpha and sigma at t, primes are d/dt and D = a' s - s' a. It is
    finite at both ends.

    Args:
        v: the velocity, [b, *event].
        x: the states x_t, [b, *event].
        t: times in [0, 1], [b] or a scalar.
        schedule: the schedule of the path that the prediction belongs to; the default is the linear
            one.

    Returns:
        The prediction of the data, [b, *event], in the units of x.

    Raises:
        ValueError: t leaves [0, 1], where it is known, outside jit.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> x0, x1, t = jnp.array([[2.0]]), jnp.array([[10.0]]), jnp.array([0.25])
        >>> path = paths.linear()
        >>> x, v = path.point(x0, x1, t), path.target(x0, x1, t)
        >>> paths.velocity_to_data(v, x, t).tolist(), paths.velocity_to_noise(v, x, t).tolist()
        ([[10.0]], [[2.0]])
    """
    a, s, da, ds = _at(schedule, t, x)
    return (s * v - ds * x) / (da * s - ds * a)


def velocity_to_noise(
    v: Float[Array, "b *event"],
    x: Float[Array, "b *event"],
    t: ArrayLike,
    schedule: Schedule = LINEAR,
) -> Float[Array, "b *event"]:
    """The noise that a velocity predicts at (x, t).

        E[x0 | x_t = x] = (a' x - a v) / D      linear: x - t v

    a and s are the values of alpha and sigma at t, primes are d/dt and D = a' s - s' a. It is
    finite at both ends.

    Args:
        v: the velocity, [b, *event].
        x: the states x_t, [b, *event].
        t: times in [0, 1], [b] or a scalar.
        schedule: the schedule of the path that the prediction belongs to; the default is the linear
            one.

    Returns:
        The prediction of the noise x0, [b, *event].

    Raises:
        ValueError: t leaves [0, 1], where it is known, outside jit.
    """
    a, s, da, ds = _at(schedule, t, x)
    return (da * x - a * v) / (da * s - ds * a)


def data_to_velocity(
    x1: Float[Array, "b *event"],
    x: Float[Array, "b *event"],
    t: ArrayLike,
    schedule: Schedule = LINEAR,
) -> Float[Array, "b *event"]:
    """The velocity of a prediction of the data at (x, t).

        v = (D x1 + s' x) / s      linear: (x1 - x) / (1 - t)

    a and s are the values of alpha and sigma at t, primes are d/dt and D = a' s - s' a. It diverges
    where sigma = 0, at t = 1, where the last stage of Heun's and other solvers sits: end their grid
    before, and finish with x1. A network that predicts the data becomes a velocity by
    `paths.parameterizations.from_data`.

    Args:
        x1: the predicted data, [b, *event].
        x: the states x_t, [b, *event].
        t: times in [0, 1], [b] or a scalar.
        schedule: the schedule of the path that the prediction belongs to; the default is the linear
            one.

    Returns:
        The velocity, dx/dt, [b, *event].

    Raises:
        ValueError: t leaves [0, 1], where it is known, outside jit.
    """
    a, s, da, ds = _at(schedule, t, x)
    return ((da * s - ds * a) * x1 + ds * x) / s


def noise_to_velocity(
    x0: Float[Array, "b *event"],
    x: Float[Array, "b *event"],
    t: ArrayLike,
    schedule: Schedule = LINEAR,
) -> Float[Array, "b *event"]:
    """The velocity of a prediction of the noise at (x, t).

    Also known as: eps to velocity.

        v = (a' x - D x0) / a      linear: (x - x0) / t

    a and s are the values of alpha and sigma at t, primes are d/dt and D = a' s - s' a. It diverges
    where alpha = 0, at t = 0. It takes arrays: a network that predicts the noise becomes a velocity
    by `paths.parameterizations.from_noise`.

    Args:
        x0: the predicted noise, [b, *event].
        x: the states x_t, [b, *event].
        t: times in [0, 1], [b] or a scalar.
        schedule: the schedule of the path that the prediction belongs to; the default is the linear
            one.

    Returns:
        The velocity, dx/dt, [b, *event].

    Raises:
        ValueError: t leaves [0, 1], where it is known, outside jit.
    """
    a, s, da, ds = _at(schedule, t, x)
    return (da * x - (da * s - ds * a) * x0) / a


def data_to_noise(
    x1: Float[Array, "b *event"],
    x: Float[Array, "b *event"],
    t: ArrayLike,
    schedule: Schedule = LINEAR,
) -> Float[Array, "b *event"]:
    """The noise that belongs to a prediction of the data at (x, t).

        E[x0 | x_t = x] = (x - a x1) / s      linear: (x - t x1) / (1 - t)

    a and s are the values of alpha and sigma at t, primes are d/dt and D = a' s - s' a. It diverges
    where sigma = 0, at t = 1.

    Args:
        x1: the predicted data, [b, *event].
        x: the states x_t, [b, *event].
        t: times in [0, 1], [b] or a scalar.
        schedule: the schedule of the path that the prediction belongs to; the default is the linear
            one.

    Returns:
        The prediction of the noise x0, [b, *event].

    Raises:
        ValueError: t leaves [0, 1], where it is known, outside jit.
    """
    a, s, _, _ = _at(schedule, t, x)
    return (x - a * x1) / s


def noise_to_data(
    x0: Float[Array, "b *event"],
    x: Float[Array, "b *event"],
    t: ArrayLike,
    schedule: Schedule = LINEAR,
) -> Float[Array, "b *event"]:
    """The data that belong to a prediction of the noise at (x, t).

        E[x1 | x_t = x] = (x - s x0) / a      linear: (x - (1 - t) x0) / t

    a and s are the values of alpha and sigma at t, primes are d/dt and D = a' s - s' a. It diverges
    where alpha = 0, at t = 0.

    Args:
        x0: the predicted noise, [b, *event].
        x: the states x_t, [b, *event].
        t: times in [0, 1], [b] or a scalar.
        schedule: the schedule of the path that the prediction belongs to; the default is the linear
            one.

    Returns:
        The prediction of the data, [b, *event], in the units of x.

    Raises:
        ValueError: t leaves [0, 1], where it is known, outside jit.
    """
    a, s, _, _ = _at(schedule, t, x)
    return (x - s * x0) / a


def noise_to_score(
    x0: Float[Array, "b *event"],
    x: Float[Array, "b *event"],
    t: ArrayLike,
    schedule: Schedule = LINEAR,
) -> Float[Array, "b *event"]:
    """The score of a prediction of the noise at (x, t).

        score = -x0 / s      linear: -x0 / (1 - t)

    a and s are the values of alpha and sigma at t, primes are d/dt and D = a' s - s' a. It diverges
    where sigma = 0, at t = 1.

    Args:
        x0: the predicted noise, [b, *event].
        x: the states x_t, [b, *event].
        t: times in [0, 1], [b] or a scalar.
        schedule: the schedule of the path that the prediction belongs to; the default is the linear
            one.

    Returns:
        The score, grad log p_t(x), [b, *event].

    Raises:
        ValueError: t leaves [0, 1], where it is known, outside jit.
    """
    return -x0 / _at(schedule, t, x)[1]


def score_to_noise(
    score: Float[Array, "b *event"],
    x: Float[Array, "b *event"],
    t: ArrayLike,
    schedule: Schedule = LINEAR,
) -> Float[Array, "b *event"]:
    """The noise that a score predicts at (x, t).

        E[x0 | x_t = x] = -s score      linear: -(1 - t) score

    a and s are the values of alpha and sigma at t, primes are d/dt and D = a' s - s' a. It is
    finite at both ends (where the score is).

    Args:
        score: the score, grad log p_t(x), [b, *event].
        x: the states x_t, [b, *event].
        t: times in [0, 1], [b] or a scalar.
        schedule: the schedule of the path that the prediction belongs to; the default is the linear
            one.

    Returns:
        The prediction of the noise x0, [b, *event].

    Raises:
        ValueError: t leaves [0, 1], where it is known, outside jit.
    """
    return -_at(schedule, t, x)[1] * score


def velocity_to_score(
    v: Float[Array, "b *event"],
    x: Float[Array, "b *event"],
    t: ArrayLike,
    schedule: Schedule = LINEAR,
) -> Float[Array, "b *event"]:
    """The score of a velocity at (x, t).

        score = (a v - a' x) / (D s)      linear: (t v - x) / (1 - t)

    a and s are the values of alpha and sigma at t, primes are d/dt and D = a' s - s' a. It diverges
    where sigma = 0, at t = 1.

    Args:
        v: the velocity, [b, *event].
        x: the states x_t, [b, *event].
        t: times in [0, 1], [b] or a scalar.
        schedule: the schedule of the path that the prediction belongs to; the default is the linear
            one.

    Returns:
        The score, grad log p_t(x), [b, *event].

    Raises:
        ValueError: t leaves [0, 1], where it is known, outside jit.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> x, t = jnp.array([[2.0]]), jnp.array([0.0])
        >>> paths.velocity_to_score(jnp.array([[7.0]]), x, t).tolist()  # standard normal: -x
        [[-2.0]]
    """
    return noise_to_score(velocity_to_noise(v, x, t, schedule), x, t, schedule)


def score_to_velocity(
    score: Float[Array, "b *event"],
    x: Float[Array, "b *event"],
    t: ArrayLike,
    schedule: Schedule = LINEAR,
) -> Float[Array, "b *event"]:
    """The velocity of a score at (x, t).

        v = (a' x + D s score) / a      linear: (x + (1 - t) score) / t

    a and s are the values of alpha and sigma at t, primes are d/dt and D = a' s - s' a. It diverges
    where alpha = 0, at t = 0.

    Args:
        score: the score, grad log p_t(x), [b, *event].
        x: the states x_t, [b, *event].
        t: times in [0, 1], [b] or a scalar.
        schedule: the schedule of the path that the prediction belongs to; the default is the linear
            one.

    Returns:
        The velocity, dx/dt, [b, *event].

    Raises:
        ValueError: t leaves [0, 1], where it is known, outside jit.
    """
    return noise_to_velocity(score_to_noise(score, x, t, schedule), x, t, schedule)


def data_to_score(
    x1: Float[Array, "b *event"],
    x: Float[Array, "b *event"],
    t: ArrayLike,
    schedule: Schedule = LINEAR,
) -> Float[Array, "b *event"]:
    """The score of a prediction of the data at (x, t).

        score = (a x1 - x) / s^2      linear: (t x1 - x) / (1 - t)^2

    a and s are the values of alpha and sigma at t, primes are d/dt and D = a' s - s' a. It diverges
    where sigma = 0, at t = 1.

    Args:
        x1: the predicted data, [b, *event].
        x: the states x_t, [b, *event].
        t: times in [0, 1], [b] or a scalar.
        schedule: the schedule of the path that the prediction belongs to; the default is the linear
            one.

    Returns:
        The score, grad log p_t(x), [b, *event].

    Raises:
        ValueError: t leaves [0, 1], where it is known, outside jit.
    """
    return noise_to_score(data_to_noise(x1, x, t, schedule), x, t, schedule)


def score_to_data(
    score: Float[Array, "b *event"],
    x: Float[Array, "b *event"],
    t: ArrayLike,
    schedule: Schedule = LINEAR,
) -> Float[Array, "b *event"]:
    """The data that a score predicts at (x, t).

        E[x1 | x_t = x] = (x + s^2 score) / a      linear: (x + (1 - t)^2 score) / t

    a and s are the values of alpha and sigma at t, primes are d/dt and D = a' s - s' a. It diverges
    where alpha = 0, at t = 0.

    Args:
        score: the score, grad log p_t(x), [b, *event].
        x: the states x_t, [b, *event].
        t: times in [0, 1], [b] or a scalar.
        schedule: the schedule of the path that the prediction belongs to; the default is the linear
            one.

    Returns:
        The prediction of the data, [b, *event], in the units of x.

    Raises:
        ValueError: t leaves [0, 1], where it is known, outside jit.
    """
    return noise_to_data(score_to_noise(score, x, t, schedule), x, t, schedule)


def _at(schedule: Schedule, t: ArrayLike, x: Array) -> tuple[Array, Array, Array, Array]:
    """alpha, sigma and their derivatives at t, shaped to multiply x."""
    check_times(t)
    t = jnp.asarray(t, jnp.result_type(x)) if jnp.ndim(t) == 0 else jnp.asarray(t)
    a, s, da, ds = (expand_to(value, x) for value in coefficients(schedule, t))
    return a, s, da, ds


def coefficients(
    schedule: Schedule, t: Float[Array, "*shape"]
) -> tuple[
    Float[Array, "*shape"],
    Float[Array, "*shape"],
    Float[Array, "*shape"],
    Float[Array, "*shape"],
]:
    """The values and the derivatives of a schedule at given times.

    Args:
        schedule: alpha and sigma.
        t: times in [0, 1], of any shape.

    Returns:
        alpha: its values, shaped like t.
        sigma: its values, shaped like t.
        alpha_slope: d alpha / dt, shaped like t.
        sigma_slope: d sigma / dt, shaped like t.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> a, s, da, ds = paths.coefficients(paths.LINEAR, jnp.array([0.25]))
        >>> a.tolist(), s.tolist(), da.tolist(), ds.tolist()
        ([0.25], [0.75], [1.0], [-1.0])
    """
    one = jnp.ones_like(t)
    a, da = jax.jvp(schedule.alpha, (t,), (one,))
    s, ds = jax.jvp(schedule.sigma, (t,), (one,))
    return a, s, da, ds


def check_times(t: ArrayLike) -> None:
    """Raise where t is known, outside jit, and leaves [0, 1] by more than rounding."""
    if isinstance(t, jax.core.Tracer) or (isinstance(t, jax.Array) and not t.is_fully_addressable):
        return
    known = np.asarray(t, np.float64)
    if not np.all((known >= -1e-6) & (known <= 1 + 1e-6)):
        raise ValueError(
            f"expected times t in [0, 1], noise at 0 and data at 1, got {known.min()} to "
            f"{known.max()}"
        )
