"""The rational-quadratic spline with identity tails as a kernel.

Its reference is `bijectors.splines`. The formulas are there. The 3*bins - 1 raw numbers are read
once, for the exponentials of the two softmaxes. The bin is found by comparing x with running sums,
and comparisons with its index select its corner, its sizes and those of its neighbors: gathers are
slow. The gradient goes back the same way: through the few numbers of the bin by automatic
differentiation, from there to all raw numbers in closed form, since of all bin sizes those left of
x move the corner of its bin, and three more its shape.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow.kernels.columns import Column, choice, each, exponentials, run
from jflow.types import Array

__all__ = ["choice", "transform"]

FLOOR = 1e-3  # of the box for bins, of the unit slope for knot slopes
CAP = 10.0  # knot slope over the smaller neighboring bin slope
EDGE = 0.1  # least slope of the first and the last bin
SOFTPLUS_OFFSET = math.log(math.expm1(1 - FLOOR))  # softplus(0 + offset) + floor = 1


def transform(
    x: Array,
    raw: Array,
    *,
    bound: float = 5.0,
    inverse: bool = False,
    implementation: str | None = None,
    reference: Callable | None = None,
) -> tuple[Float[Array, "d n"], Float[Array, " n"]]:
    """Map columns of numbers by rational-quadratic splines, and add up their log-slopes.

    It is the map of `splines.rational_quadratic`, or of its inverse, whose raw has the same numbers
    along its last axis.

    Args:
        x: the numbers, [d, n]: the d numbers of n rows, see `kernels.columns`.
        raw: their raw numbers, [3 * bins - 1, d, n], of the type of x.
        bound: half the side of the box, outside of which the map is the identity.
        inverse: whether the inverse is evaluated.
        implementation: 'xla', 'pallas' or None, as in `columns.run`.
        reference: the same function of (x, raw), which forward mode differentiates, as in
            `columns.run`.

    Returns:
        A pair (y [d, n], log |dy/dx| summed over d [n]), in nats.

    Raises:
        ValueError: x or raw has another shape, or implementation is none of the three.
        TypeError: x and raw differ in type, or are no floats.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import kernels
        >>> transform = kernels.rational_quadratic.transform
        >>> y, log_det = transform(jnp.ones((1, 3)), jnp.zeros((5, 1, 3)))
        >>> y.round(3).tolist()  # raw = 0 is the identity
        [[1.0, 1.0, 1.0]]
    """
    bins, rest = divmod(raw.shape[0] + 1, 3)
    if rest or bins < 1:
        raise ValueError(
            "kernels.rational_quadratic: expected raw of shape [3*bins - 1, d, n], got "
            f"{list(raw.shape)}"
        )
    return run(column(bins, bound, inverse), x, raw, implementation, reference)


def value_in_bin(x, xk, yk, w, h, d0, d1):
    """y and log dy/dx at x of the bin with corner (xk, yk), width w, height h and knot slopes d0,
    d1.
    """
    r, log_slope = value_in_unit((x - xk) / w, h / w, d0, d1)
    return yk + h * r, log_slope


def inverse_in_bin(y, xk, yk, w, h, d0, d1):
    """x and log dx/dy at y."""
    u, log_slope = inverse_in_unit((y - yk) / h, h / w, d0, d1)
    return xk + w * u, log_slope


def value_in_unit(u, s, d0, d1):
    """r = (y - yk)/h and log dy/dx at u = (x - xk)/w of a bin of slope s = h/w."""
    u = to_unit(u)
    v = u * (1 - u)
    denominator = s + (d0 + d1 - 2 * s) * v
    return (s * u * u + d0 * v) / denominator, _log_slope(u, v, s, d0, d1, denominator)


def inverse_in_unit(r, s, d0, d1):
    """u and log dx/dy at r.

    The root is u = 2 c / (-b - sqrt(b^2 - 4 a c)), the form without cancellation, with
    a = (s - d0) + r (d0 + d1 - 2 s), b = d0 - r (d0 + d1 - 2 s), c = -s r.
    """
    r = to_unit(r)
    e = r * (d0 + d1 - 2 * s)
    a, b, c = s - d0 + e, d0 - e, -s * r
    # The discriminant is positive in exact arithmetic; its floor keeps the root differentiable when
    # rounding is not.
    root = jnp.sqrt(jnp.maximum(b * b - 4 * a * c, jnp.finfo(b.dtype).tiny))
    u = to_unit(2 * c / (-b - root))
    v = u * (1 - u)
    return u, -_log_slope(u, v, s, d0, d1, s + (d0 + d1 - 2 * s) * v)


def to_unit(u):
    """u within [0, 1], which only rounding leaves.

    The derivative stays 1, where clipping would halve it at a knot.
    """
    return u + jax.lax.stop_gradient(jnp.clip(u, 0.0, 1.0) - u)


def _log_slope(u, v, s, d0, d1, denominator):
    numerator = d1 * u * u + 2 * s * v + d0 * (1 - u) * (1 - u)
    ratio = s / denominator
    return jnp.log(ratio * ratio * numerator)


def knot_slope(raw, slope, neighbor):
    """Of the knot between bins of the slopes `slope` and `neighbor`."""
    raw = raw + SOFTPLUS_OFFSET
    softplus = jnp.maximum(raw, 0) + jnp.log(
        1 + jnp.exp(-jnp.abs(raw))
    )  # the floor hides what log1p would add
    return jnp.minimum(softplus + FLOOR, CAP * jnp.minimum(slope, neighbor))


def column(bins: int, bound: float, inverse: bool) -> Column:
    """The spline as a `Column` of 3*bins - 1 raw numbers."""
    floor, span = 2 * bound * FLOOR, 2 * bound * (1 - FLOOR * bins)
    last = bins - 1
    edge_weight = EDGE if bins > 1 else 0.0  # of the width in the height of an edge bin

    def find(x, raw):
        """The bin of x, as a `_Bin`."""
        widths, heights = exponentials(raw[:bins]), exponentials(raw[bins : 2 * bins])
        units = span / _total(widths), span / _total(heights)
        w_ends, plain_ends = (
            [floor + units[i] * rows[j] for j in (0, last)]
            for i, rows in enumerate((widths, heights))
        )
        # The inner heights make up for what the edge bins, drawn towards their widths, take of the
        # box.
        middle = 2 * bound - sum(plain_ends) if bins > 2 else jnp.ones_like(x)
        scale = (
            1 + edge_weight * (sum(plain_ends) - sum(w_ends)) / middle
            if bins > 2
            else jnp.ones_like(x)
        )
        first = edge_weight * w_ends[0] + (1 - edge_weight) * plain_ends[0]

        def corner(k, first, scale, unit, inner):
            """Knot k > 0, `inner` being the sum of the exponentials of the bins between the first
            one and the knot.
            """
            return first + scale * ((k - 1) * floor + unit * inner) - bound

        def near(rows, unit):
            """The exponentials between the first bin and bin k, and the sizes of bin k, k - 1 and k
            + 1, heights before the edges are mixed.
            """
            zero, one = jnp.zeros_like(k), jnp.ones_like(k)
            inner, here, before, after = zero, rows[0], one, rows[1] if last else one
            for j in range(1, bins):
                if j > 1:
                    inner = inner + jnp.where(k >= j, rows[j - 1], 0.0)
                here, before = (
                    jnp.where(k >= j, rows[j], here),
                    jnp.where(k >= j, rows[j - 1], before),
                )
                after = jnp.where(k >= j, rows[j + 1] if j < last else 1.0, after)
            return inner, (floor + here * unit, floor + before * unit, floor + after * unit)

        axes = [(w_ends[0], 1.0, units[0]), (first, scale, units[1])]
        searched = heights if inverse else widths
        squared = inner = jnp.zeros_like(x)
        for j in range(1, bins):
            inner = inner + searched[j - 1] if j > 1 else inner
            squared = squared + jnp.where(x >= corner(j, *axes[inverse], inner), 2 * j - 1.0, 0.0)
        # 1 + 3 + ... + (2 k - 1) = k^2. XLA's CPU backend stores a root or a quotient that several
        # loops need. Sums and comparisons it computes again in each, rounded in another way, and
        # the loops would disagree on the bin.
        k = jnp.floor(jnp.sqrt(squared) + 0.5)

        def mix_edge(j, width, height):
            is_edge = (j == 0) | (j == last)
            return jnp.where(
                is_edge, edge_weight * width + (1 - edge_weight) * height, scale * height
            )

        (w_inner, ws), (h_inner, plain) = near(widths, units[0]), near(heights, units[1])
        hs = [mix_edge(k + i, w, h) for i, w, h in zip((0, -1, 1), ws, plain, strict=True)]
        xk = jnp.where(k == 0, -bound, corner(k, *axes[0], w_inner))
        yk = jnp.where(k == 0, -bound, corner(k, *axes[1], h_inner))
        raw0, raw1 = jnp.zeros_like(k), raw[2 * bins] if last else jnp.zeros_like(k)
        for j in range(1, bins):
            raw0 = jnp.where(k >= j, raw[2 * bins + j - 1], raw0)
            raw1 = jnp.where(k >= j, raw[2 * bins + j], raw1) if j < last else raw1
        return _Bin(
            k,
            xk,
            yk,
            ws,
            hs,
            (raw0, raw1),
            widths,
            heights,
            units,
            w_ends,
            plain_ends,
            first,
            middle,
            scale,
        )

    def in_unit(k):
        def value(u, s, s_before, s_after, raw0, raw1):
            d0 = jnp.where(k == 0, 1.0, knot_slope(raw0, s, s_before))
            d1 = jnp.where(k == last, 1.0, knot_slope(raw1, s, s_after))
            return (inverse_in_unit if inverse else value_in_unit)(u, s, d0, d1)

        return value

    def seen(x, bin_):
        """What `in_unit` takes, and the corner and size of the bin along the axis of the output."""
        ins, outs = (bin_.xk, bin_.widths[0]), (bin_.yk, bin_.heights[0])
        ins, outs = (outs, ins) if inverse else (ins, outs)
        slopes = [h / w for w, h in zip(bin_.widths, bin_.heights, strict=True)]
        return ((x - ins[0]) / ins[1], *slopes, *bin_.raw_slopes), outs

    def apply(x, raw):
        inside = jnp.abs(x) < bound
        at = jnp.where(inside, x, 0.0)
        bin_ = find(at, raw)
        args, (corner, size) = seen(at, bin_)
        r, log_slope = in_unit(bin_.k)(*args)
        return jnp.where(inside, corner + size * r, x), jnp.where(inside, log_slope, 0.0)

    def pullback(x, raw, y, y_bar, log_slope_bar):
        """Sums over bins of a cotangent times a size have closed forms.

        All bins left of x get the same, its own bin and the two beside it something else, the
        others nothing.
        """
        del y
        inside = jnp.abs(x) < bound
        at, y_in = jnp.where(inside, x, 0.0), jnp.where(inside, y_bar, 0.0)
        bin_ = find(at, raw)
        k, scale = bin_.k, bin_.scale
        args, (_, size) = seen(at, bin_)
        (r, _), back = jax.vjp(in_unit(k), *args)
        u_bar, *slope_bars, left, right = back((y_in * size, jnp.where(inside, log_slope_bar, 0.0)))

        (w, w0, w1), (h, h0, h1) = bin_.widths, bin_.heights
        h_bar, h0_bar, h1_bar = (bar / w for bar, w in zip(slope_bars, bin_.widths, strict=True))
        w_bar, w0_bar, w1_bar = (
            -s * bar for s, bar in zip(args[1:4], (h_bar, h0_bar, h1_bar), strict=True)
        )
        x_bar = u_bar / (h if inverse else w)
        if inverse:
            xk_bar, yk_bar, w_bar, h_bar = y_in, -x_bar, w_bar + y_in * r, h_bar - x_bar * args[0]
        else:
            xk_bar, yk_bar, w_bar, h_bar = -x_bar, y_in, w_bar - x_bar * args[0], h_bar + y_in * r

        pool = edge = inner_bars = inner_heights = jnp.zeros_like(x)
        if bins > 2:
            heard = ((k > 0) & (k < last), h_bar), (k > 1, h0_bar), (k < last - 1, h1_bar)
            h_in, h0_in, h1_in = (jnp.where(near, bar, 0.0) for near, bar in heard)
            inner_bars = yk_bar * jnp.maximum(k - 1, 0) + h_in + h0_in + h1_in
            left_of_x = jnp.where(k == 0, 0.0, bin_.yk + bound - bin_.first)
            inner_heights = yk_bar * left_of_x + h_in * h + h0_in * h0 + h1_in * h1
            # What the inner heights ask of the sizes of the edge bins.
            pool = edge_weight * inner_heights / (scale * bin_.middle)
            edge = pool * (1 + (sum(bin_.plain_ends) - sum(bin_.w_ends)) / bin_.middle)

        bars_x, bars_y = (k, xk_bar, w_bar, w0_bar, w1_bar), (k, yk_bar, h_bar, h0_bar, h1_bar)
        w_total = (
            xk_bar * (bin_.xk + bound - k * floor)
            + w_bar * (w - floor)
            + w0_bar * (w0 - floor)
            + w1_bar * (w1 - floor)
        )
        h_total = inner_heights - floor * scale * inner_bars
        for j in sorted({0, last}):
            of_edge = _of_bin(j, *bars_y)
            w_total = w_total + (bin_.w_ends[j > 0] - floor) * (edge_weight * of_edge - pool)
            h_total = h_total + (bin_.plain_ends[j > 0] - floor) * (
                (1 - edge_weight) * of_edge + edge
            )

        def row(j, w_exp, h_exp, shared):
            bars_x, bars_y, units, pool, edge, w_mean, h_mean, scale, left, right = shared
            w_bar, h_bar = _of_bin(j, *bars_x), _of_bin(j, *bars_y)
            is_edge = (j == 0) | (j == last)
            w_bar = w_bar + jnp.where(is_edge, edge_weight * h_bar - pool, 0.0)
            h_bar = jnp.where(is_edge, (1 - edge_weight) * h_bar + edge, scale * h_bar)
            slope_bar = jnp.where(bars_x[0] == j + 1, left, 0.0) + jnp.where(
                bars_x[0] == j, right, 0.0
            )
            return (
                w_exp * units[0] * (w_bar - w_mean),
                h_exp * units[1] * (h_bar - h_mean),
                slope_bar,
            )

        shared = (
            bars_x,
            bars_y,
            bin_.units,
            pool,
            edge,
            w_total / span,
            h_total / span,
            scale,
            left,
            right,
        )
        widths_bar, heights_bar, slopes_bar = each(
            row, bins, bin_.w_exps, bin_.h_exps, shared=shared
        )
        return jnp.where(inside, x_bar, y_bar), (widths_bar, heights_bar, slopes_bar[:last])

    return Column(3 * bins - 1, apply, pullback)


class _Bin(NamedTuple):
    """Bin k, a float, and what belongs to all bins.

    First its corner; widths and heights of it, of the one before and the one after; raw slopes of
    its knots. Then what belongs to all bins: the exponentials whose multiples, by `units`, are the
    sizes less their floor; the sizes of the edge bins before their heights are mixed with their
    widths; the first height after it; the sum of the inner heights before it, and their scale.
    """

    k: Array
    xk: Array
    yk: Array
    widths: Sequence[Array]
    heights: Sequence[Array]
    raw_slopes: tuple[Array, Array]
    w_exps: Sequence[Array]
    h_exps: Sequence[Array]
    units: tuple[Array, Array]
    w_ends: Sequence[Array]
    plain_ends: Sequence[Array]
    first: Array
    middle: Array
    scale: Array


def _total(rows):
    return sum((rows[j] for j in range(1, len(rows))), rows[0])


def _of_bin(j, k, corner, here, before, after):
    """What the size of bin j gets when x lies in bin k."""
    beside = (
        jnp.where(k == j, here, 0.0)
        + jnp.where(k == j + 1, before, 0.0)
        + jnp.where(k == j - 1, after, 0.0)
    )
    return beside + jnp.where(k > j, corner, 0.0)
