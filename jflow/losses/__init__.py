"""Losses: (params, key, batch, frozen=None) -> (scalar, metrics)."""

from jflow.losses.likelihood import nll
from jflow.losses.matching import flow_matching

__all__ = ["flow_matching", "nll"]
