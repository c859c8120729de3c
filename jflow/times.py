"""Distributions of the training time t in [0, 1]: t = 0 is the source (noise), t = 1 is data.

A law is a quantile function pushed over uniform draws, and the draws are a `Time` too: `mode(draws=low_discrepancy())`.
The papers' time runs from data to noise, t = 1 - theirs; laws that are symmetric about 1/2 are the same in both.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.times import Times, partition
from jflow.types import Array, Time, TimePair

_T = TypeVar("_T", Array, np.ndarray, float)

__all__ = [
    "antithetic",
    "cosmap",
    "fixed",
    "from_quantile",
    "interval_pairs",
    "logit_normal",
    "low_discrepancy",
    "mode",
    "nearby_pairs",
    "pairs",
    "rectified_pairs",
    "sequential",
    "shift",
    "shifted",
    "u_shaped",
    "uniform",
]


def uniform(low: float = 0.0, high: float = 1.0) -> Time:
    """t uniform on [low, high]: (key, n) -> t [n]. Errors: ValueError unless 0 <= low < high <= 1."""
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"times.uniform: expected 0 <= low < high <= 1, got low={low}, high={high}"
        )
    return lambda key, n: jax.random.uniform(key, (n,), minval=low, maxval=high)


def antithetic() -> Time:
    """Uniform on [0, 1] in pairs u, 1 - u, in random order: the mean over a batch of what is monotone in t varies less.
    n odd: one is alone."""

    def draw(key, n):
        draw_key, order_key = jax.random.split(key)
        u = jax.random.uniform(draw_key, ((n + 1) // 2,))
        return jax.random.permutation(order_key, jnp.concatenate([u, 1 - u])[:n])

    return draw


def low_discrepancy() -> Time:
    """Uniform on [0, 1]: n equally spaced times, (k + u) / n with one uniform u for all, in random order, so that every
    batch covers the interval evenly; each time by itself is uniform.

    Source: Kingma, Salimans, Poole, Ho, "Variational Diffusion Models", 2021 (appendix I.1; the random order is added).
    """

    def draw(key, n):
        draw_key, order_key = jax.random.split(key)
        u = jax.random.uniform(draw_key)
        t = (jnp.arange(n, dtype=u.dtype) + u) / n
        return jax.random.permutation(order_key, jnp.minimum(t, 1))

    return draw


_UNIFORM = uniform()


def from_quantile(quantile: Callable[[Array], Array], draws: Time = _UNIFORM) -> Time:
    """t = quantile(u), u from `draws`, uniform on [0, 1]: `uniform()`, `antithetic()` or `low_discrepancy()`.

    quantile: the inverse of the distribution function, [n] in [0, 1] -> [n] in [0, 1]."""
    return lambda key, n: quantile(draws(key, n))


def logit_normal(mean: float = 0.0, std: float = 1.0, *, draws: Time | None = None) -> Time:
    """t = sigmoid(mean + std z), z standard normal: (key, n) -> t [n]. A positive mean spends more times near data.

    draws: uniform ones, whose normal quantile is z. The paper's time runs from data to noise, so that its location m is
    -mean here, and so is diffusers' logit_mean where its draw is the noise level. Errors: ValueError unless std > 0.
    Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024.
    """
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(
            f"times.logit_normal: expected a finite mean and std > 0, got mean={mean}, std={std}"
        )
    mean, std = (
        float(mean),
        float(std),
    )  # numbers of numpy's would bring float64 along, here and below
    if draws is None:
        return lambda key, n: jax.nn.sigmoid(mean + std * jax.random.normal(key, (n,)))
    return from_quantile(lambda u: jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(u)), draws)


def mode(scale: float = 1.29, *, draws: Time = _UNIFORM) -> Time:
    """t = u + scale (cos^2(pi u / 2) - 1 + u), u uniform: symmetric about 1/2, with a mode there for scale > 0, more times
    at the ends for scale < 0, uniform at 0. Errors: ValueError unless -1 <= scale <= 2 / (pi - 2), where t grows with u.

    Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024 (its 1 - t).
    """
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise ValueError(f"times.mode: expected -1 <= scale <= 2 / (pi - 2) = 1.7519, got {scale}")
    scale = float(scale)
    # -sin^2 for cos^2 - 1: exact at u = 0
    return from_quantile(lambda u: u + scale * (u - jnp.sin(jnp.pi / 2 * u) ** 2), draws)


def cosmap(*, draws: Time = _UNIFORM) -> Time:
    """Density 2 / (pi (1 - 2 t + 2 t^2)): on the linear path the signal-to-noise ratios of a cosine schedule at uniform
    times. t = sin / (sin + cos) of pi u / 2, symmetric about 1/2.

    Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024.
    """

    def quantile(u):
        s, c = jnp.sin(jnp.pi / 2 * u), jnp.sin(jnp.pi / 2 * (1 - u))
        return s / (s + c)

    return from_quantile(quantile, draws)


def u_shaped(a: float = 4.0, *, draws: Time = _UNIFORM) -> Time:
    """Density proportional to e^(a t) + e^(a (1 - t)): more times at both ends, where the error of a rectified flow that
    is trained on its own pairs is larger; symmetric about 1/2. Errors: ValueError unless 0 < a < 80.

    Source: Lee, Lin, Fanti, "Improving the Training of Rectified Flows", 2024; this is the law its code draws from.
    """
    if not 0 < a < 80:
        raise ValueError(f"times.u_shaped: expected 0 < a < 80, got {a}")
    a = float(a)
    # about the middle the density is a cosh, the distribution function a sinh
    return from_quantile(
        lambda u: jnp.clip(0.5 + jnp.arcsinh((2 * u - 1) * math.sinh(a / 2)) / a, 0, 1), draws
    )


def shift(t: _T, factor: float) -> _T:
    """t / (t + factor (1 - t)): factor > 1 moves times towards noise (t = 0), and shift(., 1 / factor) is the inverse.

    In noise levels sigma = 1 - t it is factor sigma / (1 + (factor - 1) sigma): the odds of noise times factor. For times
    of training and grids of sampling alike. factor is sqrt(size / base size) for events of more numbers than the model's
    schedule was made for (SD3), and e^mu in the "exponential" form of diffusers. Errors: ValueError unless factor > 0.
    Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024.
    """
    if not isinstance(factor, jax.core.Tracer):
        if not 0 < factor < math.inf:
            raise ValueError(f"times.shift: expected a finite factor > 0, got {factor}")
        factor = float(factor)
    return t / (t + factor * (1 - t))


def shifted(time: Time, factor: float) -> Time:
    """The times of `time`, shifted towards noise by factor (see `shift`)."""
    shift(0.5, factor)  # the check of factor belongs to construction
    return lambda key, n: shift(time(key, n), factor)


def pairs(time: Time = _UNIFORM, *, equal: float = 0.0) -> TimePair:
    """(t, r) with t <= r: two draws of `time`, sorted; in each row r = t with probability `equal`: (key, n) -> (t, r).

    MeanFlow's are pairs(logit_normal(0.4, 1.0), equal=0.75) for images. Errors: ValueError for equal outside [0, 1].
    Source: Geng, Deng, Bai, Kolter, He, "Mean Flows for One-step Generative Modeling", 2025 (its time is 1 - t).
    """
    if not 0 <= equal <= 1:
        raise ValueError(f"times.pairs: expected equal in [0, 1], got {equal}")

    def draw(key, n):
        one, other, same = jax.random.split(key, 3)
        a, b = time(one, n), time(other, n)
        t = jnp.minimum(a, b)
        return t, jnp.where(jax.random.bernoulli(same, equal, (n,)), t, jnp.maximum(a, b))

    return draw


_LENGTH = logit_normal(-0.8, 1.0)


def interval_pairs(length: Time = _LENGTH) -> TimePair:
    """(t, r) of which r - t is drawn from `length`, and t uniformly from what is left, [0, 1 - (r - t)].

    The default is that of a public reimplementation of Align Your Flow's algorithm."""

    def draw(key, n):
        length_key, start_key = jax.random.split(key)
        gap = length(length_key, n)
        t = jax.random.uniform(start_key, (n,), gap.dtype) * (1 - gap)
        return t, jnp.minimum(t + gap, 1)

    return draw


