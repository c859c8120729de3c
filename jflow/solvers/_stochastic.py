"""Stochastic sampling with the marginals of a velocity, as `Step`s over a grid with the density of what they draw.

For every w(t) >= 0 the diffusion

    dx = [v(x, t) + w(t) score(x, t)] dt + sqrt(2 w(t)) dW          (w = g^2 / 2 for those who write g dW)

has the marginals p_t of dx = v dt. On an affine path from standard normal noise that is independent of the data the
velocity gives the score, -x0 / sigma with x0 its prediction of the noise; elsewhere pass a score. A step draws
x_next = mean + std e with a std [b] for every row and e standard normal, in float32 or better. Every step but
`euler_maruyama` is exact on data of one point, whatever its size.

Sources: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021; Albergo, Boffi,
Vanden-Eijnden, "Stochastic Interpolants: A Unifying Framework for Flows and Diffusions", 2023; Ma, Goldstein, Albergo,
Boffi, Vanden-Eijnden, Xie, "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
Transformers", 2024 (the choices of w).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jflow._core.arrays import expand_to, float_dtype, sum_event
from jflow._core.checks import check_cond, count_rows, like_state, need_key, rows
from jflow._core.times import check_grid
from jflow.paths import LINEAR, Schedule, velocity_to_data, velocity_to_noise
from jflow.solvers._integrate import all_finite, leave_out_failed
from jflow.types import Array, Cond, Key, Params, Step, Velocity

__all__ = [
    "Trajectory",
    "ancestral",
    "euler_maruyama",
    "overshoot",
    "trajectory_log_prob",
    "step_log_prob",
    "sample_sde",
]


def euler_maruyama(
    velocity: Velocity,
    noise: Callable | float,
    schedule: Schedule = LINEAR,
    *,
    score: Callable | None = None,
    limit: float | None = 0.25,
) -> Step:
    """mean = x + h (v + w score), std = sqrt(2 w h), with h = t_next - t and everything at t. Weakly of first order where
    w is smooth; of order 2c where it grows like c / t at t=0, c < 1/2 (as `noises.grpo`: c = scale^2 / 2).

    noise: w, a number or t [b] -> [b] (see `solvers.noises`). score: (params, x, t, cond) -> [b, *event]; without it the
    velocity gives the score, on `schedule`, from standard normal noise independent of the data. limit: w is at most
    limit sigma^2 / h (not with a score of one's own), since no step can exchange more noise than there is, limit = 1, and
    the error is limit^2. That keeps w finite at t=0 and the last step quiet, and concerns fewer times as h falls; None: w
    as it is.
    Errors: ValueError for a negative w or a limit <= 0.
    """
    w = _rate("euler_maruyama", noise)
    if limit is not None and not limit > 0:
        raise ValueError(f"euler_maruyama: expected limit > 0 or None, got {limit}")
    limit = None if limit is None else float(limit)  # numbers of numpy's would bring float64 along

    def moments(params, x, t, t_next, cond):
        h, rate = t_next - t, w(t)
        v = like_state("euler_maruyama", velocity.apply(params, x, t, cond), x)
        if score is not None:
            estimate = score(params, x, t, cond)
        else:
            sigma = schedule.sigma(t)
            if limit is not None:
                rate = jnp.minimum(rate, limit * sigma**2 / h)
            estimate = -velocity_to_noise(v, x, t, schedule) / expand_to(sigma, x)
        return x + expand_to(h, x) * (v + expand_to(rate, x) * estimate), jnp.sqrt(2 * rate * h)

    return _step(moments)


def ancestral(velocity: Velocity, eta: float = 1.0, schedule: Schedule = LINEAR) -> Step:
    """DDIM's family: std = eta sigma' sqrt(1 - r^2), r = alpha sigma' / (alpha' sigma), and the rest of sigma' is kept noise:

        mean = alpha' x1 + sqrt(sigma'^2 - std^2) x0       (x1, x0: predictions at t; primes at t_next)

    eta = 0 is DDIM, eta = 1 ancestral sampling (DDPM): its first step, from t=0, draws all noise anew. Between the two
    w is eta^2 that of `noises.sbdm`. Errors: ValueError unless 0 <= eta <= 1.
    Source: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2021.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"ancestral: expected 0 <= eta <= 1, got {eta}")
    eta = float(eta)

    def moments(params, x, t, t_next, cond):
        r = (
            schedule.alpha(t)
            * schedule.sigma(t_next)
            / (schedule.alpha(t_next) * schedule.sigma(t))
        )
        fresh = eta * jnp.sqrt(jnp.maximum((1 - r) * (1 + r), 0))
        kept = jnp.sqrt(1 - fresh**2)
        return _renewed("ancestral", velocity, schedule, params, x, t, t_next, cond, kept, fresh)

    return _step(moments)


def overshoot(velocity: Velocity, scale: float = 2.0, schedule: Schedule = LINEAR) -> Step:
    """A step of DDIM beyond t_next, to o = min(t_next + scale h (1 - t_next), 1), and noise to come back:

        mean = a (alpha_o x1 + sigma_o x0),  a = alpha' / alpha_o,  std = sqrt(sigma'^2 - (a sigma_o)^2)

    scale = 0 is DDIM. Its marginals are those of the flow up to O(h). Errors: ValueError unless scale >= 0.
    Source: Hu et al., "AMO Sampler: Enhancing Text Rendering with Overshooting", 2024 (on the linear path).
    """
    if not scale >= 0:
        raise ValueError(f"overshoot: expected scale >= 0, got {scale}")
    scale = float(scale)

    def moments(params, x, t, t_next, cond):
        beyond = jnp.minimum(t_next + scale * (t_next - t) * (1 - t_next), 1)
        sigma = schedule.sigma(t_next)
        back = schedule.alpha(t_next) * schedule.sigma(beyond) / schedule.alpha(beyond)
        kept = jnp.where(sigma > 0, back / jnp.where(sigma > 0, sigma, 1), 0)
        fresh = jnp.sqrt(jnp.maximum((1 - kept) * (1 + kept), 0))
        return _renewed("overshoot", velocity, schedule, params, x, t, t_next, cond, kept, fresh)

    return _step(moments)


