"""Linear inverse problems: velocities whose samples answer a measurement y = A x + noise.

What the velocity knows of the clean data at (x, t) is its prediction x1 = E[x1 | x_t = x]. Both
velocities here take x1 given x_t for N(x1, r^2 I); then y is N(A x1, r^2 A A^T + std^2 I), and they
differ in how the prediction is said to depend on x. `jflow.steering.loss_guidance` and `flow_chef`
follow the gradient of any loss instead.
"""

from collections.abc import Callable
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jflow import solvers
from jflow._core.arrays import expand_to, float_dtype, sum_event
from jflow._core.checks import check_noun, check_weights, like_state, rows
from jflow._core.numbers import number_at
from jflow.paths import LINEAR, Schedule, coefficients, velocity_to_data
from jflow.solvers import Method
from jflow.steering._common import safe_norm
from jflow.steering._condition import (
    SteeringCondition,
    check_scale,
    check_window,
    read_condition,
    scale_at,
    steered_init,
)
from jflow.steering.measurements import Measurement, as_measured, check_measurement
from jflow.types import Array, Cond, Field, NumberOrFunction, Params, Velocity

__all__ = [
    "InverseInfo",
    "consistent_source",
    "data_consistency",
    "pseudoinverse_guidance",
    "residual_norm",
    "sample_inverse",
    "squared_residual",
]

_DEFAULT = solvers.fixed(50, diffrax.Midpoint())
Variance = Callable[[Array], Array]


class InverseInfo(NamedTuple):
    """How well samples answer a measurement, and what they cost, row by row.

    Attributes:
        residual: A x - y, [b, *measured].
        norm: its euclidean norm, [b]; NaN for a row whose solve failed, and for that alone.
        evaluations: how often the velocity that was steered was evaluated for this row, [b] int32;
            the docstring of each method says how often that goes backwards through it as well.
        status: a `solvers.Status`, [b] int32; 0 is success.
    """

    residual: Float[Array, "b ..."]
    norm: Float[Array, " b"]
    evaluations: Int[Array, " b"]
    status: Int[Array, " b"]


def pseudoinverse_guidance(
    velocity: Velocity,
    measurement: Measurement,
    std: float,
    *,
    scale: NumberOrFunction = 1.0,
    variance: Variance | None = None,
    window: tuple[float, float] = (0.0, 1.0),
    schedule: Schedule = LINEAR,
    margin: float = 1e-3,
) -> Velocity:
    """Guidance by a linear measurement, with a backward pass through the network.

    Also known as: PiGDM, pseudoinverse-guided diffusion, OT-ODE, posterior guidance.

        v + scale c J^T A^T (r^2 A A^T + std^2 I)^-1 (y - A x1),     c = D s / a

    x1 is the prediction of the data at (x, t), J = d x1 / d x, a and s are the values of the
    schedule at t and D = a' s - s' a; linear: x1 = x + (1 - t) v and c = (1 - t) / t. It is exact
    for Gaussian data N(m, v I) with r^2 = v s^2 / (v a^2 + s^2); the default is v = 1.

    Each evaluation of it is one of the velocity and one pass back through it.

    c grows without bound towards t = 0, where J of a perfect network vanishes and that of a trained
    one does not: start later, from `consistent_source`, or give a window.

    Args:
        velocity: the velocity to steer; x is an array.
        measurement: A.
        std: the standard deviation of the noise in y, at least 0.
        scale: a number of at least 0, or t [b] -> [b]: the gamma_t of OT-ODE.
        variance: r^2 as a function of t, [b] -> [b], positive before t = 1. A smaller one follows
            the measurement more closely: that of v = 0.1 is better on digits in [-1, 1].
        window: the times (first, last) within which it acts; elsewhere it is the velocity itself.
        schedule: the path of the velocity; the default is the linear one.
        margin: all of it is evaluated at times in [margin, 1 - margin], in (0, 0.5).

    Returns:
        Velocity: params are those of `velocity`; cond is a `SteeringCondition(y, cond)`. It raises
            a ValueError for another cond, and for a measurement of another shape.

    Raises:
        TypeError: velocity or measurement is something else.
        ValueError: std or scale is negative, the window is not within [0, 1], or margin is out of
            range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import oracles, steering
        >>> velocity = oracles.as_velocity(oracles.gaussian([0.0, 0.0], 1.0))
        >>> first = steering.measurements.matrix([[1.0, 0.0]])
        >>> guided = steering.pseudoinverse_guidance(velocity, first, std=1.0)
        >>> cond = steering.SteeringCondition(jnp.array([[2.0]]))
        >>> x = jnp.zeros((1, 2))
        >>> v = guided.apply({}, x, jnp.array([0.5]), cond)
        >>> round(float(v[0, 0]), 3)  # as for the data N(1, 1 / 2)
        1.333

    References:
        Song, Vahdat, Mardani, Kautz, *Pseudoinverse-Guided Diffusion Models for Inverse Problems*,
            2023.
        Pokle, Muckley, Chen, Karrer, *Training-free Linear Image Inverses via Flows*, 2024,
            arXiv:2310.04432 (for flows, with this r^2).
    """
    name = "pseudoinverse_guidance"
    window = _check(name, velocity, measurement, std, scale, window, margin)

    def apply(params, x, t, cond=None, *, key=None):
        t = jnp.clip(rows(t, x.shape[0]).astype(float_dtype(x)), margin, 1 - margin)
        y, own = read_condition(name, cond, x.shape[0])

        def predict(x):
            v = like_state(name, velocity.apply(params, x, t, own, key=key), x)
            return velocity_to_data(v, x, t, schedule), v

        x1, pull, v = jax.vjp(predict, x, has_aux=True)
        a, s, da, ds = coefficients(schedule, t)
        spread = prediction_variance(name, variance, a, s, t)
        step = _step(name, measurement, x1, y, std, spread)
        (gradient,) = pull((step / expand_to(spread, step)).astype(x1.dtype))
        weight = scale_at(name, scale, window, t) * (da * s - ds * a) * s / a
        return (v + expand_to(weight, x) * gradient).astype(v.dtype)

    return Velocity(steered_init(name, velocity), apply)


