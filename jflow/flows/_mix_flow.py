"""`mix_flow`: the mixture of a base and its images under the powers of one map."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.checks import check_draws, check_noun, check_params, check_rows, check_whole
from jflow._core.nouns import base_log_prob, sample_source
from jflow.types import Array, Bijector, Distribution, Flow, Key, Params

__all__ = ["MixFlow", "mix_flow"]


class MixFlow(NamedTuple):
    """A `Distribution` with an unbiased estimate of its evidence lower bound; see `mix_flow`.

    Attributes:
        init: (key, x, cond=None) -> params {'bijector', 'base'}.
        log_prob: (params, x, cond=None, *, key=None) -> [b] nats.
        sample: (params, key, n, cond=None) -> [n, *event].
        elbo: (params, key, n, log_density) -> [n] unbiased estimates of the evidence lower bound
            E_q [log_density(x) - log q(x)], nats, one from each of n draws of the base.
            log_density: x [n, *event] -> [n].
    """

    init: Callable[..., Params]
    log_prob: Callable[..., Array]
    sample: Callable[..., Array]
    elbo: Callable[[Params, Key, int, Callable[[Array], Array]], Float[Array, " n"]]


def mix_flow(bijector: Bijector, base: Distribution | Flow, length: int) -> MixFlow:
    """The uniform mixture of a base and its images under 1, 2, ... length - 1 times one map T.

        q = (1 / N) sum_{n < N} T^n q_0,
        log q(x) = log mean_n exp(log q_0(T^-n x) + log |det d T^-n x / dx|),    N = length.

    If T preserves a density p and is ergodic, q comes near p as N grows, without any training:
    `energy.hamiltonian_mix_flow` has such a T. A sample is T^n z with n uniform. The bound takes
    one orbit of 2 N - 1 points for each draw z of the base,

        (1 / N) sum_{k < N} [log p~(T^k z) - log q(T^k z)],

    in which each q(T^k z) is a sum over N neighboring points of the orbit, so that all of them
    together cost O(N) maps. It is unbiased, and at most log Z in expectation.

    A chaotic map loses digits at each turn: log_prob goes back up to N times. Compare
    `bijector.inverse` of `bijector.forward` along an orbit, and take float64 where they part.

    Also known as: MixFlows, mixed variational flow, orbit mixture.

    Args:
        bijector: the map T, `forward` along the orbit; its params are those of all its powers.
        base: the distribution q_0, such as a Gaussian near the target.
        length: N, the number of components, at least 1; 1 is the base itself.

    Returns:
        MixFlow: the distribution, with params {'bijector', 'base'}; `energy.hamiltonian_mix_flow`
            has an example.

    Raises:
        TypeError: bijector is not a `Bijector`, or base not a `Distribution` or a `Flow`.
        ValueError: length is not a whole number of at least 1.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, distributions, flows
        >>> shift = bijectors.affine((1,))  # N(0, 1) and N(2, 1), in equal parts
        >>> mixture = flows.mix_flow(shift, distributions.normal((1,)), 2)
        >>> params = mixture.init(jax.random.key(0), jnp.zeros((1, 1)))
        >>> params["bijector"]["shift"] = jnp.array([2.0])
        >>> log_prob = mixture.log_prob(params, jnp.array([[0.0], [1.0], [2.0]]))
        >>> bool(jnp.isclose(log_prob[0], log_prob[2]))
        True

    References:
        Xu, Chen, Campbell, *MixFlows: Principled Variational Inference via Mixed Flows*, 2023,
            arXiv:2205.07475.
    """
    check_noun("mix_flow", bijector, Bijector)
    check_noun("mix_flow", base, Distribution, Flow)
    check_whole("mix_flow", length=length)

    def init(key, x, cond=None):
        map_key, base_key = jax.random.split(key)
        return {"bijector": bijector.init(map_key, x, cond), "base": base.init(base_key, x, cond)}

    def orbit(direction, params, x, cond, count):
        """(points [count, b, *event], log|det| of the powers [count, b]): x and what follows."""

        def step(carry, _):
            x, total = carry
            y, log_det = getattr(bijector, direction)(params["bijector"], x, cond)
            log_det = check_rows("mix_flow", "log_det", log_det, x.shape[0])
            return (y.astype(x.dtype), total + log_det.astype(total.dtype)), carry

        start = x, jnp.zeros_like(base_log_prob("mix_flow", base, params, x, cond, None))
        return jax.lax.scan(step, start, length=count)[1]

    def base_log_probs(params, points, cond):
        """[count, b] of points [count, b, *event]."""
        return jax.lax.map(lambda x: base_log_prob("mix_flow", base, params, x, cond, None), points)

    def log_prob(params, x, cond=None, *, key=None):
        check_params("mix_flow", params, "bijector", "base")
        points, log_dets = orbit("inverse", params, x, cond, length)
        parts = base_log_probs(params, points, cond) + log_dets
        return jax.nn.logsumexp(parts, axis=0) - math.log(length)

    def sample(params, key, n, cond=None):
        check_params("mix_flow", params, "bijector", "base")
        n, cond = check_draws("mix_flow", key, n, cond)
        base_key, turns_key = jax.random.split(key)
        z = sample_source(base, params, base_key, n, cond)
        turns = jax.random.randint(turns_key, (n,), 0, length)

        def step(x, turn):
            y, _ = bijector.forward(params["bijector"], x, cond)
            moves = (turn < turns).reshape((n,) + (1,) * (x.ndim - 1))
            return jnp.where(moves, y.astype(x.dtype), x), None

        return jax.lax.scan(step, z, jnp.arange(length - 1))[0]

    def elbo(params, key, n, log_density):
        check_params("mix_flow", params, "bijector", "base")
        n, _ = check_draws("mix_flow", key, n, None)
        z = sample_source(base, params, key, n, None)
        ahead, ahead_dets = orbit("forward", params, z, None, length)
        back, back_dets = orbit("inverse", params, z, None, length)
        # of the base's image under T^-m, at z: what q(T^k z) sums for m = k - N + 1 .. k
        ahead_terms = base_log_probs(params, ahead, None) + ahead_dets
        back_terms = (base_log_probs(params, back, None) + back_dets)[1:]
        up_to = jax.lax.cumlogsumexp(ahead_terms, axis=0)  # m = 0 .. k
        below = jax.lax.cumlogsumexp(back_terms, axis=0)[::-1]  # m = k - N + 1 .. -1
        none = jnp.full_like(up_to[:1], -jnp.inf)
        terms = jnp.logaddexp(up_to, jnp.concatenate([below, none]))
        log_q = terms - ahead_dets - math.log(length)
        log_p = jax.lax.map(
            lambda x: check_rows("mix_flow", "log_density", log_density(x), n), ahead
        )
        return jnp.mean(log_p - log_q, axis=0)

    return MixFlow(init, log_prob, sample, elbo)
