"""The path of Riemannian flow matching: geodesics from source to data."""

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to
from jflow._core.checks import check_noun
from jflow.paths._affine import LINEAR, Schedule, check_times
from jflow.types import Manifold, Path

__all__ = ["geodesic"]


def geodesic(manifold: Manifold, schedule: Schedule = LINEAR) -> Path:
    """The shortest geodesic from the source to the data.

    Also known as: Riemannian conditional flow matching, Fisher flow matching.

        point   exp_x0(k(t) log_x0(x1))        target   d point / dt        k = alpha of `schedule`

    With it `losses.flow_matching` is Riemannian flow matching; the source is drawn by
    `couplings.with_source(couplings.from_distribution(base))`, and the error is
    `losses.riemannian_error(manifold)`. On `manifolds.euclidean` and with k(t) = t it is
    `paths.linear`. The target is tangent at the point, of length k'(t) dist(x0, x1). Pairs of
    antipodes take one of their geodesics (see `Manifold.log`).

    Args:
        manifold: the manifold.
        schedule: its alpha is how far along the geodesic x_t is, from 0 at t=0 to 1 at t=1; sigma
            is not used.

    Returns:
        Path: point and target, (x0 [b, *shape], x1 [b, *shape], t [b], *, key=None) -> [b, *shape];
            no key is needed. They raise a ValueError for times outside [0, 1] where these are
            known, outside jit.

    Raises:
        TypeError: for what is no manifold.
        ValueError: alpha does not run from 0 to 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds, paths
        >>> path = paths.geodesic(manifolds.sphere(1))
        >>> x0, x1 = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
        >>> [round(float(a), 4) for a in path.point(x0, x1, jnp.array([0.5]))[0]]
        [0.7071, 0.7071]

    References:
        Chen, Lipman, *Flow Matching on General Geometries*, 2024, arXiv:2302.03660.
    """
    check_noun("paths.geodesic", manifold, Manifold)
    ends = jnp.asarray(schedule.alpha(jnp.asarray([0.0, 1.0])))
    if not isinstance(ends, jax.core.Tracer) and not jnp.allclose(
        ends, jnp.asarray([0.0, 1.0]), atol=1e-3
    ):
        raise ValueError(
            f"paths.geodesic: expected alpha to run from 0 to 1, got {float(ends[0]):.4g} to "
            f"{float(ends[1]):.4g}"
        )

    def along(x0, x1, t):
        check_times(t)
        v = manifold.log(x0, x1)

        def at(t):
            return manifold.exp(x0, expand_to(schedule.alpha(t), v).astype(v.dtype) * v)

        return at

    def point(x0, x1, t, *, key=None):
        return along(x0, x1, t)(t)

    def target(x0, x1, t, *, key=None):
        return jax.jvp(along(x0, x1, t), (t,), (jnp.ones_like(t),))[1]

    return Path(point, target)
