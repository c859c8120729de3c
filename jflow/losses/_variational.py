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
from jflow.types import Array, Flow, Loss

__all__ = ["reverse_kl"]


def reverse_kl(flow: Flow, log_density: Callable[..., Array], *, draws: int = 256) -> Loss:
    """E_q [log q(x) - log p~(x)] over reparameterized draws x of the flow q: KL(q, p) - log Z, minus the evidence lower
    bound. A flow with fast `forward` (planar, sylvester, iaf, couplings) makes it fast.

    log_density: x [n, *event] -> log p~ [n], unnormalized; with a 'cond' in the batch (x, cond) -> [n].
    draws: from q, for each row of cond where there is one (an amortised posterior).
    batch: {}, or 'cond' alone. The key is needed. metrics: 'elbo', 'log_q', the mean of log q.

    Rezende, Mohamed, *Variational Inference with Normalizing Flows* (2015).
    """
    check_noun("reverse_kl", flow, Flow)
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
        x, log_q = flow.sample_and_log_prob(params, key, n, cond)
        log_p = log_density(x) if cond is None else log_density(x, cond)
        check_rows("reverse_kl", "log_density", log_p, n)
        value = mean_of_rows(log_q - log_p, None)
        return value, {"elbo": -value, "log_q": mean_of_rows(log_q, None)}

    return loss
