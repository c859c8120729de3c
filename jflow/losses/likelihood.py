"""Maximum likelihood."""

from jflow.losses._batch import mean_of_rows, read
from jflow.types import ElboFlow, Flow, Loss

__all__ = ["negative_elbo", "nll"]


def nll(flow: Flow) -> Loss:
    """Negative log-likelihood of a flow (or any `Distribution`) in nats per row: the mean of -log_prob(x | cond).

    batch: 'x' [b, *event], optionally 'cond' and 'weight' [b] (weighted mean, sum(w l) / sum(w)). params are the
    flow's. The key goes to `log_prob`: a continuous flow draws its probes from it, dropout uses it, a deterministic
    flow ignores it.
    Errors: ValueError for a batch without 'x', with an unknown key, or with rows that don't match.
    """

    if isinstance(flow, ElboFlow):
        raise TypeError("nll: expected a flow with log_prob, got an ElboFlow, which has a bound: see negative_elbo")

    def loss(params, key, batch, frozen=None):
        x, cond, weight = read("nll", batch, ("x", "cond", "weight"))
        return mean_of_rows(-flow.log_prob(params, x, cond, key=key), weight), {}

    return loss


def negative_elbo(flow: ElboFlow) -> Loss:
    """The mean of -elbo(x | cond) in nats per row: an upper bound, in expectation, of the negative log-likelihood.

    Batch and errors as in `nll`; 'x' holds levels as floats where the flow dequantizes. The key draws what the flow's
    stochastic layers need; over `flows.importance_weighted(flow, draws)` the bound is tighter.
    """

    if not isinstance(flow, ElboFlow):
        raise TypeError(f"negative_elbo: expected an ElboFlow, got {type(flow).__name__}")

    def loss(params, key, batch, frozen=None):
        x, cond, weight = read("negative_elbo", batch, ("x", "cond", "weight"))
        return mean_of_rows(-flow.elbo(params, x, cond, key=key), weight), {}

    return loss
