"""Bijectors that act on each number of the event alone."""

import math

import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype, mean_and_std, sum_event
from jflow._core.checks import check_channels, check_event, check_side
from jflow._core.nouns import no_params
from jflow.bijectors._combinators import invert
from jflow.types import Bijector, Elementwise

__all__ = [
    "actnorm",
    "affine",
    "elementwise",
    "logit",
    "robust_standardize",
    "sigmoid",
    "softplus",
    "standardize",
    "tanh",
]


def elementwise(univariate: Elementwise, event_shape: tuple[int, ...]) -> Bijector:
    """Apply a scalar map to each number of the event, with free raw parameters for each.

    Args:
        univariate: the scalar map, such as `univariate.rational_quadratic()`.
        event_shape: the shape of one x.

    Returns:
        Bijector: the map, with params {'raw': [*event_shape, univariate.size]}, which start at
            zero, the identity.

    Raises:
        ValueError: the events of x have another shape.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijector = bijectors.elementwise(bijectors.univariate.rational_quadratic(4), (3,))
        >>> bijector.init(jax.random.key(0), jnp.zeros((1, 3)))["raw"].shape
        (3, 11)
    """
    event_shape = tuple(event_shape)

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        check_event("elementwise", x, event_shape)
        return {
            "raw": jnp.zeros_like(x, shape=(*event_shape, univariate.size), dtype=float_dtype(x))
        }

    def apply(scalar_map, params, x):
        check_event("elementwise", x, event_shape)
        raw = jnp.broadcast_to(params["raw"][None], (*x.shape, univariate.size))
        y, log_slope = scalar_map(x, raw)
        return y.astype(x.dtype), sum_event(log_slope)

    def forward(params, z, cond=None, *, key=None):
        return apply(univariate.forward, params, z)

    def inverse(params, x, cond=None, *, key=None):
        return apply(univariate.inverse, params, x)

    return Bijector(init, forward, inverse)


def affine(event_shape: tuple[int, ...]) -> Bijector:
    """Scale and shift each number of the event: x = z exp(log_scale) + shift.

    The scales and shifts are free and start at the identity. log_det is the sum of log_scale.

    Args:
        event_shape: the shape of one x.

    Returns:
        Bijector: the map, with params {'log_scale', 'shift'}, both of event_shape.

    Raises:
        ValueError: the events of x have another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> params = {"log_scale": jnp.log(jnp.array([2.0, 3.0])), "shift": jnp.array([1.0, 0.0])}
        >>> x, log_det = bijectors.affine((2,)).forward(params, jnp.ones((1, 2)))
        >>> x.round(4).tolist(), round(float(log_det[0]), 3)  # log 6
        ([[3.0, 3.0]], 1.792)
    """
    event_shape = tuple(event_shape)

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        check_event("affine", x, event_shape)
        zeros = jnp.zeros_like(x, shape=event_shape, dtype=float_dtype(x))
        return {"log_scale": zeros, "shift": zeros}

    return _scale_and_shift(init, lambda x: check_event("affine", x, event_shape))


def actnorm(channels: int) -> Bijector:
    """Scale and shift each channel, x = z exp(log_scale) + shift, starting from the first batch.

    The channels are the last axis. `init` chooses scale and shift so that on the other side its
    batch has zero mean and unit deviation in every channel. A channel that does not vary in that
    batch (a single row, or zeros that only give the shape) keeps scale 1. log_det = positions *
    sum(log_scale).

    Also known as: activation normalization.

    Args:
        channels: the size of the last axis.

    Returns:
        Bijector: the map, with params {'log_scale', 'shift'}, both [channels].

    Raises:
        ValueError: the last axis of x has another size.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> x = jnp.array([[5000.0, 0.1], [5200.0, 0.3]])
        >>> bijector = bijectors.actnorm(2)
        >>> params = bijector.init(jax.random.key(0), x)
        >>> bijector.inverse(params, x)[0].round(3).tolist()
        [[-1.0, -1.0], [1.0, 1.0]]

    References:
        Kingma, Dhariwal, *Glow: Generative Flow with Invertible 1x1 Convolutions*, 2018,
            arXiv:1807.03039.
    """

    def check(x):
        check_channels("actnorm", x, channels)

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        check(x)
        mean, std = mean_and_std(x, axis=tuple(range(x.ndim - 1)))
        if side == "data":
            return {"log_scale": jnp.log(std), "shift": mean}
        return {"log_scale": -jnp.log(std), "shift": -mean / std}

    return _scale_and_shift(init, check)


