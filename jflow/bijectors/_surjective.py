"""Surjections, with their contributions to the likelihood: `types.Transport`s for `flows.elbo_flow`.

| | source z -> data x | data x -> source z | contribution of the inverse | log p(x) |
|---|---|---|---|---|
| uniform_dequantization | x = floor(L z) | z = (x + u) / L, u uniform | -D log L | bound |
| variational_dequantization | x = floor(L z) | z = (x + u) / L, u ~ q(u given x) | -D log L - log q(u given x) | bound |
| truncated_normal_dequantization | x = floor(L z) | the same, u normal about 1/2 within (0, 1) | the same | bound |
| augment | x is z without its last numbers e | z = (x, e), e ~ q(e given x) | -log q(e given x) | bound |
| drop | x = (z, e), e ~ p(e given z) | z is x without its last numbers e | log p(e given z) | exact |

A bound holds in expectation over keys and is tight where q is the posterior of u or e under the flow above. Draws need
a key. Nielsen, Jaini, Hoogeboom, Winther, Welling, *SurVAE Flows* (2020).
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
    """Data x in 0, 1 ... levels-1 (as floats), source z = (x + u) / levels in [0, 1) with u uniform.

    Contribution of the inverse -D log(levels): a uniform density on [0, 1)^D has log2(levels) bits per dimension. For x
    off the levels it is -inf; forward clips z to [0, 1). Uria, Murray, Larochelle, *RNADE* (2013); Theis, van den Oord,
    Bethge, *A note on the evaluation of generative models* (2016).
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
    """`uniform_dequantization` whose u follows `noise`, a distribution on (0, 1)^event given the image that it dequantizes.

    `noise` gets as its cond the data scaled to [-1, 1], or {'x': that, 'cond': cond} where there is a cond. Params are
    the noise's own. Ho, Chen, Srinivas, Duan, Abbeel, *Flow++* (2019).
    """
    _check_levels("variational_dequantization", levels)

    def given(x, cond):
        return _given((2 * x.astype(float_dtype(x)) + 1) / levels - 1, cond)

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
        u, log_q = _draw(noise, params, key, x.shape[0], given(x, cond))
        if u.shape != x.shape:
            raise ValueError(
                f"variational_dequantization: expected noise of shape {list(x.shape)}, as x, got {list(u.shape)}"
            )
        return _into_cell(x, u, levels), _on_level(x, -log_q - _cell(x, levels), levels)

    return Transport(init, forward, inverse)


def truncated_normal_dequantization(std: float, levels: int = 256) -> Transport:
    """`variational_dequantization` by a fixed normal: u = 1/2 + std e, e standard normal but within |e| < 1 / (2 std).

    std is in widths of a level; 1 / (2 std) of 3 or more cuts off almost nothing. A continuous flow that stops at a
    time before data is a density of alpha x + sigma e, x in [-1, 1]: std = L sigma / (2 alpha) evaluates it at the
    noise that it was trained with, in `flows.with_dequantization(flow, this, scale=alpha)`. Nothing is trained.
    Contribution of the inverse -D log L + |e|^2 / 2 + D log(std sqrt(2 pi) erf(1 / (std sqrt(8)))).
    Errors: ValueError unless std > 0. Zheng, Lu, Chen, Zhu, *Improved Techniques for Maximum Likelihood Estimation for
    Diffusion ODEs* (2023).
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
    """z = (x, e) with `size` more numbers e ~ noise(given x) at the end of the last axis; forward takes them off.

    noise: a distribution on [*event without its last axis, size]; its cond is x, or {'x': x, 'cond': cond} where there
    is a cond. Params are the noise's own. The bound is log p(x, e) - log q(e given x). Huang, Dinh, Courville,
    *Augmented Normalizing Flows* (2020).
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
            return noise.init(key, e, _given(x, cond))
        key, key_e = jax.random.split(key)
        e = jax.random.normal(key_e, (*x.shape[:-1], size), float_dtype(x)).astype(x.dtype)
        return noise.init(key, e, _given(x, cond))

    def forward(params, z, cond=None, *, key=None):
        x, e = parts(z)
        return x, noise.log_prob(params, e, _given(x, cond), key=key)

    def inverse(params, x, cond=None, *, key=None):
        need_key("augment.inverse (forward of drop)", key)
        e, log_q = _draw(noise, params, key, x.shape[0], _given(x, cond))
        if e.shape != (*x.shape[:-1], size):
            raise ValueError(
                f"augment: expected noise of shape {[*x.shape[:-1], size]}, got {list(e.shape)}"
            )
        return jnp.concatenate([x, e.astype(x.dtype)], axis=-1), -log_q

    return Transport(init, forward, inverse)


def drop(noise: Flow | Distribution, size: int) -> Transport:
    """The other way round than `augment`: z is x without its last `size` numbers e, which the model says are
    p(e given z) = noise. Exact: the inverse draws nothing and contributes log p(e given z); `forward` needs a key."""
    return invert(augment(noise, size))


def _check_levels(name: str, levels: int) -> None:
    if not 2 <= levels <= 2**16 or levels != int(levels):
        raise ValueError(f"{name}: expected 2 .. 65536 levels, got {levels}")


def _given(x: Array, cond: Cond) -> Cond:
    return x if cond is None else {"x": x, "cond": cond}


def _draw(noise, params, key, n: int, cond: Cond) -> tuple[Array, Array]:
    """A draw for each row, differentiable, and its log-density [n]; for a flow both from one pass."""
    if isinstance(noise, Flow):
        return noise.sample_and_log_prob(params, key, n, cond)
    key_draw, key_density = split_key(key, 2)
    e = noise.sample(params, key_draw, n, cond)
    return e, noise.log_prob(params, e, cond, key=key_density)


def _margin(x: Array, levels: int) -> float:
    """How far u stays off the ends of its cell, so that rounding of x + u cannot change the level."""
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
