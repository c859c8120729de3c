"""Samples of Bayesian flow networks."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jflow._core.arrays import zero_log_det
from jflow._core.checks import need_key, rows
from jflow._core.times import Times, rising_times
from jflow.paths import BayesianFlow
from jflow.solvers._stochastic import sample_sde
from jflow.types import Array, Cond, Field, Key, Params, Step, Velocity

__all__ = ["bayesian_update", "sample_bayesian"]


def bayesian_update(field: Field | Velocity, flow: BayesianFlow) -> Step:
    """A step of the sampler of a Bayesian flow network.

        x ~ out = field(theta, t, cond)    y ~ flow.send(x, beta(t_next) - beta(t))
        theta_next = flow.update(theta, y)

    For continuous data x is the prediction itself.

    Args:
        field: the network, as in `losses.bayesian_flow`; `guidance.cfg` may guide it.
        flow: the kind of data and the accuracy.

    Returns:
        Step: (params, theta, t, t_next, key, cond=None) -> (theta_next, theta_next, 0 [b]), for
            `sample_sde`. What it draws follows no normal law, so that it has no mean and std of
            one, and it needs a key.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import paths, solvers
        >>> from jflow.types import Field
        >>> flow = paths.bayesian_discrete(paths.quadratic_accuracy(9.0), 3)
        >>> def first(params, theta, t, cond=None, *, key=None):  # it is always class 0
        ...     return jnp.array([0.0, -99.0, -99.0]) + 0 * theta
        >>> step = solvers.bayesian_update(Field(lambda *_: {}, first), flow)
        >>> theta = flow.prior((1,), jnp.float32)
        >>> theta, _, _ = step({}, theta, 0.0, 1.0, jax.random.key(0))
        >>> round(float(theta[0, 0]), 3)
        1.0

    References:
        Graves, Srivastava, Atkinson, Gomez, *Bayesian Flow Networks*, 2023, arXiv:2308.07037.
    """

    def step(params, theta, t, t_next, key, cond=None):
        need_key("bayesian_update", key)
        draw_key, send_key = jax.random.split(key)
        t, t_next = (rows(at, theta.shape[0]).astype(theta.dtype) for at in (t, t_next))
        x = flow.draw(draw_key, field.apply(params, theta, t, cond))
        y = flow.send(send_key, x, flow.accuracy(t_next) - flow.accuracy(t))
        theta = flow.update(theta, y, t, t_next)
        return theta, theta, zero_log_det(theta)

    return step


def sample_bayesian(
    field: Field | Velocity,
    flow: BayesianFlow,
    params: Params,
    key: Key,
    shape: tuple[int, ...],
    cond: Cond = None,
    *,
    grid: Times | ArrayLike | int = 20,
) -> Array:
    """Samples of a Bayesian flow network, from the prior to what the network says at the end.

    It takes one evaluation of the network a step, and one more at the last time.

    Args:
        field: the network, as in `losses.bayesian_flow`; `guidance.cfg` may guide it.
        flow: the kind of data and the accuracy.
        params: the params of the network.
        key: a key.
        shape: the shape of the samples, (n, *event).
        cond: the condition, [n, ...] or one row for all.
        grid: the number of equal steps, or rising times [n + 1] from 0 to 1.

    Returns:
        Samples [n, *event]: floats, tokens or levels, as `flow` draws them.

    Raises:
        ValueError: grid does not rise or leaves [0, 1], or the key is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import paths, solvers
        >>> from jflow.types import Field
        >>> flow = paths.bayesian_discrete(paths.quadratic_accuracy(9.0), 3)
        >>> flat = Field(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: jnp.log(x))
        >>> solvers.sample_bayesian(flat, flow, {}, jax.random.key(0), (2, 5), grid=4).shape
        (2, 5)

    References:
        Graves, Srivastava, Atkinson, Gomez, *Bayesian Flow Networks*, 2023, arXiv:2308.07037.
    """
    need_key("solvers.sample_bayesian", key)
    walk_key, draw_key = jax.random.split(key)
    times = rising_times("solvers.sample_bayesian", grid)
    theta = flow.prior(tuple(shape), jnp.float32)
    theta, _ = sample_sde(bayesian_update(field, flow), params, theta, walk_key, times, cond)
    last = jnp.full(shape[:1], times[-1], theta.dtype)
    return flow.draw(draw_key, field.apply(params, theta, last, cond))
