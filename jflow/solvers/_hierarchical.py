"""Nested sampling of a hierarchy of velocities."""

from collections.abc import Sequence
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import check_cond
from jflow._core.times import Times, rising_times
from jflow.solvers._integrate import SolveInfo, Status
from jflow.solvers._method import on_grid
from jflow.solvers._sample import sample
from jflow.types import Array, Cond, Key, Params, Velocity

__all__ = ["HierarchyCondition", "sample_hierarchy"]

_EULER = diffrax.Euler()


class HierarchyCondition(NamedTuple):
    """The condition of a hierarchical velocity: the states and times of the levels above.

    It comes beside the innermost state x [b, *event] and time t [b]. It is a pytree of arrays that
    lead with b, so that networks which flatten or embed their cond take it as it is.

    Attributes:
        states: the states of the levels above, from location downwards, each [b, *event].
        times: their times, each [b].
        cond: the condition of the user.
    """

    states: tuple[Float[Array, "b *event"], ...]
    times: tuple[Float[Array, " b"], ...]
    cond: Cond = None


def sample_hierarchy(
    velocity: Velocity,
    params: Params,
    x0: Float[Array, "b *event"],
    key: Key,
    cond: Cond = None,
    *,
    grids: Sequence[int | Times | ArrayLike] = (1, 8),
    solver: diffrax.AbstractSolver = _EULER,
) -> tuple[Float[Array, "b *event"], SolveInfo]:
    """Sample a hierarchical rectified flow: the velocity of each level is drawn by the level below.

    Every level but the last takes Euler steps whose velocity is *drawn*: by carrying fresh standard
    normal noise through the level below, given the states and times above. The last level is an
    ODE, for any diffrax solver. With the exact field one step of location is enough to draw from
    the data, and at every time of the grid x has the marginal of x_t.

    Args:
        velocity: a velocity trained by `losses.hierarchical_matching`.
        params: its params.
        x0: the source, [b, *event].
        key: a key, for the noise of the levels below.
        cond: the condition of the user, [b, ...].
        grids: for each level, from location downwards, a number of equal steps or rising times [n +
            1] from 0 to 1; their count is the depth.
        solver: the diffrax solver of the last level.

    Returns:
        x1: the samples, [b, *event], in the type of x0; the rows of a failed solve are NaN.
        info: evaluations [b], the product of the steps times the stages of the solver, and status
            [b], the worst of any solve.

    Raises:
        ValueError: there are no grids, or bad ones, and as in `solvers.sample`.

    References:
        Zhang, Yan, Schwing, Zhao, *Towards Hierarchical Rectified Flow*, 2025, arXiv:2502.17436.
    """
    if isinstance(grids, int) or len(grids) < 1:
        raise ValueError(f"sample_hierarchy: expected a grid for each level, got {grids!r}")
    n = x0.shape[0]
    cond = check_cond("sample_hierarchy", cond, n)
    dtype = float_dtype(x0)
    times = [jnp.asarray(rising_times("sample_hierarchy", grid), dtype) for grid in grids]

    def draw(x, key, above):
        """x carried through the level below `above`: (x1, evaluations [b], status [b])."""
        grid = times[len(above.states)]
        if len(above.states) == len(times) - 1:
            inner_cond = above if above.states else above.cond
            y, info = sample(velocity, params, x, inner_cond, method=on_grid(grid, solver))
            return y, info.evaluations, info.status

        def step(carry, ends):
            y, count, status = carry
            t, t_next, key = ends
            noise_key, key = jax.random.split(key)
            lower = HierarchyCondition(
                (*above.states, y), (*above.times, jnp.broadcast_to(t, (n,))), above.cond
            )
            v, more, worse = draw(jax.random.normal(noise_key, y.shape, y.dtype), key, lower)
            return (y + (t_next - t) * v, count + more, jnp.maximum(status, worse)), None

        none = jnp.zeros_like(x, shape=(n,), dtype=jnp.int32)
        keys = jax.random.split(key, grid.shape[0] - 1)
        (y, count, status), _ = jax.lax.scan(step, (x, none, none), (grid[:-1], grid[1:], keys))
        return y, count, status

    x1, evaluations, status = draw(x0.astype(dtype), key, HierarchyCondition((), (), cond))
    x1 = jnp.where(expand_to(status == Status.OK, x1), x1, jnp.nan)
    return x1.astype(x0.dtype), SolveInfo(evaluations, status)
