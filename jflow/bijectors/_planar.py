"""Maps of rank one and of rank M, with log-dets in O(d): planar, radial and Sylvester flows.

They are in the published direction, source -> data, which is the fast one: for variational
inference. All start at the identity. Their constraints hold 1 + p h'(.) >= 1e-3, where p is the
product that has to stay above -1: the published ones let it come as close to -1 as rounding does,
and there the inverse has no digits. They are also smooth at p = 0 and map it to itself, so that u =
0, beta = 0 or R = 0 is the identity.
"""

import jax
import jax.numpy as jnp

from jflow._core import implicit
from jflow._core.arrays import float_dtype, zero_log_det
from jflow._core.checks import check_event, check_side, check_whole
from jflow._core.nouns import compiled
from jflow.types import Array, Bijector

__all__ = ["planar", "radial", "sylvester"]

_ROOM = 1 - 1e-3
_SLOPE = 0.6321205588285577  # 1 - 1/e
_FULL = jax.lax.Precision.HIGHEST


def planar(features: int) -> Bijector:
    """A planar flow: bend space along one direction.

    The map and its log-det, in O(d), are

        x = z + u' tanh(w . z + b),    log_det = log(1 + w . u' h'),    h' = 1 - tanh^2.

    u' is u with its part along w changed so that w . u' = m(w . u) > -1. Ours: m(a) = 0.999 log(1 +
    (e^a - 1)(1 - 1/e)), a softplus through the origin, so that u = 0 is the identity. The inverse
    solves one scalar equation in w . z.

    Args:
        features: d; x is [b, d].

    Returns:
        Bijector: the map, with params {'u': [d], 'w': [d], 'b': []}; it starts at u = 0, the
            identity.

    Raises:
        ValueError: features is below 1, or x is not [b, d].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> params = {"u": jnp.zeros(2), "w": jnp.ones(2), "b": jnp.zeros(())}
        >>> bijectors.planar(2).forward(params, jnp.ones((1, 2)))[0].tolist()
        [[1.0, 1.0]]

    References:
        Rezende, Mohamed, *Variational Inference with Normalizing Flows*, 2015, arXiv:1505.05770.
    """
    _check_features("planar", features)

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        check_event("planar", x, (features,))
        zeros = jnp.zeros_like(x, shape=(features,), dtype=float_dtype(x))
        w = jax.random.normal(key, (features,), zeros.dtype) / features**0.5
        return {"u": zeros, "w": w, "b": zeros[0]}

    def read(params):
        """u', w, b and w . u'."""
        u, w = params["u"], params["w"]
        norm = _norm(w)
        unit = w / jnp.where(norm > 0, norm, 1)
        along = jnp.sum(unit * u)
        u = u + along * (_held_ratio(norm * along) - 1) * unit
        return u, w, params["b"], _held(norm * along)

    def forward(params, z, cond=None, *, key=None):
        check_event("planar", z, (features,))
        u, w, b, wu = read(params)
        wide = z.astype(float_dtype(z))
        h = jnp.tanh(jnp.sum(wide * w[None], axis=-1) + b)
        return (wide + h[:, None] * u[None]).astype(z.dtype), jnp.log1p(wu * (1 - h * h))

    def inverse(params, x, cond=None, *, key=None):
        check_event("planar", x, (features,))
        u, w, b, wu = read(params)
        wide = x.astype(float_dtype(x))
        along = implicit.monotone_root(
            _bent, jnp.sum(wide * w[None], axis=-1), (wu, jnp.ones_like(wu), b)
        )
        h = jnp.tanh(along + b)
        return (wide - h[:, None] * u[None]).astype(x.dtype), -jnp.log1p(wu * (1 - h * h))

    return compiled(Bijector(init, forward, inverse))


