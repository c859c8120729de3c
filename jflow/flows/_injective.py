"""Injective flows: data near a surface of fewer dimensions, by two networks of any form."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow._core.checks import (
    check_cond,
    check_draws,
    check_key,
    check_noun,
    check_params,
    check_same_shape,
    count_rows,
)
from jflow._core.linen import apply_linen, check_linen, init_linen
from jflow._core.nouns import base_log_prob, sample_source
from jflow.types import Array, Distribution, Flow, Params

__all__ = ["InjectiveFlow", "injective"]


class InjectiveFlow(NamedTuple):
    """The functions of `injective`.

    Attributes:
        init: `init(key, x, cond=None) -> params` with {'encoder', 'decoder', 'base'}.
        encode: `encode(params, x, cond=None, *, key=None) -> z` [b, *latent].
        decode: `decode(params, z, cond=None, *, key=None) -> x` [b, *event]; the key switches
            dropout on in both.
        base_log_prob: `base_log_prob(params, z, cond=None, *, key=None) -> [b]`, nats of z.
        sample: `sample(params, key, n, cond=None) -> [n, *event]`.
        manifold_log_prob: `manifold_log_prob(params, x, cond=None) -> [b]`, the log-density at
            decode(encode(x)) with respect to the d-dimensional volume of the surface. It is no
            density of x, and says nothing of how far x is from the surface.
    """

    init: Callable[..., Params]
    encode: Callable[..., Array]
    decode: Callable[..., Array]
    base_log_prob: Callable[..., Array]
    sample: Callable[..., Array]
    manifold_log_prob: Callable[..., Array]


def injective(encoder: nn.Module, decoder: nn.Module, base: Distribution | Flow) -> InjectiveFlow:
    """An injective flow of two networks of any form: x = g(z) for latents z of fewer dimensions.

    Samples lie on the surface of all g(z), of the dimension d of z, and are one pass of the
    decoder. `losses.free_form` trains it. On the surface the density is

        log p(g(z)) = log p_base(z) - log det(g'(z)^T g'(z)) / 2,    z = f(x),

    which `manifold_log_prob` gives on demand, by d products with the derivative of g and a
    determinant of d x d. These nats are with respect to the d-dimensional volume of a surface that
    is trained too: they do not compare with those of a density of x, nor between models whose
    surfaces differ, and a copy of the surface that misses the data has as many. Report the
    reconstruction error beside them.

    Also known as: free-form injective flow, FIF, autoencoder with a likelihood, manifold flow.

    Args:
        encoder: f, a Linen module x [b, *event] -> z [b, *latent], with cond as a second argument
            where there is one.
        decoder: g, a Linen module z [b, *latent] -> x [b, *event], likewise.
        base: the law of z.

    Returns:
        InjectiveFlow: init, encode, decode, base_log_prob, sample and manifold_log_prob.

    Raises:
        TypeError: encoder or decoder is no Linen module, or base no `Distribution` or `Flow`.
        ValueError: at the call, the decoder's output is not shaped like x.

    Examples:
        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, flows
        >>> model = flows.injective(nn.Dense(1), nn.Dense(3), distributions.normal((1,)))
        >>> params = model.init(jax.random.key(0), jnp.zeros((4, 3)))
        >>> model.sample(params, jax.random.key(1), 5).shape
        (5, 3)
        >>> model.manifold_log_prob(params, jnp.zeros((4, 3))).shape
        (4,)

    References:
        Sorrenson, Draxler, Rousselot, Hummerich, Zimmermann, Köthe, *Lifting Architectural
            Constraints of Injective Flows*, 2023, arXiv:2306.01843.
    """
    check_linen("injective", "encoder", encoder)
    check_linen("injective", "decoder", decoder)
    check_noun("injective", base, Distribution, Flow)

    def run(name, net, params, value, cond, key):
        check_params("injective", params, name)
        cond = check_cond("injective", cond, count_rows("injective", value))
        more = () if cond is None else (cond,)
        return apply_linen(net, params[name], value, *more, key=key)

    def encode(params, x, cond=None, *, key=None):
        return run("encoder", encoder, params, x, cond, key)

    def decode(params, z, cond=None, *, key=None):
        return run("decoder", decoder, params, z, cond, key)

    def init(key, x, cond=None):
        check_key("injective.init", key)
        keys = jax.random.split(key, 3)
        more = () if cond is None else (check_cond("injective", cond, len(x)),)
        params = {"encoder": init_linen(encoder, keys[0], x, *more)}
        z = encode(params, x, cond)
        params["decoder"] = init_linen(decoder, keys[1], z, *more)
        check_same_shape("injective", "decoder(encoder(x))", decode(params, z, cond), x)
        return {**params, "base": base.init(keys[2], z, cond)}

    def log_prob(params, z, cond=None, *, key=None):
        return base_log_prob("injective", base, params, z, cond, key)

    def sample(params, key, n, cond=None):
        n, cond = check_draws("injective.sample", key, n, cond)
        return decode(params, sample_source(base, params, key, n, cond), cond)

    def manifold_log_prob(params, x, cond=None):
        cond = check_cond("injective", cond, count_rows("injective", x))
        z = encode(params, x, cond)

        def metric(z, c):  # g'^T g' of a row
            row = lambda z: decode(params, z[None], jax.tree.map(lambda a: a[None], c))  # noqa: E731
            columns = jax.jacfwd(lambda flat: row(flat.reshape(z.shape)).ravel())(z.ravel())
            return columns.T @ columns

        volume = jnp.linalg.slogdet(jax.vmap(metric)(z, cond))[1] / 2
        return log_prob(params, z, cond) - volume

    return InjectiveFlow(init, encode, decode, log_prob, sample, manifold_log_prob)
