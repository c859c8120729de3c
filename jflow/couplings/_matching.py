"""Couplings that pair every row once: a permutation keeps both marginals, and drops and doubles no row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.checks import need_key
from jflow.couplings import _costs, _plans
from jflow.couplings._costs import Cost
from jflow.types import Coupling


def independent() -> Coupling:
    """Row k with row k: the source was drawn independently, or came paired in the batch (reflow, `with_source`). It is what a
    loss does without `pair`.

    The indices are numpy arrays, known while tracing, so that a loss can leave the rows where they are: a gather
    would move rows between the devices of a mesh.
    """

    def pair(key, x0, x1, cond=None):
        rows = np.arange(x1.shape[0])
        return rows, rows

    return pair


def optimal_transport(cost: Cost = _costs.squared_euclidean) -> Coupling:
    """The permutation of least total cost; data rows stay where they are, source rows come to them.

    Entropic potentials f, g, found on the device, reduce the costs to cost - f - g, which has the same optimum; scipy's
    shortest augmenting paths then finish on the host (`jax.pure_callback`) in a fraction of the time. Works under jit,
    scan and vmap. Over a mesh the whole batch is paired, its costs on one device; under shard_map or pmap each shard
    pairs its own rows. The key is not used.

    Errors: ValueError for unequal numbers of rows. Without jit also for costs that are NaN, -inf or leave a row no pair;
    inside jit, where nothing can raise, such a batch comes out paired row k with row k.
    Sources: Tong et al., "Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport",
    2024; Pooladian et al., "Multisample Flow Matching", 2023 (BatchOT).
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
    """The stable matching: no source and data row prefer each other to the partners they have.

    Both sides prefer the cheaper, so that it is the greedy one: the cheapest pair, then the cheapest of what is left ...,
    found in rounds in which all pairs that are each other's cheapest are matched. About log n rounds in many dimensions, up
    to n on a line. On the device throughout; the key is not used. Errors as `optimal_transport`.
    Sources: Pooladian et al., "Multisample Flow Matching", 2023; Gale, Shapley, "College Admissions and the Stability of
    Marriage", 1962.
    """

    def pair(key, x0, x1, cond=None):
        found = _costs.matrix("stable_matching", cost, x0, x1, cond).shifted
        if found.size == 0:
            return np.arange(0), np.arange(0)
        return _plans.greedy(-found.T), np.arange(x1.shape[0])

    return pair


def partial_optimal_transport(fraction: float, cost: Cost = _costs.squared_euclidean) -> Coupling:
    """The cheapest m = round(fraction n) pairs of n rows, each row at most once: outliers of both sides stay single.

    The batch is filled with repetitions of the m pairs in random order, each as often as the others but for one. The
    marginals are those of the rows that were worth pairing, by design. Exact, on the host. Errors as `optimal_transport`.
    Source: Chapel, Alaya, Gasso, "Partial Optimal Transport with Applications on Positive-Unlabeled Learning", 2020.
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
