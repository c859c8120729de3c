"""Base distributions: `init`, `log_prob` [b] in nats, `sample` [n, *event]."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betaln
from numpy.typing import ArrayLike

from jflow._core.arrays import float_dtype, mean_and_std, sum_event
from jflow._core.checks import check_event, check_whole
from jflow.types import Array, Distribution

__all__ = [
    "diagonal_normal",
    "mixture_of_normals",
    "multivariate_normal",
    "normal",
    "scaled",
    "student_t",
    "uniform",
]

_LOG_2PI = math.log(2 * math.pi)
_FAR = 1e12  # beyond, squares are kept from overflowing


def _dtype(params) -> jnp.dtype:
    """Samples take the type of the parameters; without any, JAX's default float."""
    leaves = jax.tree.leaves(params)
    return jnp.result_type(*leaves) if leaves else jnp.result_type(float)


def normal(event_shape: tuple[int, ...]) -> Distribution:
    """The standard normal distribution on [*event_shape], without parameters.

        log p(x) = -|x|^2 / 2 - D/2 log(2 pi),    D the size of the event.

    Args:
        event_shape: the shape of one x, such as (2,) or (8, 8, 1).

    Returns:
        Distribution: the standard normal, params {}.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import distributions
        >>> log_prob = distributions.normal((2,)).log_prob({}, jnp.zeros((1, 2)))
        >>> round(float(log_prob[0]), 3)  # -log(2 pi)
        -1.838
    """
    event_shape = tuple(event_shape)

    def log_prob(params, x, cond=None, *, key=None):
        check_event("normal", x, event_shape)
        return sum_event(-0.5 * (jnp.square(x.astype(float_dtype(x))) + _LOG_2PI))

    def sample(params, key, n, cond=None):
        return jax.random.normal(key, (n, *event_shape))

    return Distribution(_no_params("normal", event_shape), log_prob, sample)


def diagonal_normal(event_shape: tuple[int, ...]) -> Distribution:
    """A normal distribution with a trainable mean and standard deviation for each number.

    They start at those of the batch that `init` gets.

    Args:
        event_shape: the shape of one x, such as (2,) or (8, 8, 1).

    Returns:
        Distribution: the normal, params {'mean' [*event_shape], 'log_std' [*event_shape]}.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions
        >>> base = distributions.diagonal_normal((1,))
        >>> params = base.init(jax.random.key(0), jnp.array([[1.0], [5.0]]))
        >>> float(params["mean"][0]), round(float(params["log_std"][0]), 3)  # log 2
        (3.0, 0.693)
    """
    event_shape = tuple(event_shape)

    def init(key, x, cond=None):
        check_event("diagonal_normal", x, event_shape)
        mean, std = mean_and_std(x, axis=0)
        return {"mean": mean, "log_std": jnp.log(std)}

    def log_prob(params, x, cond=None, *, key=None):
        check_event("diagonal_normal", x, event_shape)
        z = (x - params["mean"][None]) * jnp.exp(-params["log_std"])[None]
        return sum_event(-0.5 * (jnp.square(z) + _LOG_2PI) - params["log_std"][None])

    def sample(params, key, n, cond=None):
        noise = jax.random.normal(key, (n, *event_shape), _dtype(params))
        return params["mean"][None] + jnp.exp(params["log_std"])[None] * noise

    return Distribution(init, log_prob, sample)


