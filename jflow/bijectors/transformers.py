"""Elementwise transformers: the scalar maps that coupling (and autoregressive) layers apply to each dimension.

Raw numbers are unconstrained and raw = 0 is the identity, so that a zero-initialised head starts a flow at the identity.
Results are float32 at least, whatever the types of x and raw; the layers cast back.
"""

import jax.numpy as jnp

from jflow._util import float_dtype
from jflow.bijectors import splines
from jflow.types import Elementwise

__all__ = ["affine", "rational_quadratic", "shift"]


def shift() -> Elementwise:
    """y = x + raw: volume preserving. Dinh, Krueger, Bengio, *NICE* (2014)."""

    def forward(x, raw):
        return x + raw[..., 0].astype(float_dtype(x, raw)), jnp.zeros_like(x, dtype=float_dtype(x))

    def inverse(y, raw):
        return y - raw[..., 0].astype(float_dtype(y, raw)), jnp.zeros_like(y, dtype=float_dtype(y))

    return Elementwise(1, forward, inverse)


def affine(max_log_scale: float = 3.0) -> Elementwise:
    """y = x exp(a) + b with a = c tanh(raw_0 / c), b = raw_1, c = `max_log_scale`. Dinh, Sohl-Dickstein, Bengio (2016).

    The scale is bounded both ways, by e^-c and e^c: an unbounded exponential overflows in deep stacks, and a sigmoid,
    which can only contract, caps the density that a stack can reach. One layer of c = 3 can shrink a dimension 20-fold.
    """
    if not max_log_scale > 0:
        raise ValueError(f"affine: expected max_log_scale > 0, got {max_log_scale}")

    def log_scale(raw):
        return max_log_scale * jnp.tanh(raw[..., 0].astype(float_dtype(raw)) / max_log_scale)

    def forward(x, raw):
        a = log_scale(raw)
        return x * jnp.exp(a) + raw[..., 1], a

    def inverse(y, raw):
        a = log_scale(raw)
        return (y - raw[..., 1].astype(a.dtype)) * jnp.exp(-a), -a

    return Elementwise(2, forward, inverse)


def rational_quadratic(bins: int = 8, bound: float = 5.0) -> Elementwise:
    """Rational-quadratic spline on [-bound, bound] with identity tails; see `splines.rational_quadratic`."""
    if not 1 <= bins < splines.MAX_BINS:
        raise ValueError(f"rational_quadratic: expected bins from 1 to {splines.MAX_BINS - 1}, got {bins}")
    if not bound > 0:
        raise ValueError(f"rational_quadratic: expected bound > 0, got {bound}")

    def forward(x, raw):
        return splines.rational_quadratic(x, raw, bound=bound)

    def inverse(y, raw):
        return splines.rational_quadratic_inverse(y, raw, bound=bound)

    return Elementwise(3 * bins - 1, forward, inverse)
