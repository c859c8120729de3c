"""Whitening of data by a shrunk covariance."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import float_dtype, mean_and_std, zero_log_det
from jflow._core.checks import check_event, check_side
from jflow.types import Array, Bijector

__all__ = ["whiten"]


def whiten(event_shape: tuple[int, ...], shrinkage: float | None = None) -> Bijector:
    """Bring correlated columns to uncorrelated ones of order one, by the first batch's covariance.

    It is x = mean + D L (z + offset), with the standard deviations D of the batch of `init`, and L
    L^T = (1 - s) C + s I its correlations C, shrunk towards none by s. Where rows are few, the
    small directions of C are too small, and s > 0 mends that: a flow behind it starts at a normal
    distribution that holds for rows to come, and learns the rest. The offset, 0 at first, is
    trained; mean, D and L are held (their gradients are 0).

    In a recipe it is the argument `standardize=bijectors.whiten(event_shape)`.

    By default s is the one, of 41 from 1e-5 to 1, under which each row of the batch is likeliest by
    the normal distribution of all others (leave-one-out, in closed form): with z a standardized row
    less their mean, n their number and M = (1 - s) n / (n - 1) C + s I,

        log p_s(z | others) = -(log |M| + log(1 - g r) + (n / (n - 1))^2 r / (1 - g r)) / 2 + const,
        r = z^T M^-1 z,      g = (1 - s) n / (n - 1)^2.

    Also known as: sphering, Cholesky whitening, Mahalanobis whitening; regularized covariance,
    LOOC.

    Args:
        event_shape: the shape of one x, of d numbers.
        shrinkage: s, between 0 and 1; None is the choice above, which falls as rows are added.

    Returns:
        Bijector: the map, with params {'mean' [d], 'lower' [d, d], 'log_diagonal' [d], 'offset'
            [d]}, where D L is the triangle below the diagonal of 'lower' with exp(log_diagonal) on
            it. A batch of one row leaves the identity.

    Raises:
        ValueError: shrinkage is not in [0, 1]; the events of x have another shape.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> x = jax.random.normal(jax.random.key(0), (500, 2)) @ jnp.array([[3.0, 2.0], [0.0, 1.0]])
        >>> bijector = bijectors.whiten((2,), 0.0)
        >>> z, _ = bijector.inverse(bijector.init(jax.random.key(1), x), x)
        >>> bool(jnp.all(jnp.abs(jnp.cov(z.T) - jnp.eye(2)) < 0.02))
        True

    References:
        Hoffbeck, Landgrebe, *Covariance Matrix Estimation and Classification With Limited Training
            Data*, 1996, without an arXiv number (leaving one out in closed form). Shrinking
            correlations towards none is ours.
    """
    event_shape = tuple(event_shape)
    d = math.prod(event_shape)
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise ValueError(f"whiten: expected shrinkage in [0, 1] or None, got {shrinkage}")

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        check_event("whiten", x, event_shape)
        rows = x.reshape(-1, d).astype(float_dtype(x))
        mean, std = mean_and_std(rows, 0)
        z = (rows - mean[None]) / std[None]
        factor = jnp.linalg.cholesky(_shrunk_correlations(z, shrinkage)) * std[:, None]
        offset = jnp.zeros_like(mean)
        if len(rows) < 2:
            mean, factor = jnp.zeros_like(mean), jnp.eye(d, dtype=rows.dtype)
        if side == "source":  # then the rows are z, and x is to be white
            factor = jax.scipy.linalg.solve_triangular(
                factor, jnp.eye(d, dtype=rows.dtype), lower=True
            )
            mean, offset = jnp.zeros_like(mean), -mean
        log_diagonal = jnp.log(jnp.diag(factor))
        return {
            "mean": mean,
            "lower": jnp.tril(factor, -1),
            "log_diagonal": log_diagonal,
            "offset": offset,
        }

    def read(params):
        held = jax.lax.stop_gradient({k: v for k, v in params.items() if k != "offset"})
        factor = jnp.tril(held["lower"], -1) + jnp.diag(jnp.exp(held["log_diagonal"]))
        return held["mean"][None], factor, params["offset"][None], jnp.sum(held["log_diagonal"])

    def forward(params, z, cond=None, *, key=None):
        check_event("whiten", z, event_shape)
        mean, factor, offset, log_det = read(params)
        moved = z.reshape(-1, d).astype(float_dtype(z)) + offset
        x = mean + jnp.matmul(moved, factor.T, precision=jax.lax.Precision.HIGHEST)
        return x.reshape(z.shape).astype(z.dtype), zero_log_det(z) + log_det

    def inverse(params, x, cond=None, *, key=None):
        check_event("whiten", x, event_shape)
        mean, factor, offset, log_det = read(params)
        centered = x.reshape(-1, d).astype(float_dtype(x)) - mean
        z = jax.scipy.linalg.solve_triangular(factor, centered.T, lower=True).T - offset
        return z.reshape(x.shape).astype(x.dtype), zero_log_det(x) - log_det

    return Bijector(init, forward, inverse)


def _shrunk_correlations(z: Array, shrinkage: float | None) -> Array:
    """(1 - s) C + s m I for C the second moments of rows z [n, d] and m its mean diagonal."""
    n, d = z.shape
    moments = jnp.matmul(z.T, z, precision=jax.lax.Precision.HIGHEST) / n
    size = jnp.trace(moments) / d
    s = _likeliest(z, moments, size) if shrinkage is None else jnp.asarray(shrinkage, z.dtype)
    # what rounding may take from the diagonal where a column is the sum of others
    ridge = jnp.where(size > 0, 4 * d * jnp.finfo(z.dtype).eps * size, 1)
    return (1 - s) * moments + (s * size + ridge) * jnp.eye(d, dtype=z.dtype)


def _likeliest(z: Array, moments: Array, size: Array) -> Array:
    """The s under which rows are likeliest given all others."""
    n = z.shape[0]
    if n < 3:  # of two rows, the other alone has no correlations
        return jnp.ones((), z.dtype)
    s = jnp.asarray(np.geomspace(1e-5, 1, 41), z.dtype)[None]
    eigenvalues, axes = jnp.linalg.eigh(moments)
    squares = jnp.square(jnp.matmul(z, axes, precision=jax.lax.Precision.HIGHEST))
    ratio = n / (n - 1)
    m = (1 - s) * ratio * jnp.maximum(eigenvalues, 0)[:, None] + s * size  # [d, 41]
    r = jnp.matmul(squares, 1 / m, precision=jax.lax.Precision.HIGHEST)  # [n, 41]
    left = 1 - (1 - s) * ratio / (n - 1) * r
    nats = -jnp.sum(jnp.log(m), axis=0) - jnp.mean(jnp.log(left) + ratio**2 * r / left, axis=0)
    return s[0, jnp.argmax(jnp.nan_to_num(nats, nan=-jnp.inf))]
