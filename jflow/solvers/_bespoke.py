"""Bespoke solvers: Euler's or the midpoint method in a scale and a time of their own.

They are fitted to one trained velocity.

    theta = bespoke_params(5)  # midpoint, 5 steps: 39 numbers, at first plain midpoint
    loss = bespoke_bound(velocity, knots)  # or bespoke_error(velocity)
    state = train.init_state(theta, optimizer, key, frozen={"teacher": params})
    ... trained on batches of data.read_shards(folder),
        by data.generate_reflow_trajectories at the knots (or _pairs) ...
    x1, info = bespoke_sample(theta, velocity, params, x0)  # 10 evaluations

Along x(t), dx/dt = u(x, t), a time t(r) and a scale s(r) on 0 <= r <= 1 make another curve, whose
end is s(1) x(1):

    y(r) = s(r) x(t(r)),    dy/dr = (s' / s) y + t' s u(y / s, t),    t(0) = 0, t(1) = 1, s(0) = 1

(primes for d/dr), and the method takes n equal steps along y. It only ever asks for t, t', s, s'
where it evaluates u: those numbers are theta. Any theta is read off some smooth t and s, and along
smooth t and s the method keeps its order: with n it converges to the flow of u. `paths.reschedule`
is the continuous form: a change of the schedule of the path is such a pair.

theta is {'times' [m - 1], 'speeds' [m], 'scales' [m], 'growths' [m]}, m = n for Euler and 2 n for
midpoint, 4 m - 1 numbers as in the paper: with r_k = k / m,

    t(r_k) = sum of the first k of softmax(0, times)    t'(r_k) = exp(speeds_k)
    s(r_k) = exp(scales_{k-1}), k = 1 ... m             s'(r_k) = growths_k

(how the constraints are met is ours). All zeros is the plain method.

References:
    Shaul, Perez, Chen, Thabet, Pumarola, Lipman, *Bespoke Solvers for Generative Flow Models*,
        2024, arXiv:2310.19075.
"""

from collections.abc import Callable
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jflow import solvers
from jflow._core.arrays import expand_to, float_dtype, mean_event
from jflow._core.batch import mean_of_rows, read_batch
from jflow._core.checks import (
    check_cond,
    check_whole,
    frozen_entry,
    like_state,
    need_pairs,
    rows,
    with_checked_output,
)
from jflow._core.times import Times, partition
from jflow.solvers._integrate import SolveInfo
from jflow.types import Array, Cond, Loss, Params, Velocity

__all__ = ["bespoke_bound", "bespoke_error", "bespoke_params", "bespoke_sample"]

_MIDPOINT = diffrax.Midpoint()


def bespoke_params(
    steps: int,
    *,
    solver: diffrax.AbstractSolver = _MIDPOINT,
    time: Callable[[Array], Array] | None = None,
    scale: Callable[[Array], Array] | None = None,
) -> Params:
    """The parameters of a bespoke solver, at first those of the plain method.

    A step takes one evaluation for diffrax.Euler(), two for diffrax.Midpoint().

    Args:
        steps: the number n of steps, at least 1.
        solver: diffrax.Euler() or diffrax.Midpoint(), the default.
        time: a function r [] -> t(r) [] to start from; None is t(r) = r.
        scale: a function r [] -> s(r) [] to start from; None is s = 1.

    Returns:
        Params: theta, {'times' [m - 1], 'speeds' [m], 'scales' [m], 'growths' [m]}, with m = n for
            Euler and 2 n for midpoint.

    Raises:
        ValueError: solver is another one, steps is below 1, or the functions do not meet t(0) = 0,
            t(1) = 1, s(0) = 1, t' > 0, s > 0.

    Examples:
        >>> from jflow import solvers
        >>> theta = solvers.bespoke_params(5)
        >>> {name: value.shape for name, value in theta.items()}
        {'times': (9,), 'speeds': (10,), 'scales': (10,), 'growths': (10,)}

    References:
        Shaul, Perez, Chen, Thabet, Pumarola, Lipman, *Bespoke Solvers for Generative Flow Models*,
            2024, arXiv:2310.19075.
    """
    check_whole("bespoke_params", steps=steps)
    m = int(steps) * _stages("bespoke_params", solver)
    dtype = float_dtype(jnp.zeros(()))
    r = jnp.arange(m + 1, dtype=dtype) / m
    one = jnp.ones((), dtype)
    slope = lambda f: jax.vmap(lambda r: jax.jvp(f, (r,), (one,)))(r)  # noqa: E731
    t, dt = slope(lambda r: r if time is None else time(r))
    s, ds = slope(lambda r: one if scale is None else scale(r))
    tolerance = 1e-4
    ends = np.abs(np.asarray([t[0], t[-1] - 1, s[0] - 1]))
    if not (
        np.all(ends < tolerance)
        and np.all(np.diff(t) > 0)
        and np.all(dt[:-1] > 0)
        and np.all(s > 0)
    ):
        raise ValueError(
            "bespoke_params: expected t(0) = 0, t(1) = 1, s(0) = 1, t' > 0 and s > 0, "
            f"got t from {t[0]} to {t[-1]}, s(0) = {s[0]}, least t' {dt[:-1].min()}, least "
            f"s {s.min()}"
        )
    gaps = jnp.diff(t)
    return {
        "times": jnp.log(gaps[1:] / gaps[0]),
        "speeds": jnp.log(dt[:-1]),
        "scales": jnp.log(s[1:]),
        "growths": ds[:-1],
    }


