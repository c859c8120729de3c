"""Continuous-time consistency in TrigFlow coordinates (sCM), for velocities on the linear path.

    x_tau = cos(tau) x1 + sin(tau) data_std x0,   tau in [0, pi/2], data at 0
    f(x, tau) = cos(tau) x - sin(tau) data_std F

A `Velocity` on the linear path is a network F of these coordinates without any training
(`paths.to_trigonometric`), for the two paths differ by a scale and a clock, and what both predict
of the data is the same: a flow teacher and the student that starts from its params need no change,
and the student is read in jflow's time, x + (1 - t) v(x, t), as every consistency model here. A
network made for TrigFlow is `paths.reschedule(paths.from_trigonometric(field, data_std=s),
paths.schedules.cosine(s), paths.LINEAR)`.

    velocity = jflow.velocity(nets.ResidualMLP(128))
    # teacher=None: from scratch
    loss = losses.trigflow_consistency(velocity, teacher=velocity, warmup=1_000)
    step = train.make_step(loss, optimizer, refresh=losses.count_steps)
    # params: the teacher's; state.frozen = {'teacher': teacher_params, 'step': jnp.int32(0)}
    student = solvers.consistency_map(velocity)
    x1, info = solvers.sample_flow_map(student, params, x0)  # steps=2, renoise=1.0, key=key
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow import paths, times
from jflow._core.arrays import expand_to, float_dtype, mean_event
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_same_shape, check_whole, frozen_entry, with_checked_output
from jflow._core.keys import same_draws
from jflow.losses._pairs import draw_pairs
from jflow.losses._residual import normalized_tangent
from jflow.losses._teacher import warmed
from jflow.solvers import JVP
from jflow.types import Array, Loss, Time, Velocity

__all__ = ["trigflow_consistency"]

_TIMES = times.logit_normal(1.0, 1.4)


def trigflow_consistency(
    velocity: Velocity,
    *,
    teacher: Velocity | None = None,
    data_std: float = 1.0,
    time: Time = _TIMES,
    warmup: int = 0,
    tangent: Callable[[Array], Array] | None = None,
    jvp: JVP = jax.jvp,
) -> Loss:
    """Continuous-time consistency in TrigFlow coordinates (sCM).

    Also known as: sCM, sCT, sCD, TrigFlow.

    The derivative of f along the trajectory vanishes. With s = data_std, F of
    `paths.to_trigonometric(velocity)` and F- the same without gradient, the loss is the mean over
    the event and rows of |F - F- - tangent(g)|^2, where

        g = -cos^2(tau) (s F- - dx/dtau) - r cos(tau) sin(tau) (x_tau + s dF-/dtau),

    which is cos(tau) df/dtau at r = 1. The value, |tangent(g)|^2, says little; the gradient is that
    of -2 <F, tangent(g)>. The condition is that of `flow_map_residual` at r = 1 in other
    coordinates. The loss is no preset of it: here cos sin is multiplied into the tangents of the
    forward-mode pass, so that nothing large appears near tau = pi/2. The paper's learned weight of
    tau is left out: with normalized tangents the rows weigh the same already.

    Args:
        velocity: The student, a velocity on the linear path.
        teacher: The teacher, a velocity on the linear path with params frozen['teacher'], whose
            transform gives dx/dtau (consistency distillation). None takes dx/dtau = cos(tau) s x0 -
            sin(tau) x1, from scratch.
        data_std: The standard deviation of the data, 1 once standardized; where the linear path is
            at t, tan(tau) = (1 - t) / (s t).
        time: The law of the times t of the linear path, (key, n) -> t [n]. The paper's tau =
            arctan(exp(N) / s), N normal of mean -1 and deviation 1.4, is logit_normal(1.0, 1.4).
        warmup: The number of updates over which r grows, r = min(1, frozen['step'] / warmup) (see
            `count_steps`). With 0, r = 1 throughout, and no 'step' is needed.
        tangent: What is made of g: `normalized_tangent(0.1)` where None is given, or
            `clipped_tangent`. From scratch the mean gradient at the exact f vanishes where the
            tangent is g itself: a function that is not linear moves the minimum, but for symmetric
            laws.
        jvp: `jax.jvp`, or `solvers.finite_difference(h)` for a network that has an operation
            without a forward-mode derivative.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. Its metrics are {'residual'}, the mean over event and rows of g^2 at r = 1.

    Raises:
        ValueError: At construction for data_std <= 0 or warmup < 0; at trace time for what is
            missing in frozen ('teacher', 'step'), a velocity or a tangent of another shape, a batch
            without 'x' or with unknown keys, and a key that is None.

    References:
        Lu, Song, *Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models*, 2024,
            arXiv:2410.11081.
        Chen et al., *SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency
            Distillation*, 2025, arXiv:2503.09641 (the flow teacher).
    """
    name = "trigflow_consistency"
    if not 0 < data_std < math.inf:
        raise ValueError(f"{name}: expected a finite data_std > 0, got {data_std}")
    check_whole(name, 0, warmup=warmup)
    tangent = normalized_tangent() if tangent is None else tangent
    student, taught = (
        None
        if v is None
        else paths.to_trigonometric(with_checked_output(said, v), data_std=data_std)
        for said, v in ((name, velocity), (f"{name}: teacher", teacher))
    )

    def loss(params, key, batch, frozen=None):
        x0, x1, cond, weight, t, _, dropout_key = draw_pairs(name, key, batch, time)
        dtype = float_dtype(x1)
        x0, data = x0.astype(dtype), x1.astype(dtype) / data_std
        tau = jnp.arctan2(1 - t, data_std * t)
        cos, sin = expand_to(jnp.cos(tau), x1), expand_to(jnp.sin(tau), x1)
        x, slope = cos * data + sin * x0, cos * x0 - sin * data  # of x_tau / data_std
        if taught is not None:
            held = frozen_entry(name, frozen)
            slope = taught.apply(held, x.astype(x1.dtype), tau, cond).astype(dtype)
        slope = jax.lax.stop_gradient(slope)
        small = (cos * sin).reshape(tau.shape)
        out, turn = jvp(
            lambda x, tau: student.apply(params, x, tau, cond, key=same_draws(dropout_key)),
            (x.astype(x1.dtype), tau),
            ((expand_to(small, x) * slope).astype(x1.dtype), small),
        )
        out, still = out.astype(dtype), jax.lax.stop_gradient(out).astype(dtype)
        apart = -(cos**2) * (still - slope)
        change = cos * sin * x + jax.lax.stop_gradient(turn).astype(dtype)
        r = jnp.asarray(warmed(name, frozen, warmup), dtype)
        g = data_std * (apart - r * change)
        g = jax.lax.stop_gradient(check_same_shape(name, "a tangent", tangent(g), g))
        residual = mean_event(jnp.square(data_std * (apart - change)))
        error = mean_event(jnp.square(out - still - g))
        return mean_of_rows(error, weight), {
            "residual": mean_of_rows(jax.lax.stop_gradient(residual), weight)
        }

    return loss