def radial(features: int) -> Bijector:
    """A radial flow: draw space to a center, or push it away.

    With c = 'center' and r = |z - c| the map and its log-det, in O(d), are

        x = z + beta (z - c) / (alpha + r),
        log_det = (d - 1) log(1 + beta / (alpha + r)) + log(1 + beta alpha / (alpha + r)^2),

    alpha = exp(log_alpha) and beta = alpha m(raw_beta) > -alpha, with m as in `planar`. The inverse
    is the root of a quadratic in r.

    Args:
        features: d; x is [b, d].

    Returns:
        Bijector: the map, with params {'center': [d], 'log_alpha': [], 'raw_beta': []}; the center
            is drawn at random, and it starts at beta = 0, the identity.

    Raises:
        ValueError: features is below 1, or x is not [b, d].

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> params = bijectors.radial(2).init(jax.random.key(0), jnp.ones((1, 2)))
        >>> x, log_det = bijectors.radial(2).forward(params, jnp.ones((1, 2)))
        >>> x.round(3).tolist(), log_det.tolist()
        ([[1.0, 1.0]], [0.0])

    References:
        Rezende, Mohamed, *Variational Inference with Normalizing Flows*, 2015, arXiv:1505.05770.
        Tabak, Turner, *A Family of Nonparametric Density Estimation Algorithms*, 2013.
    """
    _check_features("radial", features)

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        check_event("radial", x, (features,))
        zero = jnp.zeros_like(x, shape=(), dtype=float_dtype(x))
        return {
            "center": jax.random.normal(key, (features,), zero.dtype),
            "log_alpha": zero,
            "raw_beta": zero,
        }

    def read(params, x):
        check_event("radial", x, (features,))
        alpha = jnp.exp(params["log_alpha"])
        offset = x.astype(float_dtype(x)) - params["center"][None]
        return (
            params["center"][None],
            alpha,
            alpha * _held(params["raw_beta"]),
            offset,
            _norm(offset),
        )

    def log_det(alpha, beta, r):
        return (features - 1) * jnp.log1p(beta / (alpha + r)) + jnp.log1p(
            beta / (alpha + r) * (alpha / (alpha + r))
        )

    def forward(params, z, cond=None, *, key=None):
        center, alpha, beta, offset, r = read(params, z)
        x = center + offset * (1 + beta / (alpha + r))[:, None]
        return x.astype(z.dtype), log_det(alpha, beta, r)

    def inverse(params, x, cond=None, *, key=None):
        center, alpha, beta, offset, s = read(params, x)
        # r (1 + beta / (alpha + r)) = s, that is r^2 + q r = s alpha, whose root is taken without
        # cancellation
        q = alpha + beta - s
        root = jnp.sqrt(q * q + 4 * s * alpha)
        r = jnp.where(q > 0, 2 * s * alpha / jnp.where(q > 0, q + root, 1), (root - q) / 2)
        z = center + offset / (1 + beta / (alpha + r))[:, None]
        return z.astype(x.dtype), -log_det(alpha, beta, r)

    return compiled(Bijector(init, forward, inverse))


