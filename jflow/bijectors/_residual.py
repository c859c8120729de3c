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
    """x = z + g(z), g = `net`: a network of Lipschitz constant below one, such as nets.LipschitzMLP or LipschitzConv.

    `forward` is one pass; `inverse` iterates z = x - g(z) to the fixed point (`_core.implicit.fixed_point`, with implicit
    gradients), so a density flow holds it inverted. The log-det of the inverse is minus that of the forward map at the
    point found, which is NaN in the rows that did not converge.

    Args:
        net: has `coeff` < 1, `weights(x, cond)` and `run(weights, x)`, see `nets.LipschitzMLP`; its bounds are computed
            once a pass, not once a term. Params: those of the net.
        log_det: from `bijectors.log_dets`; used when there is a key. With key=None the log-det is exact: the whole
            Jacobian, of d^2 numbers a row (jit leaves it out where it is not used, as in sampling).
        tol: of the fixed point, the largest change relative to 1 + |z|; None: 16 units of rounding of x's type.
        max_evaluations: of g in the inverse.

    Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, *Invertible Residual Networks* (2019); Chen, Behrmann, Duvenaud,
    Jacobsen, *Residual Flows for Invertible Generative Modeling* (2019), who state it data -> noise.
    """
    check_linen("residual", "net", net)
    if not all(hasattr(net, name) for name in ("coeff", "weights", "run")):
        raise TypeError(
            f"residual: expected a network with coeff, weights and run (nets.LipschitzMLP), got {type(net).__name__}"
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
