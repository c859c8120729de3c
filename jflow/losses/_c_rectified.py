"""c-rectified flow: velocities tied to one convex cost c, v = grad c*(grad f), of a scalar f(x, t).

For the quadratic cost v is the gradient of f: rotations, which carry mass around without need, are
projected away.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jflow import times
from jflow._core.arrays import sum_event
from jflow._core.batch import mean_of_rows
from jflow._core.line import line
from jflow.losses._pairs import draw_pairs
from jflow.types import Array, Field, Loss, Time, Velocity

__all__ = [
    "ConvexCost",
    "c_rectified_flow",
    "inner_potential",
    "potential_velocity",
    "power_cost",
    "quadratic_cost",
]

_UNIFORM = times.uniform()


class ConvexCost(NamedTuple):
    """A convex cost c of a displacement, and its conjugate c*(y) = sup_z <y, z> - c(z).

    Attributes:
        value: The cost c, z [b, *event] -> [b].
        conjugate: The conjugate c*, y [b, *event] -> [b], differentiable.
    """

    value: Callable[[Array], Array]
    conjugate: Callable[[Array], Array]


def quadratic_cost() -> ConvexCost:
    """The cost c(z) = |z|^2 / 2, which is its own conjugate.

    Returns:
        The cost, a `ConvexCost`.
    """
    half = lambda z: sum_event(jnp.square(z)) / 2  # noqa: E731
    return ConvexCost(half, half)


def power_cost(p: float) -> ConvexCost:
    """The cost c(z) = sum_i |z_i|^p / p, with the conjugate sum_i |y_i|^q / q, 1/p + 1/q = 1.

    Args:
        p: The power, above 1.

    Returns:
        The cost, a `ConvexCost`.

    Raises:
        ValueError: Unless 1 < p < inf.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> losses.power_cost(4.0).value(jnp.array([[1.0, 2.0]])).tolist()
        [4.25]
    """
    if not 1 < p < math.inf:
        raise ValueError(f"power_cost: expected 1 < p < inf, got {p}")
    q = p / (p - 1)
    return ConvexCost(
        lambda z: sum_event(jnp.abs(z) ** p) / p, lambda y: sum_event(jnp.abs(y) ** q) / q
    )


def inner_potential(velocity: Velocity) -> Field:
    """A scalar potential from a network whose output is shaped like x: f(x, t) = <net(x, t), x>.

    Any `Field` with output [b] will do instead.

    Args:
        velocity: The network, any `Velocity`.

    Returns:
        The potential, a `Field` with output [b] and the network's params.

    References:
        Salimans, Ho, *Should EBMs model the energy or the score?*, 2021 (the form).
    """

    def apply(params, x, t, cond=None, *, key=None):
        return sum_event(velocity.apply(params, x, t, cond, key=key) * x)

    return Field(velocity.init, apply)


def potential_velocity(potential: Field, cost: ConvexCost | None = None) -> Velocity:
    """The velocity v(x, t) = grad c*(grad_x f(x, t)) of a potential f, with the potential's params.

    Args:
        potential: The potential f, a `Field` with output [b]; its rows must not look at each other.
        cost: The cost c; None is `quadratic_cost`, for which v = grad f.

    Returns:
        The velocity, with the params of the potential.

    Raises:
        ValueError: At trace time for a potential whose output is not [b].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> from jflow.types import Field
        >>> half = Field(None, lambda p, x, t, cond=None, *, key=None: (x**2).sum(1) / 2)
        >>> velocity = losses.potential_velocity(half)
        >>> velocity.apply({}, jnp.array([[1.0, -2.0]]), jnp.zeros(1)).tolist()
        [[1.0, -2.0]]
    """
    cost = quadratic_cost() if cost is None else cost

    def apply(params, x, t, cond=None, *, key=None):
        y = _gradient(potential, params, x, t, cond, key)
        return jax.grad(lambda y: jnp.sum(cost.conjugate(y)))(y).astype(jnp.result_type(x))

    return Velocity(potential.init, apply)


def c_rectified_flow(
    potential: Field,
    cost: ConvexCost | None = None,
    *,
    time: Time = _UNIFORM,
) -> Loss:
    """Trains a potential whose `potential_velocity` is the c-rectified flow of the pairs.

    With x_t = (1 - t) x0 + t x1, u = x1 - x0 and y = grad_x f(x_t, t), the loss is the mean over
    rows of

        (c*(y) - <u, y> + c(u)) / event size  >= 0,

    zero where u = grad c*(y) (Fenchel-Young); for the quadratic cost it is half of the mean squared
    error of v = grad f. At the minimum, div(p_t (v - E[u | x_t])) = 0: the flow has the marginals
    of x_t, as a rectified flow has, and E c(x1 - x0) does not rise. Repeated on the flow's own
    pairs it heads for the optimal map of c; a fixed point need not be optimal where marginals have
    gaps or the velocity is not smooth (Hertrich et al.). The paths are linear, on which the
    statements rest.

    Args:
        potential: The potential f, a `Field` with output [b]; its rows must not look at each other.
        cost: The cost c; None is `quadratic_cost`.
        time: The law of the times, (key, n) -> t [n].

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. It has no metrics.

    Raises:
        ValueError: At trace time for a potential whose output is not [b], a batch without 'x' or
            with unknown keys, and a key that is None.

    References:
        Liu, *Rectified Flow: A Marginal Preserving Approach to Optimal Transport*, 2022,
            arXiv:2209.14577.
        Hertrich, Chambolle, Delon, *On the Relation between Rectified Flows and Optimal Transport*,
            2025, arXiv:2505.19712.
    """
    cost = quadratic_cost() if cost is None else cost

    def loss(params, key, batch, frozen=None):
        pairs = draw_pairs("c_rectified_flow", key, batch, time)
        x0, x1, cond, weight, t, _, dropout_key = pairs
        x_t, u = line(x0, x1, t)
        y = _gradient(potential, params, x_t, t, cond, dropout_key).astype(t.dtype)
        gap = cost.conjugate(y) - sum_event(u * y) + cost.value(u)
        return mean_of_rows(gap / math.prod(x1.shape[1:]), weight), {}

    return loss


def _gradient(potential, params, x, t, cond, key):
    """grad_x f, row by row: the rows of f must not look at each other."""

    def total(x):
        f = potential.apply(params, x, t, cond, key=key)
        if f.shape != x.shape[:1]:
            raise ValueError(
                f"expected a potential of shape [{x.shape[0]}], one number a row, "
                f"got {list(f.shape)}"
            )
        return jnp.sum(f)

    return jax.grad(total)(x)
