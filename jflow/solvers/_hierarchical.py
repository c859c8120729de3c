"""Nested sampling of a hierarchy of velocities."""

from collections.abc import Sequence
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import check_cond
from jflow._core.times import rising_times
from jflow.solvers._integrate import SolveInfo, Status
from jflow.solvers._method import on_grid
from jflow.solvers._sample import sample
from jflow.types import Array, Cond, Key, Params, PyTree, Velocity

__all__ = ["HierarchyCondition", "sample_hierarchy"]

_EULER = diffrax.Euler()


class HierarchyCondition(NamedTuple):
    """What the network is told, as its cond, besides the innermost state x [b, *event] and time t [b].

    states: the states of the levels above, from location downwards, each [b, *event]; times: theirs, each [b]; cond: the
    user's. A pytree of arrays that lead with b, so that networks which flatten or embed their cond take it as it is.
    """

    states: tuple[Array, ...]
    times: tuple[Array, ...]
    cond: Cond = None


def sample_hierarchy(
    velocity: Velocity,
    params: Params,
    x0: PyTree,
    key: Key,
    cond: Cond = None,
    *,
    grids: Sequence[int | ArrayLike] = (1, 8),
    solver: diffrax.AbstractSolver = _EULER,
) -> tuple[PyTree, SolveInfo]:
    """Carry x0 [b, *event] to data with a velocity trained by `losses.hierarchical_matching`; returns (x1, info).

    grids: for each level, from location downwards, a number of equal steps or rising times [n + 1] from 0 to 1; their
    count is the depth. Every level but the last takes Euler steps whose velocity is *drawn*: by carrying fresh standard
    normal noise through the level below, given the states and times above. The last level is an ODE, for any diffrax
    solver. With the exact field one step of location is enough to draw from the data, at every time of the grid x has
    the marginal of x_t.

    info: evaluations [b], the product of the steps times the solver's stages; status [b], the worst of any solve; rows of a
    failed solve are NaN. Errors: ValueError for no grids or bad ones; those of `solvers.sample`.
    Source: Zhang, Yan, Schwing, Zhao, "Towards Hierarchical Rectified Flow", 2025.
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
