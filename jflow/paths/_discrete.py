"""Paths of tokens, from a source to data by jumps: discrete flow matching.

Data are integers [b, *event] in a vocabulary 0 ... V - 1. At time t a token is that of the data x1
with probability kappa(t), independently of the others, and that of the source x0 elsewhere. A
network is a `Field` of logits [b, *event, V], the law p(x1 | x_t) of each token of the data. It
gives the rates at which tokens jump,

    R(x, y) = kappa' / (1 - kappa) [p(x1 = y | x_t = x) - 1{y = x}],

whatever the source is: all masks (`unmasking`), tokens drawn from any law, or rows that belong to
the data. A schedule gives kappa, its alpha, and each token may have a time, and a pace, of its own.

References:
    Campbell, Yim, Barzilay, Rainforth, Jaakkola, *Generative Flows on Discrete State-Spaces:
        Enabling Multimodal Flows with Applications to Protein Co-Design*, 2024, arXiv:2402.04997.
    Gat, Remez, Shaul, Kreuk, Chen, Synnaeve, Adi, Lipman, *Discrete Flow Matching*, 2024,
        arXiv:2407.15595.
    Hu, Ommer, *[MASK] is All You Need*, 2024, arXiv:2412.06787.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jflow._core.checks import check_weights, check_whole, need_key
from jflow._core.tokens import (
    at_tokens,
    check_logits,
    check_probabilities,
    kappa,
    need_tokens,
    one_hot,
    token_log_probs,
)
from jflow.paths._affine import LINEAR, Schedule
from jflow.types import Array, Field, Path

__all__ = [
    "Corrector",
    "discrete",
    "jump_rates",
    "remasking",
    "renoising",
    "resampling",
    "unmasking",
    "without_time",
]

Corrector = Callable[[Array, Array, Array], Array]
"""(p [b, *event, V], x [b, *event], kappa [b, *event]) -> rates [b, *event, V] of jumps that leave
the law of x_t as it is, where p is that of x1 given x_t; what stands at x itself is not read."""


def discrete(schedule: Schedule = LINEAR) -> Path:
    """The path of tokens: each is that of the data with probability kappa(t), or of the source.

    Also known as: mixture path, discrete flow matching, masked diffusion, absorbing diffusion.

        x_t = x1 with probability kappa(t), else x0       independently for each token

    Args:
        schedule: its alpha is kappa, which has to be 0 at t=0 and 1 at t=1.

    Returns:
        Path: point and target, (x0, x1, t, *, key) -> [b, *event] for tokens x0 and x1 [b, *event]
            and times t [b], or [b, ...] along the leading axes of x1. A point is drawn by the key;
            the target, of which a network learns the law, is x1.

    Raises:
        ValueError: kappa is not 0 at t=0 and 1 at t=1; or, at the call, tokens are not integers.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> x0, x1 = jnp.full((2, 3), 4), jnp.array([[0, 1, 2], [0, 1, 2]])  # 4 is the mask
        >>> t, key = jnp.array([0.0, 1.0]), jax.random.key(0)
        >>> paths.discrete().point(x0, x1, t, key=key).tolist()
        [[4, 4, 4], [0, 1, 2]]

    References:
        Gat, Remez, Shaul, Kreuk, Chen, Synnaeve, Adi, Lipman, *Discrete Flow Matching*, 2024,
            arXiv:2407.15595.
    """
    check_kappa("paths.discrete", schedule)

    def point(x0, x1, t, *, key=None):
        x0, x1 = (need_tokens("paths.discrete", f"x{i}", x) for i, x in enumerate((x0, x1)))
        share, _ = kappa(schedule, t, x1)
        drawn = jax.random.uniform(need_key("paths.discrete", key), x1.shape, share.dtype)
        return jnp.where(drawn < share, x1, x0)

    return Path(point, lambda x0, x1, t, *, key=None: x1)


def check_kappa(name: str, schedule: Schedule) -> None:
    """Raise unless alpha runs from 0 to 1; inside jit nothing is checked."""
    ends = [jnp.asarray(schedule.alpha(jnp.asarray(float(t)))) for t in (0, 1)]
    if any(isinstance(end, jax.core.Tracer) for end in ends):
        return
    start, end = (np.asarray(a, np.float64) for a in ends)
    if not (np.all(np.abs(start) <= 1e-3) and np.all(np.abs(end - 1) <= 1e-3)):
        raise ValueError(
            f"{name}: expected a schedule whose alpha, kappa(t), runs from 0 at t=0 to 1 at t=1,"
            f" got {start.tolist()} and {end.tolist()}"
        )


def unmasking(field: Field, mask: int) -> Field:
    """The law of the data under a path from masks: no mask, and known tokens stay.

    Also known as: SUBS parameterization, carry-over unmasking.

        log p(x1 = y | x_t) = log_softmax(logits without that of the mask)_y     where x_t is a mask
                              log 1{y = x_t}                                     elsewhere

    Losses then see no error at known tokens, and samplers never change them, so that a row which
    starts with some tokens of data is filled in.

    Args:
        field: a network of logits [b, *event, V], the mask among the V symbols.
        mask: the symbol that masks, in 0 ... V - 1; it may not occur in data.

    Returns:
        Field: (params, x, t, cond) -> log-probabilities [b, *event, V], with the params and the
            init of `field`. It raises a ValueError for logits of another shape or without a number
            for the mask.

    Raises:
        ValueError: mask is not a whole number of at least 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> from jflow.types import Field
        >>> even = Field(lambda *_: {}, lambda params, x, *_, key=None: jnp.zeros((*x.shape, 3)))
        >>> law = paths.unmasking(even, mask=2)
        >>> jnp.exp(law.apply({}, jnp.array([[2, 1]]), jnp.zeros(1))).round(2).tolist()
        [[[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]]

    References:
        Sahoo, Arriola, Schiff, Gokaslan, Marroquin, Chiu, Rush, Kuleshov, *Simple and Effective
            Masked Diffusion Language Models*, 2024, arXiv:2406.07524.
    """
    check_whole("unmasking", 0, mask=mask)

    def apply(params, x, t, cond=None, *, key=None):
        x = need_tokens("unmasking", "x", x)
        logits = check_logits("unmasking", field.apply(params, x, t, cond, key=key), x.shape)
        if logits.shape[-1] <= mask:
            raise ValueError(
                f"unmasking: expected logits with a number for the mask, {mask}, got"
                f" {list(logits.shape)}"
            )
        masked = x == mask
        logits = jnp.where(one_hot(jnp.full_like(x, mask), logits), -jnp.inf, logits)
        log_p = token_log_probs("unmasking", logits, x)
        kept = jnp.where(one_hot(x, logits), 0.0, -jnp.inf).astype(log_p.dtype)
        return jnp.where(masked[..., None], log_p, kept)

    return Field(field.init, apply)


def without_time(field: Field) -> Field:
    """A network that is not shown the time: implicit timesteps.

    Under a path from masks the law of the data given x_t does not depend on t: the masks say how
    far it is. A network without the time is then the masked model of MaskGIT and BERT, and one with
    it learns nothing more.

    Args:
        field: a network of (x, t).

    Returns:
        Field: the network at t = 0, whatever the time is.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> from jflow.types import Field
        >>> clock = Field(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: t)
        >>> paths.without_time(clock).apply({}, jnp.zeros((2, 3)), jnp.ones(2)).tolist()
        [0.0, 0.0]

    References:
        Hu, Ommer, *[MASK] is All You Need*, 2024, arXiv:2412.06787.
    """
    return Field(
        lambda key, x, t, cond=None: field.init(key, x, jnp.zeros_like(t), cond),
        lambda params, x, t, cond=None, *, key=None: field.apply(
            params, x, jnp.zeros_like(t), cond, key=key
        ),
    )


def jump_rates(
    field: Field, schedule: Schedule = LINEAR, corrector: Corrector | None = None
) -> Field:
    """The rates at which each token jumps, rows of the generator of the flow.

        R(x, y) = kappa' / (1 - kappa) p(x1 = y | x_t = x) + C(x, y)     for y other than x,
        R(x, x) = - sum of the others

    With the exact law the marginals p_t of the path satisfy the Kolmogorov equation dp_t/dt = p_t
    R; a corrector C (`resampling`, `remasking`, `renoising`) adds noise that leaves them. At t=1,
    where kappa = 1, the rates are infinite.

    Args:
        field: a network of logits [b, *event, V], the law of x1; `unmasking(net, mask)` for a path
            from masks.
        schedule: its alpha is kappa.
        corrector: rates beside those of the path.

    Returns:
        Field: (params, x, t, cond) -> rates [b, *event, V], per unit of time, which sum to 0 over
            the vocabulary; with the params and the init of `field`. It raises a ValueError for
            logits of another shape.

    Raises:
        ValueError: kappa does not run from 0 to 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> from jflow.types import Field
        >>> even = Field(lambda *_: {}, lambda params, x, *_, key=None: jnp.zeros((*x.shape, 2)))
        >>> rates = paths.jump_rates(paths.unmasking(even, mask=1))  # one symbol and the mask
        >>> rates.apply({}, jnp.array([[1, 0]]), jnp.array([0.5]))[0, 0].tolist()
        [2.0, -2.0]

    References:
        Gat, Remez, Shaul, Kreuk, Chen, Synnaeve, Adi, Lipman, *Discrete Flow Matching*, 2024,
            arXiv:2407.15595.
    """
    check_kappa("jump_rates", schedule)

    def apply(params, x, t, cond=None, *, key=None):
        x = need_tokens("jump_rates", "x", x)
        p = jnp.exp(token_log_probs("jump_rates", field.apply(params, x, t, cond, key=key), x))
        share, slope = (a.astype(p.dtype) for a in kappa(schedule, t, x))
        rates = (slope / (1 - share))[..., None] * p
        if corrector is not None:
            rates = rates + corrector(p, x, share)
        return as_generator(rates, x)

    return Field(field.init, apply)


def as_generator(rates: Array, x: Array) -> Array:
    """Rates [b, *event, V] whose entry at x is minus the sum of the others."""
    here = one_hot(x, rates)
    rates = jnp.where(here, 0, rates)
    return jnp.where(here, -jnp.sum(rates, axis=-1, keepdims=True), rates)


def resampling(rate: float, probabilities: ArrayLike) -> Corrector:
    """A corrector that draws tokens anew from their law at time t given the data.

        C(x, y) = rate [(1 - kappa) p0(y) + kappa p(x1 = y | x_t = x)]

    Given x1 it is in detailed balance with p_t(y | x1) = (1 - kappa) p0(y) + kappa 1{y = x1}, so
    that it leaves p_t alone whatever the rate is. It is finite at both ends.

    Args:
        rate: how often a token is drawn anew, per unit of time, at least 0.
        probabilities: those of the source, p0 [V], from which each token of x0 is drawn.

    Returns:
        Corrector: for `jump_rates`.

    Raises:
        ValueError: rate is negative, or probabilities are not nonnegative with the sum 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> corrector = paths.resampling(2.0, [0.0, 1.0])  # 1 is the mask
        >>> p, x = jnp.array([[[1.0, 0.0]]]), jnp.array([[0]])
        >>> corrector(p, x, jnp.array([[0.25]])).tolist()
        [[[0.5, 1.5]]]

    References:
        Campbell, Yim, Barzilay, Rainforth, Jaakkola, *Generative Flows on Discrete State-Spaces:
            Enabling Multimodal Flows with Applications to Protein Co-Design*, 2024,
            arXiv:2402.04997, for rates in detailed balance; this choice of them is derived.
    """
    check_weights("resampling", rate=rate)
    source = check_probabilities("resampling", probabilities)
    rate = float(rate)

    def corrector(p, x, share):
        prior = jnp.broadcast_to(jnp.asarray(source, p.dtype), p.shape)
        return rate * ((1 - share)[..., None] * prior + share[..., None] * p)

    return corrector


def remasking(noise: float, mask: int) -> Corrector:
    """A corrector that masks known tokens, and unmasks so much faster.

        C(y, mask) = noise,      C(mask, y) = noise kappa / (1 - kappa) p(x1 = y | x_t)

    In steps of h on the linear path a mask is filled with probability h (1 + noise t) / (1 - t).

    Args:
        noise: how often a known token is masked again, per unit of time, at least 0.
        mask: the symbol that masks.

    Returns:
        Corrector: for `jump_rates`.

    Raises:
        ValueError: noise is negative, or mask is not a whole number of at least 0.

    References:
        Campbell, Yim, Barzilay, Rainforth, Jaakkola, *Generative Flows on Discrete State-Spaces:
            Enabling Multimodal Flows with Applications to Protein Co-Design*, 2024,
            arXiv:2402.04997.
    """
    check_weights("remasking", noise=noise)
    check_whole("remasking", 0, mask=mask)
    noise = float(noise)

    def corrector(p, x, share):
        to_mask = one_hot(jnp.full_like(x, mask), p).astype(p.dtype)
        filled = (share / (1 - share))[..., None] * p
        return noise * jnp.where((x == mask)[..., None], filled, to_mask)

    return corrector


def renoising(noise: float) -> Corrector:
    """A corrector for a uniform source: right tokens are lost, and found so much faster.

        C(x, y) = noise p(x1 = x | x_t) + noise (1 + (V - 1) kappa) / (1 - kappa) p(x1 = y | x_t)

    Given x1, jumps away from it, at rate `noise` to each other symbol, are in detailed balance with
    those back to it.

    Args:
        noise: how often a right token jumps to each other one, per unit of time, at least 0.

    Returns:
        Corrector: for `jump_rates`.

    Raises:
        ValueError: noise is negative.

    References:
        Campbell, Yim, Barzilay, Rainforth, Jaakkola, *Generative Flows on Discrete State-Spaces:
            Enabling Multimodal Flows with Applications to Protein Co-Design*, 2024,
            arXiv:2402.04997.
    """
    check_weights("renoising", noise=noise)
    noise = float(noise)

    def corrector(p, x, share):
        back = (1 + (p.shape[-1] - 1) * share) / (1 - share)
        return noise * (at_tokens(p, x)[..., None] + back[..., None] * p)

    return corrector
