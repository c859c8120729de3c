"""Rows that are the sites of an event: tokens or pixels that one small network treats alike."""

import math
from typing import NamedTuple

import jax.numpy as jnp

from jflow.types import ApplyField, Array, InitField, Velocity


class Headed(NamedTuple):
    """A backbone, evaluated once a point, and a head, evaluated often on the features of it.

    Params are {'backbone', 'head'}. `headed` makes one of two networks; any functions of this form
    do, such as a closed form in a test.

    Attributes:
        init: `init(key, x, t, cond=None) -> params`; x [b, *event], t [b].
        features: `features(params, x, t, cond=None, *, key=None) -> h [b, *sites, k]`, where the
            sites are the first axes of the event, or none of them: [b, n, k] for the tokens of x
            [b, n, d], [b, k] for one feature of all of x. A key switches dropout on.
        velocity: a `Velocity` of one site: y [rows, *rest], s [rows] and cond h [rows, k], where
            rest is the event without its sites: [d] for the tokens of x [b, n, d]. It takes all of
            params, of which it reads 'head'.
    """

    init: InitField
    features: ApplyField
    velocity: Velocity


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
    count = math.prod(shape[: len(sites) + 1])
    return jnp.reshape(x, (count, *shape[len(sites) + 1 :]))
