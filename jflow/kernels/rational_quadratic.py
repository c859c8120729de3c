"""The rational-quadratic spline with identity tails, as a kernel; `bijectors.splines` has the formulas and the reference.

The 3*bins - 1 raw numbers are read once, for the exponentials of the two softmaxes. The bin is found by comparing x with
running sums, and running sums select its corner, its sizes and those of its neighbours: gathers are slow everywhere. The
gradient goes back the same way: through the few numbers of the bin by autodiff, from there to all raw numbers in closed
form, since of all bin sizes those left of x move the corner of its bin, and three more its shape.
"""

import math

import jax
import jax.numpy as jnp

from jflow.kernels.columns import Column, choice, run
from jflow.types import Array

__all__ = ["choice", "transform"]

FLOOR = 1e-3  # of the box for bins, of the unit slope for knot slopes
CAP = 10.0  # knot slope over the smaller neighbouring bin slope
EDGE = 0.1  # least slope of the first and the last bin
SOFTPLUS_OFFSET = math.log(math.expm1(1 - FLOOR))  # softplus(0 + offset) + floor = 1


def transform(
    x: Array, raw: Array, *, bound: float = 5.0, inverse: bool = False, implementation: str | None = None
) -> tuple[Array, Array]:
    """(y [d, n], log |dy/dx| summed over d [n]) for x [d, n] and raw [3*bins - 1, d, n]: columns, see `kernels.columns`.

    The map of `splines.rational_quadratic`, or of its inverse, whose raw has the same numbers along its last axis.
    implementation: 'xla', 'pallas' or None, as in `columns.run`, which raises on bad shapes and types.
    """
    bins, rest = divmod(raw.shape[0] + 1, 3)
    if rest or bins < 1:
        raise ValueError(f"kernels.rational_quadratic: expected raw of shape [3*bins - 1, d, n], got {list(raw.shape)}")
    return run(column(bins, bound, inverse), x, raw, implementation)


def value_in_bin(x, xk, yk, w, h, d0, d1):
    """y and log dy/dx at x of the bin with corner (xk, yk), width w, height h and knot slopes d0, d1."""
    s, u = h / w, to_unit((x - xk) / w)
    v = u * (1 - u)
    denominator = s + (d0 + d1 - 2 * s) * v
    return yk + h * (s * u * u + d0 * v) / denominator, _log_slope(u, v, s, d0, d1, denominator)


def inverse_in_bin(y, xk, yk, w, h, d0, d1):
    """x and log dx/dy at y.

    The root is u = 2 c / (-b - sqrt(b^2 - 4 a c)), the form without cancellation, with r = (y - y_k)/h,
    a = (s - d0) + r (d0 + d1 - 2 s), b = d0 - r (d0 + d1 - 2 s), c = -s r.
    """
    s, r = h / w, to_unit((y - yk) / h)
    e = r * (d0 + d1 - 2 * s)
    a, b, c = s - d0 + e, d0 - e, -s * r
    # The discriminant is positive in exact arithmetic; its floor keeps the root differentiable when rounding is not.
    root = jnp.sqrt(jnp.maximum(b * b - 4 * a * c, jnp.finfo(b.dtype).tiny))
    u = to_unit(2 * c / (-b - root))
    v = u * (1 - u)
    return xk + u * w, -_log_slope(u, v, s, d0, d1, s + (d0 + d1 - 2 * s) * v)


def to_unit(u):
    """u within [0, 1], which only rounding leaves; the derivative stays 1, where clipping would halve it at a knot."""
    return u + jax.lax.stop_gradient(jnp.clip(u, 0.0, 1.0) - u)


def _log_slope(u, v, s, d0, d1, denominator):
    numerator = d1 * u * u + 2 * s * v + d0 * (1 - u) * (1 - u)
    return 2 * jnp.log(s / denominator) + jnp.log(numerator)


def knot_slope(raw, slope, neighbour):
    """Of the knot between bins of the slopes `slope` and `neighbour`."""
    return jnp.minimum(jax.nn.softplus(raw + SOFTPLUS_OFFSET) + FLOOR, CAP * jnp.minimum(slope, neighbour))


