"""Samplers of inverse problems that are no velocity: the best source, and turns of prediction and
measurement."""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from jflow import solvers
from jflow._core.arrays import expand_to, float_dtype, sum_event
from jflow._core.checks import (
    check_cond,
    check_noun,
    check_weights,
    check_whole,
    like_state,
    need_key,
)
from jflow._core.numbers import check_number
from jflow.paths import LINEAR, Schedule, coefficients, velocity_to_data
from jflow.solvers import Method
from jflow.steering._common import floating
from jflow.steering._inverse import InverseInfo, Variance, inverse_info, prediction_variance
from jflow.steering.measurements import Measurement, as_measured, check_measurement
from jflow.types import Array, Cond, Field, Key, Params, Velocity

__all__ = ["d_flow", "flower", "pnp_flow"]

_ADAM = optax.adam(0.1)


def pnp_flow(
    velocity: Velocity,
    params: Params,
    key: Key,
    measurement: Measurement,
    y: Float[Array, "rows ..."],
    cond: Cond = None,
    *,
    steps: int = 50,
    step_size: float = 1.0,
    power: float = 1.0,
    draws: int = 1,
    schedule: Schedule = LINEAR,
) -> tuple[Float[Array, "b *event"], InverseInfo]:
    """Restoration by turns of a gradient step to the measurement and a denoising by the flow.

    Also known as: PnP-Flow, plug-and-play flow matching.

    From x = A^+ y, at t = 0, 1/n, ..., 1 - 1/n:

        z = x - step_size (1 - t)^power A^T (A x - y)
        x = the mean over draws of x1(a z + s e, t),     e ~ N(0, I)

    x1 is the prediction of the data, a and s are the values of the schedule at t. It returns one
    restoration of each row and no sample of the posterior: the draws of the last steps differ
    little.

    It takes steps * draws evaluations of the velocity, and no pass back through it.

    Args:
        velocity: the velocity.
        params: its params.
        key: a key.
        measurement: A.
        y: the measurement, [b, *measured].
        cond: the condition, [b, ...] or one row for all.
        steps: n, at least 1.
        step_size: of the gradient; up to 2 / |A|^2 a step alone converges.
        power: how fast the steps become small, at least 0.
        draws: how many predictions are averaged, at least 1.
        schedule: the path of the velocity; the default is the linear one.

    Returns:
        x: the restorations, [b, *event].
        info: an `InverseInfo`; status is that of a solve, NOT_FINITE where x is not finite.

    Raises:
        TypeError: velocity or measurement is something else.
        ValueError: an option is out of range, the key is None, or the shapes do not fit.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import oracles, steering
        >>> velocity = oracles.as_velocity(oracles.gaussian([1.0, 1.0], 0.01))
        >>> total = steering.measurements.matrix([[1.0, 1.0]])
        >>> y = jnp.array([[2.0]])
        >>> x, info = steering.pnp_flow(velocity, {}, jax.random.key(0), total, y, steps=10)
        >>> x.round(1).tolist(), info.evaluations.tolist()
        ([[1.0, 1.0]], [10])

    References:
        Martin, Gagneux, Hagemann, Steidl, *PnP-Flow: Plug-and-Play Image Restoration with Flow
            Matching*, 2024, arXiv:2410.02423.
    """
    name = "pnp_flow"
    check_noun(name, velocity, Velocity, Field)
    check_measurement(name, measurement)
    check_whole(name, steps=steps, draws=draws)
    check_weights(name, step_size=step_size, power=power)
    need_key(name, key)
    given = measurement.pseudo_inverse(y)
    start = given.astype(float_dtype(given))
    y = as_measured(name, y, measurement.apply(start))
    n = start.shape[0]
    cond = jax.tree.map(lambda c: jnp.repeat(c, draws, axis=0), check_cond(name, cond, n))
    times = jnp.arange(steps, dtype=start.dtype) / steps

    def turn(x, at):
        t, own = at
        step = step_size * (1 - t) ** power
        z = x - step * measurement.adjoint(measurement.apply(x) - y)
        z, t = jnp.repeat(z, draws, axis=0), jnp.full((n * draws,), t)
        a, s, _, _ = coefficients(schedule, t)
        z = expand_to(a, z) * z + expand_to(s, z) * jax.random.normal(own, z.shape, z.dtype)
        v = like_state(name, velocity.apply(params, z, t, cond), z)
        x1 = velocity_to_data(v, z, t, schedule)
        return jnp.mean(x1.reshape(n, draws, *x.shape[1:]), axis=1), None

    x, _ = jax.lax.scan(turn, start, (times, jax.random.split(key, steps)))
    return x.astype(given.dtype), _restored(measurement, x, y, steps * draws)


