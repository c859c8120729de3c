"""Bespoke optimal stepsizes: where a few steps of a teacher do best."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_cond, like_state
from jflow._core.times import Times, partition
from jflow.types import Array, Cond, Params, Velocity


def step_costs(
    velocity: Velocity, params: Params, x: Array, times: Times, cond: Cond = None
) -> Array:
    """What one Euler step costs between any two times of a solution: [K + 1, K + 1],

        c[i, j] = mean over rows and event of (x_i + (t_j - t_i) v(x_i, t_i) - x_j)^2   for i < j, inf otherwise.

    x: trajectories [b, K + 1, *event] at `times` (rows of `data.generate_reflow_trajectories`), cond [b, ...]. K + 1
    evaluations a row. Every step starts on the solution: errors that would add up from step to step are not in it. The
    matrices of several batches are averaged. The paper's sums over the event; its best grids are the same.
    Errors: ValueError for times that don't rise strictly from 0 to 1 and for trajectories of another length.
    Source: Nguyen, Nguyen, Nguyen, "Bellman Optimal Stepsize Straightening of Flow-Matching Models", 2024. It takes the
        solution from Euler's method on the fine grid.
    """
    times = partition("step_costs", times)
    x = jnp.asarray(x)
    if x.ndim < 2 or x.shape[1] != len(times):
        raise ValueError(
            f"step_costs: expected x of shape [b, {len(times)}, ...], got {list(x.shape)}"
        )
    cond = check_cond("step_costs", cond, x.shape[0])
    states = jnp.moveaxis(x.astype(float_dtype(x)), 1, 0)
    t = jnp.asarray(times, states.dtype)

    def from_one(start):
        x_i, t_i = start
        v = like_state(
            "step_costs", velocity.apply(params, x_i, jnp.broadcast_to(t_i, x.shape[:1]), cond), x_i
        )
        reached = x_i[None] + (t - t_i).reshape(-1, *(1,) * x_i.ndim) * v[None]
        cost = jnp.mean(jnp.square(reached - states).reshape(len(times), -1), axis=1)
        return jnp.where(t > t_i, cost, jnp.inf)

    return jax.lax.map(from_one, (states, t))


def bellman(costs: ArrayLike, steps: int) -> np.ndarray:
    """The indices [steps + 1] of the cheapest way from time 0 to time K in exactly that many steps, the sum of
    costs[i, j] over its steps being least; costs [K + 1, K + 1], read above the diagonal alone. O(steps K^2), in float64.

    Errors: ValueError for costs that are not a square matrix, finite above its diagonal, and unless 1 <= steps <= K.
    """
    costs = np.asarray(costs, np.float64)
    if costs.ndim != 2 or costs.shape[0] != costs.shape[1] or len(costs) < 2:
        raise ValueError(
            f"bellman: expected costs of shape [K + 1, K + 1], got {list(costs.shape)}"
        )
    later = np.triu(np.ones(costs.shape, bool), 1)
    if not np.all(np.isfinite(costs[later])):
        raise ValueError("bellman: expected finite costs above the diagonal")
    last = len(costs) - 1
    if isinstance(steps, bool) or int(steps) != steps or not 1 <= steps <= last:
        raise ValueError(f"bellman: expected a whole number of steps from 1 to {last}, got {steps}")
    ahead = np.where(later, costs, np.inf)
    best, before = np.full(last + 1, np.inf), []
    best[0] = 0  # of reaching each time in no step
    for _ in range(int(steps)):
        total = best[:, None] + ahead
        before.append(np.argmin(total, axis=0))
        best = np.min(total, axis=0)
    way = [last]
    for back in reversed(before):
        way.append(int(back[way[-1]]))
    return np.asarray(way[::-1])