def bespoke_sample(
    params: Params,
    velocity: Velocity,
    velocity_params: Params,
    x0: Float[Array, "b *event"],
    cond: Cond = None,
    *,
    solver: diffrax.AbstractSolver = _MIDPOINT,
) -> tuple[Float[Array, "b *event"], SolveInfo]:
    """Sample a velocity from t=0 to t=1 by a bespoke solver.

    The number of steps is read from the shapes of theta.

    Args:
        params: theta, see `bespoke_params`.
        velocity: the velocity that theta was fitted to.
        velocity_params: its params.
        x0: the source, [b, *event].
        cond: the condition of the velocity, [b, ...].
        solver: the method that theta was made for, diffrax.Euler() or diffrax.Midpoint(), the
            default.

    Returns:
        x1: the samples, [b, *event]; the rows of a failed solve are NaN.
        info: evaluations [b] and status [b], see `SolveInfo`.

    Raises:
        ValueError: theta has other shapes, or solver is another one.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import solvers
        >>> from jflow.types import Velocity
        >>> velocity = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: x)
        >>> theta = solvers.bespoke_params(1)  # plain midpoint: 1 + 1 + 1 / 2
        >>> x1, info = solvers.bespoke_sample(theta, velocity, {}, jnp.ones((1, 1)))
        >>> x1.tolist(), info.evaluations.tolist()
        ([[2.5]], [2])

    References:
        Shaul, Perez, Chen, Thabet, Pumarola, Lipman, *Bespoke Solvers for Generative Flow Models*,
            2024, arXiv:2310.19075.
    """
    steps = _steps("bespoke_sample", params, solver)
    given = {"solver": params, "velocity": velocity_params}
    y, info = solvers.sample(_bent(velocity), given, x0, cond, method=solvers.fixed(steps, solver))
    return (y / _read(params).s[-1]).astype(y.dtype), info


