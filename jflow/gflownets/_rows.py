"""A network in those rows alone that need it, in a program of fixed shapes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow.types import Array, PyTree

__all__ = ["in_rows"]

_FEWEST = 16  # rows that take as long as fewer


def in_rows(function: Callable[[PyTree], Array], wanted: Array, rows: PyTree) -> Array:
    """function(rows) [n, ...] in the rows where `wanted` [n] is True; in others anything it says.

    The wanted rows are put together, and the function sees the smallest of n, n / 4, n / 16 ...
    rows that they fit into. It is compiled for each of these numbers.
    """
    n = wanted.shape[0]
    sizes = [n]
    while sizes[-1] // 4 >= _FEWEST:
        sizes.append(sizes[-1] // 4)
    order = jnp.nonzero(wanted, size=n, fill_value=0)[0]
    place = jnp.maximum(jnp.cumsum(wanted) - 1, 0)

    def of(size):
        few = lambda rows: jax.tree.map(lambda a: a[order[:size]], rows)  # noqa: E731
        return lambda rows: function(few(rows))[place]

    fits = jnp.array([jnp.sum(wanted) <= size for size in sizes[1:]], jnp.int32)
    return jax.lax.switch(jnp.sum(fits), [function, *map(of, sizes[1:])], rows)
