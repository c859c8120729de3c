"""Divergences of a velocity: exact, Hutchinson's and Hutch++, by forward derivatives.

Each is a `Divergence`, which `solvers.log_prob`, `solvers.sample_with_log_det` and `flows.cnf` take. With J = df/dx
[D, D] at one row, all give the trace of J and, from the same derivatives, its squared Frobenius norm.

| | derivatives an evaluation | div f | exact where |
|---|---|---|---|
| exact_divergence() | D | sum over unit vectors of e.Je | always |
| hutchinson(K) | K | mean over K probes of e.Je | J is diagonal, with Rademacher probes |
| hutch_plus_plus(S, R) | 2 S + R | sum over q of q.Jq + mean over R probes of e'.Je', e' = e - QQ'e | rank of J <= S |
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jflow._core.arrays import flat_rows
from jflow._core.checks import check_whole, need_key
from jflow._core.jacobian import columns_of, dot, over_unit_vectors
from jflow.types import Array, Key

__all__ = ["Divergence", "check_divergence", "exact_divergence", "hutch_plus_plus", "hutchinson"]


class Divergence(NamedTuple):
    """draw(key, x) -> probes: arrays that lead with b, or None; drawn once and frozen for a whole solve.

    apply(f, x, probes) -> (f(x), div f [b], squared Frobenius norm of df/dx [b]) for f [b, *event] -> [b, *event] whose
    rows don't interact."""

    draw: Callable[[Key | None, Array], Any]
    apply: Callable[[Callable, Array, Any], tuple[Array, Array, Array]]


def check_divergence(name: str, divergence: Divergence) -> None:
    """Raise a TypeError, in the name of the function that was given it, unless `divergence` is a `Divergence`."""
    if not isinstance(divergence, Divergence):
        raise TypeError(
            f"{name}: expected divergence to be a solvers.Divergence, such as solvers.hutchinson(1), got {divergence!r}"
        )


def exact_divergence() -> Divergence:
    """The trace of the Jacobian, from its D columns, a few at a time in memory; needs no key."""
    return Divergence(_nothing, _exact)


def hutchinson(probes: int = 1, *, noise: Callable = jax.random.rademacher) -> Divergence:
    """The mean of e.Je over `probes` a row, unbiased for probes of mean zero and unit covariance.

    noise: (key, shape, dtype) -> probes, jax.random.rademacher or jax.random.normal; the norm is the mean of |Je|^2.
    Sources: Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989; Grathwohl et al., "FFJORD:
    Free-form Continuous Dynamics for Scalable Reversible Generative Models", 2019.
    """
    check_whole("hutchinson", probes=probes)

    def draw(key, x):
        need_key("hutchinson", key)
        return noise(key, (x.shape[0], probes, *x.shape[1:]), x.dtype)

    return Divergence(draw, _hutchinson)


def hutch_plus_plus(
    sketch: int = 1, probes: int | None = None, *, noise: Callable = jax.random.rademacher
) -> Divergence:
    """The trace of J on the span Q of `sketch` products J s, exactly, and Hutchinson's estimate, by `probes` (None: as
    many as the sketch), on what is orthogonal to it.

    Where J has quickly falling singular values, the variance is far below that of `hutchinson(2 sketch + probes)`,
    which costs the same. s and probes are frozen for the solve, Q follows x. Q is not differentiated: for any Q the
    estimate is unbiased, so its gradient is as well, and it stays finite where the sketch loses rank.
    Errors: ValueError for counts below 1, and where traced for a sketch larger than the event.
    Source: Meyer, Musco, Musco, Woodruff, "Hutch++: Optimal Stochastic Trace Estimation", 2021.
    """
    probes = sketch if probes is None else probes
    check_whole("hutch_plus_plus", sketch=sketch)
    check_whole("hutch_plus_plus", probes=probes)

    def draw(key, x):
        need_key("hutch_plus_plus", key)
        size = math.prod(x.shape[1:])
        if sketch > size:
            raise ValueError(
                f"hutch_plus_plus: expected a sketch of at most the event's {size} numbers, got {sketch}"
            )
        e = noise(key, (x.shape[0], sketch + probes, *x.shape[1:]), x.dtype)
        return e[:, :sketch], e[:, sketch:]

    return Divergence(draw, _hutch_plus_plus)


def _nothing(key, x):
    return None


# One function for every divergence of its kind: diffrax compiles once for each that it meets.


def _exact(f, x, probes):
    v, sums = over_unit_vectors(
        f, x, lambda v, e, columns: (dot(e, columns), dot(columns, columns))
    )
    return v, *sums


def _hutchinson(f, x, probes):
    e = jnp.moveaxis(probes, 1, 0)
    v, columns = columns_of(f, x, e)
    return v, jnp.mean(dot(e, columns), axis=0), jnp.mean(dot(columns, columns), axis=0)


def _hutch_plus_plus(f, x, probes):
    s, e = (jnp.moveaxis(p, 1, 0) for p in probes)
    rank = s.shape[0]
    _, range_ = columns_of(f, x, s)
    flat = jnp.moveaxis(jax.vmap(flat_rows)(range_), 0, 2)
    q = jnp.moveaxis(
        jax.lax.stop_gradient(jnp.linalg.qr(flat).Q), 2, 0
    )  # [rank, b, D], orthonormal for any sketch
    rest = e.reshape(e.shape[0], *q.shape[1:])
    for _ in range(2):  # once more takes out what rounding left
        inside = jnp.einsum("kbd,mbd->kmb", q, rest, precision=jax.lax.Precision.HIGHEST)
        rest = rest - jnp.einsum("kmb,kbd->mbd", inside, q, precision=jax.lax.Precision.HIGHEST)
    e = jnp.concatenate([q, rest]).reshape(rank + e.shape[0], *x.shape)
    v, columns = columns_of(f, x, e)
    trace, norm = dot(e, columns), dot(columns, columns)
    both = [jnp.sum(term[:rank], axis=0) + jnp.mean(term[rank:], axis=0) for term in (trace, norm)]
    return v, *both
