"""Monotone networks of one number: smooth, onto the reals, inverted by safeguarded Newton steps.

Their inverses are differentiated by the implicit function theorem (`_core.implicit.monotone_root`).
All have slopes between positive bounds, so that the inverse keeps its digits where the maps of the
papers have plateaus.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jflow import kernels
from jflow._core.checks import check_raw, check_whole
from jflow._core.implicit import monotone_root
from jflow._core.nouns import compiled
from jflow.bijectors import scales
from jflow.kernels.columns import with_columns
from jflow.types import Array, Elementwise

__all__ = ["deep_sigmoidal", "logistic_mixture", "unconstrained_monotone"]

_bounded = scales.bounded(3.0)


def logistic_mixture(
    components: int = 8, floor: float = 1e-3, *, implementation: str | None = None
) -> Elementwise:
    """The logit of the distribution function of a mixture of logistics, as in Flow++.

    The map is

        y = ((1 - floor) logit F(x) + floor x) exp(a) + b,
        F(x) = sum_k pi_k sigmoid((x - mu_k) / s_k).

    The raw numbers are, in this order, K each for log pi, mu and log s (|log s| < 3), then a
    (|a| < 3) and b. The tails are linear with slope 1 / max s, and no slope exceeds exp(a) / min s.
    All components are alike at raw = 0, where the map is the identity; fixed distinct factors on
    their raw numbers let them part. The inverse is a root, found numerically, with implicit
    gradients.

    Ours: `floor`. In a gap between narrow components logit F is flat to exp(-gap / s); the floor
    keeps the slope that float32 needs for an inverse.

    Also known as: mixture of logistics CDF, Flow++ transformation.

    Args:
        components: K, the number of logistics.
        floor: the weight of the identity, in [0, 1); 0 is the map of the paper.
        implementation: of couplings, 'xla' or 'pallas' (see `kernels.columns`, whose choice is
            None), or 'plain', the slower reference.

    Returns:
        Elementwise: the map, with 3 * components + 2 raw numbers.

    Raises:
        ValueError: components is below 1, floor is not in [0, 1), or implementation is none of the
            four.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> mixture = bijectors.univariate.logistic_mixture(2)
        >>> y, log_slope = mixture.forward(jnp.array([0.5]), jnp.zeros((1, mixture.size)))
        >>> mixture.size, round(float(y[0]), 3)
        (8, 0.5)

    References:
        Ho, Chen, Srinivas, Duan, Abbeel, *Flow++: Improving Flow-Based Generative Models with
            Variational Dequantization and Architecture Design*, 2019, arXiv:1902.00275.
    """
    check_whole("logistic_mixture", components=components)
    floor = _check_floor("logistic_mixture", floor)
    size = 3 * components + 2

    def forward(x, raw):
        x, raw = check_raw("logistic_mixture", x, raw, size)
        log_w, mean, log_s = _components(raw[..., :-2])
        y, log_slope = _logit_of_mixture(x, log_w, -log_s, -mean * jnp.exp(-log_s))
        y, log_slope = _add_identity(floor, x, y, log_slope)
        a = _bounded(raw[..., -2])
        return y * jnp.exp(a) + raw[..., -1], log_slope + a

    mixture = _by_root("logistic_mixture", size, forward)
    return with_columns(
        mixture, partial(kernels.logistic_mixture.transform, floor=floor), implementation
    )


def deep_sigmoidal(hidden: int = 8, num_layers: int = 2, floor: float = 1e-3) -> Elementwise:
    """A deep sigmoidal flow: layers of logits of weighted sums of sigmoids.

    The map is

        y = (1 - floor) g_L(... g_1(x)) + floor x,    g(h) = logit(sum_k w_k sigmoid(a_k h + b_k)),

    w a softmax, a > 0. Each layer takes 3 * hidden raw numbers (log w, b, log a with |log a| < 3);
    its slope is at most max a, and its tails are linear. It is the deep sigmoidal flow of the
    paper, in which one number passes from layer to layer. The inverse is a root, found numerically,
    with implicit gradients. Ours: `floor`, as in `logistic_mixture`.

    Also known as: DSF, neural autoregressive flow transformer.

    Args:
        hidden: the number of sigmoids in a layer.
        num_layers: L, the number of layers.
        floor: the weight of the identity, in [0, 1); 0 is the map of the paper.

    Returns:
        Elementwise: the map, with 3 * hidden * num_layers raw numbers.

    Raises:
        ValueError: hidden or num_layers is below 1, or floor is not in [0, 1).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> sigmoidal = bijectors.univariate.deep_sigmoidal(4, num_layers=2)
        >>> y, log_slope = sigmoidal.forward(jnp.array([0.5]), jnp.zeros((1, sigmoidal.size)))
        >>> sigmoidal.size, round(float(y[0]), 3)
        (24, 0.5)

    References:
        Huang, Krueger, Lacoste, Courville, *Neural Autoregressive Flows*, 2018, arXiv:1804.00779.
    """
    check_whole("deep_sigmoidal", hidden=hidden, num_layers=num_layers)
    floor = _check_floor("deep_sigmoidal", floor)
    size = 3 * hidden * num_layers

    def forward(x, raw):
        x, raw = check_raw("deep_sigmoidal", x, raw, size)

        def layer(carry, raw):
            h, log_slope = carry
            log_w, b, log_a = _components(raw)
            h, contribution = _logit_of_mixture(h, log_w, log_a, b)
            return (h, log_slope + contribution), None

        stacked = jnp.moveaxis(raw.reshape(*x.shape, num_layers, 3 * hidden), -2, 0)
        (y, log_slope), _ = jax.lax.scan(layer, (x, jnp.zeros_like(x)), stacked)
        return _add_identity(floor, x, y, log_slope)

    return _by_root("deep_sigmoidal", size, forward)


def unconstrained_monotone(
    hidden: int = 8, nodes: int | None = None, bound: float = 5.0, max_log_slope: float = 3.0
) -> Elementwise:
    """The integral of a positive function, by Gauss-Legendre quadrature.

    The map is

        y = exp(a) int_0^x exp(v(t)) dt + b,    v(t) = sum_j (c_j cos w_j t + s_j sin w_j t),

    with `hidden` fixed frequencies w_j = j pi / (2 bound), the coefficients scaled down so that |v|
    < max_log_slope, and |a| < 3. Outside [-bound, bound] the map goes on with the slope it has at
    the edge. The raw numbers are c, s, a and b. The inverse is a root, found numerically, with
    implicit gradients.

    Ours: the form of v. In the paper exp(v) is a free network; this one is entire and band-limited,
    so that the default number of nodes, 6 * hidden + 16, integrates it to the rounding of float64,
    and log-slope, map and inverse agree.

    Also known as: UMNN.

    Args:
        hidden: the number of frequencies.
        nodes: of the quadrature; None is 6 * hidden + 16.
        bound: half the length of the interval outside of which the slope is constant.
        max_log_slope: the bound on |v|, in nats.

    Returns:
        Elementwise: the map, with 2 * hidden + 2 raw numbers.

    Raises:
        ValueError: hidden or nodes is below 1, or bound or max_log_slope is not positive.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> monotone = bijectors.univariate.unconstrained_monotone(4)
        >>> y, log_slope = monotone.forward(jnp.array([0.5]), jnp.zeros((1, monotone.size)))
        >>> monotone.size, round(float(y[0]), 3)
        (10, 0.5)

    References:
        Wehenkel, Louppe, *Unconstrained Monotonic Neural Networks*, 2019, arXiv:1908.05164.
    """
    nodes = 6 * hidden + 16 if nodes is None else nodes
    check_whole("unconstrained_monotone", hidden=hidden, nodes=nodes)
    for name, value in (("bound", bound), ("max_log_slope", max_log_slope)):
        if not value > 0:
            raise ValueError(f"unconstrained_monotone: expected {name} > 0, got {value}")
    bound, max_log_slope = float(bound), float(max_log_slope)
    size = 2 * hidden + 2
    points, weights = np.polynomial.legendre.leggauss(nodes)
    points, weights = (points + 1) / 2, weights / 2  # on [0, 1]
    frequencies = np.arange(1, hidden + 1) * math.pi / (2 * bound)

    def exponent(t, raw):
        """v at t [..., m] for raw [..., size]: [..., m]"""
        free = raw[..., : 2 * hidden]
        # cos^2 + sin^2 = 1: the features have norm sqrt(hidden), so v is bounded by the norm of its
        # coefficients
        norm = jnp.sum(free * free, axis=-1, keepdims=True) * hidden / max_log_slope**2
        free = free / jnp.sqrt(1 + norm)
        angles = t[..., None] * jnp.asarray(frequencies, t.dtype).reshape((1,) * t.ndim + (-1,))
        features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return jnp.sum(features * free[..., None, :], axis=-1)

    def forward(x, raw):
        x, raw = check_raw("unconstrained_monotone", x, raw, size)
        inside = jnp.clip(x, -bound, bound)
        t = inside[..., None] * jnp.asarray(points, x.dtype).reshape((1,) * x.ndim + (-1,))
        v = exponent(jnp.concatenate([t, inside[..., None]], axis=-1), raw)
        w = jnp.asarray(weights, x.dtype).reshape((1,) * x.ndim + (-1,))
        integral = inside * jnp.sum(w * jnp.exp(v[..., :-1]), axis=-1)
        y = integral + (x - inside) * jnp.exp(v[..., -1])
        a = _bounded(raw[..., -2])
        return y * jnp.exp(a) + raw[..., -1], v[..., -1] + a

    return _by_root("unconstrained_monotone", size, forward)


def _by_root(name, size, forward) -> Elementwise:
    def inverse(y, raw):
        y, raw = check_raw(name, y, raw, size)
        x = monotone_root(forward, y, raw)
        return x, -forward(x, raw)[1]

    return compiled(Elementwise(size, forward, inverse))


def _components(raw: Array) -> tuple[Array, Array, Array]:
    """Log weights, locations and log scales [..., K] from raw [..., 3 K].

    Each raw number has its own fixed factor: with equal ones all components of a net that starts at
    zero would receive the same gradient for ever.
    """
    count = raw.shape[-1] // 3
    factors = np.linspace(0.5, 1.5, 3 * count).reshape(count, 3).T.reshape(-1)
    raw = raw * jnp.asarray(factors, raw.dtype).reshape((1,) * (raw.ndim - 1) + (-1,))
    log_w, location, log_scale = jnp.split(raw, 3, axis=-1)
    return jax.nn.log_softmax(log_w), location, _bounded(log_scale)


def _logit_of_mixture(x: Array, log_w: Array, log_a: Array, b: Array) -> tuple[Array, Array]:
    """y = logit F and log dy/dx, F = sum_k w_k sigmoid(z_k), z = a x + b.

    Both tails are right to the rounding of z: dy/dx = sum_k w_k a_k sigmoid(z_k) sigmoid(-z_k) / (F
    (1 - F)): in the right tail, where the terms of 1 - F vanish, their shares of it q_k = w_k
    sigmoid(-z_k) / (1 - F) do not, and dy/dx = sum_k q_k a_k sigmoid(z_k) / F.
    """
    z = jnp.exp(log_a) * x[..., None] + b
    below, above = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
    (log_f, shares_f), (log_rest, shares_rest) = _mixture(log_w, below), _mixture(log_w, above)
    y = log_f - log_rest
    right = y > 0
    terms = jnp.where(right, shares_rest + below, shares_f + above) + log_a
    log_slope = jax.nn.logsumexp(terms, axis=-1) - jnp.where(right, log_f, log_rest)[..., 0]
    return y[..., 0], log_slope


def _mixture(log_w: Array, log_p: Array) -> tuple[Array, Array]:
    """log sum_k w_k p_k [..., 1] and the log share of each term in it.

    The shares keep their digits when all terms are exp(-1e6).
    """
    top = jax.lax.stop_gradient(jnp.max(log_p, axis=-1, keepdims=True))
    terms = log_w + (log_p - top)
    total = jax.nn.logsumexp(terms, axis=-1, keepdims=True)
    return top + total, terms - total


def _add_identity(floor: float, x: Array, y: Array, log_slope: Array) -> tuple[Array, Array]:
    if floor == 0:
        return y, log_slope
    return (1 - floor) * y + floor * x, jnp.logaddexp(
        log_slope + math.log1p(-floor), math.log(floor)
    )


def _check_floor(name: str, floor: float) -> float:
    if not 0 <= floor < 1:
        raise ValueError(f"{name}: expected 0 <= floor < 1, got {floor}")
    return float(floor)  # a number of numpy's would bring float64 along
