"""From the samples of one density to another: weights of a map between two energies."""

from collections.abc import Callable

from jaxtyping import Array, Float

from jflow._core.checks import check_rows
from jflow.types import Bijector, Cond, Flow, Params

__all__ = ["transfer_weights"]


def transfer_weights(
    bijector: Bijector | Flow,
    params: Params,
    x: Float[Array, "n *event"],
    log_density: Callable[[Array], Array],
    onto: Callable[[Array], Array],
    cond: Cond = None,
) -> tuple[Float[Array, "n *event"], Float[Array, " n"]]:
    """Samples of one density mapped to another, with their weights there.

    Also known as: targeted free-energy perturbation, TFEP, learned free-energy perturbation,
    Boltzmann generator between temperatures.

        y = forward(x),    log w = log p~_onto(y) - log p~(x) + log |det dy/dx|,
        E[w] = Z_onto / Z

    over samples x of p~, for every map: `estimate_log_z` of them is the log-ratio of the constants,
    minus the difference of the free energies, and the weights make y samples of `onto`.
    `losses.transfer` trains the map.

    Args:
        bijector: the map, such as a `flows.cnf` of a `nets.PairVelocity`; the base of a flow is
            not looked at.
        params: its params.
        x: samples of the first density, [n, *event].
        log_density: the first unnormalized log-density, [n, *event] -> [n], such as -U / T1.
        onto: the second, such as -U / T2.
        cond: what the map takes.

    Returns:
        y: the mapped samples, [n, *event].
        log_w: their log-weights, [n], nats.

    Raises:
        ValueError: a log-density is not [n].

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, energy
        >>> double = {"log_scale": jnp.log(2 * jnp.ones(1)), "shift": jnp.zeros(1)}
        >>> y, log_w = energy.transfer_weights(  # from N(0, 1) to N(0, 4): the map is exact
        ...     bijectors.affine((1,)),
        ...     double,
        ...     jnp.array([[0.5], [1.0]]),
        ...     lambda x: -0.5 * jnp.sum(x**2, -1),
        ...     lambda x: -0.5 * jnp.sum(x**2, -1) / 4,
        ... )
        >>> [round(float(a), 4) for a in log_w]  # log 2
        [0.6931, 0.6931]

    References:
        Wirnsberger, Ballard, Papamakarios, Abercrombie, Racanière, Pritzel, Jimenez Rezende,
            Blundell, *Targeted free energy estimation via learned mappings*, 2020,
            arXiv:2002.04913.
        Dibak, Klein, Krämer, Noé, *Temperature Steerable Flows and Boltzmann Generators*, 2021,
            arXiv:2108.01590.
    """
    n = x.shape[0]
    y, log_det = bijector.forward(params, x, cond)
    before = check_rows("transfer_weights", "log_density", log_density(x), n)
    after = check_rows("transfer_weights", "onto", onto(y), n)
    return y, after - before + log_det
