"""Shortcut models: a step of size d learns to be two of size d / 2, and size 0 the velocity.

The targets come from the averaged params, which are also what to sample with. A size learns from
the average of the next smaller one: with a memory of m updates it takes some levels * m of them
until d = 1 has heard of the velocity.

    model = jflow.flow_map(nets.ResidualMLP(128))
    step = train.make_step(losses.shortcut(model), optimizer, ema=0.999)
    ... fit ...
    # steps: powers of 2, up to 2^(levels - 1)
    x1, info = solvers.sample_flow_map(model, state.ema, x0, steps=4)
"""

import math

import jax
import jax.numpy as jnp

from jflow import times
from jflow._core.arrays import expand_to
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_flow_map, check_whole, frozen_entry, like_rows, like_state
from jflow._core.line import on_line
from jflow.losses._errors import mean_squared_error
from jflow.losses._pairs import draw_pairs, dropped_rows
from jflow.losses._teacher import line_velocity
from jflow.types import FlowMap, Loss, PyTree, Time, Velocity

__all__ = ["shortcut"]

_UNIFORM = times.uniform()


def shortcut(
    flow_map: FlowMap,
    *,
    levels: int = 7,
    every: int = 4,
    time: Time = _UNIFORM,
    teacher: Velocity | None = None,
    scale: float = 1.0,
    null: PyTree = None,
) -> Loss:
    """Shortcut models: a step of size d learns to be two steps of half the size.

    Also known as: shortcut models.

    u(x, t, r) is trained at r = t, and at r = t + d for d = 1, 1/2, ..., 2^(1 - levels) and t a
    multiple of d. Every `every`-th row of the batch is one of self-consistency, d uniform among the
    sizes, t among its multiples:

        u(x_t, t, t + d)  towards  (u1 + u2) / 2,
        u1 = u(x_t, t, t + d/2),    u2 = u(x_t + d/2 u1, t + d/2, t + d),

    with u1 and u2 by the params frozen['ema'], without gradient. At the smallest d they are
    velocities, u(., t, t): two Euler steps, so that at the exact map this row's error is of order
    d, and none at the larger sizes. The other rows are flow matching, u(x_t, t, t) towards x1 - x0,
    t of `time`. The loss is the mean over the event of the squared error, then over all rows.

    `solvers.sample_flow_map` with steps = 1, 2, ..., 2^(levels - 1) asks for what is trained; for
    more, `solvers.sample` of `solvers.instantaneous_velocity(flow_map)`. The paper's smallest step
    is 2^-levels = 1/128. It is no preset of `flow_map_residual`: no derivative is taken, and the
    target is the map's own.

    Args:
        flow_map: The average velocity u that is trained.
        levels: The number of sizes.
        every: Which rows are of self-consistency, at least 2.
        time: The law of t in the rows of flow matching, (key, n) -> t [n].
        teacher: The marginal velocity in place of x1 - x0, with params frozen['teacher'], or None.
        scale: Guidance of the velocities at the smallest d alone, u_null + scale (u_cond - u_null):
            larger steps take it over from below, once. Steps of size 0 stay unguided.
        null: The row of cond, without the batch axis, that stands for no condition. A row that
            `losses.drop_cond` dropped is one of flow matching, wherever it stands: self-consistency
            is learned under conditions alone.

    Returns:
        A loss of the batch {'x' [b, *event], in random order, optionally 'x0' (standard normal when
        absent), 'cond', 'weight' [b], 'dropped' [b]}. Its metrics are 'residual', the loss, and
        'self_consistency', the mean of those rows, zero where none has weight.

    Raises:
        ValueError: At construction for levels < 1, every < 2, a scale that is not finite, and
            guidance without null; at trace time for guidance without 'cond', without frozen['ema']
            (make_step puts it there, given ema=) or, for a teacher, frozen['teacher'], a map of
            another shape, a batch without 'x' or with unknown keys, and a key that is None.

    References:
        Frans, Hafner, Levine, Abbeel, *One Step Diffusion via Shortcut Models*, 2024,
            arXiv:2410.12557. Its public code clips targets to [-4, 4], which is left out; the
            network is given 0 for d / 2 at the smallest d here, one more size there.
    """
    check_flow_map("shortcut", flow_map)
    check_whole("shortcut", levels=levels)
    check_whole("shortcut", 2, every=every)
    if not math.isfinite(scale):
        raise ValueError(f"shortcut: expected a finite scale, got {scale}")
    if scale != 1 and null is None:
        raise ValueError(
            "shortcut: guidance needs null, the row of cond that stands for no condition, got None"
        )

    def halves(params, x, t, d, cond):
        """(u1 + u2) / 2 from t to t + d; d is one of the sizes, to the bit."""
        smallest = d == 2.0 ** (1 - levels)

        def u(x, t, r):
            r = jnp.where(smallest, t, r)
            once = flow_map.apply(params, x, t, r, cond)
            if scale == 1:
                return once
            other = flow_map.apply(params, x, t, r, like_rows("shortcut", null, cond))
            return jnp.where(expand_to(smallest, x), other + scale * (once - other), once)

        middle = t + d / 2
        first = u(x, t, middle)
        return (first + u(x + expand_to(d / 2, x) * first, middle, t + d)) / 2

    def loss(params, key, batch, frozen=None):
        x0, x1, cond, weight, t, own_key, dropout_key = draw_pairs("shortcut", key, batch, time)
        average = frozen_entry("shortcut", frozen, "ema")
        if scale != 1 and cond is None:
            raise ValueError(
                f"shortcut: guidance needs 'cond' in batch, got the keys {sorted(batch)}"
            )
        level_key, place_key = jax.random.split(own_key)
        own = (jnp.arange(t.shape[0]) % every == 0) & ~dropped_rows(batch, t.shape[0])

        level = jax.random.randint(level_key, t.shape, 0, levels)
        d = jnp.ldexp(jnp.ones_like(t), -level)  # to the bit, as exp2 is not
        place = jnp.floor(jax.random.uniform(place_key, t.shape, t.dtype) / d) * d
        t, r = jnp.where(own, place, t), jnp.where(own, place + d, t)

        x = on_line(x0, x1, t)
        v = line_velocity("shortcut", teacher, frozen, x0, x1, cond)(x, t)
        rows = lambda tree: jax.tree.map(lambda a: a[::every], tree)  # noqa: E731
        halved = halves(average, rows(x), rows(t), rows(d), rows(cond)).astype(v.dtype)
        halved = jnp.where(expand_to(rows(own), halved), halved, rows(v))
        target = jax.lax.stop_gradient(v.at[::every].set(halved))

        u = like_state("shortcut", flow_map.apply(params, x, t, r, cond, key=dropout_key), x)
        error = mean_squared_error(u, target, x, t)
        total = mean_of_rows(error, weight)
        counted = jnp.ones_like(t) if weight is None else weight.astype(t.dtype)
        own_part = mean_of_rows(jnp.where(own, error, 0), counted)
        share = jnp.maximum(mean_of_rows(own.astype(t.dtype), counted), jnp.finfo(t.dtype).tiny)
        return total, {"residual": total, "self_consistency": own_part / share}

    return loss
