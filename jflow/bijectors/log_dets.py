"""Estimators of log |det(I + J)| [b] for x + g(x), J = dg/dx with all eigenvalues inside the unit circle.

Each is a function (g, args, x, key) -> [b], where g(args, x [b, *event]) acts on each row alone and closes over nothing
that is differentiated. The series log det(I + J) = sum_k (-1)^(k+1)/k tr J^k takes one vector-Jacobian product a term
and one probe, tr J^k = E v^T J^k v (Hutchinson; v of random signs, drawn for every row).

The series have a gradient of their own, in memory that does not grow with the terms:

    d log det(I + J) = E w^T dJ v,   w = sum_k (-1)^k (J^T)^k v,

where w is summed from the same products as the value, which stays an estimate of the log-det whatever is trained (the
scalar w^T J v, whose gradient this is, is not one). Forward mode takes it, too. Of the second derivatives `russian_roulette`
has those that JAX takes forward over reverse, jax.hessian; a gradient of a gradient (score matching) takes `exact`, which
is what a flow uses with key=None, or `neumann`. Chen, Behrmann, Duvenaud, Jacobsen, *Residual
Flows for Invertible Generative Modeling* (2019); Behrmann et al., *Invertible Residual Networks* (2019).
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, float_dtype, sum_event
from jflow._core.checks import check_whole, need_key
from jflow.types import Array, Key, PyTree

__all__ = ["LogDet", "exact", "neumann", "russian_roulette"]

LogDet = Callable[[Callable[[PyTree, Array], Array], PyTree, Array, Key | None], Array]
_CAP = 1000  # terms; roulette gets there with probability p (1-p)^1000


def exact(g, args: PyTree, x: Array, key: Key | None = None) -> Array:
    """log det of the Jacobian itself: d products and O(d^3) a row. Needs no key; differentiable in any mode."""
    size = math.prod(x.shape[1:])
    basis = jnp.eye(size, dtype=x.dtype).reshape(-1, 1, *x.shape[1:])
    _, push = jax.linearize(lambda x: g(args, x), x)
    columns = jax.vmap(lambda v: push(jnp.zeros_like(x) + v))(basis)  # [input, b, *output]
    jacobian = columns.reshape(size, x.shape[0], size).transpose(1, 2, 0)
    return jnp.linalg.slogdet(jnp.eye(size, dtype=x.dtype)[None] + jacobian)[1]


def neumann(terms: int) -> LogDet:
    """The first `terms` terms: biased by at most d c^(terms+1) / ((terms+1) (1-c)) for a Lipschitz constant c."""
    check_whole("neumann", terms=terms)
    return partial(_with_key, "neumann", (terms, 0.0, False))


def russian_roulette(exact_terms: int = 2, p: float = 0.5, *, per_row: bool = False) -> LogDet:
    """Unbiased: `exact_terms` + 1 terms, and after each a stop with probability p; later terms weigh 1 / P(reached).

    exact_terms + 1/p terms on average, 4 by default. The draw is shared by the rows of a batch (as in Chen et al.); with
    per_row=True each row has its own, so that the errors of rows are independent and the work is that of the longest
    row. The variance is finite when |J|^2 < 1 - p: a flow whose layers come close to their bound wants a smaller p.
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
