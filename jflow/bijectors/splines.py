"""Monotone rational-quadratic splines, with a choice of what is beyond their box.

Beyond the box a spline is the identity, a line with a learned slope, or a period. In the bin with
width w, height h, slope s = h/w, knot slopes d0 and d1, and u = (x - x_k)/w:

    y     = y_k + h (s u^2 + d0 u (1-u)) / (s + (d0 + d1 - 2 s) u (1-u))
    dy/dx = s^2 (d1 u^2 + 2 s u (1-u) + d0 (1-u)^2) / (s + (d0 + d1 - 2 s) u (1-u))^2

Ours: the caps. A floor on bins and knot slopes does not bound dy/dx, which falls to 2 s^2/d inside
a bin whose knot slopes d are much larger than s; the inverse then loses all digits in float32. So
knot slopes are capped at 10 times the smaller neighboring bin slope, and the two edge bins have a
slope of at least 0.1, so that the slope 1 at the edge obeys the cap too and the tails stay the
identity, once differentiable. Free and circular ends need no such floor: their slopes are learned
and capped like the others.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.arrays import float_dtype
from jflow.kernels.rational_quadratic import (
    CAP,
    EDGE,
    FLOOR,
    SOFTPLUS_OFFSET,
    inverse_in_bin,
    knot_slope,
    value_in_bin,
)
from jflow.types import Array

__all__ = [
    "CIRCULAR",
    "FREE",
    "IDENTITY",
    "Ends",
    "rational_quadratic",
    "rational_quadratic_inverse",
    "rational_quadratic_knots",
]

MAX_BINS = 1000  # where the floors fill the box


class Ends(NamedTuple):
    """What a spline does at the ends of its box.

    `IDENTITY`, `FREE` and `CIRCULAR` are all there are.

    Attributes:
        extra: a spline has 3 * bins + extra raw numbers.
        fixed: whether the slope at the ends is 1 and the map beyond them the identity.
        periodic: whether both ends have one slope and f(x + 2 bound) = f(x) + 2 bound.
    """

    extra: int  # raw numbers: 3 * bins + extra
    fixed: bool  # slope 1 at the ends
    periodic: bool  # one slope for both ends, f(x + 2 bound) = f(x) + 2 bound


IDENTITY = Ends(-1, True, False)  # nflows' and zuko's 'linear' tails
FREE = Ends(1, False, False)  # beyond the box a line that keeps the slope of the end
CIRCULAR = Ends(0, False, True)


def rational_quadratic_knots(
    raw: Float[Array, "... size"], *, bound: float = 5.0, ends: Ends = IDENTITY
) -> tuple[Float[Array, "... knots"], Float[Array, "... knots"], Float[Array, "... knots"]]:
    """Compute the knots and slopes of the spline that raw numbers stand for.

    Args:
        raw: [..., 3 * bins + ends.extra], unconstrained: widths, heights, slopes; raw = 0 is the
            identity.
        bound: half the side of the box.
        ends: `IDENTITY`, `FREE` or `CIRCULAR`.

    Returns:
        A triple (x, y, slopes) at the knots, [..., bins + 1] each.

    Raises:
        ValueError: the last axis of raw fits no number of bins below 1000.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> x, y, slopes = bijectors.splines.rational_quadratic_knots(jnp.zeros(5), bound=1.0)
        >>> x.round(3).tolist(), slopes.round(3).tolist()
        ([-1.0, 0.0, 1.0], [1.0, 1.0, 1.0])
    """
    bins = _bins(raw, ends)
    widths, heights = _bin_sizes(raw, bins, bound, ends)
    slopes = heights / widths
    free = jax.nn.softplus(raw[..., 2 * bins :] + SOFTPLUS_OFFSET) + FLOOR
    first, last = slopes[..., :1], slopes[..., -1:]
    left, right = (last, first) if ends.periodic else (first, last)
    caps = CAP * jnp.minimum(
        jnp.concatenate([left, slopes], -1), jnp.concatenate([slopes, right], -1)
    )
    if ends.fixed:
        one = jnp.ones_like(first)
        free = jnp.concatenate([one, jnp.minimum(free, caps[..., 1:-1]), one], axis=-1)
    else:
        free = jnp.minimum(
            jnp.concatenate([free, free[..., :1]], axis=-1) if ends.periodic else free, caps
        )
    return _edges(widths, bound), _edges(heights, bound), free


def rational_quadratic(
    x: Float[Array, "..."],
    raw: Float[Array, "... size"],
    *,
    bound: float = 5.0,
    ends: Ends = IDENTITY,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Evaluate a monotone rational-quadratic spline: y = f(x) and log dy/dx.

    Args:
        x: [...]; what the map is outside [-bound, bound] is up to `ends`.
        raw: [..., 3 * bins + ends.extra], unconstrained: widths, heights, slopes; raw = 0 is the
            identity.
        bound: half the side of the box.
        ends: `IDENTITY`, `FREE` or `CIRCULAR`.

    Returns:
        A pair (y [...], log_slope [...]), in float32 at least.

    Raises:
        ValueError: the shape of raw does not fit x or any number of bins below 1000, or bound is
            not positive.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> y, log_slope = bijectors.splines.rational_quadratic(jnp.array([0.5]), jnp.zeros((1, 5)))
        >>> y.round(3).tolist()  # raw = 0 is the identity
        [0.5]

    References:
        Durkan, Bekasov, Murray, Papamakarios, *Neural Spline Flows*, 2019, arXiv:1906.04032.
        Gregory, Delbourgo, *Piecewise Rational Quadratic Interpolation to Monotonic Data*, 1982.
    """
    x, raw = _check(x, raw, bound, ends)
    inside, x_safe, beyond = _into_box(x, bound, ends)
    xk, yk, w, h, d0, d1 = _bin_of(x_safe, raw, bound, ends, of_y=False)
    y, log_slope = value_in_bin(x_safe, xk, yk, w, h, d0, d1)
    if ends.periodic:
        return y + beyond, log_slope
    if ends.fixed:
        return jnp.where(inside, y, x), jnp.where(inside, log_slope, 0.0)
    end = jnp.where(x > 0, d1, d0)
    return jnp.where(inside, y, x_safe + end * beyond), jnp.where(inside, log_slope, jnp.log(end))


