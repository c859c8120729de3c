"""Log-densities along the ODE of a velocity (the instantaneous change of variables)."""

from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Float

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
    x: Float[Array, "b *event"],
    cond: Cond = None,
    *,
    key: Key | None = None,
    divergence: Divergence = _EXACT,
    method: Method | int | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
) -> tuple[Float[Array, "b *event"], Float[Array, " b"], SolveInfo]:
    """Carry states along the ODE of a velocity, together with the log-determinant of that map.

        log_det = integral from t0 to t1 of div v(x_t, t) dt

    It is solved together with x, and is the negative for the way back, t0=1, t1=0. Rows must not
    interact inside the velocity.

    Args:
        velocity: the velocity v.
        params: its params.
        x: the states at t0, [b, *event].
        cond: the condition, [b, ...] or one row for all.
        key: a key for an estimate of the divergence, whose probes are drawn for each row and frozen
            for the solve.
        divergence: `solvers.exact_divergence()`, or the unbiased estimates
            `solvers.hutchinson(probes)` and `solvers.hutch_plus_plus(sketch)`.
        method: how to solve: a `Method` (`solvers.fixed`, `solvers.on_grid`, `solvers.adaptive`),
            or the number of steps; the default is `solvers.adaptive(diffrax.Tsit5())` with rtol =
            atol = 1e-5.
        t0: the time of x, in [0, 1].
        t1: the time to go to, in [0, 1].

    Returns:
        y: the states at t1, [b, *event], in the type of x.
        log_det: [b], in nats, float32 or better.
        info: evaluations [b], those of velocity and derivatives together, and status [b] (see
            `SolveInfo`); the rows of a failed solve are NaN.

    Raises:
        ValueError: an estimate has no key, t0 and t1 are equal or outside [0, 1] or given beside a
            grid, or the velocity has another shape than x.
        TypeError: method, velocity or divergence is something else.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from jflow import solvers
        >>> from jflow.types import Velocity
        >>> velocity = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: -x)
        >>> y, log_det, info = solvers.sample_with_log_det(velocity, {}, jnp.ones((1, 2)))
        >>> print(np.asarray(y).round(3), np.asarray(log_det).round(3))  # exp(-1), and -2
        [[0.368 0.368]] [-2.]

    References:
        Chen, Rubanova, Bettencourt, Duvenaud, *Neural Ordinary Differential Equations*, 2018,
            arXiv:1806.07366.
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
    x1: Float[Array, "b *event"],
    base_log_prob: Callable[[Array], Array],
    cond: Cond = None,
    *,
    key: Key | None = None,
    divergence: Divergence = _EXACT,
    method: Method | int | None = None,
    t1: float = 1.0,
) -> tuple[Float[Array, " b"], SolveInfo]:
    """The log-density of data under the ODE of a velocity and a base density.

    Also known as: CNF log-density, CNF log-likelihood, instantaneous change of variables,
    likelihood of an ODE.

        log p(x1) = log p0(x0) - integral from 0 to t1 of div v(x_t, t) dt

    on the path that ends in x1. Rows must not interact inside the velocity.

    Args:
        velocity: the velocity v.
        params: its params.
        x1: the data, [b, *event], at time t1.
        base_log_prob: x0 [b, *event] -> [b] nats, the log-density at time 0.
        cond: the condition, [b, ...] or one row for all.
        key: a key for an estimate of the divergence, whose probes are drawn for each row and frozen
            for the solve.
        divergence: `solvers.exact_divergence()`, or the unbiased estimates
            `solvers.hutchinson(probes)` and `solvers.hutch_plus_plus(sketch)`.
        method: how to solve: a `Method` (`solvers.fixed`, `solvers.on_grid`, `solvers.adaptive`),
            or the number of steps; the default is `solvers.adaptive(diffrax.Tsit5())` with rtol =
            atol = 1e-5. A grid is that of sampling, from 0 to the time of x1 (walked backwards).
        t1: the time of x1; the result is the density at that time.

    Returns:
        log_prob: [b], in nats, float32 or better; NaN for the rows of a failed solve.
        info: evaluations [b], those of velocity and derivatives together, and status [b] (see
            `SolveInfo`).

    Raises:
        ValueError: an estimate has no key, t1 is outside (0, 1] or given beside a grid,
            base_log_prob does not return [b], or the velocity has another shape than x1.
        TypeError: method, velocity or divergence is something else.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jax.scipy.stats import norm
        >>> from jflow import solvers
        >>> from jflow.types import Velocity
        >>> def apply(params, x, t, cond=None, *, key=None):
        ...     return 0 * x + 1
        >>> def base(x):
        ...     return norm.logpdf(x).sum(1)
        >>> velocity, x1 = Velocity(lambda *_: {}, apply), jnp.array([[1.0, 1.0]])  # from x0 = 0
        >>> value, info = solvers.log_prob(velocity, {}, x1, base, method=4)
        >>> round(float(value[0]), 3)  # -log(2 pi)
        -1.838

    References:
        Chen, Rubanova, Bettencourt, Duvenaud, *Neural Ordinary Differential Equations*, 2018,
            arXiv:1806.07366.
    """
    given = (velocity, params, x1, base_log_prob, cond, key, divergence, method, t1)
    value, _, info = _log_prob(_with_log_det, 1, "solvers.log_prob", *given)
    return value, info


def log_prob_with_energies(
    velocity: Velocity,
    params: Params,
    x1: Float[Array, "b *event"],
    base_log_prob: Callable[[Array], Array],
    cond: Cond = None,
    *,
    key: Key | None = None,
    divergence: Divergence = _EXACT,
    method: Method | int | None = None,
    t1: float = 1.0,
) -> tuple[Float[Array, " b"], Float[Array, " b"], Float[Array, " b"], SolveInfo]:
    """The log-density of data and two energies of the path that ends there, all of one solve.

        kinetic  = integral from 0 to t1 of |v(x_t, t)|^2 dt
        jacobian = integral from 0 to t1 of |dv/dx (x_t, t)|_F^2 dt

    They are sums over the event, both >= 0 up to the error of the solve. Under an estimate of the
    divergence the Frobenius norm is estimated from the same products. `losses.regularized_nll`
    penalizes them.

    Args:
        velocity: the velocity v; rows must not interact inside it.
        params: its params.
        x1: the data, [b, *event], at time t1.
        base_log_prob: x0 [b, *event] -> [b] nats, the log-density at time 0.
        cond: the condition, [b, ...] or one row for all.
        key: a key for an estimate of the divergence, whose probes are drawn for each row and frozen
            for the solve.
        divergence: `solvers.exact_divergence()`, `solvers.hutchinson(probes)` or
            `solvers.hutch_plus_plus(sketch)`.
        method: how to solve: a `Method`, or the number of steps; the default is
            `solvers.adaptive(diffrax.Tsit5())` with rtol = atol = 1e-5. A grid is that of sampling,
            from 0 to the time of x1.
        t1: the time of x1.

    Returns:
        log_prob: [b], in nats.
        kinetic: [b], in squared units of the state.
        jacobian: [b].
        info: evaluations [b] and status [b] (see `SolveInfo`); the rows of a failed solve are NaN.

    Raises:
        ValueError: as in `log_prob`.
        TypeError: as in `log_prob`.

    References:
        Finlay, Jacobsen, Nurbekyan, Oberman, *How to Train Your Neural ODE: the World of Jacobian
            and Kinetic Regularization*, 2020, arXiv:2002.02798.
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
    """base_log_prob(x0) + log_det, NaN for the rows of a failed solve, whose NaN in x0 the
    density does not see: a mask behind it would not keep them out of the gradient of its params.
    """
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
