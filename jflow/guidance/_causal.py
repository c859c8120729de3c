"""Guidance of causal token flows: a second pass of the network, told less, from which mean and log-scale step away."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike

from jflow.bijectors import TokenGuide
from jflow.types import Array, PyTree

__all__ = ["extrapolate", "linear_ramp", "score_sum"]

Weight = float | ArrayLike | Callable[[Array, int], Array]


def extrapolate(weight: Weight, *, null: PyTree = None, temperature: float = 1.0) -> TokenGuide:
    """mean + w (mean - mean_u), and the same of log_scale: w = 0 is the plain flow (`cfg`'s scale - 1).

    weight: w, or one for each of the n slots [n], or (slots [m], n) -> [m], such as `linear_ramp(w)`. Class guidance: null is
    the null label. Without classes: a temperature above 1 blurs the attention of the second pass.
    Source: Zhai et al., "Normalizing Flows are Capable Generative Models", 2024.
    """
    return _guide("extrapolate", _extrapolate, weight, null, temperature)


def score_sum(weight: Weight, *, null: PyTree = None, temperature: float = 1.0) -> TokenGuide:
    """The Gaussian whose score is that of N(mean, s^2) plus w times its difference from that of N(mean_u, s_u^2).

    With r = min(s^2 / s_u^2, 1): mean + w r / (1 + w - w r) (mean - mean_u), variance s^2 / (1 + w - w r). r is
    clipped because otherwise the precision could turn negative. Arguments as in `extrapolate`.
    Source: Gu et al., "STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis", 2025.
    """
    return _guide("score_sum", _score_sum, weight, null, temperature)


def linear_ramp(weight: float) -> Callable[[Array, int], Array]:
    """w_i = weight i / (n - 1): none at the first token, which sees nothing, all of it at the last. Zhai et al. (2024)."""
    return lambda slots, n: weight * jnp.asarray(slots, float) / max(n - 1, 1)


def _guide(name, form, weight, null, temperature) -> TokenGuide:
    if not temperature > 0:
        raise ValueError(f"{name}: expected temperature > 0, got {temperature}")
    if null is None and temperature == 1:
        raise ValueError(
            f"{name}: expected a null or a temperature other than 1, got neither: the passes would not differ"
        )

    def combine(guided, unguided, slots, n):
        w = (
            weight(slots, n)
            if callable(weight)
            else jnp.broadcast_to(jnp.asarray(weight), (n,))[slots]
        )
        return form(*guided, *unguided, w[None, :, None].astype(guided[0].dtype))

    return TokenGuide(combine, null, float(temperature))


def _extrapolate(mean, log_scale, mean_u, log_scale_u, w):
    return mean + w * (mean - mean_u), log_scale + w * (log_scale - log_scale_u)


def _score_sum(mean, log_scale, mean_u, log_scale_u, w):
    ratio = jnp.exp(jnp.minimum(2 * (log_scale - log_scale_u), 0))
    precision = 1 + w * (1 - ratio)
    return mean + w * ratio / precision * (mean - mean_u), log_scale - 0.5 * jnp.log(precision)
