"""Laws of the training time t in [0, 1]: t = 0 is the source (noise), t = 1 is data.

A `Time` is a function (key, n) -> t [n]; most are a quantile function applied to uniform draws, and
the draws are a `Time` too: `mode(draws=low_discrepancy())`. A `TimePair` is a function (key, n) ->
(t, r), [n] each; `parts` draws a dict of times, and `tokens` a time for each token. In the papers
time usually runs from data to noise, t = 1 - theirs; laws that are symmetric about 1/2 are the same
in both.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.checks import check_whole
from jflow._core.names import explain_unknown
from jflow._core.times import Times, partition
from jflow.types import Array, Key, PartTimes, Time, TimePair

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
    "parts",
    "rectified_pairs",
    "sequential",
    "shift",
    "shifted",
    "tokens",
    "u_shaped",
    "uniform",
]

explain_unknown(__name__)


def uniform(low: float = 0.0, high: float = 1.0) -> Time:
    """Times that are uniform on an interval.

    Args:
        low: the lower end.
        high: the upper end.

    Returns:
        Time: (key, n) -> t [n].

    Raises:
        ValueError: unless 0 <= low < high <= 1.

    Examples:
        >>> import jax
        >>> from jflow import times
        >>> t = times.uniform(0.0, 0.5)(jax.random.key(0), 4)
        >>> t.shape, bool((t < 0.5).all())
        ((4,), True)
    """
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"times.uniform: expected 0 <= low < high <= 1, got low={low}, high={high}"
        )
    return lambda key, n: jax.random.uniform(key, (n,), minval=low, maxval=high)


def antithetic() -> Time:
    """Times that are uniform on [0, 1], in pairs u, 1 - u, in random order.

    The mean over a batch of what is monotone in t varies less than with independent times.

    Returns:
        Time: (key, n) -> t [n]. Where n is odd, one time is alone.

    Examples:
        >>> import jax
        >>> from jflow import times
        >>> round(float(times.antithetic()(jax.random.key(0), 4).mean()), 4)
        0.5
    """

    def draw(key, n):
        draw_key, order_key = jax.random.split(key)
        u = jax.random.uniform(draw_key, ((n + 1) // 2,))
        return jax.random.permutation(order_key, jnp.concatenate([u, 1 - u])[:n])

    return draw


def low_discrepancy() -> Time:
    """Equally spaced times with one random offset, so that every batch covers [0, 1] evenly.

        t_k = (k + u) / n,  k = 0 ... n - 1,      in random order, with one uniform u for all

    Each time by itself is uniform on [0, 1].

    Returns:
        Time: (key, n) -> t [n].

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from jflow import times
        >>> t = times.low_discrepancy()(jax.random.key(0), 4)
        >>> np.asarray(jnp.diff(jnp.sort(t))).round(4).tolist()
        [0.25, 0.25, 0.25]

    References:
        Kingma, Salimans, Poole, Ho, *Variational Diffusion Models*, 2021, arXiv:2107.00630
            (appendix I.1; the random order is ours).
    """

    def draw(key, n):
        draw_key, order_key = jax.random.split(key)
        u = jax.random.uniform(draw_key)
        t = (jnp.arange(n, dtype=u.dtype) + u) / n
        return jax.random.permutation(order_key, jnp.minimum(t, 1))

    return draw


_UNIFORM = uniform()


def from_quantile(quantile: Callable[[Array], Array], draws: Time = _UNIFORM) -> Time:
    """Times by the quantile function of their law.

        t = quantile(u),      u uniform on [0, 1]

    Args:
        quantile: the inverse of the distribution function, [n] in [0, 1] -> [n] in [0, 1].
        draws: the law of u, `uniform()`, `antithetic()` or `low_discrepancy()`.

    Returns:
        Time: (key, n) -> t [n].

    Examples:
        >>> import jax
        >>> from jflow import times
        >>> law = times.from_quantile(lambda u: u**0.5)  # density 2 t
        >>> law(jax.random.key(0), 3).shape
        (3,)
    """
    return lambda key, n: quantile(draws(key, n))


def logit_normal(mean: float = 0.0, std: float = 1.0, *, draws: Time | None = None) -> Time:
    """The logit-normal law of Stable Diffusion 3: more times in the middle.

    Also known as: logit-normal timesteps, SD3 timestep sampling.

        t = sigmoid(mean + std z),      z standard normal

    A positive mean spends more times near data. The time of the paper runs from data to noise, so
    that its location m is -mean here, and so is diffusers' logit_mean where its draw is the noise
    level.

    Args:
        mean: the mean of the logit of t.
        std: the standard deviation of the logit of t, above 0.
        draws: uniform draws, whose normal quantile is z; None draws z itself.

    Returns:
        Time: (key, n) -> t [n].

    Raises:
        ValueError: mean is not finite, or std is not finite and above 0.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import times
        >>> t = times.logit_normal(0.0, 1.0, draws=times.low_discrepancy())(jax.random.key(0), 999)
        >>> round(float(jnp.median(t)), 2)
        0.5

    References:
        Esser et al., *Scaling Rectified Flow Transformers for High-Resolution Image Synthesis*,
            2024, arXiv:2403.03206.
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
    """The law of Stable Diffusion 3 with a mode in the middle and heavy tails at the ends.

        t = u + scale (cos^2(pi u / 2) - 1 + u),      u uniform

    It is symmetric about 1/2, with a mode there for scale > 0, more times at the ends for scale <
    0, and uniform at 0.

    Args:
        scale: in [-1, 2 / (pi - 2)], where t grows with u; the upper end is about 1.7519.
        draws: the law of u, `uniform()`, `antithetic()` or `low_discrepancy()`.

    Returns:
        Time: (key, n) -> t [n].

    Raises:
        ValueError: scale is outside [-1, 2 / (pi - 2)].

    References:
        Esser et al., *Scaling Rectified Flow Transformers for High-Resolution Image Synthesis*,
            2024, arXiv:2403.03206 (its time is 1 - t).
    """
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise ValueError(f"times.mode: expected -1 <= scale <= 2 / (pi - 2) = 1.7519, got {scale}")
    scale = float(scale)
    # -sin^2 for cos^2 - 1: exact at u = 0
    return from_quantile(lambda u: u + scale * (u - jnp.sin(jnp.pi / 2 * u) ** 2), draws)


