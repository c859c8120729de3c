"""Sampling with a constant acceleration in each step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_cond, like_state, take_parts
from jflow._core.times import Times
from jflow.solvers._integrate import SolveInfo
from jflow.solvers._parts import sampler_result, sampling_times
from jflow.types import Array, Cond, Params, Velocity


class AccelerationCondition(NamedTuple):
    """The condition of an acceleration network, which it gets as its cond.

    Attributes:
        v0: the velocity at the start, [b, *event].
        cond: the condition of the user.
    """

    v0: Float[Array, "b *event"]
    cond: Cond = None


def sample_acceleration(
    acceleration: Velocity,
    velocity: Velocity,
    params: Params,
    x0: Float[Array, "b *event"],
    cond: Cond = None,
    *,
    steps: int | None = None,
    grid: Times | ArrayLike | None = None,
) -> tuple[Float[Array, "b *event"], SolveInfo]:
    """Sample a constant acceleration flow.

    The start gives v0 = velocity(x0, 0) once; then each step, from t to t' = t + k, is

        x <- x + k v0 + k (t + k / 2) a
        a = acceleration(x, t, AccelerationCondition(v0, cond)),

    which is exact where a is constant. It takes n + 1 evaluations for n steps.

    Args:
        acceleration: the network of the acceleration; its cond is an `AccelerationCondition`.
        velocity: the network of v0.
        params: {'velocity', 'acceleration'}.
        x0: the source, [b, *event], at the first time.
        cond: the condition of the user, [b, ...].
        steps: the number of equal steps from 0 to 1; 1 where neither steps nor grid is given.
        grid: strictly monotone times [n + 1] in [0, 1] instead. A falling grid encodes data, with
            v0 by the velocity network at the first time of the grid.

    Returns:
        x1: the samples, [b, *event], in the type of x0; rows that are not finite are NaN.
        info: evaluations [b], n + 1, and status [b] (`solvers.Status`).

    Raises:
        ValueError: steps is below 1, grid is not monotone in [0, 1], both are given, or params has
            not both parts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import solvers
        >>> from jflow.types import Velocity
        >>> one = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x + 1)
        >>> params = {"velocity": {}, "acceleration": {}}
        >>> x1, info = solvers.sample_acceleration(one, one, params, jnp.zeros((1, 1)))
        >>> x1.tolist(), info.evaluations.tolist()  # 1 + 1 / 2
        ([[1.5]], [2])

    References:
        Park, Lee, Kim, Lee, Hong, Kim, *Constant Acceleration Flow*, 2024, arXiv:2411.00322.
    """
    name = "sample_acceleration"
    ts = jnp.asarray(sampling_times(name, steps, grid, rising=False), float_dtype(x0))
    start, pushed = take_parts(name, params, "velocity", "acceleration")
    n = x0.shape[0]
    cond = check_cond(name, cond, n)
    x = jnp.asarray(x0, float_dtype(x0))
    v0 = like_state(name, velocity.apply(start, x, jnp.full((n,), ts[0]), cond), x)

    def step(x, ends):
        t, k = ends[0], ends[1] - ends[0]
        a = acceleration.apply(pushed, x, jnp.full((n,), t), AccelerationCondition(v0, cond))
        return x + k * v0 + k * (t + k / 2) * like_state(name, a, x), None

    x, _ = jax.lax.scan(step, x, (ts[:-1], ts[1:]))
    return sampler_result(x, ts.shape[0], x0)
