"""Exponential integrators of an affine path, as diffrax solvers that make each step from its start.

On x_t = alpha(t) x1 + sigma(t) x0 a velocity at (x, t) is a pair of predictions, x1 and x0 (see
`paths.affine`). A step that holds the prediction of x1 fixed integrates exactly

    x_s = alpha_s x1 + sigma_s (x_t - alpha_t x1) / sigma_t      (exact where all data is one point)

and likewise for x0; the solvers differ in where they evaluate what they hold. On the way back, from
data to noise, x1 and x0 change places, since errors of the one that the solve moves away from would
grow. All are finite at t=0 (alpha = 0) and t=1 (sigma = 0), and take any pytree as state, since the
split of a velocity in two is consistent whatever the state is. `schedule` is that of the path the
velocity was trained on.

The second-order step of RF-Solver (Wang et al., *Taming Rectified Flow for Inversion and Editing*,
2025, arXiv:2411.04746) has no function here: x + h v + h^2 / 2 (v_mid - v) / (h / 2) is x + h
v_mid, which is `diffrax.Midpoint`.
"""

from collections.abc import Callable
from typing import ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow.paths import LINEAR, Schedule, matched_time, velocity_to_data, velocity_to_noise
from jflow.types import Array

__all__ = ["ddim", "dpm_solver_2", "dpm_solver_pp_2s", "midpoint_time", "midpoint_in_log_snr"]


def ddim(schedule: Schedule = LINEAR) -> diffrax.AbstractSolver:
    """DDIM as a solver: the step along the path with the predictions of data and noise held fixed.

    Also known as: DDIM.

        x_s = alpha_s x1 + sigma_s x0      with the predictions of x1 and x0 at (x_t, t)

    It is of first order, one evaluation a step; on the linear path it is Euler's method, on others
    Euler's along the curve of the path.

    Args:
        schedule: the path that the velocity was trained on; the default is the linear one.

    Returns:
        A diffrax solver, for `solvers.fixed` and `solvers.on_grid`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths, solvers
        >>> from jflow.types import Velocity
        >>> schedule = paths.schedules.cosine()
        >>> def apply(params, x, t, cond=None, *, key=None):  # all data at 3
        ...     return paths.data_to_velocity(0 * x + 3, x, t, schedule)
        >>> velocity = Velocity(lambda *_: {}, apply)
        >>> method = solvers.fixed(1, solvers.ddim(schedule))
        >>> x1, info = solvers.sample(velocity, {}, jnp.ones((1, 1)), method=method)
        >>> round(float(x1[0, 0]), 4), info.evaluations.tolist()  # one step is exact
        (3.0, [1])

    References:
        Song, Meng, Ermon, *Denoising Diffusion Implicit Models*, 2021, arXiv:2010.02502.
    """
    return _DDIM(schedule)


def midpoint_time(
    t: Float[Array, "*shape"] | float, s: Float[Array, "*shape"] | float
) -> Float[Array, "*shape"] | float:
    """The time halfway between two times.

    Args:
        t: one time.
        s: the other time.

    Returns:
        t + (s - t) / 2.
    """
    return t + (s - t) / 2


def midpoint_in_log_snr(schedule: Schedule = LINEAR) -> Callable:
    """The function that finds the time halfway between two times in log(alpha / sigma).

    If one of the two times is 0 or 1 so is the result, on a path whose ends are exact, and the step
    is DDIM's.

    Args:
        schedule: the path; the default is the linear one.

    Returns:
        A function (t, s) -> time, for `dpm_solver_2` and `dpm_solver_pp_2s`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import solvers
        >>> middle = solvers.midpoint_in_log_snr()
        >>> round(float(middle(jnp.array(0.1), jnp.array(0.9))), 4)
        0.5
    """

    def middle(t, s):
        a, noise = (_root(f(t) * f(s)) for f in (schedule.alpha, schedule.sigma))
        whole = (a == 0) & (noise == 0)  # one step from 0 to 1
        level = Schedule(lambda r: jnp.where(whole, 1, a), lambda r: noise)
        return jnp.where(whole, midpoint_time(t, s), matched_time(schedule, level, t)[0])

    return middle


def dpm_solver_2(
    schedule: Schedule = LINEAR, middle: Callable = midpoint_time
) -> diffrax.AbstractSolver:
    """DPM-Solver-2: DDIM to a middle time, then the whole step with the noise predicted there.

    It is of second order, two evaluations a step. A step from pure noise, at t=0, holds x1 instead.

    Args:
        schedule: the path that the velocity was trained on; the default is the linear one.
        middle: (t, s) -> time. The one of the paper is `midpoint_in_log_snr(schedule)`; halfway in
            t, the default, differs from it by the square of the step, which keeps the order, and
            does not stick to 0 and 1.

    Returns:
        A diffrax solver, for `solvers.fixed` and `solvers.on_grid`.

    References:
        Lu, Zhou, Bao, Chen, Li, Zhu, *DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic
            Model Sampling in Around 10 Steps*, 2022, arXiv:2206.00927.
    """
    return _Midpoint(schedule, middle, False)


