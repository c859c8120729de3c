"""Constant acceleration flow: two networks, one for the velocity at the start and one for an acceleration that is told it.

Between a source x0 and the data x1 that belongs to it, x moves by

    x_t = x0 + v0 t + a t^2 / 2,      v0 = h (x1 - x0),      a = 2 (x1 - x0) - 2 v0.

Told v0, which differs from pair to pair, the acceleration needn't average over pairs whose paths cross. Pairs come from a
trained flow (`data.generate_reflow_pairs`); drawn at random, v0 would tell x0 alone, and every x0 would go to the mean
of the data.

    start, acceleration = jflow.velocity(nets.ResidualMLP(128)), jflow.velocity(nets.ResidualMLP(128))
    ... fit initial_velocity(start) on the pairs, then, with its params as frozen['velocity'],
        fit constant_acceleration(acceleration, start) ...
    params = {"velocity": start_params, "acceleration": acceleration_params}
    x1, info = solvers.sample_acceleration(acceleration, start, params, x0, steps=1)      # two evaluations
    acceleration.init(key, x, t, solvers.AccelerationCondition(v0, cond))                                # v0 shaped like x
"""

import jax
import jax.numpy as jnp

from jflow import times
from jflow._core.arrays import expand_to, float_dtype
from jflow._core.batch import mean_of_rows
from jflow._core.checks import frozen_entry, like_state, need_pairs
from jflow.losses._errors import mean_squared_error
from jflow.losses._pairs import draw_pairs
from jflow.solvers import AccelerationCondition
from jflow.types import Loss, Time, Velocity

__all__ = ["constant_acceleration", "initial_velocity"]

_UNIFORM = times.uniform()


def initial_velocity(velocity: Velocity, *, h: float = 1.5, time: Time = _UNIFORM) -> Loss:
    """Regression of v0 = h (x1 - x0) on (x_t, t): the mean over the event of the squared error, then over rows.

    With this v0, x_t = x0 + (h t + (1 - h) t^2) (x1 - x0) is on the straight line, sooner or later than at t. h > 1 starts
    fast and brakes, h = 1 has no acceleration left and is `losses.flow_matching` on the pairs.
    batch: 'x0' and 'x' [b, *event] pairs, optionally 'cond', 'weight'. metrics: 'residual', the loss.
    Errors: ValueError unless 0 < h <= 2, beyond which x_t overshoots x1; at trace time for a batch without 'x0', and as
        `losses.flow_matching`.
    Source: Park, Lee, Kim, Lee, Hong, Kim, "Constant Acceleration Flow", 2024; 1.5 is its public code's.
    """
    if not 0 < h <= 2:
        raise ValueError(f"initial_velocity: expected 0 < h <= 2, got {h}")

    def loss(params, key, batch, frozen=None):
        x0, x1, cond, weight, t, key = _pairs("initial_velocity", key, batch, time)
        v0 = h * (x1 - x0)
        x = _point(x0, x1, v0, t)
        error = mean_squared_error(
            like_state("initial_velocity", velocity.apply(params, x, t, cond, key=key), x), v0, x, t
        )
        total = mean_of_rows(error, weight)
        return total, {"residual": total}

    return loss


def constant_acceleration(
    acceleration: Velocity, velocity: Velocity, *, time: Time = _UNIFORM
) -> Loss:
    """Regression of a = 2 (x1 - x0) - 2 v0 on (x_t, t, v0), where v0 = velocity(x0, 0) is what `initial_velocity` trained,
    with params frozen['velocity']: the mean over the event of the squared error, then over rows.

    x_t is on the path of the predicted v0, which ends in x1 whatever v0 is: errors of the first network are made good.
    acceleration: a network of (x, t, Launch(v0, cond)), shaped like x.
    batch: 'x0' and 'x' [b, *event] pairs, optionally 'cond', 'weight'. metrics: 'residual', the loss.
    Errors: ValueError at trace time for a batch without 'x0', without frozen['velocity'], and as `losses.flow_matching`.
    Source: Park, Lee, Kim, Lee, Hong, Kim, "Constant Acceleration Flow", 2024.
    """

    name = "constant_acceleration"

    def loss(params, key, batch, frozen=None):
        x0, x1, cond, weight, t, key = _pairs(name, key, batch, time)
        start = frozen_entry(name, frozen, "velocity")
        v0 = jax.lax.stop_gradient(
            like_state(name, velocity.apply(start, x0, jnp.zeros_like(t), cond), x0)
        )
        x = _point(x0, x1, v0, t)
        a = acceleration.apply(
            params, x, t, AccelerationCondition(v0.astype(x.dtype), cond), key=key
        )
        error = mean_squared_error(like_state(name, a, x), 2 * (x1 - x0) - 2 * v0, x, t)
        total = mean_of_rows(error, weight)
        return total, {"residual": total}

    return loss


def _pairs(name, key, batch, time):
    """x0, x1 in float32 or better, cond, weight, t, and a key for dropout."""
    need_pairs(name, batch)
    pairs = draw_pairs(name, key, batch, time)
    x0, x1 = (x.astype(float_dtype(x)) for x in (pairs.x0, pairs.x1))
    return x0, x1, pairs.cond, pairs.weight, pairs.t, pairs.dropout_key


def _point(x0, x1, v0, t):
    """x_t of the path that starts with v0 and ends in x1."""
    t = expand_to(t, x0)
    return x0 + t * (v0 + t * (x1 - x0 - v0))
