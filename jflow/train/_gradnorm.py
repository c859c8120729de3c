"""GradNorm: the weights of several losses, from the lengths of their gradients."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jflow._core.checks import frozen_entry
from jflow.train._rules import Match
from jflow.types import Array, Loss, PyTree

__all__ = ["GradNorm", "gradnorm"]

_LEAST = 1e-3  # of a weight
_ADAM = optax.adam(0.025)


class GradNorm(NamedTuple):
    """What `gradnorm` returns.

    Attributes:
        init: () -> the entry 'gradnorm' of `frozen` before the first step.
        loss: (params, key, batch, frozen) -> (scalar, metrics), the weighted sum.
        refresh: (params, frozen, key, batch) -> frozen with new weights, for `make_step`.
    """

    init: Callable[[], PyTree]
    loss: Loss
    refresh: Callable[..., Mapping[str, PyTree]]


def gradnorm(
    losses: Mapping[str, Loss],
    *,
    alpha: float = 1.5,
    where: Match = ".*",
    optimizer: optax.GradientTransformation = _ADAM,
) -> GradNorm:
    """A sum of losses whose weights follow the lengths of their gradients.

    With G_i = w_i |grad L_i|, G their mean, and r_i how slowly loss i falls, L_i / L_i(0) over the
    mean of that, the weights take a step down

        sum_i |G_i - G r_i^alpha|

    where G r_i^alpha is held fixed, and are scaled to a sum of the number of losses. With alpha = 0
    all gradients become equally long, whatever the scale of a loss. The losses are positive.

    The weights live in frozen['gradnorm'] and change after each update, which costs one more value
    and gradient of each loss:

        balance = train.gradnorm({"matching": ..., "alignment": ...})
        state = train.init_state(params, optimizer, key, frozen={"gradnorm": balance.init()})
        step = train.make_step(balance.loss, optimizer, refresh=balance.refresh)

    Args:
        losses: two or more, by their names in the metrics.
        alpha: how strongly losses that fall slowly are favored, at least 0.
        where: the params whose gradients count, as the match of a `Rule`: those that the losses
            share, or the last layer of them.
        optimizer: of the weights.

    Returns:
        GradNorm: init, loss and refresh. The metrics of the loss are its parts and their weights,
            and those of the losses, each under its name and a slash.

    Raises:
        ValueError: There are fewer than two losses, or alpha is negative; at trace time, frozen has
            no entry 'gradnorm', or `where` matches no param.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import train
        >>> near = lambda m: lambda params, key, batch, frozen=None: ((params - m) ** 2, {})
        >>> balance = train.gradnorm({"one": near(1.0), "two": near(2.0)})
        >>> start, frozen = jnp.zeros(()), {"gradnorm": balance.init()}
        >>> float(balance.loss(start, jax.random.key(0), {}, frozen)[0])
        5.0

    References:
        Chen, Badrinarayanan, Lee, Rabinovich, *GradNorm: Gradient Normalization for Adaptive Loss
            Balancing in Deep Multitask Networks*, 2017, arXiv:1711.02257. A least weight of 0.001
            is ours.
    """
    if len(losses) < 2:
        raise ValueError(f"gradnorm: expected two or more losses, got {sorted(losses)}")
    if not alpha >= 0:
        raise ValueError(f"gradnorm: expected alpha >= 0, got {alpha}")
    names, n = list(losses), len(losses)

    def init():
        weights = jnp.ones(n)
        return {
            "weights": weights,
            "first": jnp.full(n, jnp.nan),  # the losses at the first step
            "optimizer": optimizer.init(weights),
        }

    def keys_of(key):
        return [None] * n if key is None else list(jax.random.split(key, n))

    def loss(params, key, batch, frozen=None):
        weights = frozen_entry("gradnorm", frozen, "gradnorm")["weights"]
        total, metrics = 0.0, {}
        for name, weight, own in zip(names, weights, keys_of(key), strict=True):
            value, said = losses[name](params, own, batch, frozen)
            total = total + weight.astype(value.dtype) * value
            metrics |= {name: value, f"{name}/weight": weight}
            metrics |= {f"{name}/{what}": number for what, number in said.items()}
        return total, metrics

    def refresh(params, frozen, key, batch):
        held: Any = frozen_entry("gradnorm", frozen, "gradnorm")
        values, lengths = [], []
        for name, own in zip(names, keys_of(key), strict=True):
            of_params = jax.value_and_grad(losses[name], has_aux=True)
            (value, _), grads = of_params(params, own, batch, frozen)
            values.append(value)
            lengths.append(optax.tree.norm(_matching(grads, where)))
        first = jnp.where(jnp.isnan(held["first"]), jnp.stack(values), held["first"])
        lengths, ratio = jnp.stack(lengths), jnp.stack(values) / first
        weights, state = _step(held, lengths, ratio / jnp.mean(ratio))
        return {**frozen, "gradnorm": {"weights": weights, "first": first, "optimizer": state}}

    def _step(held, lengths: Array, rate: Array):
        weights = held["weights"]
        target = jnp.mean(weights * lengths) * rate**alpha
        slope = lengths * jnp.sign(weights * lengths - target)
        change, state = optimizer.update(slope, held["optimizer"], weights)
        weights = jnp.maximum(optax.apply_updates(weights, change), _LEAST)
        return n * weights / jnp.sum(weights), state

    return GradNorm(init, loss, refresh)


def _matching(tree: PyTree, where: Match) -> list[Array]:
    """The leaves whose path matches."""
    paths = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    matches = where if callable(where) else re.compile(where).search
    found = [leaf for path, leaf in paths if matches(path)]
    if not found:
        raise ValueError(
            f"gradnorm: {where!r} matches no param; there are {[path for path, _ in paths][:8]}"
        )
    return found
