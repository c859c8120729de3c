"""Rectified diffusion: reflow on any affine path and with any prediction, whole or in windows.

What a step of first order needs is not a straight path but an ODE along which data and noise, as predicted, stay what they
are. On pairs (x0, x1) that a teacher's ODE connects, the curve alpha(t) x1 + sigma(t) x0 is such a path, and DDIM follows
it exactly, in one step as in many. So a diffusion model is retrained on the teacher's pairs as it was trained, same path, same
prediction, and is sampled in few steps of DDIM:

    velocity = paths.parameterizations.from_noise(eps, schedule)       # a network that predicts noise; or from_data ...
    ddim = solvers.ddim(schedule)
    data.generate_reflow_pairs(folder, velocity, teacher_params, source, n, key=key, method=solvers.fixed(100, ddim))
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
    """Regression of a velocity on pairs, along the path x_t = alpha(t) x1 + sigma(t) x0: by default the mean over the event of
    (velocity(x_t, t, cond) - alpha'(t) x1 - sigma'(t) x0)^2, then over rows.

    metric: the space of the error, (v, target, x_t, t) -> [b]. `noise_error(schedule)`: that of the noise, as diffusion models
        that predict it are trained; `end_error(schedule)`: that of the data, in which the published code works (with a
        pseudo-Huber error of each number). Those stay bounded where the velocity of a schedule does not.
    On the linear path this is reflow, `losses.flow_matching` on pairs.

    batch: 'x0' and 'x' [b, *event], a pair a row (`data.generate_reflow_pairs`), optionally 'cond', 'weight' [b].
    metrics: 'residual', the mean of the squared difference of velocities, whatever the metric.
    Errors: ValueError at construction for a schedule that misses its ends, at trace time for a batch without 'x0', and as
    `losses.flow_matching`.
    Source: Wang, Yang, Huang, Wang, Li, "Rectified Diffusion: Straightness Is Not Your Need in Rectified Flow", 2024 (its
        time is 1 - t here).
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
    """`rectified_diffusion` in windows: `perflow` along the curves of the schedule instead of straight lines.

    In the window [a, b) the teacher carries z_a = alpha(a) x1 + sigma(a) x0 to z_b; X1 and X0 are what the path through both
    ends joins, z = alpha X1 + sigma X0 at a and at b, and the velocity is regressed at alpha(t) X1 + sigma(t) X0 on
    alpha'(t) X1 + sigma'(t) X0. In the exact student one step of DDIM crosses a window. A network that predicts noise or
    data keeps the teacher's weights and conversion.

    metric: `end_error(schedule, knots)` compares the ends that the windows lead to, as published; `noise_error(schedule)`.
    All else as `perflow`. Sample by `solvers.sample` on `solvers.on_grid(solvers.grids.windows(knots, n),
    solvers.ddim(schedule))`.
    Source: Wang, Yang, Huang, Wang, Li, "Rectified Diffusion: Straightness Is Not Your Need in Rectified Flow", 2024 (its
        time is 1 - t here).
    """
    name = "phased_rectified_diffusion"
    knots = partition(name, knots)
    return in_windows(name, velocity, teacher, knots, schedule, schedule, time, method, metric)


def noise_error(schedule: Schedule, metric: Metric = mean_squared_error) -> Metric:
    """The metric of the noise x0 that two velocities predict on a path: theirs times alpha / D (see `paths.affine`)."""

    def error(v, target, x_t, t):
        noise = (velocity_to_noise(u, x_t.astype(u.dtype), t, schedule) for u in (v, target))
        return metric(*noise, x_t, t)

    return error


def end_error(
    schedule: Schedule, knots: int | Times = 1, metric: Metric = mean_squared_error
) -> Metric:
    """The metric of the states at the end of t's window that two velocities lead to in one step of DDIM; with one window, of
    the data that they predict. Errors: ValueError as `perflow` for the knots."""
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
