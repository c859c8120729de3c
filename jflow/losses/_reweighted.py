"""Fitting a flow to its own draws, weighted by the density that they should have."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_noun, check_rows, check_whole
from jflow.losses._path_gradient import need_empty_batch
from jflow.types import Array, Flow, Loss

__all__ = ["forward_kl"]


def forward_kl(flow: Flow, log_density: Callable[[Array], Array], *, draws: int = 256) -> Loss:
    """The forward KL divergence of a density known up to a constant from a flow, by reweighting.

    Also known as: mass-covering KL divergence, inclusive KL, reweighted wake-sleep,
    self-normalized importance sampling.

    The draws x of the flow are weighted by w = p~(x) / q(x), and the flow is fitted to them,

        - sum_i w_i log q(x_i) / sum_i w_i,

    which estimates KL(p, q) plus the entropy of p, with a bias that falls as 1 / draws. Draws and
    weights are stopped. It covers what the flow reaches and finds no mode of which there is no
    draw: for those see `energy.annealed_draws`.

    Args:
        flow: The flow q.
        log_density: The unnormalized log p~, x [n, *event] -> [n], -inf outside the support.
        draws: The number of draws.

    Returns:
        A loss of the batch {} that needs a key. Its metrics are 'effective_sample_size', (sum w)^2
        / sum w^2 as a share of the draws, and 'log_z', the log of the mean weight in nats. They and
        the loss are NaN where the density is 0 at all draws.

    Raises:
        TypeError: At construction for what is no `Flow`.
        ValueError: At construction for draws < 1; at trace time for a batch with any key, a
            log_density of another shape, and a key that is None.

    Examples:
        >>> import jax
        >>> from jflow import bijectors, distributions, flows, losses
        >>> base = distributions.normal((2,))
        >>> flow = flows.flow(bijectors.affine((2,)), base)
        >>> params = flow.init(jax.random.key(0), jax.numpy.zeros((1, 2)))
        >>> loss = losses.forward_kl(flow, lambda x: base.log_prob({}, x), draws=8)
        >>> value, metrics = loss(params, jax.random.key(0), {})
        >>> round(float(metrics["effective_sample_size"]), 3)  # the flow is exact
        1.0

    References:
        Bornschein, Bengio, *Reweighted Wake-Sleep*, 2014, arXiv:1406.2751.
        Mueller, McWilliams, Rousselle, Gross, Novak, *Neural Importance Sampling*, 2018,
            arXiv:1808.03856.
    """
    check_noun("forward_kl", flow, Flow)
    check_whole("forward_kl", draws=draws)

    def loss(params, key, batch, frozen=None):
        need_empty_batch("forward_kl", key, batch)
        key_draw, key_map = jax.random.split(key)
        x, drawn = jax.lax.stop_gradient(flow.sample_and_log_prob(params, key_draw, draws))
        log_q = flow.log_prob(params, x, key=key_map)
        log_p = check_rows("forward_kl", "log_density", log_density(x), draws)
        log_weights = jax.lax.stop_gradient(log_p) - drawn
        weights = jax.nn.softmax(log_weights)
        metrics = {
            "effective_sample_size": 1 / (draws * jnp.sum(jnp.square(weights))),
            "log_z": jax.nn.logsumexp(log_weights) - jnp.log(draws).astype(log_weights.dtype),
        }
        return mean_of_rows(-log_q, weights), metrics

    return loss
