"""An unnormalized density, with what is known of it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jflow._core.checks import check_event, check_noun, check_rows
from jflow.types import Array, Key

__all__ = ["Target", "check_target", "posterior"]


class Target(NamedTuple):
    """A density up to its constant: log p(x) = log_density(x) - log Z.

    Also known as: energy function, Boltzmann distribution, unnormalized posterior.

    Attributes:
        log_density: x [n, *event] -> [n], nats, -inf outside the support. A posterior's is the log
            prior plus the log-likelihood.
        event_shape: the shape of one point.
        log_z: the log of the integral of exp(log_density), nats; None where it is not known. That
            of a posterior is the log evidence.
        sample: (key, n) -> [n, *event], exact draws; None where there are none.
        prior: of a posterior, its prior, a target with log_z 0; None otherwise. See `posterior`.
        log_likelihood: of a posterior, x [n, *event] -> [n], nats; None otherwise.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import energy
        >>> target = energy.Target(lambda x: -0.5 * jnp.sum(x**2, -1), (2,), log_z=1.8378771)
        >>> target.log_density(jnp.ones((1, 2))).tolist()
        [-1.0]
    """

    log_density: Callable[[Array], Array]
    event_shape: tuple[int, ...]
    log_z: float | None = None
    sample: Callable[[Key, int], Array] | None = None
    prior: "Target | None" = None
    log_likelihood: Callable[[Array], Array] | None = None


def posterior(
    log_prior: Callable[[Array], Array],
    log_likelihood: Callable[[Array], Array],
    event_shape: tuple[int, ...],
    *,
    sample: Callable[[Key, int], Array] | None = None,
    log_z: float | None = None,
) -> Target:
    """A posterior with its prior and its likelihood apart.

    Also known as: Bayesian model, joint density.

    Its log-density is log_prior(x) + log_likelihood(x), so that its log Z is the log evidence.
    Annealing starts at `target.prior` and raises the power of the likelihood.

    Args:
        log_prior: x [n, *event] -> [n], nats, normalized: it integrates to one.
        log_likelihood: x [n, *event] -> [n], nats, with all of its constants.
        event_shape: the shape of one x.
        sample: (key, n) -> [n, *event], draws from the prior; None where there are none.
        log_z: the log evidence, nats, where it is known.

    Returns:
        The target, with `prior` and `log_likelihood`.

    Examples:
        >>> import jax
        >>> from jflow import distributions, energy
        >>> normal = distributions.normal((2,))
        >>> target = energy.posterior(
        ...     lambda x: normal.log_prob({}, x),
        ...     lambda x: normal.log_prob({}, x - 1),
        ...     (2,),
        ...     sample=lambda key, n: normal.sample({}, key, n),
        ... )
        >>> x = target.prior.sample(jax.random.key(0), 3)
        >>> target.log_likelihood(x).shape
        (3,)
    """
    event_shape = tuple(event_shape)
    prior = Target(log_prior, event_shape, 0.0, sample)
    return Target(
        lambda x: log_prior(x) + log_likelihood(x),
        event_shape,
        log_z,
        prior=prior,
        log_likelihood=log_likelihood,
    )


def check_target(target: Target, x: Array) -> None:
    """Try a target at points, outside jit: the error names the first point that goes wrong.

    Args:
        target: The target.
        x: Points [n, *event], such as draws of the flow or of the prior that a method starts at.

    Raises:
        TypeError: For what is no `Target`.
        ValueError: For points of another shape than the target's, a log-density that is not [n],
            one that is NaN or +inf at a point, and one that is -inf at all of them.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import energy
        >>> root = energy.Target(lambda x: jnp.sqrt(x[:, 0]), (1,))
        >>> energy.check_target(root, jnp.array([[4.0], [-1.0]]))
        Traceback (most recent call last):
        ...
        ValueError: check_target: expected a log-density below inf, got nan at row 1, x = [-1.]
    """
    check_noun("check_target", target, Target)
    check_event("check_target", x, target.event_shape)
    given = check_rows("check_target", "log_density", target.log_density(x), x.shape[0])
    values = np.asarray(given, np.float64)
    bad = ~(values < np.inf)
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(
            f"check_target: expected a log-density below inf, got {values[row]} at row {row}, x ="
            f" {np.array2string(np.asarray(x[row]), separator=', ', threshold=8)}"
        )
    if np.all(values == -np.inf):
        raise ValueError(
            f"check_target: the log-density is -inf at all of the {len(values)} points: expected"
            " one within the support"
        )