def rational_quadratic_inverse(
    y: Float[Array, "..."],
    raw: Float[Array, "... size"],
    *,
    bound: float = 5.0,
    ends: Ends = IDENTITY,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Invert a monotone rational-quadratic spline: x = f^-1(y) and log dx/dy.

    The inverse is a root of a quadratic in its stable form (`kernels.rational_quadratic`).

    Args:
        y: [...], what `rational_quadratic` returned.
        raw: [..., 3 * bins + ends.extra], unconstrained: widths, heights, slopes; raw = 0 is the
            identity.
        bound: half the side of the box.
        ends: `IDENTITY`, `FREE` or `CIRCULAR`.

    Returns:
        A pair (x [...], log_slope [...]) with the log-slope of the inverse, in float32 at least.

    Raises:
        ValueError: the shape of raw does not fit y or any number of bins below 1000, or bound is
            not positive.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> raw = jnp.array([[2.0, -1.0, 0.5, 1.0, 3.0]])
        >>> y, _ = bijectors.splines.rational_quadratic(jnp.array([0.5]), raw)
        >>> bijectors.splines.rational_quadratic_inverse(y, raw)[0].round(3).tolist()
        [0.5]
    """
    y, raw = _check(y, raw, bound, ends)
    inside, y_safe, beyond = _into_box(y, bound, ends)
    xk, yk, w, h, d0, d1 = _bin_of(y_safe, raw, bound, ends, of_y=True)
    x, log_slope = inverse_in_bin(y_safe, xk, yk, w, h, d0, d1)
    if ends.periodic:
        return x + beyond, log_slope
    if ends.fixed:
        return jnp.where(inside, x, y), jnp.where(inside, log_slope, 0.0)
    end = jnp.where(y > 0, d1, d0)
    return jnp.where(inside, x, y_safe + beyond / end), jnp.where(inside, log_slope, -jnp.log(end))


def _into_box(x: Array, bound: float, ends: Ends) -> tuple[Array, Array, Array]:
    """Whether x lies inside the box, a point of the box to evaluate the spline at, and what is left
    of x.
    """
    inside = jnp.abs(x) < bound
    if ends.fixed:
        x_safe = jnp.where(inside, x, 0.0)
        return inside, x_safe, x - x_safe
    if ends.periodic:
        turns = jax.lax.stop_gradient(2 * bound * jnp.floor((x + bound) / (2 * bound)))
        return inside, x - turns, turns
    x_safe = jnp.where(inside, x, jnp.where(x > 0, bound, -bound))
    return inside, x_safe, x - x_safe


def _size(ends: Ends) -> str:
    return "3*bins" + (
        f" {ends.extra:+d}".replace("-", "- ").replace("+", "+ ") if ends.extra else ""
    )


def _bins(raw: Array, ends: Ends) -> int:
    bins, rest = divmod(raw.shape[-1] - ends.extra, 3)
    if rest or bins < 1:
        raise ValueError(
            f"rational_quadratic: expected raw of shape [..., {_size(ends)}], got {list(raw.shape)}"
        )
    if bins >= MAX_BINS:
        raise ValueError(f"rational_quadratic: expected fewer than {MAX_BINS} bins, got {bins}")
    return bins


def _check(x: Array, raw: Array, bound: float, ends: Ends) -> tuple[Array, Array]:
    if jnp.shape(x) != raw.shape[:-1]:
        raise ValueError(
            f"rational_quadratic: expected raw of shape {[*jnp.shape(x), _size(ends)]} for x of "
            "shape "
            f"{list(jnp.shape(x))}, got {list(raw.shape)}"
        )
    if not bound > 0:
        raise ValueError(f"rational_quadratic: expected bound > 0, got {bound}")
    dtype = float_dtype(x, raw)
    return jnp.asarray(x, dtype), raw.astype(dtype)


def _bin_sizes(raw: Array, bins: int, bound: float, ends: Ends) -> tuple[Array, Array]:
    """Widths and heights [..., bins]; each sums to 2*bound and none is below the floor.

    With fixed ends the edge bins have slope >= 0.1, and heights may be nine tenths of the floor.
    """
    sizes = (
        2
        * bound
        * (
            FLOOR
            + (1 - FLOOR * bins)
            * jax.nn.softmax(raw[..., : 2 * bins].reshape(*raw.shape[:-1], 2, bins))
        )
    )
    widths, heights = sizes[..., 0, :], sizes[..., 1, :]
    if not ends.fixed or bins == 1:
        return widths, heights
    # Edge heights are pulled a tenth of the way to the widths; the inner bins make up for the sum.
    edge_widths = widths[..., 0] + widths[..., -1]
    edge_heights = heights[..., 0] + heights[..., -1]
    inner = 2 * bound - edge_heights
    scale = 1.0 if bins == 2 else (1 + EDGE * (edge_heights - edge_widths) / inner)[..., None]
    is_edge = jnp.zeros(bins, bool).at[jnp.array([0, -1])].set(True)
    is_edge = is_edge.reshape((1,) * (raw.ndim - 1) + (bins,))
    return widths, jnp.where(is_edge, EDGE * widths + (1 - EDGE) * heights, scale * heights)


def _edges(sizes: Array, bound: float) -> Array:
    """Knots from -bound to bound, the last one exact."""
    inner = jnp.cumsum(sizes[..., :-1], axis=-1) - bound
    end = jnp.full_like(sizes[..., :1], bound)
    return jnp.concatenate([-end, inner, end], axis=-1)


def _bin_of(x: Array, raw: Array, bound: float, ends: Ends, *, of_y: bool):
    """(x_k, y_k, width, height, left slope, right slope) of the bin that holds x (or y).

    The numbers of `rational_quadratic_knots`, but the bin is found first and only its two knot
    slopes are computed: on a CPU a training step of a spline flow takes two thirds of the time.
    """
    bins = _bins(raw, ends)
    widths, heights = _bin_sizes(raw, bins, bound, ends)
    lefts, bottoms = (
        jnp.cumsum(widths, axis=-1) - widths - bound,
        jnp.cumsum(heights, axis=-1) - heights - bound,
    )
    knots = bottoms if of_y else lefts
    k = jnp.sum(x[..., None] >= knots[..., 1:], axis=-1, keepdims=True)

    def pick(values, index):
        return jnp.take_along_axis(values, jnp.clip(index, 0, values.shape[-1] - 1), axis=-1)[
            ..., 0
        ]

    w, h = pick(widths, k), pick(heights, k)

    def slope_at(knot, neighbor):
        """Of knot number `knot`, between this bin and `neighbor`."""
        if ends.periodic:
            knot, neighbor = knot % bins, neighbor % bins
        other = pick(heights, neighbor) / pick(widths, neighbor)
        slope = knot_slope(pick(raw, 2 * bins - ends.fixed + knot), h / w, other)
        is_end = (knot[..., 0] == 0) | (knot[..., 0] == bins)
        return jnp.where(is_end, 1.0, slope) if ends.fixed else slope

    return pick(lefts, k), pick(bottoms, k), w, h, slope_at(k, k - 1), slope_at(k + 1, k + 1)
