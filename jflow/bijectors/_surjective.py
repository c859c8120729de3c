"""Surjections with their contributions to the likelihood, as Transports for `flows.elbo_flow`.

For each there is what `forward` does, source z -> data x; what `inverse` does; and what the inverse
contributes to log p(x), in nats, for D numbers in L levels:

- uniform_dequantization: x = floor(L z); z = (x + u) / L, u uniform; -D log L, a bound;
- variational_dequantization: the same, but u ~ q(u given x); -D log L - log q(u given x), a bound;
- truncated_normal_dequantization: the same, but u is normal about 1/2 within (0, 1); a bound;
- augment: x is z without its last numbers e; z = (x, e), e ~ q(e given x); -log q(e given x), a
  bound;
- drop: x = (z, e), e ~ p(e given z); z is x without its last numbers e; log p(e given z), exact.

A bound holds in expectation over keys and is tight where q is the posterior of u or e under the
flow above. Draws need a key.

References:
    Nielsen, Jaini, Hoogeboom, Winther, Welling,
        *SurVAE Flows: Surjections to Bridge the Gap between VAEs and Flows*, 2020,
        arXiv:2007.02731.
"""

import math

import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype, sum_event, zero_log_det
from jflow._core.checks import check_side, check_whole, need_key
from jflow._core.keys import split_key
from jflow._core.nouns import no_params
from jflow.bijectors._combinators import invert
from jflow.types import Array, Cond, Distribution, Flow, Transport

__all__ = [
    "augment",
    "drop",
    "truncated_normal_dequantization",
    "uniform_dequantization",
    "variational_dequantization",
]


def uniform_dequantization(levels: int = 256) -> Transport:
    """Add uniform noise to data in levels, so that a density of reals becomes a model of levels.

    Data x are in 0, 1 ... levels-1 (as floats), the source is z = (x + u) / levels in [0, 1) with u
    uniform. The contribution of the inverse is -D log(levels) for D numbers: a uniform density on
    [0, 1)^D has log2(levels) bits per dimension. For x off the levels it is -inf. `forward` is x =
    floor(levels z), with z clipped to [0, 1). The inverse needs a key.

    Also known as: dequantization, dequantize.

    Args:
        levels: L, the number of levels, 2 .. 65536.

    Returns:
        Transport: the layer, without params.

    Raises:
        ValueError: levels is out of its range, or the inverse gets no key.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> layer = bijectors.uniform_dequantization(4)
        >>> x = jnp.array([[0.0, 3.0]])
        >>> z, contribution = layer.inverse({}, x, key=jax.random.key(0))
        >>> layer.forward({}, z)[0].tolist(), round(float(contribution[0]), 3)  # -2 log 4
        ([[0.0, 3.0]], -2.773)

    References:
        Uria, Murray, Larochelle, *RNADE: The Real-Valued Neural Autoregressive Density-Estimator*,
            2013, arXiv:1306.0186.
        Theis, van den Oord, Bethge, *A Note on the Evaluation of Generative Models*, 2016,
            arXiv:1511.01844.
    """
    _check_levels("uniform_dequantization", levels)

    def forward(params, z, cond=None, *, key=None):
        return _to_level(z, levels), zero_log_det(z) + _cell(z, levels)

    def inverse(params, x, cond=None, *, key=None):
        need_key("uniform_dequantization.inverse", key)
        u = jax.random.uniform(key, x.shape, float_dtype(x))
        return _into_cell(x, u, levels), _on_level(x, zero_log_det(x) - _cell(x, levels), levels)

    return Transport(no_params, forward, inverse)


