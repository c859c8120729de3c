"""What a pair costs: functions of the batch that the couplings minimize.

A `Cost` is a function (x0 [n, *event], x1 [n, *event], cond) -> [n, n]; row i, column j is the cost
of x0[i] with x1[j].

An infinite cost forbids a pair. cond[k] is the condition of x1[k]; x0[k] counts as drawn for it
too, since the data do not influence it: a pair with equal conditions therefore leaves the source of
each condition as it was. A cost that knows nothing of cond does not: optimal transport then gives
every condition the part of the source that lies nearest to it, and sampling with the whole source
under one condition starts where no training row was (Cheng, Schwing, *The Curse of Conditions:
Analyzing and Improving Optimal Transport for Conditional Flow-Based Generation*, 2025,
arXiv:2503.10636).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_cond
from jflow._core.conditions import label_of, vector_of
from jflow.types import Array, Cond

Cost = Callable[[Array, Array, Cond], Array]


@runtime_checkable
class _CostWithParts(Protocol):
    """A `Cost` with the parts (shifted, reduced) of `Costs`, more exact than its own values.

    The decorator `_with_parts` attaches them.
    """

    parts: Callable[..., tuple[Array, ...]]

    def __call__(self, x0: Array, x1: Array, cond: Cond = None) -> Array: ...


def _with_parts(parts: Callable[..., tuple[Array, ...]]) -> Callable[[Any], _CostWithParts]:
    """A decorator that attaches `parts` to the function of a cost."""

    def attach(cost):
        cost.parts = parts
        return cost

    return attach


class Costs(NamedTuple):
    """The costs of a batch, [n, n] each, in three forms that have the same couplings.

    A constant of all pairs, and for permutations a number of each row and column, change no
    coupling; without them float32 has the digits for what does, however large the cost itself is.
    """

    full: Array
    shifted: Array  # less a constant
    reduced: Array  # less a constant, a number for each row and one for each column


def _parts_of_squared(x0, x1, cond=None):
    a, b = _flat(x0, x1)
    origins = _middle(a), _middle(b)
    a, b = a - origins[0], b - origins[1]
    between = origins[0] - origins[1]
    squared = _squared(a, b)
    # |a + between - b|^2: what the offset adds is a number for each row and each column
    along_a, along_b = (2 * jnp.sum(x * between, axis=1) for x in (a, b))
    return squared + along_a[:, None] - along_b[None], _reduced(a, b, squared)


@_with_parts(_parts_of_squared)
def squared_euclidean(
    x0: Shaped[Array | np.ndarray, "n *event"],
    x1: Shaped[Array | np.ndarray, "m *event"],
    cond: Cond = None,
) -> Float[Array, "n m"]:
    """The squared Euclidean distance of every source row to every data row.

        cost[i, j] = |x0[i] - x1[j]|^2      summed over the event

    Optimal transport with this cost is that of the 2-Wasserstein distance. It is computed in
    float32 at least; up to 8 dimensions it comes from differences, exact to rounding, beyond from a
    matrix product.

    Args:
        x0: source rows, [n, *event].
        x1: data rows, [m, *event]; in a batch m = n.
        cond: not read.

    Returns:
        The costs, [n, m], in the squared units of the data.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import couplings
        >>> x0, x1 = jnp.array([[0.0], [1.0]]), jnp.array([[2.0], [0.0]])
        >>> couplings.squared_euclidean(x0, x1).tolist()
        [[4.0, 0.0], [1.0, 1.0]]
    """
    a, b = _flat(x0, x1)
    origin = _middle(b)
    return _squared(a - origin, b - origin)


@jax.jit  # outside jit the differences would lie in memory
def _reduced(a: Array, b: Array, squared: Array) -> Array:
    """`squared` less the least of each row and of each column, from products of differences that
    round like themselves: beside an outlier's 1e12 the cost's own float32 would not say which
    partner is nearer.
    """
    row, column = jnp.min(squared, axis=1)[:, None], jnp.min(squared, axis=0)[None]
    if a.shape[1] > _FEW:
        cross = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
        return (jnp.sum(a**2, 1)[:, None] - row) + (jnp.sum(b**2, 1)[None] - column) - 2 * cross
    rows = a, b, b[jnp.argmin(squared, axis=1)], a[jnp.argmin(squared, axis=0)]
    # |a - b|^2 - |a - near b|^2 and |a - b|^2 - |near a - b|^2; the larger minimum goes first
    over_row = _summed(
        lambda a, b, near_b, _: (
            (b[None] - near_b[:, None]) * (b[None] + near_b[:, None] - 2 * a[:, None])
        ),
        *rows,
    )
    over_column = _summed(
        lambda a, b, _, near_a: (
            (a[:, None] - near_a[None]) * (a[:, None] + near_a[None] - 2 * b[None])
        ),
        *rows,
    )
    return jnp.where(row > column, over_row - column, over_column - row)


# Up to so many dimensions distances come from differences, exact to rounding; beyond, from a
# matrix product.
_FEW = 8


def _summed(term: Callable, *rows: Array) -> Array:
    """The sum of term(a number of each of `rows`) over their few dimensions, written out: XLA
    reduces so short an axis several times slower.
    """
    return sum(term(*numbers) for numbers in zip(*(x.T for x in rows), strict=True))


@jax.jit
def _squared(a: Array, b: Array) -> Array:
    if a.shape[1] <= _FEW:
        return _summed(lambda a, b: (a[:, None] - b[None]) ** 2, a, b)
    cross = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(a**2, 1)[:, None] + jnp.sum(b**2, 1)[None] - 2 * cross, 0)


def _flat(x0, x1) -> list[Array]:
    dtype = float_dtype(x0, x1)
    return [jnp.asarray(x, dtype).reshape(x.shape[0], math.prod(x.shape[1:])) for x in (x0, x1)]


def _middle(x: Array) -> Array:
    """The row of x [n, d] at the median distance from the mean, [1, d]: it lies among the
    others, which the mean of rows with one outlier does not, and takes no sort of n d numbers.
    """
    if x.shape[0] == 0:
        return jnp.zeros_like(x, shape=(1, x.shape[1]))
    finite = jnp.isfinite(x)
    mean = jnp.mean(x, axis=0, keepdims=True, where=finite)
    distance = jnp.where(jnp.all(finite, axis=1), jnp.sum((x - mean) ** 2, axis=1), jnp.inf)
    return x[jnp.argsort(distance)[x.shape[0] // 2]][None]


def cosine(
    x0: Shaped[Array | np.ndarray, "n *event"],
    x1: Shaped[Array | np.ndarray, "m *event"],
    cond: Cond = None,
) -> Float[Array, "n m"]:
    """One minus the cosine of the angle between rows: a cost for embeddings of text or images.

        cost[i, j] = 1 - <x0[i], x1[j]> / (|x0[i]| |x1[j]|)      over the flattened event

    Args:
        x0: source rows, [n, *event].
        x1: data rows, [m, *event]; in a batch m = n.
        cond: not read.

    Returns:
        The costs, [n, m], in [0, 2].
    """
    a, b = (
        x / jnp.max(jnp.abs(x), axis=1, keepdims=True) for x in _flat(x0, x1)
    )  # squares of 1e30 would overflow
    a, b = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return 1 - jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


def within_class(
    cost: Cost = squared_euclidean, *, label: Callable[[Cond], Array] = label_of
) -> Cost:
    """A cost that allows pairs of one class alone.

    It is `cost` where label(cond)[i] == label(cond)[j] and infinity elsewhere. The source of a
    class is then exactly the rows that came with it, whichever coupling takes this cost.

    Args:
        cost: the cost of an allowed pair.
        label: picks the discrete part of cond, an array [n] or [n, ...], whose numbers all have to
            be equal. By default it is cond itself, or the label of a `types.Condition`.

    Returns:
        Cost: (x0, x1, cond) -> [n, n]. It raises a ValueError where cond has no labels.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import couplings
        >>> x0, x1 = jnp.array([[0.0], [1.0]]), jnp.array([[1.0], [0.0]])
        >>> couplings.optimal_transport()(jax.random.key(0), x0, x1)[0].tolist()
        [1, 0]
        >>> coupling = couplings.optimal_transport(couplings.within_class())
        >>> coupling(jax.random.key(0), x0, x1, cond=jnp.array([0, 1]))[0].tolist()  # two classes
        [0, 1]

    References:
        Cheng, Schwing, *The Curse of Conditions: Analyzing and Improving Optimal Transport for
            Conditional Flow-Based Generation*, 2025, arXiv:2503.10636 (discrete conditions).
    """

    def same(x1, cond):
        c = _rows("within_class", label(cond), x1)
        if c.shape[1] == 0:
            raise ValueError("within_class: expected labels, got none in cond")
        return jnp.all(c[:, None] == c[None], axis=-1)

    def parts(x0, x1, cond=None):
        allowed = same(x1, cond)
        return tuple(jnp.where(allowed, part, jnp.inf) for part in _parts(cost, x0, x1, cond))

    @_with_parts(parts)
    def classed(x0, x1, cond=None):
        return jnp.where(same(x1, cond), cost(x0, x1, cond), jnp.inf)

    return classed


def near_condition(
    cost: Cost = squared_euclidean,
    *,
    distance: Cost = squared_euclidean,
    weight: float | None = None,
    ratio: float = 0.05,
    condition: Callable[[Cond], Array] = vector_of,
) -> Cost:
    """A cost that prefers pairs of similar continuous conditions.

        cost[i, j] + w distance(cond, cond)[i, j]

    Args:
        cost: the cost of the rows themselves.
        distance: the cost between two conditions; `cosine` suits embeddings.
        weight: w, at least 0. None: the largest w (found to 40 halvings) at which a share `ratio`
            of the n^2 pairs still costs no more than the row's own pair (i, i), whose conditions
            agree: cost[i, j] + w distance[i, j] <= cost[i, i]. It is 0 where fewer do at w = 0.
        ratio: the share of pairs for a weight of None, in (0, 1]. 1 / n leaves the independent
            pairs, 1 forgets the conditions.
        condition: picks the continuous part of cond, an array [n, ...]. By default it is cond
            itself, or the vector of a `types.Condition`.

    Returns:
        Cost: (x0, x1, cond) -> [n, n]. It raises a ValueError where cond is no array with n rows.

    Raises:
        ValueError: weight is negative, or ratio is outside (0, 1].

    References:
        Cheng, Schwing, *The Curse of Conditions: Analyzing and Improving Optimal Transport for
            Conditional Flow-Based Generation*, 2025, arXiv:2503.10636 (continuous conditions).
    """
    if weight is not None and not weight >= 0:
        raise ValueError(f"near_condition: expected weight >= 0 or None, got {weight}")
    if not 0 < ratio <= 1:
        raise ValueError(f"near_condition: expected ratio in (0, 1], got {ratio}")
    ratio = float(ratio)  # a number of numpy's would bring float64 along

    def penalty(x0, x1, cond):
        """w distance(cond, cond)"""
        c = _rows("near_condition", condition(cond), x1)
        far = distance(c, c, None)
        if weight is not None:
            return float(weight) * far
        near = _parts(cost, x0, x1, cond)[0]  # a constant falls out of the comparisons
        return search(near, far) * far

    @jax.jit  # or the loop would be compiled anew at every call outside jit
    def search(near, far):
        """w"""
        own = jnp.diagonal(near)[:, None]

        def halve(_, ends):
            low, high = ends
            w = (low + high) / 2
            share = jnp.mean(
                near + w.astype(near.dtype) * far.astype(near.dtype) <= own, dtype=w.dtype
            )
            return jnp.where(share >= ratio, w, low), jnp.where(share >= ratio, high, w)

        # Past this end conditions alone decide; float32 would lose the costs beside w times the
        # distances.
        end = 1e3 * typical(jnp.abs(near - own)).astype(far.dtype) / typical(far)
        return jax.lax.fori_loop(0, 40, halve, (jnp.zeros_like(end), end))[0]

    def parts(x0, x1, cond=None):
        added = penalty(x0, x1, cond)
        return tuple(_plus(part, added) for part in _parts(cost, x0, x1, cond))

    @_with_parts(parts)
    def weighted(x0, x1, cond=None):
        return _plus(cost(x0, x1, cond), penalty(x0, x1, cond))

    return weighted


@jax.jit
def typical(x: Array) -> Array:
    """The median of the entries that are positive and finite, to about 1e-4 of it; 1 where there
    are none.

    By halving in the logarithm: a sort would take longer than all else that a coupling computes.
    """
    counted = (x > 0) & (x < jnp.inf)
    log = jnp.log2(jnp.where(counted, x, 1))
    number = jnp.sum(counted)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        enough = 2 * jnp.sum(counted & (log <= middle)) >= number
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    _, high = jax.lax.fori_loop(0, 20, halve, (jnp.min(log, initial=0), jnp.max(log, initial=0)))
    return jnp.exp2(high)


def matrix(name: str, cost: Cost, x0, x1, cond: Cond) -> Costs:
    """The costs of a batch, outside the gradient; ValueError in the name of the coupling for what
    does not fit.

    Called with values (not inside jit), NaN and rows that are allowed no pair are errors too.
    """
    shapes = [list(jnp.shape(x)) for x in (x0, x1)]
    if not shapes[0] or not shapes[1] or shapes[0][0] != shapes[1][0]:
        raise ValueError(
            f"{name}: expected as many source rows as data rows, got shapes {shapes[0]} "
            f"and {shapes[1]}"
        )
    n = shapes[0][0]
    cond = check_cond(name, cond, n)
    x0, x1, cond = jax.lax.stop_gradient((x0, x1, cond))
    found = (
        jax.lax.stop_gradient(cost(x0, x1, cond)) if n else jnp.zeros((0, 0), float_dtype(x0, x1))
    )
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
    return Costs(
        found, *(jax.lax.stop_gradient(_parts(cost, x0, x1, cond)) if n else (found, found))
    )


def shifted(cost: Cost, x0: Array, x1: Array) -> Array:
    """The costs less a constant, [n, m], of n source and m data rows without conditions."""
    return _parts(cost, x0, x1, None)[0]


def _parts(cost: Cost, x0: Array, x1: Array, cond: Cond) -> tuple[Array, Array]:
    """(shifted, reduced) of `Costs`, where the cost has a function `parts` for them; else its
    own values.
    """
    if hasattr(cost, "parts"):
        return cost.parts(x0, x1, cond)
    found = cost(x0, x1, cond)
    return found, found


def _plus(a: Array, b: Array) -> Array:
    dtype = float_dtype(a, b)
    return a.astype(dtype) + b.astype(dtype)


def _rows(name: str, c, x: Array) -> Array:
    """A condition [n, ...] as [n, d]; ValueError without one."""
    if not hasattr(c, "shape") or len(c.shape) == 0 or c.shape[0] != x.shape[0]:
        said = f"shape {list(c.shape)}" if hasattr(c, "shape") else type(c).__name__
        raise ValueError(
            f"{name}: expected cond (or what was picked from it) to be an array "
            f"[{x.shape[0]}, ...], got {said}"
        )
    return jnp.asarray(c).reshape(c.shape[0], -1)
