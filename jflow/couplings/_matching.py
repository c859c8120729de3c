"""Couplings that pair every row once.

A permutation keeps both marginals, and drops and doubles no row.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.checks import need_key
from jflow.couplings import _costs, _plans
from jflow.couplings._costs import Cost
from jflow.types import Coupling


def independent() -> Coupling:
    """Row k with row k: the coupling of a loss that has no `pair` in front of it.

    The source was drawn independently, or came paired in the batch (reflow, `with_source`). The
    indices are numpy arrays, known while tracing, so that a loss can leave the rows where they are:
    a gather would move rows between the devices of a mesh.

    Returns:
        Coupling: (key, x0, x1, cond=None) -> (i, j), both 0 ... n - 1. The key is not used.
    """

    def pair(key, x0, x1, cond=None):
        rows = np.arange(x1.shape[0])
        return rows, rows

    return pair


def optimal_transport(cost: Cost = _costs.squared_euclidean) -> Coupling:
    """The permutation of least total cost, for each batch.

    Also known as: OT coupling, OT-CFM, minibatch OT, minibatch optimal transport, optimal transport
    pairing.

    Data rows stay where they are, source rows come to them. Entropic potentials f, g, found on the
    device, reduce the costs to cost - f - g, which has the same optimum; the shortest augmenting
    paths of scipy then finish on the host (`jax.pure_callback`) in a fraction of the time. It works
    under jit, scan and vmap. Over a mesh the whole batch is paired, its costs on one device; under
    shard_map or pmap each shard pairs its own rows.

    Args:
        cost: the cost of a pair, such as `squared_euclidean` or `within_class()`.

    Returns:
        Coupling: (key, x0, x1, cond=None) -> (i, j), j = 0 ... n - 1. The key is not used. It
            raises a ValueError for unequal numbers of rows; outside jit also for costs that are NaN
            or -inf, or that leave a row no pair. Inside jit, where nothing can raise, such a batch
            comes out paired row k with row k.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import couplings
        >>> x0, x1 = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([[2.5], [0.5], [1.5]])
        >>> i, j = couplings.optimal_transport()(jax.random.key(0), x0, x1)
        >>> x0[i].ravel().tolist(), x1[j].ravel().tolist()
        ([2.0, 0.0, 1.0], [2.5, 0.5, 1.5])

    References:
        Tong et al., *Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal
            Transport*, 2024, arXiv:2302.00482.
        Pooladian et al., *Multisample Flow Matching: Straightening Flows with Minibatch Couplings*,
            2023, arXiv:2304.14772 (BatchOT).
    """

    def pair(key, x0, x1, cond=None):
        found = _costs.matrix("optimal_transport", cost, x0, x1, cond).reduced
        if found.size == 0:
            return np.arange(0), np.arange(0)
        unit = _plans.scale(found)
        f, g = _plans.entropic_potentials(found, 1e-3 * unit, unit)
        shape = jax.ShapeDtypeStruct(found.shape[:1], jnp.int32)
        return jax.pure_callback(
            _plans.assign, shape, found, f, g, vmap_method="sequential"
        ), np.arange(x1.shape[0])

    return pair


def stable_matching(cost: Cost = _costs.squared_euclidean) -> Coupling:
    """The stable matching: no source row and data row prefer each other to the partners they have.

    Both sides prefer the cheaper partner, so that the stable matching is the greedy one: the
    cheapest pair, then the cheapest of what is left, and so on. It is found in rounds in which all
    pairs that are each other's cheapest are matched: about log n rounds in many dimensions, up to n
    on a line. It runs on the device throughout.

    Args:
        cost: the cost of a pair.

    Returns:
        Coupling: (key, x0, x1, cond=None) -> (i, j), j = 0 ... n - 1. The key is not used. Its
            errors are those of `optimal_transport`.

    References:
        Pooladian et al., *Multisample Flow Matching: Straightening Flows with Minibatch Couplings*,
            2023, arXiv:2304.14772.
        Gale, Shapley, *College Admissions and the Stability of Marriage*, 1962.
    """

    def pair(key, x0, x1, cond=None):
        found = _costs.matrix("stable_matching", cost, x0, x1, cond).shifted
        if found.size == 0:
            return np.arange(0), np.arange(0)
        return _plans.greedy(-found.T), np.arange(x1.shape[0])

    return pair


def partial_optimal_transport(fraction: float, cost: Cost = _costs.squared_euclidean) -> Coupling:
    """The cheapest pairs of a batch, a given fraction of it, so that outliers stay single.

    Of n rows the m = round(fraction n) pairs of least total cost are taken, each row at most once.
    The batch is filled with repetitions of the m pairs in random order, each as often as the others
    but for one. The marginals are those of the rows that were worth pairing, by design. It is
    exact, and computed on the host.

    Args:
        fraction: the fraction of the rows that are paired, in (0, 1].
        cost: the cost of a pair.

    Returns:
        Coupling: (key, x0, x1, cond=None) -> (i, j). It needs a key; its other errors are those of
            `optimal_transport`.

    Raises:
        ValueError: fraction is outside (0, 1].

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import couplings
        >>> x0, x1 = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([[99.0], [0.5], [1.5]])
        >>> i, j = couplings.partial_optimal_transport(2 / 3)(jax.random.key(0), x0, x1)
        >>> sorted(set(j.tolist()))  # the outlier is left out
        [1, 2]

    References:
        Chapel, Alaya, Gasso, *Partial Optimal Transport with Applications on Positive-Unlabeled
            Learning*, 2020, arXiv:2002.08276.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"partial_optimal_transport: expected fraction in (0, 1], got {fraction}")

    @functools.partial(jax.jit, static_argnums=1)
    def chosen(cost, m):
        shape = jax.ShapeDtypeStruct((2, m), jnp.int32)
        return jax.pure_callback(
            lambda c: _plans.assign_some(c, m), shape, cost, vmap_method="sequential"
        )

    def pair(key, x0, x1, cond=None):
        need_key("partial_optimal_transport", key)
        found = _costs.matrix("partial_optimal_transport", cost, x0, x1, cond).shifted
        if found.size == 0:
            return np.arange(0), np.arange(0)
        n = found.shape[0]
        m = max(1, round(fraction * n))
        i, j = chosen(found, m)
        order = jax.random.permutation(key, n) % m
        return i[order], j[order]

    return pair
