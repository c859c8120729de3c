"""Guidance of causal token flows: a second, unguided pass gives the mean and log-scale to leave."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike

from jflow.bijectors import TokenGuide
from jflow.types import Array, PyTree

__all__ = ["extrapolate", "linear_ramp", "score_sum"]

Weight = float | ArrayLike | Callable[[Array, int], Array]


def extrapolate(weight: Weight, *, null: PyTree = None, temperature: float = 1.0) -> TokenGuide:
    """Guidance of a causal token flow that extrapolates mean and log-scale from an unguided pass.

        mean + w (mean - mean_u),      log_scale + w (log_scale - log_scale_u)

    w = 0 is the plain flow (w is the scale of `cfg` minus 1). The unguided pass sees the null
    label; a flow without classes has a temperature above 1 instead, which blurs the attention of
    that pass.

    Args:
        weight: w, a number, or one for each of the n slots [n], or (slots [m], n) -> [m], such as
            `linear_ramp(w)`.
        null: the label of the unguided pass, one row of cond without the batch axis; None is the
            same condition.
        temperature: of the attention of the unguided pass, above 0.

    Returns:
        TokenGuide: what causal blocks of tokens take as their guide.

    Raises:
        ValueError: temperature is not above 0, or null is None and temperature is 1, so that the
            passes would not differ.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance
        >>> guide = guidance.extrapolate(0.5, null=0)
        >>> zero, one = jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1))
        >>> mean, log_scale = guide.combine((one, zero), (zero, zero), jnp.array([0]), 1)
        >>> mean.item(), log_scale.item()
        (1.5, 0.0)

    References:
        Zhai et al., *Normalizing Flows are Capable Generative Models*, 2024, arXiv:2412.06329.
    """
    return _guide("extrapolate", _extrapolate, weight, null, temperature)


def score_sum(weight: Weight, *, null: PyTree = None, temperature: float = 1.0) -> TokenGuide:
    """Guidance of a causal token flow by scores: the Gaussian of the guided sum of two scores.

    Its score is that of N(mean, s^2) plus w times its difference from that of N(mean_u, s_u^2).
    With r = min(s^2 / s_u^2, 1):

        mean + w r / (1 + w - w r) (mean - mean_u),      variance s^2 / (1 + w - w r)

    r is clipped because otherwise the precision could turn negative. w = 0 is the plain flow.

    Args:
        weight: w, a number, or one for each of the n slots [n], or (slots [m], n) -> [m], such as
            `linear_ramp(w)`.
        null: the label of the unguided pass, one row of cond without the batch axis; None is the
            same condition.
        temperature: of the attention of the unguided pass, above 0.

    Returns:
        TokenGuide: what causal blocks of tokens take as their guide.

    Raises:
        ValueError: temperature is not above 0, or null is None and temperature is 1, so that the
            passes would not differ.

    References:
        Gu et al., *STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis*,
            2025, arXiv:2506.06276.
    """
    return _guide("score_sum", _score_sum, weight, null, temperature)


def linear_ramp(weight: float) -> Callable[[Array, int], Array]:
    """A guidance weight that grows linearly along the tokens.

        w_i = weight i / (n - 1)

    There is none at the first token, which sees nothing, and all of it at the last.

    Args:
        weight: the weight of the last token.

    Returns:
        A function (slots [m], n) -> weights [m], for `extrapolate` and `score_sum`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance
        >>> guidance.linear_ramp(2.0)(jnp.arange(3), 3).tolist()
        [0.0, 1.0, 2.0]

    References:
        Zhai et al., *Normalizing Flows are Capable Generative Models*, 2024, arXiv:2412.06329.
    """
    return lambda slots, n: weight * jnp.asarray(slots, float) / max(n - 1, 1)


def _guide(name, form, weight, null, temperature) -> TokenGuide:
    if not temperature > 0:
        raise ValueError(f"{name}: expected temperature > 0, got {temperature}")
    if null is None and temperature == 1:
        raise ValueError(
            f"{name}: expected a null or a temperature other than 1, got neither: the "
            "passes would not differ"
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
