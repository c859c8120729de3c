"""Maps from the reals onto a support, for data with bounds, for `flows.transformed`.

`forward` goes from the reals onto the support. Outside the support, its ends included, log_det is
-inf, and `init` raises a ValueError for data that lie there where it sees their values. The maps do
not depend on units: data in grams and in tons are alike to them.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import float_dtype, sum_event, zero_log_det
from jflow._core.checks import check_rows, check_side, check_whole, need_key
from jflow._core.keys import split_key
from jflow.bijectors._combinators import chain, kind_of
from jflow.bijectors._surjective import draw_given, given_x
from jflow.types import Array, Bijector, Distribution, Flow, Transport

__all__ = ["columns", "greater_than", "integers", "interval", "less_than", "positive", "simplex"]


def interval(low: float, high: float) -> Bijector:
    """Map the reals onto the open interval (low, high), by a sigmoid.

        x = low + (high - low) sigmoid(z),    z = log(x - low) - log(high - x).

    The ends themselves have no density. Data that hold them want a wider interval, such as
    interval(-0.01, 1.01) for interval(0, 1), whose samples one clips; where many rows are exactly
    at an end, they are a category more than a number.

    Args:
        low: the lower end, in the units of the data.
        high: the upper end.

    Returns:
        Bijector: the map, for events of any shape, without params. Its samples never round to an
            end.

    Raises:
        ValueError: low is not below high, or one of them is not finite; or in `init`, numbers of x
            are outside.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> percent = bijectors.supports.interval(0, 100)
        >>> x, log_det = percent.forward({}, jnp.zeros((1, 1)))
        >>> x.tolist(), round(float(log_det[0]), 3)  # log 25
        ([[50.0]], 3.219)
        >>> percent.inverse({}, jnp.array([[101.0]]))[1].tolist()
        [-inf]
    """
    low, high = _finite("interval", low=low, high=high)
    if not low < high:
        raise ValueError(f"interval: expected low < high, got low={low:g}, high={high:g}")
    log_width, wider = math.log(high - low), (high - low) / 100

    def forward(z):
        share = (high - low) * jax.nn.sigmoid(-jnp.abs(z))
        x = jnp.where(z < 0, low + share, high - share)  # near either end it keeps its digits
        return x, log_width - jax.nn.softplus(z) - jax.nn.softplus(-z)

    def inverse(x):
        below, above = jnp.log(x - low), jnp.log(high - x)
        return below - above, log_width - below - above

    remedy = f"widen it, such as interval({low - wider:g}, {high + wider:g})"
    return _onto(f"interval({low:g}, {high:g})", forward, inverse, low, high, remedy)


def positive() -> Bijector:
    """Map the reals onto the positive numbers, by the exponential: x = exp(z).

    A flow with normal tails becomes one with lognormal tails. Data that hold zeros want
    `greater_than` a number just below zero, and counts want `integers(0)`.

    Also known as: exp, log transform.

    Returns:
        Bijector: the map, for events of any shape, without params.

    Raises:
        ValueError: in `init`, numbers of x are not positive.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> z, log_det = bijectors.supports.positive().inverse({}, jnp.array([[1.0], [0.0]]))
        >>> z[0].tolist(), float(log_det[1])  # 0 is outside
        ([0.0], -inf)
    """
    return _above("positive()", 0.0)


def greater_than(low: float) -> Bijector:
    """Map the reals onto the numbers above a bound: x = low + exp(z).

    Args:
        low: the bound, in the units of the data, which is itself outside.

    Returns:
        Bijector: the map, for events of any shape, without params.

    Raises:
        ValueError: low is not finite; or in `init`, numbers of x are not above it.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijectors.supports.greater_than(18).forward({}, jnp.zeros((1, 1)))[0].tolist()
        [[19.0]]
    """
    (low,) = _finite("greater_than", low=low)
    return _above(f"greater_than({low:g})", low)


def less_than(high: float) -> Bijector:
    """Map the reals onto the numbers below a bound: x = high - exp(-z).

    Args:
        high: the bound, in the units of the data, which is itself outside.

    Returns:
        Bijector: the map, for events of any shape, without params.

    Raises:
        ValueError: high is not finite; or in `init`, numbers of x are not below it.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijectors.supports.less_than(0).forward({}, jnp.zeros((1, 1)))[0].tolist()
        [[-1.0]]
    """
    (high,) = _finite("less_than", high=high)

    def forward(z):
        return high - _exp(-z), -z

    def inverse(x):
        log_gap = jnp.log(high - x)
        return -log_gap, -log_gap

    remedy = f"take a greater bound, such as less_than({high + 0.01 * max(abs(high), 1):g})"
    return _onto(f"less_than({high:g})", forward, inverse, -math.inf, high, remedy)


def simplex(parts: int) -> Bijector:
    """Map the reals onto the simplex: positive shares that sum to one, by a softmax.

        x = softmax(z_1 .. z_{k-1}, 0),    z_i = log x_i - log x_k.

    The data side has one number more than the source, along the last axis: a flow of events (k-1,)
    becomes one of events (k,). The density is of the first k-1 shares, as that of the Dirichlet
    distribution is. Shares of exactly 0 are outside.

    Also known as: additive log-ratio, softmax centered, compositional data.

    Args:
        parts: k, the number of shares, at least 2.

    Returns:
        Bijector: the map, x [b, ..., k] and z [b, ..., k - 1], without params.

    Raises:
        ValueError: parts is below 2, or x or z has another last axis; or in `init`, rows of x are
            outside, where a sum may be off by 1e-4.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijectors.supports.simplex(4).forward({}, jnp.zeros((1, 3)))[0].tolist()
        [[0.25, 0.25, 0.25, 0.25]]

    References:
        Aitchison, *The Statistical Analysis of Compositional Data*, 1982, Journal of the Royal
            Statistical Society B 44(2).
    """
    check_whole("simplex", least=2, parts=parts)

    def check(x, size):
        if x.ndim < 2 or x.shape[-1] != size:
            raise ValueError(
                f"simplex({parts}): expected an array [b, ..., {size}], got {list(x.shape)}"
            )

    def outside(x):
        x = x.astype(float_dtype(x))
        total = jnp.sum(x, axis=-1)
        return jnp.any(x <= 0, axis=-1) | (jnp.abs(total - 1) > 1e-4)

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        if side == "data":
            check(x, parts)
            remedy = "add a small number to zeros, and divide each row by its sum"
            expected = "rows of positive shares that sum to 1"
            _refuse(f"simplex({parts})", expected, outside(x), x, remedy)
        return {}

    def forward(params, z, cond=None, *, key=None):
        check(z, parts - 1)
        wide = z.astype(float_dtype(z))
        wide = jnp.concatenate([wide, jnp.zeros_like(wide[..., :1])], axis=-1)
        log_share = jax.nn.log_softmax(wide, axis=-1)
        tiny = float(jnp.finfo(z.dtype).tiny)
        return jnp.maximum(jnp.exp(log_share), tiny).astype(z.dtype), sum_event(log_share)

    def inverse(params, x, cond=None, *, key=None):
        check(x, parts)
        bad = outside(x)
        log_share = jnp.log(jnp.where(bad[..., None], 1 / parts, x.astype(float_dtype(x))))
        log_det = jnp.where(bad, -jnp.inf, -jnp.sum(log_share, axis=-1))
        return (log_share[..., :-1] - log_share[..., -1:]).astype(x.dtype), sum_event(log_det)

    return Bijector(init, forward, inverse)


def integers(
    low: int | None = None, high: int | None = None, *, noise: Flow | Distribution | None = None
) -> Transport:
    """Make a density of reals a model of whole numbers, by noise in [0, 1) that fills their cells.

        y = x - low + u,    log P(x) >= E over u ~ q(u given x) of [log p(y) - log q(u given x)],

    where y goes through `interval(0, high - low + 1)`, through `positive()` where there is no high,
    or as it is without both. A flow over it has an `elbo` in nats of probability: at most 0 for
    each number, and 0 for a constant that is known for certain. Samples are whole numbers, as
    floats. Ours: the noise sees x, and not y, through a function of order one.

    Also known as: count data, discrete data.

    Args:
        low: the least number, which is inside; None is no bound.
        high: the greatest number, which is inside; None is no bound.
        noise: None is uniform noise. A `Flow` or `Distribution` on (0, 1)^event, such as
            `flows.transformed(flows.real_nvp((d,)), supports.interval(0, 1))`, is trained with the
            flow and tightens the bound. Its cond is x scaled to [-1, 1] where both bounds are
            given, arcsinh(x - low) elsewhere, or {'x': that, 'cond': cond} where there is a cond.

    Returns:
        Transport: the layer, for events of any shape as floats, whose inverse needs a key; its
            params are {'0': {}, '1': those of the noise}. float32 tells the cells of numbers up to
            about 500,000 apart.

    Raises:
        ValueError: a bound is not whole, low is not below high, or there is a high without a low,
            at construction; in `init`, numbers of x are not whole or outside the bounds; or the
            inverse gets no key.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> layer = bijectors.supports.integers(1, 6)
        >>> x = jnp.array([[1.0, 6.0]])
        >>> z, _ = layer.inverse({"0": {}, "1": {}}, x, key=jax.random.key(0))
        >>> layer.forward({"0": {}, "1": {}}, z)[0].tolist()
        [[1.0, 6.0]]

    References:
        Theis, van den Oord, Bethge, *A Note on the Evaluation of Generative Models*, 2016,
            arXiv:1511.01844.
        Ho, Chen, Srinivas, Duan, Abbeel, *Flow++: Improving Flow-Based Generative Models with
            Variational Dequantization and Architecture Design*, 2019, arXiv:1902.00275.
    """
    for what, bound in (("low", low), ("high", high)):
        if bound is not None and (not math.isfinite(bound) or bound != int(bound)):
            raise ValueError(f"integers: expected {what} to be a whole number, got {bound}")
    if high is not None and (low is None or not low < high):
        raise ValueError(
            f"integers: expected low < high, got low={low}, high={high}; without a low turn the"
            " sign of the data"
        )
    name = f"integers({', '.join(str(b) for b in (low, high) if b is not None)})"
    start = 0 if low is None else int(low)
    cells = math.inf if high is None else int(high) - start + 1

    def outside(x):
        lower = jnp.zeros_like(x, bool) if low is None else x < start
        whole = (x == jnp.round(x)) & ~jnp.isinf(x) | jnp.isnan(x)
        return lower | (x > start + cells - 1) | ~whole

    def given(x, cond):
        y = x.astype(float_dtype(x)) - start
        return given_x(jnp.arcsinh(y) if math.isinf(cells) else (2 * y + 1) / cells - 1, cond)

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        key_noise, key_u = jax.random.split(key)
        if side == "source":
            x = level(x)
        else:
            expected = "whole numbers within the bounds"
            _refuse(name, expected, outside(x), x, "round the data, or move the bounds")
        if noise is None:
            return {}
        u = jax.random.uniform(key_u, x.shape, float_dtype(x))
        return noise.init(key_noise, u, given(x, cond))

    def level(y):
        y = jnp.floor(y.astype(float_dtype(y)))
        return (start + (y if low is None else jnp.clip(y, 0, cells - 1))).astype(y.dtype)

    def within(u, y):
        """u off the ends of its cell, so that rounding of y + u cannot change the cell."""
        eps = float(jnp.finfo(float_dtype(y)).eps)
        margin = jnp.minimum(8 * eps * (1 + jnp.abs(y)), 0.5)
        return jnp.clip(u, margin, 1 - margin)

    def forward(params, y, cond=None, *, key=None):
        x = level(y)
        contribution = zero_log_det(y)
        if noise is not None:
            whole = x.astype(float_dtype(y)) - start
            u = within(y.astype(float_dtype(y)) - whole, whole)
            contribution += noise.log_prob(params, u, given(x, cond), key=key)
        return x.astype(y.dtype), contribution

    def inverse(params, x, cond=None, *, key=None):
        need_key(f"{name}.inverse", key)
        contribution = zero_log_det(x)
        if noise is None:
            u = jax.random.uniform(key, x.shape, float_dtype(x))
        else:
            u, log_q = draw_given(noise, params, key, x.shape[0], given(x, cond))
            if u.shape != x.shape:
                raise ValueError(
                    f"{name}: expected noise of shape {list(x.shape)}, as x, got {list(u.shape)}"
                )
            contribution -= log_q
        bad = outside(x)
        whole = jnp.where(bad, 0.0, x.astype(float_dtype(x)) - start)
        contribution += sum_event(jnp.where(bad, -jnp.inf, jnp.where(jnp.isnan(x), jnp.nan, 0.0)))
        return whole + within(u, whole), contribution

    onto = chain() if low is None else positive() if high is None else interval(0, cells)
    return chain(onto, Transport(init, forward, inverse))


def columns(*supports: Bijector | Transport | None) -> Bijector | Transport:
    """Give each column, along the last axis of the event, a support of its own.

    Columns that are given one and the same object share its params, and its noise is of all of them
    together: columns(*[supports.positive()] * 50) is one map of 50 columns.

    Also known as: per-feature transforms, column transformer.

    Args:
        *supports: a map for each column, which keeps its shape; None is all of the reals.

    Returns:
        Bijector: the map, a `Transport` if one of the supports is one (`integers`), with params
            {'0': those of the first support that is not None, '1': ...}.

    Raises:
        TypeError: a support is not a `Bijector`, a `Transport` or None.
        ValueError: there is no support, the last axis of x has another size, or a map changes the
            shape of its columns.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> from jflow.bijectors import supports
        >>> onto = supports.columns(supports.positive(), None, supports.interval(0, 1))
        >>> x, _ = onto.forward({"0": {}, "1": {}}, jnp.zeros((1, 3)))
        >>> x.tolist()
        [[1.0, 0.0, 0.5]]
    """
    if not supports:
        raise ValueError("columns: expected a support or None for each column, got none")
    for support in supports:
        if isinstance(support, list | tuple) and not hasattr(support, "_fields"):
            raise TypeError("columns: expected the supports one by one, columns(*supports)")
    groups: dict[int, list[int]] = {}
    for i, support in enumerate(supports):
        groups.setdefault(-1 if support is None else id(support), []).append(i)
    free = groups.pop(-1, [])
    indices = [np.array(group) for group in groups.values()]
    maps = [supports[group[0]] for group in groups.values()]
    kind = kind_of("columns", maps) if maps else Bijector
    back = np.argsort(np.concatenate([*indices, np.array(free, int)]))

    def split(x):
        if x.ndim < 2 or x.shape[-1] != len(supports):
            raise ValueError(
                f"columns: expected x [b, ..., {len(supports)}], a support for each column, got "
                f"{list(x.shape)}"
            )
        return [x[..., index] for index in indices]

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        keys = split_key(key, len(maps))
        return {
            str(i): support.init(keys[i], part, cond, side=side)
            for i, (support, part) in enumerate(zip(maps, split(x), strict=True))
        }

    def apply(direction, params, x, cond=None, *, key=None):
        keys, out, log_det = split_key(key, len(maps)), [], zero_log_det(x)
        for i, (support, part) in enumerate(zip(maps, split(x), strict=True)):
            y, contribution = getattr(support, direction)(params[str(i)], part, cond, key=keys[i])
            if y.shape != part.shape:
                raise ValueError(
                    f"columns: expected support {i} to keep the shape {list(part.shape)}, got "
                    f"{list(y.shape)}"
                )
            out.append(y.astype(x.dtype))
            log_det += check_rows("columns", f"log_det of support {i}", contribution, x.shape[0])
        out.append(x[..., np.array(free, int)])
        return jnp.concatenate(out, axis=-1)[..., back], log_det

    return kind(init, partial(apply, "forward"), partial(apply, "inverse"))


def _above(name: str, low: float) -> Bijector:
    def forward(z):
        return low + _exp(z), z

    def inverse(x):
        log_gap = jnp.log(x - low)
        return log_gap, -log_gap

    step = 0.01 * max(abs(low), 1)
    remedy = f"take a lesser bound, such as greater_than({low - step:g})"
    return _onto(name, forward, inverse, low, math.inf, remedy)


def _exp(z: Array) -> Array:
    """exp(z), finite: beyond the range of the type the derivative is 0."""
    return jnp.exp(jnp.minimum(z, math.log(float(jnp.finfo(z.dtype).max))))


def _onto(name: str, forward, inverse, low: float, high: float, remedy: str) -> Bijector:
    """Scalar maps of the reals onto (low, high), x -> (y, log slope), in float32 at least.

    What `forward` rounds to an end, or beyond the numbers of the type, becomes the number next to
    it; what `inverse` gets from outside becomes an inner point of log_det -inf.
    """
    inner, expected = low + (high - low) / 2, "numbers between the ends, which are outside"
    if math.isinf(high):
        inner, expected = low + max(abs(low), 1), f"numbers above {low:g}"
    elif math.isinf(low):
        inner, expected = high - max(abs(high), 1), f"numbers below {high:g}"

    def outside(x):
        return (x <= low) | (x >= high)  # a NaN is not outside: it goes on as NaN

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        if side == "data":
            _refuse(name, expected, outside(x), x, remedy)
        return {}

    def onto(params, z, cond=None, *, key=None):
        x, log_slope = forward(z.astype(float_dtype(z)))
        return jnp.clip(x, *_next_to(low, high, z.dtype)).astype(z.dtype), sum_event(log_slope)

    def away(params, x, cond=None, *, key=None):
        bad = outside(x)
        z, log_slope = inverse(jnp.where(bad, inner, x.astype(float_dtype(x))))
        return z.astype(x.dtype), sum_event(jnp.where(bad, -jnp.inf, log_slope))

    return Bijector(init, onto, away)


def _next_to(low: float, high: float, dtype) -> tuple[float, float]:
    """The least and the greatest number of the type between the bounds, neither infinite nor
    subnormal."""
    info = jnp.finfo(dtype)
    smallest, largest = float(info.tiny), float(info.max)

    def step(bound, towards):
        if math.isinf(bound):
            return math.copysign(largest, bound)
        next_one = float(np.nextafter(np.asarray(bound, dtype), np.asarray(towards, dtype)))
        return math.copysign(smallest, towards - bound) if bound == 0 else next_one

    return step(low, high), step(high, low)


def _finite(name: str, **bounds: float) -> list[float]:
    for what, bound in bounds.items():
        if not math.isfinite(bound):
            raise ValueError(f"{name}: expected a finite {what}, got {bound}")
    return [float(bound) for bound in bounds.values()]


def _refuse(name: str, expected: str, outside: Array, x: Array, remedy: str) -> None:
    """Raise for data outside a support, where their values are known."""
    if isinstance(outside, jax.core.Tracer) or not jnp.asarray(outside).is_fully_addressable:
        return
    where = np.argwhere(np.asarray(outside))
    if len(where):
        raise ValueError(
            f"{name}: expected {expected}, got {len(where)} of {np.size(outside)} that are not, the"
            f" first {np.asarray(x)[tuple(where[0])]} in row {where[0][0]}: {remedy}, or leave such"
            " rows out"
        )
