"""Constant acceleration flow: one network for the velocity at the start, one for an acceleration.

Between a source x0 and the data x1 that belongs to it, x moves by

    x_t = x0 + v0 t + a t^2 / 2,      v0 = h (x1 - x0),      a = 2 (x1 - x0) - 2 v0.

The acceleration network is given v0, which differs from pair to pair, and so needn't average over
pairs whose paths cross. Pairs come from a trained flow (`data.generate_reflow_pairs`); drawn at
random, v0 would depend on x0 alone, and every x0 would go to the mean of the data.

    start, acceleration = (jflow.velocity(nets.ResidualMLP(128)) for _ in range(2))
    ... fit initial_velocity(start) on the pairs, then, with its params as frozen['velocity'],
        fit constant_acceleration(acceleration, start) ...
    params = {"velocity": start_params, "acceleration": acceleration_params}
    x1, info = solvers.sample_acceleration(acceleration, start, params, x0, steps=1)
    acceleration.init(key, x, t, solvers.AccelerationCondition(v0, cond))       # v0 shaped like x

A step costs two evaluations.
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
    """Regression of the velocity at the start of each pair's path, v0 = h (x1 - x0).

    The loss is the mean over the event of (velocity(x_t, t) - v0)^2, then over rows. With this v0,
    `x_t = x0 + (h t + (1 - h) t^2) (x1 - x0)` is on the straight line, sooner or later than at t. h
    > 1 starts fast and brakes; h = 1 has no acceleration left and is `losses.flow_matching` on the
    pairs.

    Args:
        velocity: The velocity that is trained.
        h: The velocity at the start over the mean velocity, in (0, 2]; 1.5 is that of the public
            code.
        time: The law of the times, (key, n) -> t [n].

    Returns:
        A loss of the batch {'x0' and 'x' [b, *event], a pair a row, optionally 'cond', 'weight'
        [b]}. Its metrics are {'residual'}, the loss.

    Raises:
        ValueError: Unless 0 < h <= 2, beyond which x_t overshoots x1; at trace time for a batch
            without 'x0', a velocity of another shape, a batch without 'x' or with unknown keys, and
            a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> from jflow.types import Velocity
        >>> still = Velocity(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> batch = {"x0": jnp.zeros((4, 2)), "x": jnp.ones((4, 2))}
        >>> float(losses.initial_velocity(still, h=1.5)({}, jax.random.key(0), batch)[0])
        2.25

    References:
        Park, Lee, Kim, Lee, Hong, Kim, *Constant Acceleration Flow*, 2024, arXiv:2411.00322.
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
    """Regression of the acceleration of each pair's path, given the velocity at its start.

    The loss is the mean over the event, then over rows, of the squared error of a = 2 (x1 - x0) - 2
    v0 at (x_t, t, v0), where v0 = velocity(x0, 0) is what `initial_velocity` trained. x_t is on the
    path of the predicted v0, which ends in x1 whatever v0 is: errors of the first network are made
    good.

    Args:
        acceleration: A network of (x, t, `solvers.AccelerationCondition(v0, cond)`) whose output is
            shaped like x.
        velocity: The velocity at the start, with params frozen['velocity'].
        time: The law of the times, (key, n) -> t [n].

    Returns:
        A loss of the batch {'x0' and 'x' [b, *event], a pair a row, optionally 'cond', 'weight'
        [b]}. Its metrics are {'residual'}, the loss.

    Raises:
        ValueError: At trace time for a batch without 'x0', a frozen without 'velocity', an output
            of another shape, a batch without 'x' or with unknown keys, and a key that is None.

    References:
        Park, Lee, Kim, Lee, Hong, Kim, *Constant Acceleration Flow*, 2024, arXiv:2411.00322.
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
