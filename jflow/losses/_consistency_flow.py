"""Consistency flow matching: velocities that are straight within each of a few segments of time.

velocity = jflow.velocity(nets.ResidualMLP(128)) loss = losses.consistency_flow_matching(velocity,
segments=2) ... make_step, fit ... two = solvers.fixed(2, diffrax.Euler()) # one step a segment, or
more x1, info = solvers.sample(velocity, params, x0, method=two)
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jflow import times
from jflow._core.arrays import expand_to
from jflow._core.batch import mean_of_rows
from jflow._core.checks import like_state
from jflow._core.keys import same_draws
from jflow._core.line import on_line
from jflow._core.times import partition
from jflow.losses._consistency import Frozen, online_target
from jflow.losses._errors import mean_squared_error
from jflow.losses._pairs import draw_pairs
from jflow.losses._teacher import line_velocity
from jflow.types import Loss, Params, Time, Velocity

__all__ = ["consistency_flow_matching"]

_UNIFORM = times.uniform()


def consistency_flow_matching(
    velocity: Velocity,
    *,
    segments: int | ArrayLike = 2,
    delta: float = 1e-3,
    alpha: float = 1e-5,
    boundary: float = 1.0,
    time: Time = _UNIFORM,
    teacher: Velocity | None = None,
    target: Callable[[Params, Frozen], Params] = online_target,
) -> Loss:
    """Consistency flow matching: a velocity that is constant on trajectories in a segment.

    With e the end of the segment that t lies in, and s = min(t + delta, e), the loss is the mean
    over event and rows of

        |f(x_t, t) - sg f'(x_s, s)|^2 + alpha |v(x_t, t) - sg v'(x_s, s)|^2,
        f(x, t) = x + (e - t) v(x, t),

    on x_t = (1 - t) x0 + t x1; v' has the params of `target` and the student's dropout. f agrees
    along a trajectory when v is the average velocity from t to e; the second term asks for more,
    that v itself does not change: a straight flow. At the exact average velocities of a flow that
    is curved within a segment it is not zero, and alpha is small. At s = e the first target is the
    point of the line at e, and the second term is left out: v at e belongs to the next segment. (In
    the published code s runs into the next segment, where f aims at another end.) The published
    code sums over the event.

    Args:
        velocity: The velocity v that is trained.
        segments: The number of equal segments, or their rising ends [k + 1], from 0 to 1. It is
            sampled by Euler steps that meet the ends.
        delta: The distance of the neighbors in time, above 0, at most the shortest segment.
        alpha: The weight of the second term, not negative.
        boundary: In (0, 1]. Where s is beyond this part of its segment the target is the line's
            point at e as well, without second term: at once, but a mean of ends over all lines
            through x_t rather than the end of the flow. As it goes to 0 this is flow matching
            weighed by (e - t)^2. (In the published code it is a time, whatever the segment.)
        time: The law of the times, (key, n) -> t [n].
        teacher: A teacher, with params frozen['teacher'], for x_s = x_t + (s - t) v(x_t, t) (ours);
            then boundary = 1. None takes the line.
        target: The params of v', (params, frozen) -> params: `online_target` or `averaged_target`.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. Its metrics are 'residual', the mean of ((f - f') / (s - t))^2, and
        'velocity', that of the second term's square, over the rows that have it (zero where none
        has).

    Raises:
        ValueError: At construction for delta <= 0 or longer than a segment, alpha < 0, boundary
            outside (0, 1] or below 1 beside a teacher, and segments that do not rise from 0 to 1;
            at trace time for what is missing in frozen, a velocity of another shape, a batch
            without 'x' or with unknown keys, and a key that is None.

    References:
        Yang et al., *Consistency Flow Matching: Defining Straight Flows with Velocity Consistency*,
            2024, arXiv:2407.02398.
    """
    name = "consistency_flow_matching"
    edges = partition(name, segments)
    shortest = min(b - a for a, b in zip(edges[:-1], edges[1:], strict=True))
    if not 0 < delta <= shortest:
        raise ValueError(
            f"{name}: expected 0 < delta <= {shortest:.4g}, the shortest segment, got {delta}"
        )
    if not 0 <= alpha < math.inf:
        raise ValueError(f"{name}: expected a finite alpha >= 0, got {alpha}")
    if not 0 < boundary <= 1 or (teacher is not None and boundary < 1):
        raise ValueError(f"{name}: expected boundary in (0, 1], 1 beside a teacher, got {boundary}")

    def loss(params, key, batch, frozen=None):
        x0, x1, cond, weight, t, _, dropout_key = draw_pairs(name, key, batch, time)
        ends = jnp.asarray(edges, t.dtype)
        # of the segment [start, e) that t lies in, 1 in the last; times closer to 1 than rounding
        # are moved away from it
        t = jnp.minimum(t, 1 - 1e-6)
        i = jnp.searchsorted(ends, t, side="right")
        start, e = ends[i - 1], ends[i]
        s = jnp.minimum(t + delta, e)
        s = jnp.where(e - s < 1e-2 * delta, e, s)  # no sliver is left before the end
        last = (s >= e) | (s >= start + boundary * (e - start))
        between = line_velocity(name, teacher, frozen, x0, x1, cond)
        x_t = on_line(x0, x1, t)
        x_s = jax.lax.stop_gradient(x_t + expand_to(s - t, x_t) * between(x_t, t))
        x_e = jax.lax.stop_gradient(x_t + expand_to(e - t, x_t) * between(x_t, t))

        def predicted(params, x, t):
            v = velocity.apply(params, x.astype(x1.dtype), t, cond, key=same_draws(dropout_key))
            return like_state(name, v, x)

        v = predicted(params, x_t, t)
        other = jax.lax.stop_gradient(target(params, frozen or {}))
        v_s = jax.lax.stop_gradient(predicted(other, x_s, s))
        f = x_t + expand_to(e - t, x_t) * v
        f_s = jnp.where(expand_to(last, x_t), x_e, x_s + expand_to(e - s, x_t) * v_s)
        apart, bend = (
            mean_squared_error(f, f_s, x_t, t),
            jnp.where(last, 0, mean_squared_error(v, v_s, x_t, t)),
        )
        seen = jnp.where(last, 0, 1).astype(t.dtype)
        share = jnp.maximum(mean_of_rows(seen, weight), jnp.finfo(t.dtype).tiny)
        metrics = {
            "residual": mean_of_rows(apart / (s - t) ** 2, weight),
            "velocity": mean_of_rows(bend, weight) / share,
        }
        return mean_of_rows(apart + alpha * bend, weight), jax.lax.stop_gradient(metrics)

    return loss