class Trajectory(NamedTuple):
    """t [n + 1], x [n + 1, b, *event], and of every step mean [n, b, *event] and std [n, b]."""

    t: Array
    x: Array
    mean: Array
    std: Array


def sample_sde(
    step: Step,
    params: Params,
    x0: Array,
    key: Key,
    grid: ArrayLike,
    cond: Cond = None,
    *,
    return_trajectory: bool = False,
) -> tuple[Array, Trajectory | None]:
    """Steps x0 [b, *event] over a rising grid [n + 1] with a key for each; returns (x, trajectory).

    x has the type of x0; the states between are float32 or better, and those of the trajectory, which is None unless
    `return_trajectory`. n evaluations of the velocity. A row that is not finite at the end has no part in a derivative.
    Errors: ValueError for a grid that doesn't rise or leaves [0, 1], for no key.
    """
    check_grid("solvers.sample_sde", grid, rising=True)
    need_key("solvers.sample_sde", key)
    cond = check_cond("solvers.sample_sde", cond, count_rows("solvers.sample_sde", x0))
    ts = jnp.asarray(grid, float_dtype(x0))
    start = x0.astype(float_dtype(x0))

    keys = jax.random.split(key, ts.shape[0] - 1)

    def run(params, rows):
        start, cond = rows

        def advance(x, at):
            t, t_next, key = at
            x_next, mean, std = step(params, x, t, t_next, key, cond)
            return x_next, (x_next, mean, std) if return_trajectory else None

        x, path = jax.lax.scan(advance, start, (ts[:-1], ts[1:], keys))
        return (x, _rows_first(path)), all_finite(x)

    x, path = leave_out_failed(run, params, (start, cond))
    if return_trajectory:
        xs, mean, std = _rows_first(path)
        path = Trajectory(ts, jnp.concatenate([start[None], xs]), mean, std)
    return x.astype(x0.dtype), path


def trajectory_log_prob(
    step: Step, params: Params, trajectory: Trajectory, cond: Cond = None
) -> Array:
    """[n, b] nats: the log-density of each step of a trajectory under these params, each at its own t, t_next and x.

    With the params that walked it these are step_log_prob(x[1:], mean, std) of the trajectory: the ratio that policy
    gradients start from is 1.
    """
    cond = check_cond("solvers.trajectory_log_prob", cond, trajectory.x.shape[1])
    t = trajectory.t

    def run(params, rows):
        x, cond = _rows_first(rows[0]), rows[1]

        def one(_, at):
            t, t_next, x, x_next = at
            return None, step_log_prob(x_next, *step(params, x, t, t_next, None, cond)[1:])

        found = _rows_first(jax.lax.scan(one, None, (t[:-1], t[1:], x[:-1], x[1:]))[1])
        return found, all_finite(found)

    return _rows_first(leave_out_failed(run, params, (_rows_first(trajectory.x), cond)))


def step_log_prob(x_next: Array, mean: Array, std: Array) -> Array:
    """[b] nats: log N(x_next; mean, std^2) summed over the event, in float32 or better; std [b], or [b, ...] that broadcasts.

    What has std = 0 is no density, as the last step of many samplers, and counts 0.
    """
    dtype = float_dtype(x_next, mean, std)
    std = expand_to(std.astype(dtype), mean)
    drawn = std > 0
    safe = jnp.where(drawn, std, 1)
    terms = (
        -0.5 * ((x_next.astype(dtype) - mean.astype(dtype)) / safe) ** 2
        - jnp.log(safe)
        - 0.5 * np.log(2 * np.pi)
    )
    return sum_event(jnp.where(drawn, terms, 0))


def _rows_first(tree):
    """[n, b, ...] as [b, n, ...], and back."""
    return jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), tree)


def _renewed(name, velocity, schedule, params, x, t, t_next, cond, kept, fresh):
    """Mean and std of alpha' x1 + sigma' (kept x0 + fresh e), with the predictions at t."""
    v = like_state(name, velocity.apply(params, x, t, cond), x)
    sigma = schedule.sigma(t_next)
    data, noise = velocity_to_data(v, x, t, schedule), velocity_to_noise(v, x, t, schedule)
    return expand_to(schedule.alpha(t_next), x) * data + expand_to(
        sigma * kept, x
    ) * noise, sigma * fresh


def _step(moments) -> Step:
    """A `Step` from (params, x, t, t_next, cond) -> (mean, std [b]); without a key x_next is the mean."""

    def step(params, x, t, t_next, key, cond=None):
        x = x.astype(float_dtype(x))
        t, t_next = (rows(s, x.shape[0]).astype(x.dtype) for s in (t, t_next))
        mean, std = moments(params, x, t, t_next, cond)
        if key is None:
            return mean, mean, std
        return mean + expand_to(std, x) * jax.random.normal(key, x.shape, x.dtype), mean, std

    return step


def _rate(name, noise):
    if callable(noise):
        return noise
    if not noise >= 0:
        raise ValueError(
            f"{name}: expected noise (w = g^2 / 2) to be a function of t or a number >= 0, got {noise}"
        )
    return lambda t: jnp.full_like(t, noise)
