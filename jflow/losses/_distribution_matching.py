"""Distribution matching: samples of a student, noised, have the law that the teacher's have.

The student follows the difference of the two laws' scores. A second velocity, the fake one, follows
the law of the student's samples by flow matching; the teacher's knows that of the data. On the
linear path score = (t v - x) / (1 - t), so that scores differ by t / (1 - t) (v_fake - v_teacher).

    generate = lambda params, x0, cond: solvers.sample_flow_map(model, params, x0, cond)[0]
    loss = losses.distribution_matching(generate, velocity, teacher)    # params {'student', 'fake'}
    student = train.warm_start(model.init(...), teacher_params)
    params = {"student": student, "fake": teacher_params}
    slow = optax.MultiSteps(optax.adam(1e-6), 5).gradient_transformation()
    optimizer = optax.partition(
        {"student": slow, "fake": optax.adam(5e-6)}, {"student": "student", "fake": "fake"}
    )
    ... frozen={'teacher': teacher_params} ...

The loss is one scalar, and gradients are stopped so that each player's is its own. The fake
velocity has to follow closely: it moves five times for each move of the student above. A
discriminator joins by `losses.sum_losses`, with params {'student', 'fake', 'discriminator'}.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jflow import times as time_laws
from jflow._core.arrays import expand_to, float_dtype, mean_event
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_weights, frozen_entry, like_state, take_parts
from jflow._core.line import line
from jflow._core.times import partition
from jflow.losses._adversarial import Generate
from jflow.losses._pairs import draw_pairs
from jflow.solvers import apply_flow_map
from jflow.types import FlowMap, Loss, Time, Velocity

__all__ = [
    "ScoreWeight",
    "distribution_matching",
    "kl_weight",
    "inverse_error_weight",
    "shared_timesteps",
]

_TIMES = time_laws.uniform(0.02, 0.98)

ScoreWeight = Callable[[Array, Array, Array], Array]
"""(x1 of the student, x1 as the teacher sees it in x_t, t [b]) -> w [b].

