"""Flat spaces: Euclidean space, and the torus of angles."""

import math

import jax
import jax.numpy as jnp

from jflow._core.checks import check_whole
from jflow.manifolds import _smooth
from jflow.manifolds._checked import checked
from jflow.types import Array, Manifold

__all__ = ["euclidean", "torus"]

_TURN = 2 * math.pi


def euclidean(dim: int) -> Manifold:
    """Euclidean space R^dim, on which every method of manifolds is the usual one.

        exp_x(v) = x + v,    log_x(y) = y - x

    `random` draws from the standard normal law.

    Args:
        dim: the dimension, at least 1.

    Returns:
        Manifold: points [dim].

    Raises:
        ValueError: dim is not a whole number of at least 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> plane = manifolds.euclidean(2)
        >>> plane.dist(jnp.array([0.0, 0.0]), jnp.array([3.0, 4.0])).tolist()
        5.0
    """
    check_whole("manifolds.euclidean", dim=dim)
    made = _flat(dim, lambda x: x, ((dim, math.inf),), math.inf)
    return checked(
        "euclidean", made._replace(random=lambda key, n: jax.random.normal(key, (n, dim)))
    )


def torus(dim: int) -> Manifold:
    """The flat torus of `dim` angles, in radians, each in [-pi, pi].

        exp_x(v) = wrap(x + v),    log_x(y) = wrap(y - x),    wrap(a) in [-pi, pi]

    Any real numbers are taken as angles. `project` wraps them, with derivative 1. Opposite angles
    are joined by a geodesic in one of the two directions. Networks are shown cosines and sines
    (`embed`), so that they are periodic. The volume is (2 pi)^dim.

    Args:
        dim: the number of angles, at least 1.

    Returns:
        Manifold: points [dim].

    Raises:
        ValueError: dim is not a whole number of at least 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> circle = manifolds.torus(1)
        >>> round(float(circle.dist(jnp.array([-3.0]), jnp.array([3.0]))), 4)  # across the seam
        0.2832
    """
    check_whole("manifolds.torus", dim=dim)
    made = _flat(dim, wrap, ((1, math.pi),) * dim, dim * math.log(_TURN))
    return checked(
        "torus",
        made._replace(
            random=lambda key, n: jax.random.uniform(
                key, (n, dim), minval=-math.pi, maxval=math.pi
            ),
            embed=lambda x: jnp.concatenate([jnp.cos(x), jnp.sin(x)], axis=-1),
        ),
    )


def wrap(a: Array) -> Array:
    """Angles in [-pi, pi]."""
    return a - _TURN * jnp.round(a / _TURN)


def _flat(dim, wrapped, injective, log_volume) -> Manifold:
    def basis(x):
        return jnp.broadcast_to(jnp.eye(dim, dtype=x.dtype), (*x.shape, dim))

    zero = lambda x: jnp.zeros_like(x[..., 0])  # noqa: E731
    log = lambda x, y: wrapped(y - x)  # noqa: E731
    return Manifold(
        shape=(dim,),
        dim=dim,
        exp=lambda x, v: wrapped(x + v),
        log=log,
        dist=lambda x, y: _smooth.norm(log(x, y)),
        project=lambda x: wrapped(x),
        to_tangent=lambda x, v: v + jnp.zeros_like(x),
        inner=lambda x, u, v: jnp.sum(u * v, axis=-1) + zero(x),
        tangent_basis=basis,
        random=lambda key, n: jnp.zeros((n, dim)),
        log_volume=log_volume,
        log_det_exp=lambda x, v: zero(x + v),
        log_volume_element=zero,
        embed=lambda x: x,
        injective=injective,
    )
