"""What a network predicts, turned into a velocity: data, noise, score, EDM's denoiser, and velocities that are right at both
ends by construction. Each takes a `Field`, keeps its params and init, and returns a `Velocity` to train and sample with.

A loss on the velocity weighs the network's own error by the square of the conversion's factor: 1 / (1 - t)^2 for data on the
linear path, 1 / t^2 for noise.
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
    """The velocity of a network that predicts the data, E[x1 | x_t = x]; linear: (x1 - x) / (1 - t).

    The conversion diverges at t=1: it takes t at most 1 - margin, the network sees t as it is. ValueError unless
    0 <= margin < 0.5, and so below."""
    return _converted("from_data", field, schedule, data_to_velocity, 0.0, margin)


def from_noise(field: Field, schedule: Schedule = LINEAR, *, margin: float = 1e-3) -> Velocity:
    """The velocity of a network that predicts the noise, E[x0 | x_t = x]; linear: (x - x0) / t. The conversion diverges at
    t=0: it takes t at least margin."""
    return _converted("from_noise", field, schedule, noise_to_velocity, margin, 0.0)


def from_score(field: Field, schedule: Schedule = LINEAR, *, margin: float = 1e-3) -> Velocity:
    """The velocity of a network that predicts grad log p_t(x), for standard normal noise independent of the data; linear:
    (x + (1 - t) score) / t. The conversion diverges at t=0: it takes t at least margin."""
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
    """EDM's denoiser D(x, sigma) = c_skip x + c_out F(c_in x, log(sigma) / 4), unit variance in and out of the network, with
    n^2 = sigma^2 + data_std^2: c_skip = data_std^2 / n^2, c_out = sigma data_std / n, c_in = 1 / n. See `paths.from_edm`.

    Source: Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", 2022.
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
    """A velocity that is right at the ends by construction, and its score (t v - x) / (1 - t), worked out without the
    division: finite up to t=1. Both take the params of the network."""

    velocity: Velocity
    score: Field


def boundary_mask(
    field: Field,
    *,
    data_mean: ArrayLike | Callable[[Cond], Array] | None = None,
    gain: float | None = None,
) -> Bounded:
    """A rectified flow (linear path, source N(0, I)) that meets its known ends, by a mask on the network:
        v = (1 - t) (E[x1] - x) + t x + gain t (1 - t) net(x, t)      score = t (E[x1] - x) - (1 + t) x + gain t^2 net
        v = t x + gain (1 - t) net(x, t)                              score = gain t net - (1 + t) x    without data_mean
    since the exact velocity is E[x1] - x at t=0 and x at t=1 (derived: x is x0 there and independent of x1, or x1).
    An unconstrained network's error at t=1 is multiplied by t / (1 - t) in the score.

    data_mean: E[x1], which broadcasts to the event, or a function of cond -> [b, *event]. None: t=1 alone is enforced.
    gain: 4 with data_mean, so that the mask is 1 in the middle, else 1.
    Source of the idea: Hu, Liao, Xu, Liu, Li, Ie, Fei, Liu, "Improving Rectified Flow with Boundary Conditions", 2025; the
    masks are ours.
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
    """As `boundary_mask`, by taking away what the network says at the ends:
        v = (1 - t) (E[x1] - x) + t x + net(x, t) - (1 - t) net(x, 0) - t net(x, 1)
        v = x + net(x, t) - net(x, 1)                                       without data_mean
    Three evaluations of the network, or two; under one key for dropout. The score holds (net(x, t) - net(x, 1)) / (1 - t),
    whose 1 - t is at least the root of the machine epsilon: a difference quotient near t=1.
    Source of the idea: Hu et al., "Improving Rectified Flow with Boundary Conditions", 2025.
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
