"""Batch normalization of points on a Lie group: rotations, and positive definite matrices."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.checks import check_noun, check_whole
from jflow.manifolds._matrices import so3, spd, spd_log_euclidean
from jflow.manifolds._symmetric import EXP, LOG, symmetric, transpose
from jflow.types import Array, ArrayLike, Manifold

__all__ = [
    "LieGroup",
    "frechet_mean",
    "lie_batch_norm",
    "log_euclidean_group",
    "rotation_group",
    "running_mean",
    "spd_group",
]


class LieGroup(NamedTuple):
    """A manifold whose points can be multiplied, by maps that keep distances.

    Attributes:
        manifold: of the points.
        identity: the point [*shape] that changes none.
        multiply: (a, x) -> a x, the point x moved by a; both may have batch axes.
        inverse: of a point.
    """

    manifold: Manifold
    identity: Array
    multiply: Callable[[Array, Array], Array]
    inverse: Callable[[Array], Array]


def rotation_group() -> LieGroup:
    """Rotations of space, which are multiplied as matrices.

    Returns:
        The group, on `so3()`.

    Examples:
        >>> from jflow import manifolds
        >>> manifolds.rotation_group().identity.shape
        (3, 3)
    """
    return LieGroup(so3(), jnp.eye(3), jnp.matmul, transpose)


def spd_group(n: int) -> LieGroup:
    """Positive definite matrices with a product that keeps the affine-invariant distance.

        A B = L B L',    A = L L' (Cholesky)

    Args:
        n: the number of rows.

    Returns:
        The group, on `spd(n)`.

    Raises:
        ValueError: n is not a whole number of at least 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> group = manifolds.spd_group(1)
        >>> round(group.multiply(2 * jnp.eye(1), 3 * jnp.eye(1)).item(), 4)
        6.0

    References:
        Chen, Song, Liu, Sebe, *A Lie Group Approach to Riemannian Batch Normalization*,
            2024, arXiv:2403.11261.
    """

    def multiply(a, x):
        factor = jnp.linalg.cholesky(a)
        return symmetric(factor @ x @ transpose(factor))

    def inverse(a):
        factor = jnp.linalg.cholesky(a)
        unit = jnp.broadcast_to(jnp.eye(n, dtype=a.dtype), a.shape)
        root = jax.scipy.linalg.solve_triangular(factor, unit, lower=True)
        return symmetric(root @ transpose(root))

    return LieGroup(spd(n), jnp.eye(n), multiply, inverse)


def log_euclidean_group(n: int) -> LieGroup:
    """Positive definite matrices with the product expm(logm A + logm B), in which all is flat.

    Args:
        n: the number of rows.

    Returns:
        The group, on `spd_log_euclidean(n)`.

    Raises:
        ValueError: n is not a whole number of at least 1.

    References:
        Arsigny, Fillard, Pennec, Ayache, *Geometric Means in a Novel Vector Space Structure on
            Symmetric Positive-Definite Matrices*, 2007.
    """
    return LieGroup(
        spd_log_euclidean(n),
        jnp.eye(n),
        lambda a, x: EXP.of(LOG.of(a) + LOG.of(x)),
        lambda a: EXP.of(-LOG.of(a)),
    )


def frechet_mean(
    manifold: Manifold, x: Float[Array, "b *shape"], *, steps: int = 16
) -> Float[Array, "*shape"]:
    """The point with the least mean square distance to some points.

    Also known as: Frechet mean, Karcher mean, Riemannian center of mass.

        m <- exp_m(mean of log_m(x_i)),    from the projected mean of the points

    It converges for points that lie in a ball around their mean that is small enough; on the
    positive definite matrices any are. The number of steps is fixed.

    Args:
        manifold: of the points.
        x: the points, [b, *shape].
        steps: the number of steps.

    Returns:
        The mean, [*shape].

    Raises:
        TypeError: manifold is not one.
        ValueError: steps is below 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> x = jnp.stack([jnp.eye(1), 4 * jnp.eye(1)])
        >>> round(float(manifolds.frechet_mean(manifolds.spd(1), x)[0, 0]), 4)  # the geometric one
        2.0

    References:
        Karcher, *Riemannian Center of Mass and Mollifier Smoothing*, 1977.
    """
    check_noun("frechet_mean", manifold, Manifold)
    check_whole("frechet_mean", steps=steps)

    def closer(m, _):
        v = jnp.mean(manifold.log(jnp.broadcast_to(m, x.shape), x), axis=0)
        return manifold.exp(m, manifold.to_tangent(m, v)), None

    first = manifold.project(jnp.mean(x, axis=0))
    return jax.lax.scan(closer, first, None, length=steps)[0]


def lie_batch_norm(
    group: LieGroup,
    x: Float[Array, "b *shape"],
    bias: Float[Array, "*shape"] | None = None,
    scale: ArrayLike = 1.0,
    statistics: Mapping[str, Array] | None = None,
    *,
    epsilon: float = 1e-5,
    steps: int = 16,
) -> tuple[Float[Array, "b *shape"], dict[str, Array]]:
    """Batch normalization of points on a Lie group, which moves their mean and their spread.

    Also known as: LieBN, Riemannian batch normalization.

        y = bias exp_e(scale / sqrt(v + epsilon) log_e(m^-1 x))

    with m the Frechet mean of the points, v their mean square distance to it and e the identity.
    Since products keep distances, the mean of the y is the bias, and their variance scale^2
    v / (v + epsilon). In training the statistics are the batch's; they run along in
    frozen['buffers'] by `running_mean`, and samples read those.

    Args:
        group: such as `rotation_group()`, `spd_group(n)` or `log_euclidean_group(n)`.
        x: the points, [b, *shape].
        bias: a point [*shape], to be kept on the manifold (`project`); None is the identity.
        scale: a number above 0.
        statistics: {'mean': [*shape], 'variance': []}; None is those of x.
        epsilon: what is added to the variance.
        steps: the number of steps of `frechet_mean`.

    Returns:
        The points [b, *shape], and the statistics that they were normalized by.

    Raises:
        TypeError: group is not a `LieGroup`.
        ValueError: epsilon is not positive.

    Examples:
        >>> import jax
        >>> from jflow import manifolds
        >>> group = manifolds.rotation_group()
        >>> x = group.manifold.exp(group.identity, 0.1 * jax.numpy.zeros((4, 3, 3)))
        >>> y, statistics = manifolds.lie_batch_norm(group, x)
        >>> y.shape, sorted(statistics)
        ((4, 3, 3), ['mean', 'variance'])

    References:
        Chen, Song, Liu, Sebe, *A Lie Group Approach to Riemannian Batch Normalization*,
            2024, arXiv:2403.11261.
        Brooks, Schwander, Barbaresco, Schneider, Cord, *Riemannian Batch Normalization for SPD
            Neural Networks*, 2019, arXiv:1909.02414, for the mean and the bias.
    """
    if not isinstance(group, LieGroup):
        raise TypeError(
            "lie_batch_norm: expected a LieGroup, such as manifolds.rotation_group(), got"
            f" {type(group).__name__}"
        )
    if not 0 < epsilon < math.inf:
        raise ValueError(
            f"lie_batch_norm: expected epsilon to be finite and positive, got {epsilon}"
        )
    manifold = group.manifold
    if statistics is None:
        mean = frechet_mean(manifold, x, steps=steps)
        distances = manifold.dist(jnp.broadcast_to(mean, x.shape), x)
        statistics = {"mean": mean, "variance": jnp.mean(distances**2)}
    mean, variance = statistics["mean"], statistics["variance"]
    at = jnp.broadcast_to(group.identity.astype(x.dtype), x.shape)
    spread = lambda a: jnp.broadcast_to(a.astype(x.dtype), x.shape)  # noqa: E731
    centered = manifold.log(at, group.multiply(spread(group.inverse(mean)), x))
    y = manifold.exp(at, centered * (scale / jnp.sqrt(variance + epsilon)).astype(x.dtype))
    y = y if bias is None else group.multiply(spread(bias), y)
    return y, dict(statistics)


def running_mean(
    group: LieGroup, old: Mapping[str, Array], batch: Mapping[str, Array], decay: float = 0.9
) -> dict[str, Array]:
    """The statistics of `lie_batch_norm` after one more batch, along geodesics.

        m <- exp_m((1 - decay) log_m(m of the batch)),    v <- decay v + (1 - decay) v of the batch

    Args:
        group: of the points.
        old: {'mean', 'variance'}.
        batch: those of the batch.
        decay: in (0, 1).

    Returns:
        The statistics, for the 'buffers' of frozen.

    Raises:
        ValueError: decay is not in (0, 1).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> group = manifolds.spd_group(1)
        >>> at = lambda m: {"mean": m * jnp.eye(1), "variance": jnp.ones(())}
        >>> moved = manifolds.running_mean(group, at(1.0), at(16.0), decay=0.5)
        >>> round(float(moved["mean"][0, 0]), 4)  # the geometric mean
        4.0
    """
    if not 0 < decay < 1:
        raise ValueError(f"running_mean: expected a decay in (0, 1), got {decay}")
    manifold, mean = group.manifold, old["mean"]
    moved = manifold.exp(mean, (1 - decay) * manifold.log(mean, batch["mean"]))
    variance = decay * old["variance"] + (1 - decay) * batch["variance"]
    return {"mean": moved, "variance": variance}
