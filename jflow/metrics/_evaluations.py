"""Quality against cost."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jflow.solvers import SolveInfo, Status
from jflow.types import Array


def quality_by_evaluations(
    draw: Callable[[int], tuple[Array, SolveInfo]],
    judge: Callable[[Array], Mapping[str, float]],
    counts: Sequence[int] = (1, 2, 4, 8),
) -> list[dict[str, float]]:
    """Quality against cost: one row of numbers for each count of steps.

    Args:
        draw: count -> (x, info), as `solvers.sample_flow_map` and `solvers.sample` return them.
        judge: x -> {name: number}; sees the rows whose solve did not fail.
        counts: The counts that `draw` is asked for, whole numbers of at least 1.

    Returns:
        For each count {'evaluations', 'failed', and what judge says}. 'evaluations' is what info
        counted (the mean over rows), whatever was asked for; 'failed' is the share of rows whose
        status is not OK.

    Raises:
        ValueError: For counts that are not whole numbers of at least 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import metrics, solvers, types
        >>> linear = types.Velocity(lambda *a: {}, lambda p, x, t, cond=None, *, key=None: x)
        >>> draw = lambda n: solvers.sample(linear, {}, jnp.ones((2, 1)), method=n)
        >>> off = lambda x: {"error": abs(x.mean() - jnp.e)}
        >>> rows = metrics.quality_by_evaluations(draw, off, [1, 4])
        >>> [(row["evaluations"], round(row["error"], 3)) for row in rows]
        [(2.0, 0.218), (8.0, 0.023)]
    """
    if any(isinstance(c, bool) or int(c) != c or c < 1 for c in counts):
        raise ValueError(
            f"quality_by_evaluations: expected whole numbers of at least 1, got {list(counts)}"
        )
    found = []
    for count in counts:
        x, info = draw(count)
        good = np.asarray(info.status) == Status.OK
        row = {
            "evaluations": float(np.mean(np.asarray(info.evaluations))),
            "failed": float(1 - good.mean()),
        }
        found.append(row | {name: float(value) for name, value in judge(x[good]).items()})
    return found
