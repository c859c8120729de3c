"""Self-corrected flow distillation: consistency, agreement of one step and many, a discriminator.

    loss = losses.self_corrected(velocity, teacher, discriminator)
    judge = discriminator.init(key, x, jnp.ones(len(x)), cond)
    params = {"student": teacher_params, "discriminator": judge}
    # the optimizer is an optax.partition as in `jflow.losses.adversarial`
    frozen = {"teacher": teacher_params}
    state = train.init_state(params, optimizer, key, ema=0.999, frozen=frozen)
    student = solvers.consistency_map(velocity)
    x1, info = solvers.sample_flow_map(student, params["student"], x0)     # renoise=1.0, key=key

The paper is Dao, Phung, Dao, Metaxas, Tran, *Self-Corrected Flow Distillation for Consistent
One-Step and Few-Step Text-to-Image Generation*, 2025 (its time is 1 - t); the form of the terms is
that of its code.
"""

import jax
import jax.numpy as jnp

from jflow import times as time_laws
from jflow._core.arrays import expand_to, float_dtype, mean_event
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_same_shape, check_weights, frozen_entry, like_state
from jflow._core.keys import same_draws
from jflow._core.line import line
from jflow.losses._adversarial import (
    GanObjective,
    adversarial,
    fixed_steps,
    non_saturating_gan,
    student_only,
    sum_losses,
)
from jflow.losses._errors import Metric, mean_squared_error
from jflow.losses._pairs import draw_pairs
from jflow.types import Field, Loss, Time, Velocity

__all__ = ["self_corrected", "self_correction"]

_UNIFORM, _NON_SATURATING = time_laws.uniform(), non_saturating_gan()


def self_correction(
    velocity: Velocity,
    teacher: Velocity,
    *,
    time: Time = _UNIFORM,
    reach: float = 0.05,
    metric: Metric = mean_squared_error,
    backward: float = 0.1,
    correction: float = 0.01,
) -> Loss:
    """The student's part of self-corrected flow distillation.

    The student is a consistency model f(x, t) = x + (1 - t) F(x, t). The loss is the sum of three
    terms, the last two with the weights of their names:

        forward     metric of f(x_t, t) and f'(x_t + a v, t + a), a ~ U(0, min(reach, 1 - t))
        backward    metric of f(x_t, t) and f'(x_t - b v, t - b), b ~ U(0, min(reach, t))
        correction  |f(z_t, t) - y|^2,   y = f(x0, 0),   z_t = (1 - t) x0 + t y

    v = teacher(x_t, t), an Euler step; f' has the params frozen['ema']; no gradient through f' and
    y; x_t = (1 - t) x0 + t x1. By `correction` the one step stays what it is from every t. The
    first two hold at the teacher's exact f up to the step; correction holds there on straight
    trajectories, and elsewhere bends the student's few-step samples towards its one-step ones, as
    the paper wants them.

    Only the data end of a trajectory is known from the start: `forward` carries it back to the
    noise. With backward = 1 each point is drawn to both its neighbors alike, and what is known
    spreads as heat does, many times slower. (Eight Gaussians, two seeds, 5000 updates, an average
    of 0.95, no correction, W2 of one step less that of data: 0.031 with backward 0.1 and reach 0.1,
    0.953 with backward 1 and reach 0.3, where the teacher's own step is at 1.126.) A short memory
    of the average makes it faster: each reach waits for it. `forward` compares neighbors, whose
    errors are of the size of the reach: its squares are small beside those of `correction`, which
    holds the student at its first guess where it weighs as much.

    Args:
        velocity: The student F.
        teacher: The teacher, whose params are frozen['teacher'].
        time: The law of the times, (key, n) -> t [n].
        reach: The longest step a and b, in (0, 1].
        metric: The error of predicted data, (prediction, target, x_t, t) -> [b]; correction is a
            mean of squares over the event.
        backward: The weight of `backward`, not negative; the default is ours.
        correction: The weight of `correction`, not negative; the default is ours.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. It reads frozen['teacher'] and frozen['ema'] (make_step's ema). Its metrics
        are 'residual', the mean square of forward's and backward's errors together, and
        'correction'.

    Raises:
        ValueError: At construction for reach outside (0, 1] or weights out of range; at trace time
            for what frozen lacks, a velocity or a metric of another shape, a batch without 'x' or
            with unknown keys, and a key that is None.

    References:
        Dao, Phung, Dao, Metaxas, Tran, *Self-Corrected Flow Distillation for Consistent One-Step
            and Few-Step Text-to-Image Generation*, 2025, arXiv:2412.16906. The paper's code
            replaces targets near the data by the data; not here.
    """
    name = "self_correction"
    if not 0 < reach <= 1:
        raise ValueError(f"{name}: expected reach in (0, 1], got {reach}")
    check_weights(name, backward=backward, correction=correction)

    def loss(params, key, batch, frozen=None):
        given, average = frozen_entry(name, frozen), frozen_entry(name, frozen, "ema")
        x0, x1, cond, weight, t, step_key, dropout_key = draw_pairs(name, key, batch, time)
        x_t, _ = line(x0, x1, t)
        v = like_state(name, teacher.apply(given, x_t, t, cond), x_t)
        ahead, behind = jax.random.uniform(step_key, (2, t.shape[0]), t.dtype)
        steps = ahead * jnp.minimum(reach, 1 - t), -behind * jnp.minimum(reach, t)

        def data(params, x, t):
            out = like_state(
                name,
                velocity.apply(params, x.astype(x1.dtype), t, cond, key=same_draws(dropout_key)),
                x_t,
            )
            return x.astype(float_dtype(x)) + expand_to(1 - t, x) * out

        here = data(params, x_t, t)
        near = [
            jax.lax.stop_gradient(data(average, x_t + expand_to(s, v) * v, t + s)) for s in steps
        ]
        forward, back = (
            mean_of_rows(check_same_shape(name, "a metric", metric(here, there, x_t, t), t), weight)
            for there in near
        )
        residual = sum(mean_of_rows(mean_event(jnp.square(here - there)), weight) for there in near)

        y = jax.lax.stop_gradient(data(params, x0, jnp.zeros_like(t)))
        z_t, _ = line(x0, y, t)
        kept = mean_of_rows(mean_event(jnp.square(data(params, z_t, t) - y)), weight)
        return forward + backward * back + correction * kept, {
            "residual": residual,
            "correction": kept,
        }

    return loss


