"""Maximum likelihood."""

from jflow._core.batch import mean_of_rows, read_batch
from jflow._core.checks import check_noun, check_rows
from jflow.types import Distribution, ElboFlow, Flow, Loss

__all__ = ["negative_elbo", "nll"]


def nll(flow: Flow) -> Loss:
    """Negative log-likelihood of a flow (or any `Distribution`) in nats per row: the mean of -log_prob(x | cond).

    batch: 'x' [b, *event], optionally 'cond' and 'weight' [b] (weighted mean, sum(w l) / sum(w)). params are the
    flow's. The key goes to `log_prob`: a continuous flow draws its probes from it, dropout uses it, a deterministic
    flow ignores it.
    Errors: TypeError for what has no log_prob; ValueError for a batch without 'x', with an unknown key, or with rows
    that don't match.
    """

    check_noun("nll", flow, Flow, Distribution)

    def loss(params, key, batch, frozen=None):
        x, cond, weight = read_batch("nll", batch, ("x", "cond", "weight"))
        log_prob = check_rows(
            "nll", "log_prob", flow.log_prob(params, x, cond, key=key), x.shape[0]
        )
        return mean_of_rows(-log_prob, weight), {}

    return loss


def negative_elbo(flow: ElboFlow) -> Loss:
    """The mean of -elbo(x | cond) in nats per row: an upper bound, in expectation, of the negative log-likelihood.

    Batch and errors as in `nll`; 'x' holds levels as floats where the flow dequantizes. The key draws what the flow's
    stochastic layers need; over `flows.importance_weighted(flow, draws)` the bound is tighter.
    """

    check_noun("negative_elbo", flow, ElboFlow)

    def loss(params, key, batch, frozen=None):
        x, cond, weight = read_batch("negative_elbo", batch, ("x", "cond", "weight"))
        elbo = check_rows("negative_elbo", "elbo", flow.elbo(params, x, cond, key=key), x.shape[0])
        return mean_of_rows(-elbo, weight), {}

    return loss
