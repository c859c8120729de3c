"""What samplers on a grid share."""

import jax.numpy as jnp
from jax.typing import ArrayLike

from jflow._core.arrays import expand_to
from jflow._core.times import Times, check_grid, rising_times
from jflow.solvers._integrate import SolveInfo, Status
from jflow.types import Array


def sampling_times(
    name: str, steps: int | None, grid: Times | ArrayLike | None, *, rising: bool = True
) -> Times | ArrayLike:
    """The times [n + 1] of a sampler: a grid, checked, or equal steps from 0 to 1, one where
    neither is given.
    """
    if grid is None:
        return rising_times(name, 1 if steps is None else steps)
    if steps is not None:
        raise ValueError(f"{name}: expected one of steps and grid, got both")
    check_grid(name, grid, rising)
    return grid


def sampler_result(x: Array, evaluations: int, like: Array) -> tuple[Array, SolveInfo]:
    """What a sampler returns: x [b, *event] in the type of `like`, rows that are not finite as
    NaN, and their info.
    """
    n = x.shape[0]
    finite = jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
    status = jnp.where(finite, Status.OK, Status.NOT_FINITE).astype(jnp.int32)
    return jnp.where(expand_to(finite, x), x, jnp.nan).astype(like.dtype), SolveInfo(
        jnp.full((n,), evaluations, jnp.int32), status
    )
