"""Rows that are the sites of an event: tokens or pixels that one small network treats alike."""

import jax.numpy as jnp

from jflow.types import Array


def check_features(name: str, x: Array, h: Array) -> Array:
    """h [b, *sites, k]; raise unless its sites are the first axes of the event of x [b, *sites,
    ...]."""
    shape, given = jnp.shape(x), jnp.shape(h)
    if len(given) < 2 or len(given) > len(shape) + 1 or given[:-1] != shape[: len(given) - 1]:
        raise ValueError(
            f"{name}: expected features of shape [b, *sites, k], with the rows of x {list(shape)}"
            f" and its first axes as sites, got {list(given)}"
        )
    return h


def site_rows(x: Array, sites: tuple[int, ...]) -> Array:
    """[b, *sites, ...] -> [b sites, ...], the sites of a row one after another."""
    shape = jnp.shape(x)
    count = 1
    for size in shape[: len(sites) + 1]:
        count *= size
    return jnp.reshape(x, (count, *shape[len(sites) + 1 :]))
