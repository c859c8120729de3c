"""Optimal transport from a source that can be sampled to a fixed data set, learned once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from jflow._core.checks import check_whole
from jflow.couplings import _costs, _plans
from jflow.couplings._costs import Cost
from jflow.types import Array, Coupling, Key

Source = Callable[[Key, int], Array]  # (key, n) -> x0 [n, *event]


def fit_semidiscrete(
    key: Key,
    data: Float[Array | np.ndarray, "N *event"],
    *,
    source: Source | None = None,
    cost: Cost = _costs.squared_euclidean,
    steps: int = 2000,
    batch: int = 256,
    learning_rate: float = 0.1,
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Learn the potentials of the optimal transport from a source to a data set.

    It ascends the dual

        E_x0[min_j cost(x0, data[j]) - g[j]] + mean_j g[j]

    by Adam on fresh source rows; the gradient is 1 / N - P(row j is the nearest). It starts at the
    least cost of each data row in a first batch. The result is the mean over the second half of the
    steps, less its median. It needs memory for batch x N costs.

    Args:
        key: a key.
        data: the data set, [N, *event], all finite.
        source: (key, n) -> x0 [n, *event]; the standard normal by default.
        cost: the cost of a pair.
        steps: steps of Adam, at least 4.
        batch: source rows a step.
        learning_rate: the first one; it falls as a cosine. It counts in what the median pair of the
            first batch costs more than the cheapest of its row and column.

    Returns:
        g: the potentials, [N], in units of the cost, for `semidiscrete`.
        share: how often each row is then drawn, times N, [N]: 1 is right. It is counted on as many
            fresh source rows as the last quarter of the steps saw.

    Raises:
        ValueError: steps is below 4, batch is below 1, or data are not finite.

    References:
        Genevay, Cuturi, Peyre, Bach, *Stochastic Optimization for Large-scale Optimal Transport*,
            2016, arXiv:1605.08527.
        Mousavi-Hosseini et al., *Flow Matching with Semidiscrete Couplings*, 2025,
            arXiv:2509.25519.
    """
    check_whole("fit_semidiscrete", 4, steps=steps)
    check_whole("fit_semidiscrete", batch=batch)
    data = jnp.asarray(data)
    bad = ~np.isfinite(np.asarray(data, np.float64)).reshape(data.shape[0], -1).all(1)
    if bad.any():
        raise ValueError(f"fit_semidiscrete: row {bad.argmax()} of data is not finite")
    n = data.shape[0]

    def draw(key):
        return (
            jax.random.normal(key, (batch, *data.shape[1:]), data.dtype)
            if source is None
            else source(key, batch)
        )

    def counts(key, g):
        return jnp.zeros(n, g.dtype).at[_nearest(cost, draw(key), data, g)].add(1.0) / batch

    fit_key, unit_key, count_key = jax.random.split(key, 3)
    # What an offset or an outlier of the data adds to a column is in its least cost, and not left
    # to be learned.
    first = _costs.shifted(cost, draw(unit_key), data)
    start = jnp.min(first, axis=0)
    unit = _plans.scale(first)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def step(carry, key):
        g, state, mean = carry
        slope = counts(key, start + g * unit) - 1 / n
        update, state = optimizer.update(slope, state)
        g = g + update
        late = jnp.maximum(state[0].count - steps // 2, 0)
        return (g, state, mean + jnp.where(late > 0, (g - mean) / jnp.maximum(late, 1), 0)), None

    def learn(keys, g):
        (_, _, mean), _ = jax.lax.scan(step, (g, optimizer.init(g), g), keys)
        g = start + mean * unit
        return g - jnp.median(g)

    g = jax.jit(learn)(jax.random.split(fit_key, steps), jnp.zeros_like(unit, shape=(n,)))
    keys = jax.random.split(count_key, max(1, steps // 4))
    seen, _ = jax.jit(
        lambda keys: jax.lax.scan(lambda s, k: (s + counts(k, g), None), jnp.zeros_like(g), keys)
    )(keys)
    return g, seen * (n / len(keys))


def semidiscrete(
    potentials: Float[Array | np.ndarray, " N"], cost: Cost = _costs.squared_euclidean
) -> Coupling:
    """Each source row with a row of the whole data set, by the potentials of `fit_semidiscrete`.

    Source row k goes with the row j of the least cost(x0[k], data[j]) - potentials[j]. Here x1 is
    the data set [N, *event], not a batch: (key, x0 [b, *event], data) -> (i [b], j [b]). A source
    of batches for `train.fit` does the pairing, and the loss takes them as they come:

        i, j = coupling(key, x0, data)
        batch = {'x0': x0, 'x': data[j], 'cond': labels[j]}

    For conditions, fit and pair each class by itself.

    Args:
        potentials: the potentials g of `fit_semidiscrete`, [N].
        cost: the cost that they were fitted with.

    Returns:
        Coupling: (key, x0, x1, cond=None) -> (i, j), i = 0 ... b - 1. It is deterministic: the key
            is not used. It raises a ValueError for a data set of another size than the potentials.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import couplings
        >>> data = jnp.array([[-1.0], [1.0]])
        >>> coupling = couplings.semidiscrete(jnp.zeros(2))  # right for a symmetric source
        >>> x0 = jnp.array([[0.3], [-2.0], [1.5]])
        >>> coupling(jax.random.key(0), x0, data)[1].tolist()
        [1, 0, 1]
    """

    def pair(key, x0, x1, cond=None):
        if x1.shape[:1] != potentials.shape or x0.shape[1:] != x1.shape[1:]:
            raise ValueError(
                f"semidiscrete: expected the data set of shape [{potentials.shape[0]}, "
                "...] and source rows like its "
                f"rows, got {list(x1.shape)} and {list(x0.shape)}"
            )
        return np.arange(x0.shape[0]), _nearest(cost, x0, x1, potentials)

    return pair


def _nearest(cost: Cost, x0: Array, data: Array, g: Array) -> Array:
    return jnp.argmin(_costs.shifted(cost, x0, data) - g[None], axis=1)
