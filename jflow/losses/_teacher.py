"""What losses that follow a teacher share: its velocity between source and data, and its ODE.

The ODE is solved between times of each row.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jflow import solvers
from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import frozen_entry, like_state
from jflow.solvers import Method
from jflow.types import Array, Cond, Params, PyTree, Velocity


def warmed(
    name: str, frozen: Mapping[str, PyTree] | None, warmup: int, most: float = 1.0
) -> Array | float:
    """min(most, frozen['step'] / warmup); most, and no 'step' needed, without warm-up."""
    return most if warmup == 0 else jnp.minimum(frozen_entry(name, frozen, "step") / warmup, most)


def line_velocity(
    name: str,
    teacher: Velocity | None,
    frozen: Mapping[str, PyTree] | None,
    x0: Array,
    x1: Array,
    cond,
) -> Callable[[Array, Array], Array]:
    """v(x, t) without gradient, in float32 or better: x1 - x0, or the teacher's, with params
    frozen['teacher']."""
    dtype = float_dtype(x1)
    if teacher is None:
        slope = jax.lax.stop_gradient(x1.astype(dtype) - x0.astype(dtype))
        return lambda x, t: slope
    params = frozen_entry(name, frozen)

    def v(x, t):
        x = x.astype(x1.dtype)
        out = like_state(f"{name}: teacher", teacher.apply(params, x, t, cond), x)
        return jax.lax.stop_gradient(out).astype(dtype)

    return v


def average_velocity(
    velocity: Velocity,
    params: Params,
    x: Array,
    t: Array,
    r: Array,
    cond: Cond = None,
    *,
    method: Method,
) -> Array:
    """(x_r - x) / (r - t) of the velocity's own ODE from x at time t to time r ([b] each).

    It has no gradient. What is integrated is the average velocity itself, over s in [0, 1],
    y' = v(x + (r - t) y, t + s (r - t)): no division, and v(x, t) at r = t."""
    x, params, span = x.astype(float_dtype(x)), jax.lax.stop_gradient(params), r - t

    def apply(params, x, t, cond=None, *, key=None):  # y at s
        start, began, span, given = cond
        return velocity.apply(params, start + expand_to(span, x) * x, began + t * span, given)

    given = jax.lax.stop_gradient((x, t, span, cond))
    y, _ = solvers.sample(
        Velocity(velocity.init, apply), params, jnp.zeros_like(x), given, method=method
    )
    return jax.lax.stop_gradient(y)


def steps_of_segment(name: str, method: Method | int | None, default: Method) -> Method:
    """The method of `average_velocity`, checked at construction.

    Its segments have lengths of their own, so that equal steps are what divides them."""
    return solvers.as_method(name, method, default, accepts=(solvers.fixed,))
