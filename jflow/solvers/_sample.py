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
    """Carry states along the ODE of a velocity, from the source to data or back.

    Also known as: ODE sampling, probability flow ODE.

        dx/dt = velocity(x, t, cond)      from t0 to t1

    t0=1, t1=0 or a falling grid encodes data into noise. The state between is float32 or better.
    Under jit, close over velocity and method. To differentiate, prefer steps or a grid: with
    tolerances the backward pass holds one gradient of params for every row. BacksolveAdjoint works
    on both.

    Args:
        velocity: the velocity.
        params: its params.
        x0: the states at t0, [b, *event] or a pytree of such arrays, of floating types.
        cond: the condition, [b, ...] or one row for all.
        method: how to solve: `solvers.fixed(n, solver)`, `solvers.on_grid(times, solver)` (whose
            times carry both ends) or `solvers.adaptive(solver, rtol=..., atol=...)` (each row by
            itself with its own steps); an int n is `solvers.fixed(n)`. The default is 50 steps, and
            the default solver `diffrax.Heun()`.
        t0: the time of x0, in [0, 1], a number or traced.
        t1: the time to go to, in [0, 1], a number or traced.

    Returns:
        x1: the states at t1, in the shapes and types of x0.
        info: evaluations [b] and status [b] (see `SolveInfo`); the rows of a failed solve are NaN,
            and nothing raises.

    Raises:
        TypeError: method or velocity is something else.
        ValueError: t0 and t1 are equal or outside [0, 1], or given beside a grid, or the velocity
            has another shape than x.

    Examples:
        >>> import diffrax
        >>> import jax.numpy as jnp
        >>> from jflow import solvers
        >>> from jflow.types import Velocity
        >>> velocity = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: x)
        >>> method = solvers.fixed(2, diffrax.Euler())
        >>> x1, info = solvers.sample(velocity, {}, jnp.ones((1, 1)), method=method)
        >>> x1.tolist(), info.evaluations.tolist(), info.status.tolist()  # 1.5^2
        ([[2.25]], [2], [0])
        >>> x1, info = solvers.sample(velocity, {}, jnp.ones((1, 1)))
        >>> round(float(x1[0, 0]), 2)  # e
        2.72
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
