"""Where an ODE over rows meets diffrax: it is counted, and it never raises.

Fixed grids are solved batched, adaptive solves row by row.

On a fixed grid nothing is left to decide but the steps, which are diffrax's: `_steps` scans them.
`diffrax.diffeqsolve`, which can do much more, takes about three times as long to trace and compile;
an adjoint or tolerances ask for it.
"""

import enum
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import zero_from_primal
from jaxtyping import Int

from jflow._core.arrays import expand_to, filled, float_dtype
from jflow._core.keys import is_key, same_draws
from jflow._core.pullback import reverse_only
from jflow._core.times import traced
from jflow.solvers._method import Method
from jflow.types import Array, PyTree


class Status(enum.IntEnum):
    """What became of a row of a solve: 0 is success, and the rows of any other are NaN.

    - OK: the solve arrived.
    - NOT_FINITE: the state became infinite or NaN.
    - MAX_STEPS: adaptive steps did not reach the end within max_steps.
    - STEP_TOO_SMALL: no adaptive step above rounding meets the tolerances (the ODE is stiff, or
      never finite).
    - SOLVER: the solver gave up, as where an implicit step did not converge.
    """

    OK = 0
    NOT_FINITE = 1
    MAX_STEPS = 2
    STEP_TOO_SMALL = 3
    SOLVER = 4


class SolveInfo(NamedTuple):
    """What a solve did, row by row.

    Attributes:
        evaluations: how often the solver evaluated the velocity of this row, [b] int32, rejected
            steps included (an adaptive batch runs until its slowest row is done); -1 for solvers
            that do not fix it (implicit ones).
        status: a `Status`, [b] int32; 0 is success.
    """

    evaluations: Int[Array, " b"]
    status: Int[Array, " b"]


def integrate(
    field: Callable, shared: PyTree, rows: PyTree, y0: PyTree, how: Method, t0: float, t1: float
) -> tuple[PyTree, SolveInfo]:
    """Solve dy/dt = field(shared, rows, y, t) from t0 to t1 for every row of y0.

    t0 and t1 are numbers or traced. y0 and rows: pytrees whose leaves lead with b; field sees them
    batched, with t [b]. field must be the same object from call to call (a module's function, or a
    `jax.tree_util.Partial` of one): diffrax compiles once for each. Everything traced comes through
    shared and rows, so that `BacksolveAdjoint` can differentiate with respect to them. Rows that
    fail are NaN, and have no part in a derivative.
    """

    def solve(shared, rows):
        y1, info = _solve_rows(field, shared, *rows, how, t0, t1)
        return (y1, info), info.status == Status.OK

    message = _FORWARD.format(type(how.adjoint).__name__)
    by_diffrax = how.adjoint is not None and not isinstance(how.adjoint, diffrax.DirectAdjoint)
    if isinstance(how.adjoint, diffrax.RecursiveCheckpointAdjoint | diffrax.BacksolveAdjoint):
        shared, rows, y0 = reverse_only((shared, rows, y0), message)
    try:
        return leave_out_failed(solve, shared, (rows, y0))
    except TypeError as error:  # where JAX sees the second derivative before it compiles the first
        if by_diffrax and "custom_vjp" in str(error):
            raise TypeError(message) from error
        raise


def leave_out_failed(run: Callable, shared: PyTree, rows: PyTree) -> PyTree:
    """The out of run(shared, rows) -> (out, ok [b]), with a derivative of the rows that are ok.

    All leaves of rows and out lead with b. A mask behind the run would not do: the cotangent of a
    row that blew up, 0, meets infinities on its way back, and their product, NaN, is summed into
    that of shared. Where a derivative is asked for, the run is therefore done twice: first to see
    which rows fail, and then, differentiated, with a good row in the place of each of them. Where
    none is, once.
    """
    if not traced(*jax.tree.leaves((shared, rows))):
        return run(shared, rows)[0]
    shared, rows = _arrays((shared, rows))
    # what run closes over may be traced, too, and a function with a rule of its own has to be given
    # it
    converted = _arrays(eqx.filter_closure_convert(run, shared, rows))
    arrays, static = eqx.partition((converted, shared, rows), eqx.is_array)

    def call(arrays):  # traced once: run is not called again
        converted, shared, rows = eqx.combine(arrays, static)
        return converted(shared, rows)

    form, _ = jax.eval_shape(call, arrays)

    @jax.custom_jvp
    def look(arrays):
        """(what the first run gives, which rows of it are ok), where a derivative is asked for;
        else all are taken to be.
        """
        leaf = jax.tree.leaves(arrays[2])[0]
        zeros = jax.tree.map(lambda a: jnp.zeros_like(leaf, shape=a.shape, dtype=a.dtype), form)
        return zeros, jnp.ones_like(leaf, shape=leaf.shape[:1], dtype=bool)

    @look.defjvp
    def look_at_the_run(primals, _):
        seen = call(*primals)
        return seen, zero_from_primal(seen)

    # both runs draw the same numbers
    first, ok = look(jax.tree.map(lambda a: same_draws(a) if is_key(a) else a, arrays))
    # where no row is good, zeros take their places
    good = jax.tree.map(
        lambda a: jnp.where(jnp.any(ok), a, jnp.zeros_like(a)), filled(ok, arrays[2])
    )
    out, _ = call((*arrays[:2], good))
    return jax.tree.map(lambda new, old: jnp.where(expand_to(ok, new), new, old), out, first)


