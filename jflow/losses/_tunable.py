"""One step from a degraded picture, with a knob: fidelity at 0, realism at 1.

    source = couplings.corrupted(couplings.block_means(4), sigma=0.1)
    distill = losses.tunable_distillation(velocity, velocity)
    loss = losses.chain(couplings.with_source(source), distill)
    ... params = teacher_params to start from, frozen={'teacher': teacher_params} ...
    x0, cond = source(key, picture, None)    # or seen + sigma noise, where no clean one is known
    x1 = solvers.restore(velocity, params, x0, 0.99, cond)

Any source of `jflow.couplings` will do, and any pairs (x0, x) that a teacher was trained on.
"""

import diffrax
import jax
import jax.numpy as jnp

from jflow import solvers
from jflow import times as time_laws
from jflow._core.arrays import expand_to, float_dtype, mean_event
from jflow._core.batch import mean_of_rows
from jflow._core.checks import (
    check_weights,
    frozen_entry,
    like_state,
    need_pairs,
    with_checked_output,
)
from jflow._core.keys import same_draws
from jflow.losses._pairs import draw_pairs
from jflow.losses._teacher import average_velocity, steps_of_segment
from jflow.solvers import Method
from jflow.types import Loss, Time, Velocity

__all__ = ["tunable_distillation"]

_KNOB, _MIDPOINT = time_laws.uniform(0.01, 0.99), solvers.fixed(1, diffrax.Midpoint())


def tunable_distillation(
    velocity: Velocity,
    teacher: Velocity,
    *,
    knob: Time = _KNOB,
    step: float = 0.05,
    method: Method | int | None = None,
    boundary: float = 0.1,
    align: float = 0.0,
) -> Loss:
    """A one-step student with a knob between fidelity and realism (OFTSR).

    The student gets the source x0 and the knob t. Its chords x_t = x0 + t v(x0, t) lie on the
    teacher's trajectory from x0: v(x0, t) is the teacher's average velocity from time 0 to t. With
    s = t + step and V the teacher's average velocity from x_t at t to s, by `method`,

        v(x0, s) = sg(v(x0, t) + (step / s) (V - v(x0, t)))

    is regressed. As step -> 0 this is d/dt [t v(x0, t)] = v_teacher(x_t, t),
    `lagrangian_map_distillation` at t = 0. Further terms, each with the weight of its name:

        boundary   v(x0, 0) = v_teacher(x0, 0)                    where the recursion starts
        align      (1 - t)^2 (v(x0, t) - v_teacher(x_t, t))^2    its x1 is the teacher's

    `align` holds on straight trajectories alone and pulls knobs towards each other. Every term is a
    mean of squares over the event.

    Args:
        velocity: The student; the teacher's network and params will do to start from. Its time is
            the knob: no solver carries it.
        teacher: The teacher, whose params are frozen['teacher'].
        knob: The law of t, (key, n) -> t [n].
        step: The distance s - t, in (0, 1], shortened where s would exceed 1.
        method: The teacher's steps from t to s, a number or `solvers.fixed(n, solver)`, by default
            one of the midpoint method.
        boundary: The weight of `boundary`, not negative.
        align: The weight of `align`, not negative.

    Returns:
        A loss of the batch {'x0' [b, *event] the sources, 'x' in its shape (not read), optionally
        'cond', 'weight' [b]}, which `couplings.with_source` makes. Its metrics are 'residual', the
        mean square of the recursion's error times s / step (of v + t dv/dt - v_teacher, up to the
        step), and 'boundary' and 'align' where they have a weight.

    Raises:
        ValueError: At construction for step outside (0, 1] and for weights out of range; at trace
            time without 'x0' in batch or frozen['teacher'], for a velocity of another shape, a
            batch without 'x' or with unknown keys, and a key that is None.

    References:
        Zhu, Wang, Lu, Yan, Li, Zhang, *OFTSR: One-Step Flow for Image Super-Resolution with Tunable
            Fidelity-Realism Trade-offs*, 2024, arXiv:2412.09465. The weights and the step are its
            code's for faces, whose align is 0.01.
    """
    name = "tunable_distillation"
    if not 0 < step <= 1:
        raise ValueError(f"{name}: expected step in (0, 1], got {step}")
    check_weights(name, boundary=boundary, align=align)
    method = steps_of_segment(name, method, _MIDPOINT)
    teacher = with_checked_output(f"{name}: teacher", teacher)

    def loss(params, key, batch, frozen=None):
        need_pairs(name, batch)
        given = frozen_entry(name, frozen)
        x0, _, cond, weight, t, _, dropout_key = draw_pairs(name, key, batch, knob)
        x, kind = x0.astype(float_dtype(x0)), x0.dtype
        s = jnp.minimum(t + step, 1)
        share = expand_to(
            jnp.maximum((s - t) / s, jnp.finfo(x.dtype).eps), x
        )  # t = 1 has no step to learn from

        def student(time):
            v = like_state(
                name, velocity.apply(params, x0, time, cond, key=same_draws(dropout_key)), x0
            )
            return v.astype(x.dtype)

        def mean(error):
            return mean_of_rows(mean_event(jnp.square(error)), weight)

        v_t = student(t)
        x_t = jax.lax.stop_gradient(x + expand_to(t, x) * v_t)
        onward = average_velocity(teacher, given, x_t, t, s, cond, method=method)
        before = jax.lax.stop_gradient(v_t)
        error = student(s) - (before + share * (onward - before))
        value = mean(error)
        metrics = {"residual": mean(jax.lax.stop_gradient(error) / share)}
        if boundary > 0:
            start = jnp.zeros_like(t)
            metrics["boundary"] = mean(student(start) - teacher.apply(given, x0, start, cond))
            value = value + boundary * metrics["boundary"]
        if align > 0:
            metrics["align"] = mean(
                expand_to(1 - t, x) * (v_t - teacher.apply(given, x_t.astype(kind), t, cond))
            )
            value = value + align * metrics["align"]
        return value, metrics

    return loss
