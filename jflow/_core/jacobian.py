"""Products of a Jacobian with vectors, a row's own, and sums over the unit vectors of its event."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow.types import Array

_ALL, _SOME = (
    64,
    16,
)  # columns of a Jacobian at once: all of so many, else some; as fast as all, measured to D = 128


def over_unit_vectors(f: Callable, x: Array, terms: Callable) -> tuple[Array, Any]:
    """f(x), and the sums over the event's D unit vectors e of terms(f(x), e, J e), a pytree of [K,
    b] for e [K, b, *event].

    Memory is that of 64 columns J e at most, also where it is differentiated backwards.
    """
    size = math.prod(x.shape[1:])
    turns = 1 if size <= _ALL else math.ceil(size / _SOME)
    share = math.ceil(size / turns)

    def some(first):
        at = first + jnp.arange(share)
        e = (at[:, None] == jnp.arange(size)[None]).astype(x.dtype)  # zeros beyond the last
        e = jnp.broadcast_to(e.reshape(-1, 1, *x.shape[1:]), (e.shape[0], *x.shape))
        v, columns = columns_of(f, x, e)
        return v, jax.tree.map(lambda term: jnp.sum(term, axis=0), terms(v, e, columns))

    if turns == 1:
        return some(0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def turn(carry, first):
        v, more = some(first)
        return (v, jax.tree.map(jnp.add, carry[1], more)), None

    zeros = jax.tree.map(
        lambda a: jnp.zeros_like(x, shape=a.shape, dtype=a.dtype), jax.eval_shape(some, 0)
    )
    return jax.lax.scan(turn, zeros, jnp.arange(turns) * share)[0]


def columns_of(f, x, e):
    """f(x) and the products J e [K, b, *event] with e [K, b, *event]."""
    return jax.vmap(lambda e: jax.jvp(f, (x,), (e,)), out_axes=(None, 0))(e)


def dot(a, b):
    """[K, b, *event] twice -> [K, b], in float32 at least."""
    return jnp.sum(a * b, axis=tuple(range(2, a.ndim)), dtype=float_dtype(a, b))
