"""A bijector whose parameters a network reads off the condition, a set for each row."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_cond
from jflow._core.keys import split_key
from jflow._core.linen import apply_linen, flatten_cond, init_linen
from jflow.types import Bijector

__all__ = ["amortized"]


def amortized(bijector: Bijector, net: nn.Module | None = None) -> Bijector:
    """Make every row's own params of a bijector a function of its condition.

    The params of row i are `bias + kernel^T features_i`, shaped like the params of `bijector`,
    where the features are those of cond. All kernels start at zero, so the map starts as the
    unconditional one for every cond. A map that is initialized with cond=None is the unconditional
    one. The inner map does not see cond.

    Args:
        bijector: the map, or `Transport`, whose params become functions of cond.
        net: a conditioner such as `nets.MLP`, called with no numbers but cond:
            module(x [b, 0], cond) -> features [b, F]. None takes the float leaves of cond
            themselves, flattened.

    Returns:
        Bijector: a map of the type of `bijector`, with params {'net', 'kernel', 'bias'}: 'bias'
            holds the initial params of the bijector itself, and every leaf of 'kernel' is
            [F, *leaf]. Initialized with cond=None, the params are {'bias'}.

    Raises:
        ValueError: the features are not [b, F], or cond is there where init had none, or the other
            way round.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijector = bijectors.amortized(bijectors.affine((2,)))
        >>> x, cond = jnp.ones((3, 2)), jnp.ones((3, 5))
        >>> params = bijector.init(jax.random.key(0), x, cond)
        >>> params["kernel"]["shift"].shape
        (5, 2)

    References:
        Rezende, Mohamed, *Variational Inference with Normalizing Flows*, 2015, arXiv:1505.05770.
        van den Berg, Hasenclever, Tomczak, Welling,
            *Sylvester Normalizing Flows for Variational Inference*, 2018, arXiv:1803.05649.
    """

    def nothing(x):
        return jnp.zeros_like(x, shape=(x.shape[0], 0), dtype=float_dtype(x))

    def features(params, x, cond, key=None):
        n = x.shape[0]
        cond = check_cond("amortized", cond, n)
        if net is None:
            out = flatten_cond("amortized", cond, n)
        else:
            out = apply_linen(net, params, nothing(x), cond, key=key)
        if out.ndim != 2 or out.shape[0] != n:
            raise ValueError(
                f"amortized: expected features of shape [{n}, F], got {list(out.shape)}"
            )
        return out

    def init(key, x, cond=None, *, side="data"):
        key_bijector, key_net = jax.random.split(key)
        params = {"bias": bijector.init(key_bijector, x, None, side=side)}
        if cond is None:
            return params
        net_params = {} if net is None else init_linen(net, key_net, nothing(x), cond)
        size = features(net_params, x, cond).shape[-1]
        kernel = jax.tree.map(lambda p: jnp.zeros_like(p, shape=(size, *p.shape)), params["bias"])
        return {"net": net_params, "kernel": kernel, **params}

    def apply(direction, params, x, cond=None, *, key=None):
        key_net, key = split_key(key, 2)
        if ("kernel" in params) != (cond is not None):
            said = "cond, as at init, got None" if cond is None else "no cond, since init had none"
            raise ValueError(f"amortized: expected {said}")
        if cond is None:
            return direction(params["bias"], x, None, key=key)
        out = features(params["net"], x, cond, key_net).astype(float_dtype(x))

        def row(h, x, key):
            own = jax.tree.map(
                lambda b, k: b + jnp.tensordot(h, k, 1), params["bias"], params["kernel"]
            )
            x, log_det = direction(own, x[None], None, key=key)
            return x[0], log_det[0]

        keys = None if key is None else jax.random.split(key, x.shape[0])
        return jax.vmap(row, in_axes=(0, 0, None if key is None else 0))(out, x, keys)

    return type(bijector)(init, partial(apply, bijector.forward), partial(apply, bijector.inverse))