def bespoke_bound(
    teacher: Velocity,
    knots: Times,
    *,
    solver: diffrax.AbstractSolver = _MIDPOINT,
    lipschitz: float = 1.0,
) -> Loss:
    """The loss that fits a bespoke solver by a bound of its error, step by step.

    With x_i the exact solution at t_i = t(i / n), d_i the root of the mean over the event of (x_i -
    step(x_{i-1}))^2, and L_j the Lipschitz constant of step j, the error of a row is at most

        sum_i M_i d_i,      M_i = product of L_j over j > i,

    which is the loss, averaged over rows. With h = 1 / n, and L(r) = |s'| / s + t' lipschitz,

        Euler       L_j = (s_{j-1} / s_j) (1 + h L(r_{j-1}))
        midpoint    L_j = (s_{j-1} / s_j) (1 + h L(r_{j-1/2}) (1 + h L(r_{j-1}) / 2))

    Between knots x is the cubic through the states and velocities at both sides: its error is
    O(gap^4), and t_i learns through it. (The paper solves the ODE anew and extends x_i along u.) It
    takes 4 n + 2 evaluations a row with midpoint, 3 n + 2 with Euler.

    Args:
        teacher: the velocity u.
        knots: times [K + 1] that rise strictly from 0 to 1, at which the trajectories are known.
        solver: the method, diffrax.Euler() or diffrax.Midpoint(), the default.
        lipschitz: the Lipschitz constant of u in x, at least 0. The paper sets 1, where it is a
            weight rather than a bound.

    Returns:
        Loss: its params are a theta (`bespoke_params`); frozen: {'teacher'}, the params of the
            velocity; batch: 'x' trajectories [b, K + 1, *event] at the knots, rows of
            `data.generate_reflow_trajectories`, optionally 'cond', 'weight'. The key is not used.
            Metrics: 'residual', the mean of d_i^2. It raises a ValueError for a batch or a theta of
            other shapes and for frozen without 'teacher'.

    Raises:
        ValueError: knots do not rise strictly from 0 to 1, solver is another one, or lipschitz is
            negative.

    References:
        Shaul, Perez, Chen, Thabet, Pumarola, Lipman, *Bespoke Solvers for Generative Flow Models*,
            2024, arXiv:2310.19075.
    """
    times = partition("bespoke_bound", knots)
    stages = _stages("bespoke_bound", solver)
    if not lipschitz >= 0:
        raise ValueError(f"bespoke_bound: expected lipschitz >= 0, got {lipschitz}")

    def loss(params, key, batch, frozen=None):
        x, cond, weight = read_batch("bespoke_bound", batch, ("x", "cond", "weight"))
        if x.ndim < 2 or x.shape[1] != len(times):
            raise ValueError(
                f"bespoke_bound: expected x of shape [b, {len(times)}, ...], got {list(x.shape)}"
            )
        n = _steps("bespoke_bound", params, solver)
        given = {"solver": params, "velocity": frozen_entry("bespoke_bound", frozen)}
        nodes, bent = _read(params), _bent(teacher)
        t, s = nodes.t[::stages], nodes.s[::stages]
        x = x.astype(float_dtype(x))
        states = jax.vmap(lambda t: _between(teacher, given["velocity"], x, times, t, cond))(t)

        def step(start, s, s_next, ends):
            return (
                solvers.sample(bent, given, s * start, cond, method=solvers.on_grid(ends, solver))[
                    0
                ]
                / s_next
            )

        r = jnp.arange(n + 1, dtype=t.dtype) / n
        reached = jax.vmap(step)(states[:-1], s[:-1], s[1:], jnp.stack([r[:-1], r[1:]], axis=1))
        square = jax.vmap(mean_event)(jnp.square(reached - states[1:]))
        bound = jnp.sum(_weights(nodes, n, lipschitz)[:, None] * _root(square), axis=0)
        return mean_of_rows(bound, weight), {
            "residual": mean_of_rows(jnp.mean(square, axis=0), weight)
        }

    return loss


def bespoke_error(teacher: Velocity, *, solver: diffrax.AbstractSolver = _MIDPOINT) -> Loss:
    """The loss that fits a bespoke solver by its error itself, through all steps.

        mean over the event of (bespoke_sample(x0) - x)^2

    It is ours: the paper trains on `bespoke_bound`, whose steps are computed beside one another;
    here they follow one another, and their memory adds up.

    Args:
        teacher: the velocity u.
        solver: the method, diffrax.Euler() or diffrax.Midpoint(), the default.

    Returns:
        Loss: its params are a theta (`bespoke_params`); frozen: {'teacher'}, the params of the
            velocity; batch: 'x0' and 'x' [b, *event], pairs that the velocity connects
            (`data.generate_reflow_pairs`), optionally 'cond', 'weight'. The key is not used.
            Metrics: 'residual', the mean of the squared error. It raises a ValueError for a batch
            without 'x0', a theta of other shapes and for frozen without 'teacher'.

    Raises:
        ValueError: solver is another one.
    """
    _stages("bespoke_error", solver)
    teacher = with_checked_output("bespoke_error: teacher", teacher)

    def loss(params, key, batch, frozen=None):
        x, x0, cond, weight = read_batch("bespoke_error", batch, ("x", "x0", "cond", "weight"))
        need_pairs("bespoke_error", batch)
        velocity_params = frozen_entry("bespoke_error", frozen)
        x1, _ = bespoke_sample(
            params, teacher, velocity_params, x0.astype(float_dtype(x0)), cond, solver=solver
        )
        square = mean_event(jnp.square(x1 - x))
        value = mean_of_rows(square, weight)
        return value, {"residual": value}

    return loss