def self_corrected(
    velocity: Velocity,
    teacher: Velocity,
    discriminator: Field,
    *,
    time: Time = _UNIFORM,
    reach: float = 0.05,
    metric: Metric = mean_squared_error,
    backward: float = 0.1,
    correction: float = 0.01,
    objective: GanObjective = _NON_SATURATING,
    weight: float = 0.01,
    r1: float = 0.0,
) -> Loss:
    """Self-corrected flow distillation: `self_correction` and a discriminator of one step.

    The one step is x0 + F(x0, 0), judged as in `adversarial`. Both losses are one scalar of params
    {'student', 'discriminator'}.

    Args:
        velocity: The student F.
        teacher: The teacher, whose params are frozen['teacher'].
        discriminator: The field (x [b, *event], t = 1, cond) -> logits [b, ...], or a pytree of
            them, one leaf a head.
        time: The law of the times, (key, n) -> t [n].
        reach: The longest step of `self_correction`, in (0, 1].
        metric: The error of predicted data, (prediction, target, x_t, t) -> [b].
        backward: The weight of its second term, not negative; the default is ours.
        correction: The weight of its third term, not negative; the default is ours.
        objective: What the players pay, a `GanObjective`.
        weight: The weight of the student's part of the objective, not negative; the default is
            ours.
        r1: The weight of the gradient penalty on the data.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. It reads frozen['teacher'] and frozen['ema'] (make_step's, of both players).
        Its metrics are 'map/...' and 'gan/...', those of the two losses.

    Raises:
        ValueError: At construction for reach outside (0, 1] or weights out of range; at trace time
            for what params or frozen lack, outputs of another shape, a batch without 'x' or with
            unknown keys, and a key that is None.

    References:
        Dao, Phung, Dao, Metaxas, Tran, *Self-Corrected Flow Distillation for Consistent One-Step
            and Few-Step Text-to-Image Generation*, 2025, arXiv:2412.16906.
    """
    one_step = fixed_steps(velocity, 1)
    student = self_correction(
        velocity,
        teacher,
        time=time,
        reach=reach,
        metric=metric,
        backward=backward,
        correction=correction,
    )
    gan = adversarial(one_step, discriminator, objective=objective, weight=weight, r1=r1)
    return sum_losses({"map": student_only(student), "gan": gan})
