"""Guidance by the gradient of a reward."""

from collections.abc import Callable

from jflow._core.checks import check_rows, like_state, rows
from jflow.guidance._classifier import by_gradient
from jflow.paths import LINEAR, Schedule, velocity_to_data
from jflow.types import Array, Cond, Field, NumberOrFunction, Velocity

__all__ = ["denoised_reward", "reward_guidance"]


def reward_guidance(
    velocity: Velocity,
    reward: Field,
    scale: NumberOrFunction,
    *,
    schedule: Schedule = LINEAR,
    start: float = 1e-3,
) -> Velocity:
    """Guidance by the gradient of a reward of noisy data, without training the velocity.

    Also known as: Flow-NRG, noisy reward guidance, reward gradient guidance.

        v + scale c(t) grad_x r(x, t),      c = D s / a      linear: (1 - t) / t

    a, s are the values of the schedule at t, D = a' s - s' a. With scale 1 and the exact value
    r(x, t) = log E[exp(R(x1) / beta) | x_t = x]  it is the velocity of the law of data times
    exp(R / beta); a learned reward (`losses.preference_reward`), or one of the predicted data
    (`denoised_reward`), takes its place. Several rewards are a sum of them with weights. c
    diverges where alpha is 0, where the gradient of the exact value vanishes: for t < start the
    term of the gradient is taken at time start. The gradient of a network does not vanish there:
    let it be t times a network, or take a later start, such as 0.1.

    Args:
        velocity: The velocity to guide. x is an array.
        reward: apply(params, x [b, *event], t [b], cond) -> [b].
        scale: A number, or t [b] -> [b].
        schedule: The path of the velocity; the default is the linear one.
        start: The earliest time at which the gradient is taken, in (0, 1).

    Returns:
        Velocity: The guided velocity, params {'velocity', 'reward'}, of one evaluation of the
            velocity and one of the gradient of the reward. It raises a ValueError for a reward of
            another shape.

    Raises:
        ValueError: At construction for a start outside (0, 1).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance
        >>> from jflow.types import Field, Velocity
        >>> velocity = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> reward = Field(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 2 * x[:, 0])
        >>> guided = guidance.reward_guidance(velocity, reward, 1.0)
        >>> params = {"velocity": {}, "reward": {}}
        >>> guided.apply(params, jnp.ones((1, 1)), jnp.array([0.25])).tolist()  # c = 3
        [[6.0]]

    References:
        Liu et al., *Improving Video Generation with Human Feedback*, 2025, arXiv:2501.13918
            (Flow-NRG).
    """

    def value(params, x, t, cond, key):
        r = reward.apply(params, x, t, cond, key=key)
        return check_rows("reward_guidance", "a reward", r, x.shape[0])

    fields = {"velocity": velocity, "reward": reward}
    return by_gradient("reward_guidance", fields, value, scale, schedule, start)


def denoised_reward(
    velocity: Velocity, reward: Callable[[Array, Cond], Array], *, schedule: Schedule = LINEAR
) -> Field:
    """The reward of the data that a velocity predicts, as a reward of noisy data.

        r(x, t) = R(x1),      x1 the prediction of the data at (x, t)

    for `reward_guidance`, whose gradient then goes through the network. It leaves out the spread
    of the data around the prediction.

    Args:
        velocity: The velocity that predicts.
        reward: R, a function (x1 [b, *event], cond) -> [b] of clean data.
        schedule: The path of the velocity; the default is the linear one.

    Returns:
        Field: (params, x, t, cond) -> [b], with the params and the init of `velocity`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance
        >>> from jflow.types import Velocity
        >>> velocity = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> field = guidance.denoised_reward(velocity, lambda x, cond: 3 * x[:, 0])
        >>> field.apply({}, jnp.ones((1, 1)), jnp.array([0.25])).tolist()
        [3.0]
    """

    def apply(params, x, t, cond=None, *, key=None):
        t = rows(t, x.shape[0])
        v = velocity.apply(params, x, t, cond, key=key)
        v = like_state("denoised_reward", v, x)
        return reward(velocity_to_data(v, x, t, schedule), cond)

    return Field(velocity.init, apply)
