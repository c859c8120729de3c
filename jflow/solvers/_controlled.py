"""Diffusions from one point under a control, and the densities of their paths.

    dx = f(x, t) dt + sigma dW,    x(0) = 0,

is compared with the free diffusion, f = 0, whose marginals are N(0, sigma^2 t). Of a step of size h
from x to y the log-ratio of the two densities is

    l = (f . (y - x) - h |f|^2 / 2) / sigma^2,

and the free path given its end is the same backwards, so that for every control f

    log w = log p~(x(1)) - log N(x(1); 0, sigma^2) - sum of l,      E[w] = Z.

That holds of the steps themselves, whatever their number is.

References:
    Zhang, Chen, *Path Integral Sampler: A Stochastic Control Approach for Sampling*, 2021,
        arXiv:2111.15141.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.arrays import expand_to, float_dtype, sum_event
from jflow._core.checks import check_draws, check_key, check_noun, count_rows, like_state
from jflow._core.times import Times, unit_times
from jflow.types import Array, Cond, Key, Params, SampleAndLogProb, Velocity

__all__ = ["control_log_ratio", "diffusion_sampler", "sample_controlled"]


def diffusion_sampler(
    drift: Velocity,
    event_shape: Sequence[int],
    *,
    noise: float = 1.0,
    grid: Times | ArrayLike | int = 100,
) -> SampleAndLogProb:
    """A sampler of an unnormalized density by a diffusion, with the weights of its paths.

    Also known as: path integral sampler, PIS, diffusion sampler, Schroedinger-Foellmer sampler.

    The path starts at 0 and follows dx = f(x, t) dt + noise dW to t=1. In the place of log q it
    returns

        log q = log N(x; 0, noise^2) + sum of l,      E[p~(x) / q] = Z,

    with the log-ratios l of `control_log_ratio`, for every control f. `losses.reverse_kl` of it is
    the objective of the path integral sampler; `losses.diffusion_balance` and
    `losses.diffusion_partial_balance` train the control off its path.

    Args:
        drift: the control f, x [n, *event] and t [n] -> [n, *event].
        event_shape: the shape of one x.
        noise: the standard deviation of the free diffusion at t=1; that of the target, or more.
        grid: the number of equal steps, or rising times [n + 1] from 0 to 1.

    Returns:
        (params, key, n, cond=None) -> (x [n, *event], log q [n]). Its params are those of the
            control.

    Raises:
        TypeError: drift is not a `Velocity`.
        ValueError: noise is not positive, or the grid does not rise from 0 to 1.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import solvers
        >>> from jflow.types import Velocity
        >>> drift = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 2 + 0 * x)
        >>> sample = solvers.diffusion_sampler(drift, (1,), grid=4)  # that of N(2, 1)
        >>> x, log_q = sample({}, jax.random.key(0), 3)
        >>> exact = -0.5 * jnp.sum((x - 2) ** 2, -1) - 0.5 * jnp.log(2 * jnp.pi)
        >>> bool(jnp.allclose(log_q, exact, atol=1e-5))
        True

    References:
        Zhang, Chen, *Path Integral Sampler: A Stochastic Control Approach for Sampling*, 2021,
            arXiv:2111.15141.
    """
    check_noun("diffusion_sampler", drift, Velocity)
    event_shape, times = tuple(event_shape), _check("diffusion_sampler", noise, grid)

    def sample_and_log_prob(params, key, n, cond=None):
        n, cond = check_draws("diffusion_sampler", key, n, cond)
        leaves = jax.tree.leaves(params)
        start = jnp.zeros((n, *event_shape), jnp.result_type(*leaves) if leaves else float)
        xs, log_ratio = sample_controlled(drift, params, start, key, times, cond, noise=noise)
        x = xs[-1]
        free = -0.5 * sum_event(jnp.square(x / noise)) - math.prod(event_shape) * (
            math.log(noise) + 0.5 * math.log(2 * math.pi)
        )
        return x, free + jnp.sum(log_ratio, axis=0)

    return jax.jit(sample_and_log_prob, static_argnums=2)


def sample_controlled(
    drift: Velocity,
    params: Params,
    x0: Float[Array, "b *event"],
    key: Key,
    grid: Times | ArrayLike | int = 100,
    cond: Cond = None,
    *,
    noise: float = 1.0,
    behavior: float | Array | None = None,
) -> tuple[Float[Array, "times b *event"], Float[Array, "steps b"]]:
    """The paths of a diffusion under a control, by Euler-Maruyama steps.

        y = x + h f(x, t) + behavior sqrt(h) e,    e ~ N(0, I)

    Args:
        drift: the control f.
        params: its params.
        x0: the start, [b, *event].
        key: a key.
        grid: the number of equal steps, or rising times [n + 1] from 0 to 1.
        cond: the condition, as the control takes it.
        noise: sigma of the diffusion whose log-ratios are returned.
        behavior: sigma of the paths; None is `noise`. A larger one explores.

    Returns:
        x: the states, [n + 1, b, *event], in float32 or better.
        log_ratio: see `control_log_ratio`, [n, b], nats.

    Raises:
        ValueError: noise is not positive, the grid does not rise from 0 to 1, or the control is
            shaped otherwise than x.
    """
    times = _check("sample_controlled", noise, grid)
    check_key("sample_controlled", key)
    b = count_rows("sample_controlled", x0)
    x = x0.astype(float_dtype(x0))
    ts, sigma = jnp.asarray(times, x.dtype), noise if behavior is None else behavior

    def advance(x, at):
        t, h, key = at
        f = _control("sample_controlled", drift, params, x, jnp.full_like(x, t, shape=(b,)), cond)
        y = x + h * f + sigma * jnp.sqrt(h) * jax.random.normal(key, x.shape, x.dtype)
        return y, (y, _log_ratio(f, y - x, h, noise))

    keys = jax.random.split(key, ts.shape[0] - 1)
    _, (ys, log_ratio) = jax.lax.scan(advance, x, (ts[:-1], jnp.diff(ts), keys))
    return jnp.concatenate([x[None], ys]), log_ratio


def control_log_ratio(
    drift: Velocity,
    params: Params,
    x: Float[Array, "times b *event"],
    grid: Times | ArrayLike | int = 100,
    cond: Cond = None,
    *,
    noise: float = 1.0,
) -> Float[Array, "steps b"]:
    """The log-ratio of the controlled to the free diffusion along given paths, step by step.

        l = (f(x, t) . (y - x) - h |f(x, t)|^2 / 2) / noise^2      for a step from x to y

    All steps are one evaluation of the control, of n b rows.

    Args:
        drift: the control f.
        params: its params.
        x: the states, [n + 1, b, *event].
        grid: the number n of equal steps, or their times [n + 1].
        cond: the condition of the b rows.
        noise: sigma.

    Returns:
        The log-ratios, [n, b], nats.

    Raises:
        ValueError: noise is not positive, the grid does not rise from 0 to 1 or has another number
            of times than x, or the control is shaped otherwise than x.
    """
    times = _check("control_log_ratio", noise, grid)
    if x.shape[0] != len(times):
        raise ValueError(
            f"control_log_ratio: expected {len(times)} states, one for each time, got {x.shape[0]}"
        )
    n, b = x.shape[0] - 1, x.shape[1]
    ts = jnp.asarray(times, float_dtype(x))
    t, h = jnp.repeat(ts[:-1], b), jnp.repeat(jnp.diff(ts), b)
    flat = lambda a: a.reshape(n * b, *a.shape[2:])  # noqa: E731
    cond = jax.tree.map(lambda c: jnp.tile(c, (n, *(1,) * (jnp.ndim(c) - 1))), cond)
    f = _control("control_log_ratio", drift, params, flat(x[:-1]), t, cond)
    return _log_ratio(f, flat(x[1:] - x[:-1]), expand_to(h, f), noise).reshape(n, b)


def _control(name, drift, params, x, t, cond):
    return like_state(name, drift.apply(params, x, t, cond), x)


def _log_ratio(f, step, h, noise):
    """[b], of the drift f and the step that was taken."""
    return sum_event(f * (step - h * f / 2)) / noise**2


def _check(name, noise, grid):
    """The times of the grid, checked, with the noise."""
    if isinstance(noise, bool) or not noise > 0:
        raise ValueError(f"{name}: expected noise > 0, got {noise!r}")
    return unit_times(name, grid)
