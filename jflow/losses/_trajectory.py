"""Distillation of a teacher's trajectories into a flow map, with self-consistency."""

import diffrax
import jax
import jax.numpy as jnp

from jflow import solvers
from jflow import times as time_laws
from jflow._core.arrays import expand_to, float_dtype, mean_event
from jflow._core.batch import mean_of_rows
from jflow._core.checks import (
    check_flow_map,
    check_weights,
    frozen_entry,
    like_state,
    with_checked_output,
)
from jflow._core.keys import same_draws
from jflow._core.line import line
from jflow._core.times import check_pairs
from jflow.losses._pairs import draw_pairs
from jflow.losses._teacher import average_velocity, steps_of_segment
from jflow.solvers import Method
from jflow.types import FlowMap, Loss, TimePair, Velocity

__all__ = ["trajectory_distillation"]

_PAIRS, _HEUN = time_laws.pairs(), solvers.fixed(4, diffrax.Heun())


def trajectory_distillation(
    flow_map: FlowMap,
    teacher: Velocity,
    *,
    times: TimePair = _PAIRS,
    method: Method | int | None = None,
    output: float = 1.0,
    change: float = 1.0,
    consistency: float = 1.0,
    straight: float = 0.0,
) -> Loss:
    """Distillation of a teacher's trajectories into a flow map, with consistency (TraFlow).

    From x_t = (1 - t) x0 + t x1 the teacher's ODE goes on to X_r and X_1; the student, f(x, t, r) =
    x + (r - t) u, learns

        output       f(x_t, t, 1) = X_1                        what the teacher makes of x_t
        change       u(x_t, t, r) = (X_r - x_t) / (r - t)      by how much (its v(x_t, t) at r = t)
        consistency  f(x_t, t, 1) = sg f(f(x_t, t, r), r, 1)   one jump is as good as two
        straight     u(x_t, t, r) = sg u(x_t, t, 1)            the way is a line

    each a mean of squares over the event, summed with the weights of these names. The first three
    hold at the teacher's own flow map. `straight` holds there only where the teacher's trajectories
    are straight (a rectified flow); elsewhere it bends the student away from them, between ends
    that `output` holds. It trains t <= r <= 1, r = 1 always, for `solvers.sample_flow_map` in any
    number of steps. Pairs (x0, x) that the teacher connects give the states of reflow. It is no
    preset of `flow_map_residual`: the teacher's ODE is solved, and no derivative of the map is
    taken.

    Args:
        flow_map: The average velocity u that is trained.
        teacher: The teacher, whose params are frozen['teacher'].
        times: The law of the pairs of times, (key, n) -> (t, r), t <= r.
        method: The teacher's steps from t to r, and as many from r to 1, a number or
            `solvers.fixed(n, solver)`, by default 4 of Heun.
        output: The weight of `output`, not negative. A weight of 0 leaves a term out.
        change: The weight of `change`, not negative.
        consistency: The weight of `consistency`, not negative.
        straight: The weight of `straight`, not negative.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. Its metrics are 'residual', the sum of the first three without weights, and
        the four by name.

    Raises:
        ValueError: At construction for times, methods or weights out of range; at trace time
            without frozen['teacher'], for a map or a teacher of another shape, a batch without 'x'
            or with unknown keys, and a key that is None.

    References:
        Wu, Fan, Wu, Cao, *TraFlow: Trajectory Distillation on Pre-Trained Rectified Flow*, 2025,
            arXiv:2502.16972. The three targets are the paper's (output, changes, self-consistency);
            the form of every term is ours.
    """
    name = "trajectory_distillation"
    check_pairs(name, times)
    weights = {"output": output, "change": change, "consistency": consistency, "straight": straight}
    check_weights(name, **weights)
    if not any(weights.values()):
        raise ValueError(f"{name}: expected one of {', '.join(weights)} above 0, got none")
    check_flow_map(name, flow_map)
    method = steps_of_segment(name, method, _HEUN)
    teacher = with_checked_output(f"{name}: teacher", teacher)

    def loss(params, key, batch, frozen=None):
        pairs = draw_pairs(name, key, batch, times)
        x0, x1, cond, weight, (t, r), _, dropout_key = pairs
        x_t, _ = line(x0, x1, t)
        end = jnp.ones_like(t)

        def taught(x, t, r):
            given = frozen_entry(name, frozen)
            return average_velocity(teacher, given, x, t, r, cond, method=method)

        def student(params, x, t, r):
            u = flow_map.apply(params, x.astype(x_t.dtype), t, r, cond, key=same_draws(dropout_key))
            return like_state(name, u, x_t).astype(float_dtype(x_t))

        x = x_t.astype(float_dtype(x_t))
        to_r, to_end = (expand_to(time - t, x) for time in (r, end))
        rest = expand_to(end - r, x)
        average = taught(x_t, t, r)
        x_r = x + to_r * average
        x_end = x_r + rest * taught(x_r, r, end)

        u_r, u_end = student(params, x_t, t, r), student(params, x_t, t, end)
        there = jax.lax.stop_gradient(x + to_r * u_r)
        again = jax.lax.stop_gradient(there + rest * student(params, there, r, end))
        errors = {
            "output": x + to_end * u_end - x_end,
            "change": u_r - average,
            "consistency": x + to_end * u_end - again,
            "straight": u_r - jax.lax.stop_gradient(u_end),
        }
        terms = {
            what: mean_of_rows(mean_event(jnp.square(e)), weight) for what, e in errors.items()
        }
        value = sum(weights[what] * term for what, term in terms.items() if weights[what] > 0)
        residual = terms["output"] + terms["change"] + terms["consistency"]
        return value, {"residual": residual, **terms}

    return loss
