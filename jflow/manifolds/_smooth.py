"""Functions that are smooth where their textbook forms are 0 / 0, with all their derivatives.

They take a squared argument, so that no square root is differentiated at 0: below a small number
the power series stands in, and the other branch sees a harmless number.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp

from jflow.types import Array

_SMALL = 1e-2  # five terms of a series of radius 1 and more leave 1e-11 of the last coefficient


def _spliced(series: tuple[float, ...], exact: Callable[[Array], Array]) -> Callable:
    """The function of s: the power series near 0, `exact` of |s| elsewhere."""

    def function(s):
        near = jnp.abs(s) < _SMALL
        value = jnp.zeros_like(s) + series[-1]
        for coefficient in series[-2::-1]:
            value = value * s + coefficient
        return jnp.where(near, value, exact(jnp.where(near, 0.5, s).astype(s.dtype)))

    return function


def _ratio(signs: int, offset: int, terms: int = 6) -> tuple[float, ...]:
    return tuple(float(signs**k) / math.factorial(2 * k + offset) for k in range(terms))


def _sqrt(f):
    return lambda s: f(jnp.sqrt(s))


cos = _spliced(_ratio(-1, 0), _sqrt(jnp.cos))
cosh = _spliced(_ratio(1, 0), _sqrt(jnp.cosh))
sinc = _spliced(_ratio(-1, 1), _sqrt(lambda r: jnp.sin(r) / r))
sinhc = _spliced(_ratio(1, 1), _sqrt(lambda r: jnp.sinh(r) / r))
# log(sinh r / r), which does not overflow
log_sinhc = _spliced(
    (0.0, 1 / 6, -1 / 180, 1 / 2835, -1 / 37800, 1 / 467775),
    _sqrt(lambda r: r + jnp.log(-jnp.expm1(-2 * r)) - jnp.log(2 * r)),
)
# arcsin(r) / r and arctanh(r) / r
arcsinc = _spliced(
    (1.0, 1 / 6, 3 / 40, 5 / 112, 35 / 1152, 63 / 2816, 231 / 13312),
    _sqrt(lambda r: jnp.arcsin(r) / r),
)
arctanhc = _spliced(tuple(1.0 / (2 * k + 1) for k in range(8)), _sqrt(lambda r: jnp.arctanh(r) / r))
# arcsinh(r) / (r sqrt(1 + r^2)), and arcsin(r) / (r sqrt(1 - r^2)) below r = 0.9
_ANGLE = (1.0, 2 / 3, 8 / 15, 16 / 35, 128 / 315, 256 / 693, 1024 / 3003, 2048 / 6435)
hyperbolic_over_sine = _spliced(
    tuple(c * (-1) ** k for k, c in enumerate(_ANGLE)),
    _sqrt(lambda r: jnp.arcsinh(r) / (r * jnp.sqrt(1 + r * r))),
)
angle_over_sine = _spliced(_ANGLE, _sqrt(lambda r: jnp.arcsin(r) / (r * jnp.sqrt(1 - r * r))))


def root(s: Array) -> Array:
    """sqrt(s) with gradient 0 at s = 0, and 0 below."""
    positive = s > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, s, 1.0).astype(s.dtype)), 0.0).astype(
        s.dtype
    )


def divide(a: Array, b: Array) -> Array:
    """a / b, and 0 where b is 0."""
    some = b != 0
    return jnp.where(some, a, 0.0).astype(a.dtype) / jnp.where(some, b, 1.0).astype(b.dtype)


def unit(n: int, like: Array) -> Array:
    """The identity [1, ..., n, n] of the rank and the type of an array, to add to it."""
    return jnp.eye(n, dtype=like.dtype).reshape((1,) * (like.ndim - 2) + (n, n))


def square(x: Array, axes: int = 1) -> Array:
    """The sum of squares over the last axes, which stay with length 1."""
    return jnp.sum(x * x, axis=tuple(range(-axes, 0)), keepdims=True)


def dot(x: Array, y: Array, axes: int = 1) -> Array:
    """The sum of products over the last axes, which stay with length 1."""
    return jnp.sum(x * y, axis=tuple(range(-axes, 0)), keepdims=True)


def norm(x: Array, axes: int = 1) -> Array:
    """The length [...] of x [..., *axes], with gradient 0 at 0."""
    return root(jnp.sum(x * x, axis=tuple(range(-axes, 0))))