def standardize(event_shape: tuple[int, ...]) -> Bijector:
    """Bring data in their own units to numbers of order one, by the statistics of the first batch.

    Per channel (the last axis of the event) it is x = (z + offset) exp(log_std), with the standard
    deviation of the batch of `init` and offset = mean / std. The offset is trained, in standard
    deviations. log_std is held (its gradient is 0): a step of an optimizer would move data that lie
    far from 0 by many standard deviations. The batch should have a hundred rows or more. A channel
    that does not vary in it keeps scale 1, and a batch of one row, which says nothing of the
    spread, leaves the identity.

    Also known as: whitening of columns, normalization of data, z-score.

    Args:
        event_shape: the shape of one x.

    Returns:
        Bijector: the map, with params {'log_std', 'offset'}, both [channels], or [] for scalar
            events.

    Raises:
        ValueError: the events of x have another shape.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> x = jnp.array([[5000.0, 0.1], [5200.0, 0.3]])
        >>> bijector = bijectors.standardize((2,))
        >>> z, log_det = bijector.inverse(bijector.init(jax.random.key(0), x), x)
        >>> z.round(3).tolist()  # the standard deviations are 100 and 0.1
        [[-1.0, -1.0], [1.0, 1.0]]
        >>> round(float(log_det[0]), 3)
        -2.303
    """
    return _standardized("standardize", event_shape, mean_and_std)


def robust_standardize(event_shape: tuple[int, ...]) -> Bijector:
    """Bring heavy-tailed data to numbers of order one, by medians and quartiles of the first batch.

    It is `standardize` with the median in the place of the mean, and in the place of the standard
    deviation the range between the quartiles over 1.349, which for normal data is the same.
    Outliers move neither, where a single one may squeeze all other data into a point. A channel
    with half of its numbers alike takes its mean and standard deviation.

    In a recipe it is the argument `standardize=bijectors.robust_standardize(event_shape)`.

    Also known as: robust scaler, median and interquartile range, IQR scaling.

    Args:
        event_shape: the shape of one x.

    Returns:
        Bijector: the map, with params {'log_std', 'offset'}, both [channels], or [] for scalar
            events; they serve `standardize` too.

    Raises:
        ValueError: the events of x have another shape.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> x = jnp.array([[1.0], [2.0], [3.0], [4.0], [1e9]])
        >>> bijector = bijectors.robust_standardize((1,))
        >>> z, _ = bijector.inverse(bijector.init(jax.random.key(0), x), x)
        >>> [round(float(number), 2) for number in z[:4, 0]]  # the quartiles are 2 and 4
        [-1.35, -0.67, 0.0, 0.67]
    """

    def median_and_scale(x, axis):
        x = x.astype(float_dtype(x))
        low, median, high = jnp.quantile(x, jnp.array([0.25, 0.5, 0.75], x.dtype), axis=axis)
        mean, std = mean_and_std(x, axis)
        spread = high / 1.349 - low / 1.349
        alike = ~(spread > 1e-6 * jnp.maximum(jnp.abs(low), jnp.abs(high)))
        return jnp.where(alike, mean, median), jnp.where(alike, std, spread)

    return _standardized("robust_standardize", event_shape, median_and_scale)


def _standardized(name: str, event_shape: tuple[int, ...], location_and_scale) -> Bijector:
    """`standardize` by (x, axes) -> (location, scale)."""
    event_shape = tuple(event_shape)

    def check(x):
        check_event(name, x, event_shape)

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        check(x)
        mean, std = location_and_scale(x, axis=tuple(range(max(x.ndim - 1, 1))))
        if x.shape[0] < 2:
            mean, std = jnp.zeros_like(mean), jnp.ones_like(std)
        if side == "data":
            return {"log_std": jnp.log(std), "offset": mean / std}
        return {"log_std": -jnp.log(std), "offset": -mean}

    def read(params):
        log_std = jax.lax.stop_gradient(params["log_std"])
        # The shift first: x - shift is exact near the mean, where x / std - mean / std would lose
        # digits.
        return {"log_scale": log_std, "shift": params["offset"] * jnp.exp(log_std)}

    def forward(params, z, cond=None, *, key=None):
        return moved.forward(read(params), z)

    def inverse(params, x, cond=None, *, key=None):
        return moved.inverse(read(params), x)

    moved = _scale_and_shift(init, check)
    return Bijector(init, forward, inverse)


def _scale_and_shift(init, check) -> Bijector:
    """x = z exp(log_scale) + shift, parameters broadcast along the leading axes of the event."""

    def read(params, x):
        check(x)
        lead = (1,) * (x.ndim - params["shift"].ndim)
        log_scale, shift = (
            params[name].reshape(lead + params[name].shape) for name in ("log_scale", "shift")
        )
        return (
            log_scale,
            shift,
            sum_event(jnp.broadcast_to(log_scale.astype(float_dtype(x)), x.shape)),
        )

    def forward(params, z, cond=None, *, key=None):
        log_scale, shift, log_det = read(params, z)
        return (z * jnp.exp(log_scale) + shift).astype(z.dtype), log_det

    def inverse(params, x, cond=None, *, key=None):
        log_scale, shift, log_det = read(params, x)
        return ((x - shift) * jnp.exp(-log_scale)).astype(x.dtype), -log_det

    return Bijector(init, forward, inverse)


