"""Regression of a velocity on the path between source and data."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jflow import paths, times
from jflow._core.arrays import float_dtype
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_noun, check_parts
from jflow._core.keys import same_draws
from jflow.losses._errors import Metric, mean_squared_error
from jflow.losses._pairs import Pairs, by_part, draw_parts, split_by_part, whole
from jflow.types import Array, Field, Loss, Params, PartTimes, Path, Time, Velocity

__all__ = ["flow_matching"]

_LINEAR, _UNIFORM = paths.linear(), times.uniform()


def flow_matching(
    velocity: Velocity,
    *,
    path: Path = _LINEAR,
    time: Time | PartTimes = _UNIFORM,
    metric: Metric = mean_squared_error,
) -> Loss:
    """Conditional flow matching: regression of a velocity on the path between source and data.

    Also known as: conditional flow matching, CFM, rectified flow loss.

    The loss is the mean over the event of (velocity(x_t, t, cond) - target)^2, then over rows. It
    doesn't grow with the size of the event. Other pairs, dropped conditions and more come before
    it, by `losses.chain`.

    With weights [b, n], or times [b, n] (`times.tokens`), the error is that of each token of x [b,
    n, *event], and the mean is over tokens; a token of weight 0 counts nothing. Padded data are
    {'x', 'cond': Condition(valid=mask), 'weight': mask}. For a dict x of parts the loss is the mean
    over the parts of the loss of each, with one time for all, or of each its own
    (`joint_matching`, which knows given parts).

    Args:
        velocity: The velocity that is trained.
        path: The path, which gives x_t and its target.
        time: The law of the times, (key, n) -> t [n], or [n, tokens], or a dict of such by part.
        metric: The error of a row, (v, target, x_t, t) -> [b] (`pseudo_huber`, `perceptual_huber`,
            or your own).

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b] or [b, n]}, where 'x' and 'x0' may be dicts of parts, and 'weight' then a dict
        for some of them. The mean is weighted, sum(w l) / sum(w). It has no metrics.

    Raises:
        TypeError: At construction for what is no `Velocity` or `Field`.
        ValueError: At trace time for a velocity, a metric or times of another shape or with other
            parts, a batch without 'x', with unknown keys or rows that don't match, and a key that
            is None.

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
        pairs = draw_parts("flow_matching", key, batch, time)
        errors = part_errors("flow_matching", velocity, path, metric, params, pairs)
        means = [mean_of_rows(error, weight) for error, weight, _ in errors.values()]
        return sum(means[1:], means[0]) / len(means), {}

    return loss


def part_errors(
    name: str, velocity: Velocity, path: Path, metric: Metric, params: Params, pairs: Pairs
) -> dict[Any, tuple[Array, Array | None, Array]]:
    """The (errors, weights, times) of each part, [b] or, of tokens, [b n]; None is the name of x
    where that is an array."""
    cond, weight, t = pairs.cond, pairs.weight, pairs.t
    x0, x1 = by_part(pairs.x0), by_part(pairs.x1)
    times: dict[Any, Any] = dict(t) if isinstance(t, Mapping) else dict.fromkeys(x1, t)
    weights = weight if isinstance(weight, Mapping) else dict.fromkeys(x1, weight)
    x_t, target = {}, {}
    for own, part in zip(split_by_part(pairs.path_key, pairs.x1), x1, strict=True):
        ends = x0[part], x1[part], times[part]
        x_t[part] = path.point(*ends, key=own).astype(x1[part].dtype)
        target[part] = path.target(*ends, key=same_draws(own))
    v = velocity.apply(params, whole(x_t), t, cond, key=pairs.dropout_key)
    if isinstance(pairs.x1, Mapping):
        check_parts(name, "a velocity", v if isinstance(v, Mapping) else {}, pairs.x1)
    v = by_part(v)
    return {
        part: _errors(
            name, part, metric, v[part], target[part], x_t[part], times[part], weights[part]
        )
        for part in x1
    }


def _errors(name, part, metric, v, target, x_t, t, weight):
    """(errors, weights, times) of one part."""
    of = "" if part is None else f" of the part {part!r}"
    if v.shape != target.shape:
        raise ValueError(
            f"{name}: expected a velocity{of} of shape {list(target.shape)}, got {list(v.shape)}"
        )
    v, target = (a.astype(float_dtype(x_t)) for a in (v, target))
    if t.ndim == 2 or (weight is not None and weight.ndim == 2):  # then a token is a row
        b, n = x_t.shape[:2]
        fold = lambda a: a.reshape(b * n, *a.shape[2:])  # noqa: E731
        each = lambda a: fold(jnp.broadcast_to(a if a.ndim == 2 else a[:, None], (b, n)))  # noqa: E731
        v, target, x_t, t = fold(v), fold(target), fold(x_t), each(t)
        weight = None if weight is None else each(weight)
    error = metric(v, target, x_t, t)
    if error.shape != t.shape:
        raise ValueError(
            f"{name}: expected a metric{of} of shape {list(t.shape)}, got {list(error.shape)}"
        )
    return error, weight, t