def variational_dequantization(noise: Flow | Distribution, levels: int = 256) -> Transport:
    """Add learned noise to data in levels.

    It is `uniform_dequantization` with u from a distribution given x. The source is z = (x + u) /
    levels, u ~ q(u given x) = noise on (0, 1)^event. The contribution of the inverse is -D
    log(levels) - log q(u given x), in nats. The inverse needs a key.

    Args:
        noise: a `Flow` or `Distribution` on (0, 1)^event, such as `flows.dequantization_noise`. Its
            cond is the data scaled to [-1, 1], or {'x': that, 'cond': cond} where there is a cond.
        levels: L, the number of levels, 2 .. 65536.

    Returns:
        Transport: the layer; its params are those of the noise.

    Raises:
        ValueError: levels is out of its range, the noise has another shape than x, or the inverse
            gets no key.

    Examples:
        >>> from jflow import bijectors, flows
        >>> noise = flows.dequantization_noise((2, 2, 1), depth=1)
        >>> type(bijectors.variational_dequantization(noise, levels=4)).__name__
        'Transport'

    References:
        Ho, Chen, Srinivas, Duan, Abbeel, *Flow++: Improving Flow-Based Generative Models with
            Variational Dequantization and Architecture Design*, 2019, arXiv:1902.00275.
    """
    _check_levels("variational_dequantization", levels)

    def given(x, cond):
        return given_x((2 * x.astype(float_dtype(x)) + 1) / levels - 1, cond)

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        key_noise, key_u = jax.random.split(key)
        x = _to_level(x, levels) if side == "source" else x
        return noise.init(
            key_noise, jax.random.uniform(key_u, x.shape, float_dtype(x)), given(x, cond)
        )

    def forward(params, z, cond=None, *, key=None):
        x = _to_level(z, levels)
        margin = _margin(z, levels)
        u = jnp.clip(levels * z.astype(float_dtype(z)) - x, margin, 1 - margin)
        return x, noise.log_prob(params, u, given(x, cond), key=key) + _cell(z, levels)

    def inverse(params, x, cond=None, *, key=None):
        need_key("variational_dequantization.inverse", key)
        u, log_q = draw_given(noise, params, key, x.shape[0], given(x, cond))
        if u.shape != x.shape:
            raise ValueError(
                f"variational_dequantization: expected noise of shape {list(x.shape)}, as x, got "
                f"{list(u.shape)}"
            )
        return _into_cell(x, u, levels), _on_level(x, -log_q - _cell(x, levels), levels)

    return Transport(init, forward, inverse)


def truncated_normal_dequantization(std: float, levels: int = 256) -> Transport:
    """Add truncated normal noise to data in levels, as a diffusion model was trained with.

    It is `variational_dequantization` with u = 1/2 + std e, e standard normal but within |e| < 1 /
    (2 std). Nothing is trained. The contribution of the inverse is

        -D log L + |e|^2 / 2 + D log(std sqrt(2 pi) erf(1 / (std sqrt(8)))).

    A continuous flow that stops at a time before data is a density of alpha x + sigma e, x in
    [-1, 1]: std = L sigma / (2 alpha) evaluates it at the noise that it was trained with, in
    `flows.with_dequantization(flow, this, scale=alpha)`.

    Args:
        std: the standard deviation, in widths of a level; 1 / (2 std) of 3 or more cuts off almost
            nothing.
        levels: L, the number of levels, 2 .. 65536.

    Returns:
        Transport: the layer, without params.

    Raises:
        ValueError: std is not positive and finite, levels is out of its range, or the inverse gets
            no key.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> layer = bijectors.truncated_normal_dequantization(0.1, levels=4)
        >>> z, _ = layer.inverse({}, jnp.array([[0.0, 3.0]]), key=jax.random.key(0))
        >>> layer.forward({}, z)[0].tolist()
        [[0.0, 3.0]]

    References:
        Zheng, Lu, Chen, Zhu,
            *Improved Techniques for Maximum Likelihood Estimation for Diffusion ODEs*, 2023,
            arXiv:2305.03935.
    """
    if not (math.isfinite(std) and std > 0):
        raise ValueError(f"truncated_normal_dequantization: expected a finite std > 0, got {std}")
    std = float(std)  # a number of numpy's would bring float64 along
    bound = 0.5 / std
    log_mass = math.log(std * math.sqrt(2 * math.pi) * math.erf(bound / math.sqrt(2)))

    def log_prob(params, u, cond=None, *, key=None):
        return sum_event(-0.5 * jnp.square((u - 0.5) / std) - log_mass)

    def sample(params, key, n, cond=None):
        x = cond["x"] if isinstance(cond, dict) else cond
        return 0.5 + std * jax.random.truncated_normal(key, -bound, bound, x.shape, x.dtype)

    return variational_dequantization(
        Distribution(lambda key, x, cond=None: {}, log_prob, sample), levels
    )


