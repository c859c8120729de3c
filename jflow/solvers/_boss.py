"""Bespoke optimal stepsizes: where a few steps of a teacher do best."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_cond, like_state
from jflow._core.times import Times, partition
from jflow.types import Array, Cond, Params, Velocity


def step_costs(
    velocity: Velocity,
    params: Params,
    x: Float[Array | np.ndarray, "b times *event"],
    times: Times,
    cond: Cond = None,
) -> Float[Array, "times times"]:
    """The error of one Euler step between any two times of a solution.

        c[i, j] = mean over rows and event of (x_i + (t_j - t_i) v(x_i, t_i) - x_j)^2      for i < j

    and infinity elsewhere. Every step starts on the solution: errors that would add up from step to
    step are not in it. The matrices of several batches are averaged. Those of the paper are sums
    over the event; its best grids are the same. It takes K + 1 evaluations a row.

    Args:
        velocity: the velocity v.
        params: its params.
        x: trajectories [b, K + 1, *event] at `times`, rows of `data.generate_reflow_trajectories`.
        times: [K + 1], rising strictly from 0 to 1.
        cond: the condition of the velocity, [b, ...].

    Returns:
        The costs, [K + 1, K + 1], for `bellman`.

    Raises:
        ValueError: times do not rise strictly from 0 to 1, or trajectories have another length.

    References:
        Nguyen, Nguyen, Nguyen, *Bellman Optimal Stepsize Straightening of Flow-Matching Models*,
            2024, arXiv:2312.16414 (it takes the solution from Euler's method on the fine grid).
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


def bellman(
    costs: ArrayLike | Sequence[Sequence[float]], steps: int
) -> Int[np.ndarray, " steps_plus_1"]:
    """The cheapest way from the first to the last time in a given number of steps.

    The sum of costs[i, j] over its steps is least. It takes O(steps K^2) on the host, in float64.

    Args:
        costs: [K + 1, K + 1], read above the diagonal alone, such as those of `step_costs`.
        steps: the number of steps, 1 ... K.

    Returns:
        The indices of the times, [steps + 1], from 0 to K.

    Raises:
        ValueError: costs are not a square matrix, finite above its diagonal, or unless 1 <= steps
            <= K.

    Examples:
        >>> from jflow import solvers
        >>> costs = [[0, 1, 9, 9], [0, 0, 1, 5], [0, 0, 0, 1], [0, 0, 0, 0]]
        >>> solvers.bellman(costs, 2).tolist()  # 1 + 5 beats 9 + 1
        [0, 1, 3]

    References:
        Nguyen, Nguyen, Nguyen, *Bellman Optimal Stepsize Straightening of Flow-Matching Models*,
            2024, arXiv:2312.16414.
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
