"""Functions of symmetric matrices by their eigenvalues, whose derivatives are finite where
eigenvalues meet."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jflow.manifolds import _smooth
from jflow.types import Array


class Function(NamedTuple):
    """A matrix function f(A) = U f(l) U' of symmetric A = U diag(l) U'.

    Attributes:
        of: `of(a) -> f(a)`.
        along: `along(a, e)`, its derivative at a along a symmetric e, differentiable again.
    """

    of: Callable[[Array], Array]
    along: Callable[[Array, Array], Array]


def transpose(a: Array) -> Array:
    return jnp.swapaxes(a, -1, -2)


def symmetric(a: Array) -> Array:
    return (a + transpose(a)) / 2


def in_basis(u: Array, a: Array) -> Array:
    """U' A U."""
    return transpose(u) @ a @ u


def from_basis(u: Array, a: Array) -> Array:
    """U A U', exactly symmetric for a symmetric A."""
    return symmetric(u @ a @ transpose(u))


def diagonal(values: Array) -> Array:
    """[..., n] -> [..., n, n]."""
    row = values[..., None, :]
    return _smooth.unit(values.shape[-1], row) * row


def make(f: Callable, slope: Callable, bend: Callable) -> Function:
    """The matrix function of f, from its divided difference slope(a, b) = (f(a) - f(b)) / (a - b),
    which is f' where a = b, and bend(a) = f''(a).

    The derivatives are those of Daleckii and Krein: with E in the basis of eigenvectors,

        Df[E]_ij = f[l_i, l_j] E_ij
        D2f[E, B]_ij = sum_k f[l_i, l_k, l_j] (E_ik B_kj + B_ik E_kj)
    """

    @jax.custom_jvp
    def of(a):
        values, u = jnp.linalg.eigh(a)
        return from_basis(u, diagonal(f(values)))

    @jax.custom_jvp
    def along(a, e):
        values, u = jnp.linalg.eigh(a)
        return from_basis(u, slope(values[..., :, None], values[..., None, :]) * in_basis(u, e))

    @of.defjvp
    def _(primals, tangents):
        (a,), (e,) = primals, tangents
        return of(a), along(a, symmetric(e))

    @along.defjvp
    def _(primals, tangents):
        (a, e), (b, de) = primals, tangents
        values, u = jnp.linalg.eigh(a)
        e_, b_ = in_basis(u, e), in_basis(u, symmetric(b))
        f3 = second(
            values[..., :, None, None], values[..., None, :, None], values[..., None, None, :]
        )
        terms = (
            e_[..., :, :, None] * b_[..., None, :, :] + b_[..., :, :, None] * e_[..., None, :, :]
        )
        return along(a, e), along(a, de) + from_basis(u, jnp.sum(f3 * terms, axis=-2))

    def second(a, b, c):
        """The second divided difference; where all three are near, half the second derivative."""
        a, b, c = jnp.broadcast_arrays(a, b, c)
        low, high = jnp.minimum(jnp.minimum(a, b), c), jnp.maximum(jnp.maximum(a, b), c)
        middle = (a - low) + (b - high) + c  # exact where they meet
        scale = jnp.maximum(jnp.abs(low), jnp.abs(high))
        near = high - low <= jnp.finfo(a.dtype).eps ** 0.25 * jnp.maximum(scale, 1e-30)
        gap = jnp.where(near, 1.0, high - low)
        return jnp.where(
            near, bend((a + b + c) / 3) / 2, (slope(high, middle) - slope(middle, low)) / gap
        )

    return Function(of, along)


def _exp_slope(a, b):
    return jnp.exp((a + b) / 2) * _smooth.sinhc(jnp.square((a - b) / 2))


def log_slope(a: Array, b: Array) -> Array:
    """(log a - log b) / (a - b) = 2 arctanh(z) / (z (a + b)),    z = (a - b) / (a + b)."""
    total = a + b
    z = jnp.square((a - b) / total)
    far = z > 0.25  # then the difference of logarithms has its digits
    apart = jnp.where(far, a - b, 1.0)
    near = 2 / total * _smooth.arctanhc(jnp.where(far, 0.0, z))
    return jnp.where(far, (jnp.log(a) - jnp.log(b)) / apart, near)


EXP = make(jnp.exp, _exp_slope, jnp.exp)
LOG = make(jnp.log, log_slope, lambda a: -1 / (a * a))


def basis(n: int, dtype) -> Array:
    """Orthonormal symmetric matrices [n (n + 1) / 2, n, n]: first the diagonal ones."""
    i, j = jnp.triu_indices(n, 1)
    unit = jnp.eye(n, dtype=dtype)
    diagonal = unit[:, :, None] * unit[:, None, :]
    mixed = unit[i][:, :, None] * unit[j][:, None, :]
    return jnp.concatenate([diagonal, (mixed + transpose(mixed)) * 0.5**0.5])
