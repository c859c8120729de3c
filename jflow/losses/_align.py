"""Align Your Flow: flow maps f(x, t, r) = x + (r - t) u(x, t, r) in continuous time.

Two conditions fix the map of a velocity v, which is the teacher's. Carried along with its starting
point it does not change (Eulerian, d/dt f(x_t, t, r) = 0), and its end point moves with v
(Lagrangian, d/dr f(x, t, r) = v(f, r)). Either trains a model for sampling in any number of steps.

    teacher = guidance.autoguidance(velocity, weak, guidance.scaled(2.0))  # or velocity alone
    model = jflow.flow_map(net)
    loss = losses.eulerian_map_distillation(model, teacher, warmup=10_000, most=0.99)
    step = train.make_step(loss, optimizer, refresh=losses.count_steps)
    # params: train.warm_start(model.init(...), velocity_params)
    # state.frozen['teacher']: {'velocity': velocity_params, 'weak': weak_params}
    # state.frozen['step']: jnp.int32(0)
    x1, info = solvers.sample_flow_map(model, params, x0, steps=4)

Adversarial finetuning is a sum of two losses, `sum_losses({'map': student_only(loss), 'gan':
adversarial(...)})`.

The paper is Sabour, Fidler, Kreis, *Align Your Flow: Scaling Continuous-Time Flow Map
Distillation*, 2025 (its time is 1 - t). Two of its parts are not here: a guidance weight that is
drawn anew for every row and given to the network, and the balance of the finetuning's two losses by
the norms of their gradients.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, mean_event
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_flow_map, check_whole, frozen_entry, like_state
from jflow._core.keys import same_draws
from jflow._core.line import line
from jflow._core.times import check_pairs
from jflow.losses._pairs import draw_pairs
from jflow.losses._residual import flow_map_residual, normalized_tangent, residual_of, unchanged
from jflow.losses._teacher import line_velocity, warmed
from jflow.solvers import JVP
from jflow.times import interval_pairs
from jflow.types import Array, FlowMap, Loss, TimePair, Velocity

__all__ = ["eulerian_map_distillation", "lagrangian_map_distillation"]


_INTERVALS, _NORMALIZED = interval_pairs(), normalized_tangent()


def eulerian_map_distillation(
    flow_map: FlowMap,
    teacher: Velocity | None = None,
    *,
    times: TimePair = _INTERVALS,
    warmup: int = 0,
    most: float = 1.0,
    tangent: Callable[[Array], Array] = _NORMALIZED,
    jvp: JVP = jax.jvp,
) -> Loss:
    """Eulerian map distillation (AYF-EMD): a flow map is constant along the trajectory.

    Also known as: AYF, Align Your Flow, EMD.

    With x_t = (1 - t) x0 + t x1 and v the velocity there, the loss is the mean over the event and
    over rows of

        (u - sg(u) + tangent(g))^2,     g = u - v - w (r - t) du/dt at u = u(x_t, t, r),

    with no gradient through g, and du/dt along v with r fixed. At w = 1, g = -d/dt f(x_t, t, r) on
    the trajectory. It is the preset of `flow_map_residual` with w du/dt for the derivative. With g
    itself for tangent(g) the gradient is the paper's E[omega sign f^T df/dt] with omega = 1 / (r -
    t), up to the factor 2 / (event size), and the loss is that of `mean_flow`. As r -> t it is flow
    matching, at r = 1 consistency in continuous time. It trains all pairs of times that `times`
    draws.

    Args:
        flow_map: The average velocity u that is trained.
        teacher: The teacher, whose params are frozen['teacher']. None takes x1 - x0 of the pair,
            which is training from scratch: g is noisy then, and only for a linear tangent,
            `lambda g: g`, does its mean vanish at the exact map.
        times: The law of the pairs of times, (key, n) -> (t, r), t <= r.
        warmup: The number of updates over which w grows, w = min(most, frozen['step'] / warmup)
            (see `count_steps`). With 0, w = most throughout, and no 'step' is needed.
        most: The largest w, in [0, 1]. Below 1 the minimum is no longer the exact map (public
            reimplementations of the paper stop at 0.99).
        tangent: What is made of g. The default divides it by its root mean square over the event
            (public reimplementations take the 2-norm); the loss of a row is below 1 then. With it
            or with g itself the loss is a mean over the event and does not grow with its size.
        jvp: `jax.jvp`, or `solvers.finite_difference(h)` for a network that has an operation
            without a forward-mode derivative.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. Its metrics are {'residual'}, the mean over the event and rows of g^2 at w =
        1.

    Raises:
        ValueError: At construction for times, warmup or most out of range; at trace time for what
            frozen lacks ('teacher', 'step'), a velocity or a tangent of another shape, a batch
            without 'x' or with unknown keys, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses, oracles
        >>> law = oracles.gaussian([0.0, 1.0], 0.25)
        >>> exact, teacher = oracles.as_average_velocity(law), oracles.as_velocity(law)
        >>> loss = losses.eulerian_map_distillation(exact, teacher)
        >>> value, metrics = loss({}, jax.random.key(0), {"x": jnp.ones((4, 2))}, {"teacher": {}})
        >>> float(metrics["residual"]) < 1e-6
        True

    References:
        Sabour, Fidler, Kreis, *Align Your Flow: Scaling Continuous-Time Flow Map Distillation*,
            2025, arXiv:2506.14603 (its time is 1 - t).
    """
    name = "eulerian_map_distillation"
    _check(name, flow_map, times, warmup, most)

    def loss(params, key, batch, frozen=None):
        x0, x1, cond, weight, (t, r), _, dropout_key = draw_pairs(name, key, batch, times)
        x_t, _ = line(x0, x1, t)
        v = line_velocity(name, teacher, frozen, x0, x1, cond)(x_t, t)
        w = warmed(name, frozen, warmup, most)
        g, residual = flow_map_residual(
            name,
            flow_map,
            params,
            x_t,
            t,
            r,
            v,
            cond,
            derivative=lambda slope: jnp.asarray(w, slope.dtype) * slope,
            tangent=tangent,
            key=dropout_key,
            jvp=jvp,
        )
        return _mean_squares(g, residual, weight)

    return loss


def lagrangian_map_distillation(
    flow_map: FlowMap,
    teacher: Velocity,
    *,
    times: TimePair = _INTERVALS,
    warmup: int = 0,
    most: float = 1.0,
    tangent: Callable[[Array], Array] = unchanged,
    jvp: JVP = jax.jvp,
) -> Loss:
    """Lagrangian map distillation (AYF-LMD): a flow map's end moves with the teacher.

    The loss is the mean over the event and over rows of (u - sg(u) + tangent(g))^2 with

        g = u + w (r - t) du/dr - v(f, r),     f = x_t + (r - t) u,     u = u(x_t, t, r),

    v the teacher, x_t = (1 - t) x0 + t x1 and no gradient through g. At w = 1, g = d/dr f - v(f,
    r). It is no preset of `flow_map_residual`: the derivative is in r, and the teacher is asked
    where the student arrives, so that x1 - x0 of a pair cannot stand in for it.

    Args:
        flow_map: The average velocity u that is trained.
        teacher: The teacher, whose params are frozen['teacher'].
        times: The law of the pairs of times, (key, n) -> (t, r), t <= r.
        warmup: The number of updates over which w grows, w = min(most, frozen['step'] / warmup)
            (see `count_steps`). With 0, w = most throughout, and no 'step' is needed.
        most: The largest w, in [0, 1]. Below 1 the minimum is no longer the exact map.
        tangent: What is made of g, by default g itself.
        jvp: `jax.jvp`, or `solvers.finite_difference(h)` for a network that has an operation
            without a forward-mode derivative.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. Its metrics are {'residual'}, the mean over the event and rows of g^2 at w =
        1.

    Raises:
        ValueError: At construction for times, warmup or most out of range; at trace time for what
            frozen lacks ('teacher', 'step'), a velocity or a tangent of another shape, a batch
            without 'x' or with unknown keys, and a key that is None.

    References:
        Sabour, Fidler, Kreis, *Align Your Flow: Scaling Continuous-Time Flow Map Distillation*,
            2025, arXiv:2506.14603 (its time is 1 - t).
    """
    name = "lagrangian_map_distillation"
    _check(name, flow_map, times, warmup, most)

    def loss(params, key, batch, frozen=None):
        x0, x1, cond, weight, (t, r), _, dropout_key = draw_pairs(name, key, batch, times)
        x_t, _ = line(x0, x1, t)
        u, slope = jvp(
            lambda r: flow_map.apply(params, x_t, t, r, cond, key=same_draws(dropout_key)),
            (r,),
            (jnp.ones_like(r),),
        )
        u = like_state(name, u, x_t)
        there = jax.lax.stop_gradient(x_t + expand_to(r - t, x_t) * u).astype(x_t.dtype)
        v = like_state(name, teacher.apply(frozen_entry(name, frozen), there, r, cond), x_t)
        w = warmed(name, frozen, warmup, most)
        weighed = lambda slope: jnp.asarray(w, slope.dtype) * slope  # noqa: E731
        g, residual = residual_of(name, u, slope, v, t - r, weighed, tangent)
        return _mean_squares(g, residual, weight)

    return loss


def _mean_squares(g, residual, weight):
    """The loss and its metrics."""
    value, exact = (mean_of_rows(mean_event(jnp.square(a)), weight) for a in (g, residual))
    return value, {"residual": exact}


def _check(name, flow_map, times, warmup, most):
    check_flow_map(name, flow_map)
    check_pairs(name, times)
    check_whole(name, 0, warmup=warmup)
    if not 0 <= most <= 1:
        raise ValueError(f"{name}: expected most in [0, 1], got {most}")
