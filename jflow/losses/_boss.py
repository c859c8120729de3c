"""BOSS: the few times at which Euler's method costs a trained velocity least.

    knots = np.linspace(0, 1, 101)
    data.generate_reflow_trajectories(folder, teacher, params, source, n, knots, key=key)
    x = data.read_shards(folder)["x"]              # [n, 101, *event], a fine solution at 101 times
    at = bellman(step_costs(teacher, params, x[:1000], knots), 6)  # indices of the 7 best times
    grid = knots[at]
    euler = solvers.on_grid(grid, diffrax.Euler())
    x1, info = solvers.sample(teacher, params, x0, method=euler)       # no training so far
    loss = boss(velocity, grid)                    # from the teacher's params ...
    ... trained on batches of {"x": x[:, at]} ...
    x1, info = solvers.sample(velocity, params, x0, method=euler)

One matrix of costs serves every number of steps.
"""

from collections.abc import Sequence

from jflow import losses
from jflow.paths import sequential_path
from jflow.times import sequential
from jflow.types import Loss, Velocity

__all__ = ["boss"]


def boss(velocity: Velocity, grid: Sequence[float]) -> Loss:
    """Regression, at the times of a grid alone, on the teacher's displacement to the next of them.

    The loss is the mean over the event, then over rows, of

        (v(X_k, t_k) - (X_{k+1} - X_k) / (t_{k+1} - t_k))^2,   k uniform.

    At the minimum Euler's method on the grid follows the teacher, wherever that is a function of
    X_k. Start from the teacher's params. `times.sequential` with fewer starts trains between the
    times as well.

    Args:
        velocity: The velocity that is trained.
        grid: The times [n + 1], rising from 0 to 1.

    Returns:
        A loss of the batch {'x' [b, n + 1, *event], trajectories at the grid, optionally 'cond',
        'weight' [b]}. Its metrics are {'residual'}, the loss.

    Raises:
        ValueError: For a grid that does not rise from 0 to 1; at trace time for trajectories of
            another length, a velocity of another shape, a batch without 'x' or with unknown keys,
            and a key that is None.

    References:
        Nguyen, Nguyen, Nguyen, *Bellman Optimal Stepsize Straightening of Flow-Matching Models*,
            2024, arXiv:2312.16414.
    """
    matching = losses.flow_matching(
        velocity, path=sequential_path(grid), time=sequential(grid, starts=1.0)
    )

    def loss(params, key, batch, frozen=None):
        value, metrics = matching(params, key, batch, frozen)
        return value, {**metrics, "residual": value}

    return loss
