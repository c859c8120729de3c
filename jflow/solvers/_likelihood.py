"""Log-densities along the ODE of a velocity (the instantaneous change of variables)."""

from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp

from jflow._core.arrays import filled, float_dtype, sum_event, zero_log_det
from jflow._core.checks import check_cond, check_noun, check_rows, count_rows, like_state
from jflow.solvers._divergence import Divergence, check_divergence, exact_divergence
from jflow.solvers._integrate import SolveInfo, all_finite, integrate
from jflow.solvers._method import Method, adaptive, as_method, reverse
from jflow.types import Array, Cond, Field, Key, Params, Velocity

__all__ = ["log_prob", "log_prob_with_energies", "sample_with_log_det"]

_DEFAULT = adaptive(diffrax.Tsit5(), rtol=1e-5, atol=1e-5)
_EXACT = exact_divergence()


def sample_with_log_det(
    velocity: Velocity,
    params: Params,
    x: Array,
    cond: Cond = None,
    *,
    key: Key | None = None,
    divergence: Divergence = _EXACT,
    method: Method | int | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
) -> tuple[Array, Array, SolveInfo]:
    """Carry x [b, *event] from t0 to t1; returns (x at t1, log_det [b] of that map in nats, info).

    log_det = int_{t0}^{t1} div v(x_t, t) dt, solved together with x and negative of it where t0=1, t1=0. divergence:
    `solvers.exact_divergence()`, or the unbiased estimates `solvers.hutchinson(probes)` and
    `solvers.hutch_plus_plus(sketch)`, whose probes are drawn from `key` for each row and frozen for the solve.

    method, t0, t1: as in `solvers.sample`, but the default is `solvers.adaptive(diffrax.Tsit5())`, rtol = atol = 1e-5.
    info.evaluations counts those of velocity and derivatives together. log_det is float32 or better; failed rows are NaN.
    Rows must not interact inside the velocity.
    Errors: ValueError for an estimate without key, and as in `solvers.sample`.
    Source: Chen et al., "Neural Ordinary Differential Equations", 2018.
    """
    name = "solvers.sample_with_log_det"
    how = as_method(name, method, _DEFAULT, t0=t0, t1=t1)
    y, (log_det,), info = _integrals(
        _with_log_det, 1, name, velocity, params, x, cond, key, divergence, how, t0, t1
    )
    return y, log_det, info


def log_prob(
    velocity: Velocity,
    params: Params,
    x1: Array,
    base_log_prob: Callable[[Array], Array],
    cond: Cond = None,
    *,
    key: Key | None = None,
    divergence: Divergence = _EXACT,
    method: Method | int | None = None,
    t1: float = 1.0,
) -> tuple[Array, SolveInfo]:
    """log p(x1) = log p0(x0) - int_0^t1 div v(x_t, t) dt on the path that ends in x1 [b, *event]: ([b] nats, info).

    base_log_prob: x0 [b, *event] -> [b] nats, the density at time 0; the result is that at t1. A grid is that of
    sampling, from 0 to the time of x1 (walked backwards). The rest, the errors and the sources are those of
    `sample_with_log_det`, from t1 to 0.
    """
    given = (velocity, params, x1, base_log_prob, cond, key, divergence, method, t1)
    value, _, info = _log_prob(_with_log_det, 1, "solvers.log_prob", *given)
    return value, info


def log_prob_with_energies(
    velocity: Velocity,
    params: Params,
    x1: Array,
    base_log_prob: Callable[[Array], Array],
    cond: Cond = None,
    *,
    key: Key | None = None,
    divergence: Divergence = _EXACT,
    method: Method | int | None = None,
    t1: float = 1.0,
) -> tuple[Array, Array, Array, SolveInfo]:
    """`log_prob` and two energies of the path that ends in x1, all of one solve: (log_prob, kinetic, jacobian, info), [b] each.

    kinetic = int_0^t1 |v(x_t, t)|^2 dt, jacobian = int_0^t1 |dv/dx (x_t, t)|_F^2 dt: sums over the event, both >= 0 up to the
    error of the solve. Under an estimate of the divergence the Frobenius norm is estimated from the same products.
    `losses.regularized_nll` penalizes them. Everything else is as in `log_prob`.
    """
    given = (velocity, params, x1, base_log_prob, cond, key, divergence, method, t1)
    value, (kinetic, jacobian), info = _log_prob(
        _with_energies, 3, "solvers.log_prob_with_energies", *given
    )
    return value, kinetic, jacobian, info


def _log_prob(
    field, count, name, velocity, params, x1, base_log_prob, cond, key, divergence, method, t1
):
    """(log_prob, the integrals from 0 to t1 beside the log-det, info)."""
    how = reverse(as_method(name, method, _DEFAULT, t1=t1, rising=True))
    given = (velocity, params, x1, cond, key, divergence, how, t1, 0.0)
    x0, (log_det, *sums), info = _integrals(field, count, name, *given)

    def density(x0):
        return check_rows(name, "base_log_prob", base_log_prob(x0), x0.shape[0])

    return (
        _density_at_end(density, x0, log_det),
        [-s for s in sums],
        info,
    )  # the solve runs backwards


def _density_at_end(base_log_prob, x0, log_det):
    """base_log_prob(x0) + log_det, NaN for the rows of a failed solve, whose NaN in x0 the density does not see: a mask
    behind it would not keep them out of the gradient of its params."""
    ok = all_finite(x0)
    return jnp.where(ok, base_log_prob(filled(ok, x0)) + log_det, jnp.nan)


def _integrals(field, count, name, velocity, params, x, cond, key, divergence, how, t0, t1):
    check_divergence(name, divergence)
    check_noun(name, velocity, Velocity, Field)
    cond = check_cond(name, cond, count_rows(name, x))
    state = jnp.asarray(x, float_dtype(x))
    field = jax.tree_util.Partial(field, velocity.apply, divergence.apply)
    start = (state, (zero_log_det(state),) * count)
    (y, sums), info = integrate(
        field, params, (cond, divergence.draw(key, state)), start, how, t0, t1
    )
    return y.astype(jnp.result_type(x)), sums, info


def _with_log_det(apply, divergence, params, rows, state, t):
    v, div, _ = _rates(apply, divergence, params, rows, state, t)
    return v, (div,)


def _with_energies(apply, divergence, params, rows, state, t):
    v, div, norm = _rates(apply, divergence, params, rows, state, t)
    return v, (div, sum_event(jnp.square(v)), norm)


def _rates(apply, divergence, params, rows, state, t):
    (cond, probes), (x, _) = rows, state
    return divergence(lambda x: like_state("velocity", apply(params, x, t, cond), x), x, probes)
