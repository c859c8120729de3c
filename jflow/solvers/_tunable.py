"""Restoration in one evaluation, with a knob."""

from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.arrays import float_dtype
from jflow._core.checks import like_state, rows
from jflow.types import Array, Cond, Params, Velocity


def restore(
    velocity: Velocity,
    params: Params,
    x0: Float[Array, "b *event"],
    knob: ArrayLike,
    cond: Cond = None,
) -> Float[Array, "b *event"]:
    """Restore degraded data in one evaluation, anywhere between the mean and a sample.

        x1 = x0 + v(x0, knob)

    At knob 0 an exact student gives E[x1 | x0], the least squared error; at 1 the end of the
    trajectory of the teacher, a sample of x1 given x0; between, the chord from x0 to the point of
    the trajectory at time knob, drawn out to time 1.

    Args:
        velocity: a velocity trained by `losses.tunable_distillation`.
        params: its params.
        x0: the degraded data, [b, *event].
        knob: in [0, 1], [b] or a scalar.
        cond: the condition, [b, ...].

    Returns:
        x1, [b, *event], in the type of x0.

    References:
        Zhu, Wang, Lu, Yan, Li, Zhang, *OFTSR: One-Step Flow for Image Super-Resolution with Tunable
            Fidelity-Realism Trade-offs*, 2024, arXiv:2412.09465.
    """
    knob = rows(knob, x0.shape[0]).astype(float_dtype(x0))
    return (x0 + like_state("restore", velocity.apply(params, x0, knob, cond), x0)).astype(x0.dtype)
