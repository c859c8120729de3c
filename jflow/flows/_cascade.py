"""Images from coarse to fine, as laws of their wavelet bands."""

import jax
import jax.numpy as jnp

from jflow import bijectors
from jflow._core.checks import (
    check_cond,
    check_draws,
    check_key,
    check_noun,
    check_params,
    count_rows,
)
from jflow._core.conditions import as_condition
from jflow._core.keys import split_key
from jflow.types import Distribution, Flow

__all__ = ["haar_cascade"]


def haar_cascade(coarse: Distribution | Flow, fine: Distribution | Flow) -> Distribution:
    """FlowAR: the law of an image by that of its coarse half and of the details, given that.

        log p(x) = log p_coarse(low) + log p_fine(details | low)

    low [b, H/2, W/2, C] and details [b, H/2, W/2, 3 C] are the bands of the orthonormal Haar
    transform, whose log-determinant is 0: likelihoods add. low is twice the mean of 2 x 2 pixels.
    coarse may be a cascade itself, for more scales. The two parts share no parameters, and may be
    trained apart, each by a loss of its own, such as `losses.flow_matching` where it is a
    `flows.cnf`.

    Args:
        coarse: the law of low, with the condition of the user.
        fine: the law of details with low in the `aligned` part of the condition, a
            `types.Condition` with the user's label and vector.

    Returns:
        Distribution: of images [b, H, W, C], with params {'coarse', 'fine'}.

    Raises:
        TypeError: at construction for what is no `Distribution` or `Flow`.
        ValueError: at trace time for an image of odd sides, or a condition that is not None,
            labels, a vector or a `types.Condition`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, flows
        >>> law = flows.haar_cascade(
        ...     distributions.normal((1, 1, 1)), distributions.normal((1, 1, 3))
        ... )
        >>> log_prob = law.log_prob({"coarse": {}, "fine": {}}, jnp.zeros((1, 2, 2, 1)))
        >>> round(float(log_prob[0]), 3)  # four standard normal numbers
        -3.676

    References:
        Ren, Yu, He, Shen, Yuille, Chen, *FlowAR: Scale-wise Autoregressive Image Generation Meets
            Flow Matching*, 2024, arXiv:2412.15205 (bands of Haar in the place of scales of an
            autoencoder are ours, for the density).
        Yu, Derpanis, Brubaker, *Wavelet Flow: Fast Training of High Resolution Normalizing Flows*,
            2020, arXiv:2010.13821.
    """
    check_noun("haar_cascade", coarse, Distribution, Flow)
    check_noun("haar_cascade", fine, Distribution, Flow)
    haar = bijectors.haar()

    def bands(name, x, cond):
        """(low, details, cond for the details)"""
        cond = check_cond(name, cond, count_rows(name, x))
        mixed = haar.forward({}, jnp.asarray(x))[0]
        channels = mixed.shape[-1] // 4
        low, details = mixed[..., :channels], mixed[..., channels:]
        return low, details, cond, _beside(name, low, cond)

    def init(key, x, cond=None):
        check_key("haar_cascade.init", key)
        low, details, cond, given = bands("haar_cascade.init", x, cond)
        coarse_key, fine_key = jax.random.split(key)
        return {
            "coarse": coarse.init(coarse_key, low, cond),
            "fine": fine.init(fine_key, details, given),
        }

    def log_prob(params, x, cond=None, *, key=None):
        check_params("haar_cascade.log_prob", params, "coarse", "fine")
        low, details, cond, given = bands("haar_cascade.log_prob", x, cond)
        coarse_key, fine_key = split_key(key, 2)
        return coarse.log_prob(params["coarse"], low, cond, key=coarse_key) + fine.log_prob(
            params["fine"], details, given, key=fine_key
        )

    def sample(params, key, n, cond=None):
        check_params("haar_cascade.sample", params, "coarse", "fine")
        n, cond = check_draws("haar_cascade.sample", key, n, cond)
        coarse_key, fine_key = jax.random.split(key)
        low = coarse.sample(params["coarse"], coarse_key, n, cond)
        given = _beside("haar_cascade.sample", low, cond)
        details = fine.sample(params["fine"], fine_key, n, given)
        return haar.inverse({}, jnp.concatenate([low, details.astype(low.dtype)], axis=-1))[0]

    return Distribution(init, log_prob, sample)


def _beside(name, low, cond):
    parts = as_condition(name, cond)
    if parts.aligned is not None:
        raise ValueError(f"{name}: expected no cond.aligned, whose place the coarse half takes")
    return parts._replace(aligned=low)
