"""How an ODE is solved, as one value.

It is a number of steps, the times of a grid, or tolerances, each with a solver.
"""

import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jflow._core.checks import check_whole
from jflow._core.times import Times, check_grid, traced

__all__ = ["Method", "adaptive", "as_method", "fixed", "on_grid", "reverse"]

_CHECKPOINT = diffrax.RecursiveCheckpointAdjoint()


class Method(NamedTuple):
    """How to solve an ODE: the `method` of every function that solves one.

    It is made by `fixed`, `on_grid` or `adaptive`, once, outside jit, and closed over. One of
    steps, grid, and rtol with atol is not None. A solver or an adjoint of None is the default of
    the function that gets the method.

    Attributes:
        solver: a `diffrax.AbstractSolver`, or None.
        steps: the number of equal steps, or None.
        grid: times [n + 1], strictly monotone, or None.
        rtol: the relative tolerance of a row, or None.
        atol: the absolute tolerance of a row, in the units of the state, or None.
        adjoint: a `diffrax.AbstractAdjoint`, how to differentiate; None: through the steps, of
            which the way back keeps one state each; under tolerances
            `diffrax.RecursiveCheckpointAdjoint()`.
        max_steps: how many steps a solve with tolerances may try.
    """

    solver: diffrax.AbstractSolver | None = None
    steps: int | None = None
    grid: Times | ArrayLike | None = None
    rtol: float | None = None
    atol: float | None = None
    adjoint: diffrax.AbstractAdjoint | None = None
    max_steps: int = 4096


