"""Rectified diffusion: reflow on any affine path and with any prediction, whole or in windows.

What a step of first order needs is not a straight path but an ODE along which data and noise, as
predicted, stay what they are. On pairs (x0, x1) that a teacher's ODE connects, the curve alpha(t)
x1 + sigma(t) x0 is such a path, and DDIM follows it exactly, in one step as in many. So a diffusion
model is retrained on the teacher's pairs as it was trained, same path, same prediction, and is
sampled in few steps of DDIM:

    velocity = paths.parameterizations.from_noise(eps, schedule)   # eps predicts noise
    ddim = solvers.ddim(schedule)
    method = solvers.fixed(100, ddim)
    data.generate_reflow_pairs(folder, velocity, teacher_params, source, n, key=key, method=method)
    loss = losses.rectified_diffusion(velocity, schedule, metric=losses.noise_error(schedule))
    ... make_step, fit on data.read_shards(folder), from teacher_params ...
    x1, info = solvers.sample(velocity, params, x0, method=solvers.fixed(1, ddim))
"""

import jax.numpy as jnp

from jflow import paths, times
from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import need_pairs
from jflow._core.times import Times, partition, window_index
from jflow.losses._errors import Metric, mean_squared_error
from jflow.losses._pairs import draw_pairs
from jflow.losses._perflow import in_windows, regressed
from jflow.paths import LINEAR, Schedule, velocity_to_data, velocity_to_noise
from jflow.solvers import Method
from jflow.types import Loss, Time, Velocity

__all__ = ["end_error", "noise_error", "phased_rectified_diffusion", "rectified_diffusion"]

_UNIFORM = times.uniform()


def rectified_diffusion(
    velocity: Velocity,
    schedule: Schedule = LINEAR,
    *,
    time: Time = _UNIFORM,
    metric: Metric = mean_squared_error,
) -> Loss:
    """Rectified diffusion: regression on a teacher's pairs, along the path of a schedule.

    With x_t = alpha(t) x1 + sigma(t) x0 the loss is by default the mean over the event of
    (velocity(x_t, t, cond) - alpha'(t) x1 - sigma'(t) x0)^2, then over rows. On the linear path
    this is reflow, `losses.flow_matching` on pairs.

    Args:
        velocity: The velocity that is trained.
        schedule: The path, a `paths.Schedule`.
        time: The law of the times, (key, n) -> t [n].
        metric: The space of the error, (v, target, x_t, t) -> [b]. `noise_error(schedule)` is that
            of the noise, as diffusion models that predict it are trained; `end_error(schedule)` is
            that of the data, in which the published code works (with a pseudo-Huber error of each
            number). Those stay bounded where the velocity of a schedule does not.

    Returns:
        A loss of the batch {'x0' and 'x' [b, *event], a pair a row, optionally 'cond', 'weight'
        [b]}. `data.generate_reflow_pairs` makes the pairs. Its metrics are {'residual'}, the mean
        of the squared difference of velocities, whatever the metric.

    Raises:
        ValueError: At construction for a schedule that misses its ends; at trace time for a batch
            without 'x0', a velocity or a metric of another shape, a batch without 'x' or with
            unknown keys, and a key that is None.

    References:
        Wang, Yang, Huang, Wang, Li, *Rectified Diffusion: Straightness Is Not Your Need in
            Rectified Flow*, 2024, arXiv:2410.07303 (its time is 1 - t here).
    """
    path = paths.affine(schedule)

    def loss(params, key, batch, frozen=None):
        need_pairs("rectified_diffusion", batch)
        pairs = draw_pairs("rectified_diffusion", key, batch, time)
        x0, x1, cond, weight, t, _, dropout_key = pairs
        wide = [x.astype(float_dtype(x1)) for x in (x0, x1)]
        x_t, target = path.point(*wide, t).astype(x1.dtype), path.target(*wide, t)
        return regressed(
            "rectified_diffusion",
            velocity,
            params,
            x_t,
            t,
            target,
            cond,
            weight,
            metric,
            dropout_key,
        )

    return loss


