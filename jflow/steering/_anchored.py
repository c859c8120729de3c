"""Guidance by a classifier of data, as a fixed point around a reference trajectory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.arrays import expand_to
from jflow._core.checks import check_cond, check_rows, check_whole, count_rows
from jflow._core.times import Times
from jflow.steering._common import check_images, known_times, safe_norm, velocity_at
from jflow.types import Array, Cond, Params, Velocity

__all__ = ["anchored_guidance"]


def anchored_guidance(
    velocity: Velocity,
    params: Params,
    x0: Float[Array, "b *event"],
    cond: Cond = None,
    *,
    log_prob: Callable[[Array], Array],
    scale: float,
    iterations: int = 20,
    max_norm: float | None = None,
    grid: int | Times | ArrayLike = 4,
) -> tuple[Float[Array, "b *event"], Float[Array, " b"]]:
    """RectifID: classifier guidance by any differentiable score of data, solved as a fixed point.

    Also known as: RectifID, anchored classifier guidance.

        x_{k+1} = x_k + h_k (v(x_k, t_k) + g_k),      g_k = scale d log_prob(x_n) / d x_{k+1}

    The gradients g are those at the trajectory that they lead to. They start at 0, which is the
    reference trajectory from x0, and are computed anew `iterations` times. Where the flow is
    straight this is x_n = x_ref + scale grad log_prob(x_n), and converges where scale times the
    Lipschitz constant of the gradient is below 1, by that factor an iteration. scale = 0 is the
    reference. No classifier of noisy data is needed. It takes (iterations + 1) n evaluations, and
    iterations n backward passes, of n steps.

    Args:
        velocity: the velocity; few steps want a straight one.
        params: its params.
        x0: the source, [b, *event], of a floating type.
        cond: the condition, [b, ...] or one row for all.
        log_prob: x [b, *event] -> [b], what the data shall raise, such as the log-probability of a
            classifier or minus the distance to an identity.
        scale: the guidance, at least 0.
        iterations: how often the gradients are computed, at least 1.
        max_norm: the largest norm of a g_k, row by row; None: any.
        grid: a number of equal steps, or rising times [n + 1], not traced.

    Returns:
        x: the guided data, [b, *event], in the type of x0.
        residual: the norm of the last change of all h_k g_k, [b]: 0 at a fixed point.

    Raises:
        ValueError: scale is negative, iterations is not at least 1, max_norm is not above 0, or
            log_prob returns another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> from jflow.types import Velocity
        >>> velocity = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> log_prob = lambda x: -jnp.sum((x - 3) ** 2, axis=1) / 2
        >>> x, residual = steering.anchored_guidance(
        ...     velocity, {}, jnp.zeros((1, 1)), log_prob=log_prob, scale=0.5
        ... )
        >>> round(float(x[0, 0]), 3)  # x = 0 + 0.5 (3 - x)
        1.0

    References:
        Sun et al., *RectifID: Personalizing Rectified Flow with Anchored Classifier Guidance*,
            2024, arXiv:2405.14677 (the gradient of the end at every step of a flow that is not
            straight is ours; the published code sums the gradients of its iterations up).
    """
    name = "anchored_guidance"
    check_whole(name, iterations=iterations)
    if not scale >= 0:
        raise ValueError(f"{name}: expected scale >= 0, got {scale}")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"{name}: expected max_norm > 0 or None, got {max_norm}")
    times = known_times(name, grid)
    start = check_images(name, velocity, x0, "x0")
    cond = check_cond(name, cond, count_rows(name, x0))
    ts, scale = jnp.asarray(times, start.dtype), float(scale)
    steps = (ts[1:] - ts[:-1]).reshape(-1, *(1,) * start.ndim)

    def end(offsets):
        def advance(x, at):
            t, t_next, offset = at
            v = velocity_at(name, velocity, params, x, t, cond)
            return x + (t_next - t) * v + offset, None

        return jax.lax.scan(advance, start, (ts[:-1], ts[1:], offsets))[0]

    def wish(offsets):
        x = end(offsets)
        return jnp.sum(check_rows(name, "log_prob(x)", log_prob(x), x.shape[0]))

    def again(carry, _):
        offsets, _ = carry
        g = scale * jax.grad(wish)(offsets)
        if max_norm is not None:
            norms = jax.vmap(safe_norm)(g)
            g = g * expand_to(max_norm / jnp.maximum(norms, max_norm), g)
        new = steps * g
        return (new, safe_norm(jnp.swapaxes(new - offsets, 0, 1))), None

    none = jnp.broadcast_to(jnp.zeros_like(start), (len(times) - 1, *start.shape))
    begin = none, jnp.zeros_like(start, shape=start.shape[:1])
    (offsets, residual), _ = jax.lax.scan(again, begin, length=iterations)
    return end(offsets).astype(x0.dtype), residual
