"""Metrics: arrays in, scalars out."""

from jflow.metrics.likelihood import bits_per_dim, gaussian_log_prob, log_mean_exp
from jflow.metrics.two_sample import energy_distance, nearest_distance, permutation_test

__all__ = [
    "bits_per_dim",
    "energy_distance",
    "gaussian_log_prob",
    "log_mean_exp",
    "nearest_distance",
    "permutation_test",
]
