"""Distillation of a flow into few steps: regression of whole displacements at a few times.

InstaFlow's way from a guided teacher to one step, for text and labels alike. Guidance changes the velocity, not its params,
and the condition goes with each pair:

    guided = guidance.cfg(velocity, 3.0, null=null)

    def source(key, n):                                   # a key each: labels must not be a function of the noise
        noise_key, label_key = jax.random.split(key)
        return {**normal_source(event)(noise_key, n), "cond": draw_labels(label_key, n)}

    data.generate_reflow_pairs(runs / "pairs", guided, params, source, 10**6, key=key, about={"guidance": 3.0})
    rows = data.read_shards(runs / "pairs")  # {'x0', 'x', 'cond'}
    loss = losses.flow_matching(velocity)      # reflow, from the teacher's params: the guidance is in the pairs now
    ... make_step, fit on rows; then pairs of the new flow, unguided, and from its params ...
    loss = distillation(velocity)              # metric: a distance of images
    x1, info = solvers.sample(velocity, params, x0, cond, method=solvers.fixed(1, diffrax.Euler()))

Source: Liu, Zhang, Ma, Peng, Liu, "InstaFlow: One Step is Enough for High-Quality Diffusion-Based Text-to-Image Generation",
2023.
"""

from collections.abc import Sequence

import numpy as np

from jflow import losses
from jflow._core.checks import need_pairs
from jflow.losses._errors import Metric, mean_squared_error
from jflow.times import fixed
from jflow.types import Loss, Velocity

__all__ = ["distillation"]


def distillation(
    velocity: Velocity, *, times: Sequence[float] = (0.0,), metric: Metric = mean_squared_error
) -> Loss:
    """Regression of x1 - x0 on (x_t, t, cond) at the given times alone, on pairs that a flow connects.

    With times = (0,) the velocity learns the flow's whole map: x1 = x0 + v(x0, 0), `solvers.sample` with one Euler step.
    With times = (0, 1/k, ..., 1 - 1/k) on the line between x0 and x1 it is sampled by k Euler steps. The flow to distil
    should be nearly straight (2-rectified at least): its pairs are what is learned.
    metric: (v, target, x_t, t) -> [b], as in `losses.flow_matching`; one that looks at images compares x_t + (1 - t) v
        with x_t + (1 - t) target.
    batch: 'x0' and 'x' [b, *event] (from `data.generate_reflow_pairs`), optionally 'cond', 'weight'. Errors: ValueError
    for times outside [0, 1), and as `losses.flow_matching`; at trace time for a batch without 'x0'.
    Source: Liu, Gong, Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow", 2023.
    """
    if np.any(np.asarray(times) >= 1):
        raise ValueError(f"distillation: expected times in [0, 1), got {list(times)}")
    matching = losses.flow_matching(velocity, time=fixed(times), metric=metric)

    def loss(params, key, batch, frozen=None):
        need_pairs("distillation", batch)
        return matching(params, key, batch, frozen)

    return loss