def multivariate_normal(features: int) -> Distribution:
    """A normal distribution on vectors with a trainable mean and full covariance L L^T.

    L is the strict lower triangle of 'lower' plus diag(exp('log_diagonal')). Mean and covariance
    start at those of the batch that `init` gets: below bijectors that start at the identity a flow
    starts at the Gaussian of greatest likelihood.

    Args:
        features: d, the size of the vectors.

    Returns:
        Distribution: the normal, params {'mean' [d], 'lower' [d, d], 'log_diagonal' [d]}.

    Examples:
        >>> import jax
        >>> from jflow import distributions
        >>> base = distributions.multivariate_normal(2)
        >>> params = base.init(jax.random.key(0), jax.random.normal(jax.random.key(1), (8, 2)))
        >>> base.sample(params, jax.random.key(2), 3).shape
        (3, 2)
    """

    def init(key, x, cond=None):
        check_event("multivariate_normal", x, (features,))
        mean, std = mean_and_std(x, axis=0)
        z = (x - mean[None]) / std[None]
        correlation = z.T @ z / len(x)
        # Columns may be sums of others, or the rows too few: float32 needs this much on the
        # diagonal, and without any spread 1.
        ridge = jnp.where(jnp.diag(correlation) > 0.5, 1e-4, 1.0)
        factor = std[:, None] * jnp.linalg.cholesky(correlation + jnp.diag(ridge))
        return {
            "mean": mean,
            "lower": jnp.tril(factor, -1),
            "log_diagonal": jnp.log(jnp.diag(factor)),
        }

    def factor(params):
        return jnp.tril(params["lower"], -1) + jnp.diag(jnp.exp(params["log_diagonal"]))

    def log_prob(params, x, cond=None, *, key=None):
        check_event("multivariate_normal", x, (features,))
        # the bound keeps what the solve adds up finite, where inf - inf would be NaN
        centered = jnp.clip(x - params["mean"][None], -_FAR, _FAR)
        z = jax.scipy.linalg.solve_triangular(factor(params), centered.T, lower=True).T
        return sum_event(-0.5 * (jnp.square(z) + _LOG_2PI)) - jnp.sum(params["log_diagonal"])[None]

    def sample(params, key, n, cond=None):
        noise = jax.random.normal(key, (n, features), _dtype(params))
        return params["mean"][None] + jnp.matmul(
            noise, factor(params).T, precision=jax.lax.Precision.HIGHEST
        )

    return Distribution(init, log_prob, sample)


