"""Training times from a chosen or learned density, with weights that leave integrals unbiased.

An integral int f(t) dt from t0 to t1 is the mean of f(t) weight(t) over times t of density 1 /
weight. Its variance is least where the density follows the root mean square of f at each time.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jflow.paths import LINEAR, Schedule, coefficients

__all__ = [
    "Importance",
    "draw_times",
    "learn_importance",
    "likelihood_importance",
    "likelihood_weight",
]


class Importance(NamedTuple):
    """A density of times, constant within each of n cells and proportional to `size`.

    It is a pytree of arrays, so that it can be learned: it then lives in frozen['importance'].

    Attributes:
        edges: The edges [n + 1] of the cells, rising times in [0, 1].
        size: The density [n] in each cell, up to a common factor.
    """

    edges: Float[Array, " n+1"]
    size: Float[Array, " n"]


def likelihood_weight(schedule: Schedule, t: Float[Array, " b"]) -> Float[Array, " b"]:
    """The weight of maximum likelihood, alpha / (sigma (alpha' sigma - sigma' alpha)).

    On the linear path it is w(t) = t / (1 - t).

    It is the factor of |v - u|^2 dt that makes it half |x0 - x0_v|^2 d log-SNR, the integrand of
    the likelihood of a diffusion, where x0_v is what the velocity v says of the noise: x0 - x0_v =
    alpha (v - u) / (alpha' sigma - sigma' alpha) and d log-SNR = 2 (alpha' / alpha - sigma' /
    sigma) dt. No weighting of noise levels is left to choose.

    Args:
        schedule: The path, a `paths.Schedule`.
        t: The times; the weight diverges where sigma = 0.

    Returns:
        The weight at each of the times.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import losses, paths
        >>> losses.likelihood_weight(paths.LINEAR, jnp.array([0.0, 0.5, 0.75])).tolist()
        [0.0, 1.0, 3.0]

    References:
        Kingma, Salimans, Poole, Ho, *Variational Diffusion Models*, 2021, arXiv:2107.00630.
        Zheng, Lu, Chen, Zhu, *Improved Techniques for Maximum Likelihood Estimation for Diffusion
            ODEs*, 2023, arXiv:2305.03935.
    """
    a, s, da, ds = coefficients(schedule, t)
    return a / (s * (da * s - ds * a))


def likelihood_importance(
    schedule: Schedule = LINEAR, t0: float = 0.0, t1: float = 0.999, *, cells: int = 128
) -> Importance:
    """A density of times proportional to `likelihood_weight`, in cells of equal probability.

    The residual |v - u|^2 hardly changes with time, so that this density, known before any
    training, takes most of the variance out. Linear: the share of the times before t is (-log(1 -
    t) - t) over its value at t1, half of them after t = 0.98 for t1 = 0.999.

    Args:
        schedule: The path, a `paths.Schedule`.
        t0: The first time.
        t1: The last time; 1 does not do where sigma(1) = 0.
        cells: The number of cells.

    Returns:
        The density, an `Importance`.

    Raises:
        ValueError: Unless 0 <= t0 < t1 <= 1, cells >= 1 and the weight is finite and positive
            between.

    Examples:
        >>> from jflow import losses
        >>> losses.likelihood_importance(cells=16).edges.shape
        (17,)

    References:
        Zheng, Lu, Chen, Zhu, *Improved Techniques for Maximum Likelihood Estimation for Diffusion
            ODEs*, 2023, arXiv:2305.03935.
    """
    if not 0 <= t0 < t1 <= 1 or cells < 1:
        raise ValueError(
            "likelihood_importance: expected 0 <= t0 < t1 <= 1 and cells >= 1, "
            f"got {t0}, {t1}, {cells}"
        )
    # fine where the weight is steep, towards both ends; with the ends themselves
    low, high = (np.log(t / (1 - t)) for t in (max(t0, 1e-4), min(t1, 1 - 1e-4)))
    logits = np.linspace(low, high, 64 * cells)
    fine = np.unique(np.concatenate([[t0, t1], 1 / (1 + np.exp(-logits))]).clip(t0, t1))
    weight = np.asarray(likelihood_weight(schedule, jnp.asarray(fine, float)), np.float64)
    if not (np.all(np.isfinite(weight)) and np.all(weight >= 0) and np.all(weight[1:-1] > 0)):
        raise ValueError(
            "likelihood_importance: the weight of this schedule is not finite and positive "
            f"from t0={t0} to t1={t1}; "
            "it diverges where sigma = 0: end before"
        )
    share = np.concatenate([[0.0], np.cumsum(np.diff(fine) * (weight[1:] + weight[:-1]) / 2)])
    edges = np.interp(np.linspace(0, share[-1], cells + 1), share, fine)
    edges[[0, -1]] = t0, t1
    return Importance(jnp.asarray(edges, float), jnp.asarray(1 / np.diff(edges) / cells, float))


def draw_times(
    importance: Importance, u: ArrayLike
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Times of a density at given quantiles, and the weights that make a mean an integral.

    Uniform quantiles, stratified or not, give times of the density 1 / weight, exactly, however
    coarse the cells.

    Args:
        importance: The density.
        u: Quantiles [n] in [0, 1].

    Returns:
        The pair (t [n], weight [n]).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> density = losses.Importance(jnp.array([0.0, 0.5, 1.0]), jnp.array([1.0, 3.0]))
        >>> t, weight = losses.draw_times(density, jnp.array([0.125, 0.625]))
        >>> t.tolist(), [round(w, 4) for w in weight.tolist()]
        ([0.25, 0.75], [2.0, 0.6667])
    """
    edges, share = importance.edges, _shares(importance)
    width = jnp.diff(edges)
    below = jnp.concatenate([jnp.zeros_like(share[:1]), jnp.cumsum(share)])
    cell = jnp.clip(jnp.searchsorted(below, u, side="right") - 1, 0, width.shape[0] - 1)
    t = edges[cell] + width[cell] * (u - below[cell]) / share[cell]
    return jnp.clip(t, edges[cell], edges[cell + 1]), width[cell] / share[cell]


