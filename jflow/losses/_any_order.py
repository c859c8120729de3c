"""Maximum likelihood of all conditionals of a row at once."""

import jax
import jax.numpy as jnp

from jflow._core.batch import mean_of_rows, read_batch
from jflow.flows import AnyOrder, MixedRows
from jflow.types import Loss

__all__ = ["any_order_nll"]


def any_order_nll(model: AnyOrder, random: float = 0.5) -> Loss:
    """Negative log-likelihood of rows in random orders of their columns, in nats per row.

        loss = -sum_j log p(x_s(j) | x_s(1), ..., x_s(j - 1)),

    with an order s for each row: any order with probability `random`, else the one of the density.
    The former are for conditioning, the latter is for draws of whole rows.

    Args:
        model: The model, from `flows.any_order`.
        random: The share of rows in any order.

    Returns:
        A loss of the batch {'x' [b, d] the numbers, 'code' [b, d] the codes, optionally 'weight'
        [b]}, see `flows.MixedRows`. It has no metrics.

    Raises:
        ValueError: At construction for a share outside [0, 1]; at trace time for a batch without
            'x' or 'code', with an unknown key, or with rows that don't match.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import flows, losses
        >>> model = flows.any_order([2], [False], width=8, num_blocks=1)
        >>> batch = {"code": jnp.array([[1], [0]]), "x": jnp.zeros((2, 1))}
        >>> rows = flows.MixedRows(batch["code"], batch["x"])
        >>> params = model.init(jax.random.key(0), rows)
        >>> loss = losses.any_order_nll(model)
        >>> round(float(loss(params, jax.random.key(1), batch)[0]), 1)  # about log 2
        0.7

    References:
        Uria, Murray, Larochelle, *A Deep and Tractable Density Estimator*, 2014, arXiv:1310.1757.
    """
    if not 0 <= random <= 1:
        raise ValueError(f"any_order_nll: expected random from 0 to 1, got {random}")

    def loss(params, key, batch, frozen=None):
        x, code, weight = read_batch("any_order_nll", batch, ("x", "code", "weight"))
        if code is None or code.shape != x.shape:
            raise ValueError(
                f"any_order_nll: expected 'code' of the shape of 'x', {list(x.shape)}, got"
                f" {None if code is None else list(code.shape)}"
            )
        b, d = x.shape
        any_key, which_key, dropout_key = jax.random.split(key, 3)
        any_rank = jnp.argsort(jax.random.uniform(any_key, (b, d)), -1)
        is_any = jax.random.uniform(which_key, (b, 1)) < random
        rank = jnp.where(is_any, any_rank, model.rank[None])
        terms = model.conditionals(params, MixedRows(code, x), rank, key=dropout_key)
        return mean_of_rows(-terms.sum(-1), weight), {}

    return loss
