"""Distillation of a flow into few steps: regression of whole displacements at a few times.

InstaFlow's way from a guided teacher to one step, for text and labels alike. Guidance changes the
velocity, not its params, and the condition goes with each pair:

    guided = guidance.cfg(velocity, 3.0, null=null)
    noise = couplings.normal_source(event)

    def source(key, n):                    # a key each: labels must not be a function of the noise
        noise_key, label_key = jax.random.split(key)
        return {**noise(noise_key, n), "cond": draw_labels(label_key, n)}

    folder, about = runs / "pairs", {"guidance": 3.0}
    data.generate_reflow_pairs(folder, guided, params, source, 10**6, key=key, about=about)
    rows = data.read_shards(folder)        # {'x0', 'x', 'cond'}
    loss = losses.flow_matching(velocity)  # reflow, from the teacher's params: the pairs are guided
    ... make_step, fit on rows; then pairs of the new flow, unguided, and from its params ...
    loss = distillation(velocity)          # metric: a distance of images
    x1, info = solvers.sample(velocity, params, x0, cond, method=solvers.fixed(1, diffrax.Euler()))

The paper is Liu, Zhang, Ma, Peng, Liu, *InstaFlow: One Step is Enough for High-Quality
Diffusion-Based Text-to-Image Generation*, 2023.
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
    """Regression of x1 - x0 at a few times, on pairs that a flow connects, for few steps.

    Also known as: rectified flow distillation, one-step distillation.

    The loss is that of `losses.flow_matching` at (x_t, t, cond) with t among `times`. With times =
    (0,) the velocity learns the flow's whole map: x1 = x0 + v(x0, 0), `solvers.sample` with one
    Euler step. With times = (0, 1/k, ..., 1 - 1/k) on the line between x0 and x1 it is sampled by k
    Euler steps. The flow to distill should be nearly straight (2-rectified at least): its pairs are
    what is learned.

    Args:
        velocity: The velocity that is trained.
        times: The times in [0, 1), each as often.
        metric: The error of a row, (v, target, x_t, t) -> [b]; one that looks at images compares
            x_t + (1 - t) v with x_t + (1 - t) target.

    Returns:
        A loss of the batch {'x0' and 'x' [b, *event], a pair a row, optionally 'cond', 'weight'
        [b]}. `data.generate_reflow_pairs` makes the pairs. It has no metrics.

    Raises:
        ValueError: At construction for times outside [0, 1); at trace time for a batch without
            'x0', a velocity or a metric of another shape, a batch without 'x' or with unknown keys,
            and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> from jflow.types import Velocity
        >>> still = Velocity(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> batch = {"x0": jnp.zeros((4, 2)), "x": 3 * jnp.ones((4, 2))}
        >>> float(losses.distillation(still)({}, jax.random.key(0), batch)[0])
        9.0

    References:
        Liu, Gong, Liu, *Flow Straight and Fast: Learning to Generate and Transfer Data with
            Rectified Flow*, 2023, arXiv:2209.03003.
        Liu, Zhang, Ma, Peng, Liu, *InstaFlow: One Step is Enough for High-Quality Diffusion-Based
            Text-to-Image Generation*, 2023, arXiv:2309.06380.
    """
    if np.any(np.asarray(times) >= 1):
        raise ValueError(f"distillation: expected times in [0, 1), got {list(times)}")
    matching = losses.flow_matching(velocity, time=fixed(times), metric=metric)

    def loss(params, key, batch, frozen=None):
        need_pairs("distillation", batch)
        return matching(params, key, batch, frozen)

    return loss
