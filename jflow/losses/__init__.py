"""Losses: (params, key, batch, frozen=None) -> (scalar, metrics)."""

from jflow.losses.augmented import drop_cond, noised
from jflow.losses.likelihood import negative_elbo, nll
from jflow.losses.matching import flow_matching
from jflow.losses.variational import reverse_kl

__all__ = ["drop_cond", "flow_matching", "negative_elbo", "nll", "reverse_kl", "noised"]