def flower(
    velocity: Velocity,
    params: Params,
    x0: Float[Array, "b *event"],
    key: Key,
    measurement: Measurement,
    y: Float[Array, "rows ..."],
    std: float,
    cond: Cond = None,
    *,
    steps: int = 50,
    spread: float = 0.0,
    variance: Variance | None = None,
    schedule: Schedule = LINEAR,
) -> tuple[Float[Array, "b *event"], InverseInfo]:
    """Restoration by turns of predicting the data, measuring them, and going back to noise.

    Also known as: Flower, flow-consistent destination refinement.

    From x0, for the times t = 0, 1/n, ..., 1 - 1/n and the next ones t':

        m = x1 + A^T (A A^T + (std / r)^2 I)^-1 (y - A x1),    S = (I / r^2 + A^T A / std^2)^-1
        x = a' N(m, spread^2 S) + s' e,                        e ~ N(0, I)

    x1 is the prediction of the data at (x, t), a' and s' are the values of the schedule at t'.
    N(m, S) is the posterior of N(x1, r^2 I). With spread 1 it is exact in any number of steps for
    Gaussian data N(m, v I) with r^2 = v s^2 / (v a^2 + s^2); the default is v = 1. Elsewhere r^2 I
    is too wide where the data have few directions, and the draw of the last step stays in the
    sample as noise: spread 0, the default as in the paper, puts the mean in its place.

    It takes `steps` evaluations of the velocity, and no pass back through it.

    Args:
        velocity: the velocity.
        params: its params.
        x0: standard normal noise, [b, *event].
        key: a key.
        measurement: A.
        y: the measurement, [b, *measured], or one row for all.
        std: the standard deviation of the noise in y, at least 0.
        cond: the condition, [b, ...] or one row for all.
        steps: n, at least 1.
        spread: in [0, 1], of the draw of the data around m; the paper's gamma.
        variance: r^2 as a function of t, [b] -> [b], positive before t = 1.
        schedule: the path of the velocity; the default is the linear one.

    Returns:
        x1: the restorations, [b, *event].
        info: an `InverseInfo`; status is that of a solve, NOT_FINITE where x1 is not finite.

    Raises:
        TypeError: velocity or measurement is something else.
        ValueError: an option is out of range, the key is None, or the shapes do not fit.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import oracles, steering
        >>> velocity = oracles.as_velocity(oracles.gaussian([0.0, 0.0], 1.0))
        >>> total = steering.measurements.matrix([[1.0, 1.0]])
        >>> keys, y = jax.random.split(jax.random.key(0)), jnp.array([[3.0]])
        >>> x0 = jax.random.normal(keys[0], (4096, 2))
        >>> x, info = steering.flower(
        ...     velocity, {}, x0, keys[1], total, y, 1.0, steps=3, spread=1.0
        ... )
        >>> bool(abs(x.mean(0) - 1).max() < 0.05), int(info.evaluations[0])  # means of 3 / 3
        (True, 3)

    References:
        Pourya, El Rawas, Unser, *FLOWER: A Flow-Matching Solver for Inverse Problems*, 2025,
            arXiv:2509.26287.
    """
    name = "flower"
    check_noun(name, velocity, Velocity, Field)
    check_measurement(name, measurement)
    check_whole(name, steps=steps)
    check_weights(name, std=std)
    check_number(name, "spread", spread, "in [0, 1]", lambda value: 0 <= value <= 1)
    need_key(name, key)
    start = floating(name, x0)
    n = start.shape[0]
    y = as_measured(name, y, measurement.apply(start))
    cond = check_cond(name, cond, n)
    times = jnp.arange(steps + 1, dtype=start.dtype) / steps

    def turn(x, at):
        t, t_next, key = (jnp.full((n,), at[0]), jnp.full((n,), at[1]), at[2])
        data_key, seen_key, noise_key = jax.random.split(key, 3)
        v = like_state(name, velocity.apply(params, x, t, cond), x)
        x1 = velocity_to_data(v, x, t, schedule)
        a, s, _, _ = coefficients(schedule, t)
        r2 = prediction_variance(name, variance, a, s, t)
        # the solution for noise in x1 and y is a draw of the posterior
        wide = spread * expand_to(jnp.sqrt(r2), x)
        x1 = x1 + wide * jax.random.normal(data_key, x.shape, x.dtype)
        off = (
            y + spread * std * jax.random.normal(seen_key, y.shape, y.dtype) - measurement.apply(x1)
        )
        x1 = x1 + measurement.pseudo_inverse(off, std**2 / r2)
        a, s, _, _ = coefficients(schedule, t_next)
        noise = jax.random.normal(noise_key, x.shape, x.dtype)
        return (expand_to(a, x) * x1 + expand_to(s, x) * noise).astype(x.dtype), None

    keys = jax.random.split(key, steps)
    x, _ = jax.lax.scan(turn, start, (times[:-1], times[1:], keys))
    return x.astype(x0.dtype), _restored(measurement, x, y, steps)


