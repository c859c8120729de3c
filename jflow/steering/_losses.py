"""Steering by the gradient of any loss of the predicted data: through the network, or past it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to
from jflow._core.checks import check_noun, check_rows, described, like_state, rows
from jflow.paths import LINEAR, Schedule, velocity_to_data
from jflow.steering._condition import (
    check_scale,
    check_window,
    read_condition,
    scale_at,
    steered_init,
)
from jflow.types import Array, Field, NumberOrFunction, Velocity

__all__ = ["TargetLoss", "flow_chef", "loss_guidance"]

TargetLoss = Callable[[Array, Any], Array]
"""A loss of predicted data, (x1 [b, *event], target) -> [b], a number for each row: such as
`residual_norm(measurement)`, the cross-entropy of a classifier, or the distance to an image."""


def loss_guidance(
    velocity: Velocity,
    loss: TargetLoss,
    scale: NumberOrFunction,
    *,
    window: tuple[float, float] = (0.0, 1.0),
    schedule: Schedule = LINEAR,
) -> Velocity:
    """Steering by the gradient of a loss of the predicted data, through the network.

    Also known as: DPS, diffusion posterior sampling, universal guidance, FreeDoM.

        v - scale grad_x loss(x1(x), target)

    x1 is the prediction of the data at (x, t); linear: x1(x) = x + (1 - t) v(x, t). A step h of
    Euler moves x by -h scale times the gradient: the step size zeta of DPS is scale / n for n equal
    steps, with `residual_norm(measurement)` as the loss. With -log p(target | x1) as the loss and
    scale = lambda t: (1 - t) / t it is the posterior's velocity up to the approximation
    p(target | x) = p(target | x1(x)).

    Each evaluation of it is one of the velocity and one pass back through it.

    Args:
        velocity: the velocity to steer; x is an array.
        loss: (x1 [b, *event], target) -> [b].
        scale: a number of at least 0, or t [b] -> [b].
        window: the times (first, last) within which it acts; elsewhere it is the velocity itself.
        schedule: the path of the velocity; the default is the linear one.

    Returns:
        Velocity: params are those of `velocity`; cond is a `SteeringCondition(target, cond)`. It
            raises a ValueError for another cond, and for a loss of another shape.

    Raises:
        TypeError: velocity or loss is something else.
        ValueError: scale is negative, or the window is not within [0, 1].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> from jflow.types import Velocity
        >>> velocity = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: -x)
        >>> loss = lambda x1, target: jnp.sum((x1 - target) ** 2, axis=1) / 2
        >>> steered = steering.loss_guidance(velocity, loss, 2.0)
        >>> cond = steering.SteeringCondition(jnp.ones((1, 1)))
        >>> x, t = jnp.zeros((1, 1)), jnp.array([0.5])
        >>> steered.apply({}, x, t, cond).tolist()  # d x1 / d x is 1/2
        [[1.0]]

    References:
        Chung, Kim, Mccann, Klasky, Ye, *Diffusion Posterior Sampling for General Noisy Inverse
            Problems*, 2023, arXiv:2209.14687 (of diffusion models; as a velocity it is ours).
    """
    name = "loss_guidance"
    window = _check(name, velocity, loss, scale, window)

    def apply(params, x, t, cond=None, *, key=None):
        t = rows(t, x.shape[0])
        target, own = read_condition(name, cond, x.shape[0])

        def total(x):
            v = like_state(name, velocity.apply(params, x, t, own, key=key), x)
            x1 = velocity_to_data(v, x, t, schedule)
            return _total(name, loss, x1, target), v

        gradient, v = jax.grad(total, has_aux=True)(x)
        weight = expand_to(scale_at(name, scale, window, t), x)
        return (v - weight * gradient).astype(v.dtype)

    return Velocity(steered_init(name, velocity), apply)


def flow_chef(
    velocity: Velocity,
    loss: TargetLoss,
    scale: NumberOrFunction,
    *,
    window: tuple[float, float] = (0.0, 1.0),
    schedule: Schedule = LINEAR,
) -> Velocity:
    """Steering by the gradient of a loss of the predicted data, with the network skipped.

    Also known as: FlowChef, gradient skipping, gradient-free steering.

        v - scale grad_{x1} loss(x1, target)

    x1 is the prediction of the data at (x, t); linear: x1 = x + (1 - t) v. The gradient with
    respect to x1 is taken for that with respect to x, which is exact for a v that does not depend
    on x. A step h of Euler is the one of the paper, x <- x - s' grad and then x <- x + h v, with
    the size s' = h scale: scale = s' n for n equal steps.

    Each evaluation of it is one of the velocity, and there is no pass back through it, whatever the
    loss is: inverse problems (`residual_norm`, `squared_residual`), a classifier of clean data,
    editing towards an image.

    Args:
        velocity: the velocity to steer; x is an array.
        loss: (x1 [b, *event], target) -> [b].
        scale: a number of at least 0, or t [b] -> [b].
        window: the times (first, last) within which it acts; elsewhere it is the velocity itself.
            The paper leaves the last step alone.
        schedule: the path of the velocity; the default is the linear one.

    Returns:
        Velocity: params are those of `velocity`; cond is a `SteeringCondition(target, cond)`. It
            raises a ValueError for another cond, and for a loss of another shape.

    Raises:
        TypeError: velocity or loss is something else.
        ValueError: scale is negative, or the window is not within [0, 1].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> from jflow.types import Velocity
        >>> velocity = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: -x)
        >>> loss = lambda x1, target: jnp.sum((x1 - target) ** 2, axis=1) / 2
        >>> steered = steering.flow_chef(velocity, loss, 2.0)
        >>> cond = steering.SteeringCondition(jnp.ones((1, 1)))
        >>> x, t = jnp.zeros((1, 1)), jnp.array([0.5])
        >>> steered.apply({}, x, t, cond).tolist()  # d x1 / d x is taken for 1
        [[2.0]]

    References:
        Patel, Wen, Metaxas, Yang, *Steering Rectified Flow Models in the Vector Field for
            Controlled Image Generation*, 2024, arXiv:2412.00100 (by steps of Euler; that any solver
            takes it as a velocity is ours).
    """
    name = "flow_chef"
    window = _check(name, velocity, loss, scale, window)

    def apply(params, x, t, cond=None, *, key=None):
        t = rows(t, x.shape[0])
        target, own = read_condition(name, cond, x.shape[0])
        v = like_state(name, velocity.apply(params, x, t, own, key=key), x)
        x1 = velocity_to_data(v, x, t, schedule)
        gradient = jax.grad(lambda x1: _total(name, loss, x1, target))(x1)
        weight = expand_to(scale_at(name, scale, window, t), x)
        return (v - weight * gradient).astype(v.dtype)

    return Velocity(steered_init(name, velocity), apply)


def _check(name, velocity, loss, scale, window):
    check_noun(name, velocity, Velocity, Field)
    if not callable(loss):
        raise TypeError(
            f"{name}: expected a loss (x1, target) -> [b], such as residual_norm(measurement), got"
            f" {described(loss)}"
        )
    check_scale(name, scale)
    return check_window(name, window)


def _total(name, loss, x1, target):
    """The sum over rows, which do not interact: its gradient is that of each."""
    return jnp.sum(check_rows(name, "the loss", loss(x1, target), x1.shape[0]))