def augment(noise: Flow | Distribution, size: int) -> Transport:
    """Append noise to the data, which gives a flow more dimensions to work in.

    The source is z = (x, e), with `size` more numbers e ~ noise(given x) at the end of the last
    axis; `forward` takes them off. The contribution of the inverse is -log q(e given x), so the
    bound is log p(x, e) - log q(e given x), in nats. The inverse needs a key.

    Also known as: augmentation, inference slicing.

    Args:
        noise: a `Flow` or `Distribution` on [*event without its last axis, size]; its cond is x, or
            {'x': x, 'cond': cond} where there is a cond.
        size: how many numbers are appended to the last axis.

    Returns:
        Transport: the layer; its params are those of the noise.

    Raises:
        ValueError: size is below 1, the noise has another shape, or the inverse gets no key.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, distributions
        >>> layer = bijectors.augment(distributions.normal((1,)), 1)
        >>> z, _ = layer.inverse({}, jnp.ones((3, 2)), key=jax.random.key(0))
        >>> z.shape
        (3, 3)

    References:
        Huang, Dinh, Courville, *Augmented Normalizing Flows: Bridging the Gap Between Generative
            Flows and Latent Variable Models*, 2020, arXiv:2002.07101.
    """
    check_whole("augment", size=size)

    def parts(z):
        if z.ndim < 2 or z.shape[-1] <= size:
            raise ValueError(
                f"augment: expected z [b, ..., more than {size}], got shape {list(z.shape)}"
            )
        return z[..., :-size], z[..., -size:]

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        if side == "source":
            x, e = parts(x)
            return noise.init(key, e, given_x(x, cond))
        key, key_e = jax.random.split(key)
        e = jax.random.normal(key_e, (*x.shape[:-1], size), float_dtype(x)).astype(x.dtype)
        return noise.init(key, e, given_x(x, cond))

    def forward(params, z, cond=None, *, key=None):
        x, e = parts(z)
        return x, noise.log_prob(params, e, given_x(x, cond), key=key)

    def inverse(params, x, cond=None, *, key=None):
        need_key("augment.inverse (forward of drop)", key)
        e, log_q = draw_given(noise, params, key, x.shape[0], given_x(x, cond))
        if e.shape != (*x.shape[:-1], size):
            raise ValueError(
                f"augment: expected noise of shape {[*x.shape[:-1], size]}, got {list(e.shape)}"
            )
        return jnp.concatenate([x, e.astype(x.dtype)], axis=-1), -log_q

    return Transport(init, forward, inverse)


def drop(noise: Flow | Distribution, size: int) -> Transport:
    """Take numbers off the data, whose density given the rest is modeled.

    It is `augment` the other way round. The source z is x without the last `size` numbers e of its
    last axis, which the model says are p(e given z) = noise. The likelihood is exact: the inverse
    draws nothing and contributes log p(e given z), in nats; `forward` needs a key.

    Also known as: slice surjection, generative slicing.

    Args:
        noise: a `Flow` or `Distribution` of e [*event without its last axis, size]; its cond is z,
            or {'x': z, 'cond': cond} where there is a cond.
        size: how many numbers are taken off the last axis.

    Returns:
        Transport: the layer; its params are those of the noise.

    Raises:
        ValueError: size is below 1, x has too few numbers, or `forward` gets no key.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, distributions
        >>> layer = bijectors.drop(distributions.normal((1,)), 1)
        >>> z, contribution = layer.inverse({}, jnp.zeros((1, 3)))
        >>> z.shape, round(float(contribution[0]), 3)  # -log(2 pi) / 2
        ((1, 2), -0.919)

    References:
        Nielsen, Jaini, Hoogeboom, Winther, Welling,
            *SurVAE Flows: Surjections to Bridge the Gap between VAEs and Flows*, 2020,
            arXiv:2007.02731.
    """
    return invert(augment(noise, size))


def _check_levels(name: str, levels: int) -> None:
    if not 2 <= levels <= 2**16 or levels != int(levels):
        raise ValueError(f"{name}: expected 2 .. 65536 levels, got {levels}")


def given_x(x: Array, cond: Cond) -> Cond:
    return x if cond is None else {"x": x, "cond": cond}


def draw_given(noise, params, key, n: int, cond: Cond) -> tuple[Array, Array]:
    """A differentiable draw for each row and its log-density [n]; a flow has both from one pass."""
    if isinstance(noise, Flow):
        return noise.sample_and_log_prob(params, key, n, cond)
    key_draw, key_density = split_key(key, 2)
    e = noise.sample(params, key_draw, n, cond)
    return e, noise.log_prob(params, e, cond, key=key_density)


def _margin(x: Array, levels: int) -> float:
    """How far u stays off the ends of its cell.

    Rounding of x + u can then not change the level.
    """
    return 8 * levels * float(jnp.finfo(float_dtype(x)).eps)


def _into_cell(x: Array, u: Array, levels: int) -> Array:
    margin = _margin(x, levels)
    return (x.astype(float_dtype(x)) + jnp.clip(u, margin, 1 - margin)) / levels


def _to_level(z: Array, levels: int) -> Array:
    return jnp.clip(jnp.floor(levels * z.astype(float_dtype(z))), 0, levels - 1)


def _cell(x: Array, levels: int) -> float:
    """D log(levels), minus the log-volume of a cell."""
    return math.prod(x.shape[1:]) * math.log(levels)


def _on_level(x: Array, contribution: Array, levels: int) -> Array:
    """-inf where x is off the levels, NaN where it has a NaN."""
    event = tuple(range(1, x.ndim))
    on = (x >= 0) & (x <= levels - 1) & (x == jnp.round(x))
    contribution = jnp.where(jnp.all(on, axis=event), contribution, -jnp.inf)
    return jnp.where(jnp.any(jnp.isnan(x), axis=event), jnp.nan, contribution)
