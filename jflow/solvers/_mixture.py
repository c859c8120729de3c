"""Solvers for fields that predict Gaussian mixtures.

Between two evaluations they follow the mixture's own field.
"""

import functools

import diffrax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.arrays import expand_to, float_dtype, mean_event
from jflow._core.checks import check_cond, check_whole, need_key, rows
from jflow._core.times import Times, rising_times
from jflow.distributions import mixtures
from jflow.paths import LINEAR, Schedule
from jflow.solvers._integrate import SolveInfo, Status, leave_out_failed
from jflow.solvers._method import on_grid
from jflow.solvers._sample import sample
from jflow.types import Array, Cond, Field, Params, Step, Velocity

__all__ = ["gm_ode", "gm_sde"]

_HEUN = diffrax.Heun()


def gm_sde(field: Field, *, schedule: Schedule = LINEAR) -> Step:
    """The reverse transition of a predicted Gaussian mixture, as a stochastic step of any size.

    x_next is drawn from the transition of the mixture. With the exact mixture every step is exact,
    also the one from noise to data. x_next = mean + std noise, in float32 or better, with the mean
    [b, *event] of the components drawn (one a site) and their std [b]: given them it is Gaussian,
    but the transition is a mixture, whose log-density is `distributions.mixtures.log_prob` of
    `distributions.mixtures.reverse_transition`.

    Args:
        field: a field of `distributions.mixtures.GaussianMixture`s of the velocity.
        schedule: the path of the field; the default is the linear one.

    Returns:
        Step: (params, x, t, t_next, key, cond=None) -> (x_next, mean, std), for
            `solvers.sample_sde`. It needs a key, so that `trajectory_log_prob` refuses it.

    References:
        Chen et al., *Gaussian Mixture Flow Matching Models*, 2025, arXiv:2504.05304 (GM-SDE).
    """

    def step(params, x, t, t_next, key, cond=None):
        need_key("gm_sde", key)
        t, t_next = (rows(v, x.shape[0]).astype(float_dtype(x)) for v in (t, t_next))
        found = mixtures.check_mixture("gm_sde", field.apply(params, x, t, cond), x)
        return mixtures.sample(
            mixtures.reverse_transition(found, x.astype(t.dtype), t, t_next, schedule), key
        )

    return step