def data_consistency(
    velocity: Velocity,
    measurement: Measurement,
    std: float = 0.0,
    *,
    scale: NumberOrFunction = 1.0,
    variance: Variance | None = None,
    window: tuple[float, float] = (0.0, 1.0),
    schedule: Schedule = LINEAR,
    margin: float = 1e-3,
) -> Velocity:
    """Guidance by a linear measurement that puts it into the prediction, without a backward pass.

    Also known as: DDNM, null-space guidance, data-consistent projection, hard data consistency.

        the velocity of the prediction  x1 + scale A^T (A A^T + (std / r)^2 I)^-1 (y - A x1)

    in the place of x1. With std = 0 this is x1 - A^+ (A x1 - y): what A sees is that of y, and its
    null space is left to the velocity. The last step of Euler and of the midpoint rule then ends
    with A x = y; at t = 1 itself the velocity is 0 / 0, and solvers that evaluate it there, such as
    Heun's, miss y by O(h). With noise it is the posterior mean of N(x1, r^2 I).

    It is `pseudoinverse_guidance` with J = (a r^2 / s^2) I, which is what Tweedie's formula says of
    J where the covariance of the data given x is r^2 I. The two agree for Gaussian data N(m, v I),
    where both are exact with r^2 = v s^2 / (v a^2 + s^2); the default is v = 1. J = I is scale =
    lambda t: s^2 / (a r^2), large near t = 0.

    Each evaluation of it is one of the velocity, and there is no pass back through it.

    Args:
        velocity: the velocity to steer; x is an array.
        measurement: A.
        std: the standard deviation of the noise in y, at least 0.
        scale: a number of at least 0, or t [b] -> [b]; 1 is the formula. J = I was better in
            inpainting and super-resolution of digits.
        variance: r^2 as a function of t, [b] -> [b], positive before t = 1; without noise it has no
            part.
        window: the times (first, last) within which it acts; elsewhere it is the velocity itself.
        schedule: the path of the velocity; the default is the linear one.
        margin: all of it is evaluated at times in [margin, 1 - margin], in (0, 0.5).

    Returns:
        Velocity: params are those of `velocity`; cond is a `SteeringCondition(y, cond)`. It raises
            a ValueError for another cond, and for a measurement of another shape.

    Raises:
        TypeError: velocity or measurement is something else.
        ValueError: std or scale is negative, the window is not within [0, 1], or margin is out of
            range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import oracles, steering
        >>> velocity = oracles.as_velocity(oracles.gaussian([0.0, 0.0], 1.0))
        >>> total = steering.measurements.matrix([[1.0, 1.0]])
        >>> steered = steering.data_consistency(velocity, total)
        >>> x0, y = jnp.array([[1.0, -1.0]]), jnp.array([[3.0]])
        >>> x1, _ = steering.sample_inverse(steered, {}, x0, total, y, method=8)
        >>> round(float(x1.sum()), 3)
        3.0

    References:
        Wang, Yu, Zhang, *Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model*,
            2022, arXiv:2212.00490 (without noise; the form with noise, and both as a velocity, are
            ours).
    """
    name = "data_consistency"
    window = _check(name, velocity, measurement, std, scale, window, margin)

    def apply(params, x, t, cond=None, *, key=None):
        t = jnp.clip(rows(t, x.shape[0]).astype(float_dtype(x)), margin, 1 - margin)
        y, own = read_condition(name, cond, x.shape[0])
        v = like_state(name, velocity.apply(params, x, t, own, key=key), x)
        x1 = velocity_to_data(v, x, t, schedule)
        a, s, da, ds = coefficients(schedule, t)
        step = _step(name, measurement, x1, y, std, prediction_variance(name, variance, a, s, t))
        weight = scale_at(name, scale, window, t) * (da * s - ds * a) / s
        return (v + expand_to(weight, x) * step).astype(v.dtype)

    return Velocity(steered_init(name, velocity), apply)


