"""Sampling that stops every few steps to lower a loss of its state."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.checks import check_cond, check_rows, check_whole, count_rows
from jflow._core.times import Times
from jflow.steering._common import check_images, check_optimizer, euler, known_times, velocity_at
from jflow.steering._condition import check_window
from jflow.types import Array, Cond, Params, Velocity

__all__ = ["coherent_motion", "motion_variance", "periodic_guidance"]


def periodic_guidance(
    velocity: Velocity,
    params: Params,
    x0: Float[Array, "b *event"],
    cond: Cond = None,
    *,
    loss: Callable[[Array, Array], Array],
    optimizer: optax.GradientTransformation,
    every: int = 1,
    repeats: int = 1,
    window: tuple[float, float] = (0.0, 1.0),
    grid: int | Times | ArrayLike = 50,
) -> Float[Array, "b *event"]:
    """GuideFlow3D: sample by Euler steps, and lower a loss of the state every few of them.

    Also known as: GuideFlow3D, optimization-guided sampling.

        x <- x + h v(x, t),      and after every k-th step that arrives at first <= t < last
        x <- x after `repeats` steps of the optimizer on the sum of loss(x, t)

    The optimizer keeps its state from one to the next. After the step to t = 1 there is none, so
    that the sample is one of the flow. It takes n evaluations for n steps; the loss may take more.

    Args:
        velocity: the velocity.
        params: its params.
        x0: the source, [b, *event], of a floating type.
        cond: the condition, [b, ...] or one row for all.
        loss: (x [b, *event], t [b]) -> [b], of the state at time t, such as how little parts of one
            kind resemble each other.
        optimizer: of the state, such as `optax.adam(1e-2)`.
        every: k, at least 1.
        repeats: how many steps the optimizer takes each time, at least 1.
        window: the times (first, last) within which the loss counts, the last one excluded.
        grid: a number of equal steps, or rising times [n + 1], not traced.

    Returns:
        The sample, [b, *event], in the type of x0.

    Raises:
        TypeError: velocity or optimizer is something else.
        ValueError: the window is not in [0, 1] or fewer than `every` steps arrive in it, every or
            repeats is not at least 1, or the loss returns another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from jflow import steering
        >>> from jflow.types import Velocity
        >>> velocity = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: x**0)
        >>> half = {"loss": lambda x, t: jnp.sum(x**2, axis=1) / 2, "optimizer": optax.sgd(0.5)}
        >>> x0 = jnp.zeros((1, 1))
        >>> x = steering.periodic_guidance(velocity, {}, x0, **half, every=2, grid=4)
        >>> x.tolist()  # (1/4 + 1/4) / 2 + 1/4 + 1/4
        [[0.75]]

    References:
        Deb Sarkar, Stekovic, Lepetit, Armeni, *GuideFlow3D: Optimization-Guided Rectified Flow For
            Appearance Transfer*, 2025, arXiv:2510.16136.
    """
    return _guided(
        "periodic_guidance",
        (velocity, params, x0, cond),
        lambda x, t, cond: loss(x, t),
        (optimizer, every, repeats, window, grid),
    )


def coherent_motion(
    velocity: Velocity,
    params: Params,
    x0: Float[Array, "b frames *event"],
    cond: Cond = None,
    *,
    optimizer: optax.GradientTransformation,
    window: tuple[float, float] = (0.0, 0.25),
    grid: int | Times | ArrayLike = 50,
) -> Float[Array, "b frames *event"]:
    """FlowMo: sample a video whose motion varies little, by lowering the variance of its frames.

    Also known as: FlowMo, variance-based flow guidance.

        x <- x after a step of the optimizer on motion_variance(x + (1 - t) v(x, t))

    after every Euler step that arrives at first <= t < last: the early ones, in which the motion is
    made. The gradient goes through the network. It takes n evaluations for n steps, and one more
    with its backward pass for each step in the window.

    How large a step should be depends on the data: the gradient is that of one site, the largest,
    spread over the state by the network. Compare a few rates and windows, and look at the motion
    itself, since less motion has less variance too (`motion_variance`).

    Args:
        velocity: the velocity of videos or of their latents, of the linear path.
        params: its params.
        x0: the source, [b, frames, *sites, channels], of a floating type, at least 3 frames. The
            frames are axis 1, the channels the last.
        cond: the condition, [b, ...] or one row for all.
        optimizer: of the state, such as `optax.sgd(10.0)` or `optax.adam(0.03)`, rates that changed
            videos of pixels in [-1, 1] (experiments/coherent_motion). It keeps its state from one
            step to the next. One that looks at all numbers at once, such as
            `optax.clip_by_global_norm`, makes the videos of a batch depend on each other.
        window: the times (first, last) within which the variance counts, the last one excluded.
        grid: a number of equal steps, or rising times [n + 1], not traced.

    Returns:
        The sample, [b, frames, *sites, channels], in the type of x0.

    Raises:
        TypeError: velocity or optimizer is something else.
        ValueError: the window is not in [0, 1] or no step arrives in it, or there are fewer than 3
            frames.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from jflow import steering
        >>> from jflow.types import Velocity
        >>> velocity = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> x0 = jnp.array([0.0, 1.0, 4.0])[None, :, None]  # changes by 1, then by 3
        >>> options = {"optimizer": optax.sgd(0.25), "window": (0.0, 0.75), "grid": 2}
        >>> steering.coherent_motion(velocity, {}, x0, **options)[0, :, 0].tolist()
        [-0.25, 1.5, 3.75]

    References:
        Shaulov, Hazan, Wolf, Chefer, *FlowMo: Variance-Based Flow Guidance for Coherent Motion in
            Video Generation*, 2025, arXiv:2506.01144. The code that its authors published differs:
            it takes the variance of the output of the network, where here it is that of the
            predicted data, and takes one step of a new Adam of rate 1e-3 each time, in the first 12
            of 50 steps, which its shifted grid has at noise levels above 0.94.
    """
    name = "coherent_motion"

    def loss(x, t, cond):
        v = velocity_at(name, velocity, params, x, t, cond)
        return motion_variance(x + (1 - t[0]) * v)

    return _guided(name, (velocity, params, x0, cond), loss, (optimizer, 1, 1, window, grid))


def motion_variance(x: Float[Array, "b frames *event"]) -> Float[Array, " b"]:
    """How much the motion of a video varies: the largest variance in time of its differences.

    Also known as: appearance-debiased temporal variance (FlowMo).

        max over sites of mean over channels of var over f of |x[f + 1] - x[f]|

    It is 0 for a still video and for one all of whose numbers change by equal amounts, and does not
    see what all frames share. It is no measure of smoothness alone. Less motion has less of it. An
    object that moves steadily over pixels is above 0, since each pixel changes while it passes. And
    it is 0 for a video that jumps back and forth between two pictures: the size of its changes is
    always the same.

    Args:
        x: the frames or their latents, [b, frames, *sites, channels], at least 3 frames. With one
            channel each pixel is a site; patches are sites once their pixels are channels.

    Returns:
        The variance of each row, [b].

    Raises:
        ValueError: there are fewer than 3 frames, or no axis beside them.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> steady, jumps, flickers = [0.0, 1.0, 2.0], [0.0, 0.0, 2.0], [0.0, 1.0, 0.0]
        >>> steering.motion_variance(jnp.array([steady, jumps, flickers])[:, :, None]).tolist()
        [0.0, 1.0, 0.0]

    References:
        Shaulov, Hazan, Wolf, Chefer, *FlowMo: Variance-Based Flow Guidance for Coherent Motion in
            Video Generation*, 2025, arXiv:2506.01144.
    """
    if jnp.ndim(x) < 3 or jnp.shape(x)[1] < 3:
        raise ValueError(
            "motion_variance: expected x of shape [b, frames, ..., channels] with at least 3"
            f" frames, got {list(jnp.shape(x))}"
        )
    varies = jnp.mean(jnp.var(jnp.abs(jnp.diff(x, axis=1)), axis=1), axis=-1)
    return jnp.max(varies.reshape(x.shape[0], -1), axis=1)


def _guided(name, flow, loss, options):
    """Euler steps, with steps of the optimizer on the loss (x, t [b], cond) -> [b] in between."""
    (velocity, params, x0, cond), (optimizer, every, repeats, window, grid) = flow, options
    check_whole(name, every=every, repeats=repeats)
    check_optimizer(name, optimizer)
    start, stop = check_window(name, window)
    times = known_times(name, grid)
    x = check_images(name, velocity, x0, "x0")
    cond = check_cond(name, cond, count_rows(name, x0))
    ts = jnp.asarray(times, x.dtype)
    inside = np.flatnonzero((times[1:] >= start) & (times[1:] < stop))  # one run of steps
    groups = len(inside) // every
    if not groups:
        raise ValueError(
            f"{name}: expected {every} or more steps of the grid to arrive in the window [{start},"
            f" {stop}), so that something is steered, got {len(inside)}"
        )
    first = int(inside[0])
    last = first + groups * every

    def total(x, t):
        value = loss(x, jnp.broadcast_to(t, x.shape[:1]), cond)
        return jnp.sum(check_rows(name, "the loss", value, x.shape[0]))

    def lowered(carry, t):
        x, memory = carry
        updates, memory = optimizer.update(jax.grad(total)(x, t), memory, x)
        return (optax.apply_updates(x, updates), memory), None

    def group(carry, at):
        x = euler(name, velocity, params, carry[0], at, cond)
        return jax.lax.scan(lowered, (x, carry[1]), jnp.broadcast_to(at[-1], (repeats,)))

    x = euler(name, velocity, params, x, ts[: first + 1], cond)
    rows = jnp.asarray(first + every * np.arange(groups)[:, None] + np.arange(every + 1), int)
    (x, _), _ = jax.lax.scan(group, (x, optimizer.init(x)), ts[rows])
    return euler(name, velocity, params, x, ts[last:], cond).astype(x0.dtype)