def fixed(times: Times) -> Time:
    """t drawn from a set, each time as often: (key, n) -> t [n]. Errors: ValueError unless all lie in [0, 1]."""
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or times.size == 0 or not np.all((times >= 0) & (times <= 1)):
        raise ValueError(f"fixed: expected times in [0, 1], got {times.tolist()}")
    return lambda key, n: jnp.asarray(times, float)[jax.random.randint(key, (n,), 0, times.size)]


def rectified_pairs(
    time: Time | None = None,
    gap: Time | None = None,
    *,
    equal: float = 0.75,
    whole: tuple[float, float] = (0.2, 0.6),
) -> TimePair:
    """(t, r) for mean_flow on rectified pairs: t of `time`, r = min(t + gap, 1), and r = t with probability `equal`.

    whole = (a, b): rows with t < a whose r lies beyond b go all the way, r = 1. time: u_shaped(4) where none is given; gap
    in [0, 1]: logit_normal(-0.8, 1). The law is that of the paper's public code (its time is 1 - t).
    Errors: ValueError for equal outside [0, 1], and unless 0 <= a <= b <= 1.
    Source: Zhang et al., "Flow Straighter and Faster: Efficient One-Step Generative Modeling via MeanFlow on Rectified
        Trajectories", 2025.
    """
    time = u_shaped(4.0) if time is None else time
    gap = _LENGTH if gap is None else gap
    a, b = whole
    if not 0 <= equal <= 1:
        raise ValueError(f"rectified_pairs: expected equal in [0, 1], got {equal}")
    if not 0 <= a <= b <= 1:
        raise ValueError(
            f"rectified_pairs: expected whole = (a, b) with 0 <= a <= b <= 1, got {whole}"
        )

    def draw(key, n):
        time_key, gap_key, same_key = jax.random.split(key, 3)
        t = time(time_key, n)
        r = jnp.minimum(t + gap(gap_key, n), 1)
        r = jnp.where((t < a) & (r > b), jnp.ones_like(r), r)
        return t, jnp.where(jax.random.bernoulli(same_key, equal, (n,)), t, r)

    return draw