def consistent_source(
    measurement: Measurement,
    x0: Float[Array, "b *event"],
    y: Float[Array, "rows ..."],
    t: float,
    *,
    ridge: ArrayLike = 0.0,
    schedule: Schedule = LINEAR,
) -> Float[Array, "b *event"]:
    """Noise with the measurement put in, to start from at a time t > 0.

        a A^+ y + s x0

    a and s are the values of the schedule at t. What A sees of it has the law of a state at time t;
    what it does not see is noise around 0, as if the data were 0 there: choose t small.

    Args:
        measurement: A.
        x0: standard normal noise, [b, *event].
        y: the measurement, [b, *measured], or one row for all.
        t: the time to start at, in [0, 1].
        ridge: for y with noise, its variance over that of the data, see `Measurement`.
        schedule: the path of the velocity; the default is the linear one.

    Returns:
        The state at time t, [b, *event], for `sample_inverse(..., t0=t)`.

    Raises:
        ValueError: t is outside [0, 1], or the shapes do not fit.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> total = steering.measurements.matrix([[1.0, 1.0]])
        >>> x0, y = jnp.array([[1.0, -1.0]]), jnp.array([[4.0]])
        >>> steering.consistent_source(total, x0, y, 0.5).sum(axis=1).round(2)
        Array([2.], dtype=float32)

    References:
        Pokle, Muckley, Chen, Karrer, *Training-free Linear Image Inverses via Flows*, 2024,
            arXiv:2310.04432 (that one starts so; of what in the place of the pseudo-inverse it
            leaves open).
    """
    check_measurement("consistent_source", measurement)
    if not 0 <= t <= 1:
        raise ValueError(f"consistent_source: expected t in [0, 1], got {t}")
    known = as_measured("consistent_source", y, measurement.apply(x0))
    a, s, _, _ = coefficients(schedule, jnp.full_like(x0, t, shape=x0.shape[:1]))
    seen = measurement.pseudo_inverse(known, ridge).astype(x0.dtype)
    return expand_to(a, x0) * seen + expand_to(s, x0) * x0


