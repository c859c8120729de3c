"""SlimFlow: reflow and distillation into a network that is smaller than its teacher.

The small network cannot start from the teacher's weights.

    data.generate_reflow_pairs(runs / "pairs", big, big_params, source, 50_000, key=key)
    rows = data.read_shards(runs / "pairs")

    amount = optax.linear_schedule(1.0, 0.0, 300_000)      # from random pairs to the teacher's
    loss = losses.chain(losses.annealed_source(amount), losses.flow_matching(small))
    step = train.make_step(loss, optimizer, refresh=count_steps)
    frozen = {"step": jnp.zeros((), jnp.int32)}
    state = train.init_state(small_params, optimizer, key, frozen=frozen)
    ... fit on rows ...                                    # small, 2-rectified

    # from its own params, or those of a smaller one
    loss = flow_guided_distillation(small, small)
    state = train.init_state(params, optimizer, key, frozen={"teacher": params})
    ... fit on rows ...
    x1, info = solvers.sample(small, params, x0, method=solvers.fixed(1, diffrax.Euler()))

The paper is Zhu, Liu, Liu, *SlimFlow: Training Smaller One-Step Diffusion Models with Rectified
Flow*, 2024 (its t is 1 - t here).
"""

import jax
import jax.numpy as jnp
import numpy as np

from jflow import times
from jflow._core.arrays import expand_to, float_dtype
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_same_shape, frozen_entry, like_state, need_pairs
from jflow.losses._errors import Metric, mean_squared_error
from jflow.losses._pairs import draw_pairs
from jflow.types import Loss, Time, Velocity

__all__ = ["flow_guided_distillation"]

_UNIFORM = times.uniform()


def flow_guided_distillation(
    velocity: Velocity,
    teacher: Velocity,
    *,
    time: Time = _UNIFORM,
    weight: float = 1.0,
    metric: Metric = mean_squared_error,
) -> Loss:
    """One-step distillation of pairs, and of two steps of a teacher from fresh noise (SlimFlow).

    The loss is the mean over rows of

        metric(F(x0), x1 - x0) + weight metric(F(z), s u + (1 - s) v(z + s u, s)),
        F = velocity(., 0),    u = v(z, 0),

    with z ~ N(0, I), v the teacher's velocity and s drawn from `time`, for each row by itself. The
    second term needs no pairs. The teacher is a 2-rectified flow, nearly straight, of any
    architecture; it gets the condition of the row. If it is exactly straight and the pairs are its
    own, both terms vanish at its map. (The published code draws s in [0.2, 0.8] and lets the
    student, not differentiated, make the first of the two steps.) Sample x0 + F(x0), by
    `solvers.sample` with one Euler step.

    Args:
        velocity: The student, which is asked at t = 0 alone.
        teacher: The teacher, whose params are frozen['teacher'].
        time: The law of s, (key, n) -> s [n].
        weight: The weight of the second term, not negative.
        metric: The error of a row, (v, target, x, t) -> [b] at t = 0; the published one is LPIPS of
            x + v and x + target.

    Returns:
        A loss of the batch {'x0' and 'x' [b, *event], a pair a row, optionally 'cond', 'weight'
        [b]}. `data.generate_reflow_pairs` makes the pairs. Its metrics are 'residual' and
        'two_step', the mean squared errors of the two terms.

    Raises:
        ValueError: At construction for a negative weight; at trace time for a batch without 'x0', a
            frozen without 'teacher', outputs of other shapes (naming the network), a batch without
            'x' or with unknown keys, and a key that is None.

    References:
        Zhu, Liu, Liu, *SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow*,
            2024, arXiv:2407.12718.
    """
    name, scale = "flow_guided_distillation", weight
    if not 0 <= scale < np.inf:
        raise ValueError(f"{name}: expected a finite weight >= 0, got {scale}")

    def loss(params, key, batch, frozen=None):
        need_pairs(name, batch)
        x0, x1, cond, weight, s, noise_key, dropout_key = draw_pairs(name, key, batch, time)
        taught = frozen_entry(name, frozen)
        dtype, zero = float_dtype(x1), jnp.zeros_like(s)

        def student(x, key):
            return like_state(
                f"{name}, student", velocity.apply(params, x, zero, cond, key=key), x
            ).astype(dtype)

        def teach(x, t):
            return like_state(f"{name}, teacher", teacher.apply(taught, x, t, cond), x).astype(
                dtype
            )

        z = jax.random.normal(noise_key, x0.shape, x0.dtype)
        part = expand_to(s, z)
        u = teach(z, zero)
        two_steps = part * u + (1 - part) * teach((z + part * u).astype(z.dtype), s)
        wanted = (x0, x1.astype(dtype) - x0), (z, jax.lax.stop_gradient(two_steps))
        terms = []
        for (x, target), dropout in zip(wanted, jax.random.split(dropout_key), strict=True):
            v = student(x, dropout)
            error = check_same_shape(name, "a metric", metric(v, target, x, zero), zero)
            terms.append(
                (
                    mean_of_rows(error, weight),
                    mean_of_rows(mean_squared_error(v, target, x, zero), weight),
                )
            )
        (pairs, residual), (guided, two_step) = terms
        return pairs + scale * guided, {"residual": residual, "two_step": two_step}

    return loss
