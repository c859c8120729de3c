"""Search at inference: better samples of a trained velocity for more evaluations of it.

A reward is a function of clean data, x1 [rows, *event] -> [rows], higher is better; between, it is
told the data that the velocity predicts. A deterministic flow branches nowhere, so that particles
go by a stochastic step that has the marginals of the flow (`solvers.ancestral`,
`solvers.euler_maruyama`); `paths.reschedule(velocity, paths.LINEAR, schedule)` moves the velocity
to another interpolant before, such as the variance preserving `paths.schedules.cosine()`.

References:
    Kim, Yoon, Hwang, Sung, *Inference-Time Scaling for Flow Models via Stochastic Generation and
        Rollover Budget Forcing*, 2025, arXiv:2503.19385.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jflow._core.arrays import expand_to
from jflow._core.checks import (
    check_cond,
    check_noun,
    check_rows,
    check_whole,
    count_rows,
    like_state,
    need_key,
)
from jflow._core.times import Times, check_unit_grid
from jflow.paths import LINEAR, Schedule, velocity_to_data
from jflow.solvers import Method, ancestral, sample
from jflow.steering._common import floating, raise_nan
from jflow.types import Array, Cond, Field, Key, Params, Step, Velocity

__all__ = ["SearchInfo", "best_of", "best_of_n", "particle_search", "rollover_search"]

Reward = Callable[[Array], Array]


class SearchInfo(NamedTuple):
    """What a search found and what it cost.

    Attributes:
        reward: of the rows that were returned, [b].
        evaluations: how often the velocity was evaluated for each of them, [b]; for
            `best_of_n`, for all n candidates together.
        rewards: the rewards of the predicted data on the way, one row for each time, [steps, b].
    """

    reward: Float[Array, " b"]
    evaluations: Int[Array, " b"]
    rewards: Float[Array, "steps b"]


def best_of(x: Float[Array, "rows *event"], reward: Float[Array, " rows"], n: int) -> Array:
    """Of every n rows that follow each other, the one with the highest reward.

    Args:
        x: the candidates, [b n, *event].
        reward: theirs, [b n]; NaN is never the best.
        n: how many belong together.

    Returns:
        The best, [b, *event].

    Raises:
        ValueError: n does not divide the rows, or reward has another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> x = jnp.arange(4.0)[:, None]
        >>> steering.best_of(x, jnp.array([1.0, 2.0, 5.0, 4.0]), 2).tolist()
        [[1.0], [2.0]]
    """
    groups = _groups("steering.best_of", x, n)
    reward = check_rows("steering.best_of", "reward", reward, x.shape[0]).reshape(groups, n)
    best = jnp.argmax(jnp.where(jnp.isnan(reward), -jnp.inf, reward), axis=1)
    return x.reshape(groups, n, *x.shape[1:])[jnp.arange(groups), best]


def best_of_n(
    velocity: Velocity,
    params: Params,
    x0: Float[Array, "rows *event"],
    reward: Reward,
    cond: Cond = None,
    *,
    n: int,
    method: Method | int | None = None,
) -> tuple[Float[Array, "b *event"], SearchInfo]:
    """Sample n times along the ODE and keep the sample with the highest reward.

    Also known as: BoN, best of N, rejection by reward.

    The reward of what is kept is the largest of n independent ones. n times the evaluations of the
    method.

    Args:
        velocity: the velocity.
        params: its params.
        x0: the source, [b n, *event]: the first n rows are the candidates of the first sample.
        reward: x1 [b n, *event] -> [b n].
        cond: the condition, [b n, ...], the same for the candidates of a sample, or one row.
        n: how many candidates.
        method: see `solvers.sample`.

    Returns:
        x1: the best, [b, *event]; NaN for a sample that saw a reward of NaN.
        info: a `SearchInfo`.

    Raises:
        ValueError: n does not divide the rows of x0; the reward returns another shape than [b n],
            or, where values are seen, outside jit, NaN, with the step and the row.

    Examples:
        >>> import jax
        >>> from jflow import oracles, steering
        >>> velocity = oracles.as_velocity(oracles.gaussian([0.0], 1.0))
        >>> x0 = jax.random.normal(jax.random.key(0), (64, 1))
        >>> x, info = steering.best_of_n(velocity, {}, x0, lambda x: x[:, 0], n=16, method=4)
        >>> x.shape, info.evaluations.tolist()  # Heun's method, two in each step
        ((4, 1), [128, 128, 128, 128])
    """
    name = "steering.best_of_n"
    groups = _groups(name, x0, n)
    x, solved = sample(velocity, params, x0, cond, method=method)
    found = check_rows(name, "reward(x1)", reward(x), x.shape[0])
    rewards = found.reshape(groups, n)
    raise_nan(name, found[None])
    bad = jnp.any(jnp.isnan(rewards), axis=1)
    kept = jnp.where(expand_to(bad, x[:groups]), jnp.nan, best_of(x, found, n))
    spent = jnp.sum(solved.evaluations.reshape(groups, n), axis=1)
    best = best_of(found, found, n)
    return kept, SearchInfo(jnp.where(bad, jnp.nan, best), spent, best[None])


def particle_search(
    velocity: Velocity,
    params: Params,
    x0: Float[Array, "rows *event"],
    key: Key,
    grid: Times | ArrayLike,
    reward: Reward,
    cond: Cond = None,
    *,
    particles: int,
    temperature: float = 1.0,
    step: Callable[[Velocity], Step] = ancestral,
    schedule: Schedule = LINEAR,
) -> tuple[Float[Array, "rows *event"], SearchInfo]:
    """Sequential Monte Carlo: particles that are drawn anew by the reward of what they predict.

    Also known as: SMC, particle filter, Feynman-Kac steering, twisted diffusion sampler.

    At each time of the grid the particles of a sample are resampled with the weights

        exp((r_i - r_(i-1)) / temperature),     r_i = reward(E[x1 | x at t_i]),  r_(-1) = 0

    and go on by the step. The weights of a path multiply to exp(reward(x1) / temperature): with
    many particles the results are draws of the data tilted by that, whatever the predictions are
    worth, as long as the reward is finite: -inf rules a particle out for good, also one that would
    have come back. A time at which all are ruled out is passed over. A constant reward changes
    nothing: the results are those of `solvers.sample_sde`. Resampling is systematic. A particle
    takes n evaluations on a grid [n + 1], and n + 1 rewards.

    Args:
        velocity: the velocity.
        params: its params.
        x0: the source, [b particles, *event]: those of the first sample first.
        key: a key.
        grid: rising times [n + 1] from 0 to 1.
        reward: x1 [rows, *event] -> [rows].
        cond: the condition, [rows, ...], the same for the particles of a sample, or one row.
        particles: how many for each sample.
        temperature: above 0, in units of the reward.
        step: makes the stochastic step of a velocity, such as
            `lambda v: solvers.euler_maruyama(v, solvers.noises.of_sigma())`. What it makes sees a
            velocity that was evaluated before, at x and t alone.
        schedule: the path of the velocity; the default is the linear one.

    Returns:
        x1: all particles, [b particles, *event]; NaN for those of a sample that saw a reward of
            NaN. `best_of` keeps the best.
        info: a `SearchInfo`, whose rewards [n + 1, rows] are before resampling.

    Raises:
        ValueError: particles does not divide the rows of x0, temperature is not above 0, the grid
            does not rise; the reward returns another shape than [rows], or, where values are seen,
            outside jit, NaN, with the step and the row.

    Examples:
        >>> import jax
        >>> from jflow import oracles, solvers, steering
        >>> velocity = oracles.as_velocity(oracles.gaussian([0.0], 1.0))
        >>> x0, grid = jax.random.normal(jax.random.key(0), (512, 1)), solvers.grids.uniform(99)
        >>> x, info = steering.particle_search(
        ...     velocity, {}, x0, jax.random.key(1), grid, lambda x: x[:, 0], particles=512
        ... )
        >>> abs(float(x.mean()) - 1) < 0.2  # N(0, 1) tilted by exp(x) is N(1, 1)
        True

    References:
        Singhal, Horvitz, Teehan, Ren, Yu, McKeown, Ranganath, *A General Framework for
            Inference-time Scaling and Steering of Diffusion Models*, 2025, arXiv:2501.06848 (the
            potentials, as differences).
        Kim, Yoon, Hwang, Sung, *Inference-Time Scaling for Flow Models via Stochastic Generation
            and Rollover Budget Forcing*, 2025, arXiv:2503.19385 (for flows).
    """
    name = "steering.particle_search"
    groups = _groups(name, x0, particles)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{name}: expected temperature > 0, got {temperature}")
    given = (velocity, params, x0, key, grid, reward, cond, step, schedule)
    start, ts, look, advance = _parts(name, *given)
    keys = jax.random.split(key, 2 * len(ts) - 1)

    def resampled(key, tree, r, before):
        """The rows that were drawn, and of each the reward that all weights so far make up."""
        weight = jnp.where(jnp.isnan(r), -jnp.inf, (r - before) / temperature)
        weight = weight.reshape(groups, particles)
        dead = jnp.all(weight == -jnp.inf, axis=1, keepdims=True)
        ends = jnp.cumsum(jax.nn.softmax(jnp.where(dead, 0, weight), axis=1), axis=1)
        at = jnp.arange(particles)[None] + jax.random.uniform(key, (groups, 1), ends.dtype)
        find = lambda ends, at: jnp.searchsorted(ends, at, side="right")  # noqa: E731
        i = jnp.minimum(jax.vmap(find)(ends * (particles / ends[:, -1:]), at), particles - 1)
        rows = (i + particles * jnp.arange(groups)[:, None]).ravel()
        told = jnp.where(jnp.repeat(dead, particles), before, r)  # no weight, no reward
        return jax.tree.map(lambda a: a[rows], (*tree, told))

    def advance_all(carry, at):
        x, before = carry
        t, t_next, draw_key, step_key = at
        v, r = look(x, t)
        x, v, kept = resampled(draw_key, (x, v), r, before)
        return (advance(v, x, t, t_next, step_key), kept), r

    carry = start, jnp.zeros_like(start, shape=start.shape[:1])
    (x, before), rewards = jax.lax.scan(
        advance_all, carry, (ts[:-1], ts[1:], keys[: len(ts) - 1], keys[len(ts) : 2 * len(ts) - 1])
    )
    r = check_rows(name, "reward(x1)", reward(x), x.shape[0]).astype(before.dtype)
    x, last, _ = resampled(keys[len(ts) - 1], (x, r), r, before)
    rewards = jnp.concatenate([rewards, r[None]])
    raise_nan(name, rewards)
    bad = jnp.any(jnp.isnan(rewards), axis=0).reshape(groups, particles).any(axis=1)
    bad = jnp.repeat(bad, particles)
    evaluations = jnp.full(x.shape[:1], len(ts) - 1, jnp.int32)
    x = jnp.where(expand_to(bad, x), jnp.nan, x).astype(x0.dtype)
    return x, SearchInfo(jnp.where(bad, jnp.nan, last), evaluations, rewards)


def rollover_search(
    velocity: Velocity,
    params: Params,
    x0: Float[Array, "b *event"],
    key: Key,
    grid: Times | ArrayLike,
    reward: Reward,
    cond: Cond = None,
    *,
    quota: int,
    step: Callable[[Velocity], Step] = ancestral,
    schedule: Schedule = LINEAR,
) -> tuple[Float[Array, "b *event"], SearchInfo]:
    """Rollover budget forcing: try the next state until it is better, and save what is left.

    Also known as: RBF, adaptive budget, greedy particle search.

    From each time to the next, states are drawn by the step one after another, until one predicts
    data with a higher reward than the state that they come from; what is not used of the quota is
    added to that of the next time. Where none is better in all the budget, the best of them is
    taken. The last step is taken as it is drawn, since at t=1 it has no noise to choose from.

    A row takes at most 1 + (n - 1) quota evaluations on a grid [n + 1]; `info.evaluations` counts
    those that it made. Rows that are done with a step wait for the others. It cannot be
    differentiated in reverse.

    Args:
        velocity: the velocity.
        params: its params.
        x0: the source, [b, *event].
        key: a key.
        grid: rising times [n + 1] from 0 to 1.
        reward: x1 [b, *event] -> [b].
        cond: the condition, [b, ...] or one row for all.
        quota: how many evaluations a step has, at least 1; with 1 it is `solvers.sample_sde`.
        step: makes the stochastic step of a velocity; see `particle_search`.
        schedule: the path of the velocity; the default is the linear one.

    Returns:
        x1: the samples, [b, *event]; NaN for a row that saw a reward of NaN.
        info: a `SearchInfo`, whose rewards [n + 1, b] are those of the states that were taken.

    Raises:
        ValueError: quota is below 1, the grid does not rise; the reward returns another shape than
            [b], or, where values are seen, outside jit, NaN, with the step and the row.

    Examples:
        >>> import jax
        >>> from jflow import oracles, solvers, steering
        >>> velocity = oracles.as_velocity(oracles.gaussian([0.0], 1.0))
        >>> x0, grid = jax.random.normal(jax.random.key(0), (64, 1)), solvers.grids.uniform(8)
        >>> x, info = steering.rollover_search(
        ...     velocity, {}, x0, jax.random.key(1), grid, lambda x: -((x[:, 0] - 2) ** 2), quota=4
        ... )
        >>> float(info.reward.mean()) > -1, int(info.evaluations.max()) <= 1 + 7 * 4
        (True, True)

    References:
        Kim, Yoon, Hwang, Sung, *Inference-Time Scaling for Flow Models via Stochastic Generation
            and Rollover Budget Forcing*, 2025, arXiv:2503.19385. That a state is compared with the
            one that it comes from, and the last step, are ours.
    """
    name = "steering.rollover_search"
    check_whole(name, quota=quota)
    given = (velocity, params, x0, key, grid, reward, cond, step, schedule)
    start, ts, look, advance = _parts(name, *given)
    loop_key, last_key = jax.random.split(key)

    def search(carry, at):
        x, v, r, saved = carry
        t, t_next, key = at
        budget = saved + quota

        def unfinished(state):
            return jnp.any(~state[-1])

        def draw(state):
            key, spent, best, nan, done = state
            key, own = jax.random.split(key)
            x_new = advance(v, x, t, t_next, own)
            v_new, r_new = look(x_new, t_next)
            better = ~done & ((spent == 0) | (r_new > best[2]) | jnp.isnan(best[2]))
            best = jax.tree.map(
                lambda new, old: jnp.where(expand_to(better, new), new, old),
                (x_new, v_new, r_new),
                best,
            )
            nan = nan | (~done & jnp.isnan(r_new))
            spent = spent + ~done
            return key, spent, best, nan, done | (best[2] > r) | (spent >= budget)

        none = jnp.zeros_like(r, dtype=bool)
        start = key, jnp.zeros_like(saved), (x, v, r), none, none
        _, spent, (x, v, r), nan, _ = jax.lax.while_loop(unfinished, draw, start)
        return (x, v, r, budget - spent), (jnp.where(nan, jnp.nan, r), spent)

    x = start
    v, r = look(x, ts[0])
    first = r
    carry = x, v, r, jnp.zeros_like(r, dtype=jnp.int32)
    keys = jax.random.split(loop_key, max(len(ts) - 2, 1))[: len(ts) - 2]
    (x, v, r, _), (rewards, spent) = jax.lax.scan(search, carry, (ts[:-2], ts[1:-1], keys))
    x = advance(v, x, ts[-2], ts[-1], last_key)
    r = check_rows(name, "reward(x1)", reward(x), x.shape[0]).astype(first.dtype)
    rewards = jnp.concatenate([first[None], rewards, r[None]])
    raise_nan(name, rewards)
    bad = jnp.any(jnp.isnan(rewards), axis=0)
    x = jnp.where(expand_to(bad, x), jnp.nan, x).astype(x0.dtype)
    evaluations = 1 + jnp.sum(spent, axis=0, dtype=jnp.int32)
    return x, SearchInfo(jnp.where(bad, jnp.nan, r), evaluations, rewards)


def _groups(name: str, x: Array, n: int) -> int:
    """How many samples n candidates each are the rows of x for."""
    check_whole(name, n=n)
    rows = count_rows(name, x)
    if rows % n:
        raise ValueError(
            f"{name}: expected a number of rows that is divisible by {n}, the candidates of each"
            f" sample, got {rows}"
        )
    return rows // n


def _parts(name, velocity, params, x0, key, grid, reward, cond, step, schedule):
    """x0 and the grid in float32 or better; look: (x, t) -> the velocity and the reward of what it
    predicts; advance: the step from a state whose velocity is known."""
    check_noun(name, velocity, Velocity, Field)
    need_key(name, key)
    check_unit_grid(name, grid)
    start = floating(name, x0)
    cond = check_cond(name, cond, len(start))
    # its params are the velocity of the state
    known = step(Velocity(lambda *_: {}, lambda v, x, t, cond=None, *, key=None: v))

    def look(x, t):
        rows = jnp.broadcast_to(t, x.shape[:1])
        v = like_state(name, velocity.apply(params, x, rows, cond), x)
        r = reward(velocity_to_data(v, x, rows, schedule))
        return v, check_rows(name, "reward(x1)", r, x.shape[0]).astype(x.dtype)

    def advance(v, x, t, t_next, key):
        return known(v, x, t, t_next, key, cond)[0]

    return start, jnp.asarray(grid, start.dtype), look, advance
