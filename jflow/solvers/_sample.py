"""Samples along the ODE of a velocity."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_cond, check_noun, count_rows, like_state
from jflow._core.times import traced
from jflow.solvers._integrate import SolveInfo, integrate, method
from jflow.types import Cond, Field, Params, PyTree, Velocity

__all__ = ["sample"]

_HEUN = diffrax.Heun()
_CHECKPOINT = diffrax.RecursiveCheckpointAdjoint()


def sample(
    velocity: Velocity,
    params: Params,
    x0: PyTree,
    cond: Cond = None,
    *,
    solver: diffrax.AbstractSolver = _HEUN,
    steps: int | None = None,
    grid: ArrayLike | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
    adjoint: diffrax.AbstractAdjoint = _CHECKPOINT,
    max_steps: int = 4096,
) -> tuple[PyTree, SolveInfo]:
    """Carry x0 [b, *event] (or a pytree) from time t0 to t1 along dx/dt = velocity(x, t, cond); returns (x1, info).

    One of: steps (equal ones from t0 to t1; 50 where nothing is given), grid (times [n + 1], strictly monotone, with
    both ends), or rtol and atol (each row solved by itself with its own steps, at most max_steps). t0=1, t1=0 or a
    falling grid encodes data into noise. info has evaluations [b] and status [b] (see `SolveInfo`); the rows of a
    failed solve are NaN, and nothing raises. x1 has the type of x0; the state between is float32 or better.

    Under jit, close over velocity and the options. To differentiate, prefer steps or a grid: with tolerances the
    backward pass holds one gradient of params for every row. BacksolveAdjoint works on both.
    Errors: ValueError for more than one of steps, grid, tolerances, for steps < 1, times outside [0, 1], a grid that is
    not monotone, a solver without error estimate under tolerances, and a velocity of another shape than x.
    """
    how = method(
        "solvers.sample",
        solver=solver,
        steps=steps,
        grid=grid,
        rtol=rtol,
        atol=atol,
        adjoint=adjoint,
        max_steps=max_steps,
        default={"steps": 50},
    )
    check_ends("solvers.sample", grid, t0, t1)
    check_noun("solvers.sample", velocity, Velocity, Field)
    cond = check_cond("solvers.sample", cond, count_rows("solvers.sample", x0))
    for leaf in jax.tree.leaves(x0):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(f"solvers.sample: expected x0 of a floating type, got {jnp.result_type(leaf)}")
    state = jax.tree.map(lambda x: jnp.asarray(x, float_dtype(x)), x0)
    field = jax.tree_util.Partial(_velocity, velocity.apply)
    x1, info = integrate(field, params, cond, state, how, t0, t1)
    return jax.tree.map(lambda y, x: y.astype(jnp.result_type(x)), x1, x0), info


def check_ends(name, grid, t0, t1):
    """Raise where a grid and other ends are both given, or the ends are one, or not in [0, 1]; traced ones may be."""
    for what, t in (("t0", t0), ("t1", t1)):
        if np.shape(t) != ():
            raise ValueError(f"{name}: expected {what} to be a number, got shape {list(np.shape(t))}")
    if grid is not None and (traced(t0, t1) or (t0, t1) != (0.0, 1.0)):
        raise ValueError(f"{name}: a grid carries its own ends: give t0={t0}, t1={t1} or the grid, not both")
    if not traced(t0, t1) and t0 == t1:
        raise ValueError(f"{name}: expected t0 and t1 to differ, got {t0} and {t1}")
    if not all(traced(t) or 0 <= t <= 1 for t in (t0, t1)):
        raise ValueError(f"{name}: expected t0 and t1 in [0, 1], got {t0} and {t1}")


def _velocity(apply, params, cond, x, t):
    return like_state("velocity", apply(params, x, t, cond), x)
