"""Editing without inversion: the difference of two velocities moves the data itself."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.checks import check_whole, count_rows, need_key
from jflow._core.times import Times
from jflow.steering._common import check_conditions, check_images, euler, known_times, velocity_at
from jflow.types import Array, Cond, Key, Params, Velocity

__all__ = ["flow_director", "flow_edit"]


def flow_edit(
    velocity: Velocity,
    params: Params,
    x: Float[Array, "b *event"],
    cond: Cond,
    new_cond: Cond,
    key: Key,
    *,
    n_max: int | None = None,
    n_min: int = 0,
    n_avg: int = 1,
    grid: int | Times | ArrayLike = 50,
) -> Float[Array, "b *event"]:
    """FlowEdit: edit data by the difference of the velocities under two conditions.

    Also known as: FlowEdit, inversion-free editing.

        x_t = t x + (1 - t) e,      z_t = z + x_t - x,      e ~ N(0, 1), new at every step
        z <- z + h (v(z_t, t, new_cond) - v(x_t, t, cond)),      from z = x

    averaged over n_avg draws of e. The last n_max steps of the grid are taken, the last n_min of
    them as plain Euler steps of z_t under new_cond. Equal conditions change nothing, exactly, where
    n_min is 0. It takes 2 n_avg (n_max - n_min) + n_min evaluations of b rows.

    Args:
        velocity: a conditional velocity of the linear path from standard normal noise, guided or
            not.
        params: its params.
        x: the data, [b, *event], of a floating type.
        cond: the condition of x, [b, ...] or one row for all.
        new_cond: the condition to edit to, as cond.
        key: a key, for e.
        n_max: how many steps are taken; None: all. Fewer stay closer to x.
        n_min: how many of them are plain, at most n_max.
        n_avg: how many draws of e a step averages over.
        grid: a number of equal steps, or rising times [n + 1] to 1, not traced.

    Returns:
        The edited data, [b, *event], in the type of x.

    Raises:
        ValueError: n_min is above n_max or n_max above the steps of the grid, a condition or the
            key is missing.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> from jflow.types import Velocity
        >>> def apply(params, x, t, cond=None, *, key=None):  # a shift of the noise by cond
        ...     return cond[:, None] + 0 * x
        >>> velocity, x, key = Velocity(lambda *_: {}, apply), jnp.ones((2, 1)), jax.random.key(0)
        >>> steering.flow_edit(velocity, {}, x, jnp.zeros(1), jnp.ones(1), key, grid=4).tolist()
        [[2.0], [2.0]]

    References:
        Kulikov, Kleiner, Huberman-Spiegelglas, Michaeli, *FlowEdit: Inversion-Free Text-Based
            Editing Using Pre-Trained Flow Models*, 2024, arXiv:2412.08629.
    """
    name = "flow_edit"
    steps = _steps(name, grid, n_max, n_min, n_avg)
    state = check_images(name, velocity, x)
    cond, new_cond = check_conditions(name, cond, new_cond, count_rows(name, x))
    edit_key, plain_key = jax.random.split(need_key(name, key))

    def change(z, t, key):
        moved = differences(
            name, velocity, params, state, z, t, cond, new_cond, jax.random.split(key, n_avg)
        )
        return jnp.mean(moved, axis=0)

    ts = jnp.asarray(steps, state.dtype)
    edited = ts.shape[0] - 1 - n_min
    z = _edited(change, state, ts[: edited + 1], edit_key)
    if n_min > 0:
        e = jax.random.normal(plain_key, state.shape, state.dtype)
        z = noised(state, e, ts[edited]) + (z - state)
        z = euler(name, velocity, params, z, ts[edited:], new_cond)
    return z.astype(x.dtype)


def flow_director(
    velocity: Velocity,
    params: Params,
    x: Float[Array, "b *event"],
    cond: Cond,
    new_cond: Cond,
    key: Key,
    *,
    mask: Array | Callable[..., Array] | None = None,
    scale: float = 1.0,
    n_max: int | None = None,
    n_avg: int = 4,
    n_worse: int = 1,
    grid: int | Times | ArrayLike = 50,
) -> Float[Array, "b *event"]:
    """FlowDirector: FlowEdit inside a mask, guided away from an average over fewer draws.

    Also known as: FlowDirector, differential averaging guidance.

        better = mean of the n_avg differences of `flow_edit`
        worse = mean of the first n_worse of them
        z <- z + h mask (better + (scale - 1) (better - worse))

    scale = 1 without a mask is `flow_edit`; where the mask is 0, x does not change, exactly. It
    takes 2 n_avg n_max evaluations of b rows.

    Args:
        velocity: a conditional velocity of the linear path from standard normal noise.
        params: its params.
        x: the data, [b, *event], of a floating type, such as frames of a video.
        cond: the condition of x, [b, ...] or one row for all.
        new_cond: the condition to edit to, as cond.
        key: a key, for the noise.
        mask: where to edit, in [0, 1], that broadcasts to [b, *event]; or (difference, t) -> such a
            mask at every step; the paper has it from the attention of the edited words.
        scale: the guidance, 1 without.
        n_max: how many steps are taken, the last ones of the grid; None: all.
        n_avg: how many draws of the noise a step averages over.
        n_worse: how many draws the worse average has, below n_avg (or at most 1).
        grid: a number of equal steps, or rising times [n + 1] to 1, not traced.

    Returns:
        The edited data, [b, *event], in the type of x.

    Raises:
        ValueError: n_worse is not below n_avg, n_max is above the steps of the grid, the mask does
            not broadcast to x, a condition or the key is missing.

    References:
        Li, Yang, Song, Liu, Zhang, *FlowDirector: Training-Free Flow Steering for Precise
            Text-to-Video Editing*, 2025, arXiv:2506.05046 (of its first version. The published code
            averages over all subsets of n_worse draws, whose mean is the better average itself: its
            guidance is 0. Here the worse one is of the first draws).
    """
    name = "flow_director"
    steps = _steps(name, grid, n_max, 0, n_avg)
    check_whole(name, n_worse=n_worse)
    if n_worse > max(n_avg - 1, 1):
        raise ValueError(f"{name}: expected n_worse below n_avg={n_avg}, got {n_worse}")
    state = check_images(name, velocity, x)
    cond, new_cond = check_conditions(name, cond, new_cond, count_rows(name, x))
    scale = float(scale)

    def change(z, t, key):
        moved = differences(
            name, velocity, params, state, z, t, cond, new_cond, jax.random.split(key, n_avg)
        )
        better, worse = jnp.mean(moved, axis=0), jnp.mean(moved[:n_worse], axis=0)
        guided = better + (scale - 1) * (better - worse)
        if mask is None:
            return guided
        where = jnp.asarray(mask(better, t) if callable(mask) else mask, state.dtype)
        try:
            return guided * jnp.broadcast_to(where, state.shape)
        except ValueError as error:
            raise ValueError(
                f"{name}: expected a mask that broadcasts to {list(state.shape)}, got shape"
                f" {list(where.shape)}"
            ) from error

    ts = jnp.asarray(steps, state.dtype)
    edit_key, _ = jax.random.split(need_key(name, key))  # the draws of flow_edit
    return _edited(change, state, ts, edit_key).astype(x.dtype)


def noised(x, e, t):
    """The point of the linear path at time t."""
    return t * x + (1 - t) * e


def differences(name, velocity, params, x, z, t, cond, new_cond, keys, shift=1.0):
    """v(z_t, t, new_cond) - v(x_t, t, cond) for each key, [n, b, *event], with z_t = x_t + (t +
    shift (1 - t)) (z - x). Each velocity is an evaluation of b rows by itself, so that equal
    conditions give equal numbers."""

    def one(key):
        x_t = noised(x, jax.random.normal(key, x.shape, x.dtype), t)
        z_t = x_t + (t + shift * (1 - t)) * (z - x)
        new = velocity_at(name, velocity, params, z_t, t, new_cond)
        return new - velocity_at(name, velocity, params, x_t, t, cond)

    return jax.lax.map(one, keys)


def _edited(change, z, ts, key):
    """z after an Euler step of change(z, t, key) between each two times."""

    def advance(z, at):
        t, t_next, key = at
        return z + (t_next - t) * change(z, t, key), None

    keys = jax.random.split(key, ts.shape[0] - 1)
    return jax.lax.scan(advance, z, (ts[:-1], ts[1:], keys))[0]


def _steps(name, grid, n_max, n_min, n_avg):
    """The times of the last n_max steps of the grid."""
    times = known_times(name, grid)
    if times[-1] != 1:
        raise ValueError(f"{name}: expected a grid that ends at 1, the data, got {times[-1]}")
    n = len(times) - 1
    n_max = n if n_max is None else n_max
    check_whole(name, n_max=n_max, n_avg=n_avg)
    check_whole(name, 0, n_min=n_min)
    if not n_min <= n_max <= n:
        raise ValueError(
            f"{name}: expected n_min <= n_max <= {n}, the steps of the grid, got n_min={n_min} and"
            f" n_max={n_max}"
        )
    return times[n - n_max :]
