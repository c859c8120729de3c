"""FlowTurbo: the last steps of a solve by a small network that corrects the velocity of the step before.

    refiner = refines(jflow.velocity(nets.ResidualMLP(32, 1)))      # much smaller than the velocity
    loss = velocity_refiner(refiner, velocity)                      # frozen={"teacher": params of the velocity}
    small = refiner.init(key, (x, x), t)                            # at first it corrects nothing
    ... make_step, fit ...
    x1, info = refined_sample(velocity, params, refiner, small, x0, heun=1, pseudo=4, refine=3)

The paper's observation is that along a trained flow the velocity becomes stable, so that its change is simpler than itself.

Source: Zhao, Shi, Yu, Zhou, Lu, "FlowTurbo: Towards Real-time Flow-Based Image Generation with Velocity Refiner", 2024
(what is said below of its code: shiml20/FlowTurbo). Its compilation by sample is `jax.jit` here.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jflow import couplings, paths
from jflow._util import check_cond, count_rows, expand_to, float_dtype, mean_event
from jflow.fewstep._parts import finished, halves, joined, needed
from jflow.fewstep.flow_maps import check_pairs
from jflow.fields import like_state, rows
from jflow.losses._batch import mean_of_rows
from jflow.losses._pairs import draw_pairs
from jflow.solvers._integrate import SolveInfo, rising_times
from jflow.types import Array, Cond, Coupling, Field, Loss, Params, Path, TimePair, Velocity

__all__ = ["nearby", "refined_sample", "refines", "velocity_refiner"]

_LINEAR, _INDEPENDENT = paths.linear(), couplings.independent()


def refines(velocity: Velocity) -> Field:
    """A refiner, R((x, v), t) shaped like x, from a network of x and v joined along the last axis of the event, [b, ..., 2 c]
    (of a scalar event [b, 2]): the first half of its output is read.

    Any other `Field` of the pair (x, v) will do. Errors: ValueError at trace time for x and v of different shapes."""

    def join(pair):
        x, v = pair
        return joined(x, like_state("refines", v, x))

    def init(key, x, t, cond=None):
        return velocity.init(key, join(x), t, cond)

    def apply(params, x, t, cond=None, *, key=None):
        return halves(velocity.apply(params, join(x), t, cond, key=key), x[0])[0]

    return Field(init, apply)


def nearby(reach: float = 0.12) -> TimePair:
    """(t, r): t uniform on [0, 1], r - t uniform on [0, reach], r at most 1: (key, n) -> (t, r).

    0.12 is what the paper's code draws, one number a batch there, and there r may pass 1. reach should cover the steps of the
    grid that is sampled with. Errors: ValueError unless 0 < reach <= 1."""
    if not 0 < reach <= 1:
        raise ValueError(f"nearby: expected 0 < reach <= 1, got {reach}")

    def draw(key, n):
        first, second = jax.random.split(key)
        t = jax.random.uniform(first, (n,))
        return t, jnp.minimum(t + reach * jax.random.uniform(second, (n,)), 1)

    return draw


_NEARBY = nearby()


def velocity_refiner(
    refiner: Field,
    teacher: Velocity,
    *,
    times: TimePair = _NEARBY,
    path: Path = _LINEAR,
    coupling: Coupling = _INDEPENDENT,
) -> Loss:
    """Trains R so that V + R((x, V), r) is the teacher's velocity at (x, r), V its velocity one Euler step before:

        V = v(x_t, t),   x = x_t + (r - t) V,   the mean over the event of (V + R((x, V), r) - v(x, r))^2,

    x_t on the path between source and data. Two evaluations of the teacher a row, none differentiated.
    frozen: {'teacher'}, the teacher's params. batch: 'x' [b, *event], optionally 'x0', 'cond', 'weight', as in
    `losses.flow_matching`. metrics: 'residual', the loss. A guided teacher is a teacher like any other.
    Errors: ValueError for times that don't satisfy 0 <= t <= r <= 1, a refiner whose output is not shaped like x, no
    frozen['teacher'], and as `losses.flow_matching`.
    Source: see the module.
    """
    check_pairs("velocity_refiner", times)

    def loss(params, key, batch, frozen=None):
        pairs = draw_pairs("velocity_refiner", key, batch, times, coupling, 0.0, None)
        x0, x1, cond, weight, (t, r), path_key, dropout_key = pairs
        known = needed("velocity_refiner", frozen)
        x_t = path.point(x0, x1, t, key=path_key).astype(x1.dtype)
        v = like_state("velocity_refiner", teacher.apply(known, x_t, t, cond), x_t)
        x = x_t + expand_to((r - t).astype(x_t.dtype), x_t) * v
        target = like_state("velocity_refiner", teacher.apply(known, x, r, cond), x)
        offset = like_state("velocity_refiner", refiner.apply(params, (x, v), r, cond, key=dropout_key), x)
        dtype = float_dtype(x1)
        error = v.astype(dtype) + offset.astype(dtype) - target.astype(dtype)
        value = mean_of_rows(mean_event(jnp.square(error)), weight)
        return value, {"residual": value}

    return loss


def refined_sample(
    velocity: Velocity,
    params: Params,
    refiner: Field,
    refiner_params: Params,
    x0: Array,
    cond: Cond = None,
    *,
    heun: int = 1,
    pseudo: int = 5,
    refine: int = 3,
    grid: ArrayLike | None = None,
) -> tuple[Array, SolveInfo]:
    """Carry x0 [b, *event] from t=0 to t=1 by so many steps of three kinds, in this order; returns (x1, info).

        heun    a = v(x, t),              b = v(x + h a, t')
        pseudo  a = b of the step before, b = v(x + h a, t')                 (`solvers.pseudo_corrector`)
        refine  a = V + R((x, V), t),     b = a + R((x + h a, a), t')        V: the latest velocity: b of a heun or pseudo
                                                                             step, a of a refine step, as in the paper's code
    and x <- x + h (a + b) / 2 in all of them. The paper writes H_heun P_pseudo R_refine; its first pseudo step evaluates
    both velocities anew, where here it takes b of Heun's.
    grid: rising times [heun + pseudo + refine + 1] in [0, 1]; equal steps where not given.
    info: evaluations [b] of the velocity, 2 heun + pseudo (the refiner has 2 refine of its own), status [b]
    (`solvers.Status`); rows that are not finite are NaN.
    Errors: ValueError unless heun >= 1, pseudo >= 0, refine >= 0, and for a grid of another length or that does not rise.
    Source: see the module.
    """
    counts = {"heun": heun, "pseudo": pseudo, "refine": refine}
    if any(isinstance(c, bool) or int(c) != c or c < (name == "heun") for name, c in counts.items()):
        raise ValueError(f"refined_sample: expected whole numbers, heun >= 1, pseudo >= 0, refine >= 0, got {counts}")
    total = heun + pseudo + refine
    times = rising_times("refined_sample", total if grid is None else grid)
    if np.shape(times)[0] != total + 1:
        raise ValueError(f"refined_sample: expected a grid of {total + 1} times, got {np.shape(times)[0]}")
    n = count_rows("refined_sample", x0)
    cond = check_cond("refined_sample", cond, n)
    x = jnp.asarray(x0, float_dtype(x0))
    times = jnp.asarray(times, x.dtype)

    def at(x, t):
        return like_state("refined_sample", velocity.apply(params, x, rows(t, n), cond), x)

    def refined(x, v, t):
        return v + like_state("refined_sample", refiner.apply(refiner_params, (x, v), rows(t, n), cond), x)

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
    return finished(x, 2 * heun + pseudo, x0)
