"""The evidence of a model from draws of its posterior, with error bars."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jflow import bijectors, distributions, flows
from jflow._core.checks import check_event, check_key, check_noun, check_rows
from jflow.energy._target import Target
from jflow.energy._weights import estimate_log_z
from jflow.types import Distribution, Flow, Key, Params

__all__ = ["Evidence", "bridge_log_z", "evidence", "fit_normal", "harmonic_log_z"]

Estimate = tuple[Float[Array, ""], Float[Array, ""]]


def harmonic_log_z(log_ratios: Float[Array, "*chains n"]) -> Estimate:
    """log Z from draws of the posterior alone, by the learned harmonic mean.

    Also known as: learned harmonic mean estimator, LHME, reciprocal importance sampling.

        1 / Z = E_posterior [q(x) / p~(x)]     for every density q within the posterior

    The variance is finite where q has lighter tails than the posterior; elsewhere the estimate is
    too high and its error too small. A flow that was fitted to
    other draws of it gets there at a temperature below 1: its params over
    `distributions.scaled(base, temperature**0.5)`. The error is that of first order.

    Args:
        log_ratios: log q(x) - log p~(x) at draws of the posterior, nats, [n] of independent draws,
            or [chains, n]: the error is then that of the means of the chains.

    Returns:
        The pair (log Z, standard error), nats.

    Raises:
        ValueError: log_ratios is neither [n] nor [chains, n] with at least 2 chains.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import energy
        >>> log_z, error = energy.harmonic_log_z(jnp.full(8, -3.0))
        >>> float(log_z), float(error)
        (3.0, 0.0)

    References:
        Newton, Raftery, *Approximate Bayesian Inference with the Weighted Likelihood Bootstrap*,
            1994.
        McEwen, Wallis, Price, Spurio Mancini, *Machine learning assisted Bayesian model comparison:
            learnt harmonic mean estimator*, 2021, arXiv:2111.12720.
        Polanska, Price, Piras, Spurio Mancini, McEwen, *Learned harmonic mean estimation of the
            Bayesian evidence with normalizing flows*, 2024, arXiv:2405.05969.
    """
    log_mean, error = _log_mean("harmonic_log_z", log_ratios)
    return -log_mean, error


def bridge_log_z(
    log_weights: Float[Array, "*chains n"], log_weights_q: Float[Array, " m"]
) -> Estimate:
    """log Z from draws of the posterior and of a flow, by bridge sampling.

    Also known as: bridge sampling, Bennett acceptance ratio, BAR, Warp.

    With the weights w = p~(x) / q(x), n draws of the posterior and m of q, Z solves

        sum over q of n w / (n w + m Z) = sum over the posterior of m Z / (n w + m Z),

    which is the estimate of least error that both sets of draws allow where they are independent.
    The one root is found by bisection (ours; the papers iterate to it). The error is that of Z at
    first order.

    Args:
        log_weights: log p~(x) - log q(x) at draws of the posterior, nats, [n] of independent draws,
            or [chains, n]: their part of the error is then that of the means of the chains.
        log_weights_q: The same at independent draws from q, [m].

    Returns:
        The pair (log Z, standard error), nats.

    Raises:
        ValueError: log_weights is neither [n] nor [chains, n] with at least 2 chains, or
            log_weights_q not [m].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import energy
        >>> log_z, error = energy.bridge_log_z(jnp.full(8, 3.0), jnp.full(4, 3.0))
        >>> round(float(log_z), 4), round(float(error), 4)
        (3.0, 0.0)

    References:
        Bennett, *Efficient estimation of free energy differences from Monte Carlo data*, 1976.
        Meng, Wong, *Simulating ratios of normalizing constants via a simple identity*, 1996.
        Fruehwirth-Schnatter, *Estimating marginal likelihoods for mixture and Markov switching
            models using bridge sampling techniques*, 2004 (the error).
    """
    if log_weights_q.ndim != 1:
        raise ValueError(
            f"bridge_log_z: expected log_weights_q of shape [m], got {list(log_weights_q.shape)}"
        )
    _check_chains("bridge_log_z", "log_weights", log_weights)
    n, m = log_weights.size, log_weights_q.size
    prior = math.log(n / m)
    both = jnp.concatenate([log_weights.ravel(), log_weights_q])
    finite = jnp.isfinite(both)
    low = jnp.min(jnp.where(finite, both, jnp.inf)) - 1
    high = jnp.max(jnp.where(finite, both, -jnp.inf)) + 1

    def excess(log_z):
        """Falls in log_z, and is 0 at the estimate."""
        return jnp.sum(jax.nn.sigmoid(log_weights_q - log_z + prior)) - jnp.sum(
            jax.nn.sigmoid(log_z - log_weights - prior)
        )

    def halve(ends, _):
        middle = (ends[0] + ends[1]) / 2
        above = excess(middle) > 0
        return (jnp.where(above, middle, ends[0]), jnp.where(above, ends[1], middle)), None

    (low, high), _ = jax.lax.scan(halve, (low, high), length=100)
    log_z = (low + high) / 2
    _, of_q = _log_mean("bridge_log_z", jax.nn.log_sigmoid(log_weights_q - log_z + prior))
    _, of_p = _log_mean("bridge_log_z", jax.nn.log_sigmoid(log_z - log_weights - prior))
    return log_z, jnp.hypot(of_q, of_p)


def fit_normal(draws: Float[Array, "n d"], *, temperature: float = 1.0) -> tuple[Flow, Params]:
    """A normal distribution of the mean and the covariance of draws, as a flow with its params.

    Args:
        draws: The draws, [n, d], in coordinates without bounds.
        temperature: The factor of the covariance; below 1 it is within what was drawn from.

    Returns:
        The flow, of a linear map over a standard normal, and its params.

    Raises:
        ValueError: temperature is not positive, or draws is not [n, d].

    Examples:
        >>> import jax
        >>> from jflow import energy
        >>> flow, params = energy.fit_normal(jax.random.normal(jax.random.key(0), (100, 3)))
        >>> flow.sample(params, jax.random.key(1), 2).shape
        (2, 3)
    """
    if isinstance(temperature, bool) or not temperature > 0:
        raise ValueError(f"fit_normal: expected temperature > 0, got {temperature!r}")
    if draws.ndim != 2:
        raise ValueError(f"fit_normal: expected draws of shape [n, d], got {list(draws.shape)}")
    d = draws.shape[1]
    fitted = distributions.multivariate_normal(d).init(jax.random.key(0), draws)
    factor = jnp.tril(fitted["lower"], -1) + jnp.diag(jnp.exp(fitted["log_diagonal"]))
    base = distributions.scaled(distributions.normal((d,)), temperature**0.5)
    params = {"bijector": {"matrix": factor, "shift": fitted["mean"]}, "base": {}}
    return flows.flow(bijectors.linear(d), base), params


class Evidence(NamedTuple):
    """Three estimates of log Z, each a pair (log Z, standard error) in nats.

    Attributes:
        importance: from draws of the flow alone; biased down where the flow misses a mode.
        bridge: from draws of the flow and of the posterior; of least error.
        harmonic: from draws of the posterior alone.
    """

    importance: Estimate
    bridge: Estimate
    harmonic: Estimate


def evidence(
    target: Target,
    draws: Float[Array, "*chains n d"],
    key: Key,
    flow: Flow | Distribution | None = None,
    params: Params | None = None,
    *,
    concentrated: Flow | Distribution | None = None,
    temperature: float = 0.8,
) -> Evidence:
    """The evidence of a posterior of which there are draws, by three estimators.

    Also known as: marginal likelihood, model evidence, Bayes factor.

    Outside jit log_density may be any function, such as one of numpy; under jit it is one program.
    Estimators that agree within their errors are a check of the draws and of the flow.

    Args:
        target: The posterior, such as `energy.posterior(log_prior, log_likelihood, (d,))`, in the
            coordinates of the draws.
        draws: Its draws, [n, d], or [chains, n, d] of Markov chains, whose means give the error.
        key: A key, for as many draws of the flow.
        flow: A flow or a distribution that was fitted to other draws. Without one it is a normal:
            `fit_normal` of the first half of the draws (of the chains), and the second half is
            what the estimates are made of.
        params: The params of the flow.
        concentrated: What the harmonic mean takes, of the same params: the flow over
            `distributions.scaled(base, temperature**0.5)`. None is the flow itself, which is
            wanted only where it is within the posterior.
        temperature: That of the normal, where there is no flow.

    Returns:
        The estimates.

    Raises:
        TypeError: target is not a `Target`, or the key is none.
        ValueError: draws are too few or of another shape, or there are no params for the flow.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import energy
        >>> target = energy.Target(lambda x: -0.5 * jnp.sum(x**2, -1), (2,))
        >>> draws = jax.random.normal(jax.random.key(0), (4000, 2))
        >>> found = energy.evidence(target, draws, jax.random.key(1))
        >>> all(abs(float(log_z) - 1.8379) < 0.1 for log_z, error in found)
        True

    References:
        Polanska, Price, Piras, Spurio Mancini, McEwen, *Learned harmonic mean estimation of the
            Bayesian evidence with normalizing flows*, 2024, arXiv:2405.05969.
        Gronau, Sarafoglou, Matzke, Ly, Boehm, Marsman, Leslie, Forster, Wagenmakers, Steingroever,
            *A tutorial on bridge sampling*, 2017, arXiv:1703.05984.
    """
    check_noun("evidence", target, Target)
    check_key("evidence", key)
    lead, d = draws.shape[:-1], draws.shape[-1]
    if draws.ndim not in (2, 3) or draws.shape[0] < (2 if flow is not None else 4):
        raise ValueError(
            "evidence: expected draws [n, d] or [chains, n, d] with 2 of them at least, 4 where a"
            f" normal is fitted, got shape {list(draws.shape)}"
        )
    check_event("evidence", draws.reshape(-1, d), target.event_shape)
    if flow is None:
        half = draws.shape[0] // 2
        fitted, draws = draws[:half].reshape(-1, d), draws[half:]
        lead = draws.shape[:-1]
        flow, params = fit_normal(fitted)
        concentrated, _ = fit_normal(fitted, temperature=temperature)
    elif params is None:
        raise ValueError("evidence: expected params for the flow, got None")
    cool = flow if concentrated is None else concentrated
    x = draws.reshape(-1, d)
    y = flow.sample(params, key, len(x))

    def values(which, x):
        return check_rows("evidence", "log_density", jnp.asarray(which(x)), len(x))

    at_x, at_y = values(target.log_density, x), values(target.log_density, y)
    of_y = at_y - flow.log_prob(params, y)
    of_x = at_x - flow.log_prob(params, x)
    ratios = cool.log_prob(params, x) - at_x
    return Evidence(
        estimate_log_z(of_y),
        bridge_log_z(of_x.reshape(lead), of_y),
        harmonic_log_z(ratios.reshape(lead)),
    )


def _log_mean(name, log_values) -> Estimate:
    """The log of the mean of exp, and the standard error of that mean over it."""
    _check_chains(name, "log_ratios", log_values)
    log_mean = jax.nn.logsumexp(log_values) - math.log(log_values.size)
    values = jnp.exp(log_values - log_mean)
    groups = values if values.ndim == 1 else jnp.mean(values, axis=1)
    return log_mean, jnp.std(groups, ddof=1) / math.sqrt(len(groups))


def _check_chains(name, what, values):
    if values.ndim not in (1, 2) or values.shape[0] < 2 or values.size == 0:
        raise ValueError(
            f"{name}: expected {what} of shape [n] or [chains, n] with 2 chains at least, got"
            f" {list(np.shape(values))}"
        )