def sample_inverse(
    velocity: Velocity,
    params: Params,
    x0: Float[Array, "b *event"],
    measurement: Measurement,
    y: Float[Array, "rows ..."],
    cond: Cond = None,
    *,
    method: Method | int | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
) -> tuple[Float[Array, "b *event"], InverseInfo]:
    """Sample a velocity that a measurement steers, and look at what is left of the measurement.

    It is `solvers.sample` with the condition SteeringCondition(y, cond), and the residual A x - y
    of what comes out. Under jit, close over velocity, measurement and method; y is data.

    Args:
        velocity: a steered velocity, such as `data_consistency(velocity, measurement)`.
        params: its params.
        x0: the states at t0, [b, *event].
        measurement: A, for the residual.
        y: the measurement, [b, *measured], or one row for all.
        cond: the condition of the velocity that is steered, [b, ...] or one row for all.
        method: how to solve, as in `solvers.sample`; the default is 50 steps, and the default
            solver `diffrax.Midpoint()`, which does not evaluate at t = 1.
        t0: the time of x0, in [0, 1].
        t1: the time to go to, in [0, 1].

    Returns:
        x1: the states at t1, [b, *event].
        info: an `InverseInfo`, evaluations those that the solver made.

    Raises:
        TypeError: velocity, measurement or method is something else.
        ValueError: as `solvers.sample`, and for a measurement of another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import oracles, steering
        >>> velocity = oracles.as_velocity(oracles.gaussian([0.0, 0.0], 1.0))
        >>> total = steering.measurements.matrix([[1.0, 1.0]])
        >>> steered = steering.data_consistency(velocity, total)
        >>> x0, y = jnp.array([[1.0, -1.0], [0.0, 2.0]]), jnp.array([[3.0]])
        >>> x1, info = steering.sample_inverse(steered, {}, x0, total, y, method=8)
        >>> info.norm.round(3).tolist(), info.evaluations.tolist()  # two a step
        ([0.0, 0.0], [16, 16])
    """
    check_measurement("sample_inverse", measurement)
    method = solvers.as_method("sample_inverse", method, _DEFAULT, t0=t0, t1=t1)
    y = as_measured("sample_inverse", y, measurement.apply(x0))
    x1, info = solvers.sample(
        velocity, params, x0, SteeringCondition(y, cond), method=method, t0=t0, t1=t1
    )
    return x1, inverse_info(measurement, x1, y, info.evaluations, info.status)


def inverse_info(measurement, x, y, evaluations, status) -> InverseInfo:
    """The residual of x beside what it cost."""
    seen = measurement.apply(x)
    residual = seen - as_measured("inverse_info", y, seen)
    return InverseInfo(residual, safe_norm(residual), evaluations, status)


def residual_norm(measurement: Measurement) -> Callable[[Array, Array], Array]:
    """The norm of a residual as a loss, for `loss_guidance` and `flow_chef`.

        |A x1 - y|

    Its gradient has the length that A gives it however small the residual is: the step of diffusion
    posterior sampling (DPS), normalized. Where the residual is 0, it is 0.

    Args:
        measurement: A.

    Returns:
        (x1 [b, *event], y [b, *measured]) -> [b].
    """
    check_measurement("residual_norm", measurement)

    def loss(x1, y):
        seen = measurement.apply(x1)
        return safe_norm(seen - as_measured("residual_norm", y, seen))

    return loss


def squared_residual(measurement: Measurement, std: float = 1.0) -> Callable[[Array, Array], Array]:
    """Half the squared norm of a residual as a loss, for `loss_guidance` and `flow_chef`.

        |A x1 - y|^2 / (2 std^2)

    It is -log p(y | x1) up to a constant, for noise of this standard deviation.

    Args:
        measurement: A.
        std: the standard deviation of the noise, above 0.

    Returns:
        (x1 [b, *event], y [b, *measured]) -> [b].

    Raises:
        ValueError: std is not above 0.
    """
    check_measurement("squared_residual", measurement)
    if not std > 0:
        raise ValueError(f"squared_residual: expected std > 0, got {std}")
    std = float(std)

    def loss(x1, y):
        seen = measurement.apply(x1)
        return sum_event((seen - as_measured("squared_residual", y, seen)) ** 2) / (2 * std**2)

    return loss


def _check(name, velocity, measurement, std, scale, window, margin):
    check_noun(name, velocity, Velocity, Field)
    check_measurement(name, measurement)
    check_weights(name, std=std)
    check_scale(name, scale)
    if not 0 < margin < 0.5:
        raise ValueError(f"{name}: expected margin in (0, 0.5), got {margin}")
    return check_window(name, window)


def prediction_variance(name, variance, a, s, t):
    """r^2 [b] of the data given x_t: variance(t), or that of data N(m, I)."""
    if variance is None:
        return s**2 / (a**2 + s**2)
    return number_at(name, "variance(t)", variance, t, like=t)


def _step(name, measurement, x1, y, std, variance):
    """A^T (A A^T + std^2 / variance I)^-1 (y - A x1)."""
    seen = measurement.apply(x1)
    return measurement.pseudo_inverse(as_measured(name, y, seen) - seen, float(std) ** 2 / variance)
