"""Tokens, and probabilities of them: what is checked where values are known, and a projection."""

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import float_dtype
from jflow._core.times import traced
from jflow._core.tokens import need_tokens
from jflow.types import Array


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


def one_hot(x: Array, num_classes: int, dtype) -> Array:
    """[...] tokens -> [..., num_classes], NaN for a token that is outside."""
    rows = jax.nn.one_hot(x, num_classes, dtype=dtype)
    inside = (x >= 0) & (x < num_classes)
    return jnp.where(inside[..., None], rows, jnp.nan)


def check_logits(name: str, logits: Array, shape: tuple[int, ...], num_classes: int) -> Array:
    """The first num_classes logits of each token, in float32 at least; raise for another shape."""
    if logits.shape[:-1] != tuple(shape) or logits.shape[-1] < num_classes:
        raise ValueError(
            f"{name}: expected logits of shape {[*shape, num_classes]}, got {list(logits.shape)}"
        )
    return logits[..., :num_classes].astype(float_dtype(logits))


def check_probabilities(name: str, p: Array, tolerance: float = 1e-4) -> None:
    """Raise where probabilities [..., K] are known, and are negative or do not sum to one."""
    if traced(p):
        return
    values = np.asarray(p, np.float64)
    sums = values.sum(-1)
    off = np.maximum(np.abs(sums - 1), -values.min(-1, initial=0.0))
    off = np.where(np.isnan(off), np.inf, off)
    if off.size and off.max() > tolerance:
        at = np.unravel_index(int(np.argmax(off)), off.shape)
        raise ValueError(
            f"{name}: expected probabilities, not negative and with sum 1, got"
            f" {values[at][:8].round(4).tolist()} with sum {sums[at]:.6g} at"
            f" {[int(i) for i in at]}"
        )


def project_simplex(x: Array) -> Array:
    """The nearest point of the probability simplex, along the last axis.

        max(x_i - c, 0)      with c such that the sum is 1

    Points of the simplex stay where they are. Gradients are those of the projection.

    Args:
        x: points [..., K].

    Returns:
        Probabilities [..., K], in the type of x.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> paths.project_simplex(jnp.array([0.75, 0.5, -1.0])).tolist()
        [0.625, 0.375, 0.0]

    References:
        Duchi, Shalev-Shwartz, Singer, Chandra, *Efficient Projections onto the l1-Ball for Learning
            in High Dimensions*, 2008.
    """
    count = x.shape[-1]
    falling = -jnp.sort(-x, axis=-1)
    shape = (1,) * (x.ndim - 1) + (count,)
    k = jnp.arange(1, count + 1, dtype=x.dtype).reshape(shape)
    cuts = (jnp.cumsum(falling, axis=-1) - 1) / k
    last = jnp.sum(falling > cuts, axis=-1, keepdims=True) - 1
    return jnp.maximum(x - jnp.take_along_axis(cuts, last, axis=-1), 0)


def to_tangent(x: Array, v: Array) -> Array:
    """The part of v that is tangent to the unit sphere at x, along the last axis."""
    return v - jnp.sum(x * v, axis=-1, keepdims=True) * x


def sphere_exp(x: Array, v: Array) -> Array:
    """The point of the unit sphere that the geodesic from x with velocity v reaches at time 1."""
    length = jnp.sqrt(jnp.maximum(jnp.sum(v * v, axis=-1, keepdims=True), 1e-30))
    y = jnp.cos(length) * x + jnp.sinc(length / jnp.pi) * v
    return y / jnp.linalg.norm(y, axis=-1, keepdims=True)  # rounding does not add up
