"""MeanFlow: the average velocity, learned from the identity that ties it to the velocity.

x_r = x + (r - t) u(x, t, r) does not move when (x, t) slides along its trajectory; d/dt of it, with
r fixed, gives

    u = v + (r - t) du/dt,        du/dt = (d_x u) v + d_t u,

one forward-mode pass beside the network's own. The papers' time runs from data to noise; t, r and v
are theirs reversed, and so the sign before du/dt is +, where theirs is -.

    model = jflow.flow_map(nets.ResidualMLP(128))
    step = train.make_step(losses.mean_flow(model), optimizer, ema=0.999)
    ... fit ...
    x1, info = solvers.sample_flow_map(model, params, x0)      # one evaluation; steps=n takes n
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, mean_event
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_flow_map, like_state
from jflow._core.keys import same_draws
from jflow._core.line import on_line
from jflow._core.numbers import check_number, number_at
from jflow._core.times import check_pairs
from jflow.guidance import guided
from jflow.losses._errors import mean_squared_error
from jflow.losses._pairs import draw_pairs, dropped_rows
from jflow.losses._residual import adaptive_weight, flow_map_residual
from jflow.losses._teacher import line_velocity
from jflow.solvers import JVP, instantaneous_velocity
from jflow.times import logit_normal, pairs
from jflow.types import (
    Array,
    Cond,
    FlowMap,
    Loss,
    NumberOrFunction,
    PyTree,
    TimePair,
    Velocity,
)

__all__ = ["improved_mean_flow", "mean_flow"]

_PAIRS = pairs(logit_normal(0.4, 1.0), equal=0.75)
_HALF = pairs(logit_normal(0.4, 1.0), equal=0.5)


def mean_flow(
    flow_map: FlowMap,
    *,
    times: TimePair = _PAIRS,
    teacher: Velocity | None = None,
    power: float = 0.0,
    c: float = 1e-3,
    omega: float = 1.0,
    kappa: NumberOrFunction = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    null: PyTree = None,
    jvp: JVP = jax.jvp,
) -> Loss:
    """MeanFlow: trains an average velocity from data, for sampling in one step or a few.

    Also known as: MeanFlow, mean flow loss, average velocity, one-step MeanFlow.

    At the times of `times`, on the linear path x_t = (1 - t) x0 + t x1 with v = x1 - x0, the loss
    is the mean over rows of

        e / sg(e + c)^power,
        e the mean over the event of (u(x_t, t, r) - sg(v + (r - t) du/dt))^2,

    with du/dt along (v, 1, 0) in (x, t, r). It is the preset of `flow_map_residual` with
    `adaptive_weight`. Where r = t it is flow matching. It is not an objective: v's spread stays in
    e, and at the exact u the loss is neither zero nor lowest. What holds at the exact u is that the
    mean gradient is zero, for power = 0: the error is linear in v. Other powers weigh a row by its
    own error, and move that point where the errors of rows differ much, in events of few numbers.
    For images the paper has power = 1, or 0.75. (Eight Gaussians of radius 2 in the plane, in one
    run: W2 of four steps 0.35 with power 0, 0.46 with 1; between two sets of samples 0.36.)

    Guidance is inside the target. For interval[0] <= t <= interval[1],

        v <- omega v + kappa u(x_t, t, t, cond) + (1 - omega - kappa) u(x_t, t, t, null),

    in the target and in the direction of du/dt: what is learned is the field guided by the scale
    omega / (1 - kappa), in one evaluation.

    Args:
        flow_map: The average velocity u that is trained.
        times: The law of the pairs of times, (key, n) -> (t, r), t <= r. Rows with r = t keep the
            velocity itself learned; the paper's share of them is 0.75.
        teacher: The marginal velocity to use for v, with params frozen['teacher']: distillation,
            and no spread in e. None takes x1 - x0.
        power: The paper's p, not negative.
        c: The paper's c, above 0. It is for the mean over the event, where the published code has
            the sum, whose c is ours times the size of the event.
        omega: The share of v in the guided target, above 0; 1 with kappa = 0 is no guidance.
        kappa: The share of the network's own prediction, a number in [0, 1) or a function of cond
            -> [b]. With the scale w of each row as a part of cond, omega = 1 and
            `kappa = lambda cond: 1 - 1 / cond['w']` train one model for every w.
        interval: The times (low, high) in [0, 1] between which v is guided.
        null: The row of cond, without the batch axis, that stands for no condition; guidance needs
            it. `losses.drop_cond` with the same null comes before the loss: the rows that it
            dropped have the plain v.
        jvp: `jax.jvp`, or `solvers.finite_difference(h)` for a network that has an operation
            without a forward-mode derivative.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b], 'dropped' [b]}. Its metrics are {'residual'}, the mean of e over rows.

    Raises:
        ValueError: At construction for times out of order, for power, c, omega or kappa outside
            their ranges, for an interval that is not in [0, 1], and for guidance without null; at
            trace time for guidance without 'cond', a teacher without frozen['teacher'], a map or a
            kappa of another shape, a batch without 'x' or with unknown keys, and a key that is
            None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses, oracles
        >>> law = oracles.gaussian([0.0, 1.0], 0.25)
        >>> exact, teacher = oracles.as_average_velocity(law), oracles.as_velocity(law)
        >>> loss = losses.mean_flow(exact, teacher=teacher)
        >>> value, metrics = loss({}, jax.random.key(0), {"x": jnp.ones((4, 2))}, {"teacher": {}})
        >>> float(value) < 1e-6
        True

    References:
        Geng, Deng, Bai, Kolter, He, *Mean Flows for One-step Generative Modeling*, 2025,
            arXiv:2505.13447. A kappa that is a function is ours.
        On rectified pairs (`data.truncate_pairs`): Zhang et al., *Flow Straighter and Faster:
            Efficient One-Step Generative Modeling via MeanFlow on Rectified Trajectories*, 2025,
            arXiv:2511.23342.
    """
    name = "mean_flow"
    check_flow_map(name, flow_map)
    _check_weight(name, power, c)
    read = _reader(
        name, instantaneous_velocity(flow_map), times, teacher, omega, kappa, interval, null
    )

    def loss(params, key, batch, frozen=None):
        x, v, t, r, cond, weight, dropout_key = read(params, key, batch, frozen)
        g, _ = flow_map_residual(name, flow_map, params, x, t, r, v, cond, key=dropout_key, jvp=jvp)
        error = mean_event(jnp.square(g))
        value = mean_of_rows(adaptive_weight(error, power, c) * error, weight)
        return value, {"residual": mean_of_rows(error, weight)}

    return loss


def improved_mean_flow(
    flow_map: FlowMap,
    *,
    head: Velocity | None = None,
    times: TimePair = _HALF,
    teacher: Velocity | None = None,
    power: float = 0.0,
    c: float = 1e-3,
    omega: float = 1.0,
    kappa: NumberOrFunction = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    null: PyTree = None,
    jvp: JVP = jax.jvp,
) -> Loss:
    """Improved MeanFlow: `mean_flow` along the velocity that the network predicts.

    Also known as: iMF.

    The direction of du/dt is the predicted velocity v_p, not x1 - x0, so that what is compared with
    v depends on (x_t, t, r) alone, and the spread of v is no longer multiplied by d_x u:

        error = u(x_t, t, r) - (r - t) sg(du/dt) - sg(v),     du/dt along (v_p, 1, 0).

    It is the preset of `flow_map_residual` with v_p for the direction; the loss of a row is that of
    `mean_flow`.

    Args:
        flow_map: The average velocity u that is trained.
        head: v_p as a second output of the network, a `Velocity` that takes the same params as
            flow_map (unused when sampling). It is trained by its own mean squared error from v,
            weighed like the other and added. None takes v_p = u(x_t, t, t), which the rows with r =
            t train; then those must not be rare.
        times: The law of the pairs of times, (key, n) -> (t, r), t <= r.
        teacher: The marginal velocity to use for v, with params frozen['teacher']. None takes x1 -
            x0.
        power: The exponent of `adaptive_weight`, not negative.
        c: The constant of `adaptive_weight`, above 0, for a mean over the event.
        omega: Guidance inside the target, as in `mean_flow` with v_p for the two predictions; the
            paper's guidance is omega = 1, kappa = 1 - 1 / w.
        kappa: The share of the network's own prediction, a number in [0, 1) or a function of cond
            -> [b].
        interval: The times (low, high) in [0, 1] between which v is guided.
        null: The row of cond, without the batch axis, that stands for no condition. A dropped row
            has the whole null in its place, a w in it included.
        jvp: `jax.jvp`, or `solvers.finite_difference(h)` for a network that has an operation
            without a forward-mode derivative.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b], 'dropped' [b]}. Its metrics are 'residual', the mean of error^2, and with a
        head 'head', its mean squared error.

    Raises:
        ValueError: At construction for times out of order, for power, c, omega or kappa outside
            their ranges, for an interval that is not in [0, 1], and for guidance without null; at
            trace time for guidance without 'cond', a teacher without frozen['teacher'], a map or a
            kappa of another shape, a batch without 'x' or with unknown keys, and a key that is
            None.

    References:
        Geng, Lu, Wu, Shechtman, Kolter, He, *Improved Mean Flows: On the Challenges of Fastforward
            Generative Models*, 2025, arXiv:2512.02012 (its time is 1 - t).
    """
    name = "improved_mean_flow"
    check_flow_map(name, flow_map)
    _check_weight(name, power, c)
    velocity = instantaneous_velocity(flow_map) if head is None else head
    read = _reader(name, velocity, times, teacher, omega, kappa, interval, null)

    def loss(params, key, batch, frozen=None):
        x, v, t, r, cond, weight, dropout_key = read(params, key, batch, frozen)
        predicted = like_state(name, velocity.apply(params, x, t, cond, key=dropout_key), x)
        g, _ = flow_map_residual(
            name,
            flow_map,
            params,
            x,
            t,
            r,
            v,
            cond,
            direction=jax.lax.stop_gradient(predicted),
            key=same_draws(dropout_key),
            jvp=jvp,
        )
        errors = {"residual": mean_event(jnp.square(g))}
        if head is not None:
            errors["head"] = mean_squared_error(predicted, v, x, t)
        total = sum(adaptive_weight(error, power, c) * error for error in errors.values())
        return mean_of_rows(total, weight), {
            what: mean_of_rows(error, weight) for what, error in errors.items()
        }

    return loss


class _Row(NamedTuple):
    """Rows of the linear path, x and v in float32 or better."""

    x: Array
    v: Array  # the target, guided, without gradient
    t: Array
    r: Array
    cond: Cond
    weight: Array | None
    dropout_key: Any


def _reader(name, velocity, times, teacher, omega, kappa, interval, null):
    """(params, key, batch, frozen) -> _Row, and the checks that both losses share."""
    check_pairs(name, times)
    guide = callable(kappa) or omega != 1 or kappa != 0
    if not 0 < omega < math.inf:
        raise ValueError(f"{name}: expected a finite omega > 0, got {omega}")
    check_number(name, "kappa", kappa, "in [0, 1)", lambda k: 0 <= k < 1, of="cond")
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"{name}: expected interval = (low, high) with 0 <= low <= high <= 1, got {interval}"
        )
    if guide and null is None:
        raise ValueError(
            f"{name}: guidance needs null, the row of cond that stands for no condition, got None"
        )

    def read(params, key, batch, frozen):
        x0, x1, cond, weight, (t, r), _, dropout_key = draw_pairs(name, key, batch, times)
        if guide and cond is None:
            raise ValueError(
                f"{name}: guidance needs 'cond' in batch, got the keys {sorted(batch)}"
            )
        x = on_line(x0, x1, t)
        v = line_velocity(name, teacher, frozen, x0, x1, cond)(x, t)
        if guide:
            k = expand_to(number_at(name, "kappa(cond)", kappa, cond, like=t).astype(x.dtype), x)
            predicted = guided(
                velocity, lambda yes, no, x, t: k * yes + (1 - omega - k) * no, null=null
            )
            plain = expand_to(dropped_rows(batch, t.shape[0]) | (t < low) | (t > high), x)
            v = jnp.where(plain, v, omega * v + predicted.apply(params, x, t, cond))
        return _Row(x, jax.lax.stop_gradient(v), t, r, cond, weight, dropout_key)

    return read


def _check_weight(name, power, c):
    if not 0 <= power < math.inf or not 0 < c < math.inf:
        raise ValueError(
            f"{name}: expected a finite power >= 0 and c > 0, got power={power}, c={c}"
        )
