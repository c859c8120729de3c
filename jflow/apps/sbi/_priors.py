"""Priors: what a parameter vector is drawn from, with its support."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jflow._core.checks import described
from jflow.types import Distribution, Flow, Key, Params


class Prior(NamedTuple):
    """A prior on vectors of parameters, with its support, a box.

    Attributes:
        sample: (key, n) -> numpy [n, d], float32.
        log_prob: (numpy theta [n, d]) -> numpy [n], nats; -inf outside of the support.
        low: The lower ends of the support [d], -inf where there is none.
        high: The upper ends of the support [d], inf where there is none.
    """

    sample: Callable[[Key, int], np.ndarray]
    log_prob: Callable[[np.ndarray], np.ndarray]
    low: np.ndarray
    high: np.ndarray


def box_uniform(low: ArrayLike, high: ArrayLike) -> Prior:
    """The uniform prior on a box.

    Args:
        low: The lower ends [d].
        high: The upper ends [d].

    Returns:
        The prior.

    Raises:
        ValueError: For ends of unequal or no length, and where low is not below high.

    Examples:
        >>> import jax
        >>> from jflow.apps import sbi
        >>> prior = sbi.box_uniform([0.0, -1.0], [10.0, 1.0])
        >>> prior.sample(jax.random.key(0), 3).shape
        (3, 2)
    """
    first, last = np.asarray(low, np.float32), np.asarray(high, np.float32)
    if first.ndim != 1 or first.shape != last.shape or not first.size or not (first < last).all():
        raise ValueError(
            f"box_uniform: expected low [d] and high [d] with low < high, such as [0, 0] and [1, 5]"
            f" for two parameters, got {first.tolist()} and {last.tolist()}"
        )
    if not (np.isfinite(first).all() and np.isfinite(last).all()):
        raise ValueError("box_uniform: expected finite ends; a prior on the reals is a normal")
    density = -float(np.log(last - first).sum())

    def sample(key, n):
        return np.asarray(jax.random.uniform(key, (n, len(first)), minval=first, maxval=last))

    def log_prob(theta):
        inside = ((theta >= first) & (theta <= last)).all(-1)
        return np.where(inside, density, -np.inf)

    return Prior(sample, log_prob, first, last)


def as_prior(
    distribution: Any,
    *,
    params: Params | None = None,
    support: tuple[ArrayLike, ArrayLike] | None = None,
) -> Prior:
    """A prior from a distribution of this library or of another, or from two functions.

    `fit` does this by itself; call it for params or a support. Where the support is not said, it is
    found: along each parameter, through draws of the prior, log_prob is searched for where it
    becomes -inf, up to 10^6 standard deviations away.

    Args:
        distribution: A `Prior`; a `Distribution` or `Flow` of jflow on [d]; a distribution of
            NumPyro (of event shape [d], or of independent numbers in its batch shape [d]); a frozen
            distribution of scipy.stats; a pair of functions (sample(key, n) -> [n, d],
            log_prob(theta [n, d]) -> [n]); or a list of such, one a parameter or group, which are
            independent.
        params: Of a jflow distribution that has any.
        support: The ends (low [d], high [d]) of the box that holds theta, -inf and inf where there
            is none.

    Returns:
        The prior.

    Raises:
        TypeError: For what is none of these.
        ValueError: For draws that are not vectors, a log_prob of another shape, and a support that
            is not a box.

    Examples:
        >>> import scipy.stats
        >>> from jflow.apps import sbi
        >>> prior = sbi.as_prior([scipy.stats.uniform(2.0, 3.0), scipy.stats.norm()])
        >>> prior.low.tolist(), prior.high.tolist()
        ([2.0, -inf], [5.0, inf])
    """
    if isinstance(distribution, Prior):
        return distribution
    if isinstance(distribution, list):
        return _independent([as_prior(part) for part in distribution])
    sample, log_prob = _prior_functions(distribution, params)

    def draw(key, n):
        theta = np.asarray(sample(key, n), np.float32)
        return theta[:, None] if theta.ndim == 1 else theta

    draws = draw(jax.random.key(0), 256)
    if draws.ndim != 2 or len(draws) != 256:
        raise ValueError(
            f"the prior: expected draws of vectors, [256, d] for 256 of them, got"
            f" {list(draws.shape)}; flatten theta, and unflatten it in the simulator"
        )
    flat = np.ndim(sample(jax.random.key(0), 2)) == 1

    def density(theta):
        value = np.asarray(log_prob(theta[:, 0] if flat else theta), np.float64)
        value = value.sum(-1) if value.shape == theta.shape and not flat else value
        if value.shape != theta.shape[:1]:
            raise ValueError(
                f"the prior: expected log_prob [n] for theta [n, d], got {list(value.shape)} for"
                f" {list(theta.shape)}"
            )
        return np.where(np.isnan(value), -np.inf, value)

    if not (np.isfinite(draws).all() and np.isfinite(density(draws)).all()):
        raise ValueError(
            "the prior: some of its own draws are not finite or have no finite log_prob"
        )
    if support is None:
        low, high = _support_of(density, draws)
    else:
        low, high = (np.array(np.broadcast_to(e, draws.shape[1:]), np.float32) for e in support)
        if not ((low < high).all() and (draws >= low).all() and (draws <= high).all()):
            raise ValueError(
                f"the prior: its draws lie outside of the support from {low.tolist()} to"
                f" {high.tolist()}"
            )

    def within(theta):
        inside = ((theta >= low) & (theta <= high)).all(-1)
        return np.where(inside, density(theta), -np.inf)

    return Prior(draw, within, low, high)


def _prior_functions(distribution, params):
    """(sample(key, n), log_prob(theta)) of what people have."""
    if isinstance(distribution, Distribution | Flow):
        params = {} if params is None else params
        log_prob = jax.jit(distribution.log_prob)
        return (
            lambda key, n: distribution.sample(params, key, n),
            lambda theta: log_prob(params, jnp.asarray(theta, jnp.float32)),
        )
    if (
        isinstance(distribution, tuple)
        and len(distribution) == 2
        and all(map(callable, distribution))
    ):
        return distribution
    if hasattr(distribution, "rvs") and hasattr(distribution, "logpdf"):
        shape = () if hasattr(distribution, "dim") else np.shape(distribution.mean())

        def rvs(key, n):
            rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
            return distribution.rvs(size=(n, *shape), random_state=rng)

        return rvs, distribution.logpdf
    if hasattr(distribution, "support") and hasattr(distribution, "event_shape"):

        def density(theta):
            theta = jnp.asarray(theta, jnp.float32)
            inside = jnp.reshape(distribution.support(theta), (len(theta), -1)).all(1)
            rows = jnp.reshape(inside, (-1,) + (1,) * (theta.ndim - 1))
            known = distribution.sample(jax.random.key(0), (1,))
            value = distribution.log_prob(jnp.where(rows, theta, known))
            return jnp.where(inside, jnp.reshape(value, (len(theta), -1)).sum(1), -jnp.inf)

        return (lambda key, n: distribution.sample(key, (n,))), density
    raise TypeError(
        "the prior: expected a distribution of jflow, NumPyro or scipy.stats, a pair (sample(key,"
        f" n), log_prob(theta)), or a list of them, got {described(distribution)};"
        " box_uniform(low, high) is uniform between two ends"
    )


def _independent(parts: list[Prior]) -> Prior:
    ends = np.cumsum([len(part.low) for part in parts])[:-1]

    def sample(key, n):
        keys = jax.random.split(key, len(parts))
        return np.concatenate([p.sample(k, n) for p, k in zip(parts, keys, strict=True)], axis=1)

    def log_prob(theta):
        columns = np.split(theta, ends, axis=1)
        return sum(part.log_prob(column) for part, column in zip(parts, columns, strict=True))

    low, high = (np.concatenate([getattr(p, end) for p in parts]) for end in ("low", "high"))
    return Prior(sample, log_prob, low, high)


def _support_of(log_prob, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the box where log_prob is above -inf, by bisection from four of the draws."""
    n, d = 4, draws.shape[1]
    spread = np.maximum(draws.std(0), 1e-6 * (1 + np.abs(draws).max(0))).astype(np.float64)
    start = np.broadcast_to(draws[:n, None, None].astype(np.float64), (n, d, 2, d))
    own = np.arange(d)
    inside = np.repeat(draws[:n, :, None].astype(np.float64), 2, axis=2)  # [n, d, side]
    outside = inside + 1e6 * spread[:, None] * np.array([-1.0, 1.0])

    def finite(values):
        theta = start.copy()
        theta[:, own, :, own] = np.moveaxis(values, 1, 0)
        return np.isfinite(log_prob(theta.reshape(-1, d))).reshape(values.shape)

    endless = finite(outside)
    for _ in range(100):
        middle = (inside + outside) / 2
        fine = finite(middle)
        inside, outside = np.where(fine, middle, inside), np.where(fine, outside, middle)
    rounded = inside.astype(np.float32)
    inward = np.nextafter(rounded, draws[:n, :, None])
    ends = np.where(finite(rounded.astype(np.float64)), rounded, inward)
    ends = np.where(endless, np.array([-np.inf, np.inf], np.float32), ends)
    same = np.isclose(ends, ends[:1], rtol=1e-4, atol=1e-4 * spread[:, None]).all()
    if not same:
        raise ValueError(
            "the prior: its support is not a box, since the ends of a parameter differ from draw to"
            " draw; give as_prior(..., support=(low, high)) a box that holds it, or let the"
            " simulator map from a box"
        )
    return ends[..., 0].max(0), ends[..., 1].min(0)
