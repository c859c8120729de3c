"""What the distillations share: points of the line, means over events, the teacher's ODE between times of each row."""

import math

import diffrax
import jax
import jax.numpy as jnp

from jflow import solvers
from jflow._util import expand_to, float_dtype, sum_event
from jflow.types import Array, Cond, Params, Velocity


def frozen_params(name: str, frozen, entry: str = "teacher") -> Params:
    """frozen[entry] without gradient; ValueError, which names it, where it is missing."""
    if frozen is None or frozen.get(entry) is None:
        raise ValueError(f"{name}: expected frozen[{entry!r}], got frozen with the entries {sorted(frozen or {})}")
    return jax.lax.stop_gradient(frozen[entry])


def on_line(x0: Array, x1: Array, t: Array) -> tuple[Array, Array]:
    """x_t = (1 - t) x0 + t x1 in the type of x1, and x1 - x0 in float32 or better."""
    v = x1.astype(float_dtype(x1)) - x0.astype(float_dtype(x1))
    return (x0 + expand_to(t, v) * v).astype(x1.dtype), v


def mean_event(x: Array) -> Array:
    """[b, *event] -> [b]: the mean over the event, in float32 or better."""
    return sum_event(x) / math.prod(x.shape[1:])


def average_velocity(
    velocity: Velocity,
    params: Params,
    x: Array,
    t: Array,
    r: Array,
    cond: Cond = None,
    *,
    solver: diffrax.AbstractSolver,
    steps: int,
) -> Array:
    """(x_r - x) / (r - t) of the velocity's own ODE from x at time t to time r ([b] each), without a gradient.

    What is integrated is the average velocity itself, y' = v(x + (r - t) y, t + s (r - t)) over s in [0, 1]: no division,
    and v(x, t) at r = t."""
    x, params, span = x.astype(float_dtype(x)), jax.lax.stop_gradient(params), r - t

    def apply(params, y, s, given, *, key=None):
        x, t, span, cond = given
        return velocity.apply(params, x + expand_to(span, y) * y, t + s * span, cond)

    given = jax.lax.stop_gradient((x, t, span, cond))
    y, _ = solvers.sample(Velocity(velocity.init, apply), params, jnp.zeros_like(x), given, solver=solver, steps=steps)
    return jax.lax.stop_gradient(y)


def check_weights(name: str, **weights: float) -> None:
    """Raise for a weight that is negative or not finite."""
    for what, value in weights.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite {what} >= 0, got {value}")
