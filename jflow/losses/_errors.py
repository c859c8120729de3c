"""Errors of a predicted velocity, row by row: what `flow_matching(metric=...)` averages.

A metric is a function (v, target, x_t, t) -> [b]: v, target and x_t are [b, *event] with x_t on the
path at t [b]; v and target are in float32 or better. Any such function will do.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jflow._core.arrays import expand_to, float_dtype, mean_event, sum_event
from jflow._core.checks import check_noun
from jflow.types import Manifold

__all__ = [
    "Metric",
    "mean_squared_error",
    "perceptual_huber",
    "pseudo_huber",
    "riemannian_error",
]

Metric = Callable[[Array, Array, Array, Array], Array]


def mean_squared_error(
    v: Float[Array, "b *event"],
    target: Float[Array, "b *event"],
    x_t: Float[Array, "b *event"],
    t: Float[Array, " b"],
) -> Float[Array, " b"]:
    """The mean over the event of (v - target)^2, the default of `flow_matching`.

    Its minimizer is the mean target.

    Args:
        v: The predicted velocity [b, *event].
        target: What it should be [b, *event].
        x_t: The states [b, *event]; they are not read.
        t: The times [b]; they are not read.

    Returns:
        The error of each row [b].
    """
    return mean_event(jnp.square(v - target))


def pseudo_huber(c: float) -> Metric:
    """The pseudo-Huber error (sqrt(|r|^2 + c^2) - c) / d, r = v - target of d numbers.

    Also known as: pseudo-Huber loss.

    It is quadratic within |r| < c and linear beyond. |r| grows like sqrt(d), and so should c:
    0.00054 sqrt(d) (Song, Dhariwal). Lee, Lin, Fanti run with 0.00054 d. The minimizer is no longer
    the mean target: it is for pairs that (nearly) determine the target, as in a second
    rectification.

    Args:
        c: The size of the residual where the error becomes linear, above 0.

    Returns:
        The metric (v, target, x_t, t) -> [b].

    Raises:
        ValueError: Unless c is finite and above 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> v = jnp.array([[3.0, 4.0]])
        >>> round(float(losses.pseudo_huber(12.0)(v, 0 * v, v, None)[0]), 4)  # (13 - 12) / 2
        0.5

    References:
        Song, Dhariwal, *Improved Techniques for Training Consistency Models*, 2023,
            arXiv:2310.14189.
        Lee, Lin, Fanti, *Improving the Training of Rectified Flows*, 2024, arXiv:2405.20320.
    """
    if not 0 < c < math.inf:
        raise ValueError(f"pseudo_huber: expected a finite c > 0, got {c}")

    def metric(v, target, x_t, t):
        square = sum_event(jnp.square(v - target))
        # the difference of nearly equal numbers, as a quotient
        return square / (jnp.sqrt(square + c**2) + c) / math.prod(v.shape[1:])

    return metric


def riemannian_error(manifold: Manifold) -> Metric:
    """The squared length of the error in the metric of a manifold, over its dimension.

        inner(x_t, r, r) / dim,    r = to_tangent(x_t, v - target)

    Also known as: Riemannian flow matching loss.

    It is for `paths.geodesic(manifold)`. On `manifolds.euclidean` it is `mean_squared_error`. The
    minimizer is the mean target, as it is there.

    Args:
        manifold: where x_t is.

    Returns:
        The metric (v, target, x_t, t) -> [b].

    Raises:
        TypeError: For what is no manifold.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import losses, manifolds
        >>> metric = losses.riemannian_error(manifolds.poincare_ball(2))
        >>> v = jnp.array([[0.3, 0.4]])
        >>> round(float(metric(v, 0 * v, 0 * v, None)[0]), 4)  # 4 * 0.25 / 2, at the center
        0.5

    References:
        Chen, Lipman, *Flow Matching on General Geometries*, 2024, arXiv:2302.03660.
    """
    check_noun("riemannian_error", manifold, Manifold)

    def metric(v, target, x_t, t):
        residual = manifold.to_tangent(x_t, v - target)
        return manifold.inner(x_t, residual, residual) / manifold.dim

    return metric


def perceptual_huber(distance: Callable[[Array, Array], Array], c: float) -> Metric:
    """A pseudo-Huber error of the velocity together with a perceptual distance of the data.

    The error is t pseudo_huber(c) + distance(x1 predicted, x1) / (1 - t).

    It is for the linear path, where x1 = x_t + (1 - t) v. The division makes the distance, which
    shrinks with 1 - t as the prediction's error does, count at every t; it stops at 1 - t = 1e-5.

    Args:
        distance: The distance (x [b, *event], y [b, *event]) -> [b], of images or their features
            (LPIPS in the paper).
        c: The constant of `pseudo_huber`, above 0.

    Returns:
        The metric (v, target, x_t, t) -> [b].

    Raises:
        ValueError: Unless c is finite and above 0; at trace time for a distance of another shape.

    References:
        Lee, Lin, Fanti, *Improving the Training of Rectified Flows*, 2024, arXiv:2405.20320 (its t
            is 1 - t here).
    """
    huber = pseudo_huber(c)

    def metric(v, target, x_t, t):
        x_t, left = x_t.astype(float_dtype(x_t)), expand_to(1 - t, x_t)
        apart = distance(x_t + left * v, x_t + left * target)
        if apart.shape != t.shape:
            raise ValueError(
                f"perceptual_huber: expected distance of shape {list(t.shape)}, "
                f"got {list(apart.shape)}"
            )
        return t * huber(v, target, x_t, t) + apart / jnp.maximum(1 - t, 1e-5)

    return metric
