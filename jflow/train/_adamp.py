"""AdamP: Adam without the part of a step that only makes weights longer."""

import math
import re

import jax
import jax.numpy as jnp
import optax

from jflow.train._rules import Match
from jflow.types import Array, NumberOrFunction

__all__ = ["adamp"]

_STACKED = r"(?<![^/])(\w+_)?(blocks|stacked|layers|rest|experts)/(?!shared/|stacked/)"
_SMALL = 1e-8  # beside norms


def adamp(
    learning_rate: NumberOrFunction,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    delta: float = 0.1,
    decay_ratio: float = 0.1,
    stacked: Match = _STACKED,
) -> optax.GradientTransformation:
    """Adam whose steps leave the length of scale-invariant weights alone.

    The loss of a network does not depend on the length of weights that a norm follows. Momentum
    makes such weights longer at every step, and so the steps smaller beside them. With u the step
    of Adam on a kernel w of gradient g, in parts w_j,

        u_j <- u_j - w_j (w_j . u_j) / |w_j|^2     if max_j |cos(g_j, w_j)| < delta / sqrt(size w_j)

    where the parts are the weights of one output each (along the last axis, as in Flax), or else
    the whole kernel. Its weight decay is then `decay_ratio` times the usual one. What meets neither
    condition, and vectors, step as by `optax.adamw`.

    Args:
        learning_rate: of each update, or a schedule of it.
        b1: the decay of the mean of the gradients.
        b2: the decay of the mean of their squares.
        eps: what is added to the root of the latter.
        weight_decay: how much of the params is taken off at each step, in units of the learning
            rate; the decay is decoupled.
        delta: the bound on the cosine.
        decay_ratio: what becomes of the weight decay where a step is projected.
        stacked: which leaves lead with the depth of a scan, or with experts, as the match of a
            `Rule`; each layer is a kernel of its own. Of a pattern, each place in a path that it
            matches is one such axis. The default is what the networks and stacks of jflow scan.

    Returns:
        An optax.GradientTransformation, whose update needs the params.

    Raises:
        ValueError: delta or decay_ratio is negative.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import train
        >>> optimizer, w = train.adamp(0.1), {"kernel": jnp.array([[1.0], [0.0]])}
        >>> across = {"kernel": jnp.array([[0.0], [1.0]])}
        >>> update, _ = optimizer.update(across, optimizer.init(w), w)
        >>> [round(step, 3) for step in update["kernel"].ravel().tolist()]
        [-0.0, -0.1]

    References:
        Heo, Chun, Oh, Han, Yun, Kim, Uh, Ha, *AdamP: Slowing Down the Slowdown for Momentum
            Optimizers on Scale-invariant Weights*, 2020, arXiv:2006.08217. Parts along the last
            axis, and layer by layer, are ours.
    """
    if not (delta >= 0 and decay_ratio >= 0):
        raise ValueError(
            f"adamp: expected delta and decay_ratio >= 0, got {delta} and {decay_ratio}"
        )
    adam = optax.scale_by_adam(b1, b2, eps)

    def kernel(g, p, u):
        projected, factor = _projected(g, p, u, delta)
        return projected + weight_decay * jnp.where(factor, decay_ratio, 1.0).astype(p.dtype) * p

    def update(grads, state, params=None):
        if params is None:
            raise ValueError("adamp: expected update(grads, state, params), got no params")
        steps, state = adam.update(grads, state, params)

        def of_leaf(path, g, p, u):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            deep = int(stacked(name)) if callable(stacked) else len(re.findall(stacked, name))
            if p.ndim < 2 + deep:
                return u + weight_decay * p
            step = kernel
            for _ in range(deep):
                step = jax.vmap(step)
            return step(g, p, u)

        return jax.tree_util.tree_map_with_path(of_leaf, grads, params, steps), state

    return optax.chain(
        optax.GradientTransformation(adam.init, update), optax.scale_by_learning_rate(learning_rate)
    )


def _projected(g: Array, p: Array, u: Array, delta: float) -> tuple[Array, Array]:
    """(u without its parts along p where those are scale-invariant, whether they are)."""
    out, found = u, jnp.zeros_like(p, shape=(), dtype=bool)
    for axes in (tuple(range(p.ndim - 1)), tuple(range(p.ndim))):

        def dot(a, b, axes=axes):
            return jnp.sum(a * b, axis=axes, keepdims=True)

        lengths = jnp.sqrt(dot(g, g) * dot(p, p))
        cosines = jnp.abs(dot(g, p)) / jnp.maximum(lengths, _SMALL)
        size = math.prod(p.shape[axis] for axis in axes)
        invariant = ~found & (jnp.max(cosines) < delta / math.sqrt(size))
        unit = p / (jnp.sqrt(dot(p, p)) + _SMALL)
        out = jnp.where(invariant, u - unit * dot(unit, u), out)
        found = found | invariant
    return out, found
