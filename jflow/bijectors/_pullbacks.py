"""Derivatives of bijectors from their outputs alone, for backward passes of reversible stacks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jflow.types import Array, Bijector, Cond, Key, Params, PyTree

__all__ = ["add_cotangents", "cotangents_at", "opposite", "pullback_at", "zero_cotangents"]


def pullback_at(
    bijector: Bijector,
    direction: str,
    params: Params,
    y: Array,
    cotangents: tuple[Array, Array],
    cond: Cond = None,
    *,
    key: Key | None = None,
) -> tuple[Array, tuple[Params, Array, Cond]]:
    """`bijector.pullback`, see `types.Bijector`, or what stands in for it.

    That is the other direction, then jax.vjp where it leads.
    """
    if bijector.pullback is not None:
        return bijector.pullback(direction, params, y, cotangents, cond, key=key)
    x, _ = getattr(bijector, opposite(direction))(params, y, cond, key=key)
    x = x.astype(y.dtype)
    return x, cotangents_at(
        partial(getattr(bijector, direction), key=key), cotangents, params, x, cond
    )


def cotangents_at(function, cotangents: tuple[Array, Array], *args: PyTree) -> tuple[PyTree, ...]:
    """The cotangents of `args` when `cotangents` are those of function(*args) -> (y, log_det)."""
    outputs, pullback = jax.vjp(function, *args)
    return pullback(
        tuple(bar.astype(output.dtype) for bar, output in zip(cotangents, outputs, strict=True))
    )


def opposite(direction: str) -> str:
    return "inverse" if direction == "forward" else "forward"


def zero_cotangents(tree: PyTree) -> PyTree:
    """Cotangents of what has no influence.

    Zeros, and JAX's float0 for integers (labels, permutations) and keys.
    """

    def zero(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.zeros_like(leaf)
        return np.zeros(leaf.shape, jax.dtypes.float0)

    return jax.tree.map(zero, tree)


def add_cotangents(a: PyTree, b: PyTree) -> PyTree:
    """The sum of two cotangents of one tree."""
    return jax.tree.map(lambda a, b: a if a.dtype == jax.dtypes.float0 else a + b, a, b)
