"""The evidence of a model whose likelihood is known, by a fitted posterior."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jflow import energy
from jflow._core.checks import check_rows
from jflow.apps.sbi._posterior import Posterior
from jflow.types import Array, Key


def evidence(
    key: Key,
    posterior: Posterior,
    log_likelihood: Callable[[Array], Array],
    draws: Array | np.ndarray,
    observation: Any = None,
) -> energy.Evidence:
    """The evidence of an observation, where the likelihood of the simulator is known too.

    The log-joint is log prior(theta) + log_likelihood(theta), and the fitted posterior is the flow
    of `energy.evidence`. A simulator without a likelihood has no evidence by these estimators.

    Args:
        key: A key.
        posterior: What `fit` returned.
        log_likelihood: theta [n, d] -> [n], nats, of the observation, with all of its constants.
        draws: Draws of the exact posterior, [n, d], or [chains, n, d], such as those of a sampler
            that knows the likelihood.
        observation: The observation; None is that of the posterior.

    Returns:
        `energy.Evidence`: the estimates by importance sampling (from the fitted posterior alone),
            bridge sampling and the harmonic mean (at temperature 1). Where they disagree, the
            fitted posterior is off.

    Raises:
        ValueError: For draws of another shape, or a log_likelihood that is not [n].
    """
    d = len(posterior.prior.low)

    def log_joint(theta):
        value = check_rows("sbi.evidence", "log_likelihood", log_likelihood(theta), len(theta))
        return value + jnp.asarray(posterior.prior.log_prob(np.asarray(theta)), value.dtype)

    target = energy.Target(log_joint, (d,))
    fitted = posterior.at(observation)
    return energy.evidence(target, jnp.asarray(draws), key, fitted, posterior.params)
