"""Inverses without a closed form, differentiated by the implicit function theorem instead of
through their iterations."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.keys import hidden, is_key
from jflow._core.pullback import tied
from jflow.types import Array, PyTree

__all__ = ["FixedPoint", "fixed_point", "monotone_root"]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def monotone_root(
    f: Callable[[Array, PyTree], tuple[Array, Array]], y: Array, args: PyTree
) -> Array:
    """x [...] with f(x, args)[0] = y [...], to the last digits of y's type.

    f(x, args) -> (value, log slope), elementwise and increasing without bound on both sides; it
    must not close over what is differentiated. A bracket grows from y until it holds the root;
    Newton steps that stay inside it and halve the step before last, else bisections, shrink it.
    Derivatives of any order and mode: dx = (dy - df/dargs dargs) / f'(x).
    """
    y = y.astype(float_dtype(y))
    width = 1 + jnp.abs(y)

    def widen(carry):
        low, high, width, _ = carry
        above, below = f(low, args)[0] > y, f(high, args)[0] < y
        low, high = jnp.where(above, low - width, low), jnp.where(below, high + width, high)
        return low, high, 2 * width, _any(above | below)

    def unfinished(carry):
        return carry[-1] & _any(carry[-2] < jnp.finfo(y.dtype).max / 8)

    more = _any(y == y)  # made from y, so that it varies over a mesh axis as y does
    low, high, _, _ = jax.lax.while_loop(unfinished, widen, (y - width, y + width, width, more))

    def refine(carry):
        i, x, last, low, high, before = carry
        value, log_slope = (v.astype(y.dtype) for v in f(x, args))
        low, high = jnp.where(value <= y, x, low), jnp.where(value >= y, x, high)
        newton = x + (y - value) * jnp.exp(-log_slope)
        trusted = (newton > low) & (newton < high) & (2 * jnp.abs(newton - x) < before)
        new = jnp.where(trusted, newton, low + (high - low) / 2)
        new = jnp.where(moving(x, last), new, x)
        return i + 1, new, x, low, high, jnp.abs(x - last)

    def moving(x, last):
        # judged by two points that the loop carries: a compiler that computes a Newton step twice,
        # once for the point and once for its move, may round it to both sides of the bracket
        return jnp.abs(x - last) > 4 * jnp.finfo(y.dtype).eps * jnp.maximum(1.0, jnp.abs(x))

    def going(carry):
        i, x, last, _, _, _ = carry
        return (i < 200) & _any(moving(x, last))

    start = (0, low + (high - low) / 2, low, low, high, high - low)
    return jax.lax.while_loop(going, refine, start)[1]


@monotone_root.defjvp
def _monotone_root_jvp(f, primals, tangents):
    (y, args), (y_dot, args_dot) = primals, tangents
    x = monotone_root(f, y, args)
    (_, log_slope), (f_dot, _) = jax.jvp(lambda args: f(x, args), (args,), (args_dot,))
    return x, ((y_dot - f_dot) * jnp.exp(-log_slope)).astype(x.dtype)


def _any(where: Array) -> Array:
    """jnp.any, by a reduction that Pallas has on GPUs too: roots are found inside of kernels."""
    return jnp.max(where.astype(jnp.int32), initial=0) > 0


class FixedPoint(NamedTuple):
    """x [b, ...]; evaluations, a scalar; change [b], the largest of the last |x_new - x| / (1 +
    |x|) in a row."""

    x: Array
    evaluations: Array
    change: Array


def fixed_point(
    g: Callable[[Array, PyTree], Array], x: Array, args: PyTree, *, tol: float, max_evaluations: int
) -> FixedPoint:
    """The x [b, ...] with x = g(x, args), iterated from x until every row changes by at most `tol`,
    relative to 1 + |x|.

    A row stays as it is from then on, whatever the others of its batch still do: judged again and
    again, the slowest of many rows would be one that rounding keeps moving. g acts on each row
    alone and must not close over what is differentiated. Serves contractions and maps whose
    Jacobian is strictly triangular in some order, which arrive exactly after as many evaluations as
    the order is long. Derivatives are implicit, of any order and mode: the gradient solves w =
    x_bar + (dg/dx)^T w by the same iteration, in memory that does not grow with evaluations. Bai,
    Kolter, Koltun, *Deep Equilibrium Models* (2019).
    """
    return FixedPoint(*_fixed_point(g, tol, max_evaluations, x, args))


def _iterate(g, tol, max_evaluations, x):
    def going(carry):
        x, n, change = carry
        return (n < max_evaluations) & jnp.any(~(change <= tol))  # NaN may yet become a number

    def again(carry):
        x, n, change = carry
        new = g(x).astype(x.dtype)
        moved = jnp.abs(new - x) / (1 + jnp.abs(x))
        moved = jnp.max(moved.astype(float_dtype(x)), axis=tuple(range(1, x.ndim)))
        done = change <= tol
        return jnp.where(expand_to(done, x), x, new), n + 1, jnp.where(done, change, moved)

    never = jnp.full_like(x, jnp.inf, shape=x.shape[:1], dtype=float_dtype(x))
    return jax.lax.while_loop(going, again, (x, 0, never))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _fixed_point(g, tol, max_evaluations, x, args):
    return _iterate(lambda x: g(x, args), tol, max_evaluations, x)


@_fixed_point.defjvp
def _fixed_point_jvp(g, tol, max_evaluations, primals, tangents):
    """x_dot = dg/dx x_dot + dg/dargs args_dot, linear equations that the same iteration solves, and
    their transposes."""
    (start, args), (_, args_dot) = primals, tangents
    x, evaluations, change = _fixed_point(g, tol, max_evaluations, start, args)
    leaves, tree = jax.tree.flatten(args)
    dots = tree.flatten_up_to(args_dot)
    keys = {i: hidden(leaf) for i, leaf in enumerate(leaves) if is_key(leaf)}
    for i, (data, _) in keys.items():
        leaves[i], dots[i] = data, np.zeros(data.shape, jax.dtypes.float0)

    @partial(
        jax.checkpoint, prevent_cse=False
    )  # nothing is kept of g for the way back but its arguments
    def at(x, leaves):
        leaves = [keys[i][1](leaf) if i in keys else leaf for i, leaf in enumerate(leaves)]
        return g(x, tree.unflatten(leaves)).astype(x.dtype)

    _, varying = tied((x, leaves))

    def in_x(x):
        return at(x, varying)

    def equations(w):
        return w - jax.jvp(in_x, (x,), (w,))[1]

    def iterated(along, b):
        # w is linear in b, while tol is relative to 1 + |w|: cotangents of a mean over many rows
        # are small.
        largest = jnp.max(jnp.abs(b), axis=tuple(range(1, x.ndim)), keepdims=True)
        scale = jnp.where(largest > 0, largest, 1)
        return _iterate(lambda w: b / scale + along(w), tol, max_evaluations, b / scale)[0] * scale

    def solve(_, b):
        return iterated(jax.linearize(in_x, x)[1], b)

    def solve_transposed(_, b):
        pullback = jax.vjp(in_x, x)[1]
        return iterated(lambda w: pullback(w)[0], b)

    b = jax.jvp(lambda leaves: at(x, tied((x, leaves))[1]), (leaves,), (dots,))[1]
    x_dot = jax.lax.custom_linear_solve(equations, b, solve, solve_transposed)
    return (x, evaluations, change), (
        x_dot,
        np.zeros(evaluations.shape, jax.dtypes.float0),
        jnp.zeros_like(change),
    )
