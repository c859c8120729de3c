"""Coordinates: from the support of a prior to the reals, and numbers of order one."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow.types import Array

_STATISTICS = 5000  # rows that medians are taken of


def to_real(low, high, theta) -> tuple[Array, Array]:
    """(u [b, d], log |du / dtheta| [b]) of theta inside the support.

    On an interval u is the normal quantile of where theta lies in it, so that a uniform prior
    becomes a standard normal; on a half line u is a log.
    """
    low, high = low[None], high[None]
    box, below, above = kinds(low, high)
    width = np.where(box, high - low, 1.0).astype(np.float32)
    from_low = jnp.where(box | below, theta - np.where(box | below, low, 0), 1.0)
    from_high = jnp.where(box | above, np.where(box | above, high, 0) - theta, 1.0)
    share = jnp.clip(jnp.minimum(from_low, from_high) / width, 1e-30, 0.5)
    side = jnp.where(from_low < from_high, 1.0, -1.0)
    quantile = jax.scipy.special.ndtri(share)
    near = jnp.maximum(jnp.where(below, from_low, from_high), 1e-30)
    u = jnp.where(below, jnp.log(near), jnp.where(above, -jnp.log(near), theta))
    u = jnp.where(box, side * quantile, u)
    log_slope = jnp.where(below | above, -jnp.log(near), 0.0)
    log_slope = jnp.where(
        box, -jnp.log(width) + 0.5 * (quantile**2 + math.log(2 * math.pi)), log_slope
    )
    return u, log_slope.sum(-1)


def from_real(low, high, u) -> Array:
    """theta of u, the inverse of `to_real`."""
    low, high = low[None], high[None]
    box, below, above = kinds(low, high)
    width = np.where(box, high - low, 1.0).astype(np.float32)
    first, last = np.where(box | below, low, 0.0), np.where(box | above, high, 0.0)
    share = width * jax.scipy.special.ndtr(-jnp.abs(u))
    theta = jnp.where(u < 0, first + share, last - share)
    apart = jnp.exp(jnp.where(below, u, jnp.where(above, -u, 0.0)))
    half = jnp.where(below, first + apart, last - apart)
    theta = jnp.where(box, theta, jnp.where(below | above, half, u))
    return jnp.clip(theta, low, high)


def kinds(low, high):
    finite = np.isfinite(low), np.isfinite(high)
    return finite[0] & finite[1], finite[0] & ~finite[1], finite[1] & ~finite[0]


def middle_of(low, high) -> np.ndarray:
    """A theta inside the support."""
    box, below, above = kinds(low, high)
    ends = np.where(np.isfinite(low), low, 0), np.where(np.isfinite(high), high, 0)
    middle = np.where(box, (ends[0] + ends[1]) / 2, np.where(below, ends[0] + 1, ends[1] - 1))
    return np.where(box | below | above, middle, 0.0).astype(np.float32)


def location_and_scale(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Median, and interquartile range over that of a normal, of each number; rows [n, *event].

    Where the middle half does not vary the standard deviation counts, and 1 where nothing varies.
    """
    rows = rows[:_STATISTICS].astype(np.float64)
    first, middle, last = np.quantile(rows, [0.25, 0.5, 0.75], axis=0)
    scale, spread = (last - first) / 1.349, rows.std(0)
    scale = np.where(scale > 1e-6 * spread, scale, spread)
    return {
        "location": middle.astype(np.float32),
        "scale": np.where(scale > 0, scale, 1.0).astype(np.float32),
    }


def encode_x(scaling, x, numpy=jnp) -> Any:
    """x in robust standard deviations, and in their logs beyond a few of them."""
    return numpy.arcsinh((x - scaling["location"][None]) / scaling["scale"][None])
