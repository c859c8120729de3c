"""Density guidance: samples whose log-density moves as prescribed on the way from noise to data.

Along dx = w dt, log p_t(x_t) changes by d/dt log p_t(x_t) = -div u + s . (w - u), with u the
velocity that transports p_t and s = grad log p_t. The smallest change of u that adds an excess e
[nats per unit of time] is w = u + e s / |s|^2. What is prescribed is the density of the *unguided*
model at the place where the sample is; guided samples do not follow p_t. The score comes from the
velocity, so the source is standard normal and independent of the data (`velocity_to_score`).

Where the score vanishes, at the modes, log p cannot be moved at all, and the fields are not finite.

References:
    Karczewski, Heinonen, Garg, *Devil is in the Details: Density Guidance for Detail-Aware
        Generation with Flow Models*, 2025, arXiv:2502.05807 (their time runs from data to noise;
        the forms here are derived, and tested on closed forms).
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, float_dtype, sum_event
from jflow._core.checks import like_state, need_key, rows
from jflow._core.keys import same_draws
from jflow._core.numbers import check_number, number_at
from jflow.paths import LINEAR, Schedule, coefficients, velocity_to_score
from jflow.solvers import exact_divergence
from jflow.types import Array, NumberOrFunction, Step, Velocity

__all__ = ["Excess", "density", "density_step", "constant_rate", "quantile"]

_EXACT = exact_divergence()
Excess = Callable[[Callable[[Array], Array], Array, Array], Array]


def density(velocity: Velocity, excess: Excess, *, schedule: Schedule = LINEAR) -> Velocity:
    """A velocity along which the log-density of the model changes as prescribed.

        u + e s / |s|^2      so that      d/dt log p_t(x_t) = -div u + e

    u is the plain velocity and s its score. The score, and with it the result, diverges where sigma
    is 0, at t = 1: integrate to a little before it.

    Args:
        velocity: the plain velocity u; x is an array.
        excess: (u, x [b, *event], t [b]) -> e [b] in nats per unit of time, with u the plain
            velocity as a function of x at these times: `constant_rate`, `quantile`, or any.
        schedule: the path of the velocity; the default is the linear one.

    Returns:
        Velocity: the guided velocity, with the params and the init of `velocity`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance
        >>> from jflow.types import Velocity
        >>> def apply(params, x, t, cond=None, *, key=None):  # all data at 0
        ...     return -x / (1 - t[:, None])
        >>> guided = guidance.density(Velocity(lambda *_: {}, apply), guidance.constant_rate(0.0))
        >>> x, t = jnp.array([[1.0, 0.0]]), jnp.array([0.5])
        >>> guided.apply({}, x, t).tolist()  # s = -4 x, div u = -4: -2 x + 4 x / 4
        [[-1.0, 0.0]]

    References:
        Karczewski, Heinonen, Garg, *Devil is in the Details: Density Guidance for Detail-Aware
            Generation with Flow Models*, 2025, arXiv:2502.05807.
    """

    def apply(params, x, t, cond=None, *, key=None):
        t = rows(t, x.shape[0])
        u = lambda x: like_state(  # noqa: E731
            "density", velocity.apply(params, x, t, cond, key=same_draws(key)), x
        )
        v = u(x)
        return (v + _climb(velocity_to_score(v, x, t, schedule), excess(u, x, t))).astype(v.dtype)

    return Velocity(velocity.init, apply)


def constant_rate(rate: NumberOrFunction) -> Excess:
    """The excess with which the log-density changes at a given rate.

        d/dt log p_t(x_t) = rate,      e = rate + div u

    What the plain flow would do has no part in it. The divergence is exact: one forward derivative
    for each dimension of the event.

    Args:
        rate: a number, or (x, t) -> [b], in nats per unit of time.

    Returns:
        Excess: (u, x, t) -> e [b], for `density` and `density_step`.
    """

    def excess(u, x, t):
        divergence = _EXACT.apply(u, x, None)[1]
        return divergence + number_at("constant_rate", "rate(x, t)", rate, x, t, like=divergence)

    return excess


def quantile(q: float, *, schedule: Schedule = LINEAR) -> Excess:
    """The excess that keeps the growth of the density at its q-quantile among plain samples.

        e = D / (a s) sqrt(2 d) Phi^-1(q),      d the size of the event

    D / (a s) sqrt(2 d) is how far D s / a (laplacian log p_t + |score|^2) strays from its mean 0
    over draws of x_t, about normally in many dimensions (pure noise: exactly that far), so that the
    samples stay among those that the model itself makes. It needs no divergence: with `density`, u
    has its score multiplied by 1 + sqrt(2 d) Phi^-1(q) / |sigma score|^2. The sum of e over time is
    sqrt(2 d) Phi^-1(q) times the gain in log(a / s), which diverges at both ends of a path from
    pure noise to pure data: integrate between, such as t0=0.02, t1=0.98.

    Args:
        q: in (0, 1): 1/2 is the plain flow, above it samples are denser (smoother images), below
            sparser.
        schedule: the path of the velocity; the default is the linear one.

    Returns:
        Excess: (u, x, t) -> e [b], for `density` and `density_step`.

    Raises:
        ValueError: q is outside (0, 1).

    References:
        Karczewski, Heinonen, Garg, *Devil is in the Details: Density Guidance for Detail-Aware
            Generation with Flow Models*, 2025, arXiv:2502.05807.
    """
    if not 0 < q < 1:
        raise ValueError(f"quantile: expected q in (0, 1), got {q}")
    z = NormalDist().inv_cdf(float(q))

    def excess(u, x, t):
        a, s, da, ds = coefficients(schedule, t)
        return z * math.sqrt(2 * math.prod(x.shape[1:])) * (da * s - ds * a) / (a * s)

    return excess


def density_step(
    velocity: Velocity, excess: Excess, noise: NumberOrFunction, *, schedule: Schedule = LINEAR
) -> Step:
    """A stochastic step along which the log-density changes as `density` prescribes.

    Noise moves along the level sets of p_t only. In Ito's calculus

        dx = (u + (e - w tr(P H P)) s / |s|^2) dt + sqrt(2 w) P dW

    with H the Hessian of log p_t and P = I - s s^T / |s|^2: d log p_t(x_t) = (-div u + e) dt then
    holds on every path, not in the mean. The step over h = t_next - t takes the second-order term
    of the noise itself, y^T H y with y = P xi, in place of its mean tr(P H P): one forward
    derivative, and the error of log p after a fixed time is O(h) on every path where that of Euler
    would be O(sqrt(h)).

    Args:
        velocity: the plain velocity u; x is an array.
        excess: (u, x [b, *event], t [b]) -> e [b] in nats per unit of time, such as
            `quantile(0.7)`.
        noise: w, a number or t [b] -> [b], as `solvers.noises` have it; 2 w h has to stay well
            below sigma^2.
        schedule: the path of the velocity; the default is the linear one.

    Returns:
        Step: (params, x, t, t_next, key, cond=None) -> (x_next, mean, std), for
            `solvers.sample_sde`, with t < t_next and t < 1, scalars or [b]. std = sqrt(2 w h) [b]
            is that of each direction in the level set, there is none across, and mean = x_next -
            std y depends on the draw through the second-order term, so the step has no Gaussian
            log-density (`solvers.step_log_prob` does not hold for it). It raises a ValueError
            without a key.

    Raises:
        ValueError: noise is negative.

    References:
        Karczewski, Heinonen, Garg, *Devil is in the Details: Density Guidance for Detail-Aware
            Generation with Flow Models*, 2025, arXiv:2502.05807.
    """
    check_number("density_step", "noise (w = g^2 / 2)", noise, ">= 0", lambda w: w >= 0)

    def step(params, x, t, t_next, key, cond=None):
        need_key("density_step", key)
        x = x.astype(float_dtype(x))
        t, t_next = (rows(s, x.shape[0]).astype(x.dtype) for s in (t, t_next))
        h = t_next - t
        u = lambda x: like_state(  # noqa: E731
            "density_step", velocity.apply(params, x, t, cond), x
        )
        v = u(x)
        score = velocity_to_score(v, x, t, schedule)
        xi = jax.random.normal(key, x.shape, x.dtype)
        tangent = xi - _climb(score, sum_event(xi * score))
        slope = jax.jvp(lambda x: velocity_to_score(u(x), x, t, schedule), (x,), (tangent,))[1]
        w = number_at("density_step", "noise(t)", noise, t, like=t)
        gain = h * (excess(u, x, t) - w * sum_event(tangent * slope))
        std = jnp.sqrt(2 * w * h)
        mean = x + expand_to(h, x) * v + _climb(score, gain)
        return mean + expand_to(std, x) * tangent, mean, std

    return step


def _climb(score, gain):
    """The smallest displacement that raises log p by gain [b], to first order."""
    return expand_to(gain / sum_event(jnp.square(score)), score) * score
