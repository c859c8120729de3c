"""Hyperbolic space of curvature -1, as a hyperboloid and as a ball, and the map between the two."""

import math

import jax
import jax.numpy as jnp

from jflow._core.checks import check_whole
from jflow.manifolds import _smooth
from jflow.manifolds._checked import checked
from jflow.types import Array, Manifold

__all__ = ["hyperboloid", "poincare_ball", "to_hyperboloid", "to_poincare_ball"]


def hyperboloid(dim: int) -> Manifold:
    """Hyperbolic space of curvature -1 as the upper sheet of the hyperboloid in R^(dim + 1).

    Also known as: Lorentz model.

        <x, y> = -x_0 y_0 + x_1 y_1 + ... + x_dim y_dim,    <x, x> = -1,    x_0 > 0
        exp_x(v) = cosh r x + sinh r v / r,    r^2 = <v, v>
        log_x(y) = r u / sinh r,    u = y + <x, y> x,    r = 2 arcsinh(sqrt(<x - y, x - y>) / 2)

    The product < , > is the metric of tangent vectors, <x, v> = 0. `project` keeps x_1 to x_dim
    and computes x_0. `random` draws from the wrapped normal law of deviation 1 around the origin
    (1, 0, ..., 0). det d exp_x(v) = (sinh r / r)^(dim - 1). Coordinates grow like e^r: float32
    holds points within r = 8 of the origin to three digits, float64 within 17.

    The embedding does not keep Euclidean lengths: a divergence is `solvers.riemannian_divergence`.

    Args:
        dim: the dimension, at least 1.

    Returns:
        Manifold: points [dim + 1], the first number the largest.

    Raises:
        ValueError: dim is not a whole number of at least 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> space = manifolds.hyperboloid(2)
        >>> origin = jnp.array([1.0, 0.0, 0.0])
        >>> x = space.exp(origin, jnp.array([0.0, 0.0, 2.0]))
        >>> [round(float(a), 4) for a in x]  # cosh 2, 0, sinh 2
        [3.7622, 0.0, 3.6269]

    References:
        Nickel, Kiela, *Learning Continuous Hierarchies in the Lorentz Model of Hyperbolic
            Geometry*, 2018, arXiv:1806.03417.
    """
    check_whole("manifolds.hyperboloid", dim=dim)

    def random(key, n):
        v = jax.random.normal(key, (n, dim))
        return _exp(_lift(jnp.zeros_like(v)), jnp.pad(v, ((0, 0), (1, 0))))

    made = Manifold(
        shape=(dim + 1,),
        dim=dim,
        exp=_exp,
        log=_log,
        dist=lambda x, y: 2 * jnp.arcsinh(_smooth.root(_quarter(x, y)))[..., 0],
        project=lambda x: _lift(x[..., 1:]),
        to_tangent=_to_tangent,
        inner=lambda x, u, v: _product(u, v)[..., 0] + jnp.zeros_like(x[..., 0]),
        tangent_basis=_basis,
        random=random,
        log_volume=math.inf,
        log_det_exp=lambda x, v: (dim - 1) * _smooth.log_sinhc(_length(x, v))[..., 0],
        log_volume_element=lambda x: jnp.zeros_like(x[..., 0]),
        embed=lambda x: x,
        injective=((dim, math.inf),),
    )
    return checked("hyperboloid", made)


