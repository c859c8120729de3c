"""Densities of reals as models of levels 0 .. L-1: what bits per dimension are counted of."""

import math

from jflow import bijectors as bj
from jflow._core.arrays import zero_log_det
from jflow._core.nouns import no_params
from jflow.flows._flow import elbo_flow
from jflow.types import Bijector, Distribution, ElboFlow, Flow, Transport

__all__ = ["with_dequantization"]


def with_dequantization(
    flow: Flow | Distribution, dequantization: Transport, *, scale: float = 1.0
) -> ElboFlow:
    """A density of reals as a model of levels 0 .. L-1, of which bits per dimension are counted.

    `dequantization` puts the levels (as floats) into [0, 1); what the flow sees is scale * (2 z -
    1), z the dequantized levels: images in [-scale, scale]. The elbo is [b], nats of the levels
    themselves: `metrics.bits_per_dim(elbo, D)` are bits per dimension, exactly 8 for a uniform
    density and L = 256. `flows.importance_weighted` tightens it.

    Args:
        flow: a density of reals in [-scale, scale].
        dequantization: a transport from `bijectors`: uniform_dequantization(L),
            variational_dequantization(noise, L) or truncated_normal_dequantization(std, L). The
            last goes with a continuous flow that ends at a time of its schedule, `cnf(..., t1=t1)`,
            where scale = alpha(t1) and std = L sigma(t1) / (2 alpha(t1)).
        scale: the half width of what the flow sees.

    Returns:
        ElboFlow: the model of levels, with params {'bijector', 'base'}, where 'base' holds those of
            `flow`.

    Raises:
        ValueError: scale is not finite and positive.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, distributions, flows, metrics
        >>> flat = distributions.uniform((2,), -1.0, 1.0)
        >>> model = flows.with_dequantization(flat, bijectors.uniform_dequantization(256))
        >>> levels = jnp.array([[0.0, 255.0]])
        >>> params = model.init(jax.random.key(0), levels)
        >>> elbo = model.elbo(params, levels, key=jax.random.key(1))
        >>> round(metrics.bits_per_dim(elbo, 2), 3)
        8.0
    """
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"with_dequantization: expected a finite scale > 0, got {scale}")
    return elbo_flow(bj.chain(_to_unit(scale), dequantization), flow)


def _to_unit(scale: float) -> Bijector:
    """[-scale, scale] on the source side, [0, 1] on the data side."""

    def log_det(x):
        return zero_log_det(x) - math.prod(x.shape[1:]) * math.log(2 * scale)

    def forward(params, z, cond=None, *, key=None):
        return z / (2 * scale) + 0.5, log_det(z)

    def inverse(params, x, cond=None, *, key=None):
        return (2 * x - 1) * scale, -log_det(x)

    return Bijector(no_params, forward, inverse)
