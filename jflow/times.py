"""Distributions of the training time t in [0, 1]: t = 0 is the source (noise), t = 1 is data."""

import math

import jax

from jflow.types import Time

__all__ = ["logit_normal", "uniform"]


def uniform(low: float = 0.0, high: float = 1.0) -> Time:
    """t uniform on [low, high]: (key, n) -> t [n]. Errors: ValueError unless 0 <= low < high <= 1."""
    if not 0 <= low < high <= 1:
        raise ValueError(f"times.uniform: expected 0 <= low < high <= 1, got low={low}, high={high}")
    return lambda key, n: jax.random.uniform(key, (n,), minval=low, maxval=high)


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Time:
    """t = sigmoid(mean + std z), z standard normal: (key, n) -> t [n]. A positive mean spends more times near data.

    The paper's time runs from data to noise, so that its location m is -mean here. Errors: ValueError unless std > 0.
    Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024.
    """
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(f"times.logit_normal: expected a finite mean and std > 0, got mean={mean}, std={std}")
    return lambda key, n: jax.nn.sigmoid(mean + std * jax.random.normal(key, (n,)))
