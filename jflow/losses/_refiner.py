"""FlowTurbo: the last steps of a solve by a small network that corrects the velocity before.

    refiner = refines(jflow.velocity(nets.ResidualMLP(32, 1)))    # much smaller than the velocity
    loss = velocity_refiner(refiner, velocity)                    # frozen={"teacher": its params}
    small = refiner.init(key, (x, x), t)                          # at first it corrects nothing
    ... make_step, fit ...
    steps = {"heun": 1, "pseudo": 4, "refine": 3}
    x1, info = solvers.sample_refined(velocity, params, refiner, small, x0, **steps)

The paper's observation is that along a trained flow the velocity becomes stable, so that its change
is simpler than itself. The paper is Zhao, Shi, Yu, Zhou, Lu, *FlowTurbo: Towards Real-time
Flow-Based Image Generation with Velocity Refiner*, 2024 (what is said below of its code is of
shiml20/FlowTurbo). Its compilation by sample is `jax.jit` here.
"""

import jax.numpy as jnp

from jflow import paths
from jflow._core.arrays import expand_to, float_dtype, mean_event
from jflow._core.batch import mean_of_rows
from jflow._core.checks import frozen_entry, like_state
from jflow._core.times import check_pairs
from jflow.losses._pairs import draw_pairs
from jflow.times import nearby_pairs
from jflow.types import Field, Loss, Path, TimePair, Velocity

__all__ = ["velocity_refiner"]

_LINEAR = paths.linear()


_NEARBY = nearby_pairs()


def velocity_refiner(
    refiner: Field,
    teacher: Velocity,
    *,
    times: TimePair = _NEARBY,
    path: Path = _LINEAR,
) -> Loss:
    """Trains a small network that corrects the velocity of one Euler step before.

    The loss is the mean over the event, then over rows, of

        (V + R((x, V), r) - v(x, r))^2,     V = v(x_t, t),   x = x_t + (r - t) V,

    v the teacher, x_t on the path between source and data. It costs two evaluations of the teacher
    a row, none differentiated.

    Args:
        refiner: The network R, a field of ((x, V), r) whose output is shaped like x.
        teacher: The teacher v, guided or not, whose params are frozen['teacher'].
        times: The law of the pairs of times, (key, n) -> (t, r), t <= r.
        path: The path between source and data.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. Its metrics are {'residual'}, the loss.

    Raises:
        ValueError: At construction for times that don't satisfy 0 <= t <= r <= 1; at trace time for
            a refiner or a teacher whose output is not shaped like x, no frozen['teacher'], a batch
            without 'x' or with unknown keys, and a key that is None.

    References:
        Zhao, Shi, Yu, Zhou, Lu, *FlowTurbo: Towards Real-time Flow-Based Image Generation with
            Velocity Refiner*, 2024, arXiv:2409.18128.
    """
    check_pairs("velocity_refiner", times)

    def loss(params, key, batch, frozen=None):
        pairs = draw_pairs("velocity_refiner", key, batch, times)
        x0, x1, cond, weight, (t, r), path_key, dropout_key = pairs
        known = frozen_entry("velocity_refiner", frozen)
        x_t = path.point(x0, x1, t, key=path_key).astype(x1.dtype)
        v = like_state("velocity_refiner", teacher.apply(known, x_t, t, cond), x_t)
        x = x_t + expand_to((r - t).astype(x_t.dtype), x_t) * v
        target = like_state("velocity_refiner", teacher.apply(known, x, r, cond), x)
        offset = like_state(
            "velocity_refiner", refiner.apply(params, (x, v), r, cond, key=dropout_key), x
        )
        dtype = float_dtype(x1)
        error = v.astype(dtype) + offset.astype(dtype) - target.astype(dtype)
        value = mean_of_rows(mean_event(jnp.square(error)), weight)
        return value, {"residual": value}

    return loss
