"""PeRFlow: the flow of a teacher made straight within K windows of time, on pairs that are made as they are needed.

A window is short, so that a few steps of the teacher cross it, from data with noise added to its start. No folder of pairs is
written, the data are real, and every batch has rows in all windows:

    loss = fewstep.perflow(velocity, guidance.cfg(velocity, 3.0, null=null), knots=4)    # the student starts as the teacher
    state = train.init_state(teacher_params, optimizer, key, frozen={"teacher": teacher_params})
    ... make_step, fit on batches of data ...
    x1, info = solvers.sample(velocity, params, x0, solver=diffrax.Euler(), grid=fewstep.window_grid(4, 8))

A teacher that predicts noise on a diffusion path, eps(x, t), keeps its weights as well. In a window the path of the student is
affine in data and noise too, that of `piecewise(schedule, knots)`, so the usual conversions make it a velocity:

    teacher = parameterisations.from_x0(eps, schedule, margin=0)     # 0 where alpha(0) > 0, as on `schedules.vp()`
    straight = fewstep.piecewise(schedule, 4)
    student = parameterisations.from_x0(eps, straight, margin=0)     # untrained, one Euler step a window is one of DDIM
    loss = fewstep.perflow(student, teacher, knots=4, schedule=schedule, metric=fewstep.noise_error(straight))
"""

from collections.abc import Sequence

import diffrax
import jax.numpy as jnp
import numpy as np

from jflow import couplings, paths, times
from jflow._util import expand_to, float_dtype
from jflow.fewstep._parts import average_velocity, check_fixed, checked, needed, shaped
from jflow.fields import like_state
from jflow.losses._batch import mean_of_rows
from jflow.losses._pairs import check_drop, draw_pairs
from jflow.losses.errors import Metric, mean_squared
from jflow.paths.affine import LINEAR, Schedule
from jflow.solvers._integrate import rising_times
from jflow.types import Loss, PyTree, Time, Velocity

__all__ = ["perflow", "piecewise", "window_grid"]

_HEUN, _UNIFORM, _INDEPENDENT = diffrax.Heun(), times.uniform(), couplings.independent()


def perflow(
    velocity: Velocity,
    teacher: Velocity,
    *,
    knots: int | Sequence[float] = 4,
    schedule: Schedule = LINEAR,
    time: Time = _UNIFORM,
    solver: diffrax.AbstractSolver = _HEUN,
    steps: int = 4,
    metric: Metric = mean_squared,
    drop: float = 0.0,
    null: PyTree = None,
) -> Loss:
    """The mean over the event of (velocity(z_t, t, cond) - (z_b - z_a) / (b - a))^2, then over rows. For t in [a, b), one of
    the windows between the knots:

        z_a = alpha(a) x1 + sigma(a) x0     z_b: z_a carried from a to b by the teacher     z_t: on the line between them

    knots: a number of equal windows, or times that rise strictly from 0 to 1. schedule: the path that the teacher was
    trained on. Its ODE is solved in `steps` steps of `solver` in each window, equal in the time of the linear path: with
    Euler they are DDIM's (the published teacher makes 8), whatever the schedule is.
    metric: (v, target, z_t, t) -> [b], as in `losses.flow_matching`; `noise_error(piecewise(schedule, knots))` weighs as a
        network of noise would. drop, null: as there; the teacher sees the same conditions as the student.
    The velocity jumps at the knots, where t belongs to the window after it: `sequential_times(knots)` puts more rows
    there. Sample by Euler on `window_grid(knots, n)`. knots=1 is reflow on fresh pairs.

    batch: 'x' [b, *event] data; optionally 'x0' (standard normal when absent), 'cond', 'weight' [b]. frozen: 'teacher', the
    teacher's params. metrics: 'residual', the mean of the squared difference above, whatever the metric.
    Errors: ValueError at construction for knots that don't rise from 0 to 1, a schedule that misses its ends, and options of
    the solver; at trace time as `losses.flow_matching`, and for a frozen without 'teacher'.
    Source: Yan, Liu, Pan, Liew, Liu, Feng, "PeRFlow: Piecewise Rectified Flow as Universal Plug-and-Play Accelerator", 2024
        (its time is 1 - t here).
    """
    knots = window_knots("perflow", knots)
    inside = piecewise(schedule, knots)
    return in_windows("perflow", velocity, teacher, knots, schedule, inside, time, solver, steps, metric, drop, null)


def piecewise(schedule: Schedule, knots: int | Sequence[float]) -> Schedule:
    """A schedule with the values of `schedule` at the knots, linear in t between them: the path of a flow that is straight in
    each window. At a knot the slopes are those of the window after it.

    Derived: a line from alpha_a x1 + sigma_a x0 at t = a to alpha_b x1 + sigma_b x0 at t = b. A prediction of noise is
    then the velocity ((alpha_b - alpha_a) z + (alpha_a sigma_b - alpha_b sigma_a) eps) / ((b - t) alpha_a + (t - a) alpha_b),
    PeRFlow's with lambda = alpha_b / alpha_a and eta = sigma_b - lambda sigma_a. Errors: ValueError as `perflow`.
    """
    knots = window_knots("piecewise", knots)

    def through(f):
        def value(t):
            at = jnp.asarray(knots, t.dtype)
            values, k = f(at), window_index(knots, t)
            slope = (values[k + 1] - values[k]) / (at[k + 1] - at[k])
            return values[k] + (t - at[k]) * slope

        return value

    return Schedule(through(schedule.alpha), through(schedule.sigma))


