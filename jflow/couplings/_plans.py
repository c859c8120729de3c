"""What the couplings compute with: potentials of a matrix of costs, and matchings of arrays.

Functions that hold a loop are jitted, or the loop would be compiled anew at every call outside jit.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from jflow.couplings._costs import typical
from jflow.types import Array


@jax.jit
def scale(cost: Array) -> Array:
    """What a pair costs more than the cheapest of its row and of its column: the median over pairs.

    Only pairs where that is not 0 count. It is the unit of a relative epsilon. A mean of the costs
    would grow with an offset between source and data, or one outlier, which change no plan, until
    epsilon outweighs all that does.
    """
    over_row = cost - jnp.min(cost, axis=1, keepdims=True)
    return typical(over_row - jnp.min(over_row, axis=0, keepdims=True))


@functools.partial(jax.jit, static_argnames="iterations")
def entropic_potentials(
    cost: Float[Array, "n n"],
    epsilon: Float[Array, ""] | float,
    start: Float[Array, ""] | float,
    *,
    iterations: int = 50,
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """The dual potentials of the entropic transport plan between two uniform batches.

    The plan is

        P[i, j] = exp((f[i] + g[j] - cost[i, j]) / epsilon)

    with row and column sums 1: those of the rows are exact, those of the columns have what
    `iterations` left of their error. epsilon falls geometrically from `start` in three stages. Each
    starts with one iteration in the log domain, after which the entries of the plan are of order 1:
    the other iterations are products with it and cannot overflow, being contractions.

    Args:
        cost: the costs, [n, n]; infinite ones forbid their pairs, but every row and column needs a
            finite one.
        epsilon: the regularization, above 0, in units of the cost.
        start: the epsilon to fall from, such as the median cost of a pair beyond the cheapest of
            its row and column.
        iterations: Sinkhorn iterations of the last stage; the two before have 10 each.

    Returns:
        f: the potentials of the rows, [n].
        g: the potentials of the columns, [n].

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from jflow import couplings
        >>> cost = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> f, g = couplings.entropic_potentials(cost, 0.5, 1.0)
        >>> plan = jnp.exp((f[:, None] + g[None] - cost) / 0.5)
        >>> print(np.asarray(plan).round(3))  # the diagonal is 1 / (1 + exp(-2))
        [[0.881 0.119]
         [0.119 0.881]]

    References:
        Cuturi, *Sinkhorn Distances: Lightspeed Computation of Optimal Transport*, 2013,
            arXiv:1306.0895.
        Schmitzer, *Stabilized Sparse Scaling Algorithms for Entropy Regularized Transport
            Problems*, 2019, arXiv:1610.06519.
    """

    def stage(f, g, epsilon, iterations):
        f = -epsilon * _log_sum_exp((g[None] - cost) / epsilon, 1)
        g = -epsilon * _log_sum_exp((f[:, None] - cost) / epsilon, 0)
        plan = jnp.exp((f[:, None] + g[None] - cost) / epsilon)
        v = jax.lax.fori_loop(
            0, iterations, lambda _, v: 1 / ((1 / _times(plan, v)) @ plan), jnp.ones_like(g)
        )
        return f - epsilon * jnp.log(_times(plan, v)), g + epsilon * jnp.log(v)

    epsilon = jnp.asarray(epsilon, cost.dtype)
    f = g = jnp.zeros_like(cost[0])
    for power, count in ((1 / 3, 10), (2 / 3, 10), (1, iterations)):
        # epsilon itself, not a power of it, in the last stage
        now = epsilon if power == 1 else start * (jnp.minimum(epsilon / start, 1)) ** power
        f, g = stage(f, g, now, count)
    return f, g


@functools.partial(jax.jit, static_argnames="iterations")
def relaxed_potentials(
    cost: Array, epsilon: Array, slack: Array, *, iterations: int
) -> tuple[Array, Array]:
    """The dual potentials (f, g), [n] each, of unbalanced entropic transport.

    The plan P = exp((f + g - cost) / epsilon) / n^2 minimizes

        <P, cost> + epsilon KL(P | 1 / n^2)
            + slack KL(row sums | 1 / n) + slack KL(column sums | 1 / n),

    with KL between measures of any mass (Chizat, Peyre, Schmitzer, Vialard, 2018).
    """
    damp = slack / (slack + epsilon)
    log_n = math.log(cost.shape[0])

    def step(_, fg):
        f = -damp * epsilon * (_log_sum_exp((fg[1][None] - cost) / epsilon, 1) - log_n)
        return f, -damp * epsilon * (_log_sum_exp((f[:, None] - cost) / epsilon, 0) - log_n)

    zero = jnp.zeros_like(cost[0])
    return jax.lax.fori_loop(0, iterations, step, (zero, zero))


@jax.jit
def greedy(weight: Array) -> Array:
    """The column of each row, [n], in the greedy matching of weight [n, n]; -inf forbids a pair.

    The matching takes the heaviest pair, then the heaviest of what is left, and so on. Row k gets
    column k throughout where that cannot be (NaN, or nothing allowed is left).

    It goes in rounds, all pairs at once that are the heaviest of both their row and their column;
    ties go to the first. Whenever half are matched, the rest moves to a matrix of its own: the last
    rounds, the most, cost next to nothing.
    """
    n = weight.shape[0]
    column = jnp.full_like(weight, n, shape=(n,), dtype=jnp.int32)
    rows, columns, left = jnp.arange(n), jnp.arange(n), weight
    while True:
        m = left.shape[0]
        few = m // 2 if m > 32 else 0
        mine, taken = _rounds(left, few)
        column = column.at[rows].set(
            columns.at[mine].get(mode="fill", fill_value=n).astype(jnp.int32), mode="drop"
        )
        if few == 0:
            return jnp.where(jnp.any(column == n), jnp.arange(n, dtype=jnp.int32), column)
        r, c = (jnp.nonzero(x == m, size=few, fill_value=m)[0] for x in (mine, taken))
        left = left.at[r[:, None], c[None]].get(mode="fill", fill_value=-jnp.inf)
        rows, columns = (
            x.at[y].get(mode="fill", fill_value=n) for x, y in ((rows, r), (columns, c))
        )


def _rounds(weight: Array, few: int) -> tuple[Array, Array]:
    """The partner of each row and column, m if free, after some rounds of `greedy`.

    They end when at most `few` rows are free, or nobody was matched.
    """
    m = weight.shape[0]
    index = jnp.arange(m, dtype=jnp.int32)

    def first(free, best, axis):
        at = jnp.expand_dims(index, 1 - axis)
        return jnp.min(jnp.where(free & (weight >= jnp.expand_dims(best, axis)), at, m), axis)

    def match(state):
        column, row, _ = state
        free = (column == m)[:, None] & (row == m)[None] & (weight > -jnp.inf)
        left = jnp.where(free, weight, -jnp.inf)
        mine, yours = (
            first(free, jnp.max(left, 1), 1),
            first(free, jnp.max(left, 0), 0),
        )  # m: nobody
        both = (mine < m) & (yours.at[mine].get(mode="fill", fill_value=m) == index)
        theirs = (yours < m) & (mine.at[yours].get(mode="fill", fill_value=m) == index)
        return jnp.where(both, mine, column), jnp.where(theirs, yours, row), jnp.any(both)

    def more(state):
        return state[2] & (jnp.sum(state[0] == m) > few)

    # made from the weights, so that shard_map sees them vary where those do
    none = jnp.where(jnp.isnan(weight[0]), m, jnp.full_like(index, m))
    column, row, _ = jax.lax.while_loop(more, match, (none, none, none[0] == m))
    return column, row


def assign(cost, f, g) -> np.ndarray:
    """On the host: the row of each column, [n] int32, in the assignment of least total cost.

    The potentials f, g change nothing but the time. It is row k for column k where costs are NaN or
    -inf, or allow no assignment.
    """
    cost, f, g = (np.asarray(a, np.float64) for a in (cost, f, g))
    f, g = (np.where(np.isfinite(a), a, 0) for a in (f, g))
    try:
        rows, columns = linear_sum_assignment(cost - f[:, None] - g[None])
    except ValueError:
        return np.arange(len(cost), dtype=np.int32)
    return rows[np.argsort(columns)].astype(np.int32)


def assign_some(cost, m: int) -> np.ndarray:
    """On the host: the m pairs, [2, m] int32, of least total cost.

    Each row and column is in at most one pair. n - m more rows and columns of cost 0 take those
    that stay single; they may not take each other. The first m rows go with themselves where costs
    are NaN or -inf, or allow no such pairs.
    """
    cost = np.asarray(cost, np.float64)
    n = len(cost)
    padded = np.full((2 * n - m, 2 * n - m), np.inf)
    padded[:n, :n], padded[:n, n:], padded[n:, :n] = cost, 0, 0
    try:
        rows, columns = linear_sum_assignment(padded)
    except ValueError:
        return np.tile(np.arange(m, dtype=np.int32), (2, 1))
    kept = (rows < n) & (columns < n)
    return np.stack([rows[kept], columns[kept]]).astype(np.int32)


def _times(plan: Array, v: Array) -> Array:
    return jnp.matmul(plan, v, precision=jax.lax.Precision.HIGHEST)


def _log_sum_exp(a: Array, axis: int) -> Array:
    """jax.nn.logsumexp less its care for infinities, in half the time: here each row has a
    finite entry.
    """
    top = jnp.max(a, axis, keepdims=True)
    return jnp.squeeze(top, axis) + jnp.log(jnp.sum(jnp.exp(a - top), axis))