def d_flow(
    velocity: Velocity,
    params: Params,
    x0: Float[Array, "b *event"],
    measurement: Measurement,
    y: Float[Array, "rows ..."],
    cond: Cond = None,
    *,
    steps: int = 20,
    optimizer: optax.GradientTransformation = _ADAM,
    prior: float = 0.0,
    method: Method | int | None = None,
) -> tuple[Float[Array, "b *event"], InverseInfo]:
    """The sample of a flow that answers a measurement best, by gradient steps on its source.

    Also known as: D-Flow, source optimization, latent optimization.

        min over x0 of  |A x1(x0) - y|^2 + prior (|x0|^2 / 2 - (d - 1) log |x0|)

    x1(x0) is the end of the trajectory from x0, d the size of an event; the second term is -log
    of the density of the length of standard normal noise.

    With N the evaluations of a solve by `method`, it takes (3 steps + 1) N evaluations of the
    velocity and steps N passes back through it: a gradient step solves once to see which rows fail,
    once for the loss, and takes the steps of that again on the way back.

    Args:
        velocity: the velocity.
        params: its params.
        x0: the sources to start from, [b, *event].
        measurement: A.
        y: the measurement, [b, *measured], or one row for all.
        cond: the condition, [b, ...] or one row for all.
        steps: the number of gradient steps, at least 1.
        optimizer: of optax; one that treats each number by itself keeps rows apart.
        prior: the weight of the prior, at least 0.
        method: how to solve, as in `solvers.sample`.

    Returns:
        x1: the samples of the last sources, [b, *event].
        info: an `InverseInfo`; evaluations are (3 steps + 1) N.

    Raises:
        TypeError: velocity, measurement or method is something else.
        ValueError: an option is out of range, or the shapes do not fit.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import oracles, steering
        >>> velocity = oracles.as_velocity(oracles.gaussian([0.0, 0.0], 1.0))
        >>> total = steering.measurements.matrix([[1.0, 1.0]])
        >>> x0, y = jnp.zeros((1, 2)), jnp.array([[1.0]])
        >>> x1, info = steering.d_flow(velocity, {}, x0, total, y, steps=100, method=2)
        >>> info.norm.round(1).tolist(), info.evaluations.tolist()
        ([0.0], [1204])

    References:
        Ben-Hamu, Puny, Gat, Karrer, Singer, Lipman, *D-Flow: Differentiating through Flows for
            Controlled Generation*, 2024, arXiv:2402.14017 (with L-BFGS; any optimizer is ours).
    """
    name = "d_flow"
    check_noun(name, velocity, Velocity, Field)
    check_measurement(name, measurement)
    check_whole(name, steps=steps)
    check_weights(name, prior=prior)
    prior = float(prior)
    y = as_measured(name, y, measurement.apply(x0))
    size = math.prod(x0.shape[1:])

    def objective(x0):
        x1, _ = solvers.sample(velocity, params, x0, cond, method=method)
        error = sum_event((measurement.apply(x1) - y) ** 2)
        square = sum_event(x0**2)
        return jnp.sum(error + prior * (square - (size - 1) * jnp.log(square + 1e-10)) / 2)

    def turn(carry, _):
        x0, state = carry
        updates, state = optimizer.update(jax.grad(objective)(x0), state, x0)
        return (optax.apply_updates(x0, updates), state), None

    (x0, _), _ = jax.lax.scan(turn, (x0, optimizer.init(x0)), None, length=steps)
    x1, info = solvers.sample(velocity, params, x0, cond, method=method)
    evaluations = jnp.where(info.evaluations < 0, -1, (3 * steps + 1) * info.evaluations)
    return x1, inverse_info(measurement, x1, y, evaluations, info.status)


def _restored(measurement, x, y, evaluations):
    """What there is to say of the restorations x, at so many evaluations each."""
    finite = jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
    status = jnp.where(finite, solvers.Status.OK, solvers.Status.NOT_FINITE).astype(jnp.int32)
    spent = jnp.full(x.shape[:1], evaluations, jnp.int32)
    return inverse_info(measurement, x, y, spent, status)
