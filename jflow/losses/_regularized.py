"""Maximum likelihood of a continuous flow whose paths are asked to be straight and short."""

import diffrax

from jflow import solvers
from jflow._core.batch import mean_of_rows, read_batch
from jflow._core.checks import check_params
from jflow._core.keys import split_key
from jflow._core.nouns import base_log_prob
from jflow.solvers import Divergence, Method, exact_divergence
from jflow.types import Distribution, Loss, Velocity

__all__ = ["regularized_nll"]

_DEFAULT, _EXACT = solvers.adaptive(diffrax.Tsit5()), exact_divergence()


def regularized_nll(
    velocity: Velocity,
    base: Distribution,
    *,
    kinetic: float = 0.01,
    jacobian: float = 0.01,
    divergence: Divergence = _EXACT,
    method: Method | int | None = None,
    t1: float = 1.0,
) -> Loss:
    """Maximum likelihood of a continuous flow whose paths are asked to be straight and short.

    The loss is the mean over rows of

        -log p(x) + kinetic int |v|^2 dt + jacobian int |dv/dx|_F^2 dt,

    all of one solve. The integrals run along the path that ends in x, sums over the event, in nats
    beside the negative log-likelihood of `flows.cnf(velocity, base, ...)`, whose params
    {'velocity', 'base'} and options these are. Under an estimate of the divergence the Frobenius
    norm is estimated from the same products, at no cost.

    Args:
        velocity: The velocity of the flow.
        base: The distribution of the source.
        kinetic: The factor of the kinetic energy, not negative.
        jacobian: The factor of the Jacobian's square, not negative.
        divergence: How the divergence is taken: exact, or an estimate.
        method: How the ODE is solved, by default adaptively by Tsit5; an int is a number of steps.
        t1: The time of the data.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'cond', 'weight' [b]}. Its metrics are
        'nll', 'kinetic' and 'jacobian', the integrals without their factors.

    Raises:
        ValueError: At construction for negative factors and a method or a divergence that does not
            do; at trace time for params without the two parts, a divergence that needs a key and
            gets none, and a batch without 'x' or with unknown keys.

    References:
        Finlay, Jacobsen, Nurbekyan, Oberman, *How to Train Your Neural ODE: the World of Jacobian
            and Kinetic Regularization*, 2020, arXiv:2002.02798 (both factors 0.01 there; its
            objective is this one over the size of the event).
    """
    name = "regularized_nll"
    if not (kinetic >= 0 and jacobian >= 0):
        raise ValueError(f"{name}: expected kinetic, jacobian >= 0, got {kinetic}, {jacobian}")
    method = solvers.as_method(name, method, _DEFAULT, t1=t1, rising=True)
    solvers.check_divergence(name, divergence)
    options = {"divergence": divergence, "method": method, "t1": t1}

    def loss(params, key, batch, frozen=None):
        x, cond, weight = read_batch(name, batch, ("x", "cond", "weight"))
        check_params(name, params, "velocity", "base")
        probe_key, base_key = split_key(key, 2)
        of_base = lambda z: base_log_prob(name, base, params, z, cond, base_key)  # noqa: E731
        value, speeds, norms, _ = solvers.log_prob_with_energies(
            velocity, params["velocity"], x, of_base, cond, key=probe_key, **options
        )
        parts = {"nll": -value, "kinetic": speeds, "jacobian": norms}
        parts = {what: mean_of_rows(rows, weight) for what, rows in parts.items()}
        return parts["nll"] + kinetic * parts["kinetic"] + jacobian * parts["jacobian"], parts

    return loss
