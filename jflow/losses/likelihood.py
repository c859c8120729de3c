"""Maximum likelihood."""

from jflow.losses._batch import mean_of_rows, read
from jflow.types import Flow, Loss

__all__ = ["nll"]


def nll(flow: Flow) -> Loss:
    """Negative log-likelihood of a flow (or any `Distribution`) in nats per row: the mean of -log_prob(x | cond).

    batch: 'x' [b, *event], optionally 'cond' and 'weight' [b] (weighted mean, sum(w l) / sum(w)). params are the
    flow's. The key goes to `log_prob`: a continuous flow draws its probes from it, dropout uses it, a deterministic
    flow ignores it.
    Errors: ValueError for a batch without 'x', with an unknown key, or with rows that don't match.
    """

    def loss(params, key, batch, frozen=None):
        x, cond, weight = read("nll", batch, ("x", "cond", "weight"))
        return mean_of_rows(-flow.log_prob(params, x, cond, key=key), weight), {}

    return loss
