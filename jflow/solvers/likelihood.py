"""Log-densities along the ODE of a velocity (the instantaneous change of variables)."""

import math
from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jflow._util import check_cond, float_dtype, need_key, zero_log_det
from jflow.fields import like_state
from jflow.solvers._integrate import Method, SolveInfo, integrate, method
from jflow.solvers.sample import check_ends
from jflow.types import Array, Cond, Key, Params, Velocity

__all__ = ["log_prob", "sample_with_log_det"]

_TSIT5 = diffrax.Tsit5()
_CHECKPOINT = diffrax.RecursiveCheckpointAdjoint()


def sample_with_log_det(
    velocity: Velocity,
    params: Params,
    x: Array,
    cond: Cond = None,
    *,
    key: Key | None = None,
    probes: int | None = None,
    noise: Callable = jax.random.rademacher,
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

    log_det = int_{t0}^{t1} div v(x_t, t) dt, solved together with x and negative of it where t0=1, t1=0. probes=None:
    the exact divergence, D forward derivatives an evaluation for D event dimensions. probes=K: Hutchinson's unbiased
    estimate, the mean of e.(dv/dx)e over K probes a row, K forward derivatives; they are drawn from `key` by
    noise(key, shape, dtype), of mean zero and unit covariance (Rademacher, or jax.random.normal), and frozen for the
    solve.

    Options as in `solvers.sample`, but rtol = atol = 1e-5 where nothing is given. info.evaluations counts those of
    velocity and derivatives together. log_det is float32 or better; failed rows are NaN. Rows must not interact
    inside the velocity.
    Errors: ValueError for probes without key, probes < 1, and as in `solvers.sample`.
    Sources: Chen et al., "Neural Ordinary Differential Equations", 2018; Grathwohl et al., "FFJORD: Free-form
    Continuous Dynamics for Scalable Reversible Generative Models", 2019.
    """
    name = "solvers.sample_with_log_det"
    how = likelihood_method(
        name, solver=solver, steps=steps, grid=grid, rtol=rtol, atol=atol, adjoint=adjoint, max_steps=max_steps
    )
    check_probes(name, probes)
    check_ends(name, grid, t0, t1)
    return carry(name, velocity, params, x, cond, key, probes, noise, how, t0, t1)


def log_prob(
    velocity: Velocity,
    params: Params,
    x1: Array,
    base_log_prob: Callable[[Array], Array],
    cond: Cond = None,
    *,
    key: Key | None = None,
    probes: int | None = None,
    noise: Callable = jax.random.rademacher,
    solver: diffrax.AbstractSolver = _TSIT5,
    steps: int | None = None,
    grid: ArrayLike | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    adjoint: diffrax.AbstractAdjoint = _CHECKPOINT,
    max_steps: int = 4096,
) -> tuple[Array, SolveInfo]:
    """log p1(x1) = log p0(x0) - int_0^1 div v(x_t, t) dt on the path that ends in x1 [b, *event]: ([b] nats, info).

    base_log_prob: x0 [b, *event] -> [b] nats. grid: as for sampling, from 0 to 1 (walked backwards). The rest, the
    errors and the sources are those of `sample_with_log_det`, from t0=1 to t1=0.
    """
    name = "solvers.log_prob"
    options = {"solver": solver, "steps": steps, "rtol": rtol, "atol": atol, "adjoint": adjoint, "max_steps": max_steps}
    how = backwards(likelihood_method(name, **options, grid=grid, rising=True))
    check_probes(name, probes)
    x0, log_det, info = carry(name, velocity, params, x1, cond, key, probes, noise, how, 1.0, 0.0)
    return base_log_prob(x0) + log_det, info


def likelihood_method(name, **options) -> Method:
    return method(name, **options, default={"rtol": 1e-5, "atol": 1e-5})


def backwards(how: Method) -> Method:
    """The same, from 1 to 0."""
    if how.grid is None:
        return how
    return how._replace(grid=jnp.flip(how.grid) if isinstance(how.grid, jax.Array) else np.flip(how.grid))


def check_probes(name, probes):
    if probes is not None and (isinstance(probes, bool) or int(probes) != probes or probes < 1):
        raise ValueError(f"{name}: expected probes to be None (exact) or an integer of at least 1, got {probes}")


def carry(name, velocity, params, x, cond, key, probes, noise, how, t0, t1):
    """`sample_with_log_det` with its options checked."""
    check_cond(name, cond, x.shape[0])
    state = jnp.asarray(x, float_dtype(x))
    e = None
    if probes is not None:
        need_key(f"{name} with probes={probes}", key)
        e = noise(key, (x.shape[0], probes, *x.shape[1:]), state.dtype)
    field = jax.tree_util.Partial(_augmented, velocity.apply)
    (y, log_det), info = integrate(field, params, (cond, e), (state, zero_log_det(state)), how, t0, t1)
    return y.astype(jnp.result_type(x)), log_det, info


def _augmented(apply, params, rows, state, t):
    """(v, div v): with e_k the unit vectors, div v = sum_k e_k . (dv/dx) e_k; with random probes, the mean."""
    cond, e = rows
    x, _ = state
    if e is None:
        size = math.prod(x.shape[1:])
        basis = jnp.eye(size, dtype=x.dtype).reshape(size, 1, *x.shape[1:])
        e, weight = jnp.broadcast_to(basis, (size, *x.shape)), 1.0
    else:
        e, weight = jnp.moveaxis(e, 1, 0), 1.0 / e.shape[1]

    def along(e):
        v, slope = jax.jvp(lambda x: like_state("velocity", apply(params, x, t, cond), x), (x,), (e,))
        return v, jnp.sum((e * slope).reshape(x.shape[0], -1), axis=1)

    v, terms = jax.vmap(along, out_axes=(None, 0))(e)
    return v, weight * jnp.sum(terms, axis=0)
