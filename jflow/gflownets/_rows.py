"""A network in those rows alone that need it, in a program of fixed shapes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow.types import Array, Key, PyTree

__all__ = ["in_chunks", "in_rows"]

_FEWEST = 16  # rows that take as long as fewer
_SMALLEST_CHUNK, _MOST_CHUNKS = 512, 32


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


def in_chunks(
    function: Callable[[PyTree, Key | None], PyTree], wanted: Array, rows: PyTree, key: Key | None
) -> PyTree:
    """function(rows, key) in the rows where `wanted` [n] is True, the first one among them; in
    another row what it says there or in the last wanted row before.

    The wanted rows are put together and cut into chunks of one size, and the function sees those
    that hold any. Gradients evaluate it once more, so that the memory is that of one chunk. Few
    rows are one chunk, as they stand.
    """
    n = wanted.shape[0]
    chunks = min(_MOST_CHUNKS, n // _SMALLEST_CHUNK)
    if chunks < 2:
        return function(rows, key)
    place = jnp.maximum(jnp.cumsum(wanted) - 1, 0)
    size = -(-n // chunks)
    order = jnp.nonzero(wanted, size=chunks * size, fill_value=0)[0]
    few = jax.tree.map(lambda a: a[order].reshape(chunks, size, *a.shape[1:]), rows)
    keys = None if key is None else jax.random.split(key, chunks)
    ask = jax.checkpoint(function)

    def skip(rows, key):
        like = jax.tree.leaves(rows)[0]
        made = jax.eval_shape(function, rows, key)
        return jax.tree.map(lambda a: jnp.zeros_like(like, shape=a.shape, dtype=a.dtype), made)

    def one(_, chunk):
        some, rows, key = chunk
        return None, jax.lax.cond(some, ask, skip, rows, key)

    some = jnp.arange(chunks) * size < jnp.sum(wanted)
    made = jax.lax.scan(one, None, (some, few, keys))[1]
    return jax.tree.map(lambda a: a.reshape(chunks * size, *a.shape[2:])[place], made)
