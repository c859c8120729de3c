"""Scalar maps that coupling and autoregressive layers apply to each dimension.

Each function returns an `Elementwise`. Raw numbers are unconstrained and raw = 0 is the identity,
so that a head that starts at zero starts a flow at the identity. Results are float32 at least,
whatever the types of x and raw; the layers cast back.
"""

from collections.abc import Callable, Sequence
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
    "shift_then_scale",
    "sinh_arcsinh",
    "unconstrained_monotone",
]


def shift() -> Elementwise:
    """Add the raw number: y = x + raw, which preserves volume.

    Also known as: additive coupling.

    Returns:
        Elementwise: the map, with 1 raw number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> shift = bijectors.univariate.shift()
        >>> y, log_slope = shift.forward(jnp.array([1.0]), jnp.array([[2.0]]))
        >>> y.tolist(), log_slope.tolist()
        ([3.0], [0.0])

    References:
        Dinh, Krueger, Bengio, *NICE: Non-linear Independent Components Estimation*, 2014,
            arXiv:1410.8516.
    """

    def forward(x, raw):
        return x + raw[..., 0].astype(float_dtype(x, raw)), jnp.zeros_like(x, dtype=float_dtype(x))

    def inverse(y, raw):
        return y - raw[..., 0].astype(float_dtype(y, raw)), jnp.zeros_like(y, dtype=float_dtype(y))

    return Elementwise(1, forward, inverse)


def affine(
    max_log_scale: float = 3.0, *, scale: Callable[[Array], Array] | None = None
) -> Elementwise:
    """Scale and shift a number: y = x exp(a) + b with a bounded log-scale a.

    a = c tanh(raw_0 / c), b = raw_1, c = `max_log_scale`. The scale is bounded both ways, by e^-c
    and e^c: an unbounded exponential overflows in deep stacks, and a sigmoid, which can only
    contract, caps the density that a stack can reach. One layer of c = 3 can shrink a dimension
    20-fold.

    Args:
        max_log_scale: c, the bound on |a|.
        scale: another function raw -> log scale, zero at 0; `bijectors.scales` has four and the
            reason for each. None is `scales.bounded(max_log_scale)`.

    Returns:
        Elementwise: the map, with 2 raw numbers.

    Raises:
        ValueError: max_log_scale is not positive.
        TypeError: scale is not a function.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> affine = bijectors.univariate.affine()
        >>> y, log_slope = affine.forward(jnp.ones(1), jnp.array([[0.0, 5.0]]))
        >>> y.tolist(), log_slope.tolist()
        ([6.0], [0.0])

    References:
        Dinh, Sohl-Dickstein, Bengio, *Density Estimation Using Real NVP*, 2016, arXiv:1605.08803.
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


def shift_then_scale(scale: Callable[[Array], Array] | None = None) -> Elementwise:
    """Shift a number, then scale it: y = (x + b) s, the affine map of Jet.

    b = raw_1, and s = 2 sigmoid(raw_0) is below 2. It reaches the maps of `affine` with the same
    scale; what differs is the size of the shift that a raw number stands for, and so the training.

    Args:
        scale: a function raw -> log s, zero at 0; see `bijectors.scales`. None is
            `scales.sigmoid(2.0)`, as published.

    Returns:
        Elementwise: the map, with 2 raw numbers.

    Raises:
        TypeError: scale is not a function.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> jet = bijectors.univariate.shift_then_scale()
        >>> y, _ = jet.forward(jnp.ones(2), jnp.array([[0.0, 5.0], [1000.0, 5.0]]))
        >>> y.tolist()
        [6.0, 12.0]

    References:
        Kolesnikov, Pinto, Tschannen, *Jet: A Modern Transformer-Based Normalizing Flow*, 2024,
            arXiv:2412.15129.
    """
    scale = scales.sigmoid(2.0) if scale is None else scale
    if not callable(scale):
        raise TypeError(
            f"shift_then_scale: expected scale to be a function raw -> log scale, got {scale!r}"
        )

    def read(raw):
        raw = raw.astype(float_dtype(raw))
        return scale(raw[..., 0]), raw[..., 1]

    def forward(x, raw):
        a, b = read(raw)
        return (x + b) * jnp.exp(a), a

    def inverse(y, raw):
        a, b = read(raw)
        return y * jnp.exp(-a) - b, -a

    return Elementwise(2, forward, inverse)


def sinh_arcsinh() -> Elementwise:
    """Skew a number and change the weight of its tails: y = sinh(d asinh(x) + e) exp(a) + b.

    e skews, d sets the weight of the tails, y ~ |x|^d. Both directions have a closed form. The raw
    numbers are log d (within +-1), e and a (within +-3), b. The paper writes the map data -> normal
    with -e; the bounds are ours.

    Returns:
        Elementwise: the map, with 4 raw numbers.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> scalar = bijectors.univariate.sinh_arcsinh()
        >>> y, log_slope = scalar.forward(jnp.array([2.0]), jnp.array([[0.0, 0.0, 0.0, 1.0]]))
        >>> round(float(y[0]), 3), scalar.size
        (3.0, 4)

    References:
        Jones, Pewsey, *Sinh-arcsinh Distributions*, 2009.
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
    # Near the identity sinh(s + extra) by the addition theorem keeps the digits that sinh(asinh x)
    # loses for large x.
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
    """The map of neural spline flows: a rational-quadratic spline with identity tails.

    The spline is that of [-bound, bound]. See `splines.rational_quadratic` for the formula. Both
    directions have a closed form.

    Also known as: RQS, RQ-NSF spline, neural spline.

    Args:
        bins: the number of bins, from 2 to 999.
        bound: half the side of the box.
        implementation: of couplings, 'xla' or 'pallas' (see `kernels.columns`, whose choice is
            None), or 'plain', the slower reference.

    Returns:
        Elementwise: the map, with 3 * bins - 1 raw numbers.

    Raises:
        ValueError: bins is out of its range, bound is not positive, or implementation is none of
            the four.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> spline = bijectors.univariate.rational_quadratic(4)
        >>> y, log_slope = spline.forward(jnp.array([7.0]), jnp.ones((1, spline.size)))
        >>> spline.size, y.tolist()  # outside [-5, 5] it is the identity
        (11, [7.0])

    References:
        Durkan, Bekasov, Murray, Papamakarios, *Neural Spline Flows*, 2019, arXiv:1906.04032.
    """
    spline = _spline("rational_quadratic", bins, bound, splines.IDENTITY)
    return with_columns(
        spline, partial(kernels.rational_quadratic.transform, bound=float(bound)), implementation
    )