def uniform(event_shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Distribution:
    """The uniform distribution on the box [low, high]^D, without parameters.

        log p(x) = -D log(high - low) inside, -inf outside, NaN where x is NaN.

    Args:
        event_shape: the shape of one x, such as (2,) or (8, 8, 1).
        low: the lower end of every number.
        high: the upper end of every number.

    Returns:
        Distribution: the uniform distribution, params {}.

    Raises:
        ValueError: low is not below high.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import distributions
        >>> box = distributions.uniform((2,), -1.0, 1.0)
        >>> log_prob = box.log_prob({}, jnp.array([[0.0, 0.5], [0.0, 2.0]]))
        >>> round(float(log_prob[0]), 3), float(log_prob[1])  # -2 log 2, and outside
        (-1.386, -inf)
    """
    event_shape = tuple(event_shape)
    if not low < high:
        raise ValueError(f"uniform: expected low < high, got low={low}, high={high}")
    # A number of numpy's would bring float64 along, here and in the constructors below.
    low, high = float(low), float(high)

    def log_prob(params, x, cond=None, *, key=None):
        check_event("uniform", x, event_shape)
        x = x.astype(float_dtype(x))
        outside = (x < low) | (x > high)
        log_density = jnp.where(outside, -jnp.inf, jnp.full_like(x, -math.log(high - low)))
        return sum_event(jnp.where(jnp.isnan(x), jnp.nan, log_density))

    def sample(params, key, n, cond=None):
        return jax.random.uniform(key, (n, *event_shape), minval=low, maxval=high)

    return Distribution(_no_params("uniform", event_shape), log_prob, sample)


def student_t(event_shape: tuple[int, ...], df: ArrayLike = 5.0) -> Distribution:
    """Independent Student-t numbers with trainable degrees of freedom: a base with heavy tails.

        log p(x) = lgamma((v+1)/2) - lgamma(v/2) - log(v pi)/2 - (v+1)/2 log(1 + x^2/v),

    summed over the event, with v = exp(log_df). Samples are differentiable in v (implicitly,
    through the gamma draw). A flow of bounded slope has the tails of its base: over a normal one
    it cannot have heavy tails.

    Args:
        event_shape: the shape of one x, such as (2,) or (8, 8, 1).
        df: the degrees of freedom that every number starts at, or an array of them that broadcasts
            to event_shape.

    Returns:
        Distribution: the distribution, params {'log_df' [*event_shape]}.

    Raises:
        ValueError: df is not positive and finite, or does not broadcast to event_shape.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions
        >>> cauchy = distributions.student_t((1,), df=1.0)
        >>> x = jnp.zeros((1, 1))
        >>> log_prob = cauchy.log_prob(cauchy.init(jax.random.key(0), x), x)
        >>> round(float(log_prob[0]), 3)  # -log(pi)
        -1.145

    References:
        Jaini, Kobyzev, Yu, Brubaker, *Tails of Lipschitz Triangular Flows*, 2020, arXiv:1907.04481.
        Alexanderson, Henter, *Robust Model Training and Generalisation with Studentising Flows*,
            2020, arXiv:2006.06599.
        Laszkiewicz, Lederer, Fischer, *Marginal Tail-Adaptive Normalizing Flows*, 2022,
            arXiv:2206.10311.
    """
    event_shape = tuple(event_shape)
    start = np.asarray(df, np.float64)
    if not np.all((start > 0) & np.isfinite(start)):
        raise ValueError(f"student_t: expected df > 0, got {df!r}")
    log_df = np.broadcast_to(np.log(start), event_shape)

    def init(key, x, cond=None):
        check_event("student_t", x, event_shape)
        return {"log_df": jnp.full_like(x, log_df, shape=event_shape, dtype=float_dtype(x))}

    def log_prob(params, x, cond=None, *, key=None):
        check_event("student_t", x, event_shape)
        v = jnp.exp(params["log_df"])
        # lgamma((v+1)/2) - lgamma(v/2) - log(v pi)/2; betaln keeps its digits when v is large
        log_norm = -betaln(0.5, v / 2) - 0.5 * jnp.log(v)
        near = jnp.clip(x, -_FAR, _FAR)
        log_tail = 2 * (jnp.log(jnp.maximum(jnp.abs(x), _FAR)) - math.log(_FAR))
        square_log = jnp.log1p(jnp.square(near) / v[None]) + log_tail
        return sum_event(log_norm[None] - 0.5 * (v[None] + 1) * square_log)

    def sample(params, key, n, cond=None):
        v = jnp.exp(params["log_df"])
        key_normal, key_gamma = jax.random.split(key)
        shape = (n, *event_shape)
        chi2 = 2 * jax.random.gamma(key_gamma, jnp.broadcast_to(v / 2, shape), dtype=v.dtype)
        return jax.random.normal(key_normal, shape, v.dtype) * jnp.sqrt(
            v[None] / jnp.maximum(chi2, 1e-30)
        )

    return Distribution(init, log_prob, sample)


def mixture_of_normals(event_shape: tuple[int, ...], components: int) -> Distribution:
    """A mixture of diagonal normals with trainable weights, means and standard deviations.

        log p(x) = logsumexp_k(log_softmax(logits)_k + log N(x; means_k, exp(log_stds_k)^2)).

    The means start near rows of the batch that `init` gets, drawn at random, and the standard
    deviations at those of the batch. Samples are not differentiable in the logits, because the
    component is a discrete draw.

    Args:
        event_shape: the shape of one x, such as (2,) or (8, 8, 1).
        components: K, the number of components.

    Returns:
        Distribution: the mixture, params {'logits' [K], 'means' [K, *event_shape], 'log_stds' [K,
            *event_shape]}.

    Raises:
        ValueError: components is not a whole number of at least 1.

    Examples:
        >>> import jax
        >>> from jflow import distributions
        >>> base = distributions.mixture_of_normals((2,), 3)
        >>> params = base.init(jax.random.key(0), jax.random.normal(jax.random.key(1), (8, 2)))
        >>> params["means"].shape
        (3, 2)
    """
    event_shape = tuple(event_shape)
    check_whole("mixture_of_normals", components=components)

    def init(key, x, cond=None):
        check_event("mixture_of_normals", x, event_shape)
        key_row, key_noise = jax.random.split(key)
        _, std = mean_and_std(x, axis=0)
        rows = jax.random.randint(key_row, (components,), 0, x.shape[0])
        noise = (
            0.1 * std[None] * jax.random.normal(key_noise, (components, *event_shape), std.dtype)
        )
        return {
            "logits": jnp.zeros_like(std, shape=(components,)),
            "means": x[rows] + noise,
            "log_stds": jnp.broadcast_to(jnp.log(std)[None], (components, *event_shape)),
        }

    def log_prob(params, x, cond=None, *, key=None):
        check_event("mixture_of_normals", x, event_shape)
        parts = (params[part][None] for part in ("logits", "means", "log_stds"))
        return mixture_log_prob(x, *parts)

    def sample(params, key, n, cond=None):
        key_component, key_noise = jax.random.split(key)
        k = jax.random.categorical(key_component, params["logits"], shape=(n,))
        noise = jax.random.normal(key_noise, (n, *event_shape), _dtype(params))
        means, log_stds = (jnp.take(params[name], k, axis=0) for name in ("means", "log_stds"))
        return means + jnp.exp(log_stds) * noise

    return Distribution(init, log_prob, sample)


def mixture_log_prob(x: Array, logits: Array, means: Array, log_stds: Array) -> Array:
    """log p(x) [b] of mixtures with logits [b, K], means and log_stds [b, K, *event], or of one
    for all rows, which leads with 1."""
    # the bound keeps the squares finite: logsumexp of nothing but -inf has NaN gradients
    z = jnp.clip((x[:, None] - means) * jnp.exp(-log_stds), -_FAR, _FAR)
    parts = jnp.sum(-0.5 * (jnp.square(z) + _LOG_2PI) - log_stds, axis=tuple(range(2, z.ndim)))
    return jax.nn.logsumexp(parts + jax.nn.log_softmax(logits), axis=1)


def scaled(distribution: Distribution, scale: float) -> Distribution:
    """The distribution of x = scale * e for e from another distribution, whose params it takes.

    Over a standard normal, scale is the temperature at which a flow that was trained at 1 is
    sampled: its params serve both flows.

        log p(x) = log p_e(x / scale) - D log(scale),    D the size of the event.

    Args:
        distribution: that of e.
        scale: the factor.

    Returns:
        Distribution: the scaled distribution, with the params of `distribution`.

    Raises:
        ValueError: scale is not positive.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import distributions
        >>> cool = distributions.scaled(distributions.normal((2,)), 0.5)
        >>> round(float(cool.log_prob({}, jnp.zeros((1, 2)))[0]), 3)  # -log(2 pi) + 2 log 2
        -0.452

    References:
        Kingma, Dhariwal, *Glow: Generative Flow with Invertible 1x1 Convolutions*, 2018,
            arXiv:1807.03039.
    """
    if not scale > 0:
        raise ValueError(f"scaled: expected scale > 0, got {scale}")
    scale = float(scale)

    def init(key, x, cond=None):
        return distribution.init(key, (x / scale).astype(x.dtype), cond)

    def log_prob(params, x, cond=None, *, key=None):
        e = x.astype(float_dtype(x)) / scale
        return distribution.log_prob(params, e, cond, key=key) - math.prod(x.shape[1:]) * math.log(
            scale
        )

    def sample(params, key, n, cond=None):
        return scale * distribution.sample(params, key, n, cond)

    return Distribution(init, log_prob, sample)


def _no_params(name: str, event_shape: tuple[int, ...]):
    def init(key, x: Array, cond=None) -> dict:
        check_event(name, x, event_shape)
        return {}

    return init
