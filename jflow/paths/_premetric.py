"""The path down along a premetric, on triangle meshes."""

from jflow._core.checks import check_event, check_noun, check_whole
from jflow.paths._affine import check_times
from jflow.types import Path, Premetric

__all__ = ["premetric"]


def premetric(distance: Premetric, *, steps: int = 64) -> Path:
    """The path on a mesh along which a premetric to the data falls to 0 in proportion to 1 - t.

        dx/dt = -d(x, x1) / (1 - t) grad d / |grad d|^2,    so that d(x_t, x1) = (1 - t) d(x0, x1)

    with the gradient in x. It is simulated from x0 to t, by Euler steps that walk straight on over
    the faces: no network is evaluated, but both `point` and `target` pay for it. Train with
    `times.uniform(0, 1 - eps)`: at t=1 the target is 0 / 0, and 1 - t is taken to be 1e-4 at least.
    Where grad d nearly vanishes the speed is limited to eight diagonals of the mesh a unit of time,
    which the rest of the way makes up for.

    Args:
        distance: such as `manifolds.biharmonic(mesh)`.
        steps: Euler steps from x0 to t, however far t is.

    Returns:
        Path: point and target, (x0 [b, 3], x1 [b, 3], t [b], *, key=None) -> [b, 3]. Points off the
            mesh are taken for the nearest ones on it. They raise a ValueError for another shape and
            for times outside [0, 1] where these are known.

    Raises:
        TypeError: distance is no `Premetric`.
        ValueError: steps is not a whole number of at least 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds, paths
        >>> corners = [[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
        >>> square = manifolds.mesh(
        ...     corners, [[0, 1, 2], [0, 2, 3]], num_eigenfunctions=2, closed=False
        ... )
        >>> path = paths.premetric(manifolds.biharmonic(square))
        >>> x0, x1 = jnp.array([[0.9, 0.2, 0.0]]), jnp.array([[0.3, 0.5, 0.0]])
        >>> x = path.point(x0, x1, jnp.ones(1))
        >>> bool(jnp.all(jnp.abs(x - x1) < 0.05))
        True

    References:
        Chen, Lipman, *Flow Matching on General Geometries*, 2024, arXiv:2302.03660.
    """
    check_noun("paths.premetric", distance, Premetric)
    check_whole("paths.premetric", steps=steps)

    def descend(x0, x1, t):
        check_times(t)
        for x in (x0, x1):
            check_event("paths.premetric", x, (3,))
        return distance.descend(x0, x1, t, steps)

    return Path(
        lambda x0, x1, t, *, key=None: descend(x0, x1, t)[0],
        lambda x0, x1, t, *, key=None: descend(x0, x1, t)[1],
    )
