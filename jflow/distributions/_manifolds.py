"""Base distributions on manifolds; densities are with respect to the volume of the metric."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.scipy.special import gammainc
from jax.typing import ArrayLike

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_event, check_noun
from jflow.types import Array, Distribution, Manifold

__all__ = ["uniform_on", "wrapped_normal"]

_LOG_2PI = math.log(2 * math.pi)


def uniform_on(manifold: Manifold) -> Distribution:
    """The uniform distribution on a manifold of finite volume, without parameters.

        log p(x) = -log volume,    with respect to the volume of the metric

    The usual source of a flow on a sphere, a torus, or the rotations. What is off the manifold is
    not looked at (`manifolds.check`).

    Args:
        manifold: the manifold, whose `random` is uniform.

    Returns:
        Distribution: the uniform distribution, params {}; x is [b, *manifold.shape].

    Raises:
        TypeError: for what is no manifold.
        ValueError: the volume is infinite: see `wrapped_normal`.

    Examples:
        >>> import jax
        >>> from jflow import distributions, manifolds
        >>> base = distributions.uniform_on(manifolds.sphere(2))
        >>> x = base.sample({}, jax.random.key(0), 5)
        >>> x.shape, round(float(base.log_prob({}, x)[0]), 4)  # -log(4 pi)
        ((5, 3), -2.531)
    """
    check_noun("uniform_on", manifold, Manifold)
    if not math.isfinite(manifold.log_volume):
        raise ValueError(
            "uniform_on: expected a manifold of finite volume, got one whose volume is infinite; "
            "wrapped_normal(manifold, mean, std) is a law on it"
        )

    def log_prob(params, x, cond=None, *, key=None):
        check_event("uniform_on", x, manifold.shape)
        x = x.astype(float_dtype(x))
        missing = jnp.any(jnp.isnan(x), axis=tuple(range(1, x.ndim)))
        return jnp.where(missing, jnp.nan, jnp.full_like(x, -manifold.log_volume, shape=len(x)))

    def sample(params, key, n, cond=None):
        return manifold.random(key, n)

    return Distribution(_no_params("uniform_on", manifold), log_prob, sample)


def wrapped_normal(manifold: Manifold, mean: ArrayLike | Sequence[Any], std: float) -> Distribution:
    """A normal law of tangent vectors at a point, carried to the manifold by the exponential map.

        x = exp_mean(v),    v = std sum_i z_i e_i,    z standard normal, e orthonormal at the mean
        log p(x) = log N(v; 0, std^2) - log |det d exp_mean(v)| - log P,    v = log_mean(x)

    with respect to the volume of the metric. v is restricted to where exp is one to one, of
    probability P: |v| < pi on the sphere and the rotations, each |v_i| < pi on the torus,
    everywhere (P = 1) in spaces without cut points. So p is exact at any std.

    Args:
        manifold: the manifold; those for which `injective` is () are refused.
        mean: the point of the mean, [*manifold.shape].
        std: the standard deviation of each tangent coordinate, above 0, in units of the metric.

    Returns:
        Distribution: the distribution, params {}; x is [b, *manifold.shape].

    Raises:
        TypeError: for what is no manifold.
        ValueError: mean is not a point of the manifold, std is not above 0, or where exp is one to
            one is not known.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, manifolds
        >>> disk = manifolds.poincare_ball(2)
        >>> base = distributions.wrapped_normal(disk, jnp.zeros(2), 1.0)
        >>> round(float(base.log_prob({}, jnp.zeros((1, 2)))[0]), 3)  # -log(2 pi)
        -1.838

    References:
        Nagano, Yamaguchi, Fujita, Koyama, *A Wrapped Normal Distribution on Hyperbolic Space for
            Gradient-Based Learning*, 2019, arXiv:1902.02992; the restriction is ours.
    """
    check_noun("wrapped_normal", manifold, Manifold)
    mean = np.asarray(mean)
    if mean.shape != manifold.shape:
        raise ValueError(
            f"wrapped_normal: expected a mean of shape {list(manifold.shape)}, got "
            f"{list(mean.shape)}"
        )
    off = np.abs(np.asarray(manifold.project(jnp.asarray(mean))) - mean).max()
    if not off <= 1e-4 * max(1.0, np.abs(mean).max()):
        raise ValueError(
            f"wrapped_normal: expected a mean on the manifold, got one that is off by {off:.3g}; "
            "manifold.project(mean) is on it"
        )
    if not 0 < std < math.inf:
        raise ValueError(f"wrapped_normal: expected a finite std > 0, got {std}")
    if not manifold.injective:
        raise ValueError(
            "wrapped_normal: expected a manifold that says where its exponential map is one to one,"
            " got one whose `injective` is ()"
        )
    std = float(std)
    dim = manifold.dim
    # P, a ball at a time: |z|^2 / 2 of k normal numbers has a gamma law of k / 2
    inside = [
        1.0 if radius == math.inf else float(scipy.special.gammainc(k / 2, (radius / std) ** 2 / 2))
        for k, radius in manifold.injective
    ]
    log_norm = -dim * (math.log(std) + _LOG_2PI / 2) - sum(map(math.log, inside))

    def log_prob(params, x, cond=None, *, key=None):
        check_event("wrapped_normal", x, manifold.shape)
        x = x.astype(float_dtype(x))
        at = jnp.asarray(mean, x.dtype)[None]
        v = manifold.log(at, x)
        square = manifold.inner(at, v, v) / std**2
        return log_norm - 0.5 * square - manifold.log_det_exp(at, v)

    def sample(params, key, n, cond=None):
        at = jnp.asarray(mean, jnp.result_type(float))[None]
        keys = jax.random.split(key, len(manifold.injective))
        z = [
            _in_ball(own, n, k, radius / std, below)
            for own, (k, radius), below in zip(keys, manifold.injective, inside, strict=True)
        ]
        basis = manifold.tangent_basis(at)[0]
        v = jnp.tensordot(std * jnp.concatenate(z, axis=1), basis, 1)
        return manifold.exp(at, v)

    return Distribution(_no_params("wrapped_normal", manifold), log_prob, sample)


def _in_ball(key, n: int, k: int, radius: float, inside: float) -> Array:
    """k standard normal numbers [n, k], given that they lie in a ball of that probability: where
    they do not, the length is drawn anew from its law inside, by halving."""
    normal_key, length_key = jax.random.split(key)
    z = jax.random.normal(normal_key, (n, k))
    if radius == math.inf:
        return z
    u = inside * jax.random.uniform(length_key, (n,))

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        below = gammainc(k / 2, jnp.square(middle) / 2) < u
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    start = jnp.zeros_like(u), jnp.full_like(u, radius)
    fresh = sum(jax.lax.fori_loop(0, 32, halve, start)) / 2
    length = jnp.linalg.norm(z, axis=1)
    return z * jnp.where(length < radius, 1.0, fresh / jnp.maximum(length, 1e-30))[:, None]


def _no_params(name: str, manifold: Manifold):
    def init(key, x, cond=None) -> dict:
        check_event(name, x, manifold.shape)
        return {}

    return init
