"""Estimators of log |det(I + J)| [b], J = dg/dx, for residual maps x + g(x).

All eigenvalues of J lie inside the unit circle.

Each is a function (g, args, x, key) -> [b], where g(args, x [b, *event]) acts on each row alone and
closes over nothing that is differentiated. The series log det(I + J) = sum_k (-1)^(k+1)/k tr J^k
takes one vector-Jacobian product a term and one probe, tr J^k = E v^T J^k v (Hutchinson; v of
random signs, drawn for every row).

The series have a gradient of their own, in memory that does not grow with the terms:

    d log det(I + J) = E w^T dJ v,   w = sum_k (-1)^k (J^T)^k v,

where w is summed from the same products as the value, which stays an estimate of the log-det
whatever is trained (the scalar w^T J v, whose gradient this is, is not one). Forward mode takes it,
too. Of the second derivatives `russian_roulette` has those that JAX takes forward over reverse,
jax.hessian; a gradient of a gradient (score matching) takes `exact`, which is what a flow uses with
key=None, or `neumann`.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.arrays import expand_to, float_dtype, sum_event
from jflow._core.checks import check_whole, need_key
from jflow.types import Array, Key, PyTree

__all__ = ["LogDet", "exact", "neumann", "russian_roulette"]

LogDet = Callable[[Callable[[PyTree, Array], Array], PyTree, Array, Key | None], Array]
_CAP = 1000  # terms; roulette gets there with probability p (1-p)^1000


def exact(
    g: Callable[[PyTree, Array], Array],
    args: PyTree,
    x: Float[Array, "b *event"],
    key: Key | None = None,
) -> Float[Array, " b"]:
    """Compute log |det(I + J)| from the Jacobian itself: d products and O(d^3) a row.

    It needs no key, and is differentiable in any mode.

    Args:
        g: the function (args, x [b, *event]) -> [b, *event], which acts on each row alone.
        args: what g depends on, a pytree; it is differentiated.
        x: where the Jacobian is taken, [b, *event].
        key: not used; the other estimators need one.

    Returns:
        The log-dets [b], in nats.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> g = lambda args, x: args * x  # J = I
        >>> round(float(bijectors.log_dets.exact(g, 1.0, jnp.ones((1, 2)))[0]), 3)  # 2 log 2
        1.386
    """
    size = math.prod(x.shape[1:])
    basis = jnp.eye(size, dtype=x.dtype).reshape(-1, 1, *x.shape[1:])
    _, push = jax.linearize(lambda x: g(args, x), x)
    columns = jax.vmap(lambda v: push(jnp.zeros_like(x) + v))(basis)  # [input, b, *output]
    jacobian = columns.reshape(size, x.shape[0], size).transpose(1, 2, 0)
    return jnp.linalg.slogdet(jnp.eye(size, dtype=x.dtype)[None] + jacobian)[1]


def neumann(terms: int) -> LogDet:
    """Estimate the log-det by the first `terms` terms of its series, with one random probe.

    It is biased by at most d c^(terms+1) / ((terms+1) (1-c)) for a Lipschitz constant c. Each term
    is one vector-Jacobian product.

    Also known as: Neumann series, power series log-determinant, i-ResNet log-det.

    Args:
        terms: the number of terms.

    Returns:
        LogDet: the estimator (g, args, x, key) -> [b], in nats; it needs a key.

    Raises:
        ValueError: terms is below 1, or the estimator gets no key.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> g = lambda args, x: args * x  # J = I / 2
        >>> log_det = bijectors.log_dets.neumann(2)(g, 0.5, jnp.ones((1, 2)), jax.random.key(0))
        >>> log_det.tolist()  # 2 (1/2 - 1/8)
        [0.75]

    References:
        Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, *Invertible Residual Networks*, 2019,
            arXiv:1811.00995.
    """
    check_whole("neumann", terms=terms)
    return partial(_with_key, "neumann", (terms, 0.0, False))


def russian_roulette(exact_terms: int = 2, p: float = 0.5, *, per_row: bool = False) -> LogDet:
    """Estimate the log-det without bias, by a series that is cut off at random.

    The first `exact_terms` + 1 terms are always there; after the last of them, and after each
    further one, the series stops with probability p, and later terms weigh 1 / P(reached). These
    are exact_terms + 1/p terms on average, 4 by default, and one vector-Jacobian product each. The
    variance is finite when |J|^2 < 1 - p: a flow whose layers come close to their bound wants a
    smaller p.

    Also known as: unbiased log-determinant, roulette estimator, residual flow log-det.

    Args:
        exact_terms: how many terms there are before those whose number is drawn, which is at least
            1.
        p: the probability of a stop after each term, in (0, 1).
        per_row: whether each row has a draw of its own, so that the errors of rows are independent
            and the work is that of the longest row. Else the draw is shared by the rows of a batch,
            as in the paper.

    Returns:
        LogDet: the estimator (g, args, x, key) -> [b], in nats; it needs a key.

    Raises:
        ValueError: exact_terms is negative, p is not in (0, 1), or the estimator gets no key.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> log_det = bijectors.log_dets.russian_roulette(exact_terms=4)
        >>> g = lambda args, x: args * x
        >>> log_det(g, 0.0, jnp.ones((1, 2)), jax.random.key(0)).tolist()  # J = 0
        [0.0]

    References:
        Chen, Behrmann, Duvenaud, Jacobsen, *Residual Flows for Invertible Generative Modeling*,
            2019, arXiv:1906.02735.
    """
    if exact_terms < 0:
        raise ValueError(f"russian_roulette: expected exact_terms >= 0, got {exact_terms}")
    if not 0 < p < 1:
        raise ValueError(f"russian_roulette: expected p in (0, 1), got {p}")
    return partial(_with_key, "russian_roulette", (exact_terms + 1, 1 - p, per_row))


def _with_key(name, terms, g, args, x, key=None):
    need_key(name, key)
    return _series(g, terms, args, x, key)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _series(g, terms, args, x, key):
    return _sums(g, terms, args, x, key)[0]


def _sums(g, terms, args, x, key):
    """(value [b], v, w): the series for the log-det, the probe, and the series for its gradient."""
    sure, keep, per_row = terms
    key_probe, key_stop = jax.random.split(key)
    dtype = float_dtype(x)
    # Added to zeros made from x, it varies over a mesh axis as x does, whatever the key does.
    v = jnp.zeros_like(x, dtype=dtype) + jax.random.rademacher(key_probe, x.shape, dtype)
    _, pullback = jax.vjp(lambda x: g(args, x).astype(dtype), x)

    def going(carry):
        return (carry[0] <= _CAP) & jnp.any(carry[1])

    def term(carry):
        k, alive, u, w, value = carry
        weight = (
            jnp.where(alive, keep ** -jnp.maximum(k - sure, 0).astype(dtype), 0)
            if keep
            else alive.astype(dtype)
        )
        sign = 1 - 2 * ((k + 1) % 2).astype(dtype)  # (-1)^(k+1)
        w = w + sign * expand_to(weight, u) * u
        u = pullback(u.astype(dtype))[0].astype(dtype)
        value = value + sign / k.astype(dtype) * weight * sum_event(v * u)
        more = jax.random.bernoulli(jax.random.fold_in(key_stop, k), keep, alive.shape)
        return k + 1, alive & ((k < sure) | more), u, w, value

    alive = jnp.ones_like(x, shape=(x.shape[0] if per_row else 1,), dtype=bool)
    value = jnp.zeros_like(x, shape=x.shape[:1], dtype=dtype)
    carry = (jnp.asarray(1), alive, v, jnp.zeros_like(v), value)
    if keep:
        carry = jax.lax.while_loop(going, term, carry)
    else:
        carry = jax.lax.fori_loop(0, sure, lambda _, carry: term(carry), carry)
    _, _, _, w, value = carry
    return value, v, w


@_series.defjvp
def _series_jvp(g, terms, primals, tangents):
    args, x, key = primals
    value, v, w = _sums(g, terms, args, x, key)

    @partial(
        jax.checkpoint, prevent_cse=False
    )  # nothing is kept of g for the way back but its arguments
    def surrogate(args, x):
        return sum_event(w * jax.jvp(lambda x: g(args, x), (x,), (v.astype(x.dtype),))[1])

    return value, jax.jvp(surrogate, (args, x), tangents[:2])[1].astype(value.dtype)
