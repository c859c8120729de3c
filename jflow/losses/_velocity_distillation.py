"""Marginal-data transport: a student F whose f(x, t) = x + (1 - t) F(x, t) carries the teacher's x_t to data from every t.

F is the mean velocity from t to 1, so that it contains a velocity, u = F - (1 - t) dF/dt, which is the teacher's where F is
exact. Two losses compare the two velocities, on noised data (`velocity_matching`) and on noised samples of the student
(`velocity_distillation`); the method is their sum, `marginal_transport`.

    loss = losses.marginal_transport(velocity, teacher)      # teacher: guidance.cfg(velocity, scale, null=...) say
    ... params: the teacher's; frozen={'teacher': teacher_params} ...
    x1, info = solvers.sample_flow_map(solvers.consistency_map(velocity), params, x0)  # several steps: renoise=1.0, key=key

Source: Zhou, Yi, Fang, Yang, Xie, Wang, Shen, Tian, "Few-step Flow for 3D Generation via Marginal-Data Transport
Distillation", 2025 (its time is 1 - t, its velocity noise - data).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow import times as time_laws
from jflow._core.arrays import expand_to, float_dtype, mean_event
from jflow._core.batch import mean_of_rows
from jflow._core.checks import (
    check_same_shape,
    check_weights,
    frozen_entry,
    like_state,
    with_checked_output,
)
from jflow._core.keys import split_key
from jflow._core.line import line
from jflow.losses._pairs import draw_pairs
from jflow.losses._teacher import unchanged
from jflow.solvers import JVP, consistency_map, total_derivative
from jflow.types import Array, Loss, Time, Velocity

__all__ = ["marginal_transport", "velocity_distillation", "velocity_matching"]

_UNIFORM = time_laws.uniform()


def velocity_matching(
    velocity: Velocity,
    teacher: Velocity | None = None,
    *,
    time: Time = _UNIFORM,
    tangent: Callable[[Array], Array] = unchanged,
    jvp: JVP = jax.jvp,
) -> Loss:
    """The mean over the event of (F - sg(v + (1 - t) tangent(dF/dt)))^2 at x_t = (1 - t) x0 + t x1, dF/dt along v.

    teacher: the teacher, v = teacher(x_t, t), params frozen['teacher']; None: x1 - x0 of the pair.
    tangent: dF/dt itself where none is given. `normalized_tangent` is steadier and has another minimum (the paper's code
        divides by the 2-norm of the event + 0.1); on 8x8 digits it was needed, in the plane not.
    jvp: the paper takes a one-sided difference with step 0.01; `finite_difference(0.01)` is the central one.
    time, batch: as in `losses.flow_matching`; the paper's time is uniform, its code's is
        `times.logit_normal(-1.0, 1.0)`. metrics: 'residual', the mean of (F - (1 - t) dF/dt - v)^2.
    Errors: at trace time for a frozen without 'teacher', and as `losses.flow_matching`.
    """
    name = "velocity_matching"

    def loss(params, key, batch, frozen=None):
        x0, x1, cond, weight, t, _, dropout_key = draw_pairs(name, key, batch, time)
        x_t, v = line(x0, x1, t)
        if teacher is not None:
            v = _taught(name, teacher, frozen, x_t, t, cond)
        out, slope = _motion(name, velocity, params, x_t, t, v, cond, dropout_key, jvp)
        left = expand_to(1 - t, x_t)
        error = mean_event(
            jnp.square(
                out
                - jax.lax.stop_gradient(
                    v + left * check_same_shape(name, "a tangent", tangent(slope), slope)
                )
            )
        )
        residual = mean_event(jnp.square(jax.lax.stop_gradient(out) - left * slope - v))
        return mean_of_rows(error, weight), {"residual": mean_of_rows(residual, weight)}

    return loss


def velocity_distillation(
    velocity: Velocity,
    teacher: Velocity,
    *,
    time: Time = _UNIFORM,
    tangent: Callable[[Array], Array] = unchanged,
    jvp: JVP = jax.jvp,
) -> Loss:
    """The student's own sample x1 = x0 + F(x0, 0), noised to x_t = (1 - t) z + t x1, is moved by the difference of the two
    velocities: the gradient of the mean over the event of

        x_t * sg(u - v),     u = F - (1 - t) tangent(dF/dt) at (x_t, t), dF/dt along v = teacher(x_t, t),

    as a square, (x_t - sg(x_t - (u - v)))^2 / 2. It is distribution matching (`distribution_matching`, whose weight would be
    t: the scores' further factor t / (1 - t) is left out, as in the paper) with the student for its own fake velocity, which
    it is once `velocity_matching` has been learned.

    batch: 'x', for its shape alone; optionally 'x0' (standard normal when absent), 'cond', 'weight'. All else as there.
    metrics: 'residual', the mean of (u - v)^2 with dF/dt itself.
    """
    name = "velocity_distillation"

    def loss(params, key, batch, frozen=None):
        pairs = draw_pairs(name, key, batch, time)
        x0, x, cond, weight, t, noise_key, dropout_key = pairs
        start = jnp.zeros_like(t)
        sample_key, motion_key = jax.random.split(dropout_key)
        x1 = x0 + like_state(name, velocity.apply(params, x0, start, cond, key=sample_key), x0)
        z = jax.random.normal(noise_key, x.shape, x.dtype)
        x_t, _ = line(z, x1, t)
        still = jax.lax.stop_gradient(x_t)
        v = _taught(name, teacher, frozen, still, t, cond)
        out, slope = _motion(
            name, velocity, jax.lax.stop_gradient(params), still, t, v, cond, motion_key, jvp
        )
        left = expand_to(1 - t, x_t)
        push = out - left * check_same_shape(name, "a tangent", tangent(slope), slope) - v
        error = (
            mean_event(jnp.square(x_t.astype(push.dtype) - still + jax.lax.stop_gradient(push))) / 2
        )
        residual = mean_event(jnp.square(out - left * slope - v))
        return mean_of_rows(error, weight), {"residual": mean_of_rows(residual, weight)}

    return loss


def marginal_transport(
    velocity: Velocity,
    teacher: Velocity,
    *,
    time: Time = _UNIFORM,
    tangent: Callable[[Array], Array] = unchanged,
    matching: float = 1.0,
    distillation: float = 1.0,
    jvp: JVP = jax.jvp,
) -> Loss:
    """matching `velocity_matching` + distillation `velocity_distillation`: MDT-dist, where both weights are 1.

    metrics: 'residual', the sum of both, 'matching/...' and 'distillation/...'. Errors: also ValueError for weights that are
    negative, or both 0.
    """
    check_weights("marginal_transport", matching=matching, distillation=distillation)
    if matching == distillation == 0:
        raise ValueError(
            "marginal_transport: expected one of matching, distillation above 0, got none"
        )
    match = velocity_matching(velocity, teacher, time=time, tangent=tangent, jvp=jvp)
    distill = velocity_distillation(velocity, teacher, time=time, tangent=tangent, jvp=jvp)
    parts = {"matching": (matching, match), "distillation": (distillation, distill)}

    def loss(params, key, batch, frozen=None):
        value, metrics = 0.0, {"residual": 0.0}
        for own, (name, (weight, part)) in zip(
            split_key(key, len(parts)), parts.items(), strict=True
        ):
            if weight > 0:
                term, said = part(params, own, batch, frozen)
                value = value + weight * term
                metrics |= {f"{name}/loss": term, f"{name}/residual": said["residual"]}
                metrics["residual"] = metrics["residual"] + said["residual"]
        return value, metrics

    return loss


def _taught(name, teacher, frozen, x, t, cond):
    v = teacher.apply(frozen_entry(name, frozen), x, t, cond)
    return jax.lax.stop_gradient(like_state(name, v, x)).astype(float_dtype(x))


def _motion(name, velocity, params, x, t, v, cond, key, jvp):
    """(F, dF/dt), the second without gradient."""
    out, slope = total_derivative(
        consistency_map(with_checked_output(name, velocity)),
        params,
        x,
        t,
        t,
        v,
        cond,
        key=key,
        jvp=jvp,
    )
    return out.astype(float_dtype(x)), jax.lax.stop_gradient(slope).astype(float_dtype(x))