def window_grid(knots: int | Sequence[float], n: int) -> np.ndarray:
    """Times [n + 1] of n steps that meet the knots (as in `perflow`), equal within a window, shared out evenly: where n is
    not a multiple of the windows, the first ones, near noise, have one more. Errors: ValueError for n below their number."""
    times = window_knots("window_grid", knots)
    windows = len(times) - 1
    if isinstance(n, bool) or int(n) != n or n < windows:
        raise ValueError(f"window_grid: expected n to be at least {windows}, one step a window, got {n}")
    counts = [n // windows + (k < n % windows) for k in range(windows)]
    parts = [np.linspace(a, b, m, endpoint=False) for a, b, m in zip(times[:-1], times[1:], counts, strict=True)]
    return np.concatenate([*parts, [1.0]])


def window_knots(name: str, knots) -> np.ndarray:
    """Rising times [K + 1] from 0 to 1, or ValueError."""
    times = np.asarray(rising_times(name, knots), np.float64)
    if (times[0], times[-1]) != (0, 1):
        raise ValueError(f"{name}: expected windows that cover [0, 1], knots from 0 to 1, got {knots}")
    return times


def window_index(knots: np.ndarray, t):
    """The window of each t [b]: k where knots[k] <= t < knots[k + 1]."""
    return jnp.clip(jnp.searchsorted(jnp.asarray(knots, t.dtype), t, side="right") - 1, 0, len(knots) - 2)


def in_windows(name, velocity, teacher, knots, schedule, inside, time, solver, steps, metric, drop, null) -> Loss:
    """Regression of a velocity along the path `inside`, which meets `schedule` at the knots, between the ends of a window that
    the teacher connects."""
    knots = window_knots(name, knots)
    check_drop(name, drop, null)
    # a solver on the linear path meets no slope that is infinite, as those of diffusion schedules are near data
    teacher = checked(f"{name}: teacher", teacher)
    linear = teacher if schedule is LINEAR else _on_line(teacher, paths.check_ends(schedule))
    path, options = paths.affine(inside), {"solver": solver, "steps": steps}
    check_fixed(name, **options)

    def loss(params, key, batch, frozen=None):
        x0, x1, cond, weight, t, _, dropout_key = draw_pairs(name, key, batch, time, _INDEPENDENT, drop, null)
        taught = needed(name, frozen)
        at, k = jnp.asarray(knots, t.dtype), window_index(knots, t)
        (alpha, alpha_b), (sigma, sigma_b) = ((f(at[k]), f(at[k + 1])) for f in (schedule.alpha, schedule.sigma))
        # on the linear path the window goes from a to b and the state is divided by alpha + sigma
        a, b = alpha / (alpha + sigma), alpha_b / (alpha_b + sigma_b)
        wide = [x.astype(float_dtype(x1)) for x in (x0, x1)]
        z_a = expand_to(a, x1) * wide[1] + expand_to(1 - a, x1) * wide[0]
        u = average_velocity(linear, taught, z_a, a, b, cond, **options)
        # the noise and the data that a line through both ends of the window would join
        ends = z_a - expand_to(a, x1) * u, z_a + expand_to(1 - a, x1) * u
        z_t = path.point(*ends, t).astype(x1.dtype)
        return regressed(name, velocity, params, z_t, t, path.target(*ends, t), cond, weight, metric, dropout_key)

    return loss


def regressed(name, velocity, params, x, t, target, cond, weight, metric, key):
    """(loss, {'residual'}) of a velocity at (x, t) against its target."""
    v = like_state(name, velocity.apply(params, x, t, cond, key=key), x).astype(target.dtype)
    error = shaped(name, "a metric", metric(v, target, x, t), t)
    return mean_of_rows(error, weight), {"residual": mean_of_rows(mean_squared(v, target, x, t), weight)}


def _on_line(velocity: Velocity, schedule: Schedule) -> Velocity:
    """The velocity on the linear path, as the difference of what it predicts. (`paths.reschedule` is the same between the ends
    of the schedule, where windows start and stop; at the ends it stands still.)"""

    def apply(params, x, r, cond=None, *, key=None):
        t, _ = paths.matched_time(schedule, LINEAR, r)
        x = (expand_to(schedule.alpha(t) + schedule.sigma(t), x) * x).astype(x.dtype)
        v = velocity.apply(params, x, t, cond, key=key)
        return paths.velocity_to_x1(v, x, t, schedule) - paths.velocity_to_x0(v, x, t, schedule)

    return Velocity(velocity.init, apply)
