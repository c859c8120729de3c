"""Sampling through stochastic layers, with the density of the path in the place of that of x."""

import jax

from jflow._core.checks import check_draws, check_noun, check_params, check_rows
from jflow._core.nouns import base_log_prob, sample_source
from jflow.types import Bijector, Distribution, Flow, SampleAndLogProb, Transport

__all__ = ["path_sampler"]


def path_sampler(transport: Transport | Bijector, base: Distribution | Flow) -> SampleAndLogProb:
    """Samples of a stochastic normalizing flow with the weights of their paths.

    Also known as: stochastic normalizing flow, SNF, path weights, annealed importance sampling.

        log q = log p_base(z) - contribution,    (x, contribution) = forward(z) under a key

    where the contribution is log K(x, z) - log K(z, x) of the layers that draw and log |det dx/dz|
    of the others, so that

        E[p~(x) / q] = Z     for every unnormalized density p~ and any params.

    log q is the log of the density of the whole path over that of the reversed path given x, nats,
    and log p(x) itself over layers that draw nothing. `losses.reverse_kl` takes the sampler as it
    takes a flow, and trains all of its layers; `energy.estimate_log_z` takes log p~(x) - log q.
    Layers that draw are `bijectors.metropolis`, `langevin` and `hamiltonian`, between bijectors in
    a `bijectors.chain`.

    Args:
        transport: the map, `forward` from the base to the data; a bijector will do.
        base: the distribution of z.

    Returns:
        (params, key, n, cond=None) -> (x [n, *event], log q [n]). Its params are those of
            `flows.elbo_flow(transport, base)`, whose `init` makes them: {'bijector', 'base'}.

    Raises:
        TypeError: transport is not a `Transport` or a `Bijector`, or base not a `Distribution` or a
            `Flow`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, distributions, flows
        >>> base, log_density = distributions.normal((2,)), lambda x: -0.5 * jnp.sum(x**2, -1)
        >>> layers = bijectors.chain(bijectors.affine((2,)), bijectors.langevin(log_density, 0.1))
        >>> params = flows.elbo_flow(layers, base).init(jax.random.key(0), jnp.zeros((1, 2)))
        >>> sample = flows.path_sampler(layers, base)
        >>> x, log_q = sample(params, jax.random.key(0), 1000)
        >>> log_z = jax.nn.logsumexp(log_density(x) - log_q) - jnp.log(1000)
        >>> bool(abs(log_z - jnp.log(2 * jnp.pi)) < 0.05)
        True

    References:
        Wu, Köhler, Noé, *Stochastic Normalizing Flows*, 2020, arXiv:2002.06707.
    """
    check_noun("path_sampler", transport, Transport, Bijector)
    check_noun("path_sampler", base, Distribution, Flow)

    def sample_and_log_prob(params, key, n, cond=None):
        check_params("path_sampler", params, "bijector", "base")
        n, cond = check_draws("path_sampler", key, n, cond)
        key_base, key_density, key_map = jax.random.split(key, 3)
        z = sample_source(base, params, key_base, n, cond)
        log_q = base_log_prob("path_sampler", base, params, z, cond, key_density)
        x, contribution = transport.forward(params["bijector"], z, cond, key=key_map)
        return x, log_q - check_rows("path_sampler", "the contribution", contribution, n)

    return jax.jit(sample_and_log_prob, static_argnums=2)