def gm_ode(
    field: Field,
    params: Params,
    x0: Float[Array, "b *event"],
    cond: Cond = None,
    *,
    steps: int | None = None,
    grid: Times | ArrayLike | None = None,
    substeps: int = 8,
    order: int = 1,
    floor: float = 0.005,
    solver: diffrax.AbstractSolver = _HEUN,
    schedule: Schedule = LINEAR,
) -> tuple[Float[Array, "b *event"], SolveInfo]:
    """Sample a field of Gaussian mixtures along its ODE, with one evaluation a step.

    Over a step the posterior of x1 predicted at its start is carried along by Bayes' rule
    (`distributions.mixtures.carried_velocity`), and the velocity it implies, finite up to t = 1, is
    integrated with `substeps` steps of a diffrax solver (the paper's is Euler), which cost no
    evaluation of the field. With the exact mixture one step solves the ODE to their accuracy.

    Order 2 shifts the mean of the posterior by half of the difference between the evaluation at
    hand and the previous one carried here, times the ratio of the two steps, since the error of a
    carried posterior grows with the time. The shift is a product with a ratio of Gaussians, as in
    `guidance.probabilistic_guidance`. The rescaling of the difference under guidance in the paper
    is not included.

    Args:
        field: a field of `distributions.mixtures.GaussianMixture`s of the velocity.
        params: its params.
        x0: noise, [b, *event].
        cond: the condition, [b, ...] or one row for all.
        steps: the number of equal steps; 8 where neither steps nor grid is given.
        grid: rising times [n + 1] from 0 instead.
        substeps: steps of the solver within a step, at least 1.
        order: 1 or 2.
        floor: for order 2, how much noise of the evaluations the difference is charged with: it is
            scaled by sqrt(max(0, 1 - floor variance / step^2)), with the variance that of x1 given
            x. 0 trusts it; 0.005 is the published value.
        solver: the diffrax solver within a step.
        schedule: the path of the field; the default is the linear one.

    Returns:
        x1: the samples, [b, *event], in the type of x0; the rows that are not finite are NaN.
        info: evaluations [b] of the field and status [b], see `SolveInfo`.

    Raises:
        ValueError: steps and grid are given together, or bad ones, or order is not 1 or 2, substeps
            is below 1, floor is negative; and as in `solvers.sample`.

    References:
        Chen et al., *Gaussian Mixture Flow Matching Models*, 2025, arXiv:2504.05304 (GM-ODE, and
            its second order).
    """
    if steps is not None and grid is not None:
        raise ValueError("gm_ode: expected one of steps, grid, got both")
    grid = rising_times("gm_ode", (8 if steps is None else steps) if grid is None else grid)
    if order not in (1, 2):
        raise ValueError(f"gm_ode: expected order 1 or 2, got {order}")
    check_whole("gm_ode", substeps=substeps)
    if not floor >= 0:
        raise ValueError(f"gm_ode: expected floor >= 0, got {floor}")
    n = x0.shape[0]
    cond = check_cond("gm_ode", cond, n)
    dtype = float_dtype(x0)
    grid = jnp.asarray(grid, dtype)
    posterior = Velocity(lambda key, x, t, cond=None: {}, functools.partial(_carried, schedule))

    def evaluate(params, cond, x, t):
        found = mixtures.check_mixture(
            "gm_ode", field.apply(params, x.astype(x0.dtype), rows(t, n), cond), x
        )
        return mixtures.velocity_to_data(found, x, t, schedule)

    def advance(x1, x, t, t_next):
        fine = (t + (t_next - t) * jnp.linspace(0, 1, substeps + 1, dtype=dtype)).at[-1].set(t_next)
        y, info = sample(posterior, (x1, x, rows(t, n)), x, method=on_grid(fine, solver))
        return y, info.status

    def corrected(x1, x, t, t_next, last):
        before, x_before, t_before = last
        v, h = mixtures.variance(x1), jnp.where(t > grid[0], t - t_before, 1)
        seen = mixtures.mean(mixtures.carried(before, x_before, t_before, x, t, schedule))
        trust = jnp.sqrt(jnp.maximum(0, 1 - floor * v / h**2))
        bias = expand_to(0.5 * (t_next - t) / h * trust, x) * (mixtures.mean(x1) - seen)
        bias = jnp.where(t > grid[0], bias, 0)  # the first step has nothing to be corrected by
        power = mean_event(jnp.square(bias))
        # no Gaussian lies farther than a standard deviation
        shrink = jnp.sqrt(jnp.minimum(1, _MOST * v / jnp.maximum(power, jnp.finfo(dtype).tiny)))
        return mixtures.shifted(x1, expand_to(shrink, x) * bias)

    def run(params, rows):
        x, cond = rows

        def step(carry, ends):
            x, last = carry
            t, t_next = ends
            x1 = evaluate(params, cond, x, t)
            y, status = advance(
                x1 if order == 1 else corrected(x1, x, t, t_next, last), x, t, t_next
            )
            return (y, None if order == 1 else (x1, x, t)), status

        last = None
        if order == 2:
            nothing = lambda v: jnp.zeros_like(x, shape=v.shape, dtype=v.dtype)  # noqa: E731
            last = (
                jax.tree.map(nothing, jax.eval_shape(evaluate, params, cond, x, grid[0])),
                x,
                grid[0],
            )
        (x, _), status = jax.lax.scan(step, (x, last), (grid[:-1], grid[1:]))
        status = jnp.max(status, axis=0)
        return (x, status), status == Status.OK

    x, status = leave_out_failed(run, params, (x0.astype(dtype), cond))
    return x.astype(x0.dtype), SolveInfo(jnp.full((n,), grid.shape[0] - 1, jnp.int32), status)


_MOST = 0.99


def _carried(schedule, params, x, t, cond=None, *, key=None):
    x1, at, since = params
    return mixtures.carried_velocity(x1, at, since, x, t, schedule)
