"""What the losses share: reading a batch, and the weighted mean over its rows."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jflow._util import check_batch, check_cond, check_x, float_dtype
from jflow.types import Array, PyTree


def read(name: str, batch: Mapping[str, PyTree], allowed: tuple[str, ...]) -> tuple:
    """The values of `allowed` in a batch, None where absent, after a check of keys, types and rows; a single row of cond
    is repeated. 'x' is required."""
    check_batch(name, batch)
    unknown = sorted(set(batch) - set(allowed))
    if unknown:
        raise ValueError(f"{name}: unknown keys in batch: {unknown}; allowed are {list(allowed)}")
    check_x(name, batch)
    x, x0, weight = batch["x"], batch.get("x0"), batch.get("weight")
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(
            f"{name}: expected 'x' of a floating type, got {jnp.result_type(x)}: dequantize or scale it first"
        )
    if x0 is not None and jnp.shape(x0) != jnp.shape(x):
        raise ValueError(f"{name}: expected 'x0' of the shape of 'x', {list(jnp.shape(x))}, got {list(jnp.shape(x0))}")
    if weight is not None and jnp.shape(weight) != (jnp.shape(x)[0],):
        raise ValueError(f"{name}: expected 'weight' of shape [{jnp.shape(x)[0]}], got {list(jnp.shape(weight))}")
    batch = {**batch, "cond": check_cond(name, batch.get("cond"), jnp.shape(x)[0])}
    return tuple(jax.tree.map(jnp.asarray, batch.get(key)) for key in allowed)


def mean_of_rows(loss: Array, weight: Array | None) -> Array:
    """sum(w loss) / sum(w) over rows [b], in float32 or better; raise where there is not one number a row."""
    if loss.ndim != 1 or (weight is not None and weight.shape != loss.shape):
        raise ValueError(f"expected a loss of shape [b], a number for each row, got {list(loss.shape)}")
    loss = loss.astype(float_dtype(loss))
    if weight is None:
        return jnp.mean(loss)
    weight = weight.astype(loss.dtype)
    return jnp.sum(weight * loss) / jnp.sum(weight)
