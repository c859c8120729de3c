"""The deterministic step of a few-step policy, with noise of a learned size."""

import math

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import check_same_shape, like_state, rows
from jflow.types import Field, Step, Velocity

__all__ = ["noise_injection"]


def noise_injection(velocity: Velocity, noise: Field, *, low: float, high: float) -> Step:
    """Euler's step with learned noise, with which a few-step flow is a policy with a density.

    Also known as: ReinFlow, learnable noise injection, stochastic flow policy.

        mean = x + h v(x, t),      h = t_next - t
        log std = log low + (log high - log low) sigmoid(noise(x, t))

    Unlike the steps with the marginals of a velocity it changes what is sampled: the noise explores
    while a policy is trained (`losses.ppo`), and is left out afterwards (key=None takes the mean).
    Each number of the event has a standard deviation of its own, between the bounds in every step,
    the last included, so that a density always exists.

    Args:
        velocity: The velocity.
        noise: A network of (x, t, cond) -> [b, *event]; 0 is the geometric mean of the bounds.
        low: The least standard deviation, above 0.
        high: The greatest, above `low`.

    Returns:
        Step: (params, x, t, t_next, key, cond=None) -> (x_next, mean, std [b, *event]), params
            {'velocity', 'noise'}, for `sample_sde`. With key=None x_next is the mean.

    Raises:
        ValueError: At construction unless 0 < low < high; at trace time for networks of another
            shape.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import solvers
        >>> from jflow.types import Field, Velocity
        >>> apply = lambda params, x, t, cond=None, *, key=None: 0 * x
        >>> step = solvers.noise_injection(
        ...     Velocity(lambda *_: {}, apply), Field(lambda *_: {}, apply), low=0.01, high=1.0
        ... )
        >>> params = {"velocity": {}, "noise": {}}
        >>> x_next, mean, std = step(params, jnp.ones((1, 2)), 0.0, 0.5, None)
        >>> std.round(3).tolist()
        [[0.10000000149011612, 0.10000000149011612]]

    References:
        Zhang, Yu, Su, Wang, *ReinFlow: Fine-tuning Flow Matching Policy with Online Reinforcement
            Learning*, 2025, arXiv:2505.22094 (the form of the bounds is ours).
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"noise_injection: expected 0 < low < high, got {low} and {high}")
    start, width = math.log(low), math.log(high) - math.log(low)

    def step(params, x, t, t_next, key, cond=None):
        x = x.astype(float_dtype(x))
        t, t_next = (rows(s, x.shape[0]).astype(x.dtype) for s in (t, t_next))
        v = like_state("noise_injection", velocity.apply(params["velocity"], x, t, cond), x)
        raw = noise.apply(params["noise"], x, t, cond)
        raw = check_same_shape("noise_injection", "noise", raw, x).astype(x.dtype)
        std = jnp.exp(start + width * jax.nn.sigmoid(raw))
        mean = x + expand_to(t_next - t, x) * v
        if key is None:
            return mean, mean, std
        return mean + std * jax.random.normal(key, x.shape, x.dtype), mean, std

    return step
