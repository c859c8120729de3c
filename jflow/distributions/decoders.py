"""Distributions of data given a latent, which a Linen network reads: decoders of autoencoders.

Each is a `jflow.types.Distribution` whose cond is the latent z.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow import distributions
from jflow._core.arrays import float_dtype, sum_event
from jflow._core.checks import check_event
from jflow._core.linen import apply_linen, init_linen
from jflow.types import Array, Distribution

__all__ = ["bernoulli", "normal"]


def bernoulli(net: nn.Module) -> Distribution:
    """Data in {0, 1} (as floats) given a latent, with logits from a network.

        log p(x | z) = sum_i x_i l_i - log(1 + exp l_i),    l = net(z).

    Samples are not differentiable.

    Args:
        net: a Linen module, `module(z) -> logits` [b, *event].

    Returns:
        Distribution: the distribution of x with cond=z, with the params of the net.

    Examples:
        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow.distributions import decoders
        >>> decoder = decoders.bernoulli(nn.Dense(4, kernel_init=nn.initializers.zeros))
        >>> x, z = jnp.ones((1, 4)), jnp.zeros((1, 2))
        >>> params = decoder.init(jax.random.key(0), x, z)
        >>> round(float(decoder.log_prob(params, x, z)[0]), 3)  # -4 log 2
        -2.773
    """

    def init(key, x, cond=None):
        params = init_linen(net, key, cond)
        check_event(
            "bernoulli", x, jax.eval_shape(lambda p: apply_linen(net, p, cond), params).shape[1:]
        )
        return params

    def log_prob(params, x, cond=None, *, key=None):
        logits = _wide(apply_linen(net, params, cond, key=key))
        check_event("bernoulli", x, logits.shape[1:])
        return sum_event(x.astype(logits.dtype) * logits - jax.nn.softplus(logits))

    def sample(params, key, n, cond=None):
        logits = _wide(apply_linen(net, params, cond))
        return jax.random.bernoulli(key, jax.nn.sigmoid(logits)).astype(logits.dtype)

    return Distribution(init, log_prob, sample)


def normal(net: nn.Module) -> Distribution:
    """Real data given a latent: the output of a network plus normal noise of a trainable size.

        x = net(z) + exp(log_std) noise,

    with a 'log_std' for every number, which starts at 0. See `bernoulli` for an example.

    Args:
        net: a Linen module, `module(z) -> mean` [b, *event].

    Returns:
        Distribution: the distribution of x with cond=z, params {'net', 'log_std' [*event]}.
    """

    def init(key, x, cond=None):
        params = init_linen(net, key, cond)
        check_event(
            "normal", x, jax.eval_shape(lambda p: apply_linen(net, p, cond), params).shape[1:]
        )
        return {
            "net": params,
            "log_std": jnp.zeros_like(x, shape=x.shape[1:], dtype=float_dtype(x)),
        }

    def log_prob(params, x, cond=None, *, key=None):
        mean = _wide(apply_linen(net, params["net"], cond, key=key))
        check_event("normal", x, mean.shape[1:])
        noise = (x - mean) * jnp.exp(-params["log_std"])[None]
        return distributions.normal(x.shape[1:]).log_prob({}, noise) - jnp.sum(params["log_std"])

    def sample(params, key, n, cond=None):
        mean = _wide(apply_linen(net, params["net"], cond))
        return mean + jnp.exp(params["log_std"])[None] * jax.random.normal(
            key, mean.shape, mean.dtype
        )

    return Distribution(init, log_prob, sample)


def _wide(x: Array) -> Array:
    return x.astype(float_dtype(x))
