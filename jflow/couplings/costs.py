"""What a pair costs: a `Cost` is (x0 [n, *event], x1 [n, *event], cond) -> [n, n]; row i, column j is x0[i] with x1[j].

An infinite cost forbids a pair. cond[k] is the condition of x1[k]; x0[k] counts as drawn for it too, which the data do not
influence: so a pair with equal conditions leaves the source of each condition as it was. A cost that knows nothing of
cond does not: optimal transport then gives every condition the part of the source that lies nearest to it, and sampling
with the whole source under one condition starts where no training row was (Cheng, Schwing, "The Curse of Conditions:
Analyzing and Improving Optimal Transport for Conditional Flow-Based Generation", 2025).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jflow._util import check_cond, flat_rows, float_dtype
from jflow.types import Array, Cond, Coupling

Cost = Callable[[Array, Array, Cond], Array]


def squared_euclidean(x0: Array, x1: Array, cond: Cond = None) -> Array:
    """|x0[i] - x1[j]|^2 over the flattened event, in float32 at least. Its optimal transport is the one of W2."""
    dtype = float_dtype(x0, x1)
    a, b = (flat_rows(jnp.asarray(x, dtype)) for x in (x0, x1))
    centre = jnp.mean(b, axis=0, keepdims=True)  # products lose the fewest digits near the origin
    a, b = a - centre, b - centre
    cross = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(a**2, 1)[:, None] + jnp.sum(b**2, 1)[None] - 2 * cross, 0)


def cosine(x0: Array, x1: Array, cond: Cond = None) -> Array:
    """1 - cos of the angle between the flattened rows, in [0, 2]: for embeddings of text or images."""
    dtype = float_dtype(x0, x1)
    a, b = (flat_rows(jnp.asarray(x, dtype)) for x in (x0, x1))
    a, b = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return 1 - jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


def within_class(cost: Cost = squared_euclidean, *, label: Callable[[Cond], Array] = lambda cond: cond) -> Cost:
    """Pairs of one class alone: `cost` where label(cond)[i] == label(cond)[j], infinity elsewhere.

    label picks the discrete part of cond, [n] or [n, ...] (equal in all numbers). The source of a class is then exactly
    the rows that came with it, whichever coupling takes this cost. Source: Cheng, Schwing, 2025, discrete conditions.
    """

    def classed(x0, x1, cond=None):
        c = _rows("within_class", label(cond), x1)
        if c.shape[1] == 0:
            raise ValueError("within_class: expected labels, got none in cond")
        same = jnp.all(c[:, None] == c[None], axis=-1)
        return jnp.where(same, cost(x0, x1, cond), jnp.inf)

    return classed


def near_condition(
    cost: Cost = squared_euclidean,
    *,
    distance: Cost = squared_euclidean,
    weight: float | None = None,
    ratio: float = 0.05,
    condition: Callable[[Cond], Array] = lambda cond: cond,
) -> Cost:
    """cost + w distance(cond, cond), for continuous conditions; condition picks them from cond, [n, ...].

    weight: w, or None: the w at which a share `ratio` of the n^2 pairs still costs no more than the row's own pair (i,
        i), whose conditions agree: cost[i, j] + w distance[i, j] <= cost[i, i]; 0 where fewer do at w = 0.
    ratio 1 / n leaves the independent pairs, 1 forgets the conditions. `costs.cosine` suits embeddings.
    Source: Cheng, Schwing, 2025, continuous conditions.
    """
    if weight is not None and not weight >= 0:
        raise ValueError(f"near_condition: expected weight >= 0 or None, got {weight}")
    if not 0 < ratio <= 1:
        raise ValueError(f"near_condition: expected ratio in (0, 1], got {ratio}")

    def weighted(x0, x1, cond=None):
        c = _rows("near_condition", condition(cond), x1)
        near, far = cost(x0, x1, cond), distance(c, c, None)
        if weight is not None:
            return near + weight * far
        own = jnp.diagonal(near)[:, None]

        def halve(_, ends):
            low, high = ends
            w = (low + high) / 2
            enough = jnp.mean(near + w * far <= own, dtype=near.dtype) >= ratio
            return jnp.where(enough, w, low), jnp.where(enough, high, w)

        # Past this end conditions alone decide; float32 would lose the costs beside w times the distances.
        end = 1e3 * jnp.mean(near) / jnp.maximum(jnp.mean(far), jnp.finfo(far.dtype).tiny)
        w, _ = jax.lax.fori_loop(0, 40, halve, (jnp.zeros_like(end), end))
        return near + w * far

    return weighted


def with_rows(pair: Coupling) -> Coupling:
    """`pair`, asked only where there are rows: no rows have no pairs."""

    def of_rows(key, x0, x1, cond=None):
        if jnp.shape(x0)[:1] == jnp.shape(x1)[:1] == (0,):
            return np.arange(0), np.arange(0)
        return pair(key, x0, x1, cond)

    return of_rows


def matrix(name: str, cost: Cost, x0: Array, x1: Array, cond: Cond) -> Array:
    """The costs of a batch [n, n], outside the gradient; ValueError in the name of the coupling for what does not fit.

    Called with values (not inside jit), NaN and rows that are allowed no pair are errors too.
    """
    shapes = [list(jnp.shape(x)) for x in (x0, x1)]
    if not shapes[0] or not shapes[1] or shapes[0][0] != shapes[1][0]:
        raise ValueError(f"{name}: expected as many source rows as data rows, got shapes {shapes[0]} and {shapes[1]}")
    n = shapes[0][0]
    check_cond(name, cond, n)
    found = jax.lax.stop_gradient(cost(*jax.lax.stop_gradient((x0, x1, cond))))
    if found.shape != (n, n):
        raise ValueError(f"{name}: expected costs of shape [{n}, {n}], got {list(found.shape)}")
    if not isinstance(found, jax.core.Tracer):
        for sort, bad in (("NaN", np.isnan(found)), ("-inf", np.isneginf(found))):
            if bad.any():
                i, j = np.argwhere(bad)[0]
                raise ValueError(f"{name}: the cost of source row {i} with data row {j} is {sort}")
        alone = ~np.isfinite(found).any(1)
        if alone.any():
            raise ValueError(f"{name}: source row {alone.argmax()} has no pair of finite cost")
    return found


def _rows(name: str, c, x: Array) -> Array:
    """A condition [n, ...] as [n, d]; ValueError without one."""
    if not hasattr(c, "shape") or len(c.shape) == 0 or c.shape[0] != x.shape[0]:
        said = f"shape {list(c.shape)}" if hasattr(c, "shape") else type(c).__name__
        raise ValueError(
            f"{name}: expected cond (or what was picked from it) to be an array [{x.shape[0]}, ...], got {said}"
        )
    return flat_rows(jnp.asarray(c))