def phased_rectified_diffusion(
    velocity: Velocity,
    teacher: Velocity,
    *,
    knots: int | Times = 4,
    schedule: Schedule,
    time: Time = _UNIFORM,
    method: Method | int | None = None,
    metric: Metric = mean_squared_error,
) -> Loss:
    """Phased rectified diffusion: `perflow` along the curves of a schedule, not straight lines.

    In the window [a, b) the teacher carries z_a = alpha(a) x1 + sigma(a) x0 to z_b; X1 and X0 are
    what the path through both ends joins, z = alpha X1 + sigma X0 at a and at b, and the velocity
    is regressed at alpha(t) X1 + sigma(t) X0 on alpha'(t) X1 + sigma'(t) X0. In the exact student
    one step of DDIM crosses a window. A network that predicts noise or data keeps the teacher's
    weights and conversion. Sample by `solvers.sample` on
    `solvers.on_grid(solvers.grids.windows(knots, n), solvers.ddim(schedule))`.

    Args:
        velocity: The velocity that is trained.
        teacher: The teacher, whose params are frozen['teacher'].
        knots: The number of equal windows, or times that rise strictly from 0 to 1.
        schedule: The path, a `paths.Schedule`.
        time: The law of the times, (key, n) -> t [n].
        method: The steps of the teacher's ODE in each window, a number or
            `solvers.fixed(n, solver)`, by default 4 of Heun, equal in the time of the linear path.
        metric: The error of a row, (v, target, z_t, t) -> [b]. `end_error(schedule, knots)`
            compares the ends that the windows lead to, as published; `noise_error(schedule)` the
            noise.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. Its metrics are {'residual'}, the mean of the squared difference of
        velocities, whatever the metric.

    Raises:
        ValueError: At construction for knots that don't rise from 0 to 1, a schedule that misses
            its ends, and another method; at trace time for a frozen without 'teacher', a velocity
            or a metric of another shape, a batch without 'x' or with unknown keys, and a key that
            is None.

    References:
        Wang, Yang, Huang, Wang, Li, *Rectified Diffusion: Straightness Is Not Your Need in
            Rectified Flow*, 2024, arXiv:2410.07303 (its time is 1 - t here).
    """
    name = "phased_rectified_diffusion"
    knots = partition(name, knots)
    return in_windows(name, velocity, teacher, knots, schedule, schedule, time, method, metric)


def noise_error(schedule: Schedule, metric: Metric = mean_squared_error) -> Metric:
    """The metric of the noise x0 that two velocities predict on a path.

    It is the velocities' difference times alpha / (alpha' sigma - sigma' alpha) (see
    `paths.affine`).

    Args:
        schedule: The path, a `paths.Schedule`.
        metric: The error of the two predictions, (noise, target, x_t, t) -> [b].

    Returns:
        The metric (v, target, x_t, t) -> [b].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import losses, paths
        >>> x, t = jnp.ones((1, 2)), jnp.array([0.5])
        >>> losses.noise_error(paths.LINEAR)(x, 3 * x, x, t).tolist()  # (0.5 (1 - 3))^2
        [1.0]
    """

    def error(v, target, x_t, t):
        noise = (velocity_to_noise(u, x_t.astype(u.dtype), t, schedule) for u in (v, target))
        return metric(*noise, x_t, t)

    return error


def end_error(
    schedule: Schedule, knots: int | Times = 1, metric: Metric = mean_squared_error
) -> Metric:
    """The metric of the states to which two velocities lead at the end of t's window.

    They lead there in one step of DDIM. With one window the states are the data that the velocities
    predict.

    Args:
        schedule: The path, a `paths.Schedule`.
        knots: The number of equal windows, or times that rise strictly from 0 to 1.
        metric: The error of the two states, (state, target, x_t, t) -> [b].

    Returns:
        The metric (v, target, x_t, t) -> [b].

    Raises:
        ValueError: For knots that don't rise from 0 to 1.
    """
    knots = partition("end_error", knots)

    def error(v, target, x_t, t):
        end = jnp.asarray(knots, t.dtype)[window_index(knots, t) + 1]
        alpha, sigma = (expand_to(f(end), x_t) for f in (schedule.alpha, schedule.sigma))

        def state(u):
            x = x_t.astype(u.dtype)
            return alpha * velocity_to_data(u, x, t, schedule) + sigma * velocity_to_noise(
                u, x, t, schedule
            )

        return metric(state(v), state(target), x_t, t)

    return error
