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
    """Conditional flow matching: regression of a velocity on the path between source and data.

    Also known as: conditional flow matching, CFM, rectified flow loss.

    The loss is the mean over the event of (velocity(x_t, t, cond) - target)^2, then over rows. It
    doesn't grow with the size of the event. Other pairs, dropped conditions and more come before
    it, by `losses.chain`.

    Args:
        velocity: The velocity that is trained.
        path: The path, which gives x_t and its target.
        time: The law of the times, (key, n) -> t [n].
        metric: The error of a row, (v, target, x_t, t) -> [b] (`pseudo_huber`, `perceptual_huber`,
            or your own).

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. The mean is weighted, sum(w l) / sum(w). It has no metrics.

    Raises:
        TypeError: At construction for what is no `Velocity` or `Field`.
        ValueError: At trace time for a velocity or a metric of another shape, a batch without 'x',
            with unknown keys or rows that don't match, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> from jflow.types import Velocity
        >>> still = Velocity(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> batch = {"x0": jnp.zeros((4, 2)), "x": jnp.ones((4, 2))}
        >>> float(losses.flow_matching(still)({}, jax.random.key(0), batch)[0])
        1.0

    References:
        Lipman et al., *Flow Matching for Generative Modeling*, 2023, arXiv:2210.02747.
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
                f"flow_matching: expected a velocity of shape {list(target.shape)}, "
                f"got {list(v.shape)}"
            )
        error = metric(v.astype(float_dtype(x1)), target.astype(float_dtype(x1)), x_t, t)
        if error.shape != t.shape:
            raise ValueError(
                f"flow_matching: expected a metric of shape {list(t.shape)}, "
                f"got {list(error.shape)}"
            )
        return mean_of_rows(error, weight), {}

    return loss
