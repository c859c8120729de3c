"""Gaussian mixtures as values: what a mixture-predicting `Field` returns, and their algebra.

A mixture may be over a whole event, or there may be one over every site of it (each pixel with a
mixture over its channels). The components of a row are isotropic and share one standard deviation,
which is what keeps all of this in closed form. Losses (`losses.mixture_matching`), solvers and
guidance share these functions.

The posterior of data x1 given a point x_t = a x1 + s x0 with x0 ~ N(0, I) drawn independently, as
one t gives it, can be carried to another point and time by Bayes' rule:

    p(x1 | x_r) ~ p(x1 | x_t) N(x_r; a_r x1, s_r^2) / N(x_t; a_t x1, s_t^2).

With the exact posterior that is exact too, so that a single prediction knows the whole field
(`carried_velocity`).

The time of the paper below runs from data (0) to noise (1); here t = 0 is noise. The forms here,
which are finite at both ends, are derived.

References:
    Chen, Zhang, Tan, Xu, Luan, Guibas, Wetzstein, Bi, *Gaussian Mixture Flow Matching Models*,
        2025, arXiv:2504.05304.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from jflow._core.arrays import expand_to, float_dtype, mean_event, sum_event
from jflow._core.checks import rows
from jflow.paths import LINEAR, Schedule, coefficients
from jflow.types import Array, Field, Key

__all__ = [
    "GaussianMixture",
    "affine",
    "carried",
    "carried_velocity",
    "check_mixture",
    "exact",
    "flow_velocity",
    "log_prob",
    "mean",
    "reverse_transition",
    "sample",
    "shifted",
    "tilt",
    "variance",
    "velocity_to_noise",
    "velocity_to_data",
]


class GaussianMixture(NamedTuple):
    """A mixture sum_k softmax(logits)_k N(means_k, exp(log_std)^2 I), independently at every site.

    The event is [*sites, *rest]. A vector has no sites: logits [b, K], means [b, K, d]. An image
    with a mixture over the channels of each pixel: logits [b, H, W, K], means [b, H, W, K, C].

    Attributes:
        logits: of the components, [b, *sites, K].
        means: of the components, [b, *sites, K, *rest].
        log_std: the log of the standard deviation that the components and sites of a row share,
            [b].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow.distributions import mixtures
        >>> m = mixtures.GaussianMixture(
        ...     jnp.zeros((1, 2)), jnp.array([[[-1.0], [3.0]]]), jnp.array([0.0])
        ... )
        >>> mixtures.mean(m), mixtures.variance(m)
        (Array([[1.]], dtype=float32), Array([5.], dtype=float32))
    """

    logits: Float[Array, "b *sites K"]
    means: Float[Array, "b ..."]
    log_std: Float[Array, " b"]


def log_prob(m: GaussianMixture, x: Float[Array | np.ndarray, "b *event"]) -> Float[Array, " b"]:
    """The log-density of x in nats, summed over the sites.

    The log of the shared standard deviation counts once for each dimension of x.

    Args:
        m: the mixture.
        x: the points, [b, *event].

    Returns:
        The log-densities [b].

    Raises:
        TypeError: m is not a `GaussianMixture`.
        ValueError: the shapes of m do not fit each other or x.
    """
    m = check_mixture("distributions.mixtures.log_prob", m, x)
    rest = int(np.prod(m.means.shape[m.logits.ndim :], dtype=np.int64))
    z = (jnp.expand_dims(x, _axis(m)) - m.means) * expand_to(jnp.exp(-m.log_std), m.means)
    squares = _sum_rest(m, jnp.square(z))
    inner = (
        jax.nn.log_softmax(m.logits)
        - 0.5 * squares
        - rest * (expand_to(m.log_std, squares) + _HALF_LOG_2PI)
    )
    return sum_event(jax.nn.logsumexp(inner, axis=-1))


def mean(m: GaussianMixture) -> Float[Array, "b *event"]:
    """The mean of a mixture, sum_k softmax(logits)_k means_k.

    Args:
        m: the mixture.

    Returns:
        The mean [b, *event].
    """
    return jnp.sum(_weights(m) * m.means, axis=_axis(m))


def variance(m: GaussianMixture) -> Float[Array, " b"]:
    """The variance of one dimension of a mixture, averaged over the event.

    It is that of the best isotropic Gaussian: exp(log_std)^2 plus the weighted variance of the
    means.

    Args:
        m: the mixture.

    Returns:
        The variance [b].
    """
    spread = m.means - jnp.expand_dims(mean(m), _axis(m))
    between = jnp.sum(_weights(m) * jnp.square(spread), axis=_axis(m))
    return jnp.exp(2 * m.log_std) + mean_event(between)


def affine(
    m: GaussianMixture, scale: Float[Array, " b"], shift: Float[Array, "b *event"]
) -> GaussianMixture:
    """The distribution of scale * x + shift for x from a mixture.

    Args:
        m: the mixture.
        scale: one number a row, [b]; a scale of 0 gives log_std = -inf.
        shift: what is added, [b, *event].

    Returns:
        GaussianMixture: the moved mixture.
    """
    means = expand_to(scale, m.means) * m.means + jnp.expand_dims(shift, _axis(m))
    return GaussianMixture(m.logits, means, m.log_std + jnp.log(jnp.abs(scale)))


def sample(
    m: GaussianMixture, key: Key
) -> tuple[Float[Array, "b *event"], Float[Array, "b *event"], Float[Array, " b"]]:
    """Draw x, and say from which normal: one component is drawn at each site.

    Args:
        m: the mixture.
        key: what to draw with.

    Returns:
        (x, mean, std): x = mean + std * noise [b, *event], and the mean [b, *event] and standard
            deviation [b] of the component that was drawn.
    """
    which, noise = jax.random.split(key)
    k = jax.random.categorical(which, m.logits, axis=-1)
    index = k.reshape(k.shape + (1,) * (m.means.ndim - k.ndim))
    center = jnp.squeeze(jnp.take_along_axis(m.means, index, axis=_axis(m)), _axis(m))
    std = jnp.exp(m.log_std)
    return (
        center + expand_to(std, center) * jax.random.normal(noise, center.shape, center.dtype),
        center,
        std,
    )


def tilt(
    m: GaussianMixture,
    eta: Float[Array, "b *event"],
    precision: Float[Array, " b"],
    unit: Float[Array, " b"],
) -> GaussianMixture:
    """Multiply a mixture by a Gaussian factor of any precision, and normalize.

    The result is proportional to

        m(x) exp((eta . x - precision |x|^2 / 2) / unit).

    The factor is N(x; eta / precision, unit / precision) where precision is positive; it may be 0
    or negative as long as unit + precision std^2 > 0. unit = 0 is the limit of a point: finite
    weights and means, log_std = -inf.

    Args:
        m: the mixture.
        eta: the linear coefficient, [b, *event].
        precision: the quadratic coefficient, [b].
        unit: what both are divided by, [b].

    Returns:
        GaussianMixture: the tilted mixture.
    """
    s2 = jnp.exp(2 * m.log_std)
    total = unit + s2 * precision
    wide = lambda v: expand_to(v, m.means)  # noqa: E731
    eta = jnp.expand_dims(eta, _axis(m))
    # The exponent about a pivot near the factor's center where the factor is sharp, near 0 where it
    # is flat. Any pivot gives the same sum; this one loses the fewest digits.
    scale = unit**2 + precision**2
    pivot = eta * wide(precision / scale)
    away = m.means - pivot
    exponent = (
        away * eta * wide(unit**2 / scale) - 0.5 * wide(precision) * jnp.square(away)
    ) / wide(total)
    means = (wide(unit) * m.means + wide(s2) * eta) / wide(total)
    log_std = m.log_std + 0.5 * (jnp.log(unit) - jnp.log(total))
    return GaussianMixture(jax.nn.log_softmax(m.logits) + _sum_rest(m, exponent), means, log_std)


def shifted(m: GaussianMixture, bias: Float[Array, "b *event"]) -> GaussianMixture:
    """Shift a mixture by a bias that is smaller than its spread.

    With c and v the mean and the variance of m, the result is proportional to m times N(c + bias, v
    - |bias|^2) / N(c, v). A single Gaussian is moved by the bias exactly; a mixture moves weight to
    the components on that side.

    Args:
        m: the mixture.
        bias: [b, *event]; its mean square over the event, |bias|^2, is below v [b].

    Returns:
        GaussianMixture: the shifted mixture.
    """
    center, v = mean(m), variance(m)
    share = mean_event(jnp.square(bias)) / v
    return tilt(m, bias + expand_to(share, center) * center, share, (1 - share) * v)


def velocity_to_data(
    m: GaussianMixture,
    x: Float[Array, "b *event"],
    t: Float[Array, " b"] | Float[Array, ""],
    schedule: Schedule = LINEAR,
) -> GaussianMixture:
    """The mixture of the data x1 given x_t = x, from the mixture of the velocity there.

    It is `paths.velocity_to_data` of every component.

    Args:
        m: the mixture of the velocity at x, t.
        x: the points, [b, *event].
        t: their times, [b] or a scalar.
        schedule: alpha and sigma of the path x_t = alpha(t) x1 + sigma(t) x0, from
            `paths.schedules`; linear by default.

    Returns:
        GaussianMixture: that of x1.
    """
    _, s, da, ds, d = _at(schedule, x, t)
    return affine(m, s / d, -expand_to(ds / d, x) * x)


def velocity_to_noise(
    m: GaussianMixture,
    x: Float[Array, "b *event"],
    t: Float[Array, " b"] | Float[Array, ""],
    schedule: Schedule = LINEAR,
) -> GaussianMixture:
    """The mixture of the noise x0 given x_t = x, from the mixture of the velocity there.

    It is `paths.velocity_to_noise` of every component.

    Args:
        m: the mixture of the velocity at x, t.
        x: the points, [b, *event].
        t: their times, [b] or a scalar.
        schedule: alpha and sigma of the path x_t = alpha(t) x1 + sigma(t) x0, from
            `paths.schedules`; linear by default.

    Returns:
        GaussianMixture: that of x0.
    """
    a, _, da, _, d = _at(schedule, x, t)
    return affine(m, -a / d, expand_to(da / d, x) * x)


def reverse_transition(
    m: GaussianMixture,
    x: Float[Array, "b *event"],
    t: Float[Array, " b"] | Float[Array, ""],
    r: Float[Array, " b"] | Float[Array, ""],
    schedule: Schedule = LINEAR,
) -> GaussianMixture:
    """The mixture of x_r given x_t = x for a later time r, from the mixture of the velocity there.

        x_r = c1 x + c2 x1 + sqrt(c3) noise,
        c1 = (s_r / s_t)^2 a_t / a_r,  c2 = b a_r,  c3 = b s_r^2,  b = 1 - (s_r a_t / (s_t a_r))^2:

    the reverse of the Gaussian noising chain. Noise at t = 0 and data at r = 1 are in.

    Args:
        m: the mixture of the velocity at x, t.
        x: the points, [b, *event].
        t: their times, [b] or a scalar.
        r: the times to go to, [b] or a scalar, t < r.
        schedule: alpha and sigma of the path x_t = alpha(t) x1 + sigma(t) x0, from
            `paths.schedules`; linear by default.

    Returns:
        GaussianMixture: that of x_r.
    """
    a, s, _, _, _ = _at(schedule, x, t)
    a_r, s_r, _, _, _ = _at(schedule, x, r)
    ratio = s_r * a / (s * a_r)
    b = 1 - ratio**2
    x1 = velocity_to_data(m, x, t, schedule)
    moved = affine(x1, b * a_r, expand_to(ratio * s_r / s, x) * x)
    return moved._replace(log_std=0.5 * jnp.log(jnp.exp(2 * moved.log_std) + b * s_r**2))


def carried(
    x1: GaussianMixture,
    x: Float[Array, "b *event"],
    t: Float[Array, " b"] | Float[Array, ""],
    y: Float[Array, "b *event"],
    r: Float[Array, " b"] | Float[Array, ""],
    schedule: Schedule = LINEAR,
) -> GaussianMixture:
    """The posterior of x1 given x_r = y, from the posterior given x_t = x, by Bayes' rule.

    Args:
        x1: the posterior of the data at x, t.
        x: the points that it was predicted at, [b, *event].
        t: their times, [b] or a scalar, below 1.
        y: the points to carry it to, [b, *event].
        r: their times, [b] or a scalar.
        schedule: alpha and sigma of the path x_t = alpha(t) x1 + sigma(t) x0, from
            `paths.schedules`; linear by default.

    Returns:
        GaussianMixture: the posterior at y, r.
    """
    seen, linear = _seen(x, t, schedule)
    return tilt(x1, *_evidence(y, r, seen, linear, schedule))


def carried_velocity(
    x1: GaussianMixture,
    x: Float[Array, "b *event"],
    t: Float[Array, " b"] | Float[Array, ""],
    y: Float[Array, "b *event"],
    r: Float[Array, " b"] | Float[Array, ""],
    schedule: Schedule = LINEAR,
) -> Float[Array, "b *event"]:
    """The mean velocity at y, r, from the posterior of x1 that was predicted at x, t.

    It is E[velocity | x_r = y], finite for t <= r <= 1: one prediction of a network knows the field
    everywhere later.

    Args:
        x1: the posterior of the data at x, t.
        x: the points that it was predicted at, [b, *event].
        t: their times, [b] or a scalar, below 1.
        y: the points to look at, [b, *event].
        r: their times, [b] or a scalar.
        schedule: alpha and sigma of the path x_t = alpha(t) x1 + sigma(t) x0, from
            `paths.schedules`; linear by default.

    Returns:
        The velocity [b, *event].
    """
    seen, linear = _seen(x, t, schedule)
    return _velocity(x1, y, r, seen, linear, schedule)


def flow_velocity(
    data: GaussianMixture,
    y: Float[Array, "b *event"],
    r: Float[Array, " b"] | Float[Array, ""],
    schedule: Schedule = LINEAR,
) -> Float[Array, "b *event"]:
    """The velocity of the flow from N(0, I) to a mixture, each row with its own mixture.

    Args:
        data: the mixture that the flow ends at.
        y: the points, [b, *event].
        r: their times, [b] or a scalar.
        schedule: alpha and sigma of the path x_t = alpha(t) x1 + sigma(t) x0, from
            `paths.schedules`; linear by default.

    Returns:
        The velocity [b, *event].
    """
    return _velocity(data, y, r, jnp.zeros_like(r), jnp.zeros_like(y), schedule)


def exact(
    weights: ArrayLike, means: ArrayLike, variance: float, schedule: Schedule = LINEAR
) -> Field:
    """What a perfect network predicts for data from a mixture: a `Field` without params.

    For data sum_k weights_k N(means_k, variance I) the law of the velocity given x_t = x is a
    mixture with

        means      a' m_k + (a a' c + s s') / l (x - a m_k)
        variance   c D^2 / l
        weights    proportional to w_k N(x; a m_k, l),

    where a and s are the values of the schedule, c is the variance, l = a^2 c + s^2 and D = a' s -
    s' a.

    Args:
        weights: of the components, [K], positive; normalized here.
        means: of the components, [K, d].
        variance: that of every component.
        schedule: alpha and sigma of the path x_t = alpha(t) x1 + sigma(t) x0, from
            `paths.schedules`; linear by default.

    Returns:
        Field: apply(params, x [b, d], t) is a `GaussianMixture`, params {}.

    Raises:
        ValueError: the shapes do not fit, or a weight or the variance is not positive.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow.distributions import mixtures
        >>> field = mixtures.exact([0.5, 0.5], [[-1.0], [1.0]], 0.25)
        >>> m = field.apply({}, jnp.zeros((1, 1)), jnp.array([0.5]))
        >>> mixtures.mean(m)
        Array([[0.]], dtype=float32)
    """
    weights, means = np.asarray(weights, np.float64), np.asarray(means, np.float64)
    if weights.ndim != 1 or means.ndim != 2 or len(means) != len(weights):
        raise ValueError(
            f"exact: expected weights [K] and means [K, d], got {weights.shape} and {means.shape}"
        )
    if not (np.all(weights > 0) and variance > 0):
        raise ValueError(
            f"exact: expected positive weights and variance, got {weights.tolist()} and {variance}"
        )
    variance = float(variance)  # a number of numpy's would bring float64 along

    def apply(params, x, t, cond=None, *, key=None):
        a, s, da, ds, d = (
            v[:, None, None] for v in _at(schedule, x, rows(t, x.shape[0]).astype(float_dtype(x)))
        )
        m = jnp.asarray(means, a.dtype)[None]
        length = a**2 * variance + s**2
        away = x[:, None] - a * m
        logits = jnp.asarray(np.log(weights), a.dtype)[None] - 0.5 * jnp.sum(
            away**2 / length, axis=-1
        )
        centers = da * m + (a * da * variance + s * ds) / length * away
        return GaussianMixture(logits, centers, 0.5 * jnp.log(variance * d**2 / length)[:, 0, 0])

    return Field(lambda key, x, t, cond=None: {}, apply)


_HALF_LOG_2PI = 0.5 * float(np.log(2 * np.pi))


def _seen(x, t, schedule):
    """The coefficients of the likelihood exp(pull . x1 - seen |x1|^2 / 2) of x1 at x_t = x.

    seen is [b], pull [b, *event].
    """
    a, s, _, _, _ = _at(schedule, x, t)
    return (a / s) ** 2, expand_to(a / s**2, x) * x


def _evidence(y, r, seen, linear, schedule):
    """What `tilt` takes to replace that likelihood by the one at x_r = y.

    Nothing divides by sigma(r).
    """
    a, s, _, _, _ = _at(schedule, y, r)
    return expand_to(a, y) * y - expand_to(s**2, y) * linear, a**2 - s**2 * seen, s**2


def _velocity(x1, y, r, seen, linear, schedule):
    """The velocity at y, r when x1 was conditioned on the likelihood of `_seen` already.

    With e = a y - s^2 linear, q = a^2 - s^2 seen and w = s^2 + std^2 q, a component has
        E[x1] = (s^2 m + std^2 e) / w,    E[x0] = s ((1 - std^2 seen) y - a (m - std^2 linear)) / w,
    where nothing divides by s.
    """
    a, s, da, ds, _ = _at(schedule, y, r)
    eta, precision, unit = _evidence(y, r, seen, linear, schedule)
    s2 = jnp.exp(2 * x1.log_std)
    total = unit + s2 * precision
    wide = lambda v: expand_to(v, y)  # noqa: E731
    center = mean(
        x1._replace(logits=tilt(x1, eta, precision, unit).logits)
    )  # new weights, the old means
    x1_mean = (wide(unit) * center + wide(s2) * eta) / wide(total)
    x0_mean = wide(s / total) * (wide(1 - s2 * seen) * y - wide(a) * (center - wide(s2) * linear))
    return wide(da) * x1_mean + wide(ds) * x0_mean


def _at(schedule, x, t):
    """alpha, sigma, their derivatives and D = a' s - s' a at t, each [b], in float32 or better."""
    t = rows(t, x.shape[0]).astype(float_dtype(x))
    a, s, da, ds = coefficients(schedule, t)
    return a, s, da, ds, da * s - ds * a


def _axis(m):
    """Where the components are, in means and in an event with an axis added for them."""
    return m.logits.ndim - 1


def _weights(m):
    return expand_to(jax.nn.softmax(m.logits), m.means)


def _sum_rest(m, v):
    """The sum over [*rest]: [b, *sites, K, *rest] -> [b, *sites, K]."""
    return jnp.sum(v, axis=tuple(range(m.logits.ndim, v.ndim)), dtype=float_dtype(v))


def check_mixture(name: str, m: GaussianMixture, x: Any) -> GaussianMixture:
    """Raise unless m is a mixture of events like x.

    Args:
        name: of the function that asks, for the message.
        m: the mixture.
        x: the points that it should be a mixture of, [b, *event].

    Returns:
        GaussianMixture: m in float32 or better.

    Raises:
        TypeError: m is not a `GaussianMixture`.
        ValueError: the shapes of m do not fit each other or x.
    """
    if not isinstance(m, GaussianMixture):
        raise TypeError(f"{name}: expected a GaussianMixture, got {type(m).__name__}")
    k, shape = m.logits.ndim - 1, tuple(m.means.shape)
    if shape[: k + 1] != tuple(m.logits.shape) or shape[:k] + shape[k + 1 :] != jnp.shape(x):
        raise ValueError(
            f"{name}: expected logits [b, *sites, K] and means [b, *sites, K, *rest] for x [b, "
            "*sites, *rest] of shape "
            f"{list(jnp.shape(x))}, got {list(m.logits.shape)} and {list(shape)}"
        )
    if m.log_std.shape != shape[:1]:
        raise ValueError(
            f"{name}: expected log_std of shape [{shape[0]}], got {list(m.log_std.shape)}"
        )
    dtype = float_dtype(m.means, x)
    return GaussianMixture(*(v.astype(dtype) for v in m))
