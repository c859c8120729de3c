"""Maximum likelihood of all conditionals of a row at once."""

import jax
import jax.numpy as jnp

from jflow._core.batch import mean_of_rows, read_batch
from jflow.distributions import AnyOrder, MixedRows
from jflow.types import Loss

__all__ = ["any_order_nll"]


def any_order_nll(model: AnyOrder) -> Loss:
    """Negative log-likelihood of rows, averaged over all orders of their columns, in nats per row.

    A row is cut after a random number k of its d columns in a random order; each of the others is
    predicted from the first k,

        loss = d / (d - k) sum_{j not among the first k} -log p(x_j | the first k),

    whose mean over orders and cuts is the mean over orders s of -log p_s(x): by the chain rule, the
    column that comes next in a random order is any of the others with the same chance.

    Args:
        model: The model, from `distributions.any_order`.

    Returns:
        A loss of the batch {'x' [b, d] the numbers, 'code' [b, d] the codes, optionally 'weight'
        [b]}, see `distributions.MixedRows`. It has no metrics.

    Raises:
        ValueError: At trace time for a batch without 'x', with an unknown key, or with rows that
            don't match.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, losses
        >>> model = distributions.any_order([2], [False], width=8, num_blocks=1)
        >>> batch = {"code": jnp.array([[1], [0]]), "x": jnp.zeros((2, 1))}
        >>> rows = distributions.MixedRows(batch["code"], batch["x"])
        >>> params = model.init(jax.random.key(0), rows)
        >>> loss = losses.any_order_nll(model)
        >>> round(float(loss(params, jax.random.key(1), batch)[0]), 1)  # about log 2
        0.7

    References:
        Hoogeboom, Gritsenko, Bastings, Poole, van den Berg, Salimans, *Autoregressive Diffusion
            Models*, 2021, arXiv:2110.02037, equation 4.
    """

    def loss(params, key, batch, frozen=None):
        x, code, weight = read_batch("any_order_nll", batch, ("x", "code", "weight"))
        if code is None or code.shape != x.shape:
            raise ValueError(
                f"any_order_nll: expected 'code' of the shape of 'x', {list(x.shape)}, got"
                f" {None if code is None else list(code.shape)}"
            )
        rows, (b, d) = MixedRows(code, x), x.shape
        order_key, cut_key, dropout_key = jax.random.split(key, 3)
        rank = jnp.argsort(jax.random.uniform(order_key, (b, d)), -1)
        cut = jax.random.randint(cut_key, (b, 1), 0, d)
        observed = rank < cut
        terms = model.conditionals(params, rows, observed, key=dropout_key)
        terms = jnp.where(observed, 0.0, terms).sum(-1) * (d / (d - cut[:, 0]))
        return mean_of_rows(-terms, weight), {}

    return loss
