"""Stochastic layers: both directions draw, and the contribution is a ratio of densities."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_event, check_side, need_key
from jflow.types import Distribution, Flow, Transport

__all__ = ["vae"]


def vae(
    posterior: Flow, decoder: Distribution, source_shape: Sequence[int], data_shape: Sequence[int]
) -> Transport:
    """A variational autoencoder as one stochastic layer.

    The inverse draws z ~ q(z given x), the posterior; `forward` draws x ~ p(x given z), the
    decoder. The contribution of the inverse is log p(x given z) - log q(z given x), in nats, so
    that flows.elbo_flow(vae(...), prior) has the evidence lower bound, with reparameterized draws,
    and flows.importance_weighted the tighter one. Both directions need a key.

    Also known as: variational autoencoder, stochastic layer.

    Args:
        posterior: the flow q of z; its cond is x, or {'x': x, 'cond': cond} where there is a cond.
            A Gaussian posterior is flows.planar(source_shape, depth=0, embed=encoder);
            flows.planar, sylvester or iaf with an embed are the richer ones.
        decoder: the distribution p of x; its cond is z, or {'z': z, 'cond': cond}. See
            `distributions.decoders`.
        source_shape: the shape of one z.
        data_shape: the shape of one x.

    Returns:
        Transport: the layer, with params {'posterior', 'decoder'}.

    Raises:
        TypeError: posterior is not a `Flow`.
        ValueError: the events of x or z have another shape, or there is no key.

    Examples:
        >>> from jflow import bijectors, distributions, flows
        >>> posterior = flows.planar((2,), depth=1)
        >>> layer = bijectors.vae(posterior, distributions.normal((5,)), (2,), (5,))
        >>> type(layer).__name__
        'Transport'

    References:
        Kingma, Welling, *Auto-Encoding Variational Bayes*, 2013, arXiv:1312.6114.
        Rezende, Mohamed, *Variational Inference with Normalizing Flows*, 2015, arXiv:1505.05770.
        Nielsen, Jaini, Hoogeboom, Winther, Welling,
            *SurVAE Flows: Surjections to Bridge the Gap between VAEs and Flows*, 2020,
            arXiv:2007.02731.
    """
    if not isinstance(posterior, Flow):
        raise TypeError(f"vae: expected a Flow as posterior, got {type(posterior).__name__}")
    source_shape, data_shape = tuple(source_shape), tuple(data_shape)

    def given(name, value, cond):
        return value if cond is None else {name: value, "cond": cond}

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        check_event("vae", x, data_shape if side == "data" else source_shape)
        other = jnp.zeros_like(x, shape=(len(x), *(source_shape if side == "data" else data_shape)))
        x, z = (x, other) if side == "data" else (other, x)
        key_q, key_p = jax.random.split(key)
        q = posterior.init(key_q, z.astype(float_dtype(z)), given("x", x, cond))
        return {"posterior": q, "decoder": decoder.init(key_p, x, given("z", z, cond))}

    def forward(params, z, cond=None, *, key=None):
        need_key("vae.forward", key)
        check_event("vae", z, source_shape)
        x = decoder.sample(params["decoder"], key, len(z), given("z", z, cond))
        log_p = decoder.log_prob(params["decoder"], x, given("z", z, cond))
        return x, posterior.log_prob(params["posterior"], z, given("x", x, cond)) - log_p

    def inverse(params, x, cond=None, *, key=None):
        need_key("vae.inverse", key)
        check_event("vae", x, data_shape)
        z, log_q = posterior.sample_and_log_prob(
            params["posterior"], key, len(x), given("x", x, cond)
        )
        return z, decoder.log_prob(params["decoder"], x, given("z", z, cond)) - log_q

    return Transport(init, forward, inverse)
