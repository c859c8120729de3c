"""The probability simplex and the sphere that its square roots lie on."""

import jax.numpy as jnp

from jflow.types import Array


def project_simplex(x: Array) -> Array:
    """The nearest point of the probability simplex, along the last axis.

        max(x_i - c, 0)      with c such that the sum is 1

    Points of the simplex stay where they are. Gradients are those of the projection.

    Args:
        x: points [..., K].

    Returns:
        Probabilities [..., K], in the type of x.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> paths.project_simplex(jnp.array([0.75, 0.5, -1.0])).tolist()
        [0.625, 0.375, 0.0]

    References:
        Duchi, Shalev-Shwartz, Singer, Chandra, *Efficient Projections onto the l1-Ball for Learning
            in High Dimensions*, 2008.
    """
    count = x.shape[-1]
    falling = -jnp.sort(-x, axis=-1)
    shape = (1,) * (x.ndim - 1) + (count,)
    k = jnp.arange(1, count + 1, dtype=x.dtype).reshape(shape)
    cuts = (jnp.cumsum(falling, axis=-1) - 1) / k
    last = jnp.sum(falling > cuts, axis=-1, keepdims=True) - 1
    return jnp.maximum(x - jnp.take_along_axis(cuts, last, axis=-1), 0)


def to_tangent(x: Array, v: Array) -> Array:
    """The part of v that is tangent to the unit sphere at x, along the last axis."""
    return v - jnp.sum(x * v, axis=-1, keepdims=True) * x


def sphere_exp(x: Array, v: Array) -> Array:
    """The point of the unit sphere that the geodesic from x with velocity v reaches at time 1."""
    length = jnp.sqrt(jnp.maximum(jnp.sum(v * v, axis=-1, keepdims=True), 1e-30))
    y = jnp.cos(length) * x + jnp.sinc(length / jnp.pi) * v
    return y / jnp.linalg.norm(y, axis=-1, keepdims=True)  # rounding does not add up
