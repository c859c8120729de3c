"""Tokens [b, *event] of a vocabulary 0 ... V - 1: their log-probabilities, and the shares of a
path."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jflow._core.arrays import expand_to, float_dtype
from jflow.types import Array


def need_tokens(name: str, what: str, x: Any) -> Array:
    """x as an array; raise unless it holds integers."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"{name}: expected {what} to hold tokens, integers [b, *event], got {x.dtype}"
            f"{list(x.shape)}"
        )
    return x


def check_logits(name: str, logits: Array, x: Array) -> Array:
    """logits; raise unless they are [b, *event, V] for x [b, *event]."""
    shape = jnp.shape(logits)
    if len(shape) != x.ndim + 1 or shape[:-1] != x.shape:
        raise ValueError(
            f"{name}: expected logits of shape {[*x.shape, 'V']}, a number for each symbol of the"
            f" vocabulary at each token, got {list(shape)}"
        )
    return logits


def token_log_probs(name: str, logits: Array, x: Array) -> Array:
    """log p(token) [b, *event, V] of logits, in float32 or better; raise unless they fit x."""
    logits = check_logits(name, logits, x)
    return jax.nn.log_softmax(logits.astype(float_dtype(logits)), axis=-1)


def at_tokens(values: Array, x: Array) -> Array:
    """values [b, *event, V] at the tokens x [b, *event]; NaN for one outside the vocabulary."""
    inside = (x >= 0) & (x < values.shape[-1])
    index = jnp.where(inside, x, jnp.zeros_like(x)).astype(jnp.int32)
    found = jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]
    return jnp.where(inside, found, jnp.nan)


def one_hot(x: Array, like: Any) -> Array:
    """[b, *event, V] bool of the tokens x, with as many symbols as `like`, of any kind, has."""
    return jax.nn.one_hot(x, like.shape[-1], dtype=bool)


def kappa(schedule: Any, t: Any, x: Array) -> tuple[Array, Array]:
    """The probability that a token is already the data's, and its slope in time.

    kappa(t) is the `alpha` of a schedule, which has to run from 0 to 1. The time is brought to the
    shape of x first, so that a schedule may give each token a pace of its own: alpha = t^powers
    with powers of shape [1, n].

    Args:
        schedule: a `paths.Schedule`, of which alpha alone is read.
        t: times in [0, 1], a scalar, [b], or [b, ...] along the leading axes of x.
        x: the tokens, [b, *event], of which the shape is read.

    Returns:
        kappa: [b, *event].
        slope: d kappa / dt, [b, *event].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> x, t = jnp.zeros((1, 2), int), jnp.array([0.5])
        >>> share, slope = paths.kappa(paths.schedules.polynomial(2.0), t, x)
        >>> share.tolist(), slope.tolist()
        ([[0.25, 0.25]], [[1.0, 1.0]])

    References:
        Gat, Remez, Shaul, Kreuk, Chen, Synnaeve, Adi, Lipman, *Discrete Flow Matching*, 2024,
            arXiv:2407.15595.
    """
    t = jnp.asarray(t, float_dtype(jnp.asarray(t)))
    t = jnp.broadcast_to(expand_to(t, x), x.shape)
    return jax.jvp(schedule.alpha, (t,), (jnp.ones_like(t),))


def kl_terms(log_p: Array, x: Array, x1: Array, share: Array, slope: Array) -> Array:
    """The rate of the generalized KL divergence of each token, [b, *event], in nats per time."""
    same = x == x1
    stay = jnp.exp(at_tokens(log_p, x))
    found = at_tokens(log_p, x1)
    terms = jnp.where(same, 1 - stay, -stay - jnp.where(same, jnp.zeros_like(found), found))
    left = 1 - share
    rate = jnp.where(left > 0, slope / jnp.where(left > 0, left, 1), 0)
    return rate * terms


def check_probabilities(name: str, probabilities: ArrayLike) -> np.ndarray:
    """[..., V] in float64; raise unless they are not negative and sum to 1 along the last axis."""
    p = np.asarray(probabilities, np.float64)
    if p.ndim == 0 or not (np.all(p >= 0) and np.all(np.abs(p.sum(-1) - 1) <= 1e-4)):
        sums = "a scalar" if p.ndim == 0 else f"sums {np.unique(p.sum(-1).round(6)).tolist()[:5]}"
        raise ValueError(
            f"{name}: expected probabilities >= 0 that sum to 1 over the vocabulary, got {sums}"
            + ("" if p.ndim == 0 or np.all(p >= 0) else f" and {p.min():g}")
        )
    return p / p.sum(-1, keepdims=True)
