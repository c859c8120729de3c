"""Flow matching of a network with experts, all of which are to be used."""

import jax
import jax.numpy as jnp

from jflow import paths, times
from jflow._core.arrays import float_dtype
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_noun, check_same_shape, check_weights
from jflow._core.keys import same_draws
from jflow.losses._errors import mean_squared_error
from jflow.losses._pairs import draw_pairs
from jflow.types import Field, Loss, Path, Time

__all__ = ["balanced_matching"]

_LINEAR, _UNIFORM = paths.linear(), times.uniform()


def balanced_matching(
    field: Field, *, weight: float = 0.01, path: Path = _LINEAR, time: Time = _UNIFORM
) -> Loss:
    """Flow matching of a mixture of experts, with the loss that keeps the experts equally in use.

    Also known as: load-balancing loss, auxiliary loss of a mixture of experts.

        flow_matching + weight mean over layers of E sum_e f_e P_e

    where f_e is the fraction of the tokens of the batch whose first choice is expert e, whatever
    room it has, through which no gradient goes, and P_e the mean probability that the router gave
    it. The term is 1 where all experts are chosen alike, and E where one has everything. It is a
    product of means over the batch, so that parts of an accumulated batch, and mapped shards,
    balance themselves.

    Args:
        field: `nets.routed` of a network, or any field that returns a dict of 'velocity', shaped
            like x, and 'first' and 'probability' [b, layers, E].
        weight: the weight of the balance, not negative.
        path: the path, which gives x_t and its target.
        time: the law of the times, (key, n) -> t [n].

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. Its metrics are 'matching', the error of the velocity, 'balance', and
        'load' [layers, E], f times E, 1 for each where all are chosen alike.

    Raises:
        TypeError: At construction for what is no `Field`.
        ValueError: At construction for a negative weight; at trace time for a velocity of another
            shape, and a batch as `flow_matching`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> from jflow.types import Field
        >>> def apply(params, x, t, cond=None, *, key=None):
        ...     even = jnp.full((len(x), 1, 4), 0.25)
        ...     return {"velocity": 0 * x, "first": even, "probability": even}
        >>> loss = losses.balanced_matching(Field(lambda *args: {}, apply), weight=0.5)
        >>> batch = {"x0": jnp.zeros((4, 2)), "x": jnp.ones((4, 2))}
        >>> float(loss({}, jax.random.key(0), batch)[0])  # 1 and a half of 1
        1.5

    References:
        Fedus, Zoph, Shazeer, *Switch Transformers: Scaling to Trillion Parameter Models with Simple
            and Efficient Sparsity*, 2021, arXiv:2101.03961, for the balance; the mean over layers
            is ours.
    """
    name = "balanced_matching"
    check_noun(name, field, Field)
    check_weights(name, weight=weight)

    def loss(params, key, batch, frozen=None):
        pairs = draw_pairs(name, key, batch, time)
        ends = pairs.x0, pairs.x1, pairs.t
        x_t = path.point(*ends, key=pairs.path_key).astype(pairs.x1.dtype)
        target = path.target(*ends, key=same_draws(pairs.path_key))
        out = field.apply(params, x_t, pairs.t, pairs.cond, key=pairs.dropout_key)
        v = check_same_shape(name, "a velocity", out["velocity"], target)
        v, target = (a.astype(float_dtype(x_t)) for a in (v, target))
        matching = mean_of_rows(mean_squared_error(v, target, x_t, pairs.t), pairs.weight)
        chosen = jax.lax.stop_gradient(mean_of_rows(out["first"], pairs.weight))
        total = jnp.sum(chosen, axis=-1, keepdims=True)
        load = chosen.shape[-1] * chosen / jnp.where(total > 0, total, 1)
        probability = mean_of_rows(out["probability"], pairs.weight)
        balance = jnp.mean(jnp.sum(load * probability, axis=-1))
        metrics = {"matching": matching, "balance": balance, "load": load}
        return matching + weight * balance, metrics

    return loss