def sylvester(
    features: int, rank: int | None = None, *, reflections: int | None = None
) -> Bijector:
    """A Sylvester flow: M planar maps at once, with a log-det in O(M).

    The map is x = z + Q R tanh(S Q^T z + b), Q [d, M] with orthonormal columns, R and S upper
    triangular; log_det = sum_i log(1 + h'_i r_ii s_ii). Q is the first M columns of a product of
    Householder reflections. The inverse solves for Q^T z one coordinate after another, from the
    last.

    Ours: the products r_ii s_ii are held above -1 by changing r_ii as `planar` changes u; the
    published code puts tanh on both, a smaller set.

    Also known as: SNF layer.

    Args:
        features: d; x is [b, d].
        rank: M, from 1 to features; None is features.
        reflections: the number of reflections. None is M, enough for every frame Q up to signs; 0
            leaves the unit vectors, to stand between permutations.

    Returns:
        Bijector: the map, with params {'reflections': [k, d], 'r': [M, M], 's': [M, M], 'b': [M]};
            of 'r' and 's' the upper triangles are used, and with reflections=0 the first is absent.
            It starts at r = 0, the identity.

    Raises:
        ValueError: features is below 1, rank is not in 1 .. features, reflections is negative, or x
            is not [b, d].

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> params = bijectors.sylvester(3, rank=2).init(jax.random.key(0), jnp.ones((1, 3)))
        >>> {name: p.shape for name, p in sorted(params.items())}
        {'b': (2,), 'r': (2, 2), 'reflections': (2, 3), 's': (2, 2)}

    References:
        van den Berg, Hasenclever, Tomczak, Welling,
            *Sylvester Normalizing Flows for Variational Inference*, 2018, arXiv:1803.05649.
    """
    _check_features("sylvester", features)
    rank = features if rank is None else rank
    if not 1 <= rank <= features:
        raise ValueError(f"sylvester: expected rank from 1 to features={features}, got {rank}")
    count = rank if reflections is None else reflections
    if count < 0:
        raise ValueError(f"sylvester: expected reflections >= 0, got {count}")

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        check_event("sylvester", x, (features,))
        zeros = jnp.zeros_like(x, shape=(rank, rank), dtype=float_dtype(x))
        params = {"r": zeros, "s": jnp.eye(rank, dtype=zeros.dtype), "b": zeros[0]}
        if count:
            params["reflections"] = jax.random.normal(key, (count, features), zeros.dtype)
        return params

    def read(params):
        """Q, R and S, with the products of the diagonals held."""
        q = jnp.eye(features, rank, dtype=params["b"].dtype)
        if count:
            like = jnp.zeros_like(
                params["reflections"], shape=q.shape
            )  # varies over a mesh axis as the params do
            q, _ = jax.lax.scan(_reflect, q + like, params["reflections"])
        r, s = jnp.triu(params["r"]), jnp.triu(params["s"])
        held = jnp.diag(r) * _held_ratio(jnp.diag(r) * jnp.diag(s))
        return q, r + jnp.diag(held - jnp.diag(r)), s

    def forward(params, z, cond=None, *, key=None):
        check_event("sylvester", z, (features,))
        q, r, s = read(params)
        wide = z.astype(float_dtype(z))
        h = jnp.tanh(_dot(_dot(wide, q), s.T) + params["b"][None])
        x = wide + _dot(_dot(h, r.T), q.T)
        return x.astype(z.dtype), _log_det(h, r, s)

    def inverse(params, x, cond=None, *, key=None):
        check_event("sylvester", x, (features,))
        q, r, s = read(params)
        wide = x.astype(float_dtype(x))

        def coordinate(carry, row):
            """v_i from the later ones: x_i = v_i + r_ii tanh(s_ii v_i + b_i + later) + later."""
            v, h = carry
            i, r_i, s_i, b_i, x_i = row
            shift = b_i + _dot(v, s_i)
            args = (r_i[i], s_i[i], shift)
            v_i = implicit.monotone_root(_bent, x_i - _dot(h, r_i), args)
            return (v.at[:, i].set(v_i), h.at[:, i].set(jnp.tanh(s_i[i] * v_i + shift))), None

        along = _dot(wide, q)
        rows = (jnp.arange(rank), r, s, params["b"], along.T)
        (_, h), _ = jax.lax.scan(
            coordinate, (jnp.zeros_like(along), jnp.zeros_like(along)), rows, reverse=True
        )
        return (wide - _dot(_dot(h, r.T), q.T)).astype(x.dtype), -_log_det(h, r, s)

    return compiled(Bijector(init, forward, inverse))


def _check_features(name, features):
    check_whole(name, features=features)


def _bent(v, args):
    """v + r tanh(s v + b), and its log slope; increasing as r s > -1."""
    r, s, b = args
    h = jnp.tanh(s * v + b)
    return v + r * h, jnp.log1p(r * s * (1 - h * h))


def _held(a: Array) -> Array:
    """m(a) = 0.999 log(1 + (e^a - 1)(1 - 1/e)).

    Increasing from -0.999, 0 at 0, close to 0.999 a for large a.
    """
    low = jnp.log1p(jnp.expm1(jnp.minimum(a, 1)) * _SLOPE)
    high = jax.nn.softplus(a + jnp.log(jnp.expm1(jnp.ones_like(a)))) - 1
    return _ROOM * jnp.where(a < 1, low, high)


def _held_ratio(a: Array) -> Array:
    """m(a) / a, in (0, 1)."""
    flat = jnp.abs(a) < 1e-4
    safe = jnp.where(flat, 1, a)
    return jnp.where(flat, _ROOM * (_SLOPE + _SLOPE * (1 - _SLOPE) / 2 * a), _held(safe) / safe)


def _norm(x: Array) -> Array:
    """|x| along the last axis, with derivative 0 at 0."""
    square = jnp.sum(x * x, axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _reflect(q: Array, v: Array):
    """(I - 2 v v^T / |v|^2) q; the identity at v = 0."""
    square = jnp.sum(v * v)
    return q - (2 / jnp.where(square > 0, square, 1)) * v[:, None] * jnp.matmul(
        v, q, precision=_FULL
    )[None], None


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=_FULL)


def _log_det(h: Array, r: Array, s: Array) -> Array:
    return zero_log_det(h) + jnp.sum(
        jnp.log1p((1 - h * h) * (jnp.diag(r) * jnp.diag(s))[None]), axis=-1
    )
