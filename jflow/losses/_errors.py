"""Errors of a predicted velocity, row by row: what `flow_matching(metric=...)` averages.

A metric is (v, target, x_t, t) -> [b]: v, target and x_t are [b, *event] with x_t on the path at t [b]; v and target are in
float32 or better. Any such function will do.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp

from jflow._core.arrays import expand_to, float_dtype, mean_event, sum_event
from jflow.types import Array

__all__ = ["Metric", "mean_squared_error", "perceptual_huber", "pseudo_huber"]

Metric = Callable[[Array, Array, Array, Array], Array]


def mean_squared_error(v: Array, target: Array, x_t: Array, t: Array) -> Array:
    """The mean over the event of (v - target)^2: [b]. The default of `flow_matching`; its minimizer is the mean target."""
    return mean_event(jnp.square(v - target))


def pseudo_huber(c: float) -> Metric:
    """(sqrt(|r|^2 + c^2) - c) / d with r = v - target over an event of d numbers: quadratic within |r| < c, linear beyond.

    |r| grows like sqrt(d), and so should c: 0.00054 sqrt(d) (Song, Dhariwal, "Improved Techniques for Training Consistency
    Models", 2023). Lee, Lin, Fanti, "Improving the Training of Rectified Flows", 2024, run with 0.00054 d. The minimizer is
    no longer the mean target: for pairs that (nearly) determine the target, as in a second rectification.
    Errors: ValueError unless c > 0.
    """
    if not 0 < c < math.inf:
        raise ValueError(f"pseudo_huber: expected a finite c > 0, got {c}")

    def metric(v, target, x_t, t):
        square = sum_event(jnp.square(v - target))
        # the difference of nearly equal numbers, as a quotient
        return square / (jnp.sqrt(square + c**2) + c) / math.prod(v.shape[1:])

    return metric


def perceptual_huber(distance: Callable[[Array, Array], Array], c: float) -> Metric:
    """t pseudo_huber(c) + distance(x1 predicted, x1) / (1 - t), on the linear path, where x1 = x_t + (1 - t) v.

    distance: (x [b, *event], y [b, *event]) -> [b], of images or their features (LPIPS in the paper). The division makes
    the distance, which shrinks with 1 - t as the prediction's error does, count at every t; it stops at 1 - t = 1e-5.
    Source: Lee, Lin, Fanti, "Improving the Training of Rectified Flows", 2024 (its t is 1 - t here).
    """
    huber = pseudo_huber(c)

    def metric(v, target, x_t, t):
        x_t, left = x_t.astype(float_dtype(x_t)), expand_to(1 - t, x_t)
        apart = distance(x_t + left * v, x_t + left * target)
        if apart.shape != t.shape:
            raise ValueError(
                f"perceptual_huber: expected distance of shape {list(t.shape)}, got {list(apart.shape)}"
            )
        return t * huber(v, target, x_t, t) + apart / jnp.maximum(1 - t, 1e-5)

    return metric
