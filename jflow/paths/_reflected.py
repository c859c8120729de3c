"""A path that stays in a domain."""

import jax
import jax.numpy as jnp

from jflow._core.inside import check
from jflow.types import Domain, Path

__all__ = ["reflected"]


def reflected(path: Path, domain: Domain) -> Path:
    """A path whose points are reflected into a domain.

        point   reflect(y_t)        target   d reflect(y_t) / dt,      y_t the point of `path`

    Where the points of `path` stay inside, it is `path`: the linear one from a source inside does,
    in every convex domain, and is what the paper trains on. Other paths, and normal noise as the
    source, are brought inside by it: sampling then starts at reflect(x0).

    Args:
        path: such as `linear()`.
        domain: of `jflow.domains`, such as `domains.box((2,))`.

    Returns:
        Path: point and target, (x0 [b, *event], x1 [b, *event], t [b], *, key=None) -> [b, *event].
            They raise a ValueError for data x1 outside the domain, with the row and the distance,
            where x1 is known: outside jit.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import domains, paths
        >>> path = paths.reflected(paths.linear(), domains.box((1,)))
        >>> x0, x1, t = jnp.array([[-1.0]]), jnp.array([[1.0]]), jnp.array([0.25])
        >>> path.point(x0, x1, t).tolist(), path.target(x0, x1, t).tolist()  # y = -0.5, y' = 2
        ([[0.5]], [[-2.0]])

    References:
        Xie, Zhu, Yu, Yang, Cheng, Zhang, Zhang, Zhang, *Reflected Flow Matching*, 2024,
            arXiv:2405.16577.
    """

    def point(x0, x1, t, *, key=None):
        check(domain, x1, "paths.reflected")
        return domain.reflect(path.point(x0, x1, t, key=key))

    def target(x0, x1, t, *, key=None):
        check(domain, x1, "paths.reflected")
        at = path.point(x0, x1, t, key=key)
        moving = path.target(x0, x1, t, key=key)
        return jax.jvp(domain.reflect, (at,), (jnp.asarray(moving, at.dtype),))[1]

    return Path(point, target)