class _Nodes(NamedTuple):
    """At r = 0, 1 / m, ..., 1: t and s [m + 1]; their slopes [m], at all but the last."""

    t: Array
    dt: Array
    s: Array
    ds: Array


def _read(params) -> _Nodes:
    zero = jnp.zeros_like(params["times"], shape=(1,))
    gaps = jax.nn.softmax(jnp.concatenate([zero, params["times"]]))
    t = jnp.concatenate([zero, jnp.cumsum(gaps)[:-1], zero + 1])  # the ends are exact
    s = jnp.exp(jnp.concatenate([zero, params["scales"]]))
    return _Nodes(t, jnp.exp(params["speeds"]), s, params["growths"])


def _stages(name, solver) -> int:
    """Nodes of r that a step of the solver asks for."""
    for kind, stages in ((diffrax.Euler, 1), (diffrax.Midpoint, 2)):
        if type(solver) is kind:
            return stages
    raise ValueError(
        f"{name}: expected solver to be diffrax.Euler() or diffrax.Midpoint(), got {solver!r}"
    )


def _steps(name, params, solver) -> int:
    """The number of steps of a theta, after a check of its shapes."""
    shapes = {
        k: jnp.shape(params[k]) if k in params else None
        for k in ("times", "speeds", "scales", "growths")
    }
    m = (shapes["speeds"] or (0,))[0]
    stages = _stages(name, solver)
    if (
        m < 1
        or m % stages
        or shapes != {"times": (m - 1,), "speeds": (m,), "scales": (m,), "growths": (m,)}
    ):
        raise ValueError(
            f"{name}: expected 'times' [m - 1], 'speeds', 'scales' and 'growths' [m], m a "
            f"multiple of {stages} for "
            f"{type(solver).__name__}, got {shapes}"
        )
    return m // stages


def _bent(velocity) -> Velocity:
    """dy/dr at the nodes of a theta, with params {'solver': theta, 'velocity'}."""
    # a Partial of module functions, so that diffrax sees one object from call to call
    return Velocity(velocity.init, jax.tree_util.Partial(_slope, velocity.apply))


def _slope(apply, params, y, r, cond=None, *, key=None):
    nodes = _read(params["solver"])
    k = jnp.round(r * len(nodes.dt)).astype(jnp.int32)  # r is a node, up to rounding
    t, dt, s, ds = (a[k].astype(y.dtype) for a in nodes)
    u = like_state("velocity", apply(params["velocity"], y / expand_to(s, y), t, cond, key=key), y)
    return expand_to(ds / s, y) * y + expand_to(dt * s, y) * u


def _between(teacher, params, x, times, t, cond):
    """The solution at a time t [], [b, *event], from its states x [b, K + 1, *event]: the cubic
    that meets states and velocities at the knots around t.
    """
    cond = check_cond("bespoke_bound", cond, x.shape[0])
    knots = jnp.asarray(times, t.dtype)
    k = jnp.clip(jnp.searchsorted(knots, t, side="right") - 1, 0, len(times) - 2)
    gap = knots[k + 1] - knots[k]
    u = (t - knots[k]) / gap
    a, b = (jnp.take(x, i, axis=1) for i in (k, k + 1))
    va, vb = (
        like_state("teacher", teacher.apply(params, z, rows(knots[i], x.shape[0]), cond), z)
        for z, i in ((a, k), (b, k + 1))
    )
    states = (1 + 2 * u) * (1 - u) ** 2 * a + u**2 * (3 - 2 * u) * b
    return states + gap * u * (1 - u) * ((1 - u) * va - u * vb)


def _weights(nodes, n, lipschitz):
    """M_i of the steps i = 1 ... n."""
    h, stages = 1 / n, len(nodes.dt) // n
    rate = jnp.abs(nodes.ds) / nodes.s[:-1] + nodes.dt * lipschitz
    first, last = rate[::stages], rate[stages - 1 :: stages]
    growth = 1 + h * (first if stages == 1 else last * (1 + h / 2 * first))
    s = nodes.s[::stages]
    after = (growth * s[:-1] / s[1:])[1:]
    return jnp.concatenate([jnp.cumprod(after[::-1])[::-1], jnp.ones_like(s[:1])])


def _root(square):
    """The square root, with a derivative of 0 at 0."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
