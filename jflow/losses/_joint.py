"""Flow matching of several parts, each at a time of its own."""

from collections.abc import Mapping

import jax.numpy as jnp

from jflow import paths
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_noun, check_weights
from jflow.losses._errors import Metric, mean_squared_error
from jflow.losses._matching import part_errors
from jflow.losses._pairs import draw_parts
from jflow.types import Field, Loss, PartTimes, Path, Velocity

__all__ = ["joint_matching"]

_LINEAR = paths.linear()


def joint_matching(
    velocity: Velocity,
    *,
    time: PartTimes,
    weights: Mapping[str, float] | None = None,
    path: Path = _LINEAR,
    metric: Metric = mean_squared_error,
) -> Loss:
    """Flow matching of parts (an image, a text) that flow together, each at its own time.

    Also known as: multi-modal rectified flow, OmniFlow, UniDiffuser training.

        sum over parts i of w_i E[ |velocity(x, t, cond)_i - target_i|^2 / size_i | 0 < t_i < 1 ]

    x and t are dicts, x_i on its path at t_i. A part at t_i = 1 is given, with its data, and one at
    t_i = 0 absent, pure source: neither counts in the loss. One velocity so learns every
    conditional and every marginal law of the parts. `guidance.given_parts` takes them out of it.
    Parts are best brought to unit variance each before.

    Args:
        velocity: The velocity that is trained, of x and t dicts with one form.
        time: The law of the times, (key, n) -> {part: t [n] or [n, tokens]}, such as `times.parts`.
        weights: The weight w_i of a part by its name, 1 for those not named.
        path: The path of each part.
        metric: The error of a row of a part; see `flow_matching`.

    Returns:
        A loss of the batch {'x' {part: [b, *event]}, optionally 'x0' (standard normal when absent),
        'cond', 'weight'}, where 'weight' is [b], or a dict of [b] or [b, n], along the tokens, for
        some of the parts. The mean of a part is over the rows in which it is neither given nor
        absent. Its metrics are these means by part, without the weights w_i.

    Raises:
        TypeError: At construction for what is no `Velocity` or `Field`.
        ValueError: At construction for a negative weight; at trace time for an x that is no dict,
            for parts that differ between x, x0, times, weights and the velocity, for shapes that do
            not fit, and for a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses, oracles, times
        >>> oracle = oracles.joint_gaussian({"a": [0.0], "b": [0.0]}, [[1.0, 0.9], [0.9, 1.0]])
        >>> loss = losses.joint_matching(oracles.as_velocity(oracle), time=times.parts(("a", "b")))
        >>> batch = {"x": oracle.sample(jax.random.key(0), 8)}
        >>> value, metrics = loss({}, jax.random.key(1), batch)
        >>> sorted(metrics), value.shape
        (['a', 'b'], ())

    References:
        Li, Kallidromitis, Gokul, Liao, Kato, Kozuka, Grover, *OmniFlow: Any-to-Any Generation with
            Multi-Modal Rectified Flows*, 2024, arXiv:2412.01169.
        Bao, Nie, Xue, Li, Pu, Wang, Yue, Cao, Su, Zhu, *One Transformer Fits All Distributions in
            Multi-Modal Diffusion at Scale*, 2023, arXiv:2303.06555, for a time of each part.
    """
    name = "joint_matching"
    check_noun(name, velocity, Velocity, Field)
    weights = dict(weights or {})
    check_weights(name, **{f"weights[{part!r}]": weight for part, weight in weights.items()})

    def loss(params, key, batch, frozen=None):
        pairs = draw_parts(name, key, batch, time)
        if not isinstance(pairs.x1, Mapping):
            raise ValueError(
                f"{name}: expected 'x' to be a dict of parts, got an array {list(pairs.x1.shape)}"
            )
        if not isinstance(pairs.t, Mapping):
            raise ValueError(
                f"{name}: expected time to draw a dict of times by part, such as times.parts, got"
                f" an array {list(pairs.t.shape)}"
            )
        if unknown := sorted(set(weights) - set(pairs.x1)):
            raise ValueError(
                f"{name}: expected weights of the parts of x, {sorted(pairs.x1)}, got {unknown}"
            )
        metrics = {}
        for part, (error, weight, t) in part_errors(
            name, velocity, path, metric, params, pairs
        ).items():
            free = (t > 0) & (t < 1)
            counted = free.astype(error.dtype) if weight is None else jnp.where(free, weight, 0)
            metrics[part] = mean_of_rows(error, counted)
        return sum(weights.get(part, 1.0) * mean for part, mean in metrics.items()), metrics

    return loss
