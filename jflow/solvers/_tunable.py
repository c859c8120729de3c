"""Restoration in one evaluation, with a knob."""

from jax.typing import ArrayLike

from jflow._core.arrays import float_dtype
from jflow._core.checks import like_state, rows
from jflow.types import Array, Cond, Params, Velocity


def restore(
    velocity: Velocity, params: Params, x0: Array, knob: ArrayLike, cond: Cond = None
) -> Array:
    """x0 + v(x0, knob): x1 [b, *event] by one evaluation; knob in [0, 1], a scalar or [b].

    At 0 an exact student gives E[x1 | x0], the least squared error; at 1 the end of the teacher's trajectory, a sample of
    x1 given x0; between, the chord from x0 to the trajectory's point at time knob, drawn out to time 1."""
    knob = rows(knob, x0.shape[0]).astype(float_dtype(x0))
    return (x0 + like_state("restore", velocity.apply(params, x0, knob, cond), x0)).astype(x0.dtype)