def dpm_solver_pp_2s(
    schedule: Schedule = LINEAR, middle: Callable = midpoint_time
) -> diffrax.AbstractSolver:
    """DPM-Solver++(2S): DDIM to a middle time, then the whole step with the data predicted there.

    It is of second order, two evaluations a step; the last step, to t=1, ends in that x1. r of the
    paper is 1/2.

    Args:
        schedule: the path that the velocity was trained on; the default is the linear one.
        middle: (t, s) -> time. The one of the paper is `midpoint_in_log_snr(schedule)`; halfway in
            t, the default, differs from it by the square of the step, which keeps the order, and
            does not stick to 0 and 1.

    Returns:
        A diffrax solver, for `solvers.fixed` and `solvers.on_grid`.

    References:
        Lu, Zhou, Bao, Chen, Li, Zhu, *DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
            Probabilistic Models*, 2022, arXiv:2211.01095.
    """
    return _Midpoint(schedule, middle, True)


def _root(product):
    """The square root, with a derivative of 0 at 0, so that those of a grid's times are finite."""
    return jnp.where(product > 0, jnp.sqrt(jnp.where(product > 0, product, 1)), 0)


class Stepper(diffrax.AbstractSolver):
    """What the solvers of jflow share: first-order dense output, and a velocity with the time of
    the user.
    """

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable] = diffrax.LocalLinearInterpolation

    def init(self, terms, t0, t1, y0, args):
        return None

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def evaluations(self, steps):
        """Of the velocity, in that many steps of a fixed grid."""
        return steps


class _DDIM(Stepper):
    schedule: Schedule = eqx.field(static=True)

    def order(self, terms):
        return 1

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        x1, x0 = predictions(self.schedule, terms, t0, y0, args)
        y1 = combine(values(self.schedule, real_time(terms, t1)), (x1, x0))
        return y1, None, {"y0": y0, "y1": y1}, None, diffrax.RESULTS.successful


class _Midpoint(Stepper):
    schedule: Schedule = eqx.field(static=True)
    middle: Callable = eqx.field(static=True)
    ahead: bool = eqx.field(
        static=True
    )  # whether to hold the prediction of what the solve moves towards

    def order(self, terms):
        return 2

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        start, end = real_time(terms, t0), real_time(terms, t1)
        between = self.middle(start, end)
        x1, x0 = predictions(self.schedule, terms, t0, y0, args)
        y_mid = combine(values(self.schedule, between), (x1, x0))
        x1, x0 = predictions(self.schedule, terms, real_time(terms, between), y_mid, args)
        (a, s), (a_end, s_end) = values(self.schedule, start), values(self.schedule, end)
        # what is not held is divided by its factor at the start, which must not vanish
        hold_x1 = jnp.where(
            start == 0, True, jnp.where(start == 1, False, (start < end) == self.ahead)
        )
        ratio = jnp.where(hold_x1, s_end, a_end) / jnp.where(hold_x1, s, a)
        rest = jnp.where(hold_x1, a_end - ratio * a, s_end - ratio * s)
        y1 = jax.tree.map(
            lambda y, x1, x0: ratio * y + rest * jnp.where(hold_x1, x1, x0), y0, x1, x0
        )
        return y1, None, {"y0": y0, "y1": y1}, None, diffrax.RESULTS.successful

    def evaluations(self, steps):
        return 2 * steps


def values(schedule: Schedule, t: Array) -> tuple[Array, Array]:
    """alpha(t), sigma(t) at a scalar t, in its type."""
    return jnp.asarray(schedule.alpha(t), t.dtype), jnp.asarray(schedule.sigma(t), t.dtype)


def combine(weights, trees):
    """sum_k weights[k] trees[k]: numbers and trees alike."""
    return jax.tree.map(
        lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *trees
    )


def predictions(schedule: Schedule, terms, t, y, args):
    """x1 and x0 as the velocity at (y, t) has them; t is the solver's time."""
    v, time = terms.vf(t, y, args), real_time(terms, t)
    return tuple(
        jax.tree.map(lambda v, y: f(v, y, time, schedule), v, y)  # noqa: B023
        for f in (velocity_to_data, velocity_to_noise)
    )


def real_time(terms, t: Array) -> Array:
    """The time that the velocity sees, and back: diffrax negates the times of a solve that runs
    backwards.
    """
    while hasattr(
        terms, "term"
    ):  # an adjoint solve wraps the terms of the solve that it goes back along
        t, terms = t * getattr(terms, "direction", 1), terms.term
    return t