def cosmap(*, draws: Time = _UNIFORM) -> Time:
    """The law with the noise levels of a cosine schedule on the linear path.

    The density is 2 / (pi (1 - 2 t + 2 t^2)): on the linear path the signal-to-noise ratios are
    those of a cosine schedule at uniform times. With u uniform,

        t = sin(pi u / 2) / (sin(pi u / 2) + cos(pi u / 2)).

    It is symmetric about 1/2.

    Args:
        draws: the law of u, `uniform()`, `antithetic()` or `low_discrepancy()`.

    Returns:
        Time: (key, n) -> t [n].

    References:
        Esser et al., *Scaling Rectified Flow Transformers for High-Resolution Image Synthesis*,
            2024, arXiv:2403.03206.
    """

    def quantile(u):
        s, c = jnp.sin(jnp.pi / 2 * u), jnp.sin(jnp.pi / 2 * (1 - u))
        return s / (s + c)

    return from_quantile(quantile, draws)


def u_shaped(a: float = 4.0, *, draws: Time = _UNIFORM) -> Time:
    """A law with more times at both ends, for rectified flows that are trained on their own pairs.

    The density is proportional to e^(a t) + e^(a (1 - t)), symmetric about 1/2: at the ends the
    error of such a flow is larger.

    Args:
        a: the steepness, in (0, 80).
        draws: the law of the uniform draws, `uniform()`, `antithetic()` or `low_discrepancy()`.

    Returns:
        Time: (key, n) -> t [n].

    Raises:
        ValueError: a is outside (0, 80).

    References:
        Lee, Lin, Fanti, *Improving the Training of Rectified Flows*, 2024, arXiv:2405.20320 (the
            law that its code draws from).
    """
    if not 0 < a < 80:
        raise ValueError(f"times.u_shaped: expected 0 < a < 80, got {a}")
    a = float(a)
    # about the middle the density is a cosh, the distribution function a sinh
    return from_quantile(
        lambda u: jnp.clip(0.5 + jnp.arcsinh((2 * u - 1) * math.sinh(a / 2)) / a, 0, 1), draws
    )


