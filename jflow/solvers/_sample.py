"""Samples along the ODE of a velocity."""

import diffrax
import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_cond, check_noun, count_rows, like_state
from jflow.solvers._integrate import SolveInfo, integrate
from jflow.solvers._method import Method, as_method, fixed
from jflow.types import Cond, Field, Params, PyTree, Velocity

__all__ = ["sample"]

_DEFAULT = fixed(50, diffrax.Heun())


def sample(
    velocity: Velocity,
    params: Params,
    x0: PyTree,
    cond: Cond = None,
    *,
    method: Method | int | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
) -> tuple[PyTree, SolveInfo]:
    """Carry x0 [b, *event] (or a pytree) from time t0 to t1 along dx/dt = velocity(x, t, cond); returns (x1, info).

    method: how to solve it, `solvers.fixed(n, solver)`, `solvers.on_grid(times, solver)` (whose times carry both ends) or
    `solvers.adaptive(solver, rtol=..., atol=...)` (each row by itself with its own steps); an int n is `solvers.fixed(n)`.
    The default is 50 steps, and the default solver `diffrax.Heun()`. t0=1, t1=0 or a falling grid encodes data into
    noise. info has evaluations [b] and status [b] (see `SolveInfo`); the rows of a failed solve are NaN, and nothing
    raises. x1 has the type of x0; the state between is float32 or better.

    Under jit, close over velocity and method. To differentiate, prefer steps or a grid: with tolerances the backward pass
    holds one gradient of params for every row. BacksolveAdjoint works on both.
    Errors: TypeError for another method; ValueError for t0 and t1 that are equal or outside [0, 1], or given beside a
    grid, and for a velocity of another shape than x.
    """
    how = as_method("solvers.sample", method, _DEFAULT, t0=t0, t1=t1)
    check_noun("solvers.sample", velocity, Velocity, Field)
    cond = check_cond("solvers.sample", cond, count_rows("solvers.sample", x0))
    for leaf in jax.tree.leaves(x0):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"solvers.sample: expected x0 of a floating type, got {jnp.result_type(leaf)}"
            )
    state = jax.tree.map(lambda x: jnp.asarray(x, float_dtype(x)), x0)
    field = jax.tree_util.Partial(_velocity, velocity.apply)
    x1, info = integrate(field, params, cond, state, how, t0, t1)
    return jax.tree.map(lambda y, x: y.astype(jnp.result_type(x)), x1, x0), info


def _velocity(apply, params, cond, x, t):
    return like_state("velocity", apply(params, x, t, cond), x)
