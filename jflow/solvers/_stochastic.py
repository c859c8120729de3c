"""Stochastic sampling with the marginals of a velocity, as `Step`s over a grid.

For every w(t) >= 0 the diffusion

    dx = [v(x, t) + w(t) score(x, t)] dt + sqrt(2 w(t)) dW      (w = g^2 / 2 where one writes g dW)

has the marginals p_t of dx = v dt. On an affine path from standard normal noise that is independent
of the data the velocity gives the score, -x0 / sigma with x0 its prediction of the noise; elsewhere
pass a score. A step draws x_next = mean + std e with a std [b] for every row and e standard normal,
in float32 or better, so that the density of a draw is known. Every step but `euler_maruyama` is
exact on data of one point, whatever its size.

References:
    Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, *Score-Based Generative Modeling through
        Stochastic Differential Equations*, 2021, arXiv:2011.13456.
    Albergo, Boffi, Vanden-Eijnden, *Stochastic Interpolants: A Unifying Framework for Flows and
        Diffusions*, 2023, arXiv:2303.08797.
    Ma, Goldstein, Albergo, Boffi, Vanden-Eijnden, Xie, *SiT: Exploring Flow and Diffusion-based
        Generative Models with Scalable Interpolant Transformers*, 2024, arXiv:2401.08740 (the
        choices of w).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from jflow._core.arrays import expand_to, float_dtype, sum_event
from jflow._core.checks import check_cond, count_rows, like_state, need_key, rows
from jflow._core.numbers import check_number, number_at
from jflow._core.times import Times, check_grid
from jflow._core.tokens import at_tokens
from jflow.paths import LINEAR, Schedule, velocity_to_data, velocity_to_noise
from jflow.solvers._integrate import all_finite, leave_out_failed
from jflow.types import Array, Cond, Key, NumberOrFunction, Params, Step, Velocity

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
    noise: NumberOrFunction,
    schedule: Schedule = LINEAR,
    *,
    score: Callable | None = None,
    limit: float | None = 0.25,
) -> Step:
    """The Euler-Maruyama step of the diffusion with the marginals of a velocity.

        mean = x + h (v + w score),      std = sqrt(2 w h),      h = t_next - t

    with everything at t. It is weakly of first order where w is smooth; of order 2c where w grows
    like c / t at t=0, c < 1/2 (as `noises.grpo`: c = scale^2 / 2).

    Args:
        velocity: the velocity v.
        noise: w, a number or t [b] -> [b] (see `solvers.noises`).
        schedule: the path of the velocity; the default is the linear one.
        score: (params, x, t, cond) -> [b, *event]. Without it the velocity gives the score, on
            `schedule`, from standard normal noise that is independent of the data.
        limit: w is at most limit sigma^2 / h (not with a score), since no step can exchange more
            noise than there is, limit = 1, and the error is limit^2. That keeps w finite at t=0 and
            the last step quiet, and concerns fewer times as h falls; None: w as it is.

    Returns:
        Step: (params, x, t, t_next, key, cond=None) -> (x_next, mean, std [b]), for `sample_sde`.
            With key=None x_next is the mean.

    Raises:
        ValueError: noise is a negative number, or limit is not above 0.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import solvers
        >>> from jflow.types import Velocity
        >>> velocity = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> step = solvers.euler_maruyama(velocity, 0.5, limit=None)
        >>> x_next, mean, std = step({}, jnp.ones((1, 1)), 0.0, 0.25, None)  # the score is -x
        >>> mean.tolist(), std.tolist()
        ([[0.875]], [0.5])

    References:
        Ma, Goldstein, Albergo, Boffi, Vanden-Eijnden, Xie, *SiT: Exploring Flow and Diffusion-based
            Generative Models with Scalable Interpolant Transformers*, 2024, arXiv:2401.08740.
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
    """The step of the DDIM family: between the deterministic one and ancestral sampling (DDPM).

    Also known as: DDPM sampling, ancestral sampling.

        mean = alpha' x1 + sqrt(sigma'^2 - std^2) x0
        std = eta sigma' sqrt(1 - r^2),  r = alpha sigma' / (alpha' sigma)

    x1 and x0 are the predictions at t; primes are at t_next, not derivatives. eta = 0 is DDIM, eta
    = 1 ancestral sampling: its first step, from t=0, draws all noise anew. Between the two w is
    eta^2 that of `noises.sbdm`.

    Args:
        velocity: the velocity.
        eta: how much of the noise is fresh, in [0, 1].
        schedule: the path of the velocity; the default is the linear one.

    Returns:
        Step: (params, x, t, t_next, key, cond=None) -> (x_next, mean, std [b]), for `sample_sde`.
            With key=None x_next is the mean.

    Raises:
        ValueError: eta is outside [0, 1].

    References:
        Song, Meng, Ermon, *Denoising Diffusion Implicit Models*, 2021, arXiv:2010.02502.
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
    """A step of DDIM beyond the next time, and noise to come back.

    It goes to o = min(t_next + scale h (1 - t_next), 1), with h = t_next - t:

        mean = a (alpha_o x1 + sigma_o x0),      a = alpha' / alpha_o
        std = sqrt(sigma'^2 - (a sigma_o)^2)

    x1 and x0 are the predictions at t; primes are at t_next, not derivatives. scale = 0 is DDIM.
    Its marginals are those of the flow up to O(h).

    Args:
        velocity: the velocity.
        scale: how far beyond, at least 0.
        schedule: the path of the velocity; the default is the linear one.

    Returns:
        Step: (params, x, t, t_next, key, cond=None) -> (x_next, mean, std [b]), for `sample_sde`.
            With key=None x_next is the mean.

    Raises:
        ValueError: scale is negative.

    References:
        Hu et al., *AMO Sampler: Enhancing Text Rendering with Overshooting*, 2024, arXiv:2411.19415
            (on the linear path).
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
    """The states of a stochastic sampler, and what each of its n steps drew from.

    Attributes:
        t: the grid, [n + 1].
        x: the states, [n + 1, b, *event].
        mean: the mean of every step, [n, b, *event]; of tokens, that of their one-hot vectors, [n,
            b, *event, V].
        std: the standard deviation of every step, [n, b]; of tokens [n, b, *event, V].
    """

    t: Float[Array, " times"]
    x: Num[Array, "times b *event"]
    mean: Float[Array, "steps b ..."]
    std: Float[Array, "steps b ..."]


def sample_sde(
    step: Step,
    params: Params,
    x0: Num[Array, "b *event"],
    key: Key,
    grid: Times | ArrayLike,
    cond: Cond = None,
    *,
    return_trajectory: bool = False,
) -> tuple[Num[Array, "b *event"], Trajectory | None]:
    """Sample by stochastic steps over a grid, with a key for each.

    Also known as: SDE sampling, stochastic sampling, sample SDE, Euler-Maruyama sampler, jump
    process sampling, tau-leaping.

    It takes n evaluations of the velocity. A row that is not finite at the end has no part in a
    derivative.

    Args:
        step: such as `euler_maruyama(velocity, noise)` or `ancestral(velocity)`; of tokens, such as
            `jump(field)`.
        params: the params of the velocity.
        x0: the source, [b, *event], at the first time of the grid; integers where they are tokens.
        key: a key.
        grid: rising times [n + 1] in [0, 1].
        cond: the condition, [b, ...] or one row for all.
        return_trajectory: whether to return the trajectory.

    Returns:
        x: the states at the last time, [b, *event], in the type of x0; the states between are
            float32 or better, and those of tokens integers.
        trajectory: a `Trajectory`, None unless `return_trajectory`.

    Raises:
        ValueError: grid does not rise or leaves [0, 1], or the key is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from jflow import solvers
        >>> from jflow.types import Velocity
        >>> def apply(params, x, t, cond=None, *, key=None):  # all data at 3
        ...     return (3 - x) / (1 - t[:, None])
        >>> step, grid = solvers.ancestral(Velocity(lambda *_: {}, apply)), solvers.grids.uniform(4)
        >>> x0, key = jnp.ones((2, 1)), jax.random.key(0)
        >>> x, trajectory = solvers.sample_sde(step, {}, x0, key, grid, return_trajectory=True)
        >>> np.asarray(x).round(3).ravel().tolist(), trajectory.x.shape
        ([3.0, 3.0], (5, 2, 1))
    """
    check_grid("solvers.sample_sde", grid, rising=True)
    need_key("solvers.sample_sde", key)
    cond = check_cond("solvers.sample_sde", cond, count_rows("solvers.sample_sde", x0))
    ts = jnp.asarray(grid, float_dtype(x0))
    start = x0 if jnp.issubdtype(x0.dtype, jnp.integer) else x0.astype(float_dtype(x0))

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
) -> Float[Array, "n b"]:
    """The log-density of each step of a trajectory under given params, as policy gradients need it.

    Each step is taken at its own t, t_next and x. With the params that walked it these are
    step_log_prob(x[1:], mean, std) of the trajectory: the ratio that policy gradients start from is
    1.

    Args:
        step: the step of the trajectory; one that needs a key does not do.
        params: the params of the velocity.
        trajectory: as `sample_sde(..., return_trajectory=True)` returns it.
        cond: the condition, [b, ...] or one row for all.

    Returns:
        The log-densities, [n, b], in nats.
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


def step_log_prob(
    x_next: Num[Array, "b *event"], mean: Float[Array, "b ..."], std: Float[Array, "b ..."]
) -> Float[Array, " b"]:
    """The log-density of what a stochastic step drew.

        log N(x_next; mean, std^2)      summed over the event

    Dimensions with std = 0 have no density, as in the last step of many samplers, and count 0. For
    tokens, whose mean [b, *event, V] holds their probabilities, it is the log of these.

    Args:
        x_next: the state drawn, [b, *event].
        mean: the mean of the step, [b, *event]; of tokens [b, *event, V].
        std: its standard deviation, [b], or [b, ...] that broadcasts; of tokens it is not read.

    Returns:
        The log-densities, [b], in nats, in float32 or better.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import solvers
        >>> x = jnp.zeros((1, 2))
        >>> round(float(solvers.step_log_prob(x, x, jnp.ones(1))[0]), 3)  # -log(2 pi)
        -1.838
    """
    if jnp.issubdtype(x_next.dtype, jnp.integer):
        return sum_event(jnp.log(at_tokens(mean, x_next)))
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
    """A `Step` from (params, x, t, t_next, cond) -> (mean, std [b]); without a key x_next is the
    mean.
    """

    def step(params, x, t, t_next, key, cond=None):
        x = x.astype(float_dtype(x))
        t, t_next = (rows(s, x.shape[0]).astype(x.dtype) for s in (t, t_next))
        mean, std = moments(params, x, t, t_next, cond)
        if key is None:
            return mean, mean, std
        return mean + expand_to(std, x) * jax.random.normal(key, x.shape, x.dtype), mean, std

    return step


def _rate(name, noise):
    check_number(name, "noise (w = g^2 / 2)", noise, ">= 0", lambda w: w >= 0)
    return lambda t: number_at(name, "noise(t)", noise, t, like=t)
