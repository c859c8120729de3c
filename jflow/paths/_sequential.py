"""Sequential reflow: a flow made straight on each of K segments of time.

    knots = np.linspace(0, 1, K + 1)
    # where the teacher is at the knots
    data.generate_reflow_trajectories(folder, teacher, params, source, n, knots, key=key)
    path = sequential_path(knots)
    loss = losses.flow_matching(velocity, path=path, time=times.sequential(knots))
    ... trained on batches of data.read_shards(folder) ...
    method = solvers.on_grid(knots, diffrax.Euler())  # one step a segment
    x, info = solvers.sample(velocity, params, x0, method=method)

With K = 1 it is reflow; the more segments, the less has to be straightened, and the more steps it
takes.
"""

import jax.numpy as jnp

from jflow._core.arrays import expand_to
from jflow._core.times import Times, partition
from jflow.types import Path as Interpolant


def sequential_path(knots: Times) -> Interpolant:
    """The path of sequential reflow: polygons through the states of a teacher at the knots.

    The data x1 of a batch are trajectories X [b, K + 1, *event], rows of
    `data.generate_reflow_trajectories`; x0 is not read. For t in segment k, from t_k to t_{k+1}, of
    length h_k:

        point   ((t_{k+1} - t) X_k + (t - t_k) X_{k+1}) / h_k        target   (X_{k+1} - X_k) / h_k

    The velocity jumps at every knot, where t belongs to the segment after it: sample on a grid that
    meets the knots, and train with `times.sequential`.

    Args:
        knots: times [K + 1] that rise strictly from 0 to 1.

    Returns:
        Path: point and target, (x0, x1 [b, K + 1, *event], t [b], *, key=None) -> [b, *event], for
            `losses.flow_matching`. They raise a ValueError for a trajectory of another length.

    Raises:
        ValueError: knots do not rise strictly from 0 to 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> path = paths.sequential_path([0.0, 0.5, 1.0])
        >>> x1 = jnp.array([[[0.0], [4.0], [5.0]]])  # three states of one row
        >>> t = jnp.array([0.25])
        >>> path.point(None, x1, t).tolist(), path.target(None, x1, t).tolist()
        ([[2.0]], [[8.0]])

    References:
        Yoon, Lee, *Sequential Flow Straightening for Generative Modeling*, 2024, arXiv:2402.06461
            (the formulas are derived).
    """
    times = partition("sequential_path", knots)

    def segment(x1, t):
        if x1.ndim < 2 or x1.shape[1] != len(times):
            raise ValueError(
                f"sequential_path: expected x of shape [b, {len(times)}, ...], got {list(x1.shape)}"
            )
        t_k = jnp.asarray(times, t.dtype)
        k = jnp.clip(jnp.searchsorted(t_k, t, side="right") - 1, 0, len(times) - 2)
        start, end = (jnp.take_along_axis(x1, expand_to(i, x1), axis=1)[:, 0] for i in (k, k + 1))
        h = t_k[k + 1] - t_k[k]
        return start, (end - start) / expand_to(h, start), t - t_k[k]

    def point(x0, x1, t, *, key=None):
        start, slope, since = segment(x1, t)
        return start + expand_to(since, start) * slope

    def target(x0, x1, t, *, key=None):
        return segment(x1, t)[1]

    return Interpolant(point, target)
