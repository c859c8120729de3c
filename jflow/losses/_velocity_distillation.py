"""Marginal-data transport: a student F whose f(x, t) = x + (1 - t) F(x, t) carries x_t to data.

F is the mean velocity from t to 1, so that it contains a velocity, u = F - (1 - t) dF/dt, which is
the teacher's where F is exact. Two losses compare the two velocities, on noised data
(`velocity_matching`) and on noised samples of the student (`velocity_distillation`); the method is
their sum, `marginal_transport`.

    teacher = guidance.cfg(velocity, 3.0, null=10)
    loss = losses.marginal_transport(velocity, teacher)
    ... params: the teacher's; frozen={'teacher': teacher_params} ...
    student = solvers.consistency_map(velocity)
    x1, info = solvers.sample_flow_map(student, params, x0)  # steps=4, renoise=1.0, key=key

The paper is Zhou, Yi, Fang, Yang, Xie, Wang, Shen, Tian, *Few-step Flow for 3D Generation via
Marginal-Data Transport Distillation*, 2025 (its time is 1 - t, its velocity noise - data).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow import times as time_laws
from jflow._core.arrays import mean_event
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_same_shape, check_weights, like_state
from jflow._core.keys import split_key
from jflow._core.line import line
from jflow.losses._pairs import draw_pairs
from jflow.losses._residual import flow_map_residual, unchanged
from jflow.losses._teacher import line_velocity
from jflow.solvers import JVP, consistency_map
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
    """The velocity inside a one-step student is regressed on the teacher's, on noised data.

    The loss is the mean over the event and over rows of

        (F - sg(v + (1 - t) tangent(dF/dt)))^2     at x_t = (1 - t) x0 + t x1, dF/dt along v.

    It is the preset of `flow_map_residual` at r = 1 with `tangent` for the derivative.

    Args:
        velocity: The student F; f(x, t) = x + (1 - t) F(x, t) is its prediction of the data.
        teacher: The teacher, v = teacher(x_t, t), whose params are frozen['teacher']; None takes x1
            - x0 of the pair.
        time: The law of t; the paper's is uniform, its code's is `times.logit_normal(-1.0, 1.0)`.
        tangent: What is made of dF/dt, by default dF/dt itself. `normalized_tangent` is steadier
            and has another minimum (the paper's code divides by the 2-norm of the event + 0.1); on
            digits of 8 x 8 it was needed, in the plane not.
        jvp: `jax.jvp`, or `solvers.finite_difference(h)`. The paper takes a one-sided difference
            with step 0.01; `finite_difference(0.01)` is the central one.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. Its metrics are {'residual'}, the mean of (F - (1 - t) dF/dt - v)^2.

    Raises:
        ValueError: At trace time for a frozen without 'teacher', a velocity or a tangent of another
            shape, a batch without 'x' or with unknown keys, and a key that is None.

    References:
        Zhou, Yi, Fang, Yang, Xie, Wang, Shen, Tian, *Few-step Flow for 3D Generation via
            Marginal-Data Transport Distillation*, 2025, arXiv:2509.04406.
    """
    name, student = "velocity_matching", consistency_map(velocity)

    def loss(params, key, batch, frozen=None):
        x0, x1, cond, weight, t, _, dropout_key = draw_pairs(name, key, batch, time)
        x_t, _ = line(x0, x1, t)
        v = line_velocity(name, teacher, frozen, x0, x1, cond)(x_t, t)
        g, residual = flow_map_residual(
            name,
            student,
            params,
            x_t,
            t,
            jnp.ones_like(t),
            v,
            cond,
            derivative=_checked(name, tangent),
            key=dropout_key,
            jvp=jvp,
        )
        error, exact = mean_event(jnp.square(g)), mean_event(jnp.square(residual))
        return mean_of_rows(error, weight), {"residual": mean_of_rows(exact, weight)}

    return loss


def velocity_distillation(
    velocity: Velocity,
    teacher: Velocity,
    *,
    time: Time = _UNIFORM,
    tangent: Callable[[Array], Array] = unchanged,
    jvp: JVP = jax.jvp,
) -> Loss:
    """A one-step student's samples are moved by its velocity's difference from the teacher's.

    The student's own sample x1 = x0 + F(x0, 0) is noised to x_t = (1 - t) z + t x1, and the
    gradient is that of the mean over the event of

        x_t * sg(u - v),
        u = F - (1 - t) tangent(dF/dt) at (x_t, t), dF/dt along v = teacher(x_t, t),

    as a square, (x_t - sg(x_t - (u - v)))^2 / 2. It is distribution matching
    (`distribution_matching`, whose weight would be t: the scores' further factor t / (1 - t) is
    left out, as in the paper) with the student for its own fake velocity, which it is once
    `velocity_matching` has been learned. The difference u - v is the `flow_map_residual` of the
    student at r = 1. The loss is no preset of it, for here the residual is a direction in which
    samples move, and F(x_t, t) has no gradient.

    Args:
        velocity: The student F; f(x, t) = x + (1 - t) F(x, t) is its prediction of the data.
        teacher: The teacher, whose params are frozen['teacher'].
        time: The law of t.
        tangent: What is made of dF/dt, by default dF/dt itself; see `velocity_matching`.
        jvp: `jax.jvp`, or `solvers.finite_difference(h)` for a network that has an operation
            without a forward-mode derivative.

    Returns:
        A loss of the batch {'x' [b, *event], of which the shape alone is read, optionally 'x0'
        (standard normal when absent), 'cond', 'weight' [b]}. Its metrics are {'residual'}, the mean
        of (u - v)^2 with dF/dt itself.

    Raises:
        ValueError: At trace time for a frozen without 'teacher', a velocity or a tangent of another
            shape, a batch without 'x' or with unknown keys, and a key that is None.

    References:
        Zhou, Yi, Fang, Yang, Xie, Wang, Shen, Tian, *Few-step Flow for 3D Generation via
            Marginal-Data Transport Distillation*, 2025, arXiv:2509.04406.
    """
    name, student = "velocity_distillation", consistency_map(velocity)

    def loss(params, key, batch, frozen=None):
        x0, x, cond, weight, t, noise_key, dropout_key = draw_pairs(name, key, batch, time)
        start = jnp.zeros_like(t)
        sample_key, motion_key = jax.random.split(dropout_key)
        x1 = x0 + like_state(name, velocity.apply(params, x0, start, cond, key=sample_key), x0)
        z = jax.random.normal(noise_key, x.shape, x.dtype)
        x_t, _ = line(z, x1, t)
        still = jax.lax.stop_gradient(x_t)
        v = line_velocity(name, teacher, frozen, x0, x, cond)(still, t)
        push, residual = flow_map_residual(
            name,
            student,
            jax.lax.stop_gradient(params),
            still,
            t,
            jnp.ones_like(t),
            v,
            cond,
            derivative=_checked(name, tangent),
            key=motion_key,
            jvp=jvp,
        )
        error = mean_event(jnp.square(x_t.astype(push.dtype) - still + push)) / 2
        exact = mean_event(jnp.square(residual))
        return mean_of_rows(error, weight), {"residual": mean_of_rows(exact, weight)}

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
    """Marginal-data transport (MDT-dist): `velocity_matching` plus `velocity_distillation`.

    Args:
        velocity: The student F; f(x, t) = x + (1 - t) F(x, t) is its prediction of the data.
        teacher: The teacher, whose params are frozen['teacher'].
        time: The law of t in both losses.
        tangent: What is made of dF/dt in both losses; see `velocity_matching`.
        matching: The weight of `velocity_matching`, not negative; 1 in the paper. With 0 it is not
            evaluated.
        distillation: The weight of `velocity_distillation`, not negative; 1 in the paper. With 0 it
            is not evaluated.
        jvp: `jax.jvp`, or `solvers.finite_difference(h)` for a network that has an operation
            without a forward-mode derivative.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. Its metrics are 'residual', the sum of those of the two losses, and of each
        loss that has a weight its value and its residual: 'matching/loss', 'matching/residual',
        'distillation/loss', 'distillation/residual'.

    Raises:
        ValueError: At construction for weights that are negative, or both 0; at trace time for a
            frozen without 'teacher', a velocity or a tangent of another shape, a batch without 'x'
            or with unknown keys, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> from jflow.types import Velocity
        >>> still = Velocity(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> loss = losses.marginal_transport(still, still)
        >>> value, metrics = loss({}, jax.random.key(0), {"x": jnp.ones((4, 2))}, {"teacher": {}})
        >>> float(value)
        0.0

    References:
        Zhou, Yi, Fang, Yang, Xie, Wang, Shen, Tian, *Few-step Flow for 3D Generation via
            Marginal-Data Transport Distillation*, 2025, arXiv:2509.04406.
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


def _checked(name, tangent):
    """The tangent as a derivative, with messages that call it as users do."""
    return lambda slope: check_same_shape(name, "a tangent", tangent(slope), slope)
