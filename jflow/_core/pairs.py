"""What pairing does to the rows of a batch: a coupling's indices found and followed."""

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import filled
from jflow._core.batch import read_as_given
from jflow.types import Coupling, Key, PyTree


def paired(name: str, coupling: Coupling, key: Key, batch) -> dict[str, PyTree]:
    """The batch with x0[i] beside x[j], cond[j] and weight[j], (i, j) what the coupling returns;
    the source is standard normal where the batch has no 'x0'. A key of the batch that is none of
    these raises."""
    x, x0, cond, weight = read_as_given(name, batch, ("x", "x0", "cond", "weight"))
    noise_key, pair_key = jax.random.split(key)
    x0 = jax.random.normal(noise_key, x.shape, x.dtype) if x0 is None else x0
    x0, x, cond = _finite(weight, x0, x, cond)
    i, j = coupling(pair_key, x0, x, cond)
    made = {"x0": pick(x0, i)} | pick({"x": x, "cond": cond, "weight": weight}, j)
    return {what: value for what, value in made.items() if value is not None}


def _finite(weight, x0, x1, cond):
    """What a coupling sees: the rows as they are, but for those of weight 0 that hold infinity or
    NaN."""
    if weight is None:
        return x0, x1, cond
    finite = [jnp.all(jnp.isfinite(a), axis=tuple(range(1, a.ndim))) for a in (x0, x1)]
    return filled((weight != 0) | (finite[0] & finite[1]), (x0, x1, cond))


def pick(tree, index):
    """Rows of every leaf; the identity, when it is known while tracing, moves nothing."""
    if isinstance(index, np.ndarray) and np.array_equal(index, np.arange(len(index))):
        return tree
    return jax.tree.map(lambda a: a[index], tree)
