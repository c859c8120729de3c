"""Guidance of Gaussian mixtures that stays inside the conditional one."""

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, flat_rows
from jflow._core.checks import check_cond, like_rows, rows
from jflow._core.numbers import check_number, number_at
from jflow.distributions import mixtures
from jflow.paths import LINEAR, Schedule, velocity_to_data
from jflow.types import Field, NumberOrFunction, PyTree

__all__ = ["probabilistic_guidance"]


def probabilistic_guidance(
    field: Field,
    scale: NumberOrFunction,
    *,
    null: PyTree,
    orthogonal: float = 1.0,
    schedule: Schedule = LINEAR,
) -> Field:
    """Guidance of a field of Gaussian mixtures, by a mask that reweights the conditional mixture.

    With the conditional mean m and isotropic variance v of a row, and n the difference of the
    conditional and the unconditional mean at root mean square 1, the mixture is multiplied by

        N(m + scale sqrt(v) n, (1 - scale^2) v) / N(m, v),

    which would move the mean of a single Gaussian by scale standard deviations and keep its mean
    square. A mixture moves weight to the components on that side, so that samples stay where the
    conditional law has mass. scale 0 is the conditional field. Both halves are one evaluation of 2b
    rows.

    Args:
        field: a field of `distributions.mixtures.GaussianMixture`s.
        scale: a number in [0, 1), or t [b] -> [b] with such values.
        null: the condition that stands for none, one row of cond without the batch axis, as
            `losses.drop_cond` trained it.
        orthogonal: how much of the part of the difference that lies along the conditional mean of
            x1 is left out, in [0, 1]; 1 is all of it.
        schedule: the path of the field; the default is the linear one.

    Returns:
        Field: the guided mixtures, with the params and the init of `field`. It raises a ValueError
            where cond is None or null is not a row of it.

    Raises:
        ValueError: scale is a number outside [0, 1), or orthogonal is outside [0, 1].

    References:
        Chen et al., *Gaussian Mixture Flow Matching Models*, 2025, arXiv:2504.05304.
    """
    check_number("probabilistic_guidance", "scale", scale, "in [0, 1)", lambda w: 0 <= w < 1)
    if not 0 <= orthogonal <= 1:
        raise ValueError(f"probabilistic_guidance: expected orthogonal in [0, 1], got {orthogonal}")

    def apply(params, x, t, cond=None, *, key=None):
        if cond is None:
            raise ValueError(
                "probabilistic_guidance: expected cond, what to guide towards, got None"
            )
        n = x.shape[0]
        cond = jax.tree.map(jnp.asarray, check_cond("probabilistic_guidance", cond, n))
        t = rows(t, n)
        nulls = like_rows("probabilistic_guidance", null, cond)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), (x, t, cond), (x, t, nulls))
        found = mixtures.check_mixture(
            "probabilistic_guidance", field.apply(params, *both, key=key), both[0]
        )
        given, free = (
            mixtures.GaussianMixture(*(v[half] for v in found))
            for half in (slice(n), slice(n, None))
        )
        center = mixtures.mean(given)
        bias = center - mixtures.mean(free)
        # means of x1 and of the velocity differ by a positive factor and a shift, so that only the
        # projection sees x1
        along = velocity_to_data(center, x, t, schedule)
        bias = (
            bias
            - orthogonal
            * expand_to(_dot(bias, along) / jnp.maximum(_dot(along, along), _TINY), x)
            * along
        )
        v = mixtures.variance(given)
        w = number_at("probabilistic_guidance", "scale(t)", scale, t, like=t).astype(v.dtype)
        bias = bias * expand_to(w * jnp.sqrt(v / jnp.maximum(_dot(bias, bias), _TINY)), x)
        return mixtures.shifted(given, bias)

    return Field(field.init, apply)


_TINY = 1e-12


def _dot(a, b):
    """The mean over the event of a b: [b]."""
    return jnp.mean(flat_rows(a * b), axis=1)
