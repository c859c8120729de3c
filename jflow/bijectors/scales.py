"""Scale functions for `univariate.affine`: raw [...] -> log scale [...], zero at raw = 0.

They differ in what happens to a saturated raw number. The log is what flows add up, so it is what they return.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow.types import Array

__all__ = ["bounded", "exponential", "sigmoid", "softplus"]


def bounded(limit: float = 3.0) -> Callable[[Array], Array]:
    """log scale = c tanh(raw / c), within +-c = `limit`: no stack overflows and every layer can be inverted in float32;
    the default. c = 3 allows 20-fold scales either way."""
    if not limit > 0:
        raise ValueError(f"scales.bounded: expected limit > 0, got {limit}")
    limit = float(limit)  # and no number of numpy's, which would bring float64 along

    def log_scale(raw):
        return limit * jnp.tanh(raw / limit)

    return log_scale


def exponential(raw: Array) -> Array:
    """scale = exp(raw): the plain form of MAF and IAF, with constant gradient in the log. One large raw number overflows;
    for shallow flows on standardized data, and for equal parameters with other libraries."""
    return raw


def sigmoid(top: float = 2.0) -> Callable[[Array], Array]:
    """scale = top sigmoid(raw + log 1/(top - 1)), below `top`: it bounds expansion, not contraction, so that the direction
    data -> noise cannot blow up; top = 2 is the scale of Kolesnikov, Pinto, Tschannen, *Jet* (2024)."""
    if not top > 1:
        raise ValueError(f"scales.sigmoid: expected top > 1 (scale 1 at raw = 0), got {top}")

    def log_scale(raw):
        return math.log(top) + jax.nn.log_sigmoid(raw - math.log(top - 1))

    return log_scale


def softplus(floor: float = 1e-3) -> Callable[[Array], Array]:
    """scale = floor + softplus(raw + offset), 1 at raw = 0: grows linearly instead of exponentially, so that a large raw
    number is a large scale and not an overflow; never below `floor`."""
    if not 0 < floor < 1:
        raise ValueError(f"scales.softplus: expected 0 < floor < 1, got {floor}")
    floor = float(floor)
    offset = math.log(math.expm1(1 - floor))

    def log_scale(raw):
        return jnp.log(floor + jax.nn.softplus(raw + offset))

    return log_scale