def learn_importance(
    importance: Importance,
    t: Float[Array, " b"],
    values: Float[Array, " b"],
    weight: Array | None = None,
    *,
    decay: float = 0.99,
    floor: float = 0.1,
) -> Importance:
    """A density of times after values of an integrand: towards the density of least variance.

    The square of each cell's size moves towards the mean square of the values in it, on the scale
    of the cells as they were; cells without a time stay. Derived here: q ~ sqrt(E f^2) minimizes E
    (f / q)^2.

    Args:
        importance: The density before.
        t: Times [n].
        values: The integrand f(t) [n] at these times.
        weight: What each row counts, [n]; one that is 0 counts nothing, whatever its value. None
            counts all the same.
        decay: How much of the squared size a cell with a time keeps.
        floor: Sizes are at least `floor` times their mean over time, so that no time is forgotten.

    Returns:
        The density after, with the same edges.
    """
    edges, size = importance
    width = jnp.diff(edges)
    cell = jnp.clip(
        jnp.searchsorted(edges, t.astype(edges.dtype), side="right") - 1, 0, size.shape[0] - 1
    )
    count = jnp.ones_like(t, size.dtype) if weight is None else weight.astype(size.dtype)
    hits = jnp.zeros_like(size).at[cell].add(count)
    seen = jnp.where(count != 0, jnp.square(values).astype(size.dtype), 0)
    squares = jnp.zeros_like(size).at[cell].add(count * seen)
    scale = jnp.sum(hits * size**2) / jnp.maximum(jnp.sum(squares), jnp.finfo(size.dtype).tiny)
    seen = scale * squares / jnp.where(hits > 0, hits, 1)
    size = jnp.sqrt(jnp.where(hits > 0, decay * size**2 + (1 - decay) * seen, size**2))
    mean = jnp.sum(size * width) / jnp.sum(width)
    return Importance(edges, jnp.maximum(size, floor * mean))


def _shares(importance: Importance) -> Array:
    """The probability [n] of each cell."""
    mass = importance.size * jnp.diff(importance.edges)
    return mass / jnp.sum(mass)
