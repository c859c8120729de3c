"""The affine scalar map as a kernel; its reference is `univariate.affine`.

y = x exp(a) + b, where a is a bounded function of the first raw number.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Float

from jflow.kernels.columns import Column, by_autodiff, choice, run
from jflow.types import Array

__all__ = ["choice", "transform"]


def transform(
    x: Array,
    raw: Array,
    *,
    log_scale: Callable[[Array], Array],
    inverse: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "d n"], Float[Array, " n"]]:
    """Scale and shift columns of numbers, and add up their log-slopes.

    y = x exp(a) + b, or (x - b) exp(-a) with inverse, a = log_scale(raw[0]), b = raw[1].

    Args:
        x: the numbers, [d, n]: the d numbers of n rows, see `kernels.columns`.
        raw: their raw numbers, [2, d, n], of the type of x.
        log_scale: a function raw -> log scale, see `bijectors.scales`.
        inverse: whether the inverse is evaluated.
        implementation: 'xla', 'pallas' or None, as in `columns.run`.

    Returns:
        A pair (y [d, n], log |dy/dx| summed over d [n]), in nats.

    Raises:
        ValueError: x or raw has another shape, or implementation is none of the three.
        TypeError: x and raw differ in type, or are no floats.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, kernels
        >>> x, raw = jnp.ones((2, 3)), jnp.zeros((2, 2, 3))
        >>> y, log_det = kernels.affine.transform(x, raw, log_scale=bijectors.scales.bounded())
        >>> y.shape, log_det.tolist()
        ((2, 3), [0.0, 0.0, 0.0])
    """
    return run(column(log_scale, inverse), x, raw, implementation)


def column(log_scale: Callable[[Array], Array], inverse: bool) -> Column:
    def apply(x, raw):
        a = log_scale(raw[0])
        if inverse:
            return (x - raw[1]) * jnp.exp(-a), -a
        return x * jnp.exp(a) + raw[1], a

    return Column(2, apply, by_autodiff(apply))