def column(bins: int, bound: float, inverse: bool) -> Column:
    """The spline as a `Column` of 3*bins - 1 raw numbers."""
    floor, span = 2 * bound * FLOOR, 2 * bound * (1 - FLOOR * bins)
    last = bins - 1

    def sizes_of(rows):
        """Sizes of the bins, and (max, unit) with size = floor + exp(raw - max) unit."""
        top = rows[0]
        for j in range(1, bins):
            top = jnp.maximum(top, rows[j])
        exps = [jnp.exp(rows[j] - top) for j in range(bins)]
        unit = span / sum(exps[1:], exps[0])
        return [floor + e * unit for e in exps], (top, unit)

    def pulled(widths, plain):
        """(heights, inner, scale): edge heights are pulled a tenth of the way to the widths, and the inner bins, `inner` of
        the box before, make up for the sum."""
        if bins < 3:
            pull_ = EDGE if bins == 2 else 0.0
            return [pull_ * w + (1 - pull_) * h for w, h in zip(widths, plain, strict=True)], None, 1.0
        edges = plain[0] + plain[last]
        inner = 2 * bound - edges
        scale = 1 + EDGE * (edges - widths[0] - widths[last]) / inner
        ends = [EDGE * widths[j] + (1 - EDGE) * plain[j] for j in (0, last)]
        return [ends[0], *(scale * h for h in plain[1:last]), ends[1]], inner, scale

    def index(x, sizes):
        """Which bin, as a float."""
        knot, k = -bound, jnp.zeros_like(x)
        for j in range(last):
            knot = knot + sizes[j]
            k = k + (x >= knot).astype(x.dtype)
        return k

    def select(k, widths, heights, raw):
        """x_k, y_k, then (width, height) of the bin, the one before and the one after, and the raw slopes of its knots."""
        one, zero = jnp.ones_like(k), jnp.zeros_like(k)
        xk, yk = zero - bound, zero - bound
        here, before, after = (widths[0], heights[0]), (one, one), (widths[1], heights[1]) if last else (one, one)
        left, right = zero, raw[2 * bins] if last else zero
        for j in range(1, bins):
            reached = k >= j
            xk, yk = xk + jnp.where(reached, widths[j - 1], 0), yk + jnp.where(reached, heights[j - 1], 0)
            before = tuple(jnp.where(reached, a[j - 1], b) for a, b in zip((widths, heights), before, strict=True))
            here = tuple(jnp.where(reached, a[j], b) for a, b in zip((widths, heights), here, strict=True))
            next_ = (widths[j + 1], heights[j + 1]) if j < last else (one, one)
            after = tuple(jnp.where(reached, a, b) for a, b in zip(next_, after, strict=True))
            left = jnp.where(reached, raw[2 * bins + j - 1], left)
            right = jnp.where(reached, raw[2 * bins + j], right) if j < last else right
        return xk, yk, *here, *before, *after, left, right

    def in_bin(k):
        def value(x, xk, yk, w, h, w0, h0, w1, h1, raw0, raw1):
            d0 = jnp.where(k == 0, 1.0, knot_slope(raw0, h / w, h0 / w0))
            d1 = jnp.where(k == last, 1.0, knot_slope(raw1, h / w, h1 / w1))
            return (inverse_in_bin if inverse else value_in_bin)(x, xk, yk, w, h, d0, d1)

        return value

    def apply(x, raw):
        inside = jnp.abs(x) < bound
        at = jnp.where(inside, x, 0.0)
        widths, _ = sizes_of(raw[:bins])
        heights, _, _ = pulled(widths, sizes_of(raw[bins : 2 * bins])[0])
        k = index(at, heights if inverse else widths)
        y, log_slope = in_bin(k)(at, *select(k, widths, heights, raw))
        return jnp.where(inside, y, x), jnp.where(inside, log_slope, 0.0)

    def pull(x, raw, y, y_bar, log_slope_bar, each):
        del y
        inside = jnp.abs(x) < bound
        at = jnp.where(inside, x, 0.0)
        widths, (w_top, w_unit) = sizes_of(raw[:bins])
        plain, (h_top, h_unit) = sizes_of(raw[bins : 2 * bins])
        heights, inner, scale = pulled(widths, plain)
        k = index(at, heights if inverse else widths)
        chosen = select(k, widths, heights, raw)
        _, back = jax.vjp(in_bin(k), at, *chosen)
        bars = back((jnp.where(inside, y_bar, 0.0), jnp.where(inside, log_slope_bar, 0.0)))
        x_bar, xk, yk, w, h, w0, h0, w1, h1, left, right = bars

        pool = zero = jnp.zeros_like(x)
        if bins > 2:  # what the inner heights ask of the sizes of the edge bins
            pool = EDGE / inner * sum((_of_bin(k, j, yk, h, h0, h1) * plain[j] for j in range(1, last)), zero)

        def size_bars(j):
            """What bin j's width and its height before the pull get."""
            width, height = _of_bin(k, j, xk, w, w0, w1), _of_bin(k, j, yk, h, h0, h1)
            if bins == 1:
                return width, height
            is_edge = (j == 0) | (j == last)
            width = width + jnp.where(is_edge, EDGE * height - pool, 0.0)
            return width, jnp.where(is_edge, (1 - EDGE) * height + pool * (1 + (scale - 1) / EDGE), scale * height)

        def exps(j):
            return jnp.exp(_row(raw, j) - w_top) * w_unit, jnp.exp(_row(raw, bins + j) - h_top) * h_unit

        w_mean = h_mean = zero
        for j in range(bins):
            (w_exp, h_exp), (w_bar, h_bar) = exps(j), size_bars(j)
            w_mean, h_mean = w_mean + w_exp * w_bar / span, h_mean + h_exp * h_bar / span

        def row(j):
            (w_exp, h_exp), (w_bar, h_bar) = exps(j), size_bars(j)
            slope_bar = jnp.where(k == j + 1, left, 0.0) + jnp.where(k == j, right, 0.0)
            return w_exp * (w_bar - w_mean), h_exp * (h_bar - h_mean), slope_bar

        widths_bar, heights_bar, slopes_bar = each(row, bins)
        return jnp.where(inside, x_bar, y_bar), (widths_bar, heights_bar, slopes_bar[:last])

    return Column(3 * bins - 1, apply, pull)


def _of_bin(k, j, corner, here, before, after):
    """What the size of bin j gets when x lies in bin k."""
    at = jnp.where(k == j, here, 0.0) + jnp.where(k == j + 1, before, 0.0) + jnp.where(k == j - 1, after, 0.0)
    return at + jnp.where(k > j, corner, 0.0)


def _row(raw, j):
    return raw[j] if isinstance(j, int) else jax.lax.dynamic_index_in_dim(raw, j, keepdims=False)
