"""Stochastic layers: both directions draw, and the contribution is a ratio of densities."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_event, check_noun, check_side, need_key
from jflow._core.keys import split_key
from jflow.bijectors._combinators import towards
from jflow.types import Bijector, Distribution, Flow, Transport

__all__ = ["indexed", "vae"]


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

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        check_event("vae", x, data_shape if side == "data" else source_shape)
        other = jnp.zeros_like(x, shape=(len(x), *(source_shape if side == "data" else data_shape)))
        x, z = (x, other) if side == "data" else (other, x)
        key_q, key_p = jax.random.split(key)
        q = posterior.init(key_q, z.astype(float_dtype(z)), _given("x", x, cond))
        return {"posterior": q, "decoder": decoder.init(key_p, x, _given("z", z, cond))}

    def forward(params, z, cond=None, *, key=None):
        need_key("vae.forward", key)
        check_event("vae", z, source_shape)
        x = decoder.sample(params["decoder"], key, len(z), _given("z", z, cond))
        log_p = decoder.log_prob(params["decoder"], x, _given("z", z, cond))
        return x, posterior.log_prob(params["posterior"], z, _given("x", x, cond)) - log_p

    def inverse(params, x, cond=None, *, key=None):
        need_key("vae.inverse", key)
        check_event("vae", x, data_shape)
        z, log_q = posterior.sample_and_log_prob(
            params["posterior"], key, len(x), _given("x", x, cond)
        )
        return z, decoder.log_prob(params["decoder"], x, _given("z", z, cond)) - log_q

    return Transport(init, forward, inverse)


def indexed(
    bijector: Bijector,
    prior: Distribution | Flow,
    posterior: Flow,
    index_shape: Sequence[int],
) -> Transport:
    """A continuously-indexed layer: a map of z that is told random numbers u, its index.

    `forward` draws u ~ p(u given z), the prior, and gives x = G(z; u); the inverse draws
    u ~ q(u given x), the posterior, and gives z = G^-1(x; u). The contribution of the inverse is

        log p(u given z) - log q(u given x) + log |det dG^-1/dx|,

    in nats: `flows.elbo_flow(indexed(...), base)` has the evidence lower bound, which is exact at
    the true posterior, and `flows.importance_weighted` the tighter one. A mixture over u of maps
    has none of the topology of its base: two clusters from one normal law. Both directions need a
    key.

    Also known as: continuously indexed flow, CIF.

    Args:
        bijector: the map G, whose cond is u, or {'u': u, 'cond': cond} where there is a cond; such
            as `amortized` or a coupling.
        prior: the law p of u; its cond is z, or {'z': z, 'cond': cond}.
        posterior: the flow q of u; its cond is x, or {'x': x, 'cond': cond}.
        index_shape: the shape of one u.

    Returns:
        Transport: the layer, with params {'bijector', 'prior', 'posterior'}.

    Raises:
        TypeError: bijector is not a `Bijector`, prior not a `Distribution` or a `Flow`, or
            posterior not a `Flow`.
        ValueError: there is no key.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, distributions, flows
        >>> layer = bijectors.indexed(
        ...     bijectors.amortized(bijectors.affine((1,))),
        ...     distributions.normal((1,)),
        ...     flows.planar((1,), depth=0),
        ...     (1,),
        ... )
        >>> model = flows.elbo_flow(layer, distributions.normal((1,)))
        >>> params = model.init(jax.random.key(0), jnp.ones((3, 1)))
        >>> model.elbo(params, jnp.ones((3, 1)), key=jax.random.key(1)).shape
        (3,)

    References:
        Cornish, Caterini, Deligiannidis, Doucet, *Relaxing Bijectivity Constraints with
            Continuously Indexed Normalising Flows*, 2019, arXiv:1909.13833.
    """
    check_noun("indexed", bijector, Bijector)
    check_noun("indexed", prior, Distribution, Flow)
    check_noun("indexed", posterior, Flow)
    index_shape = tuple(index_shape)

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        keys = jax.random.split(key, 3)
        u = jnp.zeros_like(x, shape=(len(x), *index_shape), dtype=float_dtype(x))
        params = {"bijector": bijector.init(keys[0], x, _given("u", u, cond), side=side)}
        other, _ = towards(side, bijector)(params["bijector"], x, _given("u", u, cond))
        x, z = (x, other) if side == "data" else (other, x)
        params["prior"] = prior.init(keys[1], u, _given("z", z, cond))
        params["posterior"] = posterior.init(keys[2], u, _given("x", x, cond))
        return params

    def forward(params, z, cond=None, *, key=None):
        key_u, key_map = split_key(need_key("indexed.forward", key), 2)
        u = prior.sample(params["prior"], key_u, len(z), _given("z", z, cond))
        log_p = prior.log_prob(params["prior"], u, _given("z", z, cond))
        x, log_det = bijector.forward(params["bijector"], z, _given("u", u, cond), key=key_map)
        return x, log_det + posterior.log_prob(params["posterior"], u, _given("x", x, cond)) - log_p

    def inverse(params, x, cond=None, *, key=None):
        key_u, key_map = split_key(need_key("indexed.inverse", key), 2)
        u, log_q = posterior.sample_and_log_prob(
            params["posterior"], key_u, len(x), _given("x", x, cond)
        )
        z, log_det = bijector.inverse(params["bijector"], x, _given("u", u, cond), key=key_map)
        return z, log_det + prior.log_prob(params["prior"], u, _given("z", z, cond)) - log_q

    return Transport(init, forward, inverse)


def _given(name, value, cond):
    return value if cond is None else {name: value, "cond": cond}