def free_rational_quadratic(bins: int = 8, bound: float = 5.0) -> Elementwise:
    """A rational-quadratic spline on [-bound, bound] whose slopes at the ends are learned.

    Outside it goes on with these slopes, so that a layer can also scale the tails. It is the spline
    of the paper without the pinned ends. See `rational_quadratic` for an example.

    Args:
        bins: the number of bins, from 2 to 999.
        bound: half the side of the box.

    Returns:
        Elementwise: the map, with 3 * bins + 1 raw numbers.

    Raises:
        ValueError: bins is out of its range, or bound is not positive.

    References:
        Durkan, Bekasov, Murray, Papamakarios, *Neural Spline Flows*, 2019, arXiv:1906.04032.
    """
    return _spline("free_rational_quadratic", bins, bound, splines.FREE)


def circular_rational_quadratic(bins: int = 8, bound: float = np.pi) -> Elementwise:
    """A rational-quadratic spline of the circle [-bound, bound].

    The ends stay, with one learned slope for both: f(x + 2 bound) = f(x) + 2 bound. Follow it by
    `circular_shift`, or the ends never move; the conditioner should see angles through
    `nets.Periodic`.

    Also known as: circular spline.

    Args:
        bins: the number of bins, from 2 to 999.
        bound: half the period.

    Returns:
        Elementwise: the map, with 3 * bins raw numbers.

    Raises:
        ValueError: bins is out of its range, or bound is not positive.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> spline = bijectors.univariate.circular_rational_quadratic(4, bound=1.0)
        >>> y, _ = spline.forward(jnp.array([-1.0, 1.0]), jnp.ones((2, spline.size)))
        >>> y.round(3).tolist()
        [-1.0, 1.0]

    References:
        Rezende, Papamakarios, Racanière, et al., *Normalizing Flows on Tori and Spheres*, 2020,
            arXiv:2002.02428.
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
    """Rotate the circle: y = x + raw, wrapped into the period [-bound, bound) that x lies in.

    It is one to one but not monotone.

    Args:
        bound: half the period.

    Returns:
        Elementwise: the map, with 1 raw number.

    Raises:
        ValueError: bound is not positive.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> turn = bijectors.univariate.circular_shift(1.0)
        >>> turn.forward(jnp.array([0.5]), jnp.array([[1.0]]))[0].tolist()
        [-0.5]

    References:
        Rezende, Papamakarios, Racanière, et al., *Normalizing Flows on Tori and Spheres*, 2020,
            arXiv:2002.02428.
    """
    if not bound > 0:
        raise ValueError(f"circular_shift: expected bound > 0, got {bound}")
    bound = float(bound)

    def turn(sign):
        def apply(x, raw):
            x, raw = check_raw("circular_shift", x, raw, 1)
            moved = x + sign * raw[..., 0]
            # whole periods, counted so that x itself decides which period is its own; raw = 0 moves
            # nothing
            periods = jnp.floor((moved + bound) / (2 * bound)) - jnp.floor(
                (x + bound) / (2 * bound)
            )
            return moved - jax.lax.stop_gradient(2 * bound * periods), jnp.zeros_like(x)

        return apply

    return Elementwise(1, turn(1), turn(-1))


def mixed(a: Elementwise, b: Elementwise, mask: Sequence[bool] | np.ndarray) -> Elementwise:
    """Apply one scalar map where a mask is true and another elsewhere.

    It is for circular maps of angles beside linear ones, in one layer. Each number takes the raw
    numbers of the larger of the two; both maps are evaluated everywhere.

    Args:
        a: the map where the mask is true.
        b: the map where it is false.
        mask: a boolean array that broadcasts against the trailing axes of x (of the transformed
            part, in a coupling).

    Returns:
        Elementwise: the map, with max(a.size, b.size) raw numbers.

    Raises:
        TypeError: mask is not boolean.
        ValueError: the mask does not broadcast to x.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> shift, turn = bijectors.univariate.shift(), bijectors.univariate.circular_shift(1.0)
        >>> both = bijectors.univariate.mixed(shift, turn, [True, False])
        >>> both.forward(jnp.array([0.5, 0.5]), jnp.ones((2, 1)))[0].tolist()
        [1.5, -0.5]
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
                    "mixed: expected x that the mask broadcasts to; a mask of shape "
                    f"{list(mask.shape)} does not broadcast "
                    f"to {list(x.shape)}"
                ) from None
            of_a, of_b = (getattr(t, name)(x, raw[..., : t.size]) for t in (a, b))
            return tuple(jnp.where(is_a, p, q) for p, q in zip(of_a, of_b, strict=True))

        return on

    return Elementwise(size, apply("forward"), apply("inverse"))
