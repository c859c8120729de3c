"""Maximum likelihood of the steps of a chain."""

from jflow._core.batch import mean_of_rows, read_batch
from jflow._core.checks import check_noun
from jflow.flows import StepChain
from jflow.types import Loss

__all__ = ["step_nll"]


def step_nll(chain: StepChain) -> Loss:
    """The mean over the steps of the negative log-density of each, in nats per row and step.

        -1/T sum_k log p_k(x_k | cond)

    It is the negative log-likelihood of single steps, not of a trajectory: see `flows.step_chain`.
    Over stochastic layers it is an upper bound, for which the key draws.

    Also known as: composite likelihood, marginal likelihood of the steps.

    Args:
        chain: The `flows.StepChain`, whose params the loss takes.

    Returns:
        A loss of the batch {'x' [b, T, *event], optionally 'cond', 'weight' [b]}. The mean is
        weighted, sum(w l) / sum(w). Its metric is 'last', that of the last step, nats per row.

    Raises:
        TypeError: At construction for what is no `StepChain`.
        ValueError: At trace time for a batch without 'x', with an unknown key, or with rows or
            steps that don't match.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, distributions, flows, losses
        >>> chain = flows.step_chain(bijectors.affine((1,)), 2, distributions.normal((1,)))
        >>> batch = {"x": jnp.zeros((4, 2, 1))}
        >>> params = chain.init(jax.random.key(0), batch["x"])
        >>> value, metrics = losses.step_nll(chain)(params, jax.random.key(1), batch)
        >>> round(float(value), 3), sorted(metrics)  # log(2 pi) / 2
        (0.919, ['last'])

    References:
        Maeda, Ukita, *Fast Inference and Update of Probabilistic Density Estimation on Trajectory
            Prediction*, 2023, arXiv:2308.08824.
    """
    check_noun("step_nll", chain, StepChain)

    def loss(params, key, batch, frozen=None):
        x, cond, weight = read_batch("step_nll", batch, ("x", "cond", "weight"))
        log_prob = chain.log_prob(params, x, cond, key=key)
        by_step = mean_of_rows(-log_prob, weight)
        return by_step.mean(), {"last": by_step[-1]}

    return loss
