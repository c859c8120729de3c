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
    """Quality against cost: for each count a row {'evaluations', 'failed', and what judge(x) says}.

    draw(count) -> (x, info), as `solvers.sample_flow_map` and `solvers.sample` return; 'evaluations' is what info
    counted (the mean over rows), whatever was asked for, 'failed' the share of rows whose status is not OK: judge sees
    the others.
    Errors: ValueError for counts that are not whole numbers of at least 1.
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
