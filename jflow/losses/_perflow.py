"""PeRFlow: the flow of a teacher made straight within K windows of time.

The pairs are made as they are needed. A window is short, so that a few steps of the teacher cross
it, from data with noise added to its start. No folder of pairs is written, the data are real, and
every batch has rows in all windows:

    guided = guidance.cfg(velocity, 3.0, null=null)
    loss = losses.perflow(velocity, guided, knots=4)             # the student starts as the teacher
    frozen = {"teacher": teacher_params}
    state = train.init_state(teacher_params, optimizer, key, frozen=frozen)
    ... make_step, fit on batches of data ...
    method = solvers.on_grid(solvers.grids.windows(4, 8), diffrax.Euler())
    x1, info = solvers.sample(velocity, params, x0, method=method)

A teacher that predicts noise on a diffusion path, eps(x, t), keeps its weights as well. In a window
the path of the student is affine in data and noise too, that of `piecewise(schedule, knots)`, so
the usual conversions make it a velocity:

    from_noise = paths.parameterizations.from_noise
    teacher = from_noise(eps, schedule, margin=0)   # 0 where alpha(0) > 0, as on `schedules.vp()`
    straight = paths.schedules.piecewise(schedule, 4)
    student = from_noise(eps, straight, margin=0)   # untrained, an Euler step is one of DDIM
    metric = losses.noise_error(straight)
    loss = losses.perflow(student, teacher, knots=4, schedule=schedule, metric=metric)
"""

import diffrax
import jax.numpy as jnp

from jflow import paths, solvers, times
from jflow._core.arrays import expand_to, float_dtype
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_same_shape, frozen_entry, like_state, with_checked_output
from jflow._core.times import Times, linear_between, partition, window_index
from jflow.losses._errors import Metric, mean_squared_error
from jflow.losses._pairs import draw_pairs
from jflow.losses._teacher import average_velocity, steps_of_segment
from jflow.paths import LINEAR, Schedule
from jflow.solvers import Method
from jflow.types import Loss, Time, Velocity

__all__ = ["perflow"]

_HEUN, _UNIFORM = solvers.fixed(4, diffrax.Heun()), times.uniform()


def perflow(
    velocity: Velocity,
    teacher: Velocity,
    *,
    knots: int | Times = 4,
    schedule: Schedule = LINEAR,
    time: Time = _UNIFORM,
    method: Method | int | None = None,
    metric: Metric = mean_squared_error,
) -> Loss:
    """PeRFlow: regression of a velocity on the teacher's displacement across a window of time.

    The loss is the mean over the event of (velocity(z_t, t, cond) - (z_b - z_a) / (b - a))^2, then
    over rows. For t in [a, b), one of the windows between the knots,

        z_a = alpha(a) x1 + sigma(a) x0,    z_b: z_a carried from a to b by the teacher,
        z_t: on the line between them.

    The velocity jumps at the knots, where t belongs to the window after it:
    `times.sequential(knots)` puts more rows there. Sample by Euler on
    `solvers.grids.windows(knots, n)`. knots=1 is reflow on fresh pairs. The teacher sees the same
    conditions as the student.

    Args:
        velocity: The velocity that is trained.
        teacher: The teacher, whose params are frozen['teacher'].
        knots: The number of equal windows, or times that rise strictly from 0 to 1.
        schedule: The path that the teacher was trained on, a `paths.Schedule`.
        time: The law of the times, (key, n) -> t [n].
        method: The steps of the teacher's ODE in each window, a number or
            `solvers.fixed(n, solver)`, by default 4 of Heun, equal in the time of the linear path:
            with Euler they are DDIM's (the published teacher makes 8), whatever the schedule is.
        metric: The error of a row, (v, target, z_t, t) -> [b];
            `noise_error(piecewise(schedule, knots))` weighs as a network of noise would.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. Its metrics are {'residual'}, the mean of the squared difference above,
        whatever the metric.

    Raises:
        ValueError: At construction for knots that don't rise from 0 to 1, a schedule that misses
            its ends, and another method; at trace time for a frozen without 'teacher', a velocity
            or a metric of another shape, a batch without 'x' or with unknown keys, and a key that
            is None.

    References:
        Yan, Liu, Pan, Liew, Liu, Feng, *PeRFlow: Piecewise Rectified Flow as Universal
            Plug-and-Play Accelerator*, 2024, arXiv:2405.07510 (its time is 1 - t here).
    """
    knots = partition("perflow", knots)
    inside = Schedule(*(linear_between(f, knots) for f in (schedule.alpha, schedule.sigma)))
    return in_windows("perflow", velocity, teacher, knots, schedule, inside, time, method, metric)


def in_windows(name, velocity, teacher, knots, schedule, inside, time, method, metric) -> Loss:
    """Regression of a velocity along the path `inside`, between the ends of a window that the
    teacher connects; `inside` meets `schedule` at the knots (`partition`)."""
    # a solver on the linear path meets no infinite slope, as diffusion schedules have near data
    teacher = with_checked_output(f"{name}: teacher", teacher)
    linear = teacher if schedule is LINEAR else _on_line(teacher, paths.check_ends(schedule))
    path, method = paths.affine(inside), steps_of_segment(name, method, _HEUN)

    def loss(params, key, batch, frozen=None):
        x0, x1, cond, weight, t, _, dropout_key = draw_pairs(name, key, batch, time)
        taught = frozen_entry(name, frozen)
        at, k = jnp.asarray(knots, t.dtype), window_index(knots, t)
        (alpha, alpha_b), (sigma, sigma_b) = (
            (f(at[k]), f(at[k + 1])) for f in (schedule.alpha, schedule.sigma)
        )
        # on the linear path the window goes from a to b and the state is divided by alpha + sigma
        a, b = alpha / (alpha + sigma), alpha_b / (alpha_b + sigma_b)
        wide = [x.astype(float_dtype(x1)) for x in (x0, x1)]
        z_a = expand_to(a, x1) * wide[1] + expand_to(1 - a, x1) * wide[0]
        u = average_velocity(linear, taught, z_a, a, b, cond, method=method)
        # the noise and the data that a line through both ends of the window would join
        ends = z_a - expand_to(a, x1) * u, z_a + expand_to(1 - a, x1) * u
        z_t = path.point(*ends, t).astype(x1.dtype)
        return regressed(
            name, velocity, params, z_t, t, path.target(*ends, t), cond, weight, metric, dropout_key
        )

    return loss


def regressed(name, velocity, params, x, t, target, cond, weight, metric, key):
    """(loss, {'residual'}) of a velocity at (x, t) against its target."""
    v = like_state(name, velocity.apply(params, x, t, cond, key=key), x).astype(target.dtype)
    error = check_same_shape(name, "a metric", metric(v, target, x, t), t)
    return mean_of_rows(error, weight), {
        "residual": mean_of_rows(mean_squared_error(v, target, x, t), weight)
    }


def _on_line(velocity: Velocity, schedule: Schedule) -> Velocity:
    """The velocity on the linear path, as the difference of what it predicts.

    `paths.reschedule` is the same between the ends of the schedule, where windows start and stop;
    at the ends it stands still."""

    def apply(params, x, r, cond=None, *, key=None):
        t, _ = paths.matched_time(schedule, LINEAR, r)
        x = (expand_to(schedule.alpha(t) + schedule.sigma(t), x) * x).astype(x.dtype)
        v = velocity.apply(params, x, t, cond, key=key)
        return paths.velocity_to_data(v, x, t, schedule) - paths.velocity_to_noise(
            v, x, t, schedule
        )

    return Velocity(velocity.init, apply)