def shift(t: _T, factor: Any) -> _T:
    """Move times towards noise, for training and for sampling grids alike.

        t / (t + factor (1 - t))

    In noise levels sigma = 1 - t it is factor sigma / (1 + (factor - 1) sigma): the odds of noise
    times factor. shift(., 1 / factor) is the inverse. The factor is sqrt(size / base size) for
    events of more numbers than the schedule of the model was made for (SD3), and e^mu in the
    "exponential" form of diffusers.

    Args:
        t: times in [0, 1]: a number or an array of any shape, of JAX or numpy.
        factor: above 1 moves times towards noise (t = 0); it may be traced.

    Returns:
        The shifted times, in the type of t.

    Raises:
        ValueError: factor is not finite and above 0.

    Examples:
        >>> from jflow import times
        >>> times.shift(0.5, 3.0)
        0.25

    References:
        Esser et al., *Scaling Rectified Flow Transformers for High-Resolution Image Synthesis*,
            2024, arXiv:2403.03206.
    """
    if not isinstance(factor, jax.core.Tracer):
        if not 0 < factor < math.inf:
            raise ValueError(f"times.shift: expected a finite factor > 0, got {factor}")
        factor = float(factor)
    return t / (t + factor * (1 - t))


def shifted(time: Time, factor: float) -> Time:
    """A law of times, shifted towards noise.

    Also known as: timestep shift, SD3 shift.

    Args:
        time: (key, n) -> t [n], the law to shift.
        factor: above 1 moves times towards noise (t = 0), as in `shift`.

    Returns:
        Time: (key, n) -> shift(t, factor) [n].

    Raises:
        ValueError: factor is not finite and above 0.
    """
    shift(0.5, factor)  # the check of factor belongs to construction
    return lambda key, n: shift(time(key, n), factor)