def poincare_ball(dim: int) -> Manifold:
    """Hyperbolic space of curvature -1 as the open unit ball, whose metric keeps angles.

        inner(x, u, v) = l(x)^2 u.v,    l(x) = 2 / (1 - |x|^2)
        dist(x, y) = 2 arcsinh(|x - y| sqrt(l(x) l(y)) / 2)

    exp and log are those of `hyperboloid`, through the isometry `to_hyperboloid`. `project` keeps
    the direction, and brings what is outside the ball to the largest radius that the type can tell
    from 1. `random` draws from the wrapped normal law of deviation 1 around 0.

    Args:
        dim: the dimension, at least 1.

    Returns:
        Manifold: points [dim].

    Raises:
        ValueError: dim is not a whole number of at least 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> disk = manifolds.poincare_ball(2)
        >>> round(float(disk.dist(jnp.zeros(2), jnp.array([0.5, 0.0]))), 4)  # 2 arctanh(1 / 2)
        1.0986

    References:
        Nickel, Kiela, *Poincare Embeddings for Learning Hierarchical Representations*, 2017,
            arXiv:1705.08039.
    """
    check_whole("manifolds.poincare_ball", dim=dim)
    sheet = hyperboloid(dim)

    def carried(f, x, v):  # the derivative of f at x along v
        return jax.jvp(f, (x,), (v,))

    def exp(x, v):
        return to_poincare_ball(_exp(*carried(to_hyperboloid, x, v)))

    def log(x, y):
        at = to_hyperboloid(x)
        return carried(to_poincare_ball, at, _log(at, to_hyperboloid(y)))[1]

    def project(x):
        largest = 1 - 4 * jnp.finfo(x.dtype).eps
        length = _smooth.norm(x)[..., None]
        outside = length > largest
        return jnp.where(outside, x * (largest / jnp.where(outside, length, 1.0)), x)

    def dist(x, y):
        scale = _conformal(x) * _conformal(y)
        return 2 * jnp.arcsinh(_smooth.root(_smooth.square(x - y) * scale) / 2)[..., 0]

    made = Manifold(
        shape=(dim,),
        dim=dim,
        exp=exp,
        log=log,
        dist=dist,
        project=project,
        to_tangent=lambda x, v: v + jnp.zeros_like(x),
        inner=lambda x, u, v: (jnp.square(_conformal(x)) * _smooth.dot(u, v))[..., 0],
        tangent_basis=lambda x: _smooth.unit(dim, x[..., None]) / _conformal(x)[..., None],
        random=lambda key, n: to_poincare_ball(sheet.random(key, n)),
        log_volume=math.inf,
        log_det_exp=lambda x, v: (
            (dim - 1) * _smooth.log_sinhc(jnp.square(_conformal(x)) * _smooth.square(v))[..., 0]
        ),
        log_volume_element=lambda x: dim * jnp.log(_conformal(x))[..., 0],
        embed=lambda x: x,
        injective=((dim, math.inf),),
    )
    return checked("poincare_ball", made)


def to_hyperboloid(x: Array) -> Array:
    """The point of the hyperboloid that is the same as a point of the Poincare ball.

        (1 + |x|^2, 2 x) / (1 - |x|^2)

    Args:
        x: points of `poincare_ball(dim)`, [..., dim].

    Returns:
        The points of `hyperboloid(dim)`, [..., dim + 1].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> x = manifolds.to_hyperboloid(jnp.array([0.0, 0.5]))
        >>> [round(float(a), 4) for a in x]
        [1.6667, 0.0, 1.3333]
    """
    s = _smooth.square(x)
    return jnp.concatenate([1 + s, 2 * x], axis=-1) / (1 - s)


def to_poincare_ball(x: Array) -> Array:
    """The point of the Poincare ball that is the same as a point of the hyperboloid.

        (x_1, ..., x_dim) / (1 + x_0)

    Args:
        x: points of `hyperboloid(dim)`, [..., dim + 1].

    Returns:
        The points of `poincare_ball(dim)`, [..., dim].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> x = manifolds.to_poincare_ball(jnp.array([1.25, 0.0, 0.75]))
        >>> [round(float(a), 4) for a in x]
        [0.0, 0.3333]
    """
    return x[..., 1:] / (1 + x[..., :1])


def _conformal(x):
    return 2 / (1 - _smooth.square(x))


def _product(x, y):
    """<x, y>, with the last axis of length 1."""
    return _smooth.dot(x[..., 1:], y[..., 1:]) - x[..., :1] * y[..., :1]


def _length(x, v):
    """<v, v> of a tangent vector at x, not below 0."""
    return jnp.maximum(_product(v, v), 0.0) + jnp.zeros_like(x[..., :1])


def _lift(rest):
    return jnp.concatenate([jnp.sqrt(1 + _smooth.square(rest)), rest], axis=-1)


def _exp(x, v):
    s = _length(x, v)
    return _lift((_smooth.cosh(s) * x + _smooth.sinhc(s) * v)[..., 1:])


def _quarter(x, y):
    """<x - y, x - y> / 4 = sinh(dist / 2)^2. The difference of the first numbers comes from those
    of the others, without the cancellation."""
    rest = y[..., 1:] - x[..., 1:]
    first = _smooth.dot(rest, y[..., 1:] + x[..., 1:]) / (x[..., :1] + y[..., :1])
    return jnp.maximum(_smooth.square(rest) - first * first, 0.0) / 4


def _log(x, y):
    u = _to_tangent(x, y - x)
    return _smooth.hyperbolic_over_sine(_quarter(x, y)) * u


def _to_tangent(x, v):
    return v + _product(x, v) * x


def _basis(x):
    """The unit vectors at the origin, carried along the geodesic from there to x."""
    first, rest = x[..., :1], x[..., 1:]
    outer = rest[..., :, None] * (rest / (1 + first))[..., None, :]
    spatial = _smooth.unit(rest.shape[-1], outer) + outer
    return jnp.concatenate([rest[..., None], spatial], axis=-1)
