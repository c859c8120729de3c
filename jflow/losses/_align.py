"""Align Your Flow: flow maps f(x, t, r) = x + (r - t) u(x, t, r) in continuous time, for sampling in any number of steps.

Two conditions fix the map of a velocity v, which is the teacher's. Carried along with its starting point it does not change
(Eulerian, d/dt f(x_t, t, r) = 0), and its end point moves with v (Lagrangian, d/dr f(x, t, r) = v(f, r)).

    teacher = guidance.autoguidance(velocity, weak, guidance.scaled(2.0))          # or velocity alone
    model = jflow.flow_map(net)
    loss = losses.eulerian_map_distillation(model, teacher, warmup=10_000, most=0.99)
    step = train.make_step(loss, optimizer, refresh=losses.count_steps)
    # params: train.warm_start(model.init(...), velocity_params)
    # state.frozen = {'teacher': {'velocity': velocity_params, 'weak': weak_params}, 'step': jnp.int32(0)}
    x1, info = solvers.sample_flow_map(model, params, x0, steps=4)

Adversarial finetuning is a sum of two losses, `sum_losses({'map': student_only(loss), 'gan': adversarial(...)})`.

Source: Sabour, Fidler, Kreis, "Align Your Flow: Scaling Continuous-Time Flow Map Distillation", 2025 (its time is 1 - t). Not
here: a guidance weight drawn anew for every row and told to the network, and the balance of the finetuning's two losses by
the norms of their gradients.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, float_dtype, mean_event
from jflow._core.batch import mean_of_rows
from jflow._core.checks import (
    check_flow_map,
    check_same_shape,
    check_whole,
    frozen_entry,
    like_state,
)
from jflow._core.keys import same_draws
from jflow._core.line import line
from jflow._core.times import check_pairs
from jflow.losses._pairs import draw_pairs
from jflow.losses._teacher import unchanged, warmed
from jflow.losses._trigflow import normalized_tangent
from jflow.solvers import JVP, total_derivative
from jflow.times import interval_pairs
from jflow.types import Array, FlowMap, Loss, TimePair, Velocity

__all__ = ["eulerian_map_distillation", "lagrangian_map_distillation"]


_INTERVALS, _NORMALISED = interval_pairs(), normalized_tangent()


def eulerian_map_distillation(
    flow_map: FlowMap,
    teacher: Velocity | None = None,
    *,
    times: TimePair = _INTERVALS,
    warmup: int = 0,
    most: float = 1.0,
    tangent: Callable[[Array], Array] = _NORMALISED,
    jvp: JVP = jax.jvp,
) -> Loss:
    """Eulerian map distillation (AYF-EMD). With x_t = (1 - t) x0 + t x1 and v the velocity there,

        mean over the event of (u - sg(u) + tangent(g))^2,     g = u - v - w (r - t) du/dt at u = u(x_t, t, r),

    no gradient through g, and du/dt along v with r fixed: at w = 1, g = -d/dt f(x_t, t, r) on the trajectory. With g itself
    for tangent(g) the gradient is the paper's E[omega sign f^T df/dt] with omega = 1 / (r - t), up to the factor 2 / (event
    size). As r -> t it is flow matching, at r = 1 consistency in continuous time.

    teacher: the teacher, params in frozen['teacher']; None: x1 - x0 of the pair, training from scratch. g is noisy
        then, and only for a linear tangent, `lambda g: g`, does its mean vanish at the exact map.
    warmup: w = min(most, frozen['step'] / warmup) (see `count_steps`); 0: w = most throughout, and no 'step' is needed.
    most: in [0, 1]. Below 1 the minimum is no longer the exact map (public reimplementations of the paper stop at 0.99).
    tangent: `normalized_tangent(0.1)` where none is given, by the root mean square over the event (public reimplementations
        take the 2-norm); the loss of a row is below 1 then. With it or with g itself the loss is a mean over the event
        and does not grow with its size.
    times: pairs t <= r. batch: as in `losses.flow_matching`. jvp: see `total_derivative`.
    metrics: 'residual', the mean over event and rows of g^2 at w = 1. Trains all pairs that times draws:
        `sample_flow_map` in any number of steps.
    Errors: ValueError for times, warmup or most out of range; at trace time for what frozen lacks ('teacher', 'step'),
        a velocity of another shape, and as `losses.flow_matching`.
    """
    name = "eulerian_map_distillation"
    _check(name, flow_map, times, warmup, most)

    def loss(params, key, batch, frozen=None):
        pairs = draw_pairs(name, key, batch, times)
        x0, x1, cond, weight, (t, r), _, dropout_key = pairs
        x_t, v = line(x0, x1, t)
        if teacher is not None:
            v = teacher.apply(frozen_entry(name, frozen), x_t, t, cond)
            v = jax.lax.stop_gradient(like_state(name, v, x_t))
        u, slope = total_derivative(flow_map, params, x_t, t, r, v, cond, key=dropout_key, jvp=jvp)
        u = like_state(name, u, x_t)
        w = warmed(name, frozen, warmup, most)
        return _regress(name, u, v, expand_to(r - t, x_t) * slope, w, tangent, weight)

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
    """Lagrangian map distillation (AYF-LMD): the loss of `eulerian_map_distillation` with

        g = u + w (r - t) d_r u - v(f, r),     f = x_t + (r - t) u,

    v the teacher with params frozen['teacher'], and no gradient through f; at w = 1, g = d_r f - v(f, r). The teacher is asked
    where the student arrives, so that x1 - x0 of a pair cannot stand in for it. tangent: g itself where none is given.
    All else is as in `eulerian_map_distillation`.
    """
    name = "lagrangian_map_distillation"
    _check(name, flow_map, times, warmup, most)

    def loss(params, key, batch, frozen=None):
        pairs = draw_pairs(name, key, batch, times)
        x0, x1, cond, weight, (t, r), _, dropout_key = pairs
        x_t, _ = line(x0, x1, t)
        gap = expand_to(r - t, x_t)
        u, slope = jvp(
            lambda r: flow_map.apply(params, x_t, t, r, cond, key=same_draws(dropout_key)),
            (r,),
            (jnp.ones_like(r),),
        )
        u = like_state(name, u, x_t)
        there = jax.lax.stop_gradient(x_t + gap * u).astype(x_t.dtype)
        v = jax.lax.stop_gradient(
            like_state(name, teacher.apply(frozen_entry(name, frozen), there, r, cond), x_t)
        )
        w = warmed(name, frozen, warmup, most)
        return _regress(name, u, v, -gap * slope, w, tangent, weight)

    return loss


def _regress(name, u, v, curve, w, tangent, weight):
    """Move u by -tangent(g), g = u - v - w curve; and the residual."""
    dtype = float_dtype(u)
    u, v, curve = (a.astype(dtype) for a in (u, v, curve))
    fixed, curve = jax.lax.stop_gradient((u, curve))
    g = check_same_shape(name, "a tangent", tangent(fixed - v - jnp.asarray(w, dtype) * curve), u)
    value = mean_of_rows(mean_event(jnp.square(u - fixed + jax.lax.stop_gradient(g))), weight)
    return value, {"residual": mean_of_rows(mean_event(jnp.square(fixed - v - curve)), weight)}


def _check(name, flow_map, times, warmup, most):
    check_flow_map(name, flow_map)
    check_pairs(name, times)
    check_whole(name, 0, warmup=warmup)
    if not 0 <= most <= 1:
        raise ValueError(f"{name}: expected most in [0, 1], got {most}")
