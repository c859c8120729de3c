"""Tokens [b, *event] of a vocabulary 0 ... V - 1: their log-probabilities, and the shares of a
path."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.times import traced
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


def check_tokens(name: str, x: Array, num_classes: int) -> None:
    """Raise unless x are integers, and, where they are known, each in 0 ... num_classes - 1."""
    need_tokens(name, "x", x)
    if traced(x):
        return
    wrong = np.argwhere((np.asarray(x) < 0) | (np.asarray(x) >= num_classes))
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        raise ValueError(
            f"{name}: expected tokens in 0 ... {num_classes - 1}, got {int(np.asarray(x)[at])} at "
            f"{list(at)}"
        )


def check_logits(
    name: str, logits: Array, shape: tuple[int, ...], num_classes: int | None = None
) -> Array:
    """Logits [*shape, V] in float32 at least, the first num_classes of them where that is given;
    raise for another shape."""
    found, size = jnp.shape(logits), "V" if num_classes is None else num_classes
    if found[:-1] != tuple(shape) or len(found) == 0 or found[-1] < (num_classes or 0):
        raise ValueError(
            f"{name}: expected logits of shape {[*shape, size]}, a number for each symbol of the"
            f" vocabulary at each token, got {list(found)}"
        )
    return logits[..., :num_classes].astype(float_dtype(logits))


def token_log_probs(name: str, logits: Array, x: Array) -> Array:
    """log p(token) [b, *event, V] of logits, in float32 or better; raise unless they fit x."""
    return jax.nn.log_softmax(check_logits(name, logits, x.shape), axis=-1)


def at_tokens(values: Array, x: Array) -> Array:
    """values [b, *event, V] at the tokens x [b, *event]; NaN for one outside the vocabulary."""
    inside = (x >= 0) & (x < values.shape[-1])
    index = jnp.where(inside, x, jnp.zeros_like(x)).astype(jnp.int32)
    found = jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]
    return jnp.where(inside, found, jnp.nan)


def one_hot(x: Array, like: Any) -> Array:
    """[b, *event, V] bool of the tokens x, with as many symbols as `like`, of any kind, has."""
    return jax.nn.one_hot(x, like.shape[-1], dtype=bool)


def corners(x: Array, num_classes: int, dtype) -> Array:
    """Tokens [...] -> corners of the simplex [..., num_classes], NaN for a token outside it."""
    rows = jax.nn.one_hot(x, num_classes, dtype=dtype)
    inside = (x >= 0) & (x < num_classes)
    return jnp.where(inside[..., None], rows, jnp.nan)


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


def check_probabilities(name: str, p: ArrayLike | Array) -> Any:
    """p [..., V], in float64 and with exact sums where it is known; raise where it is known and
    negative or does not sum to 1 along the last axis."""
    if traced(p):
        return p
    values = np.asarray(p, np.float64)
    if values.ndim == 0:
        raise ValueError(f"{name}: expected probabilities [..., V], got the scalar {values:g}")
    sums = values.sum(-1)
    off = np.maximum(np.abs(sums - 1), -values.min(-1, initial=0.0))
    off = np.where(np.isnan(off), np.inf, off)
    if off.size and off.max() > 1e-4:
        at = np.unravel_index(int(np.argmax(off)), off.shape)
        raise ValueError(
            f"{name}: expected probabilities, not negative and with sum 1, got"
            f" {values[at][:8].round(4).tolist()} with sum {sums[at]:.6g} at"
            f" {[int(i) for i in at]}"
        )
    return np.maximum(values, 0) / np.maximum(values, 0).sum(-1, keepdims=True)
