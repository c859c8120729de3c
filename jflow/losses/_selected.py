"""A loss of a part of the params and of the batch."""

from collections.abc import Callable

import jax

from jflow._core.checks import check_batch, check_weights
from jflow.types import Loss, Params, PyTree

__all__ = ["selected"]


def selected(
    loss: Loss,
    *,
    params: Callable[[Params], PyTree] | None = None,
    batch: Callable[[dict], dict] | None = None,
    weight: float = 1.0,
) -> Loss:
    """A loss of what is selected from larger params and a larger batch.

        weight * loss(params(p), key, batch(b), frozen)

    With `sum_losses` losses of several parts of a model are one: those of a shared network and of
    its heads, each on its own entries of the batch. Params that several of them select get the
    gradients of all.

    Args:
        loss: The loss.
        params: params -> what the loss takes as its params; None: all of them.
        batch: The batch -> the batch that the loss takes, a dict; None: the whole one.
        weight: What the value is multiplied by. The metrics are not.

    Returns:
        The loss of the larger params and batch, with the metrics of `loss`.

    Raises:
        ValueError: For a negative weight; at trace time for a selected batch that is no dict.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> scaled = lambda params, key, batch, frozen=None: (jnp.sum(params * batch["x"]), {})
        >>> text = losses.selected(
        ...     scaled, params=lambda p: p["head"], batch=lambda b: {"x": b["text"]}, weight=0.5
        ... )
        >>> total = losses.sum_losses({"text": text})
        >>> batch = {"x": jnp.zeros(3), "text": jnp.ones(3)}
        >>> float(total({"head": 4.0, "net": 1.0}, jax.random.key(0), batch)[0])
        6.0
    """
    check_weights("selected", weight=weight)
    weight = float(weight)

    def of_selected(given, key, rows, frozen=None):
        rows = rows if batch is None else batch(rows)
        check_batch("selected", rows)
        value, metrics = loss(given if params is None else params(given), key, rows, frozen)
        return jax.tree.map(lambda v: weight * v, value), metrics

    return of_selected
