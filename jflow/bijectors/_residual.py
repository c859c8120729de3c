"""Residual blocks: x + g(x), invertible because g is a contraction."""

import flax.linen as nn
import jax.numpy as jnp

from jflow._core import implicit
from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import check_cond, check_side
from jflow._core.linen import apply_linen, check_linen, init_linen
from jflow._core.nouns import compiled
from jflow.bijectors import log_dets
from jflow.types import Bijector

__all__ = ["residual"]

_ROULETTE = log_dets.russian_roulette()


def residual(
    net: nn.Module,
    *,
    log_det: log_dets.LogDet = _ROULETTE,
    tol: float | None = None,
    max_evaluations: int = 1000,
) -> Bijector:
    """Add a contraction: x = z + g(z), where g is a network of Lipschitz constant below one.

    `forward` is one pass; `inverse` iterates z = x - g(z) to the fixed point, with implicit
    gradients, so a density flow holds it inverted. The log-det of the inverse is minus that of the
    forward map at the point found, which is NaN in the rows that did not converge. The papers state
    it in the direction data -> noise.

    Also known as: invertible residual block, i-ResNet block, residual flow layer.

    Args:
        net: the network g, such as `nets.LipschitzMLP` or `nets.LipschitzConv`: it has `coeff` < 1,
            `weights(x, cond)` and `run(weights, x)`. Its bounds are computed once a pass, not once
            a term.
        log_det: an estimator from `bijectors.log_dets`, used when there is a key. With key=None the
            log-det is exact: the whole Jacobian, of d^2 numbers a row (jit leaves it out where it
            is not used, as in sampling).
        tol: of the fixed point, the largest change relative to 1 + |z|; None is 16 units of
            rounding of the type of x.
        max_evaluations: of g in the inverse.

    Returns:
        Bijector: the map; its params are those of the net.

    Raises:
        TypeError: net is not a Linen module with coeff, weights and run.
        ValueError: net.coeff is not in (0, 1).

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, nets
        >>> bijector = bijectors.residual(nets.LipschitzMLP(hidden=(4,)))
        >>> z = jnp.ones((3, 2))
        >>> params = jax.eval_shape(bijector.init, jax.random.key(0), z)
        >>> jax.eval_shape(bijector.forward, params, z)[1].shape  # nothing is computed
        (3,)

    References:
        Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, *Invertible Residual Networks*, 2019,
            arXiv:1811.00995.
        Chen, Behrmann, Duvenaud, Jacobsen, *Residual Flows for Invertible Generative Modeling*,
            2019, arXiv:1906.02735.
    """
    check_linen("residual", "net", net)
    if not all(hasattr(net, name) for name in ("coeff", "weights", "run")):
        raise TypeError(
            "residual: expected a network with coeff, weights and run (nets.LipschitzMLP), got "
            f"{type(net).__name__}"
        )
    if not 0 < net.coeff < 1:
        raise ValueError(
            f"residual: expected a Lipschitz constant net.coeff in (0, 1), got {net.coeff}"
        )

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        cond = check_cond("residual", cond, x.shape[0])
        return init_linen(net, key, x, cond)

    def weights_of(params, x, cond):
        cond = check_cond("residual", cond, x.shape[0])
        return apply_linen(net, params, x, cond, method=net.weights)

    def log_det_at(weights, z, key):
        return (log_dets.exact if key is None else log_det)(net.run, weights, z, key)

    def forward(params, z, cond=None, *, key=None):
        weights, wide = weights_of(params, z, cond), z.astype(float_dtype(z))
        x = wide + net.run(weights, wide)
        return x.astype(z.dtype), log_det_at(weights, wide, key)

    def inverse(params, x, cond=None, *, key=None):
        weights, wide = weights_of(params, x, cond), x.astype(float_dtype(x))
        limit = 16 * float(jnp.finfo(wide.dtype).eps) if tol is None else tol
        found = implicit.fixed_point(
            _back, wide, (weights, wide), tol=limit, max_evaluations=max_evaluations
        )
        z = jnp.where(expand_to(found.change <= limit, found.x), found.x, jnp.nan)
        return z.astype(x.dtype), -log_det_at(weights, z, key)

    def _back(z, args):
        weights, x = args
        return x - net.run(weights, z)

    return compiled(Bijector(init, forward, inverse))
