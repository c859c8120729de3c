"""The likelihood of tokens under a discrete flow: a lower bound, with its Monte Carlo error."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jflow._core.arrays import sum_event
from jflow._core.checks import check_cond, check_noun, check_whole, need_key
from jflow._core.tokens import kappa, kl_terms, need_tokens, token_log_probs
from jflow.paths import LINEAR, Schedule, discrete
from jflow.types import Array, Cond, Distribution, Field, Key, Params

__all__ = ["DiscreteBound", "discrete_bound"]


class DiscreteBound(NamedTuple):
    """A Monte Carlo estimate of a lower bound of log p(x).

    Attributes:
        elbo: the estimate for each row, [b], in nats, whose expectation is at most log p(x).
        error: its standard error, [b], in nats, from pairs of times that are independent.
    """

    elbo: Float[Array, " b"]
    error: Float[Array, " b"]


def discrete_bound(
    field: Field,
    params: Params,
    source: Distribution,
    x: Int[Array, "b *event"],
    key: Key,
    cond: Cond = None,
    *,
    times: int = 64,
    schedule: Schedule = LINEAR,
    quantile: Callable[[Array], Array] | None = None,
) -> DiscreteBound:
    """A lower bound of the log-probability of tokens under a discrete flow.

    Also known as: ELBO of discrete flow matching, ELBO of masked diffusion, perplexity bound.

        log p(x) >= - integral over t from 0 to 1 of E sum over tokens of the terms of
        `losses.discrete_kl`

    The times are t = quantile(u) with weight quantile'(u), for u uniform in antithetic pairs u, 1 -
    u. At uniform times the terms of many tokens vary without limit near t=1; with the default they
    do not. No time is left out.

    Args:
        field: a network of logits [b, *event, V], `paths.unmasking(net, mask)` for a path from
            masks.
        params: those of the field.
        source: the law of x0, without params, from which training started.
        x: the tokens, [b, *event].
        key: a key, for times, sources and points.
        cond: the condition, [b, ...] or one row for all.
        times: how many times for each row, an even number of at least 4.
        schedule: its alpha is kappa.
        quantile: u [b] -> t [b] in [0, 1], rising; None is t = 1 - (1 - u)^2.

    Returns:
        DiscreteBound: (elbo [b], error [b]) in nats. Divided by -n log 2 they are bits per token.
            The elbo is -inf for a mask among the tokens, under `paths.unmasking`, and NaN for a
            token outside the vocabulary.

    Raises:
        ValueError: times is odd or below 4, x is not integers, logits have another shape, or the
            key is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, oracles, solvers
        >>> masks = [0.0, 0.0, 1.0]
        >>> pairs = oracles.tokens([[0, 0], [1, 1]], [0.5, 0.5], source=masks)
        >>> source, x = distributions.tokens((2,), masks), jnp.array([[0, 0]])
        >>> key = jax.random.key(0)
        >>> found = solvers.discrete_bound(pairs.field, {}, source, x, key, times=1000)
        >>> bool(abs(found.elbo[0] + jnp.log(2)) < 3 * found.error[0])  # exact for an exact law
        True

    References:
        Shaul, Gat, Havasi, Severo, Sriram, Holderrieth, Karrer, Lipman, Chen, *Flow Matching with
            General Discrete Paths: A Kinetic-Optimal Perspective*, 2024, arXiv:2412.03487 (the
            law of the times is ours).
    """
    name = "solvers.discrete_bound"
    check_noun(name, field, Field)
    check_noun(name, source, Distribution)
    check_whole(name, 4, times=times)
    if times % 2:
        raise ValueError(f"{name}: expected an even number of times, got {times}")
    x = need_tokens(name, "x", x)
    cond = check_cond(name, cond, x.shape[0])
    path = discrete(schedule)
    quantile = (lambda u: u * (2 - u)) if quantile is None else quantile

    def at(u, key):
        source_key, path_key = jax.random.split(key)
        t, weight = jax.jvp(quantile, (u,), (jnp.ones_like(u),))
        x0 = source.sample({}, source_key, x.shape[0], cond).astype(x.dtype)
        x_t = path.point(x0, x, t, key=path_key)
        log_p = token_log_probs(name, field.apply(params, x_t, t, cond), x_t)
        terms = kl_terms(log_p, x_t, x, *kappa(schedule, t, x))
        return weight * sum_event(terms)

    def pair(sums, key):
        time_key, one_key, other_key = jax.random.split(key, 3)
        u = jax.random.uniform(time_key, x.shape[:1], float)
        value = -(at(u, one_key) + at(1 - u, other_key)) / 2
        return (sums[0] + value, sums[1] + value**2), None

    zeros = jnp.zeros_like(x, shape=x.shape[:1], dtype=float)
    n = times // 2
    (first, second), _ = jax.lax.scan(
        pair, (zeros, zeros), jax.random.split(need_key(name, key), n)
    )
    mean = first / n
    return DiscreteBound(mean, jnp.sqrt(jnp.maximum(second / n - mean**2, 0) / (n - 1)))
