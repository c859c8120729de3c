"""The straight path x_t = (1 - t) x0 + t x1, in float32 or better."""

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import like_state
from jflow.types import Array, Params, Velocity


def on_line(x0: Array, x1: Array, t: Array) -> Array:
    """(1 - t) x0 + t x1, in float32 or better."""
    x0, x1 = x0.astype(float_dtype(x1)), x1.astype(float_dtype(x1))
    return x0 + expand_to(t, x1) * (x1 - x0)


def line(x0: Array, x1: Array, t: Array) -> tuple[Array, Array]:
    """x_t = (1 - t) x0 + t x1 in the type of x1, and x1 - x0 in float32 or better."""
    v = x1.astype(float_dtype(x1)) - x0.astype(float_dtype(x1))
    return on_line(x0, x1, t).astype(x1.dtype), v


def predicted_data(
    velocity: Velocity, params: Params, x: Array, t: Array, cond, key, dtype
) -> Array:
    """x + (1 - t) F(x, t) in x's precision; the network is given x in dtype."""
    v = like_state("velocity", velocity.apply(params, x.astype(dtype), t, cond, key=key), x)
    return x + expand_to(1 - t, x) * v
