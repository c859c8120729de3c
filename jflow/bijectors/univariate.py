"""Elementwise transformers: the scalar maps that coupling (and autoregressive) layers apply to each dimension.

Raw numbers are unconstrained and raw = 0 is the identity, so that a zero-initialized head starts a flow at the identity.
Results are float32 at least, whatever the types of x and raw; the layers cast back.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jflow import kernels
from jflow._core.arrays import float_dtype
from jflow._core.checks import check_raw, check_whole
from jflow.bijectors import scales, splines
from jflow.bijectors._monotone import deep_sigmoidal, logistic_mixture, unconstrained_monotone
from jflow.kernels.columns import with_columns
from jflow.types import Array, Elementwise

__all__ = [
    "affine",
    "circular_rational_quadratic",
    "circular_shift",
    "deep_sigmoidal",
    "free_rational_quadratic",
    "logistic_mixture",
    "mixed",
    "rational_quadratic",
    "shift",
    "sinh_arcsinh",
    "unconstrained_monotone",
]


def shift() -> Elementwise:
    """y = x + raw: volume preserving. Dinh, Krueger, Bengio, *NICE* (2014)."""

    def forward(x, raw):
        return x + raw[..., 0].astype(float_dtype(x, raw)), jnp.zeros_like(x, dtype=float_dtype(x))

    def inverse(y, raw):
        return y - raw[..., 0].astype(float_dtype(y, raw)), jnp.zeros_like(y, dtype=float_dtype(y))

    return Elementwise(1, forward, inverse)


def affine(
    max_log_scale: float = 3.0, *, scale: Callable[[Array], Array] | None = None
) -> Elementwise:
    """y = x exp(a) + b with a = c tanh(raw_0 / c), b = raw_1, c = `max_log_scale`. Dinh, Sohl-Dickstein, Bengio (2016).

    The scale is bounded both ways, by e^-c and e^c: an unbounded exponential overflows in deep stacks, and a sigmoid,
    which can only contract, caps the density that a stack can reach. One layer of c = 3 can shrink a dimension 20-fold.
    `scale` replaces it by another function raw -> log scale, zero at 0: `scales` has four and the reason for each.
    """
    if not max_log_scale > 0:
        raise ValueError(f"affine: expected max_log_scale > 0, got {max_log_scale}")
    scale = scales.bounded(max_log_scale) if scale is None else scale
    if not callable(scale):
        raise TypeError(f"affine: expected scale to be a function raw -> log scale, got {scale!r}")

    def log_scale(raw):
        return scale(raw[..., 0].astype(float_dtype(raw)))

    def forward(x, raw):
        a = log_scale(raw)
        return x * jnp.exp(a) + raw[..., 1], a

    def inverse(y, raw):
        a = log_scale(raw)
        return (y - raw[..., 1].astype(a.dtype)) * jnp.exp(-a), -a

    return Elementwise(2, forward, inverse)


def sinh_arcsinh() -> Elementwise:
    """y = sinh(d asinh(x) + e) exp(a) + b: e skews, d sets the weight of the tails, y ~ |x|^d. Closed form both ways.

    Raw numbers: log d (within +-1), e and a (within +-3), b. Jones, Pewsey, *Sinh-arcsinh distributions* (2009), who write
    the map data -> normal with -e.
    """
    tail, bounded = scales.bounded(1.0), scales.bounded(3.0)

    def read(x, raw):
        x, raw = check_raw("sinh_arcsinh", x, raw, 4)
        return x, tail(raw[..., 0]), bounded(raw[..., 1]), bounded(raw[..., 2]), raw[..., 3]

    def forward(x, raw):
        x, log_d, e, a, b = read(x, raw)
        y, log_slope = _sinh_arcsinh(x, log_d, e)
        return y * jnp.exp(a) + b, log_slope + a

    def inverse(y, raw):
        y, log_d, e, a, b = read(y, raw)
        x, log_slope = _sinh_arcsinh((y - b) * jnp.exp(-a), -log_d, -e * jnp.exp(-log_d))
        return x, log_slope - a

    return Elementwise(4, forward, inverse)


def _sinh_arcsinh(x: Array, log_d: Array, e: Array) -> tuple[Array, Array]:
    """sinh(d asinh(x) + e) and the log of its slope d cosh(d asinh(x) + e) / cosh(asinh(x))."""
    s = jnp.arcsinh(x)
    extra = jnp.expm1(log_d) * s + e  # u = s + extra
    u = s + extra
    # Near the identity sinh(s + extra) by the addition theorem keeps the digits that sinh(asinh x) loses for large x.
    near = jnp.abs(extra) < 1
    small = jnp.where(near, extra, 0.0)
    close = x * jnp.cosh(small) + jnp.hypot(x, 1.0) * jnp.sinh(small)
    return jnp.where(near, close, jnp.sinh(u)), log_d + _log_cosh(u) - _log_cosh(s)


def _log_cosh(u: Array) -> Array:
    """log(2 cosh u)"""
    return jnp.logaddexp(u, -u)


def rational_quadratic(
    bins: int = 8, bound: float = 5.0, *, implementation: str | None = None
) -> Elementwise:
    """Rational-quadratic spline on [-bound, bound] with identity tails; see `splines.rational_quadratic`.

    implementation: of couplings, 'xla' or 'pallas' (see `kernels.columns`, whose choice is None), or 'plain', the slower
        reference.
    """
    spline = _spline("rational_quadratic", bins, bound, splines.IDENTITY)
    return with_columns(
        spline, partial(kernels.rational_quadratic.transform, bound=float(bound)), implementation
    )


def free_rational_quadratic(bins: int = 8, bound: float = 5.0) -> Elementwise:
    """Rational-quadratic spline on [-bound, bound] whose slopes at the ends are learned; outside it goes on with them,
    so that a layer can also scale the tails. Durkan et al. (2019), without the pinned ends."""
    return _spline("free_rational_quadratic", bins, bound, splines.FREE)


def circular_rational_quadratic(bins: int = 8, bound: float = np.pi) -> Elementwise:
    """Rational-quadratic spline of the circle [-bound, bound]: the ends stay, with one learned slope for both.

    f(x + 2 bound) = f(x) + 2 bound. Follow it by `circular_shift`, or the ends never move; the conditioner should see
    angles through `nets.Periodic`. Rezende et al., *Normalizing flows on tori and spheres* (2020).
    """
    return _spline("circular_rational_quadratic", bins, bound, splines.CIRCULAR)


def _spline(name: str, bins: int, bound: float, ends: splines.Ends) -> Elementwise:
    check_whole(name, least=2, bins=bins)
    if bins >= splines.MAX_BINS:
        raise ValueError(f"{name}: expected bins from 2 to {splines.MAX_BINS - 1}, got {bins}")
    if not bound > 0:
        raise ValueError(f"{name}: expected bound > 0, got {bound}")
    bound = float(bound)  # and no number of numpy's, which would bring float64 along

    def forward(x, raw):
        return splines.rational_quadratic(x, raw, bound=bound, ends=ends)

    def inverse(y, raw):
        return splines.rational_quadratic_inverse(y, raw, bound=bound, ends=ends)

    return Elementwise(3 * bins + ends.extra, forward, inverse)


def circular_shift(bound: float = np.pi) -> Elementwise:
    """y = x + raw, wrapped into the period [-bound, bound) that x lies in: a rotation of the circle, one to one but not
    monotone. Rezende et al. (2020)."""
    if not bound > 0:
        raise ValueError(f"circular_shift: expected bound > 0, got {bound}")
    bound = float(bound)

    def turn(sign):
        def apply(x, raw):
            x, raw = check_raw("circular_shift", x, raw, 1)
            moved = x + sign * raw[..., 0]
            # whole periods, counted so that x itself decides which period is its own; raw = 0 moves nothing
            periods = jnp.floor((moved + bound) / (2 * bound)) - jnp.floor(
                (x + bound) / (2 * bound)
            )
            return moved - jax.lax.stop_gradient(2 * bound * periods), jnp.zeros_like(x)

        return apply

    return Elementwise(1, turn(1), turn(-1))


def mixed(a: Elementwise, b: Elementwise, mask) -> Elementwise:
    """`a` where the boolean `mask` is true, `b` elsewhere: circular tails for angles beside linear ones, in one layer.

    `mask` broadcasts against the trailing axes of x (of the transformed part, in a coupling). Each number takes the raw
    numbers of the larger of the two; both maps are evaluated everywhere.
    """
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"mixed: expected a boolean mask, got {mask.dtype}")
    size = max(a.size, b.size)

    def apply(name):
        def on(x, raw):
            x, raw = check_raw("mixed", x, raw, size)
            try:
                is_a = np.broadcast_to(mask, x.shape)
            except ValueError:
                raise ValueError(
                    f"mixed: expected x that the mask broadcasts to; a mask of shape {list(mask.shape)} does not broadcast "
                    f"to {list(x.shape)}"
                ) from None
            of_a, of_b = (getattr(t, name)(x, raw[..., : t.size]) for t in (a, b))
            return tuple(jnp.where(is_a, p, q) for p, q in zip(of_a, of_b, strict=True))

        return on

    return Elementwise(size, apply("forward"), apply("inverse"))
