"""Maximum likelihood of the velocity under a predicted Gaussian mixture."""

import math

import jax
import jax.numpy as jnp

from jflow import times
from jflow._core.arrays import expand_to, float_dtype
from jflow._core.batch import mean_of_rows, read_batch
from jflow._core.checks import need_key
from jflow.distributions import mixtures
from jflow.paths import LINEAR, Schedule, affine
from jflow.types import Field, Loss, Time

__all__ = ["mixture_matching"]

_UNIFORM = times.uniform()


def mixture_matching(
    field: Field, *, schedule: Schedule = LINEAR, time: Time = _UNIFORM, transition: float = 1.0
) -> Loss:
    """Gaussian mixture flow matching: the likelihood of velocities under a predicted mixture.

    The loss is -log q(velocity | x_t) under the mixture that field gives at x_t, t, in nats per
    dimension of the event (the shared log standard deviation counts once a dimension). One
    component of fixed std s makes it flow matching / (2 s^2) plus a constant; at the minimum it is
    the entropy of the velocity given x_t and t, a dimension. Conditions are dropped for guidance by
    `losses.drop_cond`.

    Args:
        field: The field that returns a `GaussianMixture`.
        schedule: The path, a `paths.Schedule`.
        time: The law of the times, (key, n) -> t [n].
        transition: How far the scored transition reaches, in (0, 1]. 1 scores the velocity,
            equivalently the data x1 itself. Below 1 it scores the point x_r at r = t + transition
            (1 - t) under the reverse transition of the mixture: the noise of the transition, added
            to both, smooths the likelihood where few components cannot follow the data.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'cond', 'weight' [b]}. The noise is drawn
        here, standard normal and independent of the data. The solvers' Bayes' rule needs it, so
        there is no coupling and no 'x0'. It has no metrics.

    Raises:
        TypeError: At trace time where field returns another thing.
        ValueError: At construction for a transition outside (0, 1]; at trace time for a mixture
            that does not fit x, a batch without 'x' or with unknown keys, and a key that is None.

    References:
        Chen et al., *Gaussian Mixture Flow Matching Models*, 2025, arXiv:2504.05304. Its spectral
            loss is not included.
    """
    if not 0 < transition <= 1:
        raise ValueError(f"mixture_matching: expected transition in (0, 1], got {transition}")
    path = affine(schedule)

    def loss(params, key, batch, frozen=None):
        need_key("mixture_matching", key)
        x1, cond, weight = read_batch("mixture_matching", batch, ("x", "cond", "weight"))
        time_key, noise_key, chain_key, dropout_key = jax.random.split(key, 4)
        n, dtype = x1.shape[0], x1.dtype
        x1 = x1.astype(float_dtype(x1))
        t = time(time_key, n).astype(x1.dtype)
        r = t + transition * (1 - t)
        noise = jax.random.normal(noise_key, x1.shape, x1.dtype)
        if transition == 1:
            x_t = path.point(noise, x1, t)
            wanted = path.target(noise, x1, t)
        else:
            wanted = path.point(noise, x1, r)
            ratio = schedule.alpha(t) / schedule.alpha(r)
            std = jnp.sqrt(schedule.sigma(t) ** 2 - (ratio * schedule.sigma(r)) ** 2)
            fresh = jax.random.normal(chain_key, x1.shape, x1.dtype)
            x_t = expand_to(ratio, x1) * wanted + expand_to(std, x1) * fresh
        found = field.apply(params, x_t.astype(dtype), t, cond, key=dropout_key)
        found = mixtures.check_mixture("mixture_matching", found, x_t)
        if transition < 1:
            found = mixtures.reverse_transition(found, x_t, t, r, schedule)
        per_row = -mixtures.log_prob(found, wanted) / max(1, math.prod(x1.shape[1:]))
        return mean_of_rows(per_row, weight), {}

    return loss
