"""Samples by a velocity and a refiner of it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.arrays import float_dtype, halves, joined
from jflow._core.checks import check_cond, check_whole, count_rows, like_state, rows
from jflow._core.times import Times, rising_times
from jflow.solvers._integrate import SolveInfo
from jflow.solvers._parts import sampler_result
from jflow.types import Array, Cond, Field, Params, Velocity


def refiner(velocity: Velocity) -> Field:
    """A refiner of velocities, from a network of the state and the velocity joined.

    The refiner R((x, v), t) is shaped like x. The network gets x and v joined along the last axis
    of the event, [b, ..., 2 c] (of a scalar event [b, 2]), and the first half of its output is
    read. Any other `Field` of the pair (x, v) will do.

    Args:
        velocity: the network, whose output is shaped like its input.

    Returns:
        Field: R, of the pair (x, v) [b, *event] each, with the params of `velocity`. It raises a
            ValueError for x and v of different shapes.
    """

    def join(pair):
        x, v = pair
        return joined(x, like_state("refiner", v, x))

    def init(key, x, t, cond=None):
        return velocity.init(key, join(x), t, cond)

    def apply(params, x, t, cond=None, *, key=None):
        return halves(velocity.apply(params, join(x), t, cond, key=key), x[0])[0]

    return Field(init, apply)


def sample_refined(
    velocity: Velocity,
    params: Params,
    refiner: Field,
    refiner_params: Params,
    x0: Float[Array, "b *event"],
    cond: Cond = None,
    *,
    heun: int = 1,
    pseudo: int = 5,
    refine: int = 3,
    grid: Times | ArrayLike | None = None,
) -> tuple[Float[Array, "b *event"], SolveInfo]:
    """Sample a velocity by Heun steps, pseudo corrector steps and refined steps, in this order.

    With h = t' - t, all of them are x <- x + h (a + b) / 2, where

        heun    a = v(x, t),              b = v(x + h a, t')
        pseudo  a = b of the step before, b = v(x + h a, t')      (`solvers.pseudo_corrector`)
        refine  a = V + R((x, V), t),     b = a + R((x + h a, a), t')

    and V is the latest velocity: b of a heun or pseudo step, a of a refine step, as in the code of
    the paper. The paper writes H_heun P_pseudo R_refine; its first pseudo step evaluates both
    velocities anew, where here it takes b of Heun's.

    Args:
        velocity: the velocity v.
        params: its params.
        refiner: R, a field of the pair (x, v), such as `solvers.refiner(net)`.
        refiner_params: its params.
        x0: the source, [b, *event], at the first time.
        cond: the condition, [b, ...] or one row for all.
        heun: the number of Heun steps, at least 1.
        pseudo: the number of pseudo corrector steps.
        refine: the number of refined steps.
        grid: rising times [heun + pseudo + refine + 1] in [0, 1]; None: equal steps from 0 to 1.

    Returns:
        x1: the samples, [b, *event], in the type of x0; rows that are not finite are NaN.
        info: evaluations [b] of the velocity, 2 heun + pseudo (the refiner has 2 refine of its
            own), and status [b] (`solvers.Status`).

    Raises:
        ValueError: unless heun >= 1, pseudo >= 0 and refine >= 0, and for a grid of another length
            or that does not rise.

    References:
        Zhao, Shi, Yu, Zhou, Lu, *FlowTurbo: Towards Real-time Flow-Based Image Generation with
            Velocity Refiner*, 2024, arXiv:2409.18128.
    """
    check_whole("sample_refined", heun=heun)
    check_whole("sample_refined", 0, pseudo=pseudo, refine=refine)
    total = heun + pseudo + refine
    times = rising_times("sample_refined", total if grid is None else grid)
    if np.shape(times)[0] != total + 1:
        raise ValueError(
            f"sample_refined: expected a grid of {total + 1} times, got {np.shape(times)[0]}"
        )
    n = count_rows("sample_refined", x0)
    cond = check_cond("sample_refined", cond, n)
    x = jnp.asarray(x0, float_dtype(x0))
    times = jnp.asarray(times, x.dtype)

    def at(x, t):
        return like_state("sample_refined", velocity.apply(params, x, rows(t, n), cond), x)

    def refined(x, v, t):
        return v + like_state(
            "sample_refined", refiner.apply(refiner_params, (x, v), rows(t, n), cond), x
        )

    def step(first, second, keep):
        def run(state, ends):
            (x, v), (t, t_next) = state, ends
            a = first(x, v, t)
            b = second(x + (t_next - t) * a, a, t_next)
            return (x + (t_next - t) / 2 * (a + b), keep(a, b)), None

        return run

    anew, known = lambda x, v, t: at(x, t), lambda x, v, t: v
    kinds = (
        (heun, step(anew, anew, lambda a, b: b)),
        (pseudo, step(known, anew, lambda a, b: b)),
        (refine, step(refined, refined, lambda a, b: a)),
    )
    state, start = (x, jnp.zeros_like(x)), 0
    for count, run in kinds:
        ends = times[start : start + count + 1]
        state, _ = jax.lax.scan(run, state, (ends[:-1], ends[1:]))
        start += count
    x = state[0]
    return sampler_result(x, 2 * heun + pseudo, x0)