def _arrays(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if eqx.is_array_like(leaf) else leaf, tree)


def _solve_rows(field, shared, rows, y0, how, t0, t1):
    n = jax.tree.leaves(y0)[0].shape[0]
    dtype = float_dtype(*jax.tree.leaves(y0))
    if how.rtol is None:
        equal = jnp.linspace if traced(t0, t1) else np.linspace
        times = equal(t0, t1, how.steps + 1) if how.grid is None else how.grid
        ts = jnp.asarray(times, dtype)
        evaluations = jnp.full((n,), count_evaluations(how.solver, ts.shape[0] - 1, 1), jnp.int32)
        each, args = jax.tree_util.Partial(_batched, field), (shared, rows)
        if how.adjoint is None:
            y1, stepped = _steps(each, args, y0, ts, how.solver)
            status = jnp.where(stepped, Status.OK, Status.SOLVER)
        else:
            solution = _solve(each, args, y0, ts[0], ts[-1], _Grid(ts), how)
            y1 = jax.tree.map(lambda y: jnp.squeeze(y, 0), solution.ys)
            status = _status(solution, solution.ts[-1] == ts[-1])
        status = jnp.broadcast_to(status, (n,)).astype(jnp.int32)
    else:
        start, end = jnp.asarray(t0, dtype), jnp.asarray(t1, dtype)
        eps = jnp.finfo(dtype).eps.item()
        dtmin = eps * (
            jax.lax.stop_gradient(jnp.abs(end - start)) if traced(t0, t1) else abs(t1 - t0)
        )
        control = _Tolerance(rtol=how.rtol, atol=how.atol, dtmin=dtmin, force_dtmin=False)

        def one_row(row, y):
            return _solve(
                jax.tree_util.Partial(_single, field), (shared, row), y, start, end, control, how
            )

        solution = jax.vmap(one_row)(rows, y0)
        fresh = solution.controller_state[1].steps
        evaluations = jnp.broadcast_to(
            count_evaluations(how.solver, solution.stats["num_steps"], fresh), (n,)
        ).astype(jnp.int32)
        y1 = jax.tree.map(lambda y: jnp.squeeze(y, 1), solution.ys)
        status = _status(solution, solution.ts[:, -1] == end).astype(jnp.int32)
    finite = jnp.all(jnp.stack([all_finite(y) for y in jax.tree.leaves(y1)]), axis=0)
    status = jnp.where((status == Status.OK) & ~finite, Status.NOT_FINITE, status)
    y1 = jax.tree.map(lambda y: jnp.where(expand_to(status == Status.OK, y), y, jnp.nan), y1)
    return y1, SolveInfo(evaluations, status)


def all_finite(y: Array) -> Array:
    """[b]: whether all numbers of a row [b, *event] are finite."""
    return jnp.all(jnp.isfinite(y), axis=tuple(range(1, y.ndim)))


def _status(solution, arrived):
    """A solve that arrived is a success, whatever size its next step would have had."""
    stopped = jnp.where(
        solution.result == diffrax.RESULTS.dt_min_reached, Status.STEP_TOO_SMALL, Status.SOLVER
    )
    stopped = jnp.where(
        solution.result == diffrax.RESULTS.max_steps_reached, Status.MAX_STEPS, stopped
    )
    return jnp.where(arrived, Status.OK, stopped)


