"""`flow`: a map and a base distribution."""

import jax
import jax.numpy as jnp

from jflow._util import check_cond, check_draws, split_key
from jflow.types import Bijector, Distribution, Flow


def flow(bijector: Bijector, base: Distribution) -> Flow:
    """The distribution of x = forward(z), z ~ base: log p(x) = log p_base(inverse(x)) + log |det d inverse / dx|.

    Params {'bijector', 'base'}. `init` wants a batch x [b, *event] of data (data-dependent layers look at it); zeros of
    that shape do where no layer looks. `log_prob` is [b], in nats; -inf outside the support.
    """
    if not isinstance(bijector, Bijector):
        raise TypeError(f"flow: expected a Bijector, got {type(bijector).__name__}")

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

    def sample_source(params, key, n, cond):
        n = check_draws("sample", n, cond)
        z = base.sample(params["base"], key, n, cond)
        leaves = jax.tree.leaves(params)
        return z.astype(jnp.result_type(*leaves)) if leaves else z

    def sample(params, key, n, cond=None):
        return forward(params, sample_source(params, key, n, cond), cond)[0]

    def sample_and_log_prob(params, key, n, cond=None):
        z = sample_source(params, key, n, cond)
        x, log_det = forward(params, z, cond)
        return x, base.log_prob(params["base"], z, cond) - log_det

    return Flow(init, log_prob, sample, sample_and_log_prob, forward, inverse)


def _check_batch(x, cond):
    x = jnp.asarray(x)
    if x.ndim == 0:
        raise ValueError("flow: expected x of shape [b, *event], got a scalar")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"flow: expected x in floats (integers want dequantizing first), got {x.dtype}")
    check_cond("flow", cond, x.shape[0])
    return x