def sigmoid(margin: float = 0.0) -> Bijector:
    """Map the reals to (0, 1) by a sigmoid.

    sigmoid(z) = (1 - 2 margin) x + margin, so x = (sigmoid(z) - margin) / (1 - 2 margin). With
    margin > 0 the data side [0, 1] is drawn in from the poles (the logit of RealNVP with alpha =
    margin), and x of pixels in [0, 1] including the ends has a finite z. Outside the support
    log_det = -inf.

    Args:
        margin: how far the data are drawn in from 0 and 1, in [0, 0.5).

    Returns:
        Bijector: the map, without params.

    Raises:
        ValueError: margin is not in [0, 0.5).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> x, log_det = bijectors.sigmoid().forward({}, jnp.zeros((1, 1)))
        >>> x.tolist(), round(float(log_det[0]), 3)  # log(1/4)
        ([[0.5]], -1.386)

    References:
        Dinh, Sohl-Dickstein, Bengio, *Density Estimation Using Real NVP*, 2016, arXiv:1605.08803.
    """
    if not 0 <= margin < 0.5:
        raise ValueError(f"sigmoid: expected 0 <= margin < 0.5, got {margin}")
    margin = float(margin)  # a number of numpy's would bring float64 along

    def forward(z):
        log_slope = -jax.nn.softplus(z) - jax.nn.softplus(-z) - math.log1p(-2 * margin)
        return (jax.nn.sigmoid(z) - margin) / (1 - 2 * margin), log_slope

    def inverse(x):
        p = (1 - 2 * margin) * x + margin
        outside = (p <= 0) | (p >= 1)  # and not ~inside: a NaN is not outside, it goes on as NaN
        p = jnp.where(outside, 0.5, p)
        log_slope = math.log1p(-2 * margin) - jnp.log(p) - jnp.log1p(-p)
        return jnp.log(p) - jnp.log1p(-p), jnp.where(outside, -jnp.inf, log_slope)

    return _fixed(forward, inverse)


def logit(margin: float = 0.0) -> Bijector:
    """Map (0, 1) to the reals: the inverse of `sigmoid(margin)`.

    `forward` is z = log(p / (1 - p)) with p = (1 - 2 margin) x + margin. Outside the support
    log_det = -inf.

    Args:
        margin: how far [0, 1] is drawn in from its ends, in [0, 0.5).

    Returns:
        Bijector: the map, without params.

    Raises:
        ValueError: margin is not in [0, 0.5).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijectors.logit().forward({}, jnp.array([[0.5]]))[0].tolist()
        [[0.0]]
    """
    return invert(sigmoid(margin))


def softplus() -> Bijector:
    """Map the reals to positive numbers by a softplus.

    x = log(1 + exp z), z = x + log(1 - exp(-x)). Outside the support log_det = -inf.

    Returns:
        Bijector: the map, without params.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> x, log_det = bijectors.softplus().forward({}, jnp.zeros((1, 1)))
        >>> round(float(x[0, 0]), 3), round(float(log_det[0]), 3)  # log 2 and log(1/2)
        (0.693, -0.693)
    """

    def forward(z):
        return jax.nn.softplus(z), -jax.nn.softplus(-z)

    def inverse(x):
        outside = x <= 0
        safe = jnp.where(outside, 1.0, x)
        log_ratio = jnp.log(-jnp.expm1(-safe))
        return safe + log_ratio, jnp.where(outside, -jnp.inf, -log_ratio)

    return _fixed(forward, inverse)


def tanh() -> Bijector:
    """Map the reals to (-1, 1): x = tanh z.

    The log-slope is 2 (log 2 - z - softplus(-2 z)). Outside the support log_det = -inf.

    Returns:
        Bijector: the map, without params.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijectors.tanh().inverse({}, jnp.array([[2.0]]))[1].tolist()  # outside the support
        [-inf]
    """

    def forward(z):
        return jnp.tanh(z), 2 * (math.log(2) - z - jax.nn.softplus(-2 * z))

    def inverse(x):
        outside = jnp.abs(x) >= 1
        safe = jnp.where(outside, 0.0, x)
        return jnp.arctanh(safe), jnp.where(outside, -jnp.inf, -jnp.log1p(-safe) - jnp.log1p(safe))

    return _fixed(forward, inverse)


def _fixed(forward, inverse) -> Bijector:
    """Scalar maps x -> (y, log slope) as a bijector without parameters that computes in float32 at
    least.
    """

    def on_event(scalar_map):
        def apply(params, x, cond=None, *, key=None):
            y, log_slope = scalar_map(x.astype(float_dtype(x)))
            return y.astype(x.dtype), sum_event(log_slope)

        return apply

    return Bijector(no_params, on_event(forward), on_event(inverse))
