"""Log-densities along the ODE of a velocity (the instantaneous change of variables)."""

from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jflow._core.arrays import filled, float_dtype, sum_event, zero_log_det
from jflow._core.checks import check_cond, check_noun, check_rows, count_rows, like_state
from jflow.solvers._divergence import Divergence, exact_divergence
from jflow.solvers._integrate import Method, SolveInfo, all_finite, integrate, method
from jflow.solvers._sample import check_ends
from jflow.types import Array, Cond, Field, Key, Params, Velocity

__all__ = ["log_prob", "sample_with_log_det"]

_TSIT5 = diffrax.Tsit5()
_CHECKPOINT = diffrax.RecursiveCheckpointAdjoint()
_EXACT = exact_divergence()


def sample_with_log_det(
    velocity: Velocity,
    params: Params,
    x: Array,
    cond: Cond = None,
    *,
    key: Key | None = None,
    divergence: Divergence = _EXACT,
    solver: diffrax.AbstractSolver = _TSIT5,
    steps: int | None = None,
    grid: ArrayLike | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
    adjoint: diffrax.AbstractAdjoint = _CHECKPOINT,
    max_steps: int = 4096,
) -> tuple[Array, Array, SolveInfo]:
    """Carry x [b, *event] from t0 to t1; returns (x at t1, log_det [b] of that map in nats, info).

    log_det = int_{t0}^{t1} div v(x_t, t) dt, solved together with x and negative of it where t0=1, t1=0. divergence:
    `solvers.exact_divergence()`, or the unbiased estimates `solvers.hutchinson(probes)` and
    `solvers.hutch_plus_plus(sketch)`, whose probes are drawn from `key` for each row and frozen for the solve.

    Options as in `solvers.sample`, but rtol = atol = 1e-5 where nothing is given. info.evaluations counts those of
    velocity and derivatives together. log_det is float32 or better; failed rows are NaN. Rows must not interact
    inside the velocity.
    Errors: ValueError for an estimate without key, and as in `solvers.sample`.
    Source: Chen et al., "Neural Ordinary Differential Equations", 2018.
    """
    name = "solvers.sample_with_log_det"
    options = {"solver": solver, "steps": steps, "rtol": rtol, "atol": atol, "adjoint": adjoint, "max_steps": max_steps}
    how = likelihood_method(name, divergence, **options, grid=grid)
    check_ends(name, grid, t0, t1)
    return carry(name, velocity, params, x, cond, key, divergence, how, t0, t1)


def log_prob(
    velocity: Velocity,
    params: Params,
    x1: Array,
    base_log_prob: Callable[[Array], Array],
    cond: Cond = None,
    *,
    key: Key | None = None,
    divergence: Divergence = _EXACT,
    solver: diffrax.AbstractSolver = _TSIT5,
    steps: int | None = None,
    grid: ArrayLike | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    t1: float = 1.0,
    adjoint: diffrax.AbstractAdjoint = _CHECKPOINT,
    max_steps: int = 4096,
) -> tuple[Array, SolveInfo]:
    """log p(x1) = log p0(x0) - int_0^t1 div v(x_t, t) dt on the path that ends in x1 [b, *event]: ([b] nats, info).

    base_log_prob: x0 [b, *event] -> [b] nats, the density at time 0; the result is that at t1. grid: as for sampling,
    from 0 to the time of x1 (walked backwards). The rest, the errors and the sources are those of
    `sample_with_log_det`, from t1 to 0.
    """
    name = "solvers.log_prob"
    options = {"solver": solver, "steps": steps, "rtol": rtol, "atol": atol, "adjoint": adjoint, "max_steps": max_steps}
    how = likelihood_method(name, divergence, **options, grid=grid, rising=True)
    check_ends(name, grid, 0.0, t1)
    x0, log_det, info = carry(name, velocity, params, x1, cond, key, divergence, backwards(how), t1, 0.0)

    def density(x0):
        return check_rows(name, "base_log_prob", base_log_prob(x0), x0.shape[0])

    return density_at_end(density, x0, log_det), info


def density_at_end(base_log_prob, x0, log_det):
    """base_log_prob(x0) + log_det, NaN for the rows of a failed solve, whose NaN in x0 the density does not see: a mask
    behind it would not keep them out of the gradient of its params."""
    ok = all_finite(x0)
    return jnp.where(ok, base_log_prob(filled(ok, x0)) + log_det, jnp.nan)


def likelihood_method(name, divergence, **options) -> Method:
    if not isinstance(divergence, Divergence):
        raise TypeError(
            f"{name}: expected divergence to be a solvers.Divergence, such as solvers.hutchinson(1), got {divergence!r}"
        )
    return method(name, **options, default={"rtol": 1e-5, "atol": 1e-5})


def backwards(how: Method) -> Method:
    """The same, from its end to 0."""
    if how.grid is None:
        return how
    return how._replace(grid=jnp.flip(how.grid) if isinstance(how.grid, jax.Array) else np.flip(how.grid))


def carry(name, velocity, params, x, cond, key, divergence, how, t0, t1):
    """`sample_with_log_det` with its options checked."""
    y, (log_det,), info = _integrals(_with_log_det, 1, name, velocity, params, x, cond, key, divergence, how, t0, t1)
    return y, log_det, info


def carry_with_energies(name, velocity, params, x, cond, key, divergence, how, t0, t1):
    """The same and int |v|^2 dt, int |dv/dx|_F^2 dt along the path, [b] each and signed as the log-det is."""
    y, sums, info = _integrals(_with_energies, 3, name, velocity, params, x, cond, key, divergence, how, t0, t1)
    return y, *sums, info


def _integrals(field, count, name, velocity, params, x, cond, key, divergence, how, t0, t1):
    check_noun(name, velocity, Velocity, Field)
    cond = check_cond(name, cond, count_rows(name, x))
    state = jnp.asarray(x, float_dtype(x))
    field = jax.tree_util.Partial(field, velocity.apply, divergence.apply)
    start = (state, (zero_log_det(state),) * count)
    (y, sums), info = integrate(field, params, (cond, divergence.draw(key, state)), start, how, t0, t1)
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