def fixed(
    n: int,
    solver: diffrax.AbstractSolver | None = None,
    *,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> Method:
    """Equal steps between the ends that the function is given, t0 and t1.

    Args:
        n: the number of steps, at least 1.
        solver: of diffrax or of `jflow.solvers`; None: the default of the function.
        adjoint: how to differentiate; None: through the steps, in every mode and order. The way
            back keeps n states; with `diffrax.RecursiveCheckpointAdjoint()`, in reverse mode alone,
            about sqrt(2 n), and takes longer.

    Returns:
        Method: for the `method` of `solvers.sample` and others.

    Raises:
        ValueError: n is not a whole number of at least 1.
        TypeError: solver or adjoint is something else.

    Examples:
        >>> import diffrax
        >>> from jflow import solvers
        >>> solvers.fixed(20, diffrax.Heun()).steps
        20
    """
    return _checked(
        "solvers.fixed", Method(solver, steps=_count("solvers.fixed", n), adjoint=adjoint)
    )


def on_grid(
    times: Times | ArrayLike,
    solver: diffrax.AbstractSolver | None = None,
    *,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> Method:
    """One step between each two neighbors of given times.

    The first and the last time are the ends of the solve.

    Args:
        times: [n + 1] in [0, 1], strictly rising (from the source to data) or falling (back), such
            as `solvers.grids` has them. They may be traced, and are then not checked.
        solver: of diffrax or of `jflow.solvers`; None: the default of the function.
        adjoint: how to differentiate; None: through the steps, in every mode and order. The way
            back keeps n states; with `diffrax.RecursiveCheckpointAdjoint()`, in reverse mode alone,
            about sqrt(2 n), and takes longer.

    Returns:
        Method: for the `method` of `solvers.sample` and others.

    Raises:
        ValueError: times are fewer than two, not strictly monotone, or outside [0, 1].
        TypeError: solver or adjoint is something else.

    Examples:
        >>> import diffrax
        >>> from jflow import solvers
        >>> method = solvers.on_grid(solvers.grids.power(4, 2.0), diffrax.Euler())
        >>> method.grid.tolist()
        [0.0, 0.0625, 0.25, 0.5625, 1.0]
    """
    check_grid("solvers.on_grid", times, rising=False)
    return _checked("solvers.on_grid", Method(solver, grid=times, adjoint=adjoint))


def adaptive(
    solver: diffrax.AbstractSolver | None = None,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    adjoint: diffrax.AbstractAdjoint | None = None,
    max_steps: int = 4096,
) -> Method:
    """Steps whose estimated error meets tolerances.

    The error is at most atol + rtol |x|; each row is solved by itself, with its own steps.

    Args:
        solver: one with an error estimate, such as `diffrax.Tsit5()`; None: the default of the
            function.
        rtol: the relative tolerance.
        atol: the absolute tolerance, in the units of the state.
        adjoint: how to differentiate; None: `diffrax.RecursiveCheckpointAdjoint()`, which knows
            reverse mode alone and holds one gradient of params for every row.
        max_steps: how many steps may be tried, rejected ones included; a row that needs more fails.

    Returns:
        Method: for the `method` of `solvers.sample` and others.

    Raises:
        ValueError: the tolerances are negative or both 0, max_steps is not a whole number of at
            least 1, or the solver has no error estimate.
        TypeError: solver or adjoint is something else.

    Examples:
        >>> import diffrax
        >>> from jflow import solvers
        >>> solvers.adaptive(diffrax.Tsit5(), rtol=1e-6, atol=1e-6).rtol
        1e-06
    """
    name = "solvers.adaptive"
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise ValueError(f"{name}: expected rtol, atol >= 0 and one above 0, got {rtol}, {atol}")
    max_steps = _count(name, max_steps, "max_steps")
    return _checked(
        name, Method(solver, rtol=rtol, atol=atol, adjoint=adjoint, max_steps=max_steps)
    )


def reverse(method: Method | int | None) -> Method | int | None:
    """The same method for the way back: the times of `on_grid` in the other order.

    Args:
        method: a `Method`, a number of steps, or None; without a grid it stays as it is.

    Returns:
        The method for the way back.

    Examples:
        >>> from jflow import solvers
        >>> solvers.reverse(solvers.on_grid([0.0, 0.25, 1.0])).grid.tolist()
        [1.0, 0.25, 0.0]
    """
    if not isinstance(method, Method) or method.grid is None:
        return method
    return method._replace(
        grid=jnp.flip(method.grid) if isinstance(method.grid, jax.Array) else np.flip(method.grid)
    )


def as_method(
    name: str,
    method: Method | int | None,
    default: Method,
    *,
    t0: float = 0.0,
    t1: float = 1.0,
    accepts: Sequence[Callable[..., Method]] = (fixed, on_grid, adaptive),
    rising: bool = False,
) -> Method:
    """The complete `Method` of an argument `method`, checked.

    It is the first call of a function that integrates.

    Args:
        name: of the function, for its messages.
        method: a Method, a number of steps (`fixed(n)`), or None.
        default: what None is, and where a solver comes from that the method leaves open.
        t0: where the function starts, a number or traced.
        t1: where it ends. A grid carries its own ends: beside one these have to be 0 and 1.
        accepts: which of `fixed`, `on_grid` and `adaptive` the function can do.
        rising: whether the times of a grid have to rise.

    Returns:
        The method with its solver and its adjoint.

    Raises:
        TypeError: method is something else.
        ValueError: a method that the function does not accept, a default solver without error
            estimate under tolerances, a grid beside other ends, a grid that falls where it has to
            rise, and ends that are equal, not in [0, 1], or not numbers.

    Examples:
        >>> import diffrax
        >>> from jflow import solvers
        >>> method = solvers.as_method("mine", 7, solvers.fixed(50, diffrax.Heun()))
        >>> method.steps, type(method.solver).__name__
        (7, 'Heun')
    """
    if method is None:
        method = default
    elif isinstance(method, numbers.Real):
        method = Method(steps=_count(name, method))
    elif not isinstance(method, Method):
        raise TypeError(
            f"{name}: expected method to be a number of steps or a solvers.Method, such as "
            f"solvers.fixed(20, diffrax.Heun()), got {method!r}"
        )
    kind = fixed if method.steps is not None else on_grid if method.grid is not None else adaptive
    if kind not in accepts:
        allowed = " or ".join(f"solvers.{maker.__name__}(...)" for maker in accepts)
        raise ValueError(
            f"{name}: expected method to be {allowed}, got solvers.{kind.__name__}(...)"
        )
    solver, adjoint = method.solver or default.solver, method.adjoint or default.adjoint
    if adjoint is None and kind is adaptive:
        adjoint = _CHECKPOINT
    method = _checked(name, method._replace(solver=solver, adjoint=adjoint))
    if rising and method.grid is not None:
        check_grid(name, method.grid, rising=True)
    _check_ends(name, method.grid, t0, t1)
    return method


def _count(name, n, what="steps") -> int:
    check_whole(name, **{what: n})
    return int(n)


def _checked(name, method) -> Method:
    solver, adjoint = method.solver, method.adjoint
    if not (solver is None or isinstance(solver, diffrax.AbstractSolver)):
        raise TypeError(f"{name}: expected solver to be a diffrax.AbstractSolver, got {solver!r}")
    if not (adjoint is None or isinstance(adjoint, diffrax.AbstractAdjoint)):
        raise TypeError(
            f"{name}: expected adjoint to be a diffrax.AbstractAdjoint, got {adjoint!r}"
        )
    if method.rtol is not None and not (
        solver is None or isinstance(solver, diffrax.AbstractAdaptiveSolver)
    ):
        raise ValueError(
            f"{name}: {type(solver).__name__} has no error estimate: give steps or a grid, "
            "not tolerances"
        )
    return method


def _check_ends(name, grid, t0, t1):
    """Raise where a grid and other ends are both given, or the ends are equal or outside [0, 1].

    Traced ends may be anything.
    """
    for what, t in (("t0", t0), ("t1", t1)):
        if np.shape(t) != ():
            raise ValueError(
                f"{name}: expected {what} to be a number, got shape {list(np.shape(t))}"
            )
    if grid is not None and (traced(t0, t1) or (t0, t1) != (0.0, 1.0)):
        raise ValueError(
            f"{name}: a grid carries its own ends: give t0={t0}, t1={t1} or the grid, not both"
        )
    if not traced(t0, t1) and t0 == t1:
        raise ValueError(f"{name}: expected t0 and t1 to differ, got {t0} and {t1}")
    if not all(traced(t) or 0 <= t <= 1 for t in (t0, t1)):
        raise ValueError(f"{name}: expected t0 and t1 in [0, 1], got {t0} and {t1}")
