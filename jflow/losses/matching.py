"""Regression of a velocity on the path between source and data."""

import jax
import jax.numpy as jnp
import numpy as np

from jflow import couplings, paths, times
from jflow._util import expand_to, float_dtype, like_rows, need_key
from jflow.losses._batch import mean_of_rows, read
from jflow.types import Coupling, Loss, Path, PyTree, Time, Velocity

__all__ = ["flow_matching"]

_LINEAR, _UNIFORM, _INDEPENDENT = paths.linear(), times.uniform(), couplings.independent()


def flow_matching(
    velocity: Velocity,
    *,
    path: Path = _LINEAR,
    time: Time = _UNIFORM,
    coupling: Coupling = _INDEPENDENT,
    drop: float = 0.0,
    null: PyTree = None,
) -> Loss:
    """Conditional flow matching: the mean over the event of (velocity(x_t, t, cond) - target)^2, then over rows.

    batch: 'x' [b, *event] data; optionally 'x0' [b, *event] the source (standard normal when absent), 'cond', and
    'weight' [b] (weighted mean over rows, sum(w l) / sum(w)). The coupling's indices (i, j) pick x0[i], and x[j] with
    its cond and weight. The loss is a mean over event dimensions: it doesn't grow with the size of the event.

    drop: the probability, for each row by itself, of replacing cond by `null`, one row of cond without the batch axis
        (an integer label, a vector, a pytree of those). `guidance.cfg` with the same null then guides the trained
        velocity.
    Errors: ValueError at construction for a drop outside [0, 1] or without null; at trace time for a batch without
        'x', with unknown keys or rows that don't match, for a drop without 'cond', and for key=None.
    Sources: Lipman et al., "Flow Matching for Generative Modeling", 2023; Ho, Salimans, "Classifier-Free Diffusion
        Guidance", 2022 (drop).
    """
    if not 0 <= drop <= 1:
        raise ValueError(f"flow_matching: expected drop in [0, 1], got {drop}")
    if drop > 0 and null is None:
        raise ValueError(f"flow_matching: drop={drop} needs null, the row that replaces a dropped cond, got None")

    def loss(params, key, batch, frozen=None):
        need_key("flow_matching", key)
        x1, x0, cond, weight = read("flow_matching", batch, ("x", "x0", "cond", "weight"))
        if drop > 0 and cond is None:
            raise ValueError(f"flow_matching: drop={drop} needs 'cond' in batch, got the keys {sorted(batch)}")
        time_key, noise_key, pair_key, path_key, drop_key, dropout_key = jax.random.split(key, 6)
        n = x1.shape[0]
        x0 = jax.random.normal(noise_key, x1.shape, x1.dtype) if x0 is None else x0
        i, j = coupling(pair_key, x0, x1, cond)
        x0, (x1, cond, weight) = _pick(x0, i), _pick((x1, cond, weight), j)
        if drop > 0:
            dropped = jax.random.bernoulli(drop_key, drop, (n,))
            nulls = like_rows("flow_matching", null, cond)
            cond = jax.tree.map(lambda c, z: jnp.where(expand_to(dropped, c), z, c), cond, nulls)
        t = time(time_key, n).astype(float_dtype(x1))
        x_t = path.point(x0, x1, t, key=path_key).astype(x1.dtype)
        target = path.target(x0, x1, t, key=path_key)
        v = velocity.apply(params, x_t, t, cond, key=dropout_key)
        if v.shape != target.shape:
            raise ValueError(f"flow_matching: expected a velocity of shape {list(target.shape)}, got {list(v.shape)}")
        error = v.astype(float_dtype(x1)) - target.astype(float_dtype(x1))
        return mean_of_rows(jnp.mean(jnp.square(error).reshape(n, -1), axis=1), weight), {}

    return loss


def _pick(tree, index):
    """Rows of every leaf; the identity, when it is known while tracing, moves nothing."""
    if isinstance(index, np.ndarray) and np.array_equal(index, np.arange(len(index))):
        return tree
    return jax.tree.map(lambda a: a[index], tree)