@eqx.filter_jit
def _steps(vector_field, args, y0, ts, solver):
    """(y at the last of the times ts, whether the solver made every step).

    Derivatives are those of the steps, in every mode and order. The way back takes each step again
    from its start, so that it keeps one state a step.
    """
    term = diffrax.ODETerm(vector_field)
    state = _arrays(solver.init(term, ts[0], ts[1], y0, args))
    state, static = eqx.partition(state, eqx.is_array)

    @partial(jax.checkpoint, prevent_cse=False)  # a scan keeps what it would be afraid of apart
    def step(carry, ends):
        y, state = carry
        y, _, _, state, result = solver.step(
            term, *ends, y, args, eqx.combine(state, static), made_jump=False
        )
        return (y, eqx.filter(_arrays(state), eqx.is_array)), result == diffrax.RESULTS.successful

    (y1, _), stepped = jax.lax.scan(step, (y0, state), (ts[:-1], ts[1:]))
    return y1, jnp.all(stepped)


_FORWARD = (
    "an ODE solved with adjoint={} has derivatives in reverse mode alone, and of first "
    "order: for jax.jvp, jax.jacfwd, "
    "jax.hessian and gradients of gradients give the method adjoint=diffrax.DirectAdjoint()"
)


def _solve(vector_field, args, y0, t0, t1, control, how):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        how.solver,
        t0=t0,
        t1=t1,
        dt0=None,
        y0=y0,
        args=args,
        stepsize_controller=control,
        adjoint=how.adjoint,
        saveat=diffrax.SaveAt(t1=True, controller_state=True),
        max_steps=how.max_steps if how.rtol is not None else control.ts.shape[0] - 1,
        throw=False,
    )


def _batched(field, t, y, args):
    shared, rows = args
    n = jax.tree.leaves(y)[0].shape[0]
    return field(shared, rows, y, jnp.broadcast_to(t, (n,)))


def _single(field, t, y, args):
    shared, row = args
    first = jax.tree.map(lambda a: a[None], (row, y))
    return jax.tree.map(lambda a: a[0], field(shared, *first, t[None]))


class _Grid(diffrax.StepTo):
    """`diffrax.StepTo` without its runtime checks, which are host callbacks (and hang a TPU).

    The backward solve of `BacksolveAdjoint`, which gets the same controller, walks the same times
    in reverse.
    """

    def wrap(self, direction):
        return _Grid(jnp.sort(self.ts * direction))

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return self.ts[1], 2


class _Fresh(NamedTuple):
    """Whether no step was accepted yet, and how many steps were tried so."""

    now: Array
    steps: Array


class _Tolerance(diffrax.PIDController):
    """A `diffrax.PIDController` that also shrinks the step wherever the state is not finite.

    It starts with a hundredth of the interval, lets `dtmin` end the solve, and counts the steps
    tried before the first accepted one.
    """

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        end, state = super().init(terms, t0, t1, y0, 0.01 * (t1 - t0), args, func, error_order)
        return end, (state, _Fresh(jnp.asarray(True), jnp.asarray(0, jnp.int32)))

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        state, fresh = controller_state
        clean = lambda y: jnp.where(jnp.isfinite(y), y, 0)  # noqa: E731
        error = jax.tree.map(
            lambda e, y: jnp.where(jnp.isfinite(e) & jnp.isfinite(y), e, jnp.inf),
            y_error,
            y1_candidate,
        )
        y0, y1 = jax.tree.map(clean, (y0, y1_candidate))
        keep, t0, t1, jump, state, result = super().adapt_step_size(
            t0, t1, y0, y1, args, error, error_order, state
        )
        fresh = _Fresh(fresh.now & ~keep, fresh.steps + fresh.now.astype(jnp.int32))
        return keep, t0, t1, jump, (state, fresh), result


def count_evaluations(solver, steps, fresh):
    """Evaluations in `steps` steps, `fresh` of which were tried before any was accepted.

    A solver says it itself in a method evaluations(steps), as those of jflow do. First-same-as-last
    methods reuse the last stage of the accepted step before. It is known for explicit Runge-Kutta
    methods and the one-evaluation methods of diffrax; -1 for others.
    """
    solver = getattr(solver, "projected", solver)
    if hasattr(solver, "evaluations"):
        return solver.evaluations(steps)
    if isinstance(
        solver, diffrax.AbstractWrappedSolver
    ):  # which passes for the solver that it wraps
        return -1
    if isinstance(solver, diffrax.Euler | diffrax.LeapfrogMidpoint):
        return steps
    if isinstance(solver, diffrax.ReversibleHeun):
        return steps + 1
    if isinstance(solver, diffrax.AbstractERK):
        tableau = solver.tableau
        return tableau.num_stages * steps - int(tableau.fsal) * (steps - fresh)
    return -1
