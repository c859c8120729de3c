"""Hierarchical rectified flow: regression of the velocity of velocities."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jflow import couplings, paths, times
from jflow._core.arrays import float_dtype, mean_event
from jflow._core.batch import mean_of_rows
from jflow._core.checks import need_key
from jflow._core.keys import same_draws
from jflow._core.pairs import paired, pick
from jflow.losses._pairs import draw_pairs
from jflow.solvers import HierarchyCondition
from jflow.types import Coupling, Loss, Path, Time, Velocity

__all__ = ["HierarchyLevel", "hierarchical_matching"]


class HierarchyLevel(NamedTuple):
    """How a level of a hierarchy pairs noise with what it generates, and its path and times.

    Attributes:
        path: The path from noise to what the level generates.
        time: The law of the level's times, (key, n) -> t [n].
        coupling: What pairs the level's noise with its data.
    """

    path: Path = paths.linear()
    time: Time = times.uniform()
    coupling: Coupling = couplings.independent()


def hierarchical_matching(
    velocity: Velocity, levels: Sequence[HierarchyLevel] = (HierarchyLevel(), HierarchyLevel())
) -> Loss:
    """Flow matching in the space of velocities: hierarchical rectified flow.

    Level 1 generates the data, level i + 1 the velocities of level i.

    With y_1 the data and, for i = 1 ... d, z_i the noise of level i and t_i its time,

        x_i = path.point(z_i, y_i, t_i),
        y_{i+1} = path.target(z_i, y_i, t_i)   (linear: y_i - z_i),

    and the loss is the mean over the event of (velocity(x_d, t_d, cond) - y_{d+1})^2, then over
    rows, where cond is `solvers.HierarchyCondition((x_1 ... x_{d-1}), (t_1 ... t_{d-1}), cond)`:
    any velocity network is one of a hierarchy. With one level cond stays as it is, and this is
    `flow_matching`. At the minimum the innermost flow carries noise to the *law* of the velocity at
    x_1, t_1, of which flow matching knows the mean; `solvers.sample_hierarchy` follows it.

    Pairs are the levels' own matter here, at level 1 as below, and no `couplings.pair` comes before
    this loss. Couplings see their level's noise and data, and as cond the batch's at level 1, the
    `solvers.HierarchyCondition` of the levels above below it: z follows i; data, the states and
    times above, cond and weight follow j. At level 1 any coupling of the marginals will do, and
    makes the law of velocities simpler. Below, pairs must be exchanged among (nearly) equal x_1,
    t_1 ... only, as `couplings.optimal_transport(couplings.near_condition(condition=...))` does: a
    coupling blind to them makes z_2 depend on x_1, whereas the sampler draws them independently.

    Args:
        velocity: The velocity of the innermost level.
        levels: The levels, from the data inwards, each a `HierarchyLevel`.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' the source of level 1 (standard normal
        when absent; the noise below always is), 'cond', 'weight' [b]}. It has no metrics.

    Raises:
        TypeError: At construction for a level of another type.
        ValueError: At construction for no levels; at trace time for a velocity of another shape, a
            batch without 'x' or with unknown keys, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> from jflow.types import Velocity
        >>> still = Velocity(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> loss = losses.hierarchical_matching(still, [losses.HierarchyLevel()] * 2)
        >>> value, metrics = loss({}, jax.random.key(0), {"x": jnp.ones((4, 2))})
        >>> value.shape
        ()

    References:
        Zhang, Yan, Schwing, Zhao, *Towards Hierarchical Rectified Flow*, 2025, arXiv:2502.17436.
        Zhang, Yan, Schwing, Zhao, *Hierarchical Rectified Flow Matching with Mini-Batch Couplings*,
            2025, arXiv:2507.13350 (couplings; what a coupling below level 1 may do is derived
            here).
    """
    levels = tuple(levels)
    if not levels:
        raise ValueError("hierarchical_matching: expected at least one level, got none")
    for level in levels:
        if not isinstance(level, HierarchyLevel):
            raise TypeError(
                f"hierarchical_matching: expected a losses.HierarchyLevel, got {level!r}"
            )

    def loss(params, key, batch, frozen=None):
        need_key("hierarchical_matching", key)
        pair_key, key = jax.random.split(key)
        batch = paired("hierarchical_matching", levels[0].coupling, pair_key, batch)
        pairs = draw_pairs("hierarchical_matching", key, batch, levels[0].time)
        z, y, t, weight = pairs.x0, pairs.x1, pairs.t, pairs.weight
        path_key, *keys = jax.random.split(pairs.path_key, len(levels))
        dtype, n = y.dtype, y.shape[0]
        above = HierarchyCondition((), (), pairs.cond)
        x, y = _look(levels[0].path, z, y, t, path_key)
        for level, level_key in zip(levels[1:], keys, strict=True):
            above = HierarchyCondition(
                (*above.states, x.astype(dtype)), (*above.times, t), above.cond
            )
            time_key, noise_key, pair_key, path_key = jax.random.split(level_key, 4)
            z = jax.random.normal(noise_key, y.shape, y.dtype)
            rows_i, rows_j = level.coupling(pair_key, z, y, above)
            z, (y, above, weight) = pick(z, rows_i), pick((y, above, weight), rows_j)
            t = level.time(time_key, n).astype(t.dtype)
            x, y = _look(level.path, z, y, t, path_key)
        inner_cond = above if above.states else above.cond
        v = velocity.apply(params, x.astype(dtype), t, inner_cond, key=pairs.dropout_key)
        if v.shape != y.shape:
            raise ValueError(
                f"hierarchical_matching: expected a velocity of shape {list(y.shape)}, "
                f"got {list(v.shape)}"
            )
        error = v.astype(float_dtype(y)) - y.astype(float_dtype(y))
        return mean_of_rows(mean_event(jnp.square(error)), weight), {}

    return loss


def _look(path, z, y, t, key):
    """Where the pair is at t, and its velocity there: the data of the next level."""
    return path.point(z, y, t, key=key), path.target(z, y, t, key=same_draws(key))
