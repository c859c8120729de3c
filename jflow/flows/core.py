"""`flow` and `elbo_flow`: a map and a base distribution."""

import jax
import jax.numpy as jnp

from jflow._util import (
    check_cond,
    check_draws,
    check_key,
    check_noun,
    check_params,
    check_rows,
    need_key,
    split_key,
)
from jflow.types import Bijector, Distribution, ElboFlow, Flow, Transport

__all__ = ["elbo_flow", "flow", "importance_weighted"]


def flow(bijector: Bijector, base: Distribution) -> Flow:
    """The distribution of x = forward(z), z ~ base: log p(x) = log p_base(inverse(x)) + log |det d inverse / dx|.

    Params {'bijector', 'base'}. `init` wants a batch x [b, *event] of data (data-dependent layers look at it); zeros of
    that shape do where no layer looks. `log_prob` is [b], in nats; -inf outside the support.
    """
    check_noun("flow", bijector, Bijector)
    check_noun("flow", base, Distribution, Flow)

    def init(key, x, cond=None):
        check_key("flow.init", key)
        x, cond = _check_batch(x, cond)
        key_bijector, key_base = jax.random.split(key)
        params = bijector.init(key_bijector, x, cond, side="data")
        z = _first_pass("flow", lambda x, cond: bijector.inverse(params, x, cond), x, cond)
        return {"bijector": params, "base": base.init(key_base, z, cond)}

    def forward(params, z, cond=None, *, key=None):
        return _map("flow", bijector.forward, params, z, cond, key)

    def inverse(params, x, cond=None, *, key=None):
        return _map("flow", bijector.inverse, params, x, cond, key)

    def density(params, z, cond, key=None):
        log_prob = base.log_prob(params["base"], z, cond, key=key)
        return check_rows("flow", "the base's log_prob", log_prob, z.shape[0])

    def log_prob(params, x, cond=None, *, key=None):
        x, cond = _check_batch(x, cond)
        key_bijector, key_base = split_key(key, 2)
        z, log_det = inverse(params, x, cond, key=key_bijector)
        return density(params, z, cond, key_base) + log_det

    def sample(params, key, n, cond=None):
        z, cond = _sample_source(base, params, key, n, cond)
        return forward(params, z, cond)[0]

    def sample_and_log_prob(params, key, n, cond=None):
        z, cond = _sample_source(base, params, key, n, cond)
        x, log_det = forward(params, z, cond)
        return x, density(params, z, cond) - log_det

    return Flow(init, log_prob, sample, sample_and_log_prob, forward, inverse)


def elbo_flow(transport: Transport | Bijector, base: Distribution) -> ElboFlow:
    """What `flow` is to a bijector: elbo(x) = log p_base(z) + contribution for z drawn by `inverse`, a lower bound of
    log p(x) in expectation over keys (log p(x) itself over a map that draws nothing).

    Params {'bijector', 'base'}, `init` and units as in `flow`. Nielsen et al., *SurVAE Flows* (2020).
    """
    check_noun("elbo_flow", transport, Transport, Bijector)
    check_noun("elbo_flow", base, Distribution, Flow)

    def init(key, x, cond=None):
        check_key("elbo_flow.init", key)
        x, cond = _check_batch(x, cond)
        key_map, key_draw, key_base = jax.random.split(key, 3)
        params = transport.init(key_map, x, cond, side="data")
        z = _first_pass("elbo_flow", lambda x, cond: transport.inverse(params, x, cond, key=key_draw), x, cond)
        return {"bijector": params, "base": base.init(key_base, z, cond)}

    def forward(params, z, cond=None, *, key=None):
        return _map("elbo_flow", transport.forward, params, z, cond, key)

    def inverse(params, x, cond=None, *, key=None):
        return _map("elbo_flow", transport.inverse, params, x, cond, key)

    def elbo(params, x, cond=None, *, key=None):
        x, cond = _check_batch(x, cond)
        key_map, key_base = split_key(key, 2)
        z, contribution = inverse(params, x, cond, key=key_map)
        log_prob = base.log_prob(params["base"], z, cond, key=key_base)
        return check_rows("elbo_flow", "the base's log_prob", log_prob, x.shape[0]) + contribution

    def sample(params, key, n, cond=None):
        z, cond = _sample_source(base, params, key, n, cond)
        return forward(params, z, cond, key=jax.random.fold_in(key, 1))[0]

    return ElboFlow(init, elbo, sample, forward, inverse)


def importance_weighted(flow: ElboFlow, draws: int) -> ElboFlow:
    """`flow` with a tighter bound: elbo(x) = log mean_k exp elbo_k(x) over `draws` keys, one after another in memory.

    Between the plain bound (draws=1) and log p(x), which it reaches as `draws` grows. Burda, Grosse, Salakhutdinov,
    *Importance Weighted Autoencoders* (2016).
    """
    check_noun("importance_weighted", flow, ElboFlow)
    if draws < 1:
        raise ValueError(f"importance_weighted: expected draws >= 1, got {draws}")

    def elbo(params, x, cond=None, *, key=None):
        need_key("importance_weighted", key)
        values = jax.lax.map(lambda k: flow.elbo(params, x, cond, key=k), jax.random.split(key, draws))
        return jax.nn.logsumexp(values, axis=0) - jnp.log(draws).astype(values.dtype)

    return flow._replace(elbo=jax.jit(elbo))


def _sample_source(base, params, key, n, cond):
    check_params("flow", params, "bijector", "base")
    n, cond = check_draws("sample", key, n, cond)
    z = base.sample(params["base"], key, n, cond)
    leaves = jax.tree.leaves(params)
    return (z.astype(jnp.result_type(*leaves)) if leaves else z), cond


def _map(name, apply, params, x, cond, key):
    """What a direction of the map makes of x, and its log_det, which has to be [b]."""
    check_params(name, params, "bijector", "base")
    x, cond = _check_batch(x, cond)
    y, log_det = apply(params["bijector"], x, cond, key=key)
    return y, check_rows(name, "log_det", log_det, x.shape[0])


def _first_pass(name, inverse, x, cond):
    """z of inverse(x, cond), after a check that log_det is [b]; where an event has b numbers along an axis, of the shape
    for twice the rows too, since a log_det of the event's numbers has the shape of one of the rows there."""
    z, log_det = inverse(x, cond)
    b = x.shape[0]
    check_rows(name, "log_det", log_det, b)
    if b in x.shape[1:]:
        x, cond = jax.tree.map(lambda a: jnp.concatenate([a, a]), (x, cond))
        _, log_det = jax.eval_shape(lambda: inverse(x, cond))
        check_rows(name, f"log_det for {2 * b} rows of x", log_det, 2 * b)
    return z


def _check_batch(x, cond):
    """x as an array of floats [b, *event], and cond with b rows."""
    if isinstance(x, dict):
        raise TypeError(f"flow: expected x to be an array [b, *event], got a dict of {sorted(x)}: losses take batches")
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise TypeError("flow: expected x to be an array [b, *event], got a key: the order is init(key, x, cond)")
    if x.ndim == 0:
        raise ValueError("flow: expected x of shape [b, *event], got a scalar")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"flow: expected x in floats (integers want dequantizing first), got {x.dtype}")
    return x, check_cond("flow", cond, x.shape[0])
