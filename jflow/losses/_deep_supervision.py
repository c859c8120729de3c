"""Deep supervision of a velocity network with branches."""

import jax
import jax.numpy as jnp
import numpy as np

from jflow import times
from jflow._core.arrays import expand_to, float_dtype
from jflow._core.batch import mean_of_rows
from jflow.losses._pairs import draw_pairs
from jflow.types import Field, Loss, Time

__all__ = ["deep_supervision"]

_UNIFORM = times.uniform()


def deep_supervision(
    field: Field,
    branches: int,
    *,
    time: Time = _UNIFORM,
    gap: float = 0.1,
    early: float = 0.2,
    acceleration: float = 1.0,
) -> Loss:
    """Flow matching on the linear path for every branch of `nets.DeepFlow`, and its accelerations.

    Each branch has a time of its own. The last branch is at t_k ~ time, each before it within `gap`
    of the one after (uniformly, clipped to [0, 1]); all are on the line of one pair. With v_j and
    a_j what branch j predicts at x_j = (1 - t_j) x0 + t_j x1, u = x1 - x0 and h = 1 - t_j, the loss
    is the mean over the event, then over rows, of

        (v_k - u)^2 + early sum_{j<k} (v_j - u)^2
            + acceleration sum_{j<k} (x_j + h v_j + h^2 a_j / 2 - x1)^2,

    the last term the second-order expansion of the motion from x_j to the data, where v_j is not
    differentiated. On trajectories of constant acceleration it is 0 for the true v and a. On
    independent pairs the best a_j given v_j is 2 (E[u | x_j] - v_j) / h, what the branch left to
    do: zero for a perfect branch (derived).

    Args:
        field: `nets.branch_field(DeepFlow(branches=branches))`, or any field that takes x [b,
            branches, *event] and t [b, branches] and returns velocity [b, branches, *event] and
            acceleration [b, branches - 1, *event].
        branches: The number of branches, at least 2.
        time: The law of the times, (key, n) -> t [n].
        gap: The largest distance in time between a branch and the next, in [0, 1].
        early: The weight of the velocities of all branches but the last, not negative.
        acceleration: The weight of the accelerations, not negative.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. Its metrics are 'branches' [branches], the velocity error of each, and
        'acceleration'.

    Raises:
        ValueError: At construction for fewer than 2 branches, a gap outside [0, 1] and a negative
            weight; at trace time for a field that does not fit, a batch without 'x' or with unknown
            keys, and a key that is None.

    References:
        Shin, Yang, Chen, *Deeply Supervised Flow-Based Generative Models*, 2025, arXiv:2503.14494
            (supervised branches with a smaller weight (0.2 early), times of their own within a
            bounded gap, and a second-order reconstruction of the data). The law of the gaps, the
            weight of the last term and the stopped gradient are this function's reading.
    """
    if branches < 2:
        raise ValueError(f"deep_supervision: expected at least 2 branches, got {branches}")
    if not 0 <= gap <= 1:
        raise ValueError(f"deep_supervision: expected gap in [0, 1], got {gap}")
    if not (early >= 0 and acceleration >= 0):
        raise ValueError(
            f"deep_supervision: expected weights >= 0, got early={early}, "
            f"acceleration={acceleration}"
        )
    shares = np.array([[early] * (branches - 1) + [1.0]])

    def loss(params, key, batch, frozen=None):
        pairs = draw_pairs("deep_supervision", key, batch, time)
        dtype, n = pairs.x1.dtype, pairs.x1.shape[0]
        x0, x1 = (v.astype(float_dtype(v)) for v in (pairs.x0, pairs.x1))

        def before(t, jump):
            t = jnp.clip(t + jump, 0, 1)
            return t, t

        jumps = jax.random.uniform(pairs.path_key, (branches - 1, n), x1.dtype, -gap, gap)
        _, earlier = jax.lax.scan(before, pairs.t, jumps)
        t = jnp.concatenate([earlier[::-1], pairs.t[None]]).T
        u, x1 = (x1 - x0)[:, None], x1[:, None]
        x = x1 - expand_to(1 - t, u) * u
        found = field.apply(params, x.astype(dtype), t, pairs.cond, key=pairs.dropout_key)
        v, a = (f.astype(x1.dtype) for f in found)
        for name, value, count in (("velocity", v, branches), ("acceleration", a, branches - 1)):
            if value.shape != (n, count, *u.shape[2:]):
                raise ValueError(
                    f"deep_supervision: expected {name} of shape {[n, count, *u.shape[2:]]}, "
                    f"got {list(value.shape)}"
                )
        errors = _event_mean(v - u)
        h = expand_to(1 - t[:, :-1], a)
        missed = x[:, :-1] + h * jax.lax.stop_gradient(v[:, :-1]) + 0.5 * h**2 * a - x1
        accelerations = jnp.sum(_event_mean(missed), axis=1)
        per_row = (
            jnp.sum(jnp.asarray(shares, errors.dtype) * errors, axis=1)
            + acceleration * accelerations
        )
        return mean_of_rows(per_row, pairs.weight), {
            "branches": mean_of_rows(errors, pairs.weight),
            "acceleration": mean_of_rows(accelerations, pairs.weight),
        }

    return loss


def _event_mean(error):
    """[b, k, *event] -> [b, k]: the mean square over the event."""
    return jnp.mean(jnp.square(error), axis=tuple(range(2, error.ndim)))
