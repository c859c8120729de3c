"""`flow` and `elbo_flow`: a map and a base distribution."""

import jax
import jax.numpy as jnp

from jflow._util import check_cond, check_draws, need_key, sample_source, split_key
from jflow.types import Bijector, Distribution, ElboFlow, Flow, Transport

__all__ = ["elbo_flow", "flow", "importance_weighted"]


def flow(bijector: Bijector, base: Distribution) -> Flow:
    """The distribution of x = forward(z), z ~ base: log p(x) = log p_base(inverse(x)) + log |det d inverse / dx|.

    Params {'bijector', 'base'}. `init` wants a batch x [b, *event] of data (data-dependent layers look at it); zeros of
    that shape do where no layer looks. `log_prob` is [b], in nats; -inf outside the support.
    """
    if not isinstance(bijector, Bijector):
        hint = "; elbo_flow takes one" if isinstance(bijector, Transport) else ""
        raise TypeError(f"flow: expected a Bijector, got {type(bijector).__name__}{hint}")

    def init(key, x, cond=None):
        x = _check_batch(x, cond)
        key_bijector, key_base = jax.random.split(key)
        params = bijector.init(key_bijector, x, cond, side="data")
        z, _ = bijector.inverse(params, x, cond)
        return {"bijector": params, "base": base.init(key_base, z, cond)}

    def forward(params, z, cond=None, *, key=None):
        return bijector.forward(params["bijector"], _check_batch(z, cond), cond, key=key)

    def inverse(params, x, cond=None, *, key=None):
        return bijector.inverse(params["bijector"], _check_batch(x, cond), cond, key=key)

    def log_prob(params, x, cond=None, *, key=None):
        key_bijector, key_base = split_key(key, 2)
        z, log_det = inverse(params, x, cond, key=key_bijector)
        return base.log_prob(params["base"], z, cond, key=key_base) + log_det

    def sample(params, key, n, cond=None):
        return forward(params, _sample_source(base, params, key, n, cond), cond)[0]

    def sample_and_log_prob(params, key, n, cond=None):
        z = _sample_source(base, params, key, n, cond)
        x, log_det = forward(params, z, cond)
        return x, base.log_prob(params["base"], z, cond) - log_det

    return Flow(init, log_prob, sample, sample_and_log_prob, forward, inverse)


def elbo_flow(transport: Transport | Bijector, base: Distribution) -> ElboFlow:
    """What `flow` is to a bijector: elbo(x) = log p_base(z) + contribution for z drawn by `inverse`, a lower bound of
    log p(x) in expectation over keys (log p(x) itself over a map that draws nothing).

    Params {'bijector', 'base'}, `init` and units as in `flow`. Nielsen et al., *SurVAE Flows* (2020).
    """
    if not isinstance(transport, Transport | Bijector):
        raise TypeError(f"elbo_flow: expected a Transport or a Bijector, got {type(transport).__name__}")

    def init(key, x, cond=None):
        x = _check_batch(x, cond)
        key_map, key_draw, key_base = jax.random.split(key, 3)
        params = transport.init(key_map, x, cond, side="data")
        z, _ = transport.inverse(params, x, cond, key=key_draw)
        return {"bijector": params, "base": base.init(key_base, z, cond)}

    def forward(params, z, cond=None, *, key=None):
        return transport.forward(params["bijector"], _check_batch(z, cond), cond, key=key)

    def inverse(params, x, cond=None, *, key=None):
        return transport.inverse(params["bijector"], _check_batch(x, cond), cond, key=key)

    def elbo(params, x, cond=None, *, key=None):
        key_map, key_base = split_key(key, 2)
        z, contribution = inverse(params, x, cond, key=key_map)
        return base.log_prob(params["base"], z, cond, key=key_base) + contribution

    def sample(params, key, n, cond=None):
        z = _sample_source(base, params, key, n, cond)
        return forward(params, z, cond, key=jax.random.fold_in(key, 1))[0]

    return ElboFlow(init, elbo, sample, forward, inverse)


def importance_weighted(flow: ElboFlow, draws: int) -> ElboFlow:
    """`flow` with a tighter bound: elbo(x) = log mean_k exp elbo_k(x) over `draws` keys, one after another in memory.

    Between the plain bound (draws=1) and log p(x), which it reaches as `draws` grows. Burda, Grosse, Salakhutdinov,
    *Importance Weighted Autoencoders* (2016).
    """
    if not isinstance(flow, ElboFlow):
        raise TypeError(f"importance_weighted: expected an ElboFlow, got {type(flow).__name__}")
    if draws < 1:
        raise ValueError(f"importance_weighted: expected draws >= 1, got {draws}")

    def elbo(params, x, cond=None, *, key=None):
        need_key("importance_weighted", key)
        values = jax.lax.map(lambda k: flow.elbo(params, x, cond, key=k), jax.random.split(key, draws))
        return jax.nn.logsumexp(values, axis=0) - jnp.log(draws).astype(values.dtype)

    return flow._replace(elbo=jax.jit(elbo))


def _sample_source(base, params, key, n, cond):
    n = check_draws("sample", n, cond)
    return sample_source(base, params, key, n, cond)


def _check_batch(x, cond):
    x = jnp.asarray(x)
    if x.ndim == 0:
        raise ValueError("flow: expected x of shape [b, *event], got a scalar")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"flow: expected x in floats (integers want dequantizing first), got {x.dtype}")
    check_cond("flow", cond, x.shape[0])
    return x
