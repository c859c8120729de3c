"""Regression of velocity and denoiser of a stochastic interpolant."""

import jax
import jax.numpy as jnp

from jflow import paths, times
from jflow._core.arrays import float_dtype
from jflow._core.batch import mean_of_rows
from jflow._core.keys import same_draws
from jflow.losses._errors import mean_squared_error
from jflow.losses._pairs import draw_pairs
from jflow.paths import Interpolant, draw_noise
from jflow.types import Field, Loss, Time

__all__ = ["interpolant_matching"]

_UNIFORM = times.uniform()


def interpolant_matching(
    field: Field,
    coefficients: Interpolant,
    *,
    time: Time = _UNIFORM,
    noise_weight: float = 1.0,
) -> Loss:
    """Regression of the velocity and the denoiser of a stochastic interpolant.

    One field predicts both. The loss is |velocity - target|^2 + noise_weight |noise - z|^2, means
    over the event, then over rows, with z the noise of the interpolant.
    `paths.interpolant_velocity` and `paths.interpolant_score` are what the trained field samples
    with.

    Args:
        field: The field that returns {'velocity', 'noise'}, both shaped like x.
        coefficients: The interpolant, a `paths.Interpolant`.
        time: The law of the times, (key, n) -> t [n].
        noise_weight: The weight of the second term, not negative.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. 'x0' is usually given. Its metrics are 'velocity' and 'noise', the two terms.

    Raises:
        ValueError: At construction for a noise_weight < 0 and functions that don't meet their ends;
            at trace time for a field that doesn't return the two, a batch without 'x' or with
            unknown keys, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses, paths
        >>> from jflow.types import Field
        >>> zero = lambda params, x, t, cond=None, *, key=None: {"velocity": 0 * x, "noise": 0 * x}
        >>> loss = losses.interpolant_matching(Field(None, zero), paths.schroedinger_bridge(0.5))
        >>> value, metrics = loss({}, jax.random.key(0), {"x": jnp.ones((4, 2))})
        >>> sorted(metrics)
        ['noise', 'velocity']

    References:
        Albergo, Boffi, Vanden-Eijnden, *Stochastic Interpolants: A Unifying Framework for Flows and
            Diffusions*, 2023, arXiv:2303.08797.
    """
    if not noise_weight >= 0:
        raise ValueError(f"interpolant_matching: expected noise_weight >= 0, got {noise_weight}")
    path = paths.interpolant(coefficients)

    def loss(params, key, batch, frozen=None):
        pairs = draw_pairs("interpolant_matching", key, batch, time)
        x0, x1, cond, weight, t, path_key, dropout_key = pairs
        x_t = path.point(x0, x1, t, key=path_key).astype(x1.dtype)
        velocity, noise = (
            path.target(x0, x1, t, key=same_draws(path_key)),
            draw_noise(same_draws(path_key), x1),
        )
        targets = {"velocity": velocity, "noise": noise}
        found = field.apply(params, x_t, t, cond, key=dropout_key)
        shapes = jax.tree.map(jnp.shape, found)
        if shapes != jax.tree.map(jnp.shape, targets):
            raise ValueError(
                "interpolant_matching: expected a field of {'velocity', 'noise'}, "
                f"both of shape {list(x1.shape)}, "
                f"got {shapes}"
            )
        found, targets = jax.tree.map(lambda a: a.astype(float_dtype(x1)), (dict(found), targets))
        terms = {
            name: mean_of_rows(mean_squared_error(found[name], targets[name], x_t, t), weight)
            for name in ("velocity", "noise")
        }
        return terms["velocity"] + noise_weight * terms["noise"], terms

    return loss
