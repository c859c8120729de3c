"""Denoising by the score of a density."""

import jax
import jax.numpy as jnp

from jflow.types import Array, Cond, Distribution, Flow, Params

__all__ = ["denoise"]


def denoise(
    flow: Flow | Distribution, params: Params, y: Array, std: float, cond: Cond = None
) -> Array:
    """E[x | y] for y = x + std * eps, eps standard normal, where `flow` is the density of y: y + std^2 grad log p(y).

    y [b, *event], such as samples of a flow trained by `losses.noised(std)`. Tweedie's formula, exact where the
    density is. Sources: Efron, "Tweedie's Formula and Selection Bias", 2011; Zhai et al., "Normalizing Flows are Capable
    Generative Models", 2024.
    """
    if not std >= 0:
        raise ValueError(f"denoise: expected std >= 0, got {std}")
    score = jax.grad(lambda y: jnp.sum(flow.log_prob(params, y, cond)))(y)
    return (y + std**2 * score).astype(y.dtype)
