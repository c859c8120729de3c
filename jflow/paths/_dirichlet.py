"""Dirichlet flow matching: a flow of probabilities from the uniform Dirichlet law to the corners.

A token that is class i of K has, at time t of jflow,

    x_t ~ Dir(1 + c e_i),      c = end t,      t = 0: uniform on the simplex

so that the paper's time is c = end t, and its dx/dc is multiplied by `end` here. Given the token,
points move straight towards the corner e_i at the speed C(x_i, c) that the density of x_i demands;
a classifier of the token at (x_t, t) makes the marginal velocity of it.

References:
    Stark, Jing, Wang, Corso, Berger, Barzilay, Jaakkola, *Dirichlet Flow Matching with Applications
        to DNA Sequence Design*, 2024, arXiv:2402.05841.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import need_key, rows
from jflow._core.keys import same_draws
from jflow._core.simplex import project_simplex
from jflow._core.tokens import check_logits, check_probabilities
from jflow.types import Array, Cond, Field, Key, Path, Velocity

__all__ = [
    "betainc",
    "dirichlet",
    "dirichlet_source",
    "dirichlet_speed",
    "dirichlet_velocity",
]


def betainc(a: ArrayLike, b: ArrayLike, x: ArrayLike) -> Array:
    """The regularized incomplete beta function, with derivatives in all of its arguments.

    Also known as: the distribution function of the beta law.

        I_x(a, b) = int_0^x s^(a-1) (1 - s)^(b-1) ds / B(a, b)

    That of `jax.scipy.special` has none in a and b. Here they are by quadrature of terms of one
    sign, so that nothing cancels; with f the density and I = I_x(a, b)

        -dI/da = I int_x^1 log(s / x) f(s) ds + (1 - I) int_0^x log(x / s) f(s) ds

    and dI_x(a, b)/db is -dI/da at (b, a, 1 - x). They are finite at x = 0 and 1.

    Args:
        a: above 0, of any shape that broadcasts.
        b: above 0, of any shape that broadcasts.
        x: in [0, 1], of any shape that broadcasts.

    Returns:
        I_x(a, b) in [0, 1], in the broadcast shape.

    Examples:
        >>> import jax
        >>> from jflow import paths
        >>> round(float(jax.grad(paths.betainc)(2.0, 1.0, 0.5)), 4)  # x^2 log x
        -0.1733

    References:
        Takahasi, Mori, *Double Exponential Formulas for Numerical Integration*, 1974. The form of
            the derivative is ours.
    """
    return _betainc(*_broadcast(a, b, x))


@jax.custom_jvp
def _betainc(a, b, x):
    return jax.scipy.special.betainc(a, b, x)


def _broadcast(*values):
    values = [jnp.asarray(value) for value in values]
    dtype = float_dtype(*values)
    shape = jnp.broadcast_shapes(*(value.shape for value in values))
    return [jnp.broadcast_to(value.astype(dtype), shape) for value in values]


@_betainc.defjvp
def _betainc_jvp(primals, tangents):
    a, b, x = primals
    da, db, dx = tangents
    ratio, log_beta = _log_ratio(a, b, x, 1 - x)
    mirrored, _ = _log_ratio(b, a, 1 - x, x)
    density = jnp.exp(
        jax.scipy.special.xlogy(a - 1, x) + jax.scipy.special.xlog1py(b - 1, -x) - log_beta
    )
    mass = jnp.exp(jax.scipy.special.xlogy(a, x) + jax.scipy.special.xlog1py(b, -x) - log_beta)
    return _betainc(a, b, x), mass * (mirrored * db - ratio * da) + density * dx


def _log_ratio(a, b, x, rest, reach=5.25, step=1 / 32):
    """-dI_x(a, b)/da over x^a (1 - x)^b / B(a, b), with rest = 1 - x; and log B(a, b).

    With A, L the integrals of v^(a-1) (1 - x v)^(b-1) and of that times log(1 / v), and D, U those
    of (x + rest v)^(a-1) (1 - v)^(b-1) and of that times log(1 + rest v / x), over v in [0, 1], it
    is (A U + D L) / (x^a A + rest^b D). A double exponential rule takes them, whose steps in log v
    are three to five times `step`: 1/32 is enough where a and b are not both in the hundreds.
    `reach` 3.5 is enough for a and b of at least 1.
    """
    tiny = jnp.finfo(x.dtype).tiny
    x, rest = jnp.maximum(x, tiny), jnp.maximum(rest, tiny)
    log_v, log_w, log_weight = (
        jnp.asarray(node, x.dtype).reshape((1,) * x.ndim + (-1,)) for node in _nodes(reach, step)
    )
    wide = (slice(None),) * x.ndim + (None,)
    a_, b_, x_, rest_ = a[wide], b[wide], x[wide], rest[wide]
    v, w = jnp.exp(log_v), jnp.exp(log_w)
    below = (a_ - 1) * log_v + (b_ - 1) * jnp.log(w + v * rest_) + log_weight
    grown = jnp.log1p(v * rest_ / x_)  # log(s / x) for s = x + rest v
    above = (a_ - 1) * (grown + jnp.log(x_)) + (b_ - 1) * log_w + log_weight
    top_below, top_above = (jnp.max(term, axis=-1) for term in (below, above))
    below, above = jnp.exp(below - top_below[wide]), jnp.exp(above - top_above[wide])
    mass, upper = jnp.sum(below, axis=-1), jnp.sum(above, axis=-1)
    lower_log, upper_log = jnp.sum(-log_v * below, axis=-1), jnp.sum(grown * above, axis=-1)
    total = jnp.exp(a * jnp.log(x) - top_above) * mass
    total = total + jnp.exp(b * jnp.log(rest) - top_below) * upper
    log_beta = jnp.log(total) + top_below + top_above
    return (mass * upper_log + upper * lower_log) / total, log_beta


def _nodes(reach, step):
    """log v, log(1 - v) and the log of the weights of the rule on [0, 1]."""
    at = np.arange(-reach, reach + step / 2, step)
    bent = np.pi * np.sinh(at)
    log_v, log_w = -np.logaddexp(0, -bent), -np.logaddexp(0, bent)
    return log_v, log_w, np.log(step * np.pi * np.cosh(at)) + log_v + log_w


def dirichlet_speed(
    x: Float[Array, "*shape"], concentration: ArrayLike, num_classes: int
) -> Float[Array, "*shape"]:
    """How fast a point of the Dirichlet path moves towards its corner, by its share of that corner.

        u = C(x_i, c) (e_i - x),      x ~ Dir(1 + c e_i)
        C(b, c) = -dI_b(1 + c, K - 1)/dc B(1 + c, K - 1) / ((1 - b)^(K-1) b^c)

    u is a velocity in c, and satisfies the continuity equation of the Dirichlet density. It is
    finite at both ends, with C(0, c) = 0.

    Args:
        x: the share of the corner, in [0, 1], [*shape].
        concentration: c >= 0, of any shape that broadcasts to that of x.
        num_classes: the number K of classes, at least 2.

    Returns:
        C, [*shape], not negative.

    Raises:
        ValueError: num_classes is below 2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> share = jnp.array([0.0, 0.5, 1.0])
        >>> paths.dirichlet_speed(share, 0.0, 2).round(3)  # -b log(b) / (1 - b)
        Array([0.   , 0.693, 1.   ], dtype=float32)

    References:
        Stark, Jing, Wang, Corso, Berger, Barzilay, Jaakkola, *Dirichlet Flow Matching with
            Applications to DNA Sequence Design*, 2024, arXiv:2402.05841.
    """
    if num_classes < 2:
        raise ValueError(f"dirichlet_speed: expected num_classes of at least 2, got {num_classes}")
    x = jnp.asarray(x)
    dtype = float_dtype(x)
    wide = jnp.broadcast_to(jnp.asarray(concentration, dtype), x.shape)
    share = jnp.clip(x.astype(dtype), 0, 1)
    count = jnp.full_like(share, num_classes - 1)
    step = 1 / 16 if dtype == jnp.float32 and num_classes <= 64 else 1 / 32
    ratio, _ = _log_ratio(1 + wide, count, share, 1 - share, 3.5, step)
    return (share * ratio).astype(x.dtype)


def dirichlet_source(
    key: Key, x1: Float[Array, "b *event"], cond: Cond = None
) -> tuple[Float[Array, "b *event"], Cond]:
    """Points that are uniform on the simplex, the source of `dirichlet`, for any data.

    It is a source of `couplings.with_source`, and of `losses.token_cross_entropy`.

    Args:
        key: what to draw with.
        x1: probabilities or one-hot tokens [b, *sites, K], of which the shape and the type are
            read.
        cond: the condition, which is passed on.

    Returns:
        (x0 like x1, cond), with x0 ~ Dir(1, ..., 1) at every site.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> x0, _ = paths.dirichlet_source(jax.random.key(0), jnp.zeros((2, 5, 4)))
        >>> x0.shape, bool(jnp.allclose(jnp.sum(x0, -1), 1))
        ((2, 5, 4), True)
    """
    return jax.nn.softmax(jnp.log(jax.random.exponential(key, x1.shape, x1.dtype)), axis=-1), cond


def dirichlet(end: float = 8.0) -> Path:
    """The path of Dirichlet flow matching, x_t ~ Dir(1 + end t x1) for a one-hot x1.

        point   (1 - w) x0 + w x1,      w ~ Beta(end t, K)
        target  end C(<x1, x_t>, end t) (x1 - x_t)

    x0 has to be uniform on the simplex (`dirichlet_source`); then the law of x_t is the Dirichlet
    one exactly, because gamma variables add. At t=0 x_t is x0, at t=1 it is Dir(1 + end x1), nearly
    the corner: the token is the largest number, or that of a classifier there. The paper's time is
    end t; its law of training times, an exponential of scale 1 cut at 8, is the `Time` (key, n) ->
    min(exponential(key, (n,)) / end, 1).

    Args:
        end: the concentration at t=1, above 0; the paper samples up to 7.

    Returns:
        Path: point and target, (x0 [b, *sites, K], x1 [b, *sites, K], t [b], *, key). They need a
            key. They raise a ValueError where x0 or x1 is known and is no probability.

    Raises:
        ValueError: end is not finite and above 0.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> path, x0, x1 = paths.dirichlet(), jnp.full((1, 2), 0.5), jnp.array([[1.0, 0.0]])
        >>> path.point(x0, x1, jnp.zeros(1), key=jax.random.key(0)).tolist()
        [[0.5, 0.5]]

    References:
        Stark, Jing, Wang, Corso, Berger, Barzilay, Jaakkola, *Dirichlet Flow Matching with
            Applications to DNA Sequence Design*, 2024, arXiv:2402.05841. The mixture of x0 and x1
            is ours.
    """
    end = _check_end("dirichlet", end)

    def point(x0, x1, t, *, key=None):
        need_key("dirichlet", key)
        for p in (x0, x1):
            check_probabilities("dirichlet", p)
        first, second = jax.random.split(key)
        shape, dtype = x1.shape[:-1], float_dtype(x1)
        c = jnp.broadcast_to(expand_to((end * t).astype(dtype), x1)[..., 0], shape)
        new = jax.random.loggamma(first, jnp.maximum(c, 1e-12), dtype=dtype)
        old = jax.random.loggamma(second, float(x1.shape[-1]), shape, dtype)
        w = jax.nn.sigmoid(new - old)[..., None].astype(x1.dtype)
        return x0 + w * (x1 - x0)

    def target(x0, x1, t, *, key=None):
        x = point(x0, x1, t, key=same_draws(key))
        share = jnp.sum(x1 * x, axis=-1)
        speed = dirichlet_speed(share, expand_to(end * t, share), x1.shape[-1])
        return end * speed[..., None] * (x1 - x)

    return Path(point, target)


def dirichlet_velocity(field: Field, end: float = 8.0) -> Velocity:
    """The velocity of Dirichlet flow matching, from a classifier of the token.

        v(x, t) = end sum_i p_i C(x_i, end t) (e_i - x),      p = softmax(logits(x, t))

    With the exact posterior p it is the velocity of the law of x_t. Every p on the simplex gives a
    velocity whose small steps stay on it; x is projected onto the simplex (`project_simplex`)
    before anything is computed, so that rounding does not add up. `guidance.cfg` of the field, in
    logits, or `guidance.simplex_cfg` come before it, and leave p on the simplex.

    Args:
        field: the classifier, (params, x [b, *sites, K], t [b], cond) -> logits [b, *sites, K], as
            `losses.token_cross_entropy` trains it.
        end: the concentration at t=1, that of the path.

    Returns:
        Velocity: on x [b, *sites, K], with the params and the init of `field`. It raises a
            ValueError for logits of another shape.

    Raises:
        ValueError: end is not finite and above 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> from jflow.types import Field
        >>> field = Field(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> velocity = paths.dirichlet_velocity(field)
        >>> x = jnp.full((1, 3), 1 / 3)  # all classes are alike
        >>> bool(jnp.max(jnp.abs(velocity.apply({}, x, jnp.full(1, 0.5)))) < 1e-6)
        True

    References:
        Stark, Jing, Wang, Corso, Berger, Barzilay, Jaakkola, *Dirichlet Flow Matching with
            Applications to DNA Sequence Design*, 2024, arXiv:2402.05841.
    """
    end = _check_end("dirichlet_velocity", end)

    def apply(params, x, t, cond=None, *, key=None):
        t = rows(t, x.shape[0])
        x = project_simplex(x)
        logits = field.apply(params, x, t, cond, key=key)
        logits = check_logits("dirichlet_velocity", logits, x.shape[:-1], x.shape[-1])
        p = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
        c = expand_to((end * t).astype(x.dtype), x)
        pull = end * p * dirichlet_speed(x, c, x.shape[-1])
        return pull - jnp.sum(pull, axis=-1, keepdims=True) * x

    return Velocity(field.init, apply)


def _check_end(name, end) -> float:
    if not 0 < end < math.inf:
        raise ValueError(f"{name}: expected a finite end > 0, got {end}")
    return float(end)
