"""The sphere, the simplex as a part of it, and points on the earth."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jflow._core.checks import check_whole
from jflow.manifolds import _smooth
from jflow.manifolds._checked import checked
from jflow.types import Array, Manifold

__all__ = ["from_latitude_longitude", "simplex", "sphere", "to_latitude_longitude"]


def sphere(dim: int) -> Manifold:
    """The unit sphere S^dim of unit vectors in R^(dim + 1), with the angle as distance.

        exp_x(v) = cos|v| x + sin|v| v / |v|
        log_x(y) = angle(x, y) u / |u|,    u = y - (x.y) x,    angle = 2 atan2(|x - y|, |x + y|)

    At the antipode y = -x, where every direction is shortest, log takes a fixed one, the first of
    `tangent_basis`, of length pi. Beside it the gradient of log is as large as 1 / |u|, and finite.
    `project` divides by the length. det d exp_x(v) = (sin|v| / |v|)^(dim - 1).

    Args:
        dim: the dimension, at least 1; 2 is the sphere in space.

    Returns:
        Manifold: points [dim + 1].

    Raises:
        ValueError: dim is not a whole number of at least 1.

    Examples:
        >>> import math
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> sphere = manifolds.sphere(2)
        >>> x = sphere.exp(jnp.array([0.0, 0.0, 1.0]), jnp.array([math.pi / 2, 0.0, 0.0]))
        >>> [round(abs(float(a)), 4) for a in x]
        [1.0, 0.0, 0.0]
        >>> round(math.exp(sphere.log_volume), 4)  # 4 pi
        12.5664
    """
    check_whole("manifolds.sphere", dim=dim)
    size = dim + 1
    log_volume = math.log(2) + size / 2 * math.log(math.pi) - math.lgamma(size / 2)
    made = Manifold(
        shape=(size,),
        dim=dim,
        exp=_exp,
        log=_log,
        dist=_dist,
        project=_project,
        to_tangent=_to_tangent,
        inner=lambda x, u, v: jnp.sum(u * v, axis=-1) + jnp.zeros_like(x[..., 0]),
        tangent_basis=_basis,
        random=lambda key, n: _project(jax.random.normal(key, (n, size))),
        log_volume=log_volume,
        log_det_exp=lambda x, v: (dim - 1) * _log_sinc(x, v),
        log_volume_element=lambda x: jnp.zeros_like(x[..., 0]),
        embed=lambda x: x,
        injective=((dim, math.pi),),
    )
    return checked("sphere", made)


def simplex(size: int) -> Manifold:
    """Probabilities of `size` outcomes with the Fisher-Rao metric, sum_i u_i v_i / p_i.

    The map p -> sqrt(p) takes them to the positive part of the unit sphere, where all is computed;
    lengths are twice those there, so that dist(p, q) = 2 arccos(sum_i sqrt(p_i q_i)). A geodesic
    that reaches a face goes on as its mirror image. `project` sets negative numbers to 0 and
    divides by the sum. `to_tangent` is orthogonal in the metric, v - p sum(v). `random` is uniform
    in the metric, a Dirichlet law of parameters 1/2.

    On faces, where some p_i = 0, the metric is infinite: there tangent vectors have no part along
    e_i, and gradients with respect to p_i are 0. Data that are vertices (tokens) do well as the end
    of a path; for a network on them the sphere itself, of sqrt(p), is the better chart.

    Args:
        size: the number of outcomes, at least 2; the dimension is one less.

    Returns:
        Manifold: points [size].

    Raises:
        ValueError: size is not a whole number of at least 2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> simplex = manifolds.simplex(2)
        >>> p, q = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
        >>> round(float(simplex.dist(p, q)), 4)  # pi, half of the way around
        3.1416

    References:
        Davis, Kessler, Petrache, Ceylan, Bronstein, Bose, *Fisher Flow Matching for Generative
            Modeling over Discrete Data*, 2024, arXiv:2405.14664.
    """
    check_whole("manifolds.simplex", 2, size=size)
    whole = sphere(size - 1)

    def down(p, v):  # the tangent vector of sqrt(p)
        return _smooth.divide(v, 2 * _smooth.root(p))

    def project(x):
        x = jnp.maximum(x, 0.0)
        total = jnp.sum(x, axis=-1, keepdims=True)
        return jnp.where(total > 0, _smooth.divide(x, total), jnp.full_like(x, 1 / size))

    def log_volume_element(p):
        # of a hyperplane in the metric diag(1 / p): its determinant is that of all of space times
        # the squared length of the unit normal
        return -0.5 * jnp.sum(jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny)), axis=-1)

    made = Manifold(
        shape=(size,),
        dim=size - 1,
        exp=lambda p, v: jnp.square(_exp(_smooth.root(p), down(p, v))),
        log=lambda p, q: 2 * _smooth.root(p) * _log(_smooth.root(p), _smooth.root(q)),
        dist=lambda p, q: 2 * _dist(_smooth.root(p), _smooth.root(q)),
        project=project,
        to_tangent=lambda p, v: v - p * jnp.sum(v, axis=-1, keepdims=True),
        inner=lambda p, u, v: jnp.sum(_smooth.divide(u * v, p), axis=-1),
        tangent_basis=lambda p: _smooth.root(p)[..., None, :] * _basis(_smooth.root(p)),
        random=lambda key, n: jnp.square(whole.random(key, n)),
        log_volume=whole.log_volume - math.log(2),
        log_det_exp=lambda p, v: (size - 2) * _log_sinc(p, down(p, v)),
        log_volume_element=log_volume_element,
        embed=lambda p: p,
    )
    return checked("simplex", made)


def from_latitude_longitude(degrees: ArrayLike | Sequence[Any]) -> np.ndarray:
    """Points on the unit sphere from latitudes and longitudes in degrees.

        x = (cos lat cos lon, cos lat sin lon, sin lat)

    Args:
        degrees: [..., 2], the latitude in [-90, 90] (north is positive) and the longitude in [-180,
            180] (east is positive), in degrees. They are values, not traced.

    Returns:
        Unit vectors [..., 3] of numpy's, in the type of `degrees`, float64 for integers.

    Raises:
        ValueError: another shape, or numbers that are outside, which names the first rows that are.

    Examples:
        >>> from jflow import manifolds
        >>> manifolds.from_latitude_longitude([[90.0, 0.0], [0.0, 180.0]]).round(3).tolist()
        [[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0]]
    """
    name = "from_latitude_longitude"
    degrees = np.asarray(degrees)
    if degrees.ndim < 1 or degrees.shape[-1] != 2:
        raise ValueError(
            f"{name}: expected degrees of shape [..., 2], latitude and longitude, got "
            f"{list(degrees.shape)}"
        )
    rows = degrees.reshape(-1, 2)
    outside = ~((np.abs(rows) <= np.array([90, 180])).all(axis=-1))
    if outside.any():
        first = np.flatnonzero(outside)
        shown = ", ".join(f"row {i}: {rows[i].tolist()}" for i in first[:3])
        swapped = (np.abs(rows[:, ::-1]) <= np.array([90, 180])).all()
        hint = "; the columns seem to be in the other order" if swapped else ""
        raise ValueError(
            f"{name}: expected degrees, a latitude in [-90, 90] and a longitude in [-180, 180], "
            f"got {len(first)} rows outside, {shown}{hint}"
        )
    latitude, longitude = np.moveaxis(np.radians(degrees), -1, 0)
    x = [
        np.cos(latitude) * np.cos(longitude),
        np.cos(latitude) * np.sin(longitude),
        np.sin(latitude),
    ]
    return np.stack(x, axis=-1)


def to_latitude_longitude(x: ArrayLike | Sequence[Any]) -> np.ndarray:
    """Latitudes and longitudes in degrees from points on the unit sphere.

    Args:
        x: unit vectors [..., 3].

    Returns:
        [..., 2] of numpy's: the latitude in [-90, 90] and the longitude in [-180, 180], in degrees.

    Raises:
        ValueError: another shape.

    Examples:
        >>> from jflow import manifolds
        >>> manifolds.to_latitude_longitude([[0.0, -1.0, 0.0]]).tolist()
        [[0.0, -90.0]]
    """
    x = np.asarray(x)
    if x.ndim < 1 or x.shape[-1] != 3:
        raise ValueError(
            f"to_latitude_longitude: expected x of shape [..., 3], got {list(x.shape)}"
        )
    latitude = np.arctan2(x[..., 2], np.hypot(x[..., 0], x[..., 1]))
    return np.degrees(np.stack([latitude, np.arctan2(x[..., 1], x[..., 0])], axis=-1))


def _exp(x, v):
    s = _smooth.square(v)
    return _project(_smooth.cos(s) * x + _smooth.sinc(s) * v)


def _log(x, y):
    w = _to_tangent(x, y - x)
    u = _to_tangent(x, w)  # once more takes out what rounding left along x
    chord, gap = _smooth.square(x - y), _smooth.square(x + y)
    near = chord < 2 * gap
    q = jnp.where(near, chord / jnp.where(near, chord + gap, 1.0), 0.0)  # sin^2(angle / 2)
    # beyond a right angle and more: the angle, along the direction of u
    length = _smooth.square(u)
    lost = length < (16 * jnp.finfo(x.dtype).eps) ** 2  # the antipode
    far = _angle(chord, gap) * jnp.where(
        lost,
        _basis(x)[..., 0, :],
        u / jnp.sqrt(jnp.where(lost | near, 1.0, length)),
    )
    return jnp.where(near, _smooth.angle_over_sine(q) * u, far)


def _angle(chord, gap):
    return 2 * jnp.arctan2(_smooth.root(chord), _smooth.root(gap))


def _dist(x, y):
    return _angle(_smooth.square(x - y), _smooth.square(x + y))[..., 0]


def _project(x):
    length = _smooth.norm(x)[..., None]
    nowhere = jnp.zeros_like(x).at[..., 0].set(1.0)
    return jnp.where(length > 0, _smooth.divide(x, length), nowhere)


def _to_tangent(x, v):
    return v - _smooth.dot(x, v) * x


def _basis(x):
    """The rows of the reflection that takes the last axis to x or -x, but the last."""
    last = x[..., -1:]
    sign = jnp.where(last < 0, -1.0, 1.0).astype(x.dtype)
    w = jnp.concatenate([x[..., :-1], last + sign], axis=-1)
    outer = w[..., :-1, None] * w[..., None, :] / (1 + jnp.abs(last))[..., None]
    return _smooth.unit(x.shape[-1], outer)[..., :-1, :] - outer


def _log_sinc(x: Array, v: Array) -> Array:
    """log |sin|v| / |v||."""
    s = _smooth.square(v)[..., 0] + jnp.zeros_like(x[..., 0])
    value = jnp.abs(_smooth.sinc(s))
    return jnp.log(jnp.maximum(value, jnp.finfo(value.dtype).tiny))
