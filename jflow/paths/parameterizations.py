"""What a network predicts, turned into a velocity to train and sample with.

A network may predict the data, the noise, the score or EDM's denoiser; other velocities are right
at both ends by construction. Each function takes a `Field`, keeps its params and init, and returns
a `Velocity`.

A loss on the velocity weighs the network's own error by the square of the factor of the conversion:
1 / (1 - t)^2 for data on the linear path, 1 / t^2 for noise.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike

from jflow._core.arrays import expand_to
from jflow._core.checks import like_state, rows
from jflow._core.keys import same_draws
from jflow.paths._affine import (
    LINEAR,
    Schedule,
    data_to_velocity,
    noise_to_velocity,
    score_to_velocity,
)
from jflow.types import Array, Cond, Field, Velocity

__all__ = [
    "Bounded",
    "boundary_mask",
    "boundary_subtraction",
    "edm_denoiser",
    "from_score",
    "from_noise",
    "from_data",
]


def from_data(field: Field, schedule: Schedule = LINEAR, *, margin: float = 1e-3) -> Velocity:
    """The velocity of a network that predicts the data, E[x1 | x_t = x].

    Also known as: data prediction, x1 prediction, clean data prediction, denoiser.

    On the linear path it is (x1 - x) / (1 - t); on others see `paths.data_to_velocity`. The
    conversion diverges at t=1: it takes t at most 1 - margin, the network sees t as it is.

    Args:
        field: the network, (params, x [b, *event], t [b], cond) -> [b, *event].
        schedule: the path; the default is the linear one.
        margin: how far from t=1 the conversion stays, in [0, 0.5).

    Returns:
        Velocity: the velocity, with the params and the init of `field`.

    Raises:
        ValueError: margin is outside [0, 0.5).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow.paths import parameterizations
        >>> from jflow.types import Field
        >>> field = Field(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x + 3)
        >>> velocity = parameterizations.from_data(field)  # all data at 3
        >>> velocity.apply({}, jnp.array([[1.0]]), jnp.array([0.5])).tolist()
        [[4.0]]
    """
    return _converted("from_data", field, schedule, data_to_velocity, 0.0, margin)


def from_noise(field: Field, schedule: Schedule = LINEAR, *, margin: float = 1e-3) -> Velocity:
    """The velocity of a network that predicts the noise, E[x0 | x_t = x].

    Also known as: noise prediction, epsilon prediction, eps prediction, predict noise.

    On the linear path it is (x - x0) / t; on others see `paths.noise_to_velocity`. The conversion
    diverges at t=0: it takes t at least margin, the network sees t as it is.

    Args:
        field: the network, (params, x [b, *event], t [b], cond) -> [b, *event].
        schedule: the path; the default is the linear one.
        margin: how far from t=0 the conversion stays, in [0, 0.5).

    Returns:
        Velocity: the velocity, with the params and the init of `field`.

    Raises:
        ValueError: margin is outside [0, 0.5).
    """
    return _converted("from_noise", field, schedule, noise_to_velocity, margin, 0.0)


def from_score(field: Field, schedule: Schedule = LINEAR, *, margin: float = 1e-3) -> Velocity:
    """The velocity of a network that predicts the score, grad log p_t(x).

    Also known as: score prediction, score matching network.

    On the linear path it is (x + (1 - t) score) / t; on others see `paths.score_to_velocity`. It
    holds for standard normal noise that is independent of the data. The conversion diverges at t=0:
    it takes t at least margin, the network sees t as it is.

    Args:
        field: the network, (params, x [b, *event], t [b], cond) -> [b, *event].
        schedule: the path; the default is the linear one.
        margin: how far from t=0 the conversion stays, in [0, 0.5).

    Returns:
        Velocity: the velocity, with the params and the init of `field`.

    Raises:
        ValueError: margin is outside [0, 0.5).
    """
    return _converted("from_score", field, schedule, score_to_velocity, margin, 0.0)


def _converted(name, field, schedule, convert, start, end):
    if not (0 <= start < 0.5 and 0 <= end < 0.5):
        raise ValueError(f"{name}: expected 0 <= margin < 0.5, got {max(start, end)}")
    start, end = (
        float(start),
        float(end),
    )  # numbers of numpy's would bring float64 along, here and below

    def apply(params, x, t, cond=None, *, key=None):
        t = rows(t, x.shape[0])
        prediction = like_state(name, field.apply(params, x, t, cond, key=key), x)
        return convert(prediction, x, jnp.clip(t, start, 1 - end), schedule).astype(x.dtype)

    return Velocity(field.init, apply)


def edm_denoiser(field: Field, *, data_std: float = 0.5) -> Field:
    """EDM's preconditioned denoiser of a raw network: unit variance in and out of the network.

        D(x, sigma) = c_skip x + c_out F(c_in x, log(sigma) / 4)
        c_skip = data_std^2 / n^2,  c_out = sigma data_std / n,  c_in = 1 / n
        n^2 = sigma^2 + data_std^2

    `paths.from_edm` makes a velocity of it.

    Args:
        field: the network F.
        data_std: the standard deviation of the data, above 0.

    Returns:
        Field: D of (x [b, *event], sigma [b]), with the params of `field`.

    Raises:
        ValueError: data_std is not finite and above 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow.paths import parameterizations
        >>> from jflow.types import Field
        >>> field = Field(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> denoiser = parameterizations.edm_denoiser(field, data_std=0.5)
        >>> x1 = denoiser.apply({}, jnp.array([[2.0]]), jnp.array([0.5]))
        >>> round(float(x1[0, 0]), 3)  # c_skip = 1/2
        1.0

    References:
        Karras, Aittala, Aila, Laine, *Elucidating the Design Space of Diffusion-Based Generative
            Models*, 2022, arXiv:2206.00364.
    """
    if not 0 < data_std < math.inf:
        raise ValueError(f"edm_denoiser: expected a finite data_std > 0, got {data_std}")
    data_std = float(data_std)

    def scaled(x, sigma):
        sigma = rows(sigma, x.shape[0])
        n = jnp.hypot(sigma, data_std)
        return sigma, n, (x / expand_to(n, x)).astype(x.dtype), jnp.log(sigma) / 4

    def init(key, x, sigma, cond=None):
        _, _, inner, level = scaled(x, sigma)
        return field.init(key, inner, level, cond)

    def apply(params, x, sigma, cond=None, *, key=None):
        sigma, n, inner, level = scaled(x, sigma)
        raw = like_state("edm_denoiser", field.apply(params, inner, level, cond, key=key), x)
        return (
            expand_to((data_std / n) ** 2, x) * x + expand_to(sigma * data_std / n, x) * raw
        ).astype(x.dtype)

    return Field(init, apply)


class Bounded(NamedTuple):
    """A velocity that is right at the ends by construction, and its score.

    The score (t v - x) / (1 - t) is computed without the division, so that it is finite up to t=1.
    Both take the params of the network.

    Attributes:
        velocity: the velocity.
        score: the score, grad log p_t(x), on the linear path from a standard normal source.
    """

    velocity: Velocity
    score: Field


def boundary_mask(
    field: Field,
    *,
    data_mean: ArrayLike | Callable[[Cond], Array] | None = None,
    gain: float | None = None,
) -> Bounded:
    """A rectified flow that meets its known ends, by a mask on the network.

    On the linear path with source N(0, I),

        v = (1 - t) (E[x1] - x) + t x + gain t (1 - t) net(x, t)
        score = t (E[x1] - x) - (1 + t) x + gain t^2 net

    and without data_mean

        v = t x + gain (1 - t) net(x, t)
        score = gain t net - (1 + t) x

    since the exact velocity is E[x1] - x at t=0 and x at t=1 (derived: x is x0 there and
    independent of x1, or x1). The error of an unconstrained network at t=1 is multiplied by t / (1
    - t) in the score.

    Args:
        field: the network.
        data_mean: E[x1], which broadcasts to the event, or a function of cond -> [b, *event]. With
            None, t=1 alone is enforced.
        gain: the factor of the network, above 0. None is 4 with data_mean, so that the mask is 1 in
            the middle, else 1.

    Returns:
        Bounded: velocity and score, with the params and the init of `field`.

    Raises:
        ValueError: gain is not finite and above 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow.paths import parameterizations
        >>> from jflow.types import Field
        >>> field = Field(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x + 9)
        >>> bounded = parameterizations.boundary_mask(field, data_mean=5.0)
        >>> x = jnp.array([[1.0], [1.0]])
        >>> bounded.velocity.apply({}, x, jnp.array([0.0, 1.0])).tolist()  # the network has no part
        [[4.0], [1.0]]

    References:
        Hu, Liao, Xu, Liu, Li, Ie, Fei, Liu, *Improving Rectified Flow with Boundary Conditions*,
            2025, arXiv:2506.15864 (the idea; the masks are ours).
    """
    gain = (1.0 if data_mean is None else 4.0) if gain is None else gain
    if not 0 < gain < math.inf:
        raise ValueError(f"boundary_mask: expected a finite gain > 0, got {gain}")
    gain = float(gain)

    def velocity(params, x, t, cond=None, *, key=None):
        t, net = _network("boundary_mask", field, params, x, cond, key)(t)
        s = expand_to(t, x)
        if data_mean is None:
            return (s * x + gain * (1 - s) * net).astype(x.dtype)
        return _limits(data_mean, cond, x, s) + (gain * s * (1 - s) * net).astype(x.dtype)

    def score(params, x, t, cond=None, *, key=None):
        t, net = _network("boundary_mask", field, params, x, cond, key)(t)
        s = expand_to(t, x)
        if data_mean is None:
            return (gain * s * net - (1 + s) * x).astype(x.dtype)
        return (s * (_mean(data_mean, cond, x) - x) - (1 + s) * x + gain * s**2 * net).astype(
            x.dtype
        )

    return Bounded(Velocity(field.init, velocity), Field(field.init, score))


def boundary_subtraction(
    field: Field, *, data_mean: ArrayLike | Callable[[Cond], Array] | None = None
) -> Bounded:
    """A rectified flow that meets its known ends, by subtracting what the network says there.

    On the linear path with source N(0, I),

        v = (1 - t) (E[x1] - x) + t x + net(x, t) - (1 - t) net(x, 0) - t net(x, 1)

    and without data_mean

        v = x + net(x, t) - net(x, 1).

    It takes three evaluations of the network, or two, under one key for dropout. The score holds
    (net(x, t) - net(x, 1)) / (1 - t), whose 1 - t is at least the root of the machine epsilon: a
    difference quotient near t=1.

    Args:
        field: the network.
        data_mean: E[x1], which broadcasts to the event, or a function of cond -> [b, *event]. With
            None, t=1 alone is enforced.

    Returns:
        Bounded: velocity and score, with the params and the init of `field`.

    References:
        Hu, Liao, Xu, Liu, Li, Ie, Fei, Liu, *Improving Rectified Flow with Boundary Conditions*,
            2025, arXiv:2506.15864 (the idea).
    """

    def velocity(params, x, t, cond=None, *, key=None):
        net = _network("boundary_subtraction", field, params, x, cond, key)
        (t, now), (_, last) = net(t), net(1.0)
        s = expand_to(t, x)
        if data_mean is None:
            return (x + now - last).astype(x.dtype)
        first = net(0.0)[1]
        return _limits(data_mean, cond, x, s) + (now - (1 - s) * first - s * last).astype(x.dtype)

    def score(params, x, t, cond=None, *, key=None):
        net = _network("boundary_subtraction", field, params, x, cond, key)
        t = rows(t, x.shape[0])
        left = jnp.maximum(1 - t, float(jnp.finfo(t.dtype).eps) ** 0.5)
        last = net(1.0)[1]
        s, slope = expand_to(t, x), (net(1 - left)[1] - last) / expand_to(left, x)
        if data_mean is None:
            return (s * slope - x).astype(x.dtype)
        limits = s * (_mean(data_mean, cond, x) - x) - (1 + s) * x
        return (limits + s * (slope + last - net(0.0)[1])).astype(x.dtype)

    return Bounded(Velocity(field.init, velocity), Field(field.init, score))


def _network(name, field, params, x, cond, key):
    """t -> (t [b], net(x, t)), under one key."""

    def at(t):
        t = rows(jnp.asarray(t, jnp.result_type(t, x)), x.shape[0])
        return t, like_state(name, field.apply(params, x, t, cond, key=same_draws(key)), x)

    return at


def _mean(data_mean, cond, x):
    mean = data_mean(cond) if callable(data_mean) else jnp.asarray(data_mean, x.dtype)
    return jnp.broadcast_to(mean if mean.ndim == x.ndim else mean[None], x.shape)


def _limits(data_mean, cond, x, s):
    return ((1 - s) * (_mean(data_mean, cond, x) - x) + s * x).astype(x.dtype)
