"""BOSS: the few times at which Euler's method costs a trained velocity least, and the velocity made straight between them.

    knots = np.linspace(0, 1, 101)
    data.generate_reflow_trajectories(folder, teacher, params, source, n, knots, key=key)  # a fine solution, at 101 times
    x = data.read_shards(folder)["x"]  # [n, 101, *event]
    at = bellman(step_costs(teacher, params, x[:1000], knots), 6)                  # indices of the 7 best times
    grid = knots[at]
    x1, info = solvers.sample(teacher, params, x0, method=solvers.on_grid(grid, diffrax.Euler()))  # no training so far
    loss = boss(velocity, grid)                                                    # from the teacher's params ...
    ... trained on batches of {"x": x[:, at]} ...
    x1, info = solvers.sample(velocity, params, x0, method=solvers.on_grid(grid, diffrax.Euler()))

One matrix of costs serves every number of steps.
"""

from collections.abc import Sequence

from jflow import losses
from jflow.paths import sequential_path
from jflow.times import sequential
from jflow.types import Loss, Velocity

__all__ = ["boss"]


def boss(velocity: Velocity, grid: Sequence[float]) -> Loss:
    """Regression, at the times of a grid alone, on the teacher's displacement to the next of them:

        mean over the event of (v(X_k, t_k) - (X_{k+1} - X_k) / (t_{k+1} - t_k))^2,   k uniform.

    At the minimum Euler's method on the grid follows the teacher, wherever that is a function of X_k. Start from the
    teacher's params. `times.sequential` with fewer starts trains between the times as well.
    batch: 'x' trajectories [b, n + 1, *event] at the grid, optionally 'cond', 'weight'. metrics: 'residual', the loss.
    Errors: as `sequential_path` and `losses.flow_matching`.
    Source: as `step_costs`.
    """
    matching = losses.flow_matching(
        velocity, path=sequential_path(grid), time=sequential(grid, starts=1.0)
    )

    def loss(params, key, batch, frozen=None):
        value, metrics = matching(params, key, batch, frozen)
        return value, {**metrics, "residual": value}

    return loss
