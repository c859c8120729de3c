"""Flow-anchored consistency (FACM): a shortcut to data and, in the same network, the velocity that it is a shortcut of.

The network has to be told which of the two it is asked for. A flow map u(x, t, r) is told by r: u(x, t, 1) is the average
velocity to data, u(x, t, t) the velocity. A plain velocity network is told by a time beyond data: F(x, t) and F(x, 2 - t)
(`expanded_time` reads it as a flow map).

    model = jflow.flow_map(net)                                       # or solvers.expanded_time(jflow.velocity(net))
    loss = losses.anchored_consistency(model, teacher=teacher)      # None: from scratch
    ... make_step, fit; params of a flow map from train.warm_start(model.init(...), teacher_params) ...
    x1, info = solvers.sample_flow_map(model, params, x0)                      # steps=2, renoise=1.0, key=key for two
    x1, info = solvers.sample(solvers.instantaneous_velocity(model), params, x0)        # the flow itself, in many steps
"""

import math

import jax
import jax.numpy as jnp

from jflow import times
from jflow._core.arrays import expand_to, float_dtype, mean_event
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_flow_map, check_same_shape, like_state
from jflow._core.line import on_line
from jflow.losses._errors import Metric, mean_squared_error
from jflow.losses._pairs import draw_pairs
from jflow.losses._teacher import line_velocity
from jflow.solvers import JVP, total_derivative
from jflow.types import Array, FlowMap, Loss, Time, Velocity

__all__ = ["anchored_consistency", "squared_and_cosine_error"]

_TIMES = times.from_quantile(
    lambda u: 1 - 2 / math.pi * jnp.arctan(jnp.exp(-0.8 + 1.6 * jax.scipy.special.ndtri(u))),
    times.uniform(1e-6, 1 - 1e-6),
)


def squared_and_cosine_error(v: Array, target: Array, x_t: Array, t: Array) -> Array:
    """The mean squared error plus one minus the cosine between v and target along the last axis, mean over the others: FACM's
    anchor. The cosine has 0.1^2 added to the means of v target, v^2 and target^2, which leaves its minimum where it is and
    its gradient moderate at v = 0: networks start there, and a huge first gradient stays in Adam's average of squares for
    thousands of updates."""
    if v.ndim == 1:
        v, target = v[:, None], target[:, None]

    def dot(x, y):
        return jnp.mean(x * y, axis=-1) + 0.1**2

    cosine = dot(v, target) / jnp.sqrt(dot(v, v) * dot(target, target))
    return mean_squared_error(v, target, x_t, t) + mean_event(1 - cosine)


def anchored_consistency(
    flow_map: FlowMap,
    *,
    teacher: Velocity | None = None,
    time: Time = _TIMES,
    anchor: Metric = squared_and_cosine_error,
    relax: float = 0.5,
    clip: float = 1.0,
    power: float = 0.5,
    c: float = 1e-3,
    jvp: JVP = jax.jvp,
) -> Loss:
    """The sum, mean over rows, of two errors at x_t = (1 - t) x0 + t x1 with velocity v there:

        shortcut   cos(pi t / 2) e / sg(e + c)^power,    e the mean over the event of |u - sg(u - (1 - t^relax) clip(g))|^2,
                   u = u(x_t, t, 1),    g = u - (v + (1 - t) du/dt),    clip to [-clip, clip], number by number;
        anchor     anchor(u(x_t, t, t), v, x_t, t).

    du/dt is along the trajectory, (v, 1, 0) in (x, t, r); g = 0 is the identity of the average velocity to r = 1.
    teacher: the teacher, with params frozen['teacher'] (`guidance.cfg` of it for a guided one): v is its velocity.
        None: v = x1 - x0, from scratch.
    time: (2 / pi) arctan(exp(n)) is 1 - t, n normal of mean -0.8 and deviation 1.6, as the published distillation.
    relax, clip, power, c: as published; power = 0 and clip = inf leave the squared error, whose mean gradient from scratch
        vanishes at the exact u. Clipping and the weight by a row's own error move that point.
    anchor: (v, target, x_t, t) -> [b], a mean over the event as e is: `losses.mean_squared_error` has its minimum at the
        marginal velocity; the cosine of a conditional target does not.
    batch: as in `losses.flow_matching`. metrics: 'residual', the mean over event and rows of g^2, and 'anchor'.
    Errors: ValueError at construction for relax, clip or c <= 0 or power < 0; as `losses.flow_matching` at trace time, and
        for a teacher without frozen['teacher'].
    Source: Peng, Zhu, Liu, Wu, Li, Sun, Wu, "Flow-Anchored Consistency Models", 2025; weights as in its public code
        (its times run as here).
    """
    name = "anchored_consistency"
    check_flow_map(name, flow_map)
    if not (0 < relax < math.inf and clip > 0 and 0 < c < math.inf and 0 <= power < math.inf):
        raise ValueError(
            f"{name}: expected relax > 0, clip > 0, c > 0 and power >= 0, "
            f"got relax={relax}, clip={clip}, c={c}, power={power}"
        )

    def loss(params, key, batch, frozen=None):
        x0, x1, cond, weight, t, _, dropout_key = draw_pairs(name, key, batch, time)
        dtype = float_dtype(x1)
        x_t = on_line(x0, x1, t)
        v = line_velocity(name, teacher, frozen, x0, x1, cond)(x_t, t)
        x = x_t.astype(x1.dtype)
        far_key, near_key = jax.random.split(dropout_key)
        u, slope = total_derivative(
            flow_map, params, x, t, jnp.ones_like(t), v, cond, key=far_key, jvp=jvp
        )
        u, slope = like_state(name, u, x).astype(dtype), jax.lax.stop_gradient(slope).astype(dtype)
        still = jax.lax.stop_gradient(u)
        g = still - (v + expand_to(1 - t, x) * slope)
        target = still - expand_to(1 - t**relax, x) * jnp.clip(g, -clip, clip)
        error = mean_squared_error(u, target, x, t)
        shortcut = jnp.cos(jnp.pi / 2 * t) * error / jax.lax.stop_gradient(error + c) ** power
        now = like_state(name, flow_map.apply(params, x, t, t, cond, key=near_key), x).astype(dtype)
        held = check_same_shape(name, "an anchor", anchor(now, v, x_t, t), t)
        metrics = {
            "residual": mean_of_rows(mean_squared_error(g, jnp.zeros_like(g), x, t), weight),
            "anchor": mean_of_rows(held, weight),
        }
        return mean_of_rows(shortcut + held, weight), jax.lax.stop_gradient(metrics)

    return loss
