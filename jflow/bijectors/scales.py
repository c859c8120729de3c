"""Scale functions for `univariate.affine`: raw [...] -> log scale [...], zero at raw = 0.

They differ in what happens to a saturated raw number. The log is what flows add up, so it is what
they return.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow.types import Array

__all__ = ["bounded", "exponential", "sigmoid", "softplus"]


def bounded(limit: float = 3.0) -> Callable[[Array], Array]:
    """A scale that is bounded both ways, the default: log scale = c tanh(raw / c).

    No stack overflows, and every layer can be inverted in float32. c = 3 allows 20-fold scales
    either way.

    Args:
        limit: c, the bound on |log scale|.

    Returns:
        The function raw [...] -> log scale [...].

    Raises:
        ValueError: limit is not positive.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijectors.scales.bounded(3.0)(jnp.array([0.0, 1000.0])).tolist()
        [0.0, 3.0]
    """
    if not limit > 0:
        raise ValueError(f"scales.bounded: expected limit > 0, got {limit}")
    limit = float(limit)  # and no number of numpy's, which would bring float64 along

    def log_scale(raw):
        return limit * jnp.tanh(raw / limit)

    return log_scale


def exponential(raw: Float[Array, "..."]) -> Float[Array, "..."]:
    """A scale without bounds, exp(raw): the plain form of MAF and IAF.

    The gradient in the log is constant. One large raw number overflows; it is for shallow flows on
    standardized data, and for equal parameters with other libraries.

    Args:
        raw: the raw numbers, [...].

    Returns:
        The log scale [...], which is raw.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijectors.scales.exponential(jnp.array([2.0])).tolist()
        [2.0]
    """
    return raw


def sigmoid(top: float = 2.0) -> Callable[[Array], Array]:
    """A scale that is bounded above: scale = top sigmoid(raw + log 1/(top - 1)), below `top`.

    It bounds expansion, not contraction, so that the direction data -> noise cannot blow up; top =
    2 is the scale of Jet.

    Args:
        top: the upper bound of the scale, above 1.

    Returns:
        The function raw [...] -> log scale [...].

    Raises:
        ValueError: top is not above 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> jnp.exp(bijectors.scales.sigmoid(2.0)(jnp.array([0.0, 1000.0]))).round(3).tolist()
        [1.0, 2.0]

    References:
        Kolesnikov, Pinto, Tschannen, *Jet: A Modern Transformer-Based Normalizing Flow*, 2024,
            arXiv:2412.15129.
    """
    if not top > 1:
        raise ValueError(f"scales.sigmoid: expected top > 1 (scale 1 at raw = 0), got {top}")

    def log_scale(raw):
        return math.log(top) + jax.nn.log_sigmoid(raw - math.log(top - 1))

    return log_scale


def softplus(floor: float = 1e-3) -> Callable[[Array], Array]:
    """A scale that grows linearly: scale = floor + softplus(raw + offset), 1 at raw = 0.

    It grows linearly instead of exponentially, so that a large raw number is a large scale and not
    an overflow; it is never below `floor`.

    Args:
        floor: the lower bound of the scale, in (0, 1).

    Returns:
        The function raw [...] -> log scale [...].

    Raises:
        ValueError: floor is not in (0, 1).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> log_scale = bijectors.scales.softplus(0.5)(jnp.array([0.0, -1000.0]))
        >>> jnp.exp(log_scale).round(3).tolist()
        [1.0, 0.5]
    """
    if not 0 < floor < 1:
        raise ValueError(f"scales.softplus: expected 0 < floor < 1, got {floor}")
    floor = float(floor)
    offset = math.log(math.expm1(1 - floor))

    def log_scale(raw):
        return jnp.log(floor + jax.nn.softplus(raw + offset))

    return log_scale
