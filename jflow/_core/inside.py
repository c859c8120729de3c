"""Whether rows lie inside a domain."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jflow._core.arrays import float_dtype
from jflow._core.checks import count_rows
from jflow._core.times import traced
from jflow.types import Array, Domain


def check(
    domain: Domain,
    x: Float[Array, "b *event"],
    name: str = "domains.check",
    tolerance: float = 1e-4,
) -> None:
    """Raise where a row of x lies outside a domain, and say which one and how far.

    It looks at values: call it outside jit, where data are loaded. Traced arrays pass.

    Args:
        domain: the domain.
        x: the rows, [b, *event].
        name: of whoever asks, with which the message begins.
        tolerance: how far outside, in the units of x, is taken for rounding.

    Raises:
        ValueError: a row lies further outside than tolerance, or is not finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import domains
        >>> domains.check(domains.box((1,)), jnp.array([[0.5], [1.5]]))
        Traceback (most recent call last):
            ...
        ValueError: domains.check: expected x inside the domain, got row 1 at a distance of 0.5
    """
    count_rows(name, x)
    if traced(x):
        return
    found = distance_to(domain.project, jnp.asarray(x, float_dtype(x)))
    if traced(found):  # a constant, inside jit
        return
    away = np.asarray(found)
    bad = ~(away <= tolerance)
    if np.any(bad):
        row = int(np.argmax(bad))
        more = f" (and {bad.sum() - 1} more rows)" if bad.sum() > 1 else ""
        raise ValueError(
            f"{name}: expected x inside the domain, got row {row} at a distance of"
            f" {away[row]:.3g}{more}"
        )


def distance_to(project, x: Array) -> Array:
    """[b]: how far the rows of x are from their projections."""
    away = x - project(x)
    return jnp.sqrt(jnp.sum(jnp.square(away), axis=tuple(range(1, x.ndim))))