def pairs(time: Time = _UNIFORM, *, equal: float = 0.0) -> TimePair:
    """Pairs of times t <= r, for models of the average velocity.

    They are two draws of `time`, sorted; in each row r = t with probability `equal`. Those of
    MeanFlow are pairs(logit_normal(0.4, 1.0), equal=0.75) for images.

    Args:
        time: (key, n) -> t [n], the law of each of the two.
        equal: the probability that r = t, in [0, 1].

    Returns:
        TimePair: (key, n) -> (t [n], r [n]).

    Raises:
        ValueError: equal is outside [0, 1].

    Examples:
        >>> import jax
        >>> from jflow import times
        >>> t, r = times.pairs(times.logit_normal(0.4, 1.0))(jax.random.key(0), 5)
        >>> t.shape, bool((t <= r).all())
        ((5,), True)

    References:
        Geng, Deng, Bai, Kolter, He, *Mean Flows for One-step Generative Modeling*, 2025,
            arXiv:2505.13447 (its time is 1 - t).
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
    """Pairs of times whose distance is drawn first: r - t from a law, then t uniformly.

    r - t is drawn from `length`, and t uniformly from what is left, [0, 1 - (r - t)].

    Args:
        length: (key, n) -> r - t [n]. The default, logit_normal(-0.8, 1), is that of a public
            reimplementation of the algorithm of Align Your Flow.

    Returns:
        TimePair: (key, n) -> (t [n], r [n]).
    """

    def draw(key, n):
        length_key, start_key = jax.random.split(key)
        gap = length(length_key, n)
        t = jax.random.uniform(start_key, (n,), gap.dtype) * (1 - gap)
        return t, jnp.minimum(t + gap, 1)

    return draw


def fixed(times: Times) -> Time:
    """Times drawn from a finite set, each as often as the others.

    Args:
        times: the set, in [0, 1].

    Returns:
        Time: (key, n) -> t [n].

    Raises:
        ValueError: times are empty, not one-dimensional, or not all in [0, 1].

    Examples:
        >>> import jax
        >>> from jflow import times
        >>> times.fixed([0.5])(jax.random.key(0), 3).tolist()
        [0.5, 0.5, 0.5]
    """
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
    """Pairs of times for a mean flow that is trained on the pairs of a rectified flow.

    r = min(t + gap, 1), and r = t with probability `equal`. Before that, rows with t < a whose r
    lies beyond b go all the way, to r = 1, where whole = (a, b).

    Args:
        time: (key, n) -> t [n]; None is u_shaped(4).
        gap: (key, n) -> gap [n] in [0, 1]; None is logit_normal(-0.8, 1).
        equal: the probability that r = t, in [0, 1].
        whole: (a, b), 0 <= a <= b <= 1.

    Returns:
        TimePair: (key, n) -> (t [n], r [n]).

    Raises:
        ValueError: equal is outside [0, 1], or unless 0 <= a <= b <= 1.

    References:
        Zhang et al., *Flow Straighter and Faster: Efficient One-Step Generative Modeling via
            MeanFlow on Rectified Trajectories*, 2025, arXiv:2511.23342 (the law of its public code;
            its time is 1 - t).
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
    """Pairs of times that are close together: r - t is uniform on [0, reach], r at most 1.

    t is uniform on [0, 1]. A reach of 0.12 is what the code of FlowTurbo draws for the training of
    a refiner (`losses.velocity_refiner`), one number a batch there, and there r may pass 1.

    Args:
        reach: the largest r - t, in (0, 1]. It should cover the steps of the grid that is sampled
            with.

    Returns:
        TimePair: (key, n) -> (t [n], r [n]).

    Raises:
        ValueError: reach is outside (0, 1].

    References:
        Zhao, Shi, Yu, Zhou, Lu, *FlowTurbo: Towards Real-time Flow-Based Image Generation with
            Velocity Refiner*, 2024, arXiv:2409.18128.
    """
    if not 0 < reach <= 1:
        raise ValueError(f"nearby_pairs: expected 0 < reach <= 1, got {reach}")

    def draw(key, n):
        first, second = jax.random.split(key)
        t = jax.random.uniform(first, (n,))
        return t, jnp.minimum(t + reach * jax.random.uniform(second, (n,)), 1)

    return draw


