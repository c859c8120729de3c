"""Flow-anchored consistency (FACM): a shortcut to data and, in the same network, the velocity.

The network must know which of the two it is asked for. A flow map u(x, t, r) sees it in r: u(x, t,
1) is the average velocity to data, u(x, t, t) the velocity. A plain velocity network sees it in a
time beyond data: F(x, t) and F(x, 2 - t) (`expanded_time` reads it as a flow map).

    model = jflow.flow_map(net)                 # or solvers.expanded_time(jflow.velocity(net))
    loss = losses.anchored_consistency(model, teacher=teacher)    # None: from scratch
    # params of a flow map: train.warm_start(model.init(...), teacher_params)
    ... make_step, fit ...
    x1, info = solvers.sample_flow_map(model, params, x0)  # steps=2, renoise=1.0, key=key
    flow = solvers.instantaneous_velocity(model)
    x1, info = solvers.sample(flow, params, x0)            # the flow itself, in many steps
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jflow import times
from jflow._core.arrays import expand_to, mean_event
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_flow_map, check_same_shape, like_state
from jflow._core.line import on_line
from jflow.losses._errors import Metric, mean_squared_error
from jflow.losses._pairs import draw_pairs
from jflow.losses._residual import adaptive_weight, flow_map_residual
from jflow.losses._teacher import line_velocity
from jflow.solvers import JVP
from jflow.types import FlowMap, Loss, Time, Velocity

__all__ = ["anchored_consistency", "squared_and_cosine_error"]

_TIMES = times.from_quantile(
    lambda u: 1 - 2 / math.pi * jnp.arctan(jnp.exp(-0.8 + 1.6 * jax.scipy.special.ndtri(u))),
    times.uniform(1e-6, 1 - 1e-6),
)


def squared_and_cosine_error(
    v: Float[Array, "b *event"],
    target: Float[Array, "b *event"],
    x_t: Float[Array, "b *event"],
    t: Float[Array, " b"],
) -> Float[Array, " b"]:
    """The squared error plus one minus the cosine between v and its target: the anchor of FACM.

    The squared error is a mean over the event; the cosine is along the last axis, and its mean over
    the other axes is taken. The cosine has 0.1^2 added to the means of v target, v^2 and target^2.
    This leaves its minimum where it is and its gradient moderate at v = 0: networks start there,
    and a huge first gradient stays in Adam's average of squares for thousands of updates.

    Args:
        v: The predicted velocity.
        target: What the velocity should be.
        x_t: The states; they are not read.
        t: The times; they are not read.

    Returns:
        The error of each row.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> v = jnp.array([[3.0, 4.0]])
        >>> error = losses.squared_and_cosine_error(v, -v, v, jnp.ones(1))
        >>> round(float(error[0]), 2)  # (6^2 + 8^2) / 2 + 2
        52.0

    References:
        Peng, Zhu, Liu, Wu, Li, Sun, Wu, *Flow-Anchored Consistency Models*, 2025, arXiv:2507.03738.
            The added 0.1^2 is ours.
    """
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
    """Flow-anchored consistency: the average velocity to data, anchored by the velocity.

    Also known as: FACM, flow-anchored consistency.

    The loss is the sum, mean over rows, of two errors at x_t = (1 - t) x0 + t x1 with velocity v
    there:

        shortcut   cos(pi t / 2) e / sg(e + c)^power,    e the mean over the event of
                   |u - sg(u - (1 - t^relax) clip(g))|^2,    u = u(x_t, t, 1),
                   g = u - (v + (1 - t) du/dt),
                   clip to [-clip, clip], number by number;
        anchor     anchor(u(x_t, t, t), v, x_t, t).

    du/dt is along the trajectory, (v, 1, 0) in (x, t, r); g = 0 is the identity of the average
    velocity to r = 1. The shortcut is the preset of `flow_map_residual` at r = 1 with the clipped
    and shortened g for its tangent; the anchor is a regression beside it.

    Args:
        flow_map: The average velocity u that is trained, at r = 1 and at r = t.
        teacher: The teacher, whose params are frozen['teacher'] (`guidance.cfg` of it for a guided
            one): v is its velocity. None takes v = x1 - x0, from scratch.
        time: The law of t. By default (2 / pi) arctan(exp(n)) is 1 - t, n normal of mean -0.8 and
            deviation 1.6, as in the published distillation.
        anchor: The error of the velocity, (v, target, x_t, t) -> [b], a mean over the event as e
            is. `losses.mean_squared_error` has its minimum at the marginal velocity; the cosine of
            a conditional target does not.
        relax: The exponent of 1 - t^relax, above 0; 0.5 as published.
        clip: The bound of each number of g, above 0; 1 as published.
        power: The exponent of `adaptive_weight`, not negative; 0.5 as published. With power = 0 and
            clip = inf the squared error is left, whose mean gradient from scratch vanishes at the
            exact u. Clipping and the weight by a row's own error move that point.
        c: The constant of `adaptive_weight`, above 0.
        jvp: `jax.jvp`, or `solvers.finite_difference(h)` for a network that has an operation
            without a forward-mode derivative.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. Its metrics are 'residual', the mean over event and rows of g^2, and
        'anchor'.

    Raises:
        ValueError: At construction for relax, clip or c <= 0 or power < 0; at trace time for a
            teacher without frozen['teacher'], a velocity or an anchor of another shape, a batch
            without 'x' or with unknown keys, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses, oracles
        >>> law = oracles.gaussian([0.0, 1.0], 0.25)
        >>> exact, teacher = oracles.as_average_velocity(law), oracles.as_velocity(law)
        >>> loss = losses.anchored_consistency(exact, teacher=teacher)
        >>> value, metrics = loss({}, jax.random.key(0), {"x": jnp.ones((4, 2))}, {"teacher": {}})
        >>> sorted(metrics), float(value) < 1e-5
        (['anchor', 'residual'], True)

    References:
        Peng, Zhu, Liu, Wu, Li, Sun, Wu, *Flow-Anchored Consistency Models*, 2025, arXiv:2507.03738;
            the weights are those of its public code (its times run as here).
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
        x_t = on_line(x0, x1, t)
        v = line_velocity(name, teacher, frozen, x0, x1, cond)(x_t, t)
        x = x_t.astype(x1.dtype)
        far_key, near_key = jax.random.split(dropout_key)
        g, residual = flow_map_residual(
            name,
            flow_map,
            params,
            x,
            t,
            jnp.ones_like(t),
            v,
            cond,
            tangent=lambda g: expand_to(1 - t**relax, g) * jnp.clip(g, -clip, clip),
            key=far_key,
            jvp=jvp,
        )
        error = mean_event(jnp.square(g))
        shortcut = jnp.cos(jnp.pi / 2 * t) * adaptive_weight(error, power, c) * error
        now = like_state(name, flow_map.apply(params, x, t, t, cond, key=near_key), x)
        near = check_same_shape(name, "an anchor", anchor(now.astype(v.dtype), v, x_t, t), t)
        metrics = {
            "residual": mean_of_rows(mean_event(jnp.square(residual)), weight),
            "anchor": mean_of_rows(near, weight),
        }
        return mean_of_rows(shortcut + near, weight), jax.lax.stop_gradient(metrics)

    return loss