w is the factor of v_fake - v_teacher."""


def kl_weight(
    x1: Float[Array, "b *event"], seen: Float[Array, "b *event"], t: Float[Array, " b"]
) -> Float[Array, " b"]:
    """The weight t^2 / (1 - t), with which the student's gradient is that of a KL divergence.

    The gradient, times the event's size, is that of KL(student's x_t, teacher's x_t).

    Args:
        x1: The student's samples [b, *event]; they are not read.
        seen: The data that the teacher predicts from x_t; it is not read.
        t: The times [b]; the weight diverges at 1.

    Returns:
        The weight of each row [b].
    """
    return t**2 / (1 - t)


def inverse_error_weight(
    x1: Float[Array, "b *event"], seen: Float[Array, "b *event"], t: Float[Array, " b"]
) -> Float[Array, " b"]:
    """The weight of DMD, (1 - t) / mean |x1 - seen|, for steps of like size at every t.

    The mean is over the event.

    Args:
        x1: The student's samples [b, *event].
        seen: The data that the teacher predicts from x_t, [b, *event].
        t: The times [b].

    Returns:
        The weight of each row [b].

    References:
        Yin, Gharbi, Zhang, Shechtman, Durand, Freeman, Park, *One-step Diffusion with Distribution
            Matching Distillation*, 2024, arXiv:2311.18828.
    """
    size = mean_event(jnp.abs(x1 - seen))
    return (1 - t) / jnp.maximum(size, jnp.finfo(size.dtype).eps)


def distribution_matching(
    generate: Generate,
    fake: Velocity,
    teacher: Velocity,
    *,
    time: Time = _TIMES,
    weight: ScoreWeight = inverse_error_weight,
    fake_weight: float = 1.0,
) -> Loss:
    """Distribution matching distillation (DMD) in velocities, of a student and a fake.

    Also known as: DMD, distribution matching distillation, distribution matching, reverse KL
    distillation.

    The loss is one scalar of params {'student', 'fake'}. With x1 = generate(student, x0, cond),
    noise z and x_t = (1 - t) z + t x1, the two players have

        student   the gradient of the mean over the event of x1 * sg(w (v_fake - v_teacher)(x_t, t))
        fake      (v_fake(x_t, t) - (x1 - z))^2, a mean over the event, no gradient to the student

    the first as a square, (x1 - sg(x1 - w (v_fake - v_teacher)))^2 / 2. Where the fake velocity is
    exact, w = `kl_weight` makes the student's gradient that of the KL divergence between the noised
    laws, at every t.

    Args:
        generate: The student (params, x0, cond) -> x1, in one step or in several, with a gradient
            through all of them (such as `fixed_steps`).
        fake: The velocity that follows the law of the student's samples, with params['fake'].
        teacher: The teacher, guided or not, whose params are frozen['teacher'].
        time: The law of t, (key, n) -> t [n]; at t = 1 `kl_weight` diverges.
        weight: The factor w, (x1 of the student, the data that the teacher predicts from x_t, t
            [b]) -> [b]: `inverse_error_weight` is DMD's.
        fake_weight: The weight of the fake's loss, not negative.

    Returns:
        A loss of the batch {'x' [b, *event], of which the shape alone is read, optionally 'x0'
        (standard normal when absent), 'cond', 'weight' [b]}. Its metrics are 'residual', the mean
        over event and rows of (v_fake - v_teacher)^2, and 'fake' and 'student', the two losses.

    Raises:
        ValueError: At construction for a negative fake_weight; at trace time for params without
            both players, without frozen['teacher'], for outputs or a weight of another shape, a
            batch without 'x' or with unknown keys, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> from jflow.types import Velocity
        >>> plus = Velocity(lambda *args: 0.0, lambda p, x, t, cond=None, *, key=None: x + p)
        >>> loss = losses.distribution_matching(lambda p, x0, cond: x0 + p, plus, plus)
        >>> params, frozen = {"student": 0.0, "fake": 0.5}, {"teacher": 0.0}
        >>> value, metrics = loss(params, jax.random.key(0), {"x": jnp.ones((4, 2))}, frozen)
        >>> round(float(metrics["residual"]), 4)
        0.25

    References:
        Yin, Gharbi, Zhang, Shechtman, Durand, Freeman, Park, *One-step Diffusion with Distribution
            Matching Distillation*, 2024, arXiv:2311.18828.
        Yin et al., *Improved Distribution Matching Distillation for Fast Image Synthesis*, 2024,
            arXiv:2405.14867 (no regression on pairs, more moves of the fake). In velocities:
            derived here.
    """
    name = "distribution_matching"
    check_weights(name, fake_weight=fake_weight)

    def loss(params, key, batch, frozen=None):
        student, imitator = take_parts(name, params, "student", "fake")
        given = frozen_entry(name, frozen)
        x0, x, cond, row_weight, t, noise_key, _ = draw_pairs(name, key, batch, time)
        x1 = like_state(name, generate(student, x0, cond), x)
        z = jax.random.normal(noise_key, x.shape, x.dtype)
        return _match(
            name, fake, teacher, imitator, given, x1, z, t, cond, weight, fake_weight, row_weight
        )

    return loss


def shared_timesteps(
    flow_map: FlowMap,
    fake: Velocity,
    teacher: Velocity,
    grid: ArrayLike,
    *,
    weight: ScoreWeight = inverse_error_weight,
    fake_weight: float = 1.0,
) -> Loss:
    """Distribution matching at the times of the student's own steps.

    The laws are compared where the student's next step starts. It goes to data from every time of
    the grid, x1_k = f(x_k, t_k, 1), and back to the next by fresh noise, x_{k+1} = (1 - t_{k+1}) z
    + t_{k+1} x1_k, as in `solvers.sample_flow_map(flow_map, params['student'], x0, grid=grid,
    renoise=1.0, key=key)`. Losses and players are those of `distribution_matching`, where (x_{k+1},
    t_{k+1}) is (x_t, t); the last step, which lands at 1, is noised back to the last time before.
    All steps weigh the same; no gradient runs from one into the steps before it. The fake velocity
    is that of all steps' samples together.

    Args:
        flow_map: The student; r = 1 alone is asked for, and `solvers.consistency_map(velocity)`
            will do.
        fake: The velocity that follows the law of the student's samples, with params['fake'].
        teacher: The teacher, guided or not, whose params are frozen['teacher'].
        grid: Rising times from 0 to 1, at least three.
        weight: The factor of v_fake - v_teacher, (x1 of the student, the data that the teacher
            predicts from x_t, t [b]) -> [b].
        fake_weight: The weight of the fake's loss, not negative.

    Returns:
        A loss of params {'student', 'fake'} and the batch {'x' [b, *event], of which the shape
        alone is read, optionally 'x0' (standard normal when absent), 'cond', 'weight' [b]}. Its
        metrics are 'residual', the mean over event and rows of (v_fake - v_teacher)^2, and 'fake'
        and 'student', the two losses.

    Raises:
        ValueError: At construction for another grid and a negative fake_weight; at trace time for
            params without both players, without frozen['teacher'], for outputs or a weight of
            another shape, a batch without 'x' or with unknown keys, and a key that is None.

    References:
        Bandyopadhyay, Entezari, Scott, Adithyan, Song, Jampani, *SD3.5-Flash: Distribution-Guided
            Distillation of Generative Flows*, 2025, arXiv:2509.21318. That the objective is taken
            on states of the student's trajectory, at its own times, is the paper's; that a state is
            reached by fresh noise, which makes the fake velocity's flow matching exact, and the
            rule for the last step are ours. The paper's split-timestep finetuning is two runs on
            parts of the grid and a weighted mean of their params; its adversarial term is
            `adversarial`.
    """
    name = "shared_timesteps"
    check_weights(name, fake_weight=fake_weight)
    knots = partition(name, grid)
    if len(knots) < 3:
        raise ValueError(f"{name}: expected a grid of at least three times, got {knots.tolist()}")
    levels = np.append(knots[1:-1], knots[-2])

    def loss(params, key, batch, frozen=None):
        student, imitator = take_parts(name, params, "student", "fake")
        given = frozen_entry(name, frozen)
        pairs = draw_pairs(name, key, batch, _at_source)
        x0, x, cond, row_weight, _, noise_key, dropout_key = pairs
        dtype, n, count = float_dtype(x), x.shape[0], len(levels)

        def step(state, now):
            t, level, noise_key, dropout_key = now
            x1 = apply_flow_map(flow_map, student, state, t, 1.0, cond, key=dropout_key)
            z = jax.random.normal(noise_key, x.shape, x.dtype)
            back, _ = line(z, jax.lax.stop_gradient(x1), jnp.broadcast_to(level, (n,)))
            return back.astype(x.dtype), (x1, z)

        times = jnp.asarray(knots[:-1], dtype), jnp.asarray(levels, dtype)
        keys = jax.random.split(noise_key, count), jax.random.split(dropout_key, count)
        _, (x1, z) = jax.lax.scan(step, x0.astype(x.dtype), (*times, *keys))
        x1, z = (a.reshape(count * n, *x.shape[1:]) for a in (x1, z))
        t = jnp.repeat(times[1], n)
        cond, row_weight = jax.tree.map(
            lambda c: jnp.tile(c, (count,) + (1,) * (c.ndim - 1)), (cond, row_weight)
        )
        return _match(
            name, fake, teacher, imitator, given, x1, z, t, cond, weight, fake_weight, row_weight
        )

    return loss


def _match(name, fake, teacher, imitator, given, x1, z, t, cond, weight, fake_weight, row_weight):
    still = jax.lax.stop_gradient(x1)
    x_t, aim = line(z, still, t)
    v = like_state(name, fake.apply(imitator, x_t, t, cond), x_t).astype(aim.dtype)
    taught = like_state(name, teacher.apply(given, x_t, t, cond), x_t).astype(aim.dtype)
    apart = jax.lax.stop_gradient(v - taught)
    seen = x_t.astype(aim.dtype) + expand_to(1 - t, aim) * taught
    w = weight(still.astype(aim.dtype), seen, t)
    if jnp.shape(w) != t.shape:
        raise ValueError(
            f"{name}: expected a weight of shape {list(t.shape)}, got {list(jnp.shape(w))}"
        )
    push = jax.lax.stop_gradient(expand_to(w, apart) * apart)
    student = mean_of_rows(mean_event(jnp.square(x1 - still + push)) / 2, row_weight)
    imitation = mean_of_rows(mean_event(jnp.square(v - aim)), row_weight)
    residual = mean_of_rows(mean_event(jnp.square(apart)), row_weight)
    return student + fake_weight * imitation, {
        "residual": residual,
        "fake": imitation,
        "student": student,
    }


def _at_source(key, n):
    return jnp.zeros(n)
