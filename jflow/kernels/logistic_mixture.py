"""The logit of a mixture of logistics as a kernel; its reference is `univariate.logistic_mixture`.

The formula is there. All 3 K + 2 raw numbers are read once; the inverse, too, which finds its root
with the components in registers. Its gradient is that of the implicit function, at the root that
was found.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jflow._core.implicit import monotone_root
from jflow.kernels.columns import Column, by_autodiff, choice, run
from jflow.types import Array

__all__ = ["choice", "transform"]

_LIMIT = 3.0  # of |log s| and |a|


def transform(
    x: Array,
    raw: Array,
    *,
    floor: float = 1e-3,
    inverse: bool = False,
    implementation: str | None = None,
    reference: Callable | None = None,
) -> tuple[Float[Array, "d n"], Float[Array, " n"]]:
    """Map columns of numbers by logits of mixtures of logistics, and add up their log-slopes.

    Args:
        x: the numbers, [d, n]: the d numbers of n rows, see `kernels.columns`.
        raw: their raw numbers, [3 * components + 2, d, n], of the type of x.
        floor: the weight of the identity, see `univariate.logistic_mixture`.
        inverse: whether the inverse is evaluated.
        implementation: 'xla', 'pallas' or None, as in `columns.run`.
        reference: the same function of (x, raw), which forward mode differentiates, as in
            `columns.run`.

    Returns:
        A pair (y [d, n], log |dy/dx| summed over d [n]), in nats.

    Raises:
        ValueError: x or raw has another shape, or implementation is none of the three.
        TypeError: x and raw differ in type, or are no floats.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import kernels
        >>> y, log_det = kernels.logistic_mixture.transform(jnp.ones((1, 3)), jnp.zeros((5, 1, 3)))
        >>> y.round(3).tolist()  # raw = 0 is the identity
        [[1.0, 1.0, 1.0]]
    """
    components, rest = divmod(raw.shape[0] - 2, 3)
    if rest or components < 1:
        raise ValueError(
            "kernels.logistic_mixture: expected raw of shape [3*components + 2, d, n], got "
            f"{list(raw.shape)}"
        )
    return run(column(components, floor, inverse), x, raw, implementation, reference)


def column(components: int, floor: float, inverse: bool) -> Column:
    """The mixture as a `Column` of 3*components + 2 raw numbers."""
    # Each raw number has its own fixed factor: components that start alike would else stay so.
    factors = np.linspace(0.5, 1.5, 3 * components).reshape(components, 3).T.tolist()

    def forward(x, raw):
        log_w, mean, log_s = (
            [raw[i * components + k] * f for k, f in enumerate(of_kind)]
            for i, of_kind in enumerate(factors)
        )
        log_s = [_bounded(v) for v in log_s]
        all_w = _log_sum_exp(log_w)
        z = [(x - m) * jnp.exp(-v) for m, v in zip(mean, log_s, strict=True)]
        below, above = [jax.nn.log_sigmoid(v) for v in z], [jax.nn.log_sigmoid(-v) for v in z]
        log_f, shares_f = _mixture(log_w, all_w, below)
        log_rest, shares_rest = _mixture(log_w, all_w, above)
        y = log_f - log_rest
        # In the right tail the terms of 1 - F vanish and their shares of it do not; in the left
        # one, those of F.
        right = y > 0
        terms = [
            jnp.where(right, rest + p, share + q) - v
            for rest, share, p, q, v in zip(shares_rest, shares_f, below, above, log_s, strict=True)
        ]
        log_slope = _log_sum_exp(terms) - jnp.where(right, log_f, log_rest)
        if floor:
            y = (1 - floor) * y + floor * x
            log_slope = jnp.logaddexp(log_slope + math.log1p(-floor), math.log(floor))
        a = _bounded(raw[-2])
        return y * jnp.exp(a) + raw[-1], log_slope + a

    if not inverse:
        return Column(3 * components + 2, forward, by_autodiff(forward))

    def apply(y, raw):
        x = monotone_root(forward, y, list(raw))
        return x, -forward(x, raw)[1]

    def pullback(y, raw, x, x_bar, log_slope_bar):
        """At the root x: y = f(x, raw), the log-slope -log f'(x, raw)."""
        del y
        (_, log_slope), back = jax.vjp(forward, x, list(raw))
        more, of_slope = back((jnp.zeros_like(x), -log_slope_bar))
        y_bar = (x_bar + more) * jnp.exp(-log_slope)
        _, of_value = back((-y_bar, jnp.zeros_like(x)))
        return y_bar, ([a + b for a, b in zip(of_slope, of_value, strict=True)],)

    return Column(3 * components + 2, apply, pullback)


def _bounded(raw):
    return _LIMIT * jnp.tanh(raw / _LIMIT)


def _log_sum_exp(terms: list):
    top = terms[0]
    for term in terms[1:]:
        top = jnp.maximum(top, term)
    top = jax.lax.stop_gradient(top)
    exps = [jnp.exp(term - top) for term in terms]
    return top + jnp.log(sum(exps[1:], exps[0]))


def _mixture(log_w: list, all_w, log_p: list) -> tuple:
    """log sum_k w_k p_k and the log share of each term in it."""
    terms = [w - all_w + p for w, p in zip(log_w, log_p, strict=True)]
    total = _log_sum_exp(terms)
    return total, [term - total for term in terms]
