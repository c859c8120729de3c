"""Fitting a flow to a density that is known up to a constant."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jflow._core.batch import mean_of_rows
from jflow._core.checks import (
    check_batch,
    check_cond,
    check_noun,
    check_rows,
    check_whole,
    need_key,
)
from jflow.types import Array, Flow, Loss, SampleAndLogProb

__all__ = ["reverse_kl"]


def reverse_kl(
    flow: Flow | SampleAndLogProb, log_density: Callable[..., Array], *, draws: int = 256
) -> Loss:
    """The reverse KL divergence of a flow from a density that is known up to a constant.

    Also known as: variational inference, ELBO of an unnormalized density.

    The loss is E_q [log q(x) - log p~(x)] = KL(q, p) - log Z, in nats, over reparameterized draws x
    of q: minus the evidence lower bound. A flow with fast `forward` (planar, sylvester, iaf,
    couplings) makes it fast. Of a sampler of paths (`flows.path_sampler`,
    `solvers.diffusion_sampler`) it is the divergence of the paths from the reversed ones, which
    bounds that of x.

    Args:
        flow: The flow q, or a function (params, key, n, cond) -> (x [n, *event], log q [n]) as
            `flow.sample_and_log_prob` is.
        log_density: The unnormalized log p~, x [n, *event] -> [n]; with a 'cond' in the batch (x,
            cond) -> [n].
        draws: The number of draws from q, for each row of cond where there is one (an amortized
            posterior).

    Returns:
        A loss of the batch {}, or {'cond'} alone, that needs a key. Its metrics are 'elbo' and
        'log_q', the mean of log q.

    Raises:
        TypeError: At construction for what is no `Flow` and no function.
        ValueError: At construction for draws < 1; at trace time for a batch with other keys, a
            log_density of another shape, and a key that is None.

    Examples:
        >>> import jax
        >>> from jflow import bijectors, distributions, flows, losses
        >>> base = distributions.normal((2,))
        >>> flow = flows.flow(bijectors.affine((2,)), base)
        >>> params = flow.init(jax.random.key(0), jax.numpy.zeros((1, 2)))
        >>> loss = losses.reverse_kl(flow, lambda x: base.log_prob({}, x), draws=8)
        >>> value, metrics = loss(params, jax.random.key(0), {})
        >>> sorted(metrics)
        ['elbo', 'log_q']

    References:
        Rezende, Mohamed, *Variational Inference with Normalizing Flows*, 2015, arXiv:1505.05770.
    """
    if isinstance(flow, tuple) or not callable(flow):
        check_noun("reverse_kl", flow, Flow)
    sample = flow.sample_and_log_prob if isinstance(flow, Flow) else flow
    check_whole("reverse_kl", draws=draws)

    def loss(params, key, batch: Mapping, frozen=None):
        need_key("reverse_kl", key)
        check_batch("reverse_kl", batch)
        if unknown := sorted(set(batch) - {"cond"}):
            raise ValueError(f"reverse_kl: unknown keys in batch: {unknown}; allowed is 'cond'")
        cond, n = batch.get("cond"), draws
        if cond is not None:
            rows = (jnp.shape(jax.tree.leaves(cond)[0]) or (1,))[0]
            cond = check_cond("reverse_kl", cond, rows)
            cond, n = (
                jax.tree.map(lambda c: jnp.repeat(jnp.asarray(c), draws, axis=0), cond),
                rows * draws,
            )
        x, log_q = sample(params, key, n, cond)
        log_p = log_density(x) if cond is None else log_density(x, cond)
        check_rows("reverse_kl", "log_density", log_p, n)
        value = mean_of_rows(log_q - log_p, None)
        return value, {"elbo": -value, "log_q": mean_of_rows(log_q, None)}

    return loss
