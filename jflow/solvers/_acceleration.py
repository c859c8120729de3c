"""Sampling with a constant acceleration in each step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_cond, like_state, take_parts
from jflow.solvers._integrate import SolveInfo
from jflow.solvers._parts import sampler_result, sampling_times
from jflow.types import Array, Cond, Params, Velocity


class AccelerationCondition(NamedTuple):
    """What the acceleration's network is told, as its cond: v0 [b, *event], the velocity at the start, and the user's cond."""

    v0: Array
    cond: Cond = None


def sample_acceleration(
    acceleration: Velocity,
    velocity: Velocity,
    params: Params,
    x0: Array,
    cond: Cond = None,
    *,
    steps: int | None = None,
    grid: ArrayLike | None = None,
) -> tuple[Array, SolveInfo]:
    """Carry x0 [b, *event] from t=0 to t=1: v0 = velocity(x0, 0) once, then for each step from t to t' = t + k

            x <- x + k v0 + k (t + k / 2) a,      a = acceleration(x, t, Launch(v0, cond)),

    which is exact where a is constant; returns (x1, info). params: {'velocity', 'acceleration'}.
    steps: equal ones, 1 where nothing is given; or grid, strictly monotone times [n + 1] in [0, 1]. A falling grid encodes
        data, with v0 told by the velocity network at the grid's first time.
    info: evaluations [b] = steps + 1, status [b] (`solvers.Status`); rows that are not finite are NaN.
    Errors: ValueError for steps < 1, a grid that is not monotone in [0, 1], both at once, and params without both.
    Source: Park, Lee, Kim, Lee, Hong, Kim, "Constant Acceleration Flow", 2024.
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
