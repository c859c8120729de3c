"""y = x exp(a) + b with a a bounded function of the first raw number, as a kernel; its reference is `univariate.affine`."""

from collections.abc import Callable

import jax.numpy as jnp

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
) -> tuple[Array, Array]:
    """(y [d, n], log |dy/dx| summed over d [n]) for x [d, n] and raw [2, d, n]: columns, see `kernels.columns`.

    y = x exp(a) + b, or (x - b) exp(-a) with inverse, a = log_scale(raw[0]), b = raw[1]. implementation: 'xla', 'pallas' or
    None, as in `columns.run`, which raises on bad shapes and types.
    """
    return run(column(log_scale, inverse), x, raw, implementation)


def column(log_scale: Callable[[Array], Array], inverse: bool) -> Column:
    def apply(x, raw):
        a = log_scale(raw[0])
        if inverse:
            return (x - raw[1]) * jnp.exp(-a), -a
        return x * jnp.exp(a) + raw[1], a

    return Column(2, apply, by_autodiff(apply))
