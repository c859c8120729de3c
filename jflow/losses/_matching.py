"""Regression of a velocity on the path between source and data."""

from jflow import paths, times
from jflow._core.arrays import float_dtype
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_noun
from jflow._core.keys import same_draws
from jflow.losses._errors import Metric, mean_squared_error
from jflow.losses._pairs import draw_pairs
from jflow.types import Field, Loss, Path, Time, Velocity

__all__ = ["flow_matching"]

_LINEAR, _UNIFORM = paths.linear(), times.uniform()


def flow_matching(
    velocity: Velocity,
    *,
    path: Path = _LINEAR,
    time: Time = _UNIFORM,
    metric: Metric = mean_squared_error,
) -> Loss:
    """Conditional flow matching: the mean over the event of (velocity(x_t, t, cond) - target)^2, then over rows.

    batch: 'x' [b, *event] data; optionally 'x0' [b, *event] the source of each row (standard normal when absent), 'cond',
    and 'weight' [b] (weighted mean over rows, sum(w l) / sum(w)). The loss is a mean over event dimensions: it doesn't grow
    with the size of the event. Other pairs, dropped conditions and more come before it, by `losses.chain`.

    metric: another error of a row, (v, target, x_t, t) -> [b] (`pseudo_huber`, `perceptual_huber`, or your own).
    Errors: ValueError at trace time for a batch without 'x', with unknown keys or rows that don't match, and for key=None.
    Source: Lipman et al., "Flow Matching for Generative Modeling", 2023.
    """
    check_noun("flow_matching", velocity, Velocity, Field)

    def loss(params, key, batch, frozen=None):
        pairs = draw_pairs("flow_matching", key, batch, time)
        x0, x1, cond, weight, t, path_key, dropout_key = pairs
        x_t = path.point(x0, x1, t, key=path_key).astype(x1.dtype)
        target = path.target(x0, x1, t, key=same_draws(path_key))
        v = velocity.apply(params, x_t, t, cond, key=dropout_key)
        if v.shape != target.shape:
            raise ValueError(
                f"flow_matching: expected a velocity of shape {list(target.shape)}, got {list(v.shape)}"
            )
        error = metric(v.astype(float_dtype(x1)), target.astype(float_dtype(x1)), x_t, t)
        if error.shape != t.shape:
            raise ValueError(
                f"flow_matching: expected a metric of shape {list(t.shape)}, got {list(error.shape)}"
            )
        return mean_of_rows(error, weight), {}

    return loss
