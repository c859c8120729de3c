"""Constraints on a training, by multipliers that are learned with it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jflow._core.checks import check_weights, take_parts
from jflow._core.keys import split_key
from jflow.types import Loss

__all__ = ["constrained"]


def constrained(
    loss: Loss, constraints: Mapping[str, tuple[Loss, float]], *, damping: float = 1.0
) -> Loss:
    """Minimize a loss under constraints, with multipliers that are learned beside the params.

    Also known as: MDMM, modified differential method of multipliers, augmented Lagrangian.

        L = f + sum of multiplier g + damping / 2 g^2,    g = constraint - target,

    falls along the params and rises along the multipliers. Both are one scalar to one optimizer:
    gradients are stopped, so that its gradient by a multiplier is -g. The value is that of f +
    damping / 2 g^2, since the terms of the multipliers cancel. Rates of their own are
    `optax.partition({'model': ..., 'multipliers': ...}, {'model': 'model', 'multipliers':
    'multipliers'})`; plain gradient descent is what the method is for the multipliers.

    Without damping the params circle the solution; with it they come to rest there, and the
    multipliers at -df / dg, the price of a constraint.

    Args:
        loss: The loss f of the params under 'model'.
        constraints: By name the pair of a loss, of the same params and batch, and the number that
            it shall be.
        damping: The weight of the square.

    Returns:
        A loss with params {'model': those of `loss`, 'multipliers': {name: []}}, the multipliers
        zeros at first. A key is split, a part for the loss and for each constraint. Its metrics are
        those of `loss`, 'loss' the value of f, and of each constraint 'name/value' and
        'name/multiplier'.

    Raises:
        ValueError: At construction for no constraints, or a damping that is negative or not
            finite; at trace time for params without a multiplier for each constraint.

    Examples:
        >>> import jax
        >>> from jflow import losses
        >>> square = lambda x, key, batch, frozen=None: (x**2, {})
        >>> itself = lambda x, key, batch, frozen=None: (x, {})
        >>> loss = losses.constrained(square, {"x": (itself, 1.0)})
        >>> params = {"model": 0.0, "multipliers": {"x": 0.0}}
        >>> grads, _ = jax.grad(loss, has_aux=True)(params, None, {})
        >>> float(grads["model"]), float(grads["multipliers"]["x"])  # both descend
        (-1.0, 1.0)

    References:
        Platt, Barr, *Constrained Differential Optimization*, 1987 (NIPS).
    """
    check_weights("constrained", damping=damping)
    if not constraints:
        raise ValueError("constrained: expected at least one constraint, got none")
    constraints = dict(constraints)

    def total(params, key, batch, frozen=None):
        model, multipliers = take_parts("constrained", params, "model", "multipliers")
        take_parts("constrained: multipliers", multipliers, *constraints)
        key, *keys = split_key(key, 1 + len(constraints))
        value, said = loss(model, key, batch, frozen)
        metrics = {**said, "loss": value}
        for (name, (constraint, target)), own in zip(constraints.items(), keys, strict=True):
            found, _ = constraint(model, own, batch, frozen)
            gap, multiplier = found - target, jnp.asarray(multipliers[name])
            price = jax.lax.stop_gradient(multiplier) * gap
            ascent = multiplier * jax.lax.stop_gradient(gap)
            value = value + price - ascent + damping / 2 * jnp.square(gap)
            metrics |= {f"{name}/value": found, f"{name}/multiplier": multiplier}
        return value, metrics

    return total