def sequential(knots: Times, *, starts: float = 0.25) -> Time:
    """Uniform times with some rows at the starts of segments, for `paths.sequential_path`.

    A share `starts` of the rows lies at the starts of the segments. The velocity of
    `sequential_path` jumps at the knots. A network of t is smooth, and settles between its two
    values there, exactly where Euler looks; rows at the knots hold it to the value after. Measured
    on two Gaussians in 1-D and four segments: the error of four Euler steps is 0.29 with uniform
    times and 0.11 with these; for PeRFlow on two moons, W2 of four steps less that of data is 0.10
    with starts = 0.25 and 0.02 with 0.75.

    Args:
        knots: times [K + 1] that rise strictly from 0 to 1: the ends of the segments.
        starts: the share of rows at the starts, in [0, 1]; 1 is distillation into one step a
            segment.

    Returns:
        Time: (key, n) -> t [n].

    Raises:
        ValueError: starts is outside [0, 1], or knots do not rise strictly from 0 to 1.

    Examples:
        >>> import jax
        >>> from jflow import times
        >>> law = times.sequential([0.0, 0.5, 1.0], starts=1.0)
        >>> set(law(jax.random.key(0), 16).tolist()) <= {0.0, 0.5}
        True
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


def tokens(count: int, time: Time = _UNIFORM) -> Callable[[Key, int], Array]:
    """A time for each token, independent of the others, as in diffusion forcing.

    `losses.flow_matching(velocity, time=tokens(count))` takes it for x [b, count, *event] and a
    network that reads t [b, count].

    Args:
        count: the number of tokens.
        time: (key, n) -> t [n], the law of each time.

    Returns:
        The law (key, n) -> t [n, count].

    Raises:
        ValueError: count is below 1.

    Examples:
        >>> import jax
        >>> from jflow import times
        >>> times.tokens(3)(jax.random.key(0), 2).shape
        (2, 3)

    References:
        Chen, Martí Monsó, Du, Simchowitz, Tedrake, Sitzmann, *Diffusion Forcing: Next-token
            Prediction Meets Full-Sequence Diffusion*, 2024, arXiv:2407.01392.
    """
    check_whole("times.tokens", count=count)
    return lambda key, n: time(key, n * count).reshape(n, count)


def parts(
    names: Sequence[str],
    time: Time = _UNIFORM,
    *,
    together: float = 0.25,
    given: float = 0.25,
    absent: float = 0.25,
    independent: float = 0.25,
) -> PartTimes:
    """Times of the parts of x, for a velocity that shall know the corners and the diagonal.

    Each row is of one of four kinds, here for two parts, t and s drawn from `time`:

        together (t, t)    given (t, 1) or (1, t)    absent (t, 0) or (0, t)    independent (t, s)

    A part at 1 is given, with its data, and one at 0 absent, pure source. Where there are more than
    two parts, a row of the second or third kind has a random set of parts at one common t, not none
    and not all, and each of the others is given or absent, by the two shares.

    Args:
        names: of the parts, at least two.
        time: (key, n) -> t [n], the law of the free times.
        together: the share of rows where all parts stand at one time, as along the way of a sample
            of all.
        given: the share of rows where the others are given, as for a sample of some parts.
        absent: the share of rows where the others are absent, as for a sample of some parts alone,
            and for guidance.
        independent: the share of rows where every part has a time of its own.

    Returns:
        PartTimes: (key, n) -> {name: t [n]}.

    Raises:
        ValueError: there are not two names or more, all different, or the shares are not
            nonnegative with the sum 1.

    Examples:
        >>> import jax
        >>> from jflow import times
        >>> law = times.parts(("image", "text"), together=0, given=1, absent=0, independent=0)
        >>> t = law(jax.random.key(0), 5)
        >>> bool(((t["image"] == 1) != (t["text"] == 1)).all())
        True

    References:
        Li, Kallidromitis, Gokul, Liao, Kato, Kozuka, Grover, *OmniFlow: Any-to-Any Generation with
            Multi-Modal Rectified Flows*, 2024, arXiv:2412.01169 (times of each part; the shares are
            ours).
    """
    names = tuple(names)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"times.parts: expected two or more different names, got {list(names)}")
    shares = {"together": together, "given": given, "absent": absent, "independent": independent}
    if not all(share >= 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"times.parts: expected shares >= 0 with the sum 1, got {shares}")
    corners = float(given + absent)
    present = float(given) / corners if corners else 0.0

    def draw(key, n):
        kind_key, set_key, end_key, common_key, own_key = jax.random.split(key, 5)
        common = time(common_key, n)[None]
        own = jnp.stack([time(k, n) for k in jax.random.split(own_key, len(names))])
        # a set of parts as a number from 1 to 2^m - 2, whose binary digits say which are free
        code = jax.random.randint(set_key, (1, n), 1, 2 ** len(names) - 1)
        free = (code >> jnp.arange(len(names))[:, None]) & 1 == 1
        ends = jax.random.bernoulli(end_key, present, own.shape).astype(own.dtype)
        u = jax.random.uniform(kind_key, (1, n))
        t = jnp.where(u < corners, jnp.where(free, common, ends), common)
        t = jnp.where(u < corners + float(together), t, own)
        return dict(zip(names, t, strict=True))

    return draw
