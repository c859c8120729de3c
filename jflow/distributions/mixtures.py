"""Gaussian mixtures as values: what a mixture-predicting `Field` returns, and the algebra its loss, solvers and guidance
share.

A mixture may be over a whole event, or one over every site of it (each pixel with a mixture over its channels). The
components of a row are isotropic and share one standard deviation, which is what keeps all of this in closed form.

The posterior of data x1 given a point x_t = a x1 + s x0 with x0 ~ N(0, I) drawn independently, as one t gives it, can be
carried to another point and time by Bayes' rule: p(x1 | x_r) ~ p(x1 | x_t) N(x_r; a_r x1, s_r^2) / N(x_t; a_t x1, s_t^2).
With the exact posterior that is exact too, so that a single prediction knows the whole field (`carried_velocity`).

Source: Chen, Zhang, Tan, Xu, Luan, Guibas, Wetzstein, Bi, "Gaussian Mixture Flow Matching Models", 2025. The paper's
time runs from data (0) to noise (1); here t = 0 is noise. The forms below, finite at both ends, are derived.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

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
    """sum_k softmax(logits)_k N(means_k, exp(log_std)^2 I), independently at every site.

    logits [b, *sites, K]; means [b, *sites, K, *rest], the event being [*sites, *rest]; log_std [b], shared by the
    components and sites of a row. A vector has no sites: logits [b, K], means [b, K, d]. An image with a mixture over the
    channels of each pixel: logits [b, H, W, K], means [b, H, W, K, C].
    """

    logits: Array
    means: Array
    log_std: Array


def log_prob(m: GaussianMixture, x: Array) -> Array:
    """log density of x [b, *event] in nats, summed over sites: [b].

    The log of the shared standard deviation counts once for each dimension of x.
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


def mean(m: GaussianMixture) -> Array:
    """E[x]: [b, *event]."""
    return jnp.sum(_weights(m) * m.means, axis=_axis(m))


def variance(m: GaussianMixture) -> Array:
    """The variance of a dimension, averaged over the event: [b]. That of the best isotropic Gaussian."""
    spread = m.means - jnp.expand_dims(mean(m), _axis(m))
    between = jnp.sum(_weights(m) * jnp.square(spread), axis=_axis(m))
    return jnp.exp(2 * m.log_std) + mean_event(between)


def affine(m: GaussianMixture, scale: Array, shift: Array) -> GaussianMixture:
    """The law of scale x + shift: scale [b], shift [b, *event]. A scale of 0 has log_std = -inf."""
    means = expand_to(scale, m.means) * m.means + jnp.expand_dims(shift, _axis(m))
    return GaussianMixture(m.logits, means, m.log_std + jnp.log(jnp.abs(scale)))


def sample(m: GaussianMixture, key: Key) -> tuple[Array, Array, Array]:
    """(x, mean, std), x = mean + std noise: one component is drawn at each site, mean [b, *event] and std [b] are its own."""
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


def tilt(m: GaussianMixture, eta: Array, precision: Array, unit: Array) -> GaussianMixture:
    """The mixture proportional to m(x) exp((eta . x - precision |x|^2 / 2) / unit).

    eta [b, *event], precision [b] and unit [b]. The factor is N(x; eta / precision, unit / precision) where precision is
    positive; it may be 0 or negative as long as unit + precision std^2 > 0. unit = 0 is the limit of a point: finite
    weights and means, log_std = -inf.
    """
    s2 = jnp.exp(2 * m.log_std)
    total = unit + s2 * precision
    wide = lambda v: expand_to(v, m.means)  # noqa: E731
    eta = jnp.expand_dims(eta, _axis(m))
    # The exponent about a pivot near the factor's center where the factor is sharp, near 0 where it is flat. Any pivot
    # gives the same sum; this one loses the fewest digits.
    scale = unit**2 + precision**2
    pivot = eta * wide(precision / scale)
    away = m.means - pivot
    exponent = (
        away * eta * wide(unit**2 / scale) - 0.5 * wide(precision) * jnp.square(away)
    ) / wide(total)
    means = (wide(unit) * m.means + wide(s2) * eta) / wide(total)
    log_std = m.log_std + 0.5 * (jnp.log(unit) - jnp.log(total))
    return GaussianMixture(jax.nn.log_softmax(m.logits) + _sum_rest(m, exponent), means, log_std)


def shifted(m: GaussianMixture, bias: Array) -> GaussianMixture:
    """m times N(c + bias, v - |bias|^2) / N(c, v), c and v its mean and variance: towards c + bias, none farther than std.

    bias [b, *event], its mean square |bias|^2 over the event below v [b]. A single Gaussian is moved by bias exactly; a
    mixture moves weight to the components on that side.
    """
    center, v = mean(m), variance(m)
    share = mean_event(jnp.square(bias)) / v
    return tilt(m, bias + expand_to(share, center) * center, share, (1 - share) * v)


def velocity_to_data(
    m: GaussianMixture, x: Array, t: Array, schedule: Schedule = LINEAR
) -> GaussianMixture:
    """The mixture of x1 given x_t = x from that of the velocity: `paths.velocity_to_data` of every component."""
    _, s, da, ds, d = _at(schedule, x, t)
    return affine(m, s / d, -expand_to(ds / d, x) * x)


