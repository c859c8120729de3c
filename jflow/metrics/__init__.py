"""Metrics: arrays in, scalars out."""

from jflow._core.names import explain_unknown
from jflow.metrics._evaluations import quality_by_evaluations
from jflow.metrics._frechet import Moments, frechet_between, frechet_distance, moments
from jflow.metrics._likelihood import bits_per_dim, gaussian_log_prob, log_mean_exp
from jflow.metrics._straightness import straightness, transport_cost, truncation_error
from jflow.metrics._tables import (
    ClassifierTest,
    associations,
    classifier_test,
    column_distances,
    nearest_gower_distances,
)
from jflow.metrics._two_sample import (
    energy_distance,
    nearest_distance,
    permutation_test,
    wasserstein,
)

__all__ = [
    "ClassifierTest",
    "Moments",
    "associations",
    "bits_per_dim",
    "classifier_test",
    "column_distances",
    "quality_by_evaluations",
    "energy_distance",
    "frechet_between",
    "frechet_distance",
    "gaussian_log_prob",
    "log_mean_exp",
    "moments",
    "nearest_distance",
    "nearest_gower_distances",
    "permutation_test",
    "straightness",
    "transport_cost",
    "truncation_error",
    "wasserstein",
]

explain_unknown(__name__)
