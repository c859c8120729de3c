"""Divergences of a velocity: exact, Hutchinson's and Hutch++, by forward derivatives.

Each is a `Divergence`, which `solvers.log_prob`, `solvers.sample_with_log_det` and `flows.cnf`
take. With J = df/dx [D, D] at one row, all give the trace of J and, from the same derivatives, its
squared Frobenius norm.

| divergence | derivatives | div f | exact where |
|---|---|---|---|
| exact_divergence() | D | sum over unit vectors of e.Je | always |
| hutchinson(K) | K | mean over K probes of e.Je | J is diagonal |
| hutch_plus_plus(S, R) | 2 S + R | sum of q.Jq + mean over R probes of e'.Je' | rank of J <= S |

The derivatives are those of one evaluation. The second one is exact with Rademacher probes. q are
the columns of an orthonormal Q, and e' = e - QQ'e.
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
    """How the divergence of a velocity is computed or estimated along a solve.

    Attributes:
        draw: `draw(key, x) -> probes`, arrays that lead with b, or None; they are drawn once and
            frozen for a whole solve.
        apply: `apply(f, x, probes) -> (f(x), div f [b], squared Frobenius norm of df/dx [b])` for f
            [b, *event] -> [b, *event] whose rows do not interact.
    """

    draw: Callable[[Key | None, Array], Any]
    apply: Callable[[Callable, Array, Any], tuple[Array, Array, Array]]


def check_divergence(name: str, divergence: Divergence) -> None:
    """Raise a TypeError unless a value is a `Divergence`.

    Args:
        name: of the function that it was given to, for the message.
        divergence: the value.

    Raises:
        TypeError: divergence is something else.
    """
    if not isinstance(divergence, Divergence):
        raise TypeError(
            f"{name}: expected divergence to be a solvers.Divergence, such as "
            f"solvers.hutchinson(1), got {divergence!r}"
        )


def exact_divergence() -> Divergence:
    """The exact trace of the Jacobian, from its D columns, a few at a time in memory.

    It costs D forward derivatives an evaluation and needs no key.

    Returns:
        Divergence: for `log_prob`, `sample_with_log_det` and `flows.cnf`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import solvers
        >>> divergence = solvers.exact_divergence()
        >>> x = jnp.array([[1.0, 2.0]])
        >>> value, div, norm = divergence.apply(lambda x: x**2, x, divergence.draw(None, x))
        >>> div.tolist(), norm.tolist()  # the Jacobian is diag(2, 4)
        ([6.0], [20.0])
    """
    return Divergence(_nothing, _exact)


def hutchinson(probes: int = 1, *, noise: Callable = jax.random.rademacher) -> Divergence:
    """Hutchinson's unbiased estimate of the divergence.

    Also known as: Hutchinson trace estimator, stochastic divergence.

        mean over probes of e.Je,      e of mean 0 and unit covariance

    The squared Frobenius norm is the mean of |Je|^2. It costs one forward derivative a probe.

    Args:
        probes: how many a row.
        noise: (key, shape, dtype) -> probes, jax.random.rademacher (the default) or
            jax.random.normal.

    Returns:
        Divergence: for `log_prob`, `sample_with_log_det` and `flows.cnf`; it needs a key.

    Raises:
        ValueError: probes is not a whole number of at least 1.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import solvers
        >>> divergence = solvers.hutchinson(1)
        >>> x = jnp.array([[1.0, 2.0]])
        >>> probes = divergence.draw(jax.random.key(0), x)
        >>> divergence.apply(lambda x: x**2, x, probes)[1].tolist()  # a diagonal Jacobian: exact
        [6.0]

    References:
        Hutchinson, *A stochastic estimator of the trace of the influence matrix*, 1989.
        Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, *FFJORD: Free-form Continuous Dynamics
            for Scalable Reversible Generative Models*, 2019, arXiv:1810.01367.
    """
    check_whole("hutchinson", probes=probes)

    def draw(key, x):
        need_key("hutchinson", key)
        return noise(key, (x.shape[0], probes, *x.shape[1:]), x.dtype)

    return Divergence(draw, _hutchinson)


def hutch_plus_plus(
    sketch: int = 1, probes: int | None = None, *, noise: Callable = jax.random.rademacher
) -> Divergence:
    """Hutch++: the divergence exact on a sketch of the Jacobian's range, estimated on the rest.

    The trace of J is exact on the span Q of `sketch` products J s, and Hutchinson's estimate is
    taken on what is orthogonal to it. Where J has quickly falling singular values, the variance is
    far below that of `hutchinson(2 sketch + probes)`, which costs the same. s and probes are frozen
    for the solve, Q follows x. Q is not differentiated: for any Q the estimate is unbiased, so its
    gradient is as well, and it stays finite where the sketch loses rank.

    Args:
        sketch: the number of products in the sketch.
        probes: the number of probes of the estimate; None: as many as the sketch.
        noise: (key, shape, dtype) -> probes, jax.random.rademacher (the default) or
            jax.random.normal.

    Returns:
        Divergence: for `log_prob`, `sample_with_log_det` and `flows.cnf`; it needs a key. Its draw
            raises a ValueError for a sketch larger than the event.

    Raises:
        ValueError: sketch or probes is not a whole number of at least 1.

    References:
        Meyer, Musco, Musco, Woodruff, *Hutch++: Optimal Stochastic Trace Estimation*, 2021,
            arXiv:2010.09649.
    """
    probes = sketch if probes is None else probes
    check_whole("hutch_plus_plus", sketch=sketch)
    check_whole("hutch_plus_plus", probes=probes)

    def draw(key, x):
        need_key("hutch_plus_plus", key)
        size = math.prod(x.shape[1:])
        if sketch > size:
            raise ValueError(
                f"hutch_plus_plus: expected a sketch of at most the event's {size} "
                f"numbers, got {sketch}"
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