def velocity_to_noise(
    m: GaussianMixture, x: Array, t: Array, schedule: Schedule = LINEAR
) -> GaussianMixture:
    """The mixture of the noise x0 given x_t = x from that of the velocity."""
    a, _, da, _, d = _at(schedule, x, t)
    return affine(m, -a / d, expand_to(da / d, x) * x)


def reverse_transition(
    m: GaussianMixture, x: Array, t: Array, r: Array, schedule: Schedule = LINEAR
) -> GaussianMixture:
    """The mixture of x_r given x_t = x, t < r, from that of the velocity at x, t.

    x_r = c1 x + c2 x1 + sqrt(c3) noise with c1 = (s_r / s_t)^2 a_t / a_r, c2 = b a_r, c3 = b s_r^2 and
    b = 1 - (s_r a_t / (s_t a_r))^2: the reverse of the Gaussian noising chain. Noise at t = 0 and data at r = 1 are in.
    """
    a, s, _, _, _ = _at(schedule, x, t)
    a_r, s_r, _, _, _ = _at(schedule, x, r)
    ratio = s_r * a / (s * a_r)
    b = 1 - ratio**2
    x1 = velocity_to_data(m, x, t, schedule)
    moved = affine(x1, b * a_r, expand_to(ratio * s_r / s, x) * x)
    return moved._replace(log_std=0.5 * jnp.log(jnp.exp(2 * moved.log_std) + b * s_r**2))


def carried(
    x1: GaussianMixture, x: Array, t: Array, y: Array, r: Array, schedule: Schedule = LINEAR
) -> GaussianMixture:
    """The posterior of x1 given x_r = y from the posterior given x_t = x, t < 1: Bayes' rule, see the top of the file."""
    seen, linear = _seen(x, t, schedule)
    return tilt(x1, *_evidence(y, r, seen, linear, schedule))


def carried_velocity(
    x1: GaussianMixture, x: Array, t: Array, y: Array, r: Array, schedule: Schedule = LINEAR
) -> Array:
    """E[velocity | x_r = y] under the posterior x1 that was predicted at x, t < 1: [b, *event], finite for t <= r <= 1."""
    seen, linear = _seen(x, t, schedule)
    return _velocity(x1, y, r, seen, linear, schedule)


def flow_velocity(data: GaussianMixture, y: Array, r: Array, schedule: Schedule = LINEAR) -> Array:
    """The velocity at y [b, *event], r of the flow from N(0, I) to `data`, each row with its own mixture: [b, *event]."""
    return _velocity(data, y, r, jnp.zeros_like(r), jnp.zeros_like(y), schedule)


def exact(
    weights: ArrayLike, means: ArrayLike, variance: float, schedule: Schedule = LINEAR
) -> Field:
    """What a perfect network predicts for data sum_k weights_k N(means_k, variance I): a `Field` without params.

    weights [K], means [K, d]; apply(params, x [b, d], t) is the law of the velocity given x_t = x, with components
        a' m + (a a' c + s s') / l (x - a m),  variance c D^2 / l,  weights ~ w_k N(x; a m_k, l),
    where c is the variance, l = a^2 c + s^2 and D = a' s - s' a. Raises ValueError for shapes that don't fit.
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
    """seen [b] and linear [b, *event] of the likelihood exp(linear . x1 - seen |x1|^2 / 2) of x1 at x_t = x."""
    a, s, _, _, _ = _at(schedule, x, t)
    return (a / s) ** 2, expand_to(a / s**2, x) * x


def _evidence(y, r, seen, linear, schedule):
    """What `tilt` takes to replace that likelihood by the one at x_r = y; nothing divides by sigma(r)."""
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
    """The sum over what a site's components are Gaussians of: [b, *sites, K, *rest] -> [b, *sites, K]."""
    return jnp.sum(v, axis=tuple(range(m.logits.ndim, v.ndim)), dtype=float_dtype(v))


def check_mixture(name: str, m: GaussianMixture, x: Array) -> GaussianMixture:
    """m in float32 or better; raise unless it is a mixture of events like x."""
    if not isinstance(m, GaussianMixture):
        raise TypeError(f"{name}: expected a GaussianMixture, got {type(m).__name__}")
    k, shape = m.logits.ndim - 1, tuple(m.means.shape)
    if shape[: k + 1] != tuple(m.logits.shape) or shape[:k] + shape[k + 1 :] != jnp.shape(x):
        raise ValueError(
            f"{name}: expected logits [b, *sites, K] and means [b, *sites, K, *rest] for x [b, *sites, *rest] of shape "
            f"{list(jnp.shape(x))}, got {list(m.logits.shape)} and {list(shape)}"
        )
    if m.log_std.shape != shape[:1]:
        raise ValueError(
            f"{name}: expected log_std of shape [{shape[0]}], got {list(m.log_std.shape)}"
        )
    dtype = float_dtype(m.means, x)
    return GaussianMixture(*(v.astype(dtype) for v in m))
