"""Fitting a map from the samples of one unnormalized density to another."""

from collections.abc import Callable

from jflow._core.batch import mean_of_rows, read_batch
from jflow._core.checks import check_noun, check_rows
from jflow.types import Array, Bijector, Flow, Loss

__all__ = ["transfer"]


def transfer(
    bijector: Bijector | Flow,
    log_density: Callable[[Array], Array],
    onto: Callable[[Array], Array],
) -> Loss:
    """The divergence of mapped samples from another unnormalized density.

    Also known as: learned free-energy perturbation, LFEP, energy-based training between
    temperatures.

        mean over rows of log p~(x) - log p~_onto(y) - log |det dy/dx|,    y = forward(x)

    over samples x of p~, is KL(image of p, p_onto) - log(Z_onto / Z): an upper bound of minus the
    log-ratio of the constants, which the exact map reaches on every row.

    Args:
        bijector: The map, such as a `flows.cnf` of a `nets.PairVelocity`; the base of a flow is not
            looked at.
        log_density: The unnormalized log p~ of the data, [n, *event] -> [n].
        onto: The other one, finite wherever the map leads.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'cond', 'weight' [b]}. The key goes to the
        map. It has no metrics.

    Raises:
        TypeError: At construction for what is no `Bijector` or `Flow`.
        ValueError: At trace time for a batch that does not fit, and a log-density that is not [n].

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, losses
        >>> double = {"log_scale": jnp.log(2 * jnp.ones(1)), "shift": jnp.zeros(1)}
        >>> loss = losses.transfer(
        ...     bijectors.affine((1,)),
        ...     lambda x: -0.5 * jnp.sum(x**2, -1),
        ...     lambda x: -0.5 * jnp.sum(x**2, -1) / 4,
        ... )
        >>> round(float(loss(double, None, {"x": jnp.ones((3, 1))})[0]), 4)  # -log 2
        -0.6931

    References:
        Wirnsberger, Ballard, Papamakarios, Abercrombie, Racanière, Pritzel, Jimenez Rezende,
            Blundell, *Targeted free energy estimation via learned mappings*, 2020,
            arXiv:2002.04913.
    """
    check_noun("transfer", bijector, Bijector, Flow)

    def loss(params, key, batch, frozen=None):
        x, cond, weight = read_batch("transfer", batch, ("x", "cond", "weight"))
        y, log_det = bijector.forward(params, x, cond, key=key)
        before = check_rows("transfer", "log_density", log_density(x), x.shape[0])
        after = check_rows("transfer", "onto", onto(y), x.shape[0])
        return mean_of_rows(before - after - log_det, weight), {}

    return loss
