"""DREAM: matching on states that are made from the model's own predictions."""

import jax

from jflow import times as time_laws
from jflow._core.arrays import expand_to, float_dtype
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_noun, check_same_shape, like_state
from jflow._core.numbers import check_number, number_at
from jflow.losses._errors import Metric, mean_squared_error
from jflow.losses._pairs import draw_pairs
from jflow.paths import LINEAR, Schedule, affine, velocity_to_noise
from jflow.types import Field, Loss, NumberOrFunction, Time, Velocity

__all__ = ["dream"]

_UNIFORM = time_laws.uniform()


def dream(
    velocity: Velocity,
    *,
    adaptation: NumberOrFunction | None = None,
    schedule: Schedule = LINEAR,
    time: Time = _UNIFORM,
    metric: Metric = mean_squared_error,
) -> Loss:
    """Flow matching at states that the model itself makes, as it meets them when it samples.

    Also known as: DREAM, diffusion rectification and estimation-adaptive models.

        x0' = x0 + lambda_t (x0 - e),     e = noise predicted at x_t, without a gradient
        loss  metric of velocity(x_t', t) and a' x1 + s' x0',     x_t' = a x1 + s x0'

    a and s are the values of the schedule at t, a' and s' their slopes. x_t' is the state of the
    pair (x0, x1 + lambda_t (x1^ - x1)), with x1^ the prediction of the data at x_t: an estimate in
    the place of the data, as in sampling, of lambda_t's part. The target leads from x_t' to the
    true x1, not to the estimate. On the linear path x0 - e = t (v - (x1 - x0)), so that x_t' is x_t
    + lambda_t t (1 - t) (v - (x1 - x0)) and the target (x1 - x0) - lambda_t t (v - (x1 - x0)).

    adaptation 0 is `flow_matching`. Where the data are determined by cond, the two have the same
    optimum. Elsewhere they do not: x0' is not normal, and samples are drawn to the mean of the
    data given x_t the more the larger lambda_t is. The paper wants that for super-resolution: less
    distortion for more of it, perception for less. Where the data are normal given cond, with a
    standard deviation s, adaptation 1 predicts their mean up to t = 1 / (1 + s), and its samples
    have the deviation s / 2. At t = 0 nothing is moved: one Euler step leads to the mean given cond
    by either loss. It costs one evaluation more than `flow_matching`, without a backward pass.

    Args:
        velocity: The velocity that is trained; cond is, for super-resolution, the small image.
        adaptation: lambda_t, a number in [0, 1] or t [b] -> [b]; None: s, the paper's p = 1, where
            s^p is the lambda_t of any p.
        schedule: The path; the default is the linear one.
        time: The law of the times, (key, n) -> t [n].
        metric: The error of a row, (v, target, x_t', t) -> [b]. The paper's is the mean absolute
            error.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. It has no metrics.

    Raises:
        TypeError: At construction for what is no `Velocity` or `Field`.
        ValueError: At construction for an adaptation outside [0, 1]; at trace time for a velocity
            or a metric of another shape, a batch without 'x' or with unknown keys, and a key that
            is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> from jflow.types import Velocity
        >>> still = Velocity(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> loss = losses.dream(still, adaptation=1.0, time=lambda key, n: jnp.full(n, 0.5))
        >>> batch = {"x0": jnp.zeros((4, 2)), "x": jnp.ones((4, 2))}
        >>> float(loss({}, jax.random.key(0), batch)[0])  # the target is 1 - 0.5 (0 - 1)
        2.25

    References:
        Zhou, Ding, Chen, Jiang, Zharkov, Zhu, Liang, *DREAM: Diffusion Rectification and
            Estimation-Adaptive Models*, 2023, arXiv:2312.00210 (its third algorithm, for the noise
            of conditional diffusion; the translation to velocities and any schedule is ours).
    """
    check_noun("dream", velocity, Velocity, Field)
    if adaptation is not None:
        check_number("dream", "adaptation", adaptation, "in [0, 1]", lambda a: 0 <= a <= 1)
    path = affine(schedule)

    def loss(params, key, batch, frozen=None):
        x0, x1, cond, weight, t, first_key, second_key = draw_pairs("dream", key, batch, time)
        x_t = path.point(x0, x1, t).astype(x1.dtype)
        v = like_state("dream", velocity.apply(params, x_t, t, cond, key=first_key), x_t)
        off = x0 - velocity_to_noise(jax.lax.stop_gradient(v), x_t, t, schedule)
        strength = schedule.sigma if adaptation is None else adaptation
        part = number_at("dream", "adaptation(t)", strength, t, like=t)
        x0 = (x0 + expand_to(part, x0) * off).astype(x1.dtype)
        x_t, target = path.point(x0, x1, t).astype(x1.dtype), path.target(x0, x1, t)
        v = like_state("dream", velocity.apply(params, x_t, t, cond, key=second_key), x_t)
        dtype = float_dtype(x_t)
        error = metric(v.astype(dtype), target.astype(dtype), x_t, t)
        return mean_of_rows(check_same_shape("dream", "a metric", error, t), weight), {}

    return loss
