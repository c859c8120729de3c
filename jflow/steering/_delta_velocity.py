"""Editing as optimization: velocities as gradients of the data, or of what renders it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_cond, check_noun, check_whole, count_rows, need_key
from jflow._core.numbers import check_number, number_at
from jflow._core.times import Times
from jflow.steering._common import check_conditions, check_images, check_optimizer, velocity_at
from jflow.steering._flow_edit import differences, noised
from jflow.types import Array, Cond, Field, Key, NumberOrFunction, Params, PyTree, Velocity

__all__ = ["approximate_flow", "delta_velocity"]


def delta_velocity(
    velocity: Velocity,
    params: Params,
    x: Float[Array, "b *event"],
    cond: Cond,
    new_cond: Cond,
    key: Key,
    *,
    times: Times | ArrayLike,
    optimizer: optax.GradientTransformation,
    shift: NumberOrFunction = lambda t: t,
    n_avg: int = 1,
) -> Float[Array, "b *event"]:
    """DVRF: edit data by gradient steps on the difference of two velocities.

    Also known as: DVRF, delta velocity rectified flow, DDS, delta denoising score.

        x_t = t x + (1 - t) e,      z_t = t z + (1 - t) e + c (1 - t) (z - x),      e ~ N(0, 1)
        gradient of z = v(x_t, t, cond) - v(z_t, t, new_cond) + (1 - c) (z - x)

    averaged over n_avg draws of e, one step of the optimizer at each of the times, from z = x. With
    the shift c = 0 it is the delta denoising score divided by t; with c = 1, times = grid[:-1] and
    `optax.sgd(lambda i: jnp.diff(grid)[i])` it is `flow_edit`. Equal conditions change nothing,
    exactly. It takes 2 n_avg evaluations of b rows for each time.

    Args:
        velocity: a conditional velocity of the linear path from standard normal noise.
        params: its params.
        x: the data, [b, *event], of a floating type.
        cond: the condition of x, [b, ...] or one row for all.
        new_cond: the condition to edit to, as cond.
        key: a key, for e.
        times: of the steps, [n] in [0, 1], in any order: rising as in sampling, or random as in
            score distillation.
        optimizer: of z, such as `optax.sgd(0.02)`.
        shift: c, a number, or t [b] -> [b]. It rises with t by default, as the authors' does over
            the steps.
        n_avg: how many draws of e a step averages over.

    Returns:
        The edited data, [b, *event], in the type of x.

    Raises:
        ValueError: times are not in [0, 1], shift is a negative number, a condition or the key is
            missing.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from jflow import steering
        >>> from jflow.types import Velocity
        >>> def apply(params, x, t, cond=None, *, key=None):  # a shift of the noise by cond
        ...     return cond[:, None] + 0 * x
        >>> velocity, x, key = Velocity(lambda *_: {}, apply), jnp.ones((1, 1)), jax.random.key(0)
        >>> old, new, how = jnp.zeros(1), jnp.ones(1), {"optimizer": optax.sgd(0.5)}
        >>> x = steering.delta_velocity(velocity, {}, x, old, new, key, times=[0.0, 0.5], **how)
        >>> x.tolist()  # 1 + 1 / 2, and (1 - 1 / 2 / 2) / 2 with the shift 1 / 2
        [[1.875]]

    References:
        Beaudouin et al., *Delta Velocity Rectified Flow for Text-to-Image Editing*, 2025,
            arXiv:2509.05342.
        Hertz, Aberman, Cohen-Or, *Delta Denoising Score*, 2023, arXiv:2304.07090 (the shift 0).
    """
    name = "delta_velocity"
    check_number(name, "shift", shift, ">= 0", lambda c: c >= 0)
    check_whole(name, n_avg=n_avg)
    check_optimizer(name, optimizer)
    state = check_images(name, velocity, x)
    ts = _times(name, times, state.dtype)
    cond, new_cond = check_conditions(name, cond, new_cond, count_rows(name, x))

    def advance(carry, at):
        (z, memory), (t, key) = carry, at
        c = number_at(name, "shift(t)", shift, t[None], like=t[None])[0]
        moved = differences(
            name, velocity, params, state, z, t, cond, new_cond, jax.random.split(key, n_avg), c
        )
        gradient = (1 - c) * (z - state) - jnp.mean(moved, axis=0)
        return _stepped(optimizer, gradient, memory, z), None

    keys = jax.random.split(need_key(name, key), ts.shape[0])
    (z, _), _ = jax.lax.scan(advance, (state, optimizer.init(state)), (ts, keys))
    return z.astype(x.dtype)


def approximate_flow(
    velocity: Velocity,
    params: Params,
    theta: PyTree,
    cond: Cond,
    new_cond: Cond,
    key: Key,
    *,
    times: Times | ArrayLike,
    optimizer: optax.GradientTransformation,
    render: Callable[..., Array] | None = None,
    source_params: Params | None = None,
) -> PyTree:
    """DreamFlow: optimize what renders images along an approximate probability flow.

    Also known as: DreamFlow, APFO, approximate probability flow ODE, score distillation, SDS.

        x = render(theta, key),      x_t = t x + (1 - t) e,      e ~ N(0, 1)
        gradient of x = v_source(x_t, t, cond) - v(x_t, t, new_cond),      pulled back to theta

    at predetermined times: the velocity of the law that x comes from is left behind, and that of
    the one to arrive at is followed, as on a Schroedinger bridge between them. The source is the
    velocity under cond, with `source_params` where it was tuned to what is rendered now. Without a
    cond it is the point x itself, whose velocity is x - e: that is score distillation (SDS). Equal
    conditions and params change nothing, exactly. It takes 2 evaluations for each time, 1 without a
    cond.

    Args:
        velocity: a conditional velocity of the linear path from standard normal noise.
        params: its params.
        theta: what is optimized: images [b, *event], or a pytree that `render` takes.
        cond: the condition of the images now, [b, ...] or one row for all; None: SDS.
        new_cond: the condition to arrive at, as cond.
        key: a key, for the noise and the views.
        times: of the steps, [n] in [0, 1], that rise as in sampling.
        optimizer: of theta, such as `optax.adam(1e-2)`.
        render: (theta, key) -> images [b, *event], the key for a random view; None: theta itself.
        source_params: the params of the source's velocity; None: params.

    Returns:
        The optimized theta, in the types of theta.

    Raises:
        ValueError: times are not in [0, 1], new_cond or the key is missing.

    References:
        Lee, Sohn, Shin, *DreamFlow: High-Quality Text-to-3D Generation by Approximating Probability
            Flow*, 2024, arXiv:2403.14966 (without the fine-tuning of the source in between).
        Poole, Jain, Barron, Mildenhall, *DreamFusion: Text-to-3D using 2D Diffusion*, 2022,
            arXiv:2209.14988 (SDS).
    """
    name = "approximate_flow"
    if new_cond is None:
        raise ValueError(f"{name}: expected new_cond, what to edit to, got None")
    check_noun(name, velocity, Velocity, Field)
    check_optimizer(name, optimizer)
    if render is None:
        check_images(name, velocity, theta, "theta, images without render,")
    draw = (lambda theta, key: theta) if render is None else render
    source_params = params if source_params is None else source_params
    first = jax.eval_shape(draw, theta, need_key(name, key))
    dtype, n = float_dtype(first), count_rows(name, first)
    cond, new_cond = check_cond(name, cond, n), check_cond(name, new_cond, n)
    ts = _times(name, times, dtype)

    def advance(carry, at):
        (theta, memory), (t, key) = carry, at
        view_key, noise_key = jax.random.split(key)
        x, pull = jax.vjp(lambda theta: draw(theta, view_key), theta)
        e = jax.random.normal(noise_key, x.shape, dtype)
        x_t = noised(x.astype(dtype), e, t)
        new = velocity_at(name, velocity, params, x_t, t, new_cond)
        if cond is None:
            old = x.astype(dtype) - e
        else:
            old = velocity_at(name, velocity, source_params, x_t, t, cond)
        (gradient,) = pull((old - new).astype(x.dtype))
        return _stepped(optimizer, gradient, memory, theta), None

    keys = jax.random.split(key, ts.shape[0])
    return jax.lax.scan(advance, (theta, optimizer.init(theta)), (ts, keys))[0][0]


def _stepped(optimizer, gradient, memory, z):
    """(z, memory) after a step of the optimizer."""
    updates, memory = optimizer.update(gradient, memory, z)
    return optax.apply_updates(z, updates), memory


def _times(name, times, dtype):
    """Times [n] in [0, 1], in any order; traced ones have their shape checked only."""
    if np.ndim(times) != 1 or np.shape(times)[0] < 1:
        raise ValueError(f"{name}: expected times of shape [n], got {list(np.shape(times))}")
    if not isinstance(times, jax.core.Tracer):
        known = np.asarray(times, np.float64)
        if not np.all((known >= 0) & (known <= 1)):
            raise ValueError(f"{name}: expected times in [0, 1], got {known}")
    return jnp.asarray(times, dtype)