def nearby_pairs(reach: float = 0.12) -> TimePair:
    """(t, r): t uniform on [0, 1], r - t uniform on [0, reach], r at most 1: (key, n) -> (t, r).

    0.12 is what the paper's code draws, one number a batch there, and there r may pass 1. reach should cover the steps of the
    grid that is sampled with. Errors: ValueError unless 0 < reach <= 1."""
    if not 0 < reach <= 1:
        raise ValueError(f"nearby_pairs: expected 0 < reach <= 1, got {reach}")

    def draw(key, n):
        first, second = jax.random.split(key)
        t = jax.random.uniform(first, (n,))
        return t, jnp.minimum(t + reach * jax.random.uniform(second, (n,)), 1)

    return draw


def sequential(knots: Times, *, starts: float = 0.25) -> Time:
    """Uniform times, but for a share `starts` of the rows, which lies at the starts of the segments: (key, n) -> t [n].

    The velocity of `sequential_path` jumps at the knots. A network of t is smooth and settles between its two values there,
    exactly where Euler looks; rows at the knots hold it to the value after. (Seen on two Gaussians in 1-D, four
    segments: error of four Euler steps 0.29 with uniform times, 0.11 with these; PeRFlow on two moons, W2 of four steps
    less that of data: 0.10 with starts = 0.25, 0.02 with 0.75.) starts = 1 is distillation into one
    step a segment. Errors: ValueError for starts outside [0, 1] and for knots that don't rise strictly from 0 to 1.
    """
    first = fixed(partition("sequential", knots)[:-1])
    if not 0 <= starts <= 1:
        raise ValueError(f"sequential: expected starts in [0, 1], got {starts}")

    def draw(key, n):
        which, at, between = jax.random.split(key, 3)
        return jnp.where(
            jax.random.bernoulli(which, starts, (n,)),
            first(at, n),
            jax.random.uniform(between, (n,)),
        )

    return draw
